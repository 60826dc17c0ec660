"""What SmolVLA alone has: image tokens, padded cameras, dtypes of the checkpoint, settings that are refused."""

import pytest
import torch
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from safetensors.torch import load_file, save_file

from ofp_lerobot.policies.ofp_smolvla.modeling_ofp_smolvla import OFPSmolVLAPolicy, prepare_images
from ofp_lerobot.policies.vla.prompt import too_long
from tests import small
from tests.kinds import KINDS, released_smolvlm

KIND = KINDS["ofp_smolvla"]


def answers(ours, stock, batch):
    noise = torch.randn(len(batch[OBS_LANGUAGE_TOKENS]), small.HORIZON, 8)
    ours.config.num_inference_steps, ours.config.sampler = 10, "euler"
    return ours.predict_action_chunk(dict(batch), noise=noise), stock.predict_action_chunk(dict(batch), noise=noise)


@pytest.mark.parametrize(
    "changes",
    [
        {"add_image_special_tokens": True},
        {"prefix_length": 40},
        {"attention_mode": "self_attn"},
        {"self_attn_every_n_layers": 3},
        {"empty_cameras": 1},
        {"resize_imgs_with_padding": (64, 64)},
        {"resize_imgs_with_padding": None},
    ],
    ids=str,
)
def test_every_form_of_the_network_is_stock(changes):
    ours = KIND.policy(**changes)
    torch.testing.assert_close(*answers(ours, KIND.stock(ours, **changes), small.batch(2)), atol=1e-5, rtol=1e-5)


def test_an_image_that_a_sample_has_not_is_not_seen():
    ours = KIND.policy()
    batch = {**small.batch(3), f"{small.CAMERAS[1]}_padding_mask": torch.tensor([True, False, True])}
    actions, expected = answers(ours, KIND.stock(ours), batch)
    torch.testing.assert_close(actions, expected, atol=1e-5, rtol=1e-5)
    noise = torch.randn(3, small.HORIZON, 8)
    before = ours.predict_action_chunk(batch, noise=noise)
    batch[small.CAMERAS[1]] = torch.rand_like(batch[small.CAMERAS[1]])
    same = (ours.predict_action_chunk(batch, noise=noise) - before).abs().amax(dim=(1, 2)) < 1e-6
    assert same.tolist() == [False, True, False]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A stock checkpoint over a VLM in bfloat16: then most of its expert is too, and not all."""
    directory = tmp_path_factory.mktemp("released")
    settings = {"vlm_model_name": str(released_smolvlm(directory / "vlm")), "load_vlm_weights": True}
    stock = KIND.stock(KIND.policy(), **settings)
    assert {p.dtype for p in stock.model.vlm_with_expert.lm_expert.parameters()} == {torch.bfloat16, torch.float32}
    stock.save_pretrained(directory / "stock")
    return stock, directory / "stock", settings


def test_the_vlm_keeps_the_dtype_of_the_checkpoint_and_what_trains_is_float32(released):
    stock, directory, settings = released
    ours = OFPSmolVLAPolicy.from_pretrained(directory, config=KIND.config(**settings))
    theirs = dict(stock.named_parameters())
    for name, p in ours.named_parameters():
        assert p.dtype == (torch.bfloat16 if ".vlm." in name else torch.float32), name
        assert name not in theirs or torch.equal(p, theirs[name].to(p.dtype)), name
    actions, expected = answers(ours, stock, small.batch(2))
    assert (actions - expected).norm() / expected.norm() < 1e-2


def test_a_whole_network_that_trains_is_float32(released):
    _, directory, settings = released
    config = KIND.config(**settings, train_expert_only=False)
    ours = OFPSmolVLAPolicy.from_pretrained(directory, config=config).train()
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours(small.batch(2))[0].backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_a_checkpoint_that_turns_the_joints_inside_is_refused(tmp_path):
    stock = KIND.stock(KIND.policy(), adapt_to_pi_aloha=True)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapt_to_pi_aloha"):
        OFPSmolVLAPolicy.from_pretrained(tmp_path, config=KIND.config())


def test_the_states_token_is_encoded_alone_where_the_vlm_is_frozen():
    """The same keys and values, and gradients for the state's layer; the other tokens keep nothing for backward."""
    ours = KIND.policy()
    observation = ours.prepare_observation(small.batch(2))
    with torch.no_grad():
        together = ours.model.encode(*observation)
    alone = ours.model.encode(*observation)
    for a, b in zip((*together.keys, *together.values), (*alone.keys, *alone.values), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    sum(k.sum() for k in alone.keys).backward()
    assert ours.model.state_proj.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("keep", [None, torch.tensor([True, False, True, True])])
def test_a_projected_prefix_gives_the_same_velocities(keep):
    ours = KIND.policy(branch=0.1)
    prefix = ours.model.encode(*ours.prepare_observation(small.batch(2)))
    x, t = torch.randn(4, small.HORIZON, 8), torch.rand(4)
    expected = ours.model(prefix, x, t, t / 2, keep)
    projected = ours.model.project(prefix)
    assert torch.equal(ours.model(projected, x, t, t / 2, keep), expected)
    assert torch.equal(ours.model(projected.head(1), x, t, t / 2, keep), ours.model(prefix.head(1), x, t, t / 2, keep))


def test_an_answer_projects_the_prefix_once_and_training_for_each_network():
    ours = KIND.policy(branch=0.1, objective="ofp", sharpening_noise=0.0, monitor_freq=0)
    rows = []
    layer = ours.model.expert.layers[1]  # every second one attends to the prefix alone
    layer.self_attn.k_proj.register_forward_hook(lambda _m, _i, out: rows.append(out.detach()))
    batch, noise = small.batch(2), torch.randn(2, small.HORIZON, 8)
    ours.config.num_inference_steps, ours.config.sampler = 10, "euler"
    actions = ours.predict_action_chunk(batch, noise=noise)
    assert len(rows) == 1
    prefix = ours.model.encode(*ours.prepare_observation(batch))
    x = noise
    with torch.no_grad():
        for step in range(10):
            t = torch.full((2,), 1 - step / 10)
            x = x - ours.model(prefix, x, t, t) / 10
    assert len(rows) == 11
    torch.testing.assert_close(actions, x[..., : small.ACTIONS], atol=1e-6, rtol=1e-6)

    ours.train()
    ours(batch)[0].backward()
    ours.teacher_weights = {name: w + 0.1 for name, w in ours.teacher_weights.items()}
    rows.clear()
    ours(batch)
    *teacher, student = rows  # two calls of the one, then one of the other
    assert len(teacher) == 2 and torch.equal(*teacher) and not torch.allclose(teacher[0], student)


def test_prompts_are_padded_to_the_longest_and_none_of_them_is_taken_for_a_cut_one():
    ours = KIND.policy()
    batch = {**small.batch(1), "task": ["open " * 20]}
    batch[OBS_LANGUAGE_ATTENTION_MASK] = torch.ones_like(batch[OBS_LANGUAGE_ATTENTION_MASK])
    ours.predict_action_chunk(batch)  # 12 tokens of at most 48: the batch's longest


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_steps": 4}, "num_inference_steps"),
        ({"use_cache": False}, "use_cache"),
        ({"add_image_special_tokens": True, "empty_cameras": 1}, "empty_cameras=1 and add_image_special_tokens=true"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(setting, text):
    with pytest.raises(ValueError, match=text):
        KIND.config(**setting)


def test_a_file_with_statistics_among_its_weights_is_named(tmp_path):
    """The names are those that LeRobot's own migration looks for."""
    stock = KIND.stock(KIND.policy())
    stock.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"normalize_inputs.buffer_observation_state.mean": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match="migrate_policy_normalization --pretrained-path"):
        OFPSmolVLAPolicy.from_pretrained(tmp_path, config=KIND.config())


def test_a_cut_prompt_without_a_state_says_so():
    assert "so its end would be cut" in too_long("open the window", 3, 2)
    assert "so the state at its end would be cut" in too_long("Task: open, State: 1 2;\nAction: ", 9, 2)


def test_an_expert_with_fewer_layers_is_refused():
    with pytest.raises(ValueError, match="--policy.num_expert_layers=-1"):
        KIND.policy(num_expert_layers=2, attention_mode="self_attn")


def test_images_of_different_sizes_need_a_common_one():
    images = [torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 48)]
    with pytest.raises(ValueError, match="--policy.resize_imgs_with_padding"):
        prepare_images(images, None)
    assert prepare_images(images, (64, 32)).shape == (1, 2, 3, 32, 64)
