"""One-Step Flow Policy (arXiv 2603.12480): boundary anchoring, self-consistency and self-guidance.

Symbols: a action, ε noise, x_t = t·ε + (1 − t)·a, u student, u⁻ teacher (average velocities over [r, t]),
κ = (t − m)/(t − r) the share of the first segment. The paper writes time as s = 1 − t and the velocity as a − ε.
"""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, expand_time, interpolate, interval_step
from ..flow_map.times import contraction, halve, segments, uniform
from .base import Losses, Settings, draw_flow, draw_noise, fill_padding, masked_mean

KAPPA_FLOOR = 0.05  # self-consistency is weighted by 1/max(κ, floor): its gradient is κ times MeanFlow's
HUBER_SCALE = 0.05  # c: weighted errors below it count squared, larger ones linearly


def ofp(
    student: Velocity,
    teacher: Velocity,
    actions: Tensor,
    mask: Tensor,
    settings: Settings,
    progress: float,
    generator: Generator,
) -> Losses:
    """L_flow + λ_c·L_sc + λ_g·L_sg per sample, with one student call and at most two teacher calls.

    L_flow = ‖u(x_t, t, t) − (ε − a)‖², the condition dropped with probability p_drop.
    L_sc = h(‖u(x_t, t, r) − sg[κ·v + (1 − κ)·u⁻(x_m, m, r)]‖² / max(κ, .05)), where the first segment t → m is the
    sample's own straight path, v = ε − a ("conditional", the paper's), or the teacher's, v = u⁻(x_t, t, t) and
    x_m = x_t − (t − m)·v ("marginal"). h is the identity ("squared", the paper's) or the pseudo-Huber norm of
    arXiv 2310.14189, h(e²) = √(e² + c²) − c: the marginal target has no noise that must be averaged, and where the
    map is steep, between modes, squares would smooth it.
    A share of the intervals, by default all, is halved instead, as in shortcut models (arXiv 2410.12557): κ = ½ and
    v = u⁻(x_t, t, m), for which the exact map is a fixed point at any width. Where such an interval is `narrow`
    (`flow_map.times.Segments`), v and the second half's velocity are the instantaneous ones.
    L_sg = ‖y − sg[y + g]‖², y = u(x_t, t, 0), g = u⁻(x̃, t′, t′) − u⁻(x̃, t′, t′ ∣ ∅), where x̃ is the one-step
    answer â = x_t − t·y renoised to t′; from the end of the contraction on.
    Raises ValueError on settings that contradict each other.
    """
    settings.require_consistent()
    n = len(actions)
    rho = contraction(
        progress,
        start=settings.contraction_start,
        end=settings.contraction_end,
        fraction=settings.contraction_fraction,
    )
    guided = settings.guidance_weight > 0 and progress >= settings.contraction_fraction
    everyone = torch.ones(n, dtype=torch.bool, device=actions.device)

    flow = draw_flow(actions, settings, generator)
    keep = uniform(n, generator) >= settings.condition_dropout

    noise_c = draw_noise(actions, generator)
    cut = halve(segments(n, generator, rho=rho), generator, settings.halved_share)
    x_c = interpolate(actions, noise_c, cut.t)
    first = noise_c - actions
    if settings.first_segment == "marginal" or settings.halved_share > 0:
        with torch.no_grad():
            told = teacher(x_c, cut.t, torch.where(cut.halved & ~cut.narrow, cut.m, cut.t))
            told = fill_padding(told, first, mask)
        if settings.first_segment == "conditional":
            told = torch.where(expand_time(cut.halved, told), told, first)
        first = told
    x_m = interval_step(x_c, first, cut.t, cut.m)

    x, starts, ends, keeps = [flow.x, x_c], [flow.t, cut.t], [flow.t, cut.r], [keep, everyone]
    if guided:
        t_g = uniform(n, generator)
        x_g = interpolate(actions, draw_noise(actions, generator), t_g)
        x, starts = [*x, x_g], [*starts, t_g]
        ends, keeps = [*ends, torch.zeros_like(t_g)], [*keeps, everyone]
    u = student(torch.cat(x), torch.cat(starts), torch.cat(ends), torch.cat(keeps)).split(n)

    x, starts, keeps = [x_m], [cut.m], [everyone]
    ends = [torch.where(cut.narrow, cut.m, cut.r)]
    if guided:
        answer = interval_step(x_g, u[2].detach(), t_g, torch.zeros_like(t_g))
        answer = answer * mask.any(dim=1, keepdim=True)
        t_again = uniform(n, generator)
        renoised = interpolate(answer, draw_noise(actions, generator), t_again)
        x, starts = [*x, renoised, renoised], [*starts, t_again, t_again]
        ends, keeps = [*ends, t_again, t_again], [*keeps, everyone, ~everyone]
    with torch.no_grad():
        u_teacher = teacher(torch.cat(x), torch.cat(starts), torch.cat(ends), torch.cat(keeps)).split(n)

    kappa = expand_time(cut.kappa, actions)
    target = kappa * first + (1 - kappa) * u_teacher[0]
    scale = cut.kappa.clamp(min=KAPPA_FLOOR)
    flow_loss = masked_mean((u[0] - flow.velocity).square(), mask)
    residual = masked_mean((u[1] - target).square(), mask)
    consistency = residual / scale
    if settings.consistency_norm == "huber":
        consistency = (consistency + HUBER_SCALE**2).sqrt() - HUBER_SCALE
    loss = flow_loss + settings.consistency_weight * consistency
    guidance = guidance_norm = loss.new_zeros(())
    if guided:
        g = u_teacher[1] - u_teacher[2]
        sample_guidance = masked_mean((u[2] - (u[2].detach() + g)).square(), mask)
        loss = loss + settings.guidance_weight * sample_guidance
        guidance = sample_guidance.mean()
        guidance_norm = masked_mean(g.square(), mask).mean().sqrt()
    return Losses(
        loss,
        {
            "loss_flow": flow_loss.detach().mean(),
            "loss_consistency": consistency.detach().mean(),
            "consistency_error": (residual / scale.square()).detach().mean(),
            "loss_guidance": guidance.detach(),
            "guidance_norm": guidance_norm.detach(),
            "contraction": torch.tensor(rho, device=actions.device),
        },
    )
