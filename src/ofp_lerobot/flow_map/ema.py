"""The teacher's weights: an exponential moving average of the student's, in float32."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Weights = dict[str, Tensor]


# A horizon of 15 steps, tested in runs of up to 4500: 45, and none at all, were worse (docs/trials.md).
TEACHER_DECAY = 1 - 1 / 15


@torch.no_grad()
def copy_weights(weights: Mapping[str, Tensor]) -> Weights:
    """A float32 copy."""
    return {name: whole(w.detach()).to(torch.float32, copy=True) for name, w in weights.items()}


@torch.no_grad()
def update_ema(ema: Weights, weights: Mapping[str, Tensor], decay: float) -> None:
    """ema ← decay·ema + (1 − decay)·weights, in place. Both hold the same names."""
    for name, average in ema.items():
        average.lerp_(whole(weights[name].detach()).to(average.dtype), 1 - decay)


def whole(weight: Tensor) -> Tensor:
    """A weight that is sharded over processes gathered from all of them, which must all call this; others as it is."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight
