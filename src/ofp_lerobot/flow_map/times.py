"""Random times for the training terms, and the schedule that contracts the self-consistency interval.

All times are float32 (n,) tensors on the generator's device, t = 1 noise and t = 0 action.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

MIN_GAP = 0.005  # shortest interval [r, t] of the self-consistency term
FULL_INTERVAL = 0.5  # share of the intervals that end at the action (r = 0) ...
FROM_NOISE = 0.5  # ... and, of those, the share that starts at pure noise (t = 1)
ON_GRID = 0.5  # share of the halved intervals that lie on shortcut's grid, whose halves are on it too
LEVELS = 7  # lengths on the grid: 1, ½, … 1/64; the halves of the grid's shortest are instantaneous


def uniform(n: int, generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    """n independent draws from U(low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)


def power_times(n: int, generator: Generator, *, alpha: float, scale: float, offset: float) -> Tensor:
    """Beta(α, 1)·scale + offset, π₀.₅'s flow-matching times, by the inverse of its distribution function u^(1/α)."""
    return uniform(n, generator) ** (1 / alpha) * scale + offset


def intervals(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(t, r) of the self-consistency term, each (n,).

    Half of the intervals reach the action (r = 0), half of those from pure noise (t = 1) and half from
    t ~ U(MIN_GAP, 1); the other half are two sorted uniforms at least MIN_GAP apart.
    """
    kind = uniform(n, generator)
    a, b = uniform(n, generator), uniform(n, generator)
    low = torch.minimum(a, b) * (1 - MIN_GAP)
    high = torch.maximum(a, b) * (1 - MIN_GAP) + MIN_GAP
    to_action = kind < FULL_INTERVAL
    from_noise = kind < FULL_INTERVAL * FROM_NOISE
    t = torch.where(to_action, MIN_GAP + (1 - MIN_GAP) * a, high)
    t = torch.where(from_noise, torch.ones_like(t), t)
    return t, torch.where(to_action, torch.zeros_like(low), low)


def grid_intervals(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(t, r, narrowest): shortcut's intervals (arXiv 2410.12557), each (n,).

    The length is 1/2^k, k uniform in 0 … LEVELS − 1, and t any multiple of it; narrowest: it is the shortest length.
    """
    sections = 2.0 ** torch.floor(LEVELS * uniform(n, generator))
    t = (torch.floor(sections * uniform(n, generator)) + 1) / sections
    return t, t - 1 / sections, sections == 2.0 ** (LEVELS - 1)


class Halves(NamedTuple):
    """An interval [r, t] and its middle m, each (n,).

    narrow: the shortest of the grid, for which the instantaneous velocities at t and m stand for the average ones over
    the halves; they tie average velocities to the flow.
    """

    t: Tensor
    m: Tensor
    r: Tensor
    narrow: Tensor


def halves(n: int, generator: Generator) -> Halves:
    """`intervals`, of which a random share ON_GRID is moved to the grid."""
    t, r = intervals(n, generator)
    moved = uniform(n, generator) < ON_GRID
    t_grid, r_grid, narrowest = grid_intervals(n, generator)
    t, r = torch.where(moved, t_grid, t), torch.where(moved, r_grid, r)
    return Halves(t=t, m=(t + r) / 2, r=r, narrow=moved & narrowest)


class Segments(NamedTuple):
    """An interval [r, t] cut at m: κ = (t − m)/(t − r) is the share of the first segment. Each (n,)."""

    t: Tensor
    m: Tensor
    r: Tensor
    kappa: Tensor


def segments(n: int, generator: Generator, *, rho: float) -> Segments:
    """`intervals` cut at κ ~ U(0, ρ)."""
    t, r = intervals(n, generator)
    kappa = rho * uniform(n, generator)
    return Segments(t=t, m=t - kappa * (t - r), r=r, kappa=kappa)


def contraction(step: int, *, start: float, end: float, steps: int) -> float:
    """ρ of the time-contracting schedule: a half cosine from `start` to `end` over `steps` steps, then held."""
    x = min(step / steps, 1.0) if steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
