"""Straight paths between actions and noise, steps along them, and the samplers built from those steps.

Shapes: actions, noise and x are (n, horizon, action_dim) float32; times are (n,) float32 in [0, 1]
with t = 1 noise and t = 0 action. Actions are in normalised action space.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..errors import choice
from .samplers import SAMPLERS


class Velocity(Protocol):
    """Average velocity over [r, t] of the flow that carries noise to actions, prefix already bound.

    Args: x_t (n, horizon, action_dim); t and r (n,), r <= t; keep (n,) bool, False where the sample
    sees no condition. Sample i reads observation i modulo the batch, so n is a multiple of the batch.
    Returns (n, horizon, action_dim).
    """

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, keep: Tensor | None = None) -> Tensor: ...


def expand_time(t: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ..., 1), to broadcast over `like` (n, ...)."""
    return t.view(-1, *[1] * (like.dim() - 1))


def interpolate(actions: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t·ε + (1 − t)·a (flow matching's straight path)."""
    t = expand_time(t, actions)
    return t * noise + (1 - t) * actions


def interval_step(x_t: Tensor, velocity: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x_r = x_t − (t − r)·u (the definition of the average velocity u over [r, t])."""
    return x_t - expand_time(t - r, x_t) * velocity


def time_grid(steps: int, start: float = 1.0) -> list[float]:
    """start = τ_0 > … > τ_steps = 0, evenly spaced."""
    return [start * (1 - k / steps) for k in range(steps + 1)]


def sample_chunk(velocity: Velocity, x: Tensor, *, steps: int, sampler: str = "flow_map", start: float = 1.0) -> Tensor:
    """Carries x (n, horizon, action_dim) from time `start` to the action at t = 0.

    On the grid of `time_grid`, "flow_map" evaluates the average velocity over each interval (r = τ_{k+1}); "euler"
    the instantaneous one (r = t), which with ten steps is π₀.₅'s own sampler. Raises ValueError on another sampler, or
    fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
    choice("sampler", sampler, SAMPLERS)
    for t, t_next in pairwise(time_grid(steps, start)):
        t_now = torch.full((len(x),), t, device=x.device)
        t_end = torch.full((len(x),), t_next, device=x.device)
        u = velocity(x, t_now, t_end if sampler == "flow_map" else t_now)
        x = interval_step(x, u, t_now, t_end)
    return x


def fit_rest(rest: Tensor, horizon: int, action_dim: int) -> Tensor:
    """The unexecuted actions of a plan as a full chunk: (n, rest, a) -> (n, horizon, action_dim).

    The last action is repeated up to the horizon, missing action dimensions are zero (π₀.₅'s padding).
    Raises ValueError where nothing is left of the plan.
    """
    if rest.dim() != 3 or rest.shape[1] == 0:
        raise ValueError(f"the rest of a plan has shape (batch, steps >= 1, action), got {tuple(rest.shape)}")
    rest = rest[:, :horizon]
    rest = torch.cat([rest, rest[:, -1:].expand(-1, horizon - rest.shape[1], -1)], dim=1)
    return torch.nn.functional.pad(rest, (0, action_dim - rest.shape[2]))


def warm_start(
    noise: Tensor, rest: Tensor, fraction: float, to_path: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, float]:
    """The start (x, t) that keeps `fraction` of the old plan: t = 1 − w, x = (1 − w)·ε + w·a_warm.

    `rest` (n, steps, a) holds the last chunk's unexecuted actions, the next one to execute first
    (arXiv 2603.12480, warm start; w = 0.15 is the paper's best). to_path: what makes whole chunks of normalised actions
    those that the flow runs to, where they are not the same.
    """
    plan = fit_rest(rest, noise.shape[1], noise.shape[2])
    plan = plan if to_path is None else to_path(plan)
    return (1 - fraction) * noise + fraction * plan, 1.0 - fraction


def blend_prefix(actions: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
    """Real-time chunking at one step: â + ω·(a_prev − â), exact where ω = 1.

    actions and previous (n, horizon, a), weights (horizon,) in [0, 1]. LeRobot's guided form
    differentiates through the denoiser and does not keep a frozen prefix when there is one step only.
    """
    return torch.lerp(actions, previous, weights.view(1, -1, 1))
