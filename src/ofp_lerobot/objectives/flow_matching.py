"""Plain π₀.₅ fine-tuning: flow matching on straight paths (arXiv 2210.02747)."""

from torch import Generator, Tensor

from ..flow_map.path import Velocity
from .base import Losses, draw_flow, masked_mean
from .settings import Settings


def flow_matching(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """‖u(x_t, t, t) − (ε − a)‖² with π₀.₅'s times; neither the teacher nor the step matters."""
    flow = draw_flow(actions, settings, generator)
    loss = masked_mean((student(flow.x, flow.t, flow.t) - flow.velocity).square(), mask)
    return Losses(loss, {"loss_flow": loss.detach().mean()})
