"""Operations of one answer, counted without running them: any size, no weights, no GPU.

The tensors are fake ones on a CUDA device, so that code takes the paths it takes there, and code that reads a value
on the host fails. Attention counts as one operation, as its fused kernels are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_NO_KERNEL = {"aten._unsafe_view", "aten.empty", "aten.new_empty", "aten.empty_like", "prim.device", "aten.detach"}


class Counts(NamedTuple):
    """launches: operators that start at least one kernel; bytes: their operands' and results', without any fusion."""

    launches: int
    flops: int
    bytes: int


class Counter(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher; `host_reads` are the times a value was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.flops = self.bytes = self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if name == "aten._local_scalar_dense":
            self.host_reads += 1
        elif not func.is_view and name not in _NO_KERNEL:
            flops = flop_registry.get(func.overloadpacket)
            self.add(flops(*args, **(kwargs or {}), out_val=result) if flops else 0, (args, kwargs, result))
        return result

    def add(self, flops: int, operands: Any) -> None:
        self.launches += 1
        self.flops += flops
        tensors = {id(t): t for t in tree_leaves(operands) if isinstance(t, Tensor)}
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        result = q.new_empty(*q.shape[:-1], v.shape[-1])
        self.add(2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1]), (q, k, v, attn_mask, result))
        return result


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, modules and tensors made with device "cuda" have shapes and no values. Models do not move."""
    still = patch.object(torch.nn.Module, "to", lambda module, *_args, **_kwargs: module)
    joined = patch.object(torch, "from_dlpack", lambda tensor: tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), still, joined, torch.no_grad():
        yield


def host_reads(run: Callable[[], Any]) -> int:
    """How often `run()` asks the device for values: `item`, `bool`, `float`, `tolist`."""
    listed = 0
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        nonlocal listed
        listed += 1
        return tolist(tensor)

    with patch.object(Tensor, "tolist", counted), Counter() as counter:
        run()
    return counter.host_reads + listed


def count(run: Callable[[], Any]) -> Counts:
    """Of `run()` inside `fake_gpu`."""
    counter = Counter()
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", counter.attention), counter:
        run()
    return Counts(counter.launches, counter.flops, counter.bytes)
