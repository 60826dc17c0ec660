"""Shared by the objectives' tests: padded batches, plain velocity fields, and Gaussian data with its closed forms.

Data N(μ, s²): x_t ~ N((1 − t)·μ, σ_t²), σ_t² = t² + (1 − t)²·s², and the flow carries (x_t − (1 − t)·μ)/σ_t unchanged.
"""

import torch

N, HORIZON, ACTION_DIM = 24, 5, 3
REAL_DIMS = 2


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def student_field(x, t, r, keep):
    return 0.2 * x * x + t * x - 0.7 * r + 0.4 * keep


def teacher_field(x, t, r, keep):
    return 0.1 * x * x - 0.5 * t * x + 0.3 * r * x + (0.6 + 0.2 * x) * keep - 0.1


def batch(n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions with one padded dimension and, in every third sample, two padded steps."""
    actions = torch.randn(n, HORIZON, ACTION_DIM, generator=generator(1))
    mask = torch.ones(n, HORIZON, ACTION_DIM, dtype=torch.bool)
    mask[::3, -2:] = False
    mask[:, :, REAL_DIMS:] = False
    actions[:, :, REAL_DIMS:] = 0
    return actions, mask


class Gaussian:
    """The flow of data N(mean, std²), everything in closed form."""

    def __init__(self, mean: float, std: float):
        self.mean, self.std = mean, std

    def sigma(self, t):
        return (t**2 + (1 - t) ** 2 * self.std**2) ** 0.5

    def transport(self, x, t, r):
        """x_r on the trajectory through x_t."""
        return (1 - r) * self.mean + self.sigma(r) / self.sigma(t) * (x - (1 - t) * self.mean)

    def velocity(self, x, t):
        """E[ε − a ∣ x_t = x]."""
        deviation = (x - (1 - t) * self.mean) / self.sigma(t) ** 2
        return t * deviation - self.mean - (1 - t) * self.std**2 * deviation

    def average(self, x, t, r):
        """Average velocity over [r, t], r < t; a teacher's call at r = t means the instantaneous one."""
        same = t == r
        gap = torch.where(same, torch.ones_like(t), t - r)
        return torch.where(same, self.velocity(x, t), (x - self.transport(x, t, r)) / gap)

    def action_given(self, x, t):
        """Mean and standard deviation of a given x_t = x."""
        gain = (1 - t) * self.std**2 / self.sigma(t) ** 2
        return self.mean + gain * (x - (1 - t) * self.mean), self.std * t / self.sigma(t)


class Mixture:
    """The flow's velocity of an even mixture of one-dimensional Gaussians, entry by entry."""

    def __init__(self, means: list[float], std: float):
        self.parts, self.std = [Gaussian(mean, std) for mean in means], std

    def density(self, a):
        return sum(torch.exp(-((a - part.mean) ** 2) / (2 * self.std**2)) for part in self.parts)

    def velocity(self, x, t):
        """E[ε − a ∣ x_t = x]: the parts' own, weighted by their share of the density at x."""
        share = torch.stack([torch.exp(-((x - (1 - t) * p.mean) ** 2) / (2 * p.sigma(t) ** 2)) for p in self.parts])
        share = share / share.sum(dim=0)
        return (share * torch.stack([part.velocity(x, t) for part in self.parts])).sum(dim=0)
