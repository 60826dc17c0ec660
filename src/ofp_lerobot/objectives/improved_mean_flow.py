"""Improved MeanFlow (arXiv 2512.02012): flow matching of a compound velocity, so that the target is the data's."""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, expand_time, interpolate
from ..flow_map.times import uniform
from .base import Losses, draw_noise, fill_padding
from .mean_flow import logit_normal, weighted_square, with_derivative
from .settings import Settings

# Of the authors' code (github.com/Lyy-iiis/imeanflow): times, share of r = t, power and offset of the weight.
TIME_MEAN, TIME_STD = -0.4, 1.0
FLOW_SHARE = 0.5
WEIGHT_POWER, WEIGHT_OFFSET = 1.0, 0.01


def improved_mean_flow(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """‖V − (ε − a)‖² with V = u(x_t, t, r) + (t − r)·sg[du/dt], weighted by 1/(‖·‖² + c) per sample.

    du/dt runs along the student's own velocity u(x_t, t, t), not along ε − a as in MeanFlow: V is then a function of
    x_t alone. The paper's version without a second head and without guidance.
    """
    n = len(actions)
    noise = draw_noise(actions, generator)
    a, b = (logit_normal(n, generator, TIME_MEAN, TIME_STD) for _ in range(2))
    t = torch.maximum(a, b)
    r = torch.where(uniform(n, generator) < FLOW_SHARE, t, torch.minimum(a, b))
    x, v = interpolate(actions, noise, t), noise - actions
    with torch.no_grad():
        direction = fill_padding(student(x, t, t), v, mask)
    u, derivative = with_derivative(student, x, t, r, direction)
    error = u + expand_time(t - r, u) * derivative.detach() - v
    loss = weighted_square(error, mask, WEIGHT_POWER, WEIGHT_OFFSET)
    squared = (error.detach().square() * mask).sum() / mask.sum().clamp(min=1)
    return Losses(loss, {"mean_flow_error": squared})
