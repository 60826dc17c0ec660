"""A program recorded once as a CUDA graph and replayed with new inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

RECORDING = RLock()
"""Held while recording: one at a time in a process. PyTorch's bookkeeping of captures is one for all threads."""


class Inputs(NamedTuple):
    """What changes from call to call, see `program.answer`."""

    images: tuple[Tensor, ...]
    tokens: Tensor
    token_mask: Tensor
    x: Tensor
    grid: Tensor

    def tensors(self) -> Iterator[Tensor]:
        yield from self.images
        yield from self[1:]

    def to(self, device: torch.device) -> Self:
        return type(self)(tuple(image.to(device) for image in self.images), *(t.to(device) for t in self[1:]))

    def pinned(self) -> Self:
        """Page-locked host memory of the same shapes."""
        images, *others = self
        staged = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (*images, *others)]
        return type(self)(tuple(staged[: len(images)]), *staged[len(images) :])

    def cut(self, text: int) -> Self:
        """The same memory for shorter texts; tokens and their mask stay contiguous."""
        b = len(self.tokens)
        tokens, token_mask = (t.flatten()[: b * text].view(b, text) for t in (self.tokens, self.token_mask))
        return self._replace(tokens=tokens, token_mask=token_mask)

    @classmethod
    def empty(cls, images: Any, text: int, actions: torch.Size, steps: int, device: torch.device) -> Self:
        """Inputs of these shapes, of a prompt of padding; images: shape (b, ...) and dtype of each."""
        b = images[0][0][0]
        return cls(
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in images),
            torch.zeros(b, text, dtype=torch.long, device=device),
            torch.zeros(b, text, dtype=torch.bool, device=device),
            torch.zeros(actions, device=device),
            torch.linspace(1, 0, steps + 1, device=device),
        )


class ReplayOrder:
    """The replays of a device, which wait for each other whatever stream or thread their callers are on.

    Recordings of one stream share cuBLAS's workspace, and streams come from a small pool: graphs of two engines could
    write to the same one. Waiting is done by the device and costs a microsecond; the host is held while one launches.
    """

    def __init__(self) -> None:
        self._launching = RLock()
        self._free = torch.cuda.Event()
        # To record on, one for all: PyTorch's memory pools give a block only to the stream that had it.
        self.stream = torch.cuda.Stream()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is launched within follows all that was launched in earlier turns, and is followed by later ones."""
        with self._launching:
            self._free.wait()
            try:
                yield
            finally:
                self._free.record()

    def synchronise(self) -> None:
        """Waits on the host until no replay is under way."""
        self._free.synchronize()


_replay_orders: dict[int, ReplayOrder] = {}


def replay_order(device: torch.device) -> ReplayOrder:
    """The one of a device."""
    with RECORDING:
        index = torch.cuda.current_device() if device.index is None else device.index
        return _replay_orders.setdefault(index, ReplayOrder())


class Ports(NamedTuple):
    """Where inputs come in: on the device, and on the host in page-locked memory that the device reads by itself."""

    inputs: Inputs
    staged: Inputs
    uploaded: torch.cuda.Event

    @classmethod
    def like(cls, inputs: Inputs) -> Self:
        return cls(inputs, inputs.pinned(), torch.cuda.Event())

    def cut(self, text: int) -> Self:
        """For shorter texts: images, noise and times come in by the same memory."""
        return type(self)(self.inputs.cut(text), self.staged.cut(text), self.uploaded)

    def upload(self, inputs: Inputs) -> None:
        """Host inputs go through page-locked memory, so that the host need not wait for the copy."""
        self.uploaded.synchronize()  # of the call before: its copies have left the page-locked memory
        for static, staged, new in zip(*(i.tensors() for i in (self.inputs, self.staged, inputs)), strict=True):
            static.copy_(staged.copy_(new) if new.device.type == "cpu" else new, non_blocking=True)
        self.uploaded.record()


class Graph:
    """`run(*inputs)` for inputs of fixed shapes: one launch, no host synchronisation.

    Made on the current device. pool: of `torch.cuda.graph_pool_handle`, for graphs that share their order of replays.
    """

    def __init__(self, run: Callable[..., Tensor], ports: Ports, order: ReplayOrder, pool: Any) -> None:
        self._ports = ports
        self._order = order
        inputs = ports.inputs
        # A stream of this device: torch.cuda.graph's own is of the device that recorded first in the process.
        side = order.stream
        with order.turn():
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(*inputs)  # libraries choose their kernels, and Triton compiles, outside the recording
            torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self._actions = run(*inputs)

    def __call__(self, inputs: Inputs) -> Tensor:
        with self._order.turn():
            self._ports.upload(inputs)
            self._graph.replay()
            return self._actions.clone()

    def synchronise(self) -> None:
        """Waits on the host until no replay on the device is under way."""
        self._order.synchronise()
