"""Distributions of the random times, and the contraction schedule."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ofp_lerobot.flow_map.times import (
    MIN_GAP,
    contraction,
    grid_intervals,
    halves,
    intervals,
    power_times,
    segments,
    uniform,
)

N = 40_000
P_VALUE = 1e-3  # the draws are seeded, so a test passes always or never


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_distribution(values: torch.Tensor, distribution) -> None:
    assert stats.kstest(values.double().numpy(), distribution.cdf).pvalue > P_VALUE


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.3)])
def test_uniform(low, high):
    values = uniform(N, generator(), low, high)
    assert values.shape == (N,) and values.dtype == torch.float32
    assert_distribution(values, stats.uniform(low, high - low))


@pytest.mark.parametrize(("alpha", "scale", "offset"), [(1.5, 0.999, 0.001), (1.0, 1.0, 0.0), (3.0, 0.5, 0.25)])
def test_power_times_are_beta(alpha, scale, offset):
    t = power_times(N, generator(), alpha=alpha, scale=scale, offset=offset)
    assert t.shape == (N,) and t.dtype == torch.float32
    assert float(t.min()) >= offset and float(t.max()) <= offset + scale + 1e-6
    assert_distribution(t, stats.beta(alpha, 1, loc=offset, scale=scale))


@pytest.mark.parametrize("rho", [1.0, 0.25, 0.05])
def test_segments_are_ordered(rho):
    t, m, r, kappa = segments(N, generator(), rho=rho)
    rounding = 1e-6
    assert all(x.shape == (N,) and x.dtype == torch.float32 for x in (t, m, r, kappa))
    assert bool((r >= 0).all() and (t <= 1).all())
    assert bool((m <= t).all() and (m >= r - rounding).all())
    assert bool((t - r >= MIN_GAP - rounding).all())
    assert bool((kappa >= 0).all() and (kappa < rho).all())
    np.testing.assert_allclose(((t - m).double() / (t - r).double()).numpy(), kappa.numpy(), atol=1e-4)
    assert_distribution(kappa, stats.uniform(0, rho))


def test_shares_of_the_intervals():
    """Half reach the action; half of those start at noise, the others at t ~ U(MIN_GAP, 1)."""
    t, r = intervals(N, generator())
    to_action, from_noise = r == 0, t == 1
    deviation = 4 * 0.5 / math.sqrt(N)
    assert float(to_action.double().mean()) == pytest.approx(0.5, abs=deviation)
    assert float(from_noise.double().mean()) == pytest.approx(0.25, abs=deviation)
    assert bool(to_action[from_noise].all())
    assert_distribution(t[to_action & ~from_noise], stats.uniform(MIN_GAP, 1 - MIN_GAP))


def test_inner_intervals_are_two_sorted_uniforms_with_a_gap():
    t, r = intervals(N, generator())
    inner = r > 0
    low, high = r[inner] / (1 - MIN_GAP), (t[inner] - MIN_GAP) / (1 - MIN_GAP)
    assert_distribution(low, stats.beta(1, 2))
    assert_distribution(high, stats.beta(2, 1))
    assert_distribution(high - low, stats.beta(1, 2))


def test_first_segments_do_not_depend_on_the_interval():
    t, _, r, kappa = segments(N, generator(), rho=1.0)
    for other in (t, r):
        assert abs(np.corrcoef(kappa.numpy(), other.numpy())[0, 1]) < 4 / math.sqrt(N)


def test_draws_follow_the_generator():
    for first, second, third in zip(
        segments(50, generator(3), rho=0.5),
        segments(50, generator(3), rho=0.5),
        segments(50, generator(4), rho=0.5),
        strict=True,
    ):
        assert torch.equal(first, second) and not torch.equal(first, third)


def test_contraction_endpoints_and_shape():
    schedule = {"start": 0.25, "end": 0.05, "steps": 500}
    assert contraction(0, **schedule) == pytest.approx(0.25)
    assert contraction(250, **schedule) == pytest.approx(0.15)
    assert contraction(125, **schedule) == pytest.approx(0.05 + 0.2 * math.cos(math.pi / 8) ** 2)
    for step in (500, 750, 3000):
        assert contraction(step, **schedule) == pytest.approx(0.05)
    values = [contraction(step, **schedule) for step in range(0, 500, 10)]
    assert all(a > b for a, b in itertools.pairwise(values))


def test_contraction_without_a_schedule_is_its_end():
    assert contraction(0, start=1.0, end=0.05, steps=0) == pytest.approx(0.05)


def test_cut_intervals_are_the_intervals():
    t, r = intervals(N, generator(5))
    cut = segments(N, generator(5), rho=0.25)
    assert torch.equal(cut.t, t) and torch.equal(cut.r, r)


def test_grid_intervals_are_shortcuts():
    """Lengths 1 … 1/64 equally often, and of each the multiples of it equally often."""
    t, r, narrowest = grid_intervals(N, generator())
    length = t - r
    assert torch.equal(narrowest, length == 1 / 64)
    for k in range(7):
        chosen = length == 1 / 2**k
        assert float(chosen.double().mean()) == pytest.approx(1 / 7, abs=4 / math.sqrt(N))
        counts = np.bincount((t[chosen] * 2**k).long().numpy(), minlength=2**k + 1)
        assert counts[0] == 0 and len(counts) == 2**k + 1
        assert k == 0 or stats.chisquare(counts[1:]).pvalue > P_VALUE
    assert bool(((t * 64).frac() == 0).all() and ((t / length).frac() == 0).all())


def test_halves_are_the_intervals_half_of_them_moved_to_the_grid():
    n = 8000
    (t, r), cut = intervals(n, torch.Generator().manual_seed(0)), halves(n, torch.Generator().manual_seed(0))
    moved = (cut.t != t) | (cut.r != r)
    assert torch.equal(cut.t[~moved], t[~moved]) and torch.equal(cut.r[~moved], r[~moved])
    torch.testing.assert_close(cut.m, (cut.t + cut.r) / 2)
    # One interval in four is (1, 0) before, one in seven on the grid.
    assert moved.double().mean().item() == pytest.approx(0.5 * (1 - 0.25 / 7), abs=0.03)
    assert ((cut.t[moved] * 64).frac() == 0).all() and ((cut.r[moved] * 64).frac() == 0).all()
    # One in seven lengths of the grid is the narrowest.
    assert cut.narrow.double().mean().item() == pytest.approx(1 / 14, abs=0.015)
    assert ((cut.t - cut.r)[cut.narrow] == 1 / 64).all() and moved[cut.narrow].all()
