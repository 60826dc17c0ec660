"""Memory per GPU of full fine-tuning sharded by FSDP2, counted at real size: no weights, no GPU.

    python -m benchmarks.speed.sharding

Weights are held in float32 and computed with in bfloat16 (--accelerator.mixed_precision=bf16). What a GPU holds: its
share of weights, gradients and AdamW's two moments; the weights that are whole during a step (the root's and two
units') with their gradients; the teacher, whole on every GPU, and its copy to compute with; what the forward pass
keeps for the backward pass, by batch and with checkpointing. Not counted: NCCL, CUDA's context, fragmentation.
"""

from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.speed.presets import PRESETS, make_batch, make_ofp
from benchmarks.speed.training import weightless
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy

GIB = 2**30
GPUS = (2, 4, 8)


class Sizes(NamedTuple):
    """Numbers of parameters."""

    total: int
    trainable: int
    root: int  # in no unit: whole from the start of a step to its end
    root_trainable: int
    units: tuple[int, ...]
    teacher: int


def count(policy: OFPPolicy) -> Sizes:
    def numel(parameters: Any, *, trainable: bool = False) -> int:
        return sum(p.numel() for p in parameters if p.requires_grad or not trainable)

    units = [module for module in policy.modules() if type(module).__name__ in OFPPolicy._fsdp_wrap_modules]
    inside = [p for unit in units for p in unit.parameters()]
    total, trainable = numel(policy.parameters()), numel(policy.parameters(), trainable=True)
    return Sizes(
        total,
        trainable,
        total - numel(inside),
        trainable - numel(inside, trainable=True),
        tuple(sorted((numel(unit.parameters()) for unit in units), reverse=True)),
        sum(p.numel() for p in policy.student_weights().values()),
    )


def per_gpu(sizes: Sizes, gpus: int) -> float:
    """GiB, without activations."""
    shared = (4 * sizes.total + (4 + 8) * sizes.trainable) / gpus
    whole = 2 * (sizes.root + sizes.root_trainable) + 2 * 2 * sum(sizes.units[:2])
    return (shared + whole + (4 + 2) * sizes.teacher) / GIB


def activations(batch_size: int, **changes: Any) -> float:
    """GiB that the forward pass keeps beside the parameters, each storage once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    preset = PRESETS["real"]
    with weightless():
        policy = make_ofp(preset, dtype="bfloat16", monitor_freq=0, **changes).train()
        policy._log = lambda _: {}  # type: ignore[method-assign]
        batch = make_batch(preset, batch_size)
        weights = {p.untyped_storage()._cdata for p in policy.parameters()}
        with patch.object(torch, "manual_seed", lambda seed: None), saved_tensors_hooks(pack, lambda t: t):
            policy(batch)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights) / GIB


def main() -> None:
    with torch.device("meta"), patch.object(nn.Module, "to", lambda module, *_, **__: module):
        sizes = count(make_ofp(PRESETS["real"]))
    print(sizes)
    print("| GPUs | before activations (GiB) |\n| --- | --- |")
    for gpus in GPUS:
        print(f"| {gpus} | {per_gpu(sizes, gpus):.1f} |")
    print("| batch per GPU | activations | with checkpointing |\n| --- | --- | --- |")
    for batch in (1, 4, 8, 16):
        plain, less = activations(batch), activations(batch, gradient_checkpointing=True)
        print(f"| {batch} | {plain:.1f} | {less:.1f} |")


if __name__ == "__main__":
    main()
