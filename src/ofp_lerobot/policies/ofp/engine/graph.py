"""A program recorded once as a CUDA graph and replayed with new inputs."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

WARM_UP_RUNS = 3  # libraries choose their kernels and take their workspace outside the recording


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


class Turn:
    """Memory shared by graphs that never run at the same time, whatever stream their callers are on."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._free = torch.cuda.Event()

    def begin(self) -> None:
        self._free.wait()

    def end(self) -> None:
        self._free.record()


class Graph:
    """`run(*inputs)` for inputs of fixed shapes: one launch, no host synchronisation."""

    def __init__(self, run: Callable[..., Tensor], inputs: Inputs, turn: Turn) -> None:
        self._inputs = inputs
        self._turn = turn
        self._staged = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in inputs.tensors()]
        self._uploaded = torch.cuda.Event()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                run(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=turn.pool, capture_error_mode="thread_local"):
            self._actions = run(*inputs)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Host inputs go through page-locked memory, so that the host need not wait for the copy."""
        self._turn.begin()
        self._uploaded.synchronize()  # of the call before: its copies have left the page-locked memory
        for static, staged, new in zip(self._inputs.tensors(), self._staged, inputs.tensors(), strict=True):
            static.copy_(staged.copy_(new) if new.device.type == "cpu" else new, non_blocking=True)
        self._uploaded.record()
        self._graph.replay()
        actions = self._actions.clone()
        self._turn.end()
        return actions
