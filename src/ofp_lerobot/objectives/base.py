"""What every objective takes and gives."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import choice
from ..flow_map.path import Velocity, interpolate
from ..flow_map.times import power_times


@dataclass(frozen=True)
class Settings:
    """Settings of the objectives; the defaults serve fine-tuning and training from scratch (README, design notes)."""

    consistency_weight: float = 0.5  # λ_c
    consistency_norm: Literal["huber", "squared"] = "huber"  # of its error; squared is the paper's
    guidance_weight: float = 0.0  # λ_g, from the end of the contraction on; needs condition_dropout
    condition_dropout: float = 0.0  # p_drop, in the flow term
    first_segment: Literal["marginal", "conditional"] = "marginal"
    halved_share: float = 1.0  # of the self-consistency intervals, the teacher's halves being the target; the paper: 0
    contraction_start: float = 0.25  # ρ at step 0 ...
    contraction_end: float = 0.05  # ... and from contraction_fraction of the schedule on
    contraction_fraction: float = 0.5
    flow_time_alpha: float = 1.5  # flow times are Beta(α, 1)·scale + offset; α = 1 is uniform
    flow_time_scale: float = 0.999
    flow_time_offset: float = 0.001

    def __post_init__(self) -> None:
        choice("consistency_norm", self.consistency_norm, ("huber", "squared"))
        choice("first_segment", self.first_segment, ("marginal", "conditional"))

    def require_consistent(self) -> None:
        """Raises ValueError on settings that cannot be trained with together; acting needs none of them."""
        if self.first_segment == "conditional" and (self.consistency_norm != "squared" or self.halved_share == 1):
            raise ValueError(
                "first_segment=conditional is of intervals that are not halved, and its target is right only in the "
                "mean: set halved_share=0 and consistency_norm=squared"
            )
        if self.guidance_weight > 0 and self.condition_dropout == 0:
            raise ValueError(
                "guidance_weight > 0 needs the velocity without condition, which condition_dropout=0 never trains: "
                "set condition_dropout=0.1 or guidance_weight=0"
            )


class Losses(NamedTuple):
    """loss (n,): one per sample, differentiable. logs: detached scalars on its device, always the same keys."""

    loss: Tensor
    logs: dict[str, Tensor]


class Objective(NamedTuple):
    """One way to train.

    function: (student, teacher, actions, mask, settings, progress, generator) -> Losses.

    student, teacher: velocities; the teacher runs without gradients. actions (n, horizon, action_dim) float32,
    normalised, zero in padded dimensions. mask (n, horizon, action_dim) bool, False in padded steps and padded
    action dimensions, which do not enter the loss. progress: training steps done over `schedule_steps`.
    generator: on the actions' device; all noise and times come from it.
    needs_teacher: whether the teacher is an average of the student's weights. uses_target_time: whether velocities are
    asked for with r < t; where not, only the sampler "euler" fits, and r is no input of the network. differentiates:
    whether the student is differentiated in forward mode, which gradient checkpointing cannot.
    """

    function: Callable[[Velocity, Velocity, Tensor, Tensor, Settings, float, Generator], Losses]
    needs_teacher: bool
    uses_target_time: bool = True
    differentiates: bool = False


class FlowSamples(NamedTuple):
    """x_t (n, horizon, action_dim) at times t (n,), and the velocity ε − a of each sample's path."""

    x: Tensor
    t: Tensor
    velocity: Tensor


def draw_flow(actions: Tensor, settings: Settings, generator: Generator) -> FlowSamples:
    """Noise and flow-matching times for every action."""
    noise = draw_noise(actions, generator)
    t = power_times(
        len(actions),
        generator,
        alpha=settings.flow_time_alpha,
        scale=settings.flow_time_scale,
        offset=settings.flow_time_offset,
    )
    return FlowSamples(interpolate(actions, noise, t), t, noise - actions)


def draw_noise(actions: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of the actions' shape, float32."""
    return torch.randn(actions.shape, generator=generator, device=actions.device)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (n, horizon, action_dim) over each sample's unmasked entries: (n,)."""
    weight = mask.to(values.dtype)
    return (values * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1)


def fill_padding(velocity: Tensor, straight: Tensor, mask: Tensor) -> Tensor:
    """A network's velocity, but the sample's own ε − a in padded action dimensions, which no loss has trained.

    The data is exactly zero there, so the sample's velocity is the marginal one.
    """
    return torch.where(mask.any(dim=1, keepdim=True), velocity, straight)
