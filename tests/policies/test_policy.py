"""Loss, teacher and acting of the policy, apart from LeRobot's scripts."""

import numpy as np
import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE
from torch._subclasses.fake_tensor import FakeTensorMode

from ofp_lerobot.objectives import OBJECTIVES, OFPPaperSettings
from ofp_lerobot.objectives.mean_flow import with_derivative
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.scalars import LaggingScalars
from ofp_lerobot.policies.training_state import FILENAME
from ofp_lerobot.policies.vla import policy as vla_policy
from ofp_lerobot.policies.vla.text import TEXT_EXTENT, TextExtent, known_extent, text_extent
from tests import small
from tests.kinds import KINDS, POLICIES
from tests.unets import unet_policy


def loss_of(policy, batch, seed=0):
    torch.manual_seed(seed)
    policy._seed = None
    policy._calls = 0
    policy.train()
    return policy(batch, reduction="none")


@pytest.mark.parametrize("objective", ["ofp", "flow_matching"])
def test_padded_steps_do_not_enter_the_loss(objective):
    policy = small.ofp_policy(objective=objective, monitor_freq=0)
    batch = small.batch(2)
    batch["action_is_pad"] = torch.zeros(2, small.HORIZON, dtype=torch.bool)
    batch["action_is_pad"][0, 5:] = True
    prefix = policy.model.encode(*policy.prepare_observation(batch))
    _, mask, _ = policy.prepare_actions(batch)
    assert mask[0, :5, : small.ACTIONS].all() and not mask[0, 5:].any() and not mask[..., small.ACTIONS :].any()
    # No gradient reaches the velocities there.
    velocities = []
    bound = policy._bind(prefix)

    def record(*args, **kwargs):
        u = bound(*args, **kwargs)
        if u.requires_grad:
            u.retain_grad()
            velocities.append(u)
        return u

    policy._bind = lambda _: record
    policy.train()
    policy(batch)[0].backward()
    gradient = velocities[0].grad
    first = gradient[::2]  # samples of observation 0
    assert first[:, 5:].abs().max() == 0 and gradient[..., small.ACTIONS :].abs().max() == 0
    assert first[:, :5, : small.ACTIONS].abs().min() > 0


@pytest.mark.parametrize("key", [ACTION, small.CAMERAS[0]])
def test_not_finite_batches_are_refused(key):
    policy, batch = small.ofp_policy(), small.batch(2)
    batch[key][1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite values in a batch's actions, or a loss that is not finite"):
        loss_of(policy, batch)


def test_not_finite_actions_reach_no_gradient():
    """On a GPU the error comes a call late: meanwhile the weights must not be spoilt."""
    policy, batch = small.ofp_policy(), small.batch(2)
    batch[ACTION][1, 2, 3] = float("nan")
    policy._log = lambda scalars: {}
    policy.train()
    policy(batch)[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.get_optim_params())


def test_flow_matching_leaves_the_target_time_branch_silent():
    """So its one step is π₀.₅'s whichever sampler is set."""
    policy, batch = small.ofp_policy(objective="flow_matching"), small.batch(2)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    for _ in range(3):
        policy.train()
        policy(batch)[0].backward()
        optimizer.step()
        policy.update()
    noise = torch.randn(2, small.HORIZON, 8)
    answers = []
    for sampler in ("flow_map", "euler"):
        policy.config.sampler = sampler
        answers.append(policy.predict_action_chunk(batch, noise=noise))
    assert torch.equal(*answers)


@pytest.mark.parametrize("make", [*(kind.policy for kind in KINDS.values()), unet_policy], ids=[*KINDS, "ofp_unet"])
def test_a_silent_branch_is_known(make):
    assert make().branch_is_silent and not make(branch=0.2).branch_is_silent


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_the_policy(objective, name):
    """Losses per sample, gradients wherever it trains, and a checked branch: silent without a target time."""
    whole = {"train_expert_only": False, "freeze_vision_encoder": False}
    kind, batch = KINDS[name], small.batch(3)
    policy = kind.policy(objective=objective, branch=0.2, num_noise_draws=2, **whole)
    policy.train()
    loss, logs = policy(batch, reduction="none")
    assert loss.shape == (3,) and all(np.isfinite(value) for value in logs.values())
    loss.mean().backward()
    trained = {name for name, p in policy.model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"action_out_proj.weight", "action_in_proj.weight"} <= trained
    assert any(kind.tower in name for name in trained)
    assert ("target_time_mlp_out.weight" in trained) == OBJECTIVES[objective].uses_target_time
    assert bool(policy.teacher_weights) == OBJECTIVES[objective].needs_teacher
    policy.update()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("objective", [name for name, each in OBJECTIVES.items() if each.differentiates])
def test_objectives_that_differentiate_forward_train_under_autocast(objective, name):
    policy = KINDS[name].policy(objective=objective, branch=0.2)
    policy.train()
    with torch.autocast("cpu"):
        policy(small.batch(2))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.get_optim_params() if p.grad is not None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_network_differentiates_forward_as_its_finite_difference(attention):
    """What MeanFlow needs of it: du/dt along a direction, and gradients of u meanwhile."""
    policy, batch = small.ofp_policy(branch=0.2).double(), small.batch(2)
    policy.model.attention = attention
    network = policy.model
    with torch.no_grad():
        prefix = network.encode(*policy.prepare_observation(batch))
    prefix = type(prefix)(*(tuple(x.double() for x in part) for part in prefix[:2]), prefix.mask)
    x, dx = torch.randn(2, 4, small.HORIZON, 8, dtype=torch.float64)
    t, r, h = torch.rand(4).double() * 0.5 + 0.4, torch.rand(4).double() * 0.3, 2e-5

    def velocity(*args):
        return network(prefix, *args)

    u, derivative = with_derivative(velocity, x, t, r, dx)
    with torch.no_grad():
        difference = (velocity(x + h * dx, t + h, r) - velocity(x - h * dx, t - h, r)) / (2 * h)
    # The network answers in float32, so the step is larger than one would like: π₀.₅'s shortest period is 4e-3.
    torch.testing.assert_close(derivative, difference, atol=0.1, rtol=1e-2)
    assert difference.abs().max() > 10
    torch.testing.assert_close(u, velocity(x, t, r), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(u.sum(), network.action_out_proj.bias)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 4 * small.HORIZON))


def test_forward_asks_the_device_for_nothing_but_its_log(monkeypatch):
    """Fake tensors have no values: whatever reads one fails."""
    monkeypatch.setattr(LaggingScalars, "read", lambda *_: {"finite": True})
    extent = TextExtent((2, small.TEXT), small.TEXT, small.TEXT, 0)
    monkeypatch.setattr(vla_policy, "known_extent", lambda batch, *args: batch.get(TEXT_EXTENT) or text_extent(*args))
    with FakeTensorMode(), pytest.MonkeyPatch.context() as still:
        still.setattr(torch.nn.Module, "to", lambda module, *_: module)
        policy = OFPPolicy(small.ofp_config(monitor_freq=0))
        policy.train()
        policy({**small.batch(2), TEXT_EXTENT: extent})[0].backward()
        with pytest.raises(Exception, match="_local_scalar_dense"):  # from tokens alone it must look
            policy(small.batch(2))


def test_a_texts_extent_is_taken_over_only_from_a_device_and_for_the_same_tokens():
    tokens, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[True, True, False], [True, False, False]])
    found = text_extent(tokens, mask)
    assert found == ((2, 3), 1, 2, 7)
    gaps = torch.tensor([[True, False, True], [False, False, False]])
    assert text_extent(tokens, gaps) == ((2, 3), 0, 3, 7)
    wrong = found._replace(longest=3)
    assert known_extent({TEXT_EXTENT: wrong}, tokens, mask) == found
    away, away_mask = tokens.to("meta"), mask.to("meta")  # reading fails there
    assert known_extent({TEXT_EXTENT: wrong}, away, away_mask) is wrong
    for other in (found._replace(shape=(3, 3)), tuple(found), None):
        with pytest.raises(Exception, match="meta"):
            known_extent({TEXT_EXTENT: other}, away, away_mask)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_scalars_are_read_a_call_late_on_a_gpu():
    scalars = LaggingScalars()
    read = [scalars.read({"a": torch.tensor(float(i), device="cuda")})["a"] for i in range(4)]
    assert read == [0.0, 0.0, 1.0, 2.0] and scalars.last() == {"a": 3.0}


class Late(LaggingScalars):
    """As on a GPU."""

    def read(self, scalars):
        now = {name: float(value.detach()) for name, value in scalars.items()}
        before, self._now = getattr(self, "_now", now), now
        return dict(before)

    def last(self):
        return self._now


def test_a_loss_that_is_not_finite_is_not_saved(tmp_path):
    """On a GPU it is read a call late, and a checkpoint may come in between."""
    policy, broken = small.ofp_policy(), small.batch(2)
    broken[ACTION][1, 2, 3] = float("nan")
    policy.train()
    policy._scalars = Late()
    policy(small.batch(2))
    policy.save_pretrained(tmp_path / "1" / "pretrained_model")
    policy(broken)
    with pytest.raises(ValueError, match="NaN or infinite values in a batch's actions"):
        policy.save_pretrained(tmp_path / "2" / "pretrained_model")
    weights = [path.parent.parent.name for path in tmp_path.rglob("model.safetensors")]
    states = [path.parent.parent.name for path in tmp_path.rglob(FILENAME)]
    assert weights == states == ["1"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Infinite gradients of a finite loss, or another process's, spoil them at the very step that saves."""
    policy, batch = small.ofp_policy(), small.batch(2)
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-4)
    policy.train()
    policy(batch)[0].backward()
    policy.model.action_out_proj.weight.grad[0, 0] = float("inf")
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    with pytest.raises(ValueError, match="left NaN or infinite weights, and they were not saved: lower --policy.optim"):
        policy.save_pretrained(tmp_path / "pretrained_model")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("fault", ["in a batch's actions, or a loss", "left NaN or infinite weights"])
def test_an_adapter_that_is_not_finite_is_not_saved(fault, tmp_path):
    """LeRobot writes it before the configuration."""
    pytest.importorskip("peft")
    policy = small.ofp_policy(pretrained_path="base")
    adapter = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2})
    adapter.train()
    adapter(small.batch(2))
    adapter.save_pretrained(tmp_path / "1")
    adapter.config.save_pretrained(tmp_path / "1")
    if "loss" in fault:
        policy._scalars.last = lambda: {"finite": 0.0}  # as on a GPU, which reads it later
    else:
        next(iter(policy.get_optim_params())).data.view(-1)[0] = float("nan")
    adapter.save_pretrained(tmp_path / "2")
    assert list((tmp_path / "2").glob("*.safetensors"))
    with pytest.raises(ValueError, match=fault):
        adapter.config.save_pretrained(tmp_path / "2")
    assert [path.parent.name for path in tmp_path.rglob("*.safetensors")] == ["1"]


def test_the_teacher_is_an_average_of_the_student_and_what_the_loss_asks():
    policy = small.ofp_policy()
    batch = small.batch(2)
    policy.train()
    policy(batch)
    names = list(policy.teacher_weights)
    expected = {n: policy.model.get_parameter(n).detach().double() for n in names}
    for step in range(3):
        with torch.no_grad():
            for p in policy.get_optim_params():
                p.add_(0.01 * (step + 1))
        policy.update()
        for n in names:  # horizon of 15 steps
            expected[n] += (policy.model.get_parameter(n).detach().double() - expected[n]) / 15
    for n in names:
        torch.testing.assert_close(policy.teacher_weights[n].double(), expected[n], atol=1e-6, rtol=1e-5)
    other = small.ofp_policy()
    other.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for n in names:
            other.model.get_parameter(n).copy_(policy.teacher_weights[n])
        prefix = policy.model.encode(*policy.prepare_observation(batch))
        x, t = torch.randn(2, small.HORIZON, 8), torch.rand(2)
        torch.testing.assert_close(policy._bind_teacher(prefix)(x, t, t * 0.5), other.model(prefix, x, t, t * 0.5))


@pytest.mark.parametrize("objective", ["ofp", "ofp_paper"])
def test_logs_have_the_same_names_at_every_step_and_evaluation_needs_no_teacher(objective):
    paper = OFPPaperSettings(contraction_steps=1)  # guidance begins at step 1
    policy, batch = small.ofp_policy(objective=objective, ofp_paper=paper, monitor_freq=2), small.batch(2)
    policy.eval()
    with torch.no_grad():
        first, _ = policy(batch)
        policy.eval()
        again, _ = policy(batch)
    assert torch.equal(first, again) and policy.teacher_weights is None
    names = []
    for _ in range(3):
        policy.train()
        _, logs = policy(batch)
        assert all(isinstance(v, float) for v in logs.values())
        names.append(sorted(logs))
        policy.update()
    assert names[0] == names[1] == names[2] and "one_ten_gap" in names[0]


@pytest.mark.parametrize("name", KINDS)
def test_save_load_same_actions_bit_for_bit(name, tmp_path):
    policy = KINDS[name].policy(branch=0.2, num_inference_steps=2)
    policy.save_pretrained(tmp_path)
    loaded = POLICIES[name].from_pretrained(tmp_path)
    batch, noise = small.batch(3), torch.randn(3, small.HORIZON, 8)
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), loaded.predict_action_chunk(batch, noise=noise))


def test_one_step_is_noise_minus_velocity():
    policy, batch = small.ofp_policy(branch=0.2), small.batch(2)
    noise = torch.randn(2, small.HORIZON, 8)
    with torch.no_grad():
        prefix = policy.model.encode(*policy.prepare_observation(batch))
        u = policy.model(prefix, noise, torch.ones(2), torch.zeros(2))
    torch.testing.assert_close(
        policy.predict_action_chunk(batch, noise=noise), (noise - u)[..., : small.ACTIONS], atol=0, rtol=0
    )


@pytest.mark.parametrize("name", KINDS)
def test_of_several_samples_the_densest_is_the_answer(name):
    """In the action's own dimensions, each sample drawn alone."""
    policy, observed = KINDS[name].policy(branch=0.2), small.batch(2)
    noise = torch.randn(5, 2, small.HORIZON, 8)
    alone = [policy.predict_action_chunk(observed, noise=each) for each in noise]
    policy.config.test_time_samples = 5
    answer = policy.predict_action_chunk(observed, noise=noise.flatten(0, 1))
    torch.testing.assert_close(
        answer, torch.from_numpy(small.densest_by_hand(torch.stack(alone).numpy())), atol=1e-5, rtol=0
    )


def test_the_noise_temperature_scales_the_noise():
    policy, observed, noise = small.ofp_policy(branch=0.2), small.batch(2), torch.randn(2, small.HORIZON, 8)
    expected = policy.predict_action_chunk(observed, noise=0.25 * noise)
    assert not torch.allclose(expected, policy.predict_action_chunk(observed, noise=noise))
    policy.config.noise_temperature = 0.25
    assert torch.equal(expected, policy.predict_action_chunk(observed, noise=noise))


def test_select_action_executes_n_action_steps_of_each_chunk():
    policy, batch = small.ofp_policy(branch=0.2), small.batch(2)
    noises = [torch.randn(2, small.HORIZON, 8) for _ in range(2)]
    chunks = [policy.predict_action_chunk(batch, noise=noise) for noise in noises]
    policy.reset()
    for chunk, noise in zip(chunks, noises, strict=True):
        for i in range(4):
            assert torch.equal(policy.select_action(batch, noise=noise), chunk[:, i])


def test_more_actions_than_at_first_are_executed_from_the_chunks_start():
    policy, batch = small.ofp_policy(branch=0.2), small.batch(2)
    noise = torch.randn(2, small.HORIZON, 8)
    chunk = policy.predict_action_chunk(batch, noise=noise)
    policy.config.n_action_steps = small.HORIZON
    for i in range(small.HORIZON):
        assert torch.equal(policy.select_action(batch, noise=noise), chunk[:, i])


def test_queued_relative_actions_are_refused():
    """LeRobot's postprocessor would add each one to the newest state, not to the state of its chunk."""
    policy = small.ofp_policy(use_relative_actions=True)
    with pytest.raises(ValueError, match=r"relative.*--policy.n_action_steps=1"):
        policy.select_action(small.batch(1))
    small.ofp_policy(use_relative_actions=True, n_action_steps=1).select_action(small.batch(1))


def test_a_warm_start_without_a_rest_is_told_once(caplog):
    short = small.ofp_policy(warm_start=0.15)
    whole = small.ofp_policy(warm_start=0.15, n_action_steps=small.HORIZON)
    for policy, times in ((short, 0), (whole, 1)):
        caplog.clear()
        for _ in range(2 * small.HORIZON + 1):
            policy.select_action(small.batch(1))
        assert caplog.text.count("warm_start=0.15 has no effect") == times


UNIT = {key: {"q01": torch.zeros(5), "q99": torch.ones(5)} for key in (OBS_STATE, ACTION)}


@pytest.mark.parametrize(
    ("objective", "steps", "told"),
    [("ofp_paper", 15_000, True), ("ofp_paper", 15_001, False), ("ofp", 10, False)],
)
def test_training_tells_of_guidance_that_never_begins(objective, steps, told, caplog, monkeypatch):
    """By default it begins after 15,000 steps."""
    monkeypatch.setattr("sys.argv", ["lerobot-train", f"--steps={steps}"])
    monkeypatch.setattr("ofp_lerobot.policies.asked._lerobot_trains", lambda: True)
    OFPPolicy(small.ofp_config(objective=objective), dataset_stats=UNIT)
    assert ("--policy.ofp_paper.contraction_steps to less" in caplog.text) == told


def test_another_objective_brings_its_way_of_acting(tmp_path):
    """A one-step policy that is trained from a flow-matching one acts in one step, and the other way round."""
    acts = {"flow_matching": ("euler", 10), "ofp": ("flow_map", 1)}
    both = (("flow_matching", "ofp"), ("ofp", "flow_matching"))
    for first, second in both:
        sampler, steps = acts[first]
        small.ofp_config(objective=first, sampler=sampler, num_inference_steps=steps).save_pretrained(tmp_path / first)
        for flags, expected in (
            ([], acts[first]),
            ([f"--objective={second}"], acts[second]),
            ([f"--objective={second}", "--num_inference_steps=4"], (acts[second][0], 4)),
            (["--objective=ofp", "--sampler=euler", "--num_inference_steps=4"], ("euler", 4)),
            (["--objective=ofp", "--sampler=euler"], ("euler", 10 if first == "flow_matching" else 1)),
        ):
            config = PreTrainedConfig.from_pretrained(tmp_path / first, cli_overrides=flags)
            assert (config.sampler, config.num_inference_steps) == expected


@pytest.mark.parametrize(
    ("sampler", "steps", "expected"),
    [("flow_map", 2, ("flow_map", 2)), ("euler", 10, ("flow_map", 1))],  # the second: inherited, or never trained
)
def test_the_same_objective_keeps_its_steps(sampler, steps, expected, tmp_path):
    small.ofp_config(sampler=sampler, num_inference_steps=steps).save_pretrained(tmp_path)
    config = PreTrainedConfig.from_pretrained(tmp_path, cli_overrides=["--objective=ofp", "--device=cpu"])
    assert (config.sampler, config.num_inference_steps) == expected


@pytest.mark.parametrize(
    ("objective", "sampler", "steps", "told"),
    [
        ("ofp", "flow_map", 1, None),
        ("ofp", "euler", 10, "--policy.sampler=flow_map --policy.num_inference_steps=1"),
        ("flow_matching", "euler", 10, None),
        ("flow_matching", "euler", 1, "--policy.num_inference_steps=10"),
        ("drifting", "euler", 1, None),
    ],
)
def test_training_tells_of_acting_otherwise(objective, sampler, steps, told, caplog):
    config = small.ofp_config(objective=objective, sampler=sampler, num_inference_steps=steps)
    OFPPolicy(config)
    assert "will act" not in caplog.text
    OFPPolicy(config, dataset_stats=UNIT)
    assert ("will act" in caplog.text) == (told is not None) and (told or "") in caplog.text


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("objective", [name for name, each in OBJECTIVES.items() if not each.uses_target_time])
def test_an_objective_without_average_velocities_is_sampled_with_euler(objective, name):
    policy = KINDS[name].policy(branch=0.5, objective=objective, num_inference_steps=3)
    batch = small.batch(1)
    assert policy.config.sampler == "euler"
    seen = []
    forward = policy.model.forward
    policy.model.forward = policy._velocity = lambda prefix, x, t, r, *more: (
        seen.append((t, r)) or forward(prefix, x, t, r, *more)
    )
    policy.predict_action_chunk(batch)
    assert len(seen) == 3 and all(torch.equal(t, r) for t, r in seen)
