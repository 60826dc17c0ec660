"""Early signs of collapse or divergence of a one-step policy; costly, so computed at intervals.

Over-guidance shows in the size of the one-step samples and nowhere else; mode averaging and mode dropping in their
spread; a starved flow term in the ten-step samples; self-consistency's own loss shrinks with its schedule whatever
the quality, so the gap between one step and ten from the same noise is measured instead.
"""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, sample_chunk
from .base import draw_noise, masked_mean

ROWS = 16  # observations looked at
DRAWS = 4  # noises for each
FLOW_STEPS = 10  # π₀.₅'s own sampler
HEALTHY_STD_RATIO = (0.7, 1.4)

NAMES = (
    "one_step_std_ratio",
    "one_step_max",
    "one_step_error",
    "ten_step_error",
    "one_ten_gap",
    "one_step_spread",
    "ten_step_spread",
)


@torch.no_grad()
def diagnose(velocity: Velocity, actions: Tensor, mask: Tensor, generator: Generator) -> dict[str, Tensor]:
    """Scalars under NAMES, in normalised action units, from a few observations (the caller takes ROWS).

    velocity: of the student. actions (b, horizon, action_dim), mask likewise, bool. Errors are root mean squares
    against the demonstration, the gap is one step against ten-step Euler from the same noise, spreads are standard
    deviations over DRAWS noises of one observation.
    """
    target, valid = actions.repeat(DRAWS, 1, 1), mask.repeat(DRAWS, 1, 1)
    noise = draw_noise(target, generator)
    one = sample_chunk(velocity, noise, steps=1, sampler="flow_map")
    ten = sample_chunk(velocity, noise, steps=FLOW_STEPS, sampler="euler")

    def rms(x: Tensor) -> Tensor:
        return masked_mean(x.square(), valid).mean().sqrt()

    def spread(x: Tensor) -> Tensor:
        return masked_mean(x.unflatten(0, (DRAWS, len(actions))).var(dim=0), mask).mean().sqrt()

    def std(x: Tensor) -> Tensor:
        return x[valid].std()

    values = (
        std(one) / std(target).clamp(min=1e-6),
        one.masked_fill(~valid, 0).abs().max(),
        rms(one - target),
        rms(ten - target),
        rms(one - ten),
        spread(one),
        spread(ten),
    )
    return dict(zip(NAMES, values, strict=True))
