"""What every objective takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity


@dataclass(frozen=True)
class Settings:
    """Settings of the objectives; the defaults are those for fine-tuning π₀.₅ (README, design notes)."""

    consistency_weight: float = 1.0  # λ_c
    guidance_weight: float = 0.01  # λ_g, from the end of the contraction on; 0 is off
    condition_dropout: float = 0.1  # p_drop, in the flow term
    first_segment: Literal["marginal", "conditional"] = "marginal"
    contraction_start: float = 0.25  # ρ at step 0 ...
    contraction_end: float = 0.05  # ... and from contraction_fraction of the schedule on
    contraction_fraction: float = 0.5
    flow_time_alpha: float = 1.5  # flow times are Beta(α, 1)·scale + offset; α = 1 is uniform
    flow_time_scale: float = 0.999
    flow_time_offset: float = 0.001


class Losses(NamedTuple):
    """loss (n,): one per sample, differentiable. logs: detached scalars on its device, always the same keys."""

    loss: Tensor
    logs: dict[str, Tensor]


class Objective(NamedTuple):
    """function: (student, teacher, actions, mask, settings, progress, generator) -> Losses.

    student, teacher: velocities; the teacher runs without gradients. actions (n, horizon, action_dim) float32,
    normalised, zero in padded dimensions. mask (n, horizon, action_dim) bool, False in padded steps and padded
    action dimensions, which do not enter the loss. progress: training steps done over `schedule_steps`.
    generator: on the actions' device; all noise and times come from it.
    """

    function: Callable[[Velocity, Velocity, Tensor, Tensor, Settings, float, Generator], Losses]
    needs_teacher: bool


def draw_noise(actions: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of the actions' shape, float32."""
    return torch.randn(actions.shape, generator=generator, device=actions.device)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (n, horizon, action_dim) over each sample's unmasked entries: (n,)."""
    weight = mask.to(values.dtype)
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)
