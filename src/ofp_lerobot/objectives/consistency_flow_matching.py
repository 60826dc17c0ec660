"""Consistency Flow Matching (arXiv 2407.02398): velocities of neighbouring times must reach the same action."""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, expand_time, interpolate, interval_step
from ..flow_map.times import uniform
from .base import Losses, draw_noise, masked_mean
from .settings import Settings

# Of the authors' code (github.com/YangLing0818/consistency_flow_matching), in our time 1 − t. Theirs has two segments
# and two steps; one segment lets one step reach the action.
EARLIEST = 1e-3
GAP = 1e-3  # Δt
BOUNDARY = 0.1  # below it the target is the sample's own action
VELOCITY_WEIGHT = 1e-5  # α


def consistency_flow_matching(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """‖f(x_t, t) − sg[f(x_s, s)]‖² + α·‖v(x_t, t) − sg[v(x_s, s)]‖², f(x, t) = x − t·v(x, t), s = t − Δt.

    x_t and x_s lie on one sample's path. v(x, t) = u(x, t, t) is the student's: a network without target time. From
    s <= BOUNDARY on, the action itself takes the place of f(x_s, s) and the second term ends.
    """
    noise = draw_noise(actions, generator)
    t = (1 - EARLIEST) * uniform(len(actions), generator)
    s = (t - GAP).clamp(min=0)
    zero = torch.zeros_like(t)
    x_t, x_s = interpolate(actions, noise, t), interpolate(actions, noise, s)
    v_t = student(x_t, t, t)
    with torch.no_grad():
        v_s = student(x_s, s, s)
    bootstrapped = expand_time(s > BOUNDARY, actions)
    target = torch.where(bootstrapped, interval_step(x_s, v_s, s, zero), actions)
    end = masked_mean((interval_step(x_t, v_t, t, zero) - target).square(), mask)
    change = masked_mean((v_t - v_s).square(), mask) * (t > BOUNDARY)
    return Losses(
        end + VELOCITY_WEIGHT * change,
        {"loss_consistency": end.detach().mean(), "loss_velocity": change.detach().mean()},
    )
