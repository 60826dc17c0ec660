"""Shortcut models: a step of length d reaches where two steps of d/2 do (arXiv 2410.12557)."""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, interpolate, interval_step
from ..flow_map.times import grid_intervals
from .base import Losses, draw_flow, draw_noise, fill_padding, masked_mean
from .settings import Settings


def shortcut(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """‖u(x_t, t, t) − (ε − a)‖² + ‖u(x_t, t, t − d) − sg[(u₁ + u₂)/2]‖² per sample.

    u₁ and u₂ are the teacher's velocities over the first and the second half of [t − d, t], the second from where the
    first leads. d is a power of two and t a multiple of d, as in the paper's code (128 sections); the halves of its
    smallest step, 1/64, are instantaneous velocities. Unlike there, every sample enters both terms.
    """
    n = len(actions)
    flow = draw_flow(actions, settings, generator)
    noise = draw_noise(actions, generator)
    t, end, smallest = grid_intervals(n, generator)
    middle = (t + end) / 2
    x = interpolate(actions, noise, t)
    with torch.no_grad():
        first = fill_padding(teacher(x, t, torch.where(smallest, t, middle)), noise - actions, mask)
        x_middle = interval_step(x, first, t, middle)
        target = (first + teacher(x_middle, middle, torch.where(smallest, middle, end))) / 2
    u = student(torch.cat([flow.x, x]), torch.cat([flow.t, t]), torch.cat([flow.t, end])).split(n)
    flow_loss = masked_mean((u[0] - flow.velocity).square(), mask)
    consistency = masked_mean((u[1] - target).square(), mask)
    return Losses(
        flow_loss + consistency,
        {"loss_flow": flow_loss.detach().mean(), "loss_consistency": consistency.detach().mean()},
    )
