"""One-Step Flow Policy in our form: boundary anchoring, self-consistency of halved intervals, sharpening.

Symbols: a action, ε noise, x_t = t·ε + (1 − t)·a, u student, u⁻ teacher (average velocities over [r, t]). The paper's
form is `ofp_paper`.
"""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, expand_time, interpolate, interval_step
from ..flow_map.times import halves
from .base import Losses, draw_flow, draw_noise, fill_padding, masked_mean
from .settings import Settings
from .sharpening import mean_shift

HUBER_SCALE = 0.05  # c: errors below it count squared, larger ones linearly


def ofp(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    step: int,
    generator: Generator,
) -> Losses:
    """L_flow + λ_c·L_sc per sample, with one student call and two teacher calls, three with sharpening.

    L_flow = ‖u(x_t, t, t) − (ε − a)‖².
    L_sc = h(2·‖u(x_t, t, r) − sg[target]‖²), target = (v + u⁻(x_m, m, r))/2 with m = (t + r)/2, v = u⁻(x_t, t, m) and
    x_m = x_t − (t − m)·v: where the teacher's two halves lead, as in shortcut models (arXiv 2410.12557), for which the
    exact map is a fixed point at any width. Where an interval is `narrow` (`flow_map.times.Halves`), both velocities
    are the instantaneous ones. h is the pseudo-Huber norm of arXiv 2310.14189, h(e²) = √(e² + c²) − c: without
    sharpening this target has no noise that must be averaged, and where the map is steep, between modes, squares would
    smooth it. Sharpening's renoising adds some, which the norm then follows to its median rather than its mean.
    Sharpening moves the target of (t, r) = (1, 0), the one step, so that it leads to a′ instead of â
    (`sharpening.mean_shift`). Other intervals keep theirs, or it would compound along the halves.
    """
    flow = draw_flow(actions, settings, generator)
    noise = draw_noise(actions, generator)
    cut = halves(len(actions), generator)
    x_t = interpolate(actions, noise, cut.t)
    with torch.no_grad():
        first = teacher(x_t, cut.t, torch.where(cut.narrow, cut.t, cut.m))
        first = fill_padding(first, noise - actions, mask)
        x_m = interval_step(x_t, first, cut.t, cut.m)
        second = teacher(x_m, cut.m, torch.where(cut.narrow, cut.m, cut.r))
        target = (first + second) / 2
        one_step, shift = (cut.t == 1) & (cut.r == 0), torch.zeros_like(target)
        if settings.sharpening_noise > 0:
            answers = interval_step(x_t, target, cut.t, cut.r)
            sharp = mean_shift(teacher, answers, mask, settings.sharpening_noise, generator)
            shift = (sharp - answers) * expand_time(one_step, answers)
            target = target - shift  # over a length t − r of 1
    u = student(torch.cat([flow.x, x_t]), torch.cat([flow.t, cut.t]), torch.cat([flow.t, cut.r])).chunk(2)

    flow_loss = masked_mean((u[0] - flow.velocity).square(), mask)
    residual = masked_mean((u[1] - target).square(), mask)
    consistency = (2 * residual + HUBER_SCALE**2).sqrt() - HUBER_SCALE
    return Losses(
        flow_loss + settings.consistency_weight * consistency,
        {
            "loss_flow": flow_loss.detach().mean(),
            "loss_consistency": consistency.detach().mean(),
            "consistency_error": residual.detach().mean(),
            "sharpening_shift": masked_mean(shift.square(), mask).mean().sqrt(),
        },
    )
