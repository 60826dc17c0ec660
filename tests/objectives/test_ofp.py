"""Each term of the default objective against an independent derivation in float64.

The velocities record their inputs; noise and times are reconstructed from those, and targets, losses and gradients
recomputed from the formulas sample by sample.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from ofp_lerobot.objectives import Settings, ofp
from tests.flows import (
    ACTION_DIM,
    HORIZON,
    REAL_DIMS,
    Gaussian,
    N,
    batch,
    generator,
    student_field,
    teacher_field,
)

PLAIN = Settings(consistency_weight=0.7, sharpening_noise=0.0)
SHARP = replace(PLAIN, sharpening_noise=0.3)
BOTH = [PLAIN, SHARP]


class Case:
    """One evaluation, its calls as numpy arrays (x, t, r, keep, output)."""

    def __init__(self, recorder, settings, n=N, student=student_field, teacher=teacher_field):
        self.n = n
        self.actions, self.mask = batch(n)
        self.student, self.teacher = recorder(student), recorder(teacher)
        self.losses = ofp(self.student, self.teacher, self.actions, self.mask, settings, 0, generator())
        self.losses.loss.sum().backward()
        self.a, self.count = self.actions.numpy(), self.mask.sum(dim=(1, 2)).numpy()
        self.flow, self.consistency = self.blocks(self.student, 0)
        gradient = self.student.outputs[0].grad.numpy()
        self.gradients = gradient[:n], gradient[n:]
        (self.first,), (self.second,) = self.blocks(self.teacher, 0), self.blocks(self.teacher, 1)
        self.renoised = self.blocks(self.teacher, 2)[0] if len(self.teacher.inputs) > 2 else None
        _, t, r, *_ = self.consistency
        self.narrow = self.second[1] == self.second[2]
        self.one_step = (t == 1) & (r == 0)

    def blocks(self, velocity, call):
        values = [value.numpy() for value in velocity.inputs[call]] + [velocity.outputs[call].detach().numpy()]
        return [
            tuple(value[k * self.n : (k + 1) * self.n] for value in values) for k in range(len(values[0]) // self.n)
        ]

    def noise(self, block, clean=None):
        """ε from x_t = t·ε + (1 − t)·a."""
        x, t = block[0], block[1][:, None, None]
        return (x - (1 - t) * (self.a if clean is None else clean)) / t

    def masked(self, i, values):
        """The mean over the entries of sample i that count."""
        entries = [values[s, d] for s in range(HORIZON) for d in range(ACTION_DIM) if self.mask[i, s, d]]
        return sum(entries) / len(entries)

    def halves(self):
        """Sample by sample: (where the teacher's two halves lead as a velocity, x_m)."""
        x_t, t, r, _, _ = self.consistency
        noise = self.noise(self.consistency)
        targets, mids = [], []
        for i in range(self.n):
            m = (t[i] + r[i]) / 2
            v = noise[i] - self.a[i]
            end = t[i] if self.narrow[i] else m
            v[:, :REAL_DIMS] = teacher_field(x_t[i], t[i], end, 1.0)[:, :REAL_DIMS]
            x_m = x_t[i] - (t[i] - m) * v
            end = m if self.narrow[i] else r[i]
            reached = x_m - (m - r[i]) * teacher_field(x_m, m, end, 1.0)
            targets.append((x_t[i] - reached) / (t[i] - r[i]))
            mids.append(x_m)
        return np.array(targets), np.array(mids)

    def targets(self):
        """Of the self-consistency term, in real dimensions; for (1, 0) x − a′, a′ = x̃ − τ·u⁻(x̃, τ, τ)."""
        targets, _ = self.halves()
        if self.renoised is None:
            return targets
        x, t, *_ = self.renoised
        for i in np.flatnonzero(self.one_step):
            sharp = x[i] - t[i] * teacher_field(x[i], t[i], t[i], 1.0)
            targets[i] = self.consistency[0][i] - sharp
        return targets

    def answers(self):
        """Where the halves lead: zero in padded dimensions."""
        x, t, r, *_ = self.consistency
        answers = x - (t - r)[:, None, None] * self.halves()[0]
        answers[..., REAL_DIMS:] = 0
        return answers

    def closed_gradient(self, weight, error):
        """Of weight·mean(error²) over the entries that count, with respect to the network's output."""
        return 2 * (weight / self.count)[:, None, None] * error * self.mask.numpy()


@pytest.fixture(params=BOTH, ids=["plain", "sharp"])
def settings(request):
    return request.param


def test_loss_is_the_sum_of_the_terms(recorder, settings):
    """The pseudo-Huber norm of the error at κ = ½: the hypotenuse of √2·error and .05, less .05."""
    case, n = Case(recorder, settings, n=90), 90
    target, aim = case.noise(case.flow) - case.a, case.targets()
    flow = np.array([case.masked(i, (case.flow[4][i] - target[i]) ** 2) for i in range(n)])
    error = np.array([case.masked(i, (case.consistency[4][i] - aim[i]) ** 2) for i in range(n)])
    consistency = np.hypot(np.sqrt(2 * error), 0.05) - 0.05
    np.testing.assert_allclose(case.losses.loss.detach().numpy(), flow + 0.7 * consistency, rtol=1e-9)
    assert case.losses.loss.shape == (n,)
    shift = [case.masked(i, (aim[i] - case.halves()[0][i]) ** 2) for i in range(n)]
    logs = {name: float(value) for name, value in case.losses.logs.items()}
    assert logs.keys() == {"loss_flow", "loss_consistency", "consistency_error", "sharpening_shift"}
    assert logs["loss_flow"] == pytest.approx(flow.mean())
    assert logs["loss_consistency"] == pytest.approx(consistency.mean())
    assert logs["consistency_error"] == pytest.approx(error.mean())
    assert logs["sharpening_shift"] == pytest.approx(np.sqrt(np.mean(shift)), abs=1e-12)
    assert (logs["sharpening_shift"] > 0) == (settings is SHARP)


def test_boundary_anchoring(recorder, settings):
    """r = t, π₀.₅'s times, standard normal noise, gradient of ‖u − (ε − a)‖²."""
    case = Case(recorder, settings, n=3000)
    _, t, r, keep, u = case.flow
    noise = case.noise(case.flow)
    assert (t == r).all() and keep.all()
    assert stats.kstest(t, stats.beta(1.5, 1, 0.001, 0.999).cdf).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    expected = case.closed_gradient(np.ones(case.n), u - (noise - case.a))
    np.testing.assert_allclose(case.gradients[0], expected, atol=1e-9)


def test_self_consistency(recorder, settings):
    """The teacher goes t → m → r, and the gradient is that of √(2·‖u − target‖² + c²)."""
    case = Case(recorder, settings, n=3000)
    x_t, t, r, keep, u = case.consistency
    noise = case.noise(case.consistency)
    m = (t + r) / 2
    np.testing.assert_array_equal(case.first[0], x_t)
    assert (case.first[1] == t).all() and (case.first[2] == np.where(case.narrow, t, m)).all()
    np.testing.assert_allclose(case.second[0], case.halves()[1], atol=1e-12)
    assert (case.second[1] == m).all() and (case.second[2] == np.where(case.narrow, m, r)).all()
    assert keep.all() and case.first[3].all() and case.second[3].all()
    np.testing.assert_allclose((t - r)[case.narrow], 1 / 64)
    assert case.narrow.mean() == pytest.approx(1 / 14, abs=0.02)
    assert case.one_step.mean() == pytest.approx(1 / 8 + 1 / 14, abs=0.03)
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise.ravel(), case.noise(case.flow).ravel())[0, 1]) < 4 / np.sqrt(noise.size)
    error = u - case.targets()
    square = np.array([case.masked(i, error[i] ** 2) for i in range(case.n)])
    expected = case.closed_gradient(0.7 / np.hypot(np.sqrt(2 * square), 0.05), error)
    np.testing.assert_allclose(case.gradients[1], expected, atol=1e-9)


def test_sharpening_renoises_where_the_halves_lead(recorder):
    """Fresh standard normal noise at τ, with the condition; padded dimensions are noise alone."""
    case = Case(recorder, SHARP, n=3000)
    x, t, r, keep, _ = case.renoised
    assert (t == 0.3).all() and (r == 0.3).all() and keep.all()
    draws = [case.noise(case.flow), case.noise(case.consistency), case.noise(case.renoised, clean=case.answers())]
    assert stats.kstest(draws[2].ravel(), stats.norm.cdf).pvalue > 1e-3
    correlation = np.corrcoef([noise.ravel() for noise in draws]) - np.eye(3)
    assert np.abs(correlation).max() < 4 / np.sqrt(draws[0].size)
    assert stats.kstest(x[..., REAL_DIMS:].ravel() / 0.3, stats.norm.cdf).pvalue > 1e-3


def test_only_the_one_step_is_sharpened(recorder):
    """Everything else keeps its draws, its target and its gradient; so off is a clean switch."""
    off, on = Case(recorder, PLAIN, n=90), Case(recorder, SHARP, n=90)
    for name in ("flow", "consistency", "first", "second"):
        for first, second in zip(getattr(off, name), getattr(on, name), strict=True):
            np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(off.gradients[0], on.gradients[0])
    same = np.array([np.array_equal(a, b) for a, b in zip(off.gradients[1], on.gradients[1], strict=True)])
    np.testing.assert_array_equal(same, ~off.one_step)
    assert 0 < off.one_step.sum() < 90


@pytest.mark.parametrize("padded", [9.0, -40.0])
def test_what_the_teacher_says_in_padded_dimensions_does_not_matter(recorder, settings, padded):
    """There the data is exactly zero: x_m = m·ε, the answer is 0 and x̃ = τ·ε′."""
    junk = torch.arange(ACTION_DIM) >= REAL_DIMS
    clean = Case(recorder, settings, n=90)
    spoilt = Case(recorder, settings, n=90, teacher=lambda *args: teacher_field(*args) + padded * junk)
    noise, m = spoilt.noise(spoilt.consistency), spoilt.second[1][:, None, None]
    np.testing.assert_allclose(spoilt.second[0][..., REAL_DIMS:], (m * noise)[..., REAL_DIMS:], atol=1e-12)
    assert torch.equal(clean.losses.loss, spoilt.losses.loss)
    if settings is SHARP:
        np.testing.assert_array_equal(clean.renoised[0], spoilt.renoised[0])


def test_number_of_calls_and_their_sizes(recorder):
    for settings, calls in ((PLAIN, 2), (SHARP, 3)):
        case = Case(recorder, settings)
        assert case.student.batch_sizes == [2 * N] and case.teacher.batch_sizes == calls * [N]
        assert case.student.with_gradient == [True] and not any(case.teacher.with_gradient)
        assert all(output.grad is None for output in case.teacher.outputs)


def test_the_map_of_a_single_action_is_a_fixed_point(recorder, settings):
    """Data that is one point a₀: u(x, t, r) = (x − a₀)/t meets every target, and sharpening moves nothing."""
    point = 0.7
    exact = recorder(lambda x, t, r, keep: (x - point) / t)
    actions = torch.full((500, HORIZON, ACTION_DIM), point)
    losses = ofp(exact, exact, actions, actions > 0, settings, 0, generator())
    assert losses.loss.max().item() < 1e-18
    assert losses.logs["sharpening_shift"].item() < 1e-12


def test_the_exact_map_is_the_target(recorder):
    """On Gaussian data with the exact map as teacher, for every sample and at any width.

    But for the narrowest, whose halves are instantaneous: there it is two steps of Heun's kind, 1/128 long.
    """
    flow, n = Gaussian(0.8, 0.3), 500
    target, x, t, r = targets_on(recorder, flow, n, Settings(sharpening_noise=0.0))
    exact = flow.average(x, t.view(-1, 1, 1), r.view(-1, 1, 1))
    narrow = t - r == 1 / 64
    torch.testing.assert_close(target[~narrow], exact[~narrow], atol=1e-9, rtol=0)
    assert (t - r).max() == 1 and 0 < narrow.double().mean() < 0.15
    assert 1e-9 < (target - exact)[narrow].abs().max() < 0.05


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_one_step_of_a_gaussian_learns_the_narrower_one(recorder, noise):
    """With the exact map as teacher the target of (1, 0) leads to μ + s·c·ε on average, c = s²/(s² + h²)."""
    mean, std, n, h = 0.8, 0.3, 60_000, noise / (1 - noise)
    target, x, t, r = targets_on(recorder, Gaussian(mean, std), n, Settings(sharpening_noise=noise))
    one = (t == 1) & (r == 0)
    answers, drawn = (x - target)[one].ravel().numpy(), x[one].ravel().numpy()
    factor = std**2 / (std**2 + h**2)
    slope, intercept = np.polyfit(drawn, answers, 1)
    error = 5 * factor * h / np.sqrt(len(drawn))
    assert slope == pytest.approx(factor * std, abs=error)
    assert intercept == pytest.approx(mean, abs=error)


def targets_on(recorder, flow, n, settings):
    """(targets, x, t, r) of n samples of Gaussian data, the exact map being the teacher and the student saying 0."""
    actions = flow.mean + flow.std * torch.randn(n, 1, 1, generator=generator(1))
    student = recorder(lambda x, t, r, keep: 0 * x)
    teacher = recorder(lambda x, t, r, keep: flow.average(x, t, r))
    mask = torch.ones(n, 1, 1, dtype=torch.bool)
    ofp(
        student, teacher, actions, mask, replace(settings, consistency_weight=1.0), 0, generator()
    ).loss.sum().backward()
    x, t, r, _ = (value[n:] for value in student.inputs[0])
    # The gradient is g = −2·target/√(2·target² + c²) per sample, solved for the target.
    gradient = student.outputs[0].grad[n:]
    return -gradient * 0.05 / (4 - 2 * gradient**2).sqrt(), x, t, r
