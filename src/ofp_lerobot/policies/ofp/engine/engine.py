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

from ..network import OFPNetwork
from ..text import TextExtent
from .graph import Graph, Inputs, Turn
from .program import answer
from .weights import Weights, why_not

logger = logging.getLogger(__name__)

TEXT_BUCKET = 32  # a graph's text length is a multiple of it: the padding costs at most 4 % of a prefix of 800 tokens
MOST_SHAPES = 8  # kept recorded, the least recently used given up first: each holds its activations' memory
# Inductor's modes without its own CUDA graphs: the engine records them itself.
_WITHOUT_GRAPHS = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}


class Shape(NamedTuple):
    """What a graph is recorded for, the text's length left out."""

    images: tuple[tuple[torch.Size, torch.dtype], ...]
    actions: torch.Size
    steps: int
    instantaneous: bool


class Engine:
    """The fast path of one network. Threads may share it: calls wait for each other.

    Weights that change in place are seen at once; where they were replaced (another dtype, device or module) the
    engine is built anew. A network it does not know (adapters, hooks, other attention) is warned of and answered with
    None. Building it moves the parameters' memory (`weights.py`): what else shared that memory no longer does.
    """

    def __init__(self, network: OFPNetwork, *, compile_mode: str | None = None) -> None:
        """compile_mode: torch.compile's; None runs PyTorch's own kernels."""
        self._network = network
        self._compile_mode = compile_mode
        self._refused: str | None = None
        self._weights: Weights | None = None
        self._graphs: OrderedDict[Shape, dict[int, Graph]] = OrderedDict()
        self._lock = RLock()
        self._answer: Callable[..., Tensor] = answer
        if compile_mode is not None:
            mode = _WITHOUT_GRAPHS.get(compile_mode, compile_mode)
            self._answer = torch.compile(answer, mode=mode, dynamic=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Of a copied policy: graphs belong to the network they were recorded for."""
        return type(self)(copy.deepcopy(self._network, memo), compile_mode=self._compile_mode)

    def release(self) -> None:
        """Gives up joined matrices and graphs, for example before the parameters move; the next call builds anew."""
        with self._lock:
            self._weights = None
            self._graphs.clear()

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
            weights = self._current_weights()
            if weights is None:
                return None
            buckets = self._buckets(tokens.shape[1], x.device)
            text = next((bucket for bucket in buckets if bucket >= extent.longest), extent.longest)
            inputs = Inputs(tuple(images), tokens[:, :text], token_mask[:, :text], x, torch.tensor(grid))
            if not self._records(x.device):
                run = self._program(weights, padded=extent.shortest < text, instantaneous=instantaneous)
                return run(*inputs.to(x.device))
            described = tuple((image.shape, image.dtype) for image in images)
            shape = Shape(described, x.shape, len(grid) - 1, instantaneous)
            if text not in self._graphs.get(shape, {}):
                self._record(weights, shape, sorted({*buckets, text}, reverse=True), x.device)
            self._graphs.move_to_end(shape)
            return self._graphs[shape][text](inputs)

    def _records(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def _buckets(self, width: int, device: torch.device) -> list[int]:
        """The text lengths to prepare for. Compiling is too slow for more than one; plain kernels take any."""
        if self._compile_mode is not None:
            return [width]
        if not self._records(device):
            return []
        return [*range(TEXT_BUCKET, width, TEXT_BUCKET), width]

    def _program(self, weights: Weights, *, padded: bool, instantaneous: bool) -> Callable[..., Tensor]:
        return partial(self._answer, self._network, weights, padded=padded, instantaneous=instantaneous)

    def _current_weights(self) -> Weights | None:
        # Before a replay: a graph of replaced weights would read memory that was given back.
        if self._weights is not None and self._weights.intact():
            return self._weights
        self.release()
        reason = why_not(self._network)
        if reason is None:
            self._weights = Weights(self._network)
        elif reason != self._refused:
            logger.warning("the inference engine is off, the plain path answers: %s", reason)
        self._refused = reason
        return self._weights

    def _record(self, weights: Weights, shape: Shape, texts: list[int], device: torch.device) -> None:
        """Graphs of every text length at once: a robot must not wait for one when its prompt grows by a digit."""
        level = logging.WARNING if self._graphs else logging.INFO
        logger.log(level, "inference engine: recording %d CUDA graphs for %s; this answer waits", len(texts), shape)
        start = time.perf_counter()
        while len(self._graphs) >= MOST_SHAPES:
            self._graphs.popitem(last=False)
        run = self._program(weights, padded=True, instantaneous=shape.instantaneous)
        turn = Turn()
        self._graphs[shape] = {
            text: Graph(run, Inputs.empty(shape.images, text, shape.actions, shape.steps, device), turn)
            for text in texts
        }
        logger.log(level, "inference engine: ready after %.1f s", time.perf_counter() - start)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Streams, events and graphs belong to the current device, which need not be the network's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
