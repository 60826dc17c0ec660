"""Each term of One-Step Flow Policy as published against an independent derivation in float64.

The velocities record their inputs; noise and times are reconstructed from those, and targets, losses and gradients
recomputed from the formulas sample by sample. Closed forms: data that is one point, and Gaussian data, for which
x_t ~ N((1 − t)·μ, σ_t²), σ_t² = t² + (1 − t)²·s², and the flow carries (x_t − (1 − t)·μ)/σ_t unchanged.
"""

import importlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats

from ofp_lerobot.flow_map.times import Segments
from ofp_lerobot.objectives import OFPPaperSettings, Settings, ofp_paper
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

PAPER = OFPPaperSettings(consistency_weight=0.7, guidance_weight=0.03, condition_dropout=0.3, contraction_steps=500)
BEFORE, AFTER = 200, 600  # steps before and after the end of the contraction


class Case:
    """One evaluation, its calls as numpy arrays in blocks of one per sample."""

    def __init__(self, recorder, paper=PAPER, step=AFTER, n=N, student=student_field, teacher=teacher_field):
        self.n = n
        self.actions, self.mask = batch(n)
        self.student, self.teacher = recorder(student), recorder(teacher)
        settings = Settings(ofp_paper=paper)
        self.losses = ofp_paper(self.student, self.teacher, self.actions, self.mask, settings, step, generator())
        self.losses.loss.sum().backward()
        self.a, self.count = self.actions.numpy(), self.mask.sum(dim=(1, 2)).numpy()
        self.flow, self.consistency, *guided = self.blocks(self.student, 0)
        gradient = self.student.outputs[0].grad.numpy()
        self.gradients = [gradient[k * n : (k + 1) * n] for k in range(len(gradient) // n)]
        self.second, *renoised = self.blocks(self.teacher, 0)
        self.guided = guided[0] if guided else None
        self.renoised = renoised

    def blocks(self, velocity, call):
        """(x, t, r, keep, output) per block of n samples."""
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
        mask = self.mask[i]
        entries = [values[s, d] for s in range(HORIZON) for d in range(ACTION_DIM) if mask[s, d]]
        return sum(entries) / len(entries)

    def flow_losses(self):
        target = self.noise(self.flow) - self.a
        return target, np.array([self.masked(i, (self.flow[4][i] - target[i]) ** 2) for i in range(self.n)])

    def consistency_targets(self):
        """Sample by sample from the paper's equation: κ·(ε − a) + (1 − κ)·u⁻(x_m, m, r)."""
        _, t, r, _, _ = self.consistency
        m = self.second[1]
        noise = self.noise(self.consistency)
        targets, kappas, mids = [], [], []
        for i in range(self.n):
            kappa = (t[i] - m[i]) / (t[i] - r[i])
            x_m = m[i] * noise[i] + (1 - m[i]) * self.a[i]
            targets.append(kappa * (noise[i] - self.a[i]) + (1 - kappa) * teacher_field(x_m, m[i], r[i], 1.0))
            kappas.append(kappa)
            mids.append(x_m)
        return np.array(targets), np.array(kappas), np.array(mids)

    def consistency_losses(self):
        """(target, weight 1/max(κ, .05), squared error)."""
        target, kappa, _ = self.consistency_targets()
        error = np.array([self.masked(i, (self.consistency[4][i] - target[i]) ** 2) for i in range(self.n)])
        return target, 1 / np.maximum(kappa, 0.05), error

    def answers(self):
        """â = x_t − t·y, zero in padded dimensions."""
        x, t, r, _, y = self.guided
        assert (r == 0).all()
        answer = x - t[:, None, None] * y
        answer[:, :, REAL_DIMS:] = 0
        return answer

    def guidance(self):
        """g = u⁻(x̃, t′, t′) − u⁻(x̃, t′, t′ ∣ ∅)."""
        x, t = self.renoised[0][0], self.renoised[0][1][:, None, None]
        return teacher_field(x, t, t, 1.0) - teacher_field(x, t, t, 0.0)

    def closed_gradient(self, weight, error):
        """Of weight·mean(error²) over the entries that count, with respect to the network's output."""
        return 2 * (weight / self.count)[:, None, None] * error * self.mask.numpy()


@pytest.mark.parametrize("step", [0, BEFORE, AFTER, 1500])
def test_loss_is_the_sum_of_the_terms(recorder, step):
    case = Case(recorder, step=step)
    _, flow = case.flow_losses()
    _, weight, error = case.consistency_losses()
    expected = flow + 0.7 * weight * error
    logs = {name: float(value) for name, value in case.losses.logs.items()}
    if step >= 500:
        guidance = np.array([case.masked(i, case.guidance()[i] ** 2) for i in range(N)])
        expected = expected + 0.03 * guidance
        assert logs["loss_guidance"] == pytest.approx(guidance.mean())
        assert logs["guidance_norm"] == pytest.approx(np.sqrt(guidance.mean()))
    else:
        assert case.guided is None and logs["loss_guidance"] == logs["guidance_norm"] == 0
    assert case.losses.loss.shape == (N,)
    np.testing.assert_allclose(case.losses.loss.detach().numpy(), expected, rtol=1e-9)
    assert logs["loss_flow"] == pytest.approx(flow.mean())
    assert logs["loss_consistency"] == pytest.approx((weight * error).mean())
    assert logs["consistency_error"] == pytest.approx((weight**2 * error).mean())
    assert logs["contraction"] == pytest.approx(0.05 + 0.1 * (1 + np.cos(np.pi * min(step / 500, 1))))


def test_boundary_anchoring(recorder):
    """r = t, π₀.₅'s times, standard normal noise, gradient of ‖u − (ε − a)‖²."""
    case = Case(recorder, n=3000)
    _, t, r, _, u = case.flow
    noise = case.noise(case.flow)
    assert (t == r).all()
    assert stats.kstest(t, stats.beta(1.5, 1, 0.001, 0.999).cdf).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    expected = case.closed_gradient(np.ones(case.n), u - (noise - case.a))
    np.testing.assert_allclose(case.gradients[0], expected, atol=1e-9)


def test_self_consistency(recorder):
    """The teacher sees x_m at (m, r), κ ~ U(0, ρ), and the gradient is that of ‖u − target‖²/max(κ, .05)."""
    case = Case(recorder, step=BEFORE, n=3000)
    _, _, r, _, u = case.consistency
    noise = case.noise(case.consistency)
    target, kappa, x_m = case.consistency_targets()
    x_seen, _, r_seen, keep, _ = case.second
    np.testing.assert_allclose(x_seen, x_m, atol=1e-12)
    assert (r_seen == r).all() and keep.all()
    rho = 0.05 + 0.1 * (1 + np.cos(np.pi * BEFORE / 500))
    assert stats.kstest(kappa, stats.uniform(0, rho).cdf).pvalue > 1e-3
    assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise.ravel(), case.noise(case.flow).ravel())[0, 1]) < 4 / np.sqrt(noise.size)
    expected = case.closed_gradient(0.7 / np.maximum(kappa, 0.05), u - target)
    np.testing.assert_allclose(case.gradients[1], expected, atol=1e-9)


def test_self_guidance(recorder):
    """One step to the answer, fresh noise at t′, both teacher passes at the same place, gradient −2·λ_g·g/count."""
    case = Case(recorder, n=3000)
    _, t, _, keep, _ = case.guided
    assert keep.all() and stats.kstest(t, stats.uniform.cdf).pvalue > 1e-3
    with_condition, without = case.renoised
    assert with_condition[3].all() and not without[3].any()
    for seen, same in zip(with_condition[:3], without[:3], strict=True):
        np.testing.assert_array_equal(seen, same)
    t_again = with_condition[1]
    assert (with_condition[2] == t_again).all() and stats.kstest(t_again, stats.uniform.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(t, t_again)[0, 1]) < 4 / np.sqrt(case.n)
    draws = [case.noise(case.flow), case.noise(case.consistency), case.noise(case.guided)]
    draws.append(case.noise(with_condition, clean=case.answers()))
    for noise in draws[2:]:
        assert stats.kstest(noise.ravel(), stats.norm.cdf).pvalue > 1e-3
    correlation = np.corrcoef([noise.ravel() for noise in draws]) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(draws[0].size)
    expected = -2 * 0.03 * case.guidance() / case.count[:, None, None] * case.mask.numpy()
    np.testing.assert_allclose(case.gradients[2], expected, atol=1e-12)


def test_padded_dimensions_of_the_answer_are_zeroed_before_renoising(recorder):
    """Nothing of the student's output in padded dimensions comes back: x̃ is pure noise there."""
    junk = torch.arange(ACTION_DIM) >= REAL_DIMS
    clean = Case(recorder)
    spoilt = Case(recorder, student=lambda *args: student_field(*args) + 9 * junk)
    for block in range(2):
        np.testing.assert_array_equal(clean.renoised[block][0], spoilt.renoised[block][0])
    noise = spoilt.noise(spoilt.renoised[0], clean=spoilt.answers())
    x, t = spoilt.renoised[0][0], spoilt.renoised[0][1][:, None, None]
    np.testing.assert_allclose(x[:, :, REAL_DIMS:], (t * noise)[:, :, REAL_DIMS:], atol=1e-12)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_condition_dropout_touches_the_flow_term_only(recorder, probability):
    weight = 0.03 if probability else 0.0  # guidance needs the dropout
    case = Case(recorder, replace(PAPER, condition_dropout=probability, guidance_weight=weight), n=4000)
    dropped = 1 - case.flow[3].mean()
    assert dropped == pytest.approx(probability, abs=4 * np.sqrt(probability * (1 - probability) / 4000))
    others = [case.consistency, case.second]
    others += [case.guided, case.renoised[0]] if probability else []
    assert all(block[3].all() for block in others)


def test_number_of_calls_and_their_sizes(recorder):
    for weight, step, guided in ((0.03, BEFORE, 0), (0.03, AFTER, 1), (0.0, AFTER, 0), (0.03, 500, 1)):
        case = Case(recorder, replace(PAPER, guidance_weight=weight), step)
        assert case.student.batch_sizes == [(2 + guided) * N]
        assert case.teacher.batch_sizes == [(1 + 2 * guided) * N]
        assert case.student.with_gradient == [True] and not any(case.teacher.with_gradient)
        assert all(output.grad is None for output in case.teacher.outputs)


def test_guidance_starts_at_the_end_of_the_contraction(recorder):
    paper = replace(PAPER, contraction_steps=700)
    assert Case(recorder, paper, step=699).guided is None
    assert Case(recorder, paper, step=700).guided is not None


def test_guidance_weight_zero_is_a_clean_off_switch(recorder):
    """Off, it equals a run whose guidance has not begun; on, the other terms keep their draws and gradients."""
    paper = replace(PAPER, contraction_start=0.05, contraction_end=0.05)
    off = Case(recorder, replace(paper, guidance_weight=0.0), AFTER)
    early, on = Case(recorder, paper, BEFORE), Case(recorder, paper, AFTER)
    assert torch.equal(off.losses.loss, early.losses.loss)
    for name in ("flow", "consistency", "second"):
        for first, second, third in zip(getattr(off, name), getattr(early, name), getattr(on, name), strict=True):
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(first, third)
    for k in range(2):
        np.testing.assert_array_equal(off.gradients[k], early.gradients[k])
        np.testing.assert_array_equal(off.gradients[k], on.gradients[k])
    assert off.losses.logs.keys() == on.losses.logs.keys()
    assert all(float(off.losses.logs[name]) == 0 for name in ("loss_guidance", "guidance_norm"))


@pytest.mark.parametrize("rho", [1.0, 0.25, 0.01])
def test_the_map_of_a_single_action_is_a_fixed_point(recorder, rho):
    """Data that is one point a₀: u(x, t, r) = (x − a₀)/t meets the target for every κ."""
    point = 0.7
    exact = recorder(lambda x, t, r, keep: (x - point) / t)
    paper = replace(PAPER, contraction_start=rho, contraction_end=rho)
    actions = torch.full((500, HORIZON, ACTION_DIM), point)
    losses = ofp_paper(exact, exact, actions, actions > 0, Settings(ofp_paper=paper), AFTER, generator())
    assert losses.loss.max().item() < 1e-18


def test_gaussian_closed_forms_agree_with_each_other():
    """The trajectory's derivative is the velocity, and the average velocity is its integral."""
    flow, x, t, r, h = Gaussian(0.8, 0.3), torch.tensor([-1.5, 0.2, 2.0]), torch.tensor(0.9), torch.tensor(0.1), 1e-5
    derivative = (flow.transport(x, t, t + h) - flow.transport(x, t, t - h)) / (2 * h)
    torch.testing.assert_close(derivative, flow.velocity(x, t), atol=1e-8, rtol=0)
    grid = torch.linspace(0.1, 0.9, 2001)
    along = torch.stack([flow.velocity(flow.transport(x, t, s), s) for s in grid])
    torch.testing.assert_close(torch.trapezoid(along, grid, dim=0) / 0.8, flow.average(x, t, r), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("t", "r"), [(0.9, 0.0), (0.6, 0.2), (0.3, 0.0)])
def test_bias_of_the_target_vanishes_with_kappa(recorder, monkeypatch, t, r):
    """On Gaussian data with the exact map as teacher, (E[target ∣ x_t] − u(x_t, t, r))/κ → 0 with κ.

    The expectation over the noises that lead to x_t is Gauss–Hermite quadrature.
    """
    flow = Gaussian(0.8, 0.3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    x = np.array([-1.0, -0.2, 0.5, 1.4])
    mean, std = flow.action_given(x, t)
    actions = mean[:, None] + std * nodes
    noise = (x[:, None] - (1 - t) * actions) / t
    n = actions.size
    shaped = [torch.from_numpy(value.reshape(n, 1, 1)) for value in (actions, noise)]
    module = importlib.import_module("ofp_lerobot.objectives.ofp_paper")
    monkeypatch.setattr(module, "draw_noise", lambda actions, generator: shaped[1])
    settings = Settings(ofp_paper=replace(PAPER, consistency_weight=1.0, guidance_weight=0.0))

    def relative_bias(kappa: float) -> np.ndarray:
        t_all, r_all, kappas = (torch.full((n,), value) for value in (t, r, kappa))
        cut = Segments(t_all, t_all - kappas * (t_all - r_all), r_all, kappas)
        monkeypatch.setattr(module, "segments", lambda n, generator, *, rho: cut)
        student = recorder(lambda x, t, r, keep: 0 * x)
        teacher = recorder(lambda x, t, r, keep: flow.average(x, t, r))
        mask = torch.ones(n, 1, 1, dtype=torch.bool)
        ofp_paper(student, teacher, shaped[0], mask, settings, 0, generator()).loss.sum().backward()
        np.testing.assert_allclose(student.inputs[0][0][n:].numpy().reshape(4, 9), x[:, None].repeat(9, 1), atol=1e-12)
        # The student says 0, so the gradient of its squared error is −2·target/max(κ, .05).
        target = -student.outputs[0].grad[n:].numpy().reshape(4, 9) * max(kappa, 0.05) / 2
        exact = flow.average(*(torch.as_tensor(value) for value in (x, t, r))).numpy()
        # Single targets are far off, only their mean is right.
        assert np.abs(target - exact[:, None]).max() > kappa / 10
        return np.abs(target @ weights - exact).max() / kappa

    biases = [relative_bias(kappa) for kappa in (0.2, 0.02, 0.002, 0.0002)]
    assert biases[0] > 1e-3
    for wide, narrow in pairwise(biases):
        assert narrow < 0.2 * wide


def test_guidance_gradient_on_a_pair_of_gaussians(recorder):
    """Exact velocities of N(μ_c, s_c²) with and N(μ_0, s_0²) without condition: the gradient with respect to
    y is −2·λ_g·(v_c − v_0)(x̃, t′)/count, where x̃ is the exact answer of the conditional flow, renoised."""
    conditional, unconditional = Gaussian(0.8, 0.3), Gaussian(-0.1, 1.2)

    def exact(x, t, r, keep):
        return keep * conditional.average(x, t, r) + (1 - keep) * unconditional.average(x, t, r)

    n, weight = 2000, 0.02
    actions = 0.8 + 0.3 * torch.randn(n, 2, 1, generator=generator(1))
    student, teacher = recorder(exact), recorder(exact)
    settings = Settings(ofp_paper=replace(PAPER, guidance_weight=weight, condition_dropout=0.1))
    losses = ofp_paper(student, teacher, actions, torch.ones(n, 2, 1, dtype=torch.bool), settings, AFTER, generator())
    losses.loss.sum().backward()
    x, t, _, _ = (value[2 * n :].view(n, -1, 1) for value in student.inputs[0])
    x_again, t_again, _, _ = (value[n : 2 * n].view(n, -1, 1) for value in teacher.inputs[-1])
    answer = conditional.transport(x, t, torch.zeros(()))
    noise = (x_again - (1 - t_again) * answer) / t_again
    assert stats.kstest(answer.ravel().numpy(), stats.norm(0.8, 0.3).cdf).pvalue > 1e-3
    assert stats.kstest(noise.ravel().numpy(), stats.norm.cdf).pvalue > 1e-3
    g = conditional.velocity(x_again, t_again) - unconditional.velocity(x_again, t_again)
    torch.testing.assert_close(student.outputs[0].grad[2 * n :], -2 * weight * g / 2, atol=1e-10, rtol=0)
