"""SnapFlow: one step from noise learns the average of two Euler half-steps (arXiv 2604.05656)."""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, interval_step
from .base import Losses, draw_flow, draw_noise, fill_padding, masked_mean
from .settings import Settings

# The authors' code is not public; the form and the constants are those of public reimplementations, without their
# clamp of the target at ±20, which normalised actions do not reach.
FLOW_SHARE = 0.5  # α
CONSISTENCY_WEIGHT = 0.1  # λ


def snapflow(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """α·‖u(x_t, t, t) − (ε − a)‖² + (1 − α)·λ·‖u(ε, 1, 0) − sg[(v(ε, 1) + v(x_½, ½))/2]‖² per sample.

    v(x, t) = u(x, t, t) are the student's own instantaneous velocities, x_½ = ε − v(ε, 1)/2; there is no teacher.
    """
    n = len(actions)
    flow = draw_flow(actions, settings, generator)
    noise = draw_noise(actions, generator)
    one = torch.ones_like(flow.t)
    zero, half = torch.zeros_like(one), one / 2
    with torch.no_grad():
        first = fill_padding(student(noise, one, one), noise, mask)
        second = student(interval_step(noise, first, one, half), half, half)
    u = student(torch.cat([flow.x, noise]), torch.cat([flow.t, one]), torch.cat([flow.t, zero])).split(n)
    flow_loss = masked_mean((u[0] - flow.velocity).square(), mask)
    consistency = masked_mean((u[1] - (first + second) / 2).square(), mask)
    return Losses(
        FLOW_SHARE * flow_loss + (1 - FLOW_SHARE) * CONSISTENCY_WEIGHT * consistency,
        {"loss_flow": flow_loss.detach().mean(), "loss_consistency": consistency.detach().mean()},
    )
