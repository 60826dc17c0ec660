"""Plain π₀.₅ fine-tuning: flow matching on straight paths (arXiv 2210.02747)."""

from torch import Generator, Tensor

from ..flow_map.path import Velocity, interpolate
from ..flow_map.times import power_times
from .base import Losses, Settings, draw_noise, masked_mean


def flow_matching(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    progress: float,
    generator: Generator,
) -> Losses:
    """‖u(x_t, t, t) − (ε − a)‖² with π₀.₅'s times; neither the teacher nor the progress matters."""
    noise = draw_noise(actions, generator)
    t = power_times(
        len(actions),
        generator,
        alpha=settings.flow_time_alpha,
        scale=settings.flow_time_scale,
        offset=settings.flow_time_offset,
    )
    error = student(interpolate(actions, noise, t), t, t) - (noise - actions)
    loss = masked_mean(error.square(), mask)
    return Losses(loss, {"loss_flow": loss.detach().mean()})
