"""Sharpening: self-guidance by a mean-shift step of the teacher's own denoiser."""

import torch
from torch import Generator, Tensor

from ..flow_map.path import Velocity, interpolate, interval_step
from .base import draw_noise


def mean_shift(teacher: Velocity, answers: Tensor, mask: Tensor, noise: float, generator: Generator) -> Tensor:
    """a′ = x̃ − τ·u⁻(x̃, τ, τ) of answers â renoised to τ, x̃ = τ·ε′ + (1 − τ)·â: (n, horizon, action_dim).

    u⁻(x, τ, τ) is E[ε − a ∣ x_τ = x], so a′ = E[a ∣ x_τ = x̃]: a mean of demonstrated actions, weighted by
    p(a ∣ o)·exp(−‖a − x̃/(1 − τ)‖²/2h²) with h = τ/(1 − τ). That is one mean-shift step with a Gaussian kernel of
    width h from â + h·ε′ towards where the demonstrations are dense. It is bounded by the data, rests at a law's only
    point, and needs no velocity without condition. Where the law is N(μ, s²), E[a′] = μ + (â − μ)·s²/(s² + h²):
    answers narrow by that factor. h small against the distance of modes leaves the modes alone.

    answers (n, horizon, action_dim); mask likewise, bool. Padded action dimensions are noise alone in x̃, as on the path
    of their data, which is zero, and come back as they are.
    """
    real = mask.any(dim=1, keepdim=True)
    t = torch.full((len(answers),), noise, device=answers.device, dtype=answers.dtype)
    x = interpolate(answers * real, draw_noise(answers, generator), t)
    moved = interval_step(x, teacher(x, t, t), t, torch.zeros_like(t))
    return torch.where(real, moved, answers)
