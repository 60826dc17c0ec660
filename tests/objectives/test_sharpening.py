"""The mean-shift step against its definition and its closed forms, with the exact velocities of known laws."""

import pytest
import torch
from scipy import stats

from ofp_lerobot.objectives.sharpening import mean_shift
from tests.flows import ACTION_DIM, HORIZON, REAL_DIMS, Gaussian, Mixture, batch, generator, teacher_field

NOISES = [0.1, 0.3, 0.5, 0.7]


def shifted(recorder, velocity, answers, noise, mask=None, seed=0):
    """a′, the x̃ that the teacher was asked at, and its noise ε′ = (x̃ − (1 − τ)·â)/τ."""
    teacher = recorder(lambda x, t, r, keep: velocity(x, t))
    mask = torch.ones_like(answers, dtype=torch.bool) if mask is None else mask
    moved = mean_shift(teacher, answers, mask, noise, generator(seed))
    ((x, t, r, keep),) = teacher.inputs
    assert (t == noise).all() and (r == noise).all() and keep.all()
    return moved.detach(), x, (x - (1 - noise) * answers) / noise


@pytest.mark.parametrize("noise", NOISES)
def test_it_is_the_mean_of_the_law_under_a_gaussian_kernel(recorder, noise):
    """The definition by quadrature: Σ a·p(a)·exp(−(a − x̃/(1 − τ))²/2h²)/Σ …, h = τ/(1 − τ)."""
    law = Mixture([-1.0, 0.4, 1.5], 0.15)
    answers = torch.linspace(-2, 2, 40).view(-1, 1, 1)
    moved, x, _ = shifted(recorder, law.velocity, answers, noise)
    a, h = torch.linspace(-6, 6, 40001), noise / (1 - noise)
    for i in range(len(answers)):
        weight = law.density(a) * torch.exp(-((a - x[i].item() / (1 - noise)) ** 2) / (2 * h**2))
        assert moved[i].item() == pytest.approx(float((a * weight).sum() / weight.sum()), abs=1e-6)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("std", [0.05, 0.3, 1.0])
def test_a_gaussian_narrows_by_the_factor_of_the_formula(recorder, noise, std):
    """E[a′] = μ + (â − μ)·s²/(s² + h²): at μ it rests, and a width shrinks by that factor."""
    n, h = 40_000, noise / (1 - noise)
    factor = std**2 / (std**2 + h**2)
    for deviation in (0.0, -1.0, 2.0):
        answers = torch.full((n, 1, 1), 0.8 + deviation * std)
        moved, _, drawn = shifted(recorder, Gaussian(0.8, std).velocity, answers, noise)
        assert stats.kstest(drawn.ravel().numpy(), stats.norm.cdf).pvalue > 1e-3
        error = 5 * factor * h / n**0.5  # of the mean, from the noise that the kernel's centre has
        assert moved.mean().item() == pytest.approx(0.8 + factor * deviation * std, abs=error)


@pytest.mark.parametrize("noise", NOISES)
def test_the_only_point_of_a_law_is_where_everything_goes_and_rests(recorder, noise):
    answers = torch.linspace(-3, 3, 61).view(-1, 1, 1)
    moved, *_ = shifted(recorder, lambda x, t: (x - 0.7) / t, answers, noise)
    torch.testing.assert_close(moved, torch.full_like(answers, 0.7), atol=1e-12, rtol=0)


def test_it_rests_at_modes_and_moves_what_lies_between_them_to_the_nearer_one(recorder):
    law, n = Mixture([-1.0, 1.0], 0.1), 4000

    def mean(start):
        moved, *_ = shifted(recorder, law.velocity, torch.full((n, 1, 1), start), 0.15)
        return moved.mean().item()

    for mode in (-1.0, 1.0):
        assert mean(mode) == pytest.approx(mode, abs=0.01)
    for start in (0.3, 0.5, 0.7):
        assert abs(mean(start) - 1) < 0.6 * (1 - start)
        assert mean(-start) == pytest.approx(-mean(start), abs=0.05)


def test_answers_keep_their_modes_and_stay_within_the_data(recorder):
    law = Mixture([-1.0, 1.0], 0.1)
    side = (torch.rand(20_000, 1, 1, generator=generator(1)) < 0.5) * 2.0 - 1
    answers = side + 0.1 * torch.randn(side.shape, generator=generator(2))
    moved, *_ = shifted(recorder, law.velocity, answers, 0.3)
    assert (moved.sign() == side).double().mean() > 0.98
    assert moved.abs().max() < 1.4  # the law's own 4 deviations
    # The kernel's centre deviates from the mode by √(s² + h²), and that shrinks by the factor.
    factor, h = 0.1**2 / (0.1**2 + (3 / 7) ** 2), 3 / 7
    expected = factor * (0.1**2 + h**2) ** 0.5
    assert stats.iqr((moved - side).numpy()) == pytest.approx(stats.iqr(answers - side) * expected / 0.1, rel=0.1)


def test_padded_dimensions_are_noise_and_come_back_as_they_are(recorder):
    _, mask = batch()
    answers = torch.randn(mask.shape, generator=generator(3))
    answers[..., REAL_DIMS:] = 9.0
    moved, x, _ = shifted(recorder, lambda x, t: teacher_field(x, t, t, 1.0), answers, 0.4, mask)
    padded = x[..., REAL_DIMS:] / 0.4
    assert stats.kstest(padded.ravel().numpy(), stats.norm.cdf).pvalue > 1e-3
    assert torch.equal(moved[..., REAL_DIMS:], answers[..., REAL_DIMS:])
    assert moved.shape == (len(mask), HORIZON, ACTION_DIM)
    # Padded steps are answers like any other: they are renoised, and no loss looks at them.
    expected = x - 0.4 * teacher_field(x, torch.tensor(0.4), torch.tensor(0.4), 1.0)
    torch.testing.assert_close(moved[..., :REAL_DIMS], expected[..., :REAL_DIMS], atol=1e-12, rtol=0)
