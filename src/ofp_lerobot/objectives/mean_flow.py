"""MeanFlow (arXiv 2505.13447): the average velocity's own differential identity as target."""

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..flow_map.path import Velocity, expand_time, interpolate
from ..flow_map.times import uniform
from .base import Losses, draw_noise
from .settings import Settings

# Of the authors' code (github.com/Gsunshine/py-meanflow): times, share of r < t, power and offset of the weight.
T_MEAN, T_STD = -0.6, 1.6
R_MEAN, R_STD = -4.0, 1.6
INTERVALS = 0.75
WEIGHT_POWER, WEIGHT_OFFSET = 0.75, 1e-3


def logit_normal(n: int, generator: Generator, mean: float, std: float) -> Tensor:
    """sigmoid(N(mean, std²)), (n,)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device))


def with_derivative(velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """u(x, t, r) and its total derivative du/dt = ∂u/∂x·dx + ∂u/∂t along dx/dt, both (n, horizon, action_dim).

    One Jacobian-vector product; fused attention has none, so attention runs unfused meanwhile. Nor has a convolution
    under autocast, which is off meanwhile.
    """
    with sdpa_kernel(SDPBackend.MATH), torch.autocast(x.device.type, enabled=False):
        result: Any = torch.func.jvp(velocity, (x, t, r), (dx, torch.ones_like(t), torch.zeros_like(r)))
    return result


def weighted_square(error: Tensor, mask: Tensor, power: float, offset: float) -> Tensor:
    """‖error‖²/sg[‖error‖² + offset]^power over each sample's unmasked entries: (n,)."""
    square = (error.square() * mask).sum(dim=(1, 2))
    return square / (square.detach() + offset) ** power


def mean_flow(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """‖u(x_t, t, r) − sg[v − (t − r)·du/dt]‖², v = ε − a, du/dt along v, weighted by 1/(‖·‖² + c)^p per sample."""
    n = len(actions)
    noise = draw_noise(actions, generator)
    t, r = logit_normal(n, generator, T_MEAN, T_STD), logit_normal(n, generator, R_MEAN, R_STD)
    r = torch.where(uniform(n, generator) < INTERVALS, torch.minimum(t, r), t)
    v = noise - actions
    u, derivative = with_derivative(student, interpolate(actions, noise, t), t, r, v)
    error = u - (v - expand_time(t - r, u) * derivative).detach()
    loss = weighted_square(error, mask, WEIGHT_POWER, WEIGHT_OFFSET)
    squared = (error.detach().square() * mask).sum() / mask.sum().clamp(min=1)
    return Losses(loss, {"mean_flow_error": squared})
