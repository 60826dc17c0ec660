"""Runs `program.answer` for a policy's network: at once on a CPU, as one recorded CUDA graph per shape on a GPU."""

import copy
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import RLock
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from ...vla.text import TextExtent
from ..network import OFPNetwork
from .graph import RECORDING, Graph, Inputs, Ports, replay_order
from .operations import Fused, Operations, Plain
from .program import Padding, answer
from .weights import Weights, reason_not_to_run

logger = logging.getLogger(__name__)

TEXT_BUCKET = 32  # a graph's text length is a multiple of it: the padding costs at most 4 % of a prefix of 800 tokens
MOST_SHAPES = 8  # kept recorded, the least recently used given up first
# Inductor's modes without its own CUDA graphs: the engine records them itself.
_WITHOUT_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}


class Shape(NamedTuple):
    """What a graph is recorded for, the text's length left out."""

    images: tuple[tuple[torch.Size, torch.dtype], ...]
    actions: torch.Size
    steps: int
    instantaneous: bool
    padding: Padding
    device: torch.device


class Engine:
    """The fast path of one network. Threads may share it: calls wait for each other.

    Weights that change in place are seen at once; where they were replaced (another dtype, device or module) the
    engine is built anew. A network it does not know (adapters, hooks, other attention) is warned of and answered with
    None. Building it moves the parameters' memory (`weights.py`): what else shared that memory no longer does.
    """

    def __init__(
        self, network: OFPNetwork, *, compile_mode: str | None = None, fp8: bool = False, asked: bool = True
    ) -> None:
        """compile_mode: torch.compile's; None runs PyTorch's own kernels and, on a GPU, Triton's.

        fp8: multiplies the prefix's MLPs in 8 bits, on GPUs that can; not with compile_mode. asked: whether the user
        chose the engine, and is warned where it cannot serve.
        """
        self._network = network
        self._compile_mode = compile_mode
        self._fp8 = fp8
        self._asked = asked
        self._refused: str | None = None
        self._weights: Weights | None = None
        self._graphs: OrderedDict[Shape, dict[int, Graph]] = OrderedDict()
        self._unrecorded: set[Shape] = set()
        self._told_error = self._tried = False
        self._pool: Any = None
        self._lock = RLock()
        self._operations: Operations | None = None
        self._answer: Callable[..., Tensor] = answer
        if compile_mode is not None:
            mode = _WITHOUT_GRAPHS.get(compile_mode, compile_mode)
            self._answer = torch.compile(answer, mode=mode, dynamic=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a copied policy: graphs belong to the network they were recorded for."""
        network = copy.deepcopy(self._network, memo)
        return type(self)(network, compile_mode=self._compile_mode, fp8=self._fp8, asked=self._asked)

    def release(self) -> None:
        """Gives up joined matrices and graphs, for example before the parameters move; the next call builds anew."""
        with self._lock:
            self._forget_graphs()
            self._weights = None
            self._unrecorded.clear()

    def _forget_graphs(self, keep: int = 0) -> None:
        """All but the `keep` most recently used. Waits for answers under way: their memory may be given to others."""
        while len(self._graphs) > keep:
            _, graphs = self._graphs.popitem(last=False)
            for graph in graphs.values():
                graph.synchronise()
        if not self._graphs:
            self._pool = None

    @torch.inference_mode(False)  # its buffers outlive the caller's mode
    @torch.no_grad()
    def __call__(
        self,
        images: Sequence[Tensor],
        tokens: Tensor,
        token_mask: Tensor,
        extent: TextExtent,
        x: Tensor,
        grid: Sequence[float],
        *,
        instantaneous: bool,
    ) -> Tensor | None:
        """Actions (n, horizon, action_dim) float32 on the network's device, None where the plain path must answer.

        Arguments as `program.answer`'s, on any device.
        """
        # As the network's own passes, in its precision whatever the caller's.
        with self._lock, torch.autocast(x.device.type, enabled=False), _on(x.device):
            if len(x) % len(tokens) or any(len(part) != len(tokens) for part in (*images, token_mask)):
                return None  # the plain path says what does not fit together
            buckets = self._buckets(tokens.shape[1], x.device)
            text = next((bucket for bucket in buckets if bucket >= extent.longest), extent.longest)
            inputs = Inputs(tuple(images), tokens[:, :text], token_mask[:, :text], x, torch.tensor(grid))
            if not self._records(x.device):
                weights = self._current_weights(x.device)
                padding: Padding = "anywhere" if extent.shortest < text else "none"
                run = None if weights is None else self._program(weights, padding, instantaneous=instantaneous)
                return None if run is None else run(*inputs.to(x.device))
            described = tuple((image.shape, image.dtype) for image in images)
            # A row with gaps, or without text, has its padding from its start.
            padding = "right" if extent.shortest else "anywhere"
            shape = Shape(described, x.shape, len(grid) - 1, instantaneous, padding, x.device)
            return self._replay(shape, text, inputs, {*buckets, text})

    def _replay(self, shape: Shape, text: int, inputs: Inputs, texts: set[int]) -> Tensor | None:
        graph = self._graphs.get(shape, {}).get(text)
        if graph is not None and self._weights is not None:
            # The device is at work while the host looks whether the weights are still those: what a graph reads stays
            # allocated as long as it, so an answer from weights of the past does no harm but being of no use.
            actions = graph(inputs)
            if self._weights.intact():
                self._graphs.move_to_end(shape)
                return actions
        weights = self._current_weights(shape.device)
        if weights is None:
            return None
        self._try_kernels(weights, shape, inputs)
        run = self._program(weights, shape.padding, instantaneous=shape.instantaneous)
        if shape not in self._unrecorded and text not in self._graphs.get(shape, {}):
            self._record(run, shape, sorted(texts, reverse=True))
            if weights.fp8 is not None and not self._told_error:
                self._tell_error(weights, run, inputs.to(shape.device))
        if shape in self._unrecorded:
            return run(*inputs.to(shape.device))
        self._graphs.move_to_end(shape)
        return self._graphs[shape][text](inputs)

    def _try_kernels(self, weights: Weights, shape: Shape, inputs: Inputs) -> None:
        """Runs the program once as it is: a kernel that this GPU cannot run is found before anything is recorded."""
        if self._tried or not isinstance(self._operations, Fused):
            return
        try:
            self._program(weights, shape.padding, instantaneous=shape.instantaneous)(*inputs.to(shape.device))
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:  # recording says so
            return
        except Exception as error:  # whatever a compiler or a driver can run into
            if weights.fp8 is not None:
                raise
            logger.warning("Triton's kernels fail here, the inference engine runs more and smaller ones: %s", error)
            self._operations = PLAIN
        self._tried = True

    def _tell_error(self, weights: Weights, run: Callable[..., Tensor], inputs: Inputs) -> None:
        """Logs what 8 bits change of one answer."""
        self._told_error = True
        eight_bits = weights.fp8
        try:
            rounded = run(*inputs)
            weights.fp8 = None
            exact = run(*inputs)
        except torch.OutOfMemoryError:  # only to be told
            return
        finally:
            weights.fp8 = eight_bits
        logger.warning(
            "inference engine: products in 8 bits change this chunk by %.2g of its norm; what that does to success, "
            "ofp-compare tells, beside a copy of the checkpoint whose config.json says inference_precision=full",
            float((rounded - exact).norm() / exact.norm()),
        )

    def _records(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _buckets(self, width: int, device: torch.device) -> list[int]:
        """The text lengths to prepare for. Compiling is too slow for more than one; plain kernels take any."""
        if self._compile_mode is not None:
            return [width]
        if not self._records(device):
            return []
        return [*range(TEXT_BUCKET, width, TEXT_BUCKET), width]

    def _program(self, weights: Weights, padding: Padding, *, instantaneous: bool) -> Callable[..., Tensor]:
        return partial(
            self._answer,
            self._network,
            weights,
            operations=self._operations or PLAIN,
            padding=padding,
            instantaneous=instantaneous,
        )

    def _current_weights(self, device: torch.device) -> Weights | None:
        if self._weights is not None and self._weights.intact():
            return self._weights
        self.release()
        reason = reason_not_to_run(self._network)
        if reason is None:
            self._operations = fastest(device) if self._compile_mode is None else PLAIN
            self._tried = False
            if self._fp8:
                _require_fp8(self._operations, device)
            self._weights = Weights(self._network, fp8=self._fp8)
        elif reason != self._refused:
            level = logging.WARNING if self._asked else logging.INFO
            logger.log(level, "the inference engine is off, the plain path answers: %s", reason)
        self._refused = reason
        return self._weights

    def _record(self, run: Callable[..., Tensor], shape: Shape, texts: list[int]) -> None:
        """Graphs of every text length at once: a robot must not wait for one when its prompt grows by a digit."""
        level = logging.WARNING if self._graphs else logging.INFO
        logger.log(level, "inference engine: recording %d CUDA graphs for %s; this answer waits", len(texts), shape)
        start = time.perf_counter()
        self._forget_graphs(keep=MOST_SHAPES - 1)
        known = self._graphs.get(shape, {})
        missing = [text for text in texts if text not in known]
        with RECORDING:
            for _ in range(2):
                graphs = self._try_to_record(run, shape, missing)
                if graphs is not None:
                    self._graphs.setdefault(shape, {}).update(graphs)
                    logger.log(level, "inference engine: ready after %.1f s", time.perf_counter() - start)
                    return
                self._forget_graphs()  # and again with all the memory there is
                missing = texts
                torch.cuda.empty_cache()
        self._unrecorded.add(shape)
        logger.warning(
            "inference engine: no memory to record %s: it is answered without graphs, slower, until the policy moves",
            shape,
        )

    def _try_to_record(self, run: Callable[..., Tensor], shape: Shape, texts: list[int]) -> dict[int, Graph] | None:
        """None where memory runs out; what was recorded until then is given back."""
        try:
            return self._recorded(run, shape, texts)
        except torch.OutOfMemoryError:
            return None

    def _recorded(self, run: Callable[..., Tensor], shape: Shape, texts: list[int]) -> dict[int, Graph]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        order = replay_order(shape.device)
        ports = Ports.like(Inputs.empty(shape.images, max(texts), shape.actions, shape.steps, shape.device))
        return {text: Graph(run, ports.cut(text), order, self._pool) for text in texts}


PLAIN = Plain()


def fastest(device: torch.device) -> Operations:
    """The operations for a device: Triton's on a GPU that it compiles for."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return PLAIN
    try:
        fused = Fused()
        fused.gated_gelu(torch.ones(1, 32, device=device))  # compiles: that needs a C compiler the first time
        return fused
    except Exception as error:  # whatever a compiler can run into
        logger.warning("Triton cannot be used, the inference engine runs more and smaller kernels: %s", error)
        return PLAIN


def _require_fp8(operations: Operations, device: torch.device) -> None:
    """Raises ValueError where products in 8 bits cannot be had."""
    if not isinstance(operations, Fused) or torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise ValueError(
            f"inference_precision='fp8' needs Triton and a GPU that multiplies in 8 bits (Ada, Hopper or later), not "
            f"{name}: set --policy.inference_precision=full"
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Streams, events and graphs belong to the current device, which need not be the network's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
