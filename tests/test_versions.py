"""What differs between LeRobot's versions: each works or is refused by name, whichever version runs the tests."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from lerobot.configs import PreTrainedConfig
from lerobot.policies.rtc.configuration_rtc import RTCConfig
from lerobot.utils.constants import OBS_STATE
from safetensors.torch import load_file, save_file

from ofp_lerobot import compat
from ofp_lerobot.checkpoints.reader import load_config, load_processors
from ofp_lerobot.errors import UserError
from ofp_lerobot.interop.directories import refuse_existing
from ofp_lerobot.interop.processors import read_processors
from ofp_lerobot.policies import asked
from ofp_lerobot.policies.ofp.configuration_ofp import OFPConfig
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.ofp_unet.configuration_ofp_unet import OFPUnetConfig
from ofp_lerobot.policies.ofp_unet.modeling_ofp_unet import OFPUnetPolicy
from ofp_lerobot.policies.training_state import FILENAME
from ofp_lerobot.policies.vla import weights
from tests import runs, small
from tests.kinds import KINDS

UNET = {"horizon": small.HORIZON, "n_action_steps": 4, "down_dims": (8, 16), "kernel_size": 3}
PREPROCESSOR = "policy_preprocessor.json"
CONFIG = "config.json"


@pytest.fixture(scope="module")
def saved(dataset, tokenizer, tmp_path_factory):
    return runs.ofp_checkpoint(tmp_path_factory.mktemp("saved"), dataset, tokenizer)


def edited(directory, name, edit):
    content = json.loads((directory / name).read_text())
    edit(content)
    (directory / name).write_text(json.dumps(content))


def as_saved_by_0_6_1(saved, directory, tokenizer):
    """As LeRobot 0.6.1 and this package's first version write it, whichever is installed."""
    shutil.copytree(saved, directory)
    shutil.rmtree(directory / "tokenizer", ignore_errors=True)

    def edit(content):
        for step in content["steps"]:
            step.pop("artifacts", None)
            if step["registry_name"] == "tokenizer_processor":
                step["config"]["tokenizer_name"] = str(tokenizer)

    def edit_config(content):
        for name in (*compat.LaterSettings.__dataclass_fields__, "lerobot_version"):
            content.pop(name)

    edited(directory, PREPROCESSOR, edit)
    edited(directory, CONFIG, edit_config)
    return directory


def as_saved_by_0_6_2(saved, directory, tokenizer):
    """As LeRobot's main of 2026-08-23 writes it, whichever is installed."""
    shutil.copytree(saved, directory)
    shutil.copytree(tokenizer, directory / "tokenizer", dirs_exist_ok=True)

    def edit(content):
        for step in content["steps"]:
            if step["registry_name"] == "tokenizer_processor":
                step["config"]["tokenizer_name"] = "tokenizer"
                step["artifacts"] = {"tokenizer_name": "tokenizer"}

    edited(directory, PREPROCESSOR, edit)
    edited(directory, CONFIG, lambda content: content.update(lerobot_version="0.6.2"))
    return directory


def answer(policy):
    noise = torch.full((2, small.HORIZON, 8), 0.5)
    return policy.predict_action_chunk(small.batch(2), noise=noise)


# Checkpoints of other versions


def test_checkpoints_of_0_6_1_load(saved, tokenizer, tmp_path):
    old = as_saved_by_0_6_1(saved, tmp_path / "old", tokenizer)
    policy = OFPPolicy.from_pretrained(old)
    assert torch.equal(answer(policy), answer(OFPPolicy.from_pretrained(saved)))
    load_processors(old, load_config(old, device="cpu", as_ofp=True)[0], None)


def test_checkpoints_of_0_6_2_load_or_say_who_saved_them(saved, tokenizer, tmp_path):
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)
    config, _ = load_config(new, device="cpu", as_ofp=True)
    if compat.UNTIL_0_6_1:
        with pytest.raises(ValueError, match=r"saved by LeRobot 0\.6\.2 or later.*install lerobot>=0\.7"):
            OFPPolicy.from_pretrained(new)
        with pytest.raises(UserError, match=r"saved by LeRobot 0\.6\.2 or later"):
            load_processors(new, config, None)
    else:
        assert torch.equal(answer(OFPPolicy.from_pretrained(new)), answer(OFPPolicy.from_pretrained(saved)))
        load_processors(new, config, None)


def test_the_way_out_that_the_refusal_names(saved, tokenizer, tmp_path):
    """The tokenizer's own path, and no artifacts."""
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)

    def edit(content):
        for step in content["steps"]:
            if step.pop("artifacts", None):
                step["config"]["tokenizer_name"] = str(new / "tokenizer")

    edited(new, PREPROCESSOR, edit)
    config = PreTrainedConfig.from_pretrained(new)
    config.tokenizer_name = str(new / "tokenizer")
    OFPPolicy.from_pretrained(new, config=config)
    load_processors(new, load_config(new, device="cpu", as_ofp=True)[0], None)


@pytest.mark.parametrize("by", ["LeRobot", "us"])
def test_a_setting_of_a_later_version_is_refused_with_its_version(saved, tmp_path, by):
    later = shutil.copytree(saved, tmp_path / "later")
    edited(later, CONFIG, lambda content: content.update(lerobot_version="0.9.0", telepathy=True))
    kind, read = (ValueError, PreTrainedConfig.from_pretrained) if by == "LeRobot" else (UserError, load_config)
    with pytest.raises(kind, match=rf"saved by LeRobot 0\.9\.0, this is {compat.LEROBOT}.*telepathy"):
        read(later, **({} if by == "LeRobot" else {"device": "cpu"}))


def test_a_run_of_a_later_version_is_refused_with_its_version(tmp_path, capsys):
    """As `lerobot-train --config_path=… --resume=true` says it; LeRobot alone names the field only."""
    policy = {"type": "ofp", "lerobot_version": "0.9.0"}
    config = tmp_path / "train_config.json"
    config.write_text(json.dumps({"dataset": {"telepathy": True}, "policy": policy}))
    with pytest.raises(SystemExit, match="1"):
        runs.lerobot_train(f"--config_path={config}", "--resume=true")
    assert re.search(rf"telepathy.*\(saved by LeRobot 0\.9\.0, this is {compat.LEROBOT}\)", capsys.readouterr().err)


def test_a_checkpoint_says_which_version_saved_it(saved):
    assert json.loads((saved / CONFIG).read_text())["lerobot_version"] == compat.LEROBOT


# Weights


def test_the_vision_tower_is_read_in_both_spellings_and_saved_as_released(saved, tmp_path):
    state = load_file(saved / "model.safetensors")
    level = "vision_tower.vision_model."
    assert any(level in name for name in state)
    assert not any("vision_tower." in name and level not in name for name in state)
    other = shutil.copytree(saved, tmp_path / "other")
    save_file({name.replace(level, "vision_tower."): w for name, w in state.items()}, other / "model.safetensors")
    assert torch.equal(answer(OFPPolicy.from_pretrained(other)), answer(OFPPolicy.from_pretrained(saved)))


def test_lerobots_own_pi05_is_compared_with_where_ci_runs():
    """Tests skip where it cannot be, which must not hide that nothing is compared at all."""
    if compat.UNTIL_0_6_1:
        assert not small.stock_fault()


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_visual_memory", True), ("use_proprioceptive_memory", True), ("rtc_training_max_delay", 2)],
)
def test_settings_of_pi05_that_would_be_ignored(name, value):
    with pytest.raises(ValueError, match=f"{name} is not supported by policy type 'ofp': set --policy.{name}="):
        small.ofp_config(**{name: value})


def test_trained_real_time_chunking():
    config = SimpleNamespace(type="ofp", rtc_config=SimpleNamespace(mode="trained"), **vars(compat.LaterSettings()))
    with pytest.raises(ValueError, match=r"rtc_config\.mode=trained.*set rtc_config\.mode=guided"):
        compat.refuse_foreign_settings(config)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_as_text_or_as_torchs(dtype):
    policy = small.ofp_policy(dtype=dtype)
    assert policy.config.precision == "bfloat16"
    assert policy.model.compute_dtype == torch.bfloat16
    assert policy.model.expert.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_dtypes_that_are_refused():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, got 'float16'"):
        small.ofp_config(dtype=torch.float16)
    for kind in (None, torch.float32, "float32"):
        assert compat.precision(SimpleNamespace(dtype=kind)) == "float32"
    config = OFPUnetConfig(device="cpu")
    config.dtype = torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be one of float32, got 'bfloat16'"):
        config.__post_init__()


def test_post_init_keeps_what_pi05_keeps_in_float32():
    """LeRobot 0.7 calls it after construction, to cast all that a policy does not name."""
    policy = small.ofp_policy(dtype=torch.bfloat16)
    before = {name: t.dtype for name, t in (*policy.named_parameters(), *policy.named_buffers())}
    policy.post_init()
    assert before == {name: t.dtype for name, t in (*policy.named_parameters(), *policy.named_buffers())}
    kept = [name for name, dtype in before.items() if dtype == torch.float32]
    assert any("vision_model.embeddings" in name for name in kept)
    assert any("rotary" in name for name in kept)
    assert all(dtype == torch.float32 for name, dtype in before.items() if "layernorm" in name)


# Processors


def test_a_tokenizer_in_the_checkpoint_is_compared_by_its_origin(saved, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "UNTIL_0_6_1", False)
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)
    weights.check_processors(small.ofp_config(tokenizer_name=str(tokenizer)), weights.read_config(new), new)
    with pytest.raises(ValueError, match="tokenizer_name=elsewhere has no effect"):
        weights.check_processors(small.ofp_config(tokenizer_name="elsewhere"), weights.read_config(new), new)
    edited(new, CONFIG, lambda content: content.update(tokenizer_name=None))  # as a `pi05` checkpoint, which knows none
    with pytest.raises(ValueError, match=r"tokenizer_name=elsewhere has no effect.*tokenizer_name='tokenizer'"):
        weights.check_processors(small.ofp_config(tokenizer_name="elsewhere"), weights.read_config(new), new)


def test_a_tokenizer_in_the_checkpoint_comes_along_in_exports(saved, tokenizer, tmp_path):
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)
    (tmp_path / "export").mkdir()
    read_processors(new, small.ACTIONS).write(tmp_path / "export")
    assert {path.name for path in (tmp_path / "export" / "tokenizer").iterdir()} == {
        path.name for path in (new / "tokenizer").iterdir()
    }
    (step,) = [
        step
        for step in json.loads((tmp_path / "export" / PREPROCESSOR).read_text())["steps"]
        if step["registry_name"] == "tokenizer_processor"
    ]
    assert step["artifacts"] == {"tokenizer_name": "tokenizer"}


def test_a_missing_tokenizer_is_one_message(saved, tokenizer, tmp_path):
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)
    shutil.rmtree(new / "tokenizer")
    with pytest.raises(UserError, match="has no tokenizer"):
        read_processors(new, small.ACTIONS)


def test_overwrite_knows_the_tokenizer_of_a_checkpoint(saved, tokenizer, tmp_path):
    new = as_saved_by_0_6_2(saved, tmp_path / "new", tokenizer)
    refuse_existing(new, overwrite=True)
    (new / "tokenizer" / "mine").mkdir()
    (new / "tokenizer" / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"holds tokenizer/mine/notes\.txt"):
        refuse_existing(new, overwrite=True)


# Model cards


@pytest.mark.parametrize(("kind", "network"), [("ofp", "π₀.₅"), ("ofp_pi0", "π₀"), ("ofp_smolvla", "SmolVLA")])
def test_our_cards_say_what_lerobot_does_not_know_and_others_stay(monkeypatch, kind, network):
    monkeypatch.setattr(ModelCard, "validate", lambda self: None)  # asks the Hub
    policy = KINDS[kind].policy(repo_id="me/policy")
    if compat.UNTIL_0_6_1:
        card = policy.generate_model_card("data", kind, "apache-2.0", None)
    else:
        from lerobot.common import train_utils

        card = train_utils.generate_model_card(policy.config)
        other = train_utils.generate_model_card(OFPUnetConfig(device="cpu", **small.features()))
        assert "One-step π₀.₅" not in other.text
    assert f"## One-step {network}\n" in card.text


# Acting


def leftover(rows=5):
    return torch.randn(1, rows, small.ACTIONS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padding", ["zeros", "repetition"])
def test_the_padding_of_leftovers_is_taken_off(padding):
    rest = leftover()
    pad = torch.zeros(1, 3, small.ACTIONS) if padding == "zeros" else rest[:, -1:].expand(1, 3, small.ACTIONS)
    assert torch.equal(compat.without_padding(torch.cat([rest, pad], dim=1)), rest)


def test_leftovers_without_padding_stay():
    rest = leftover()
    rest[:, 1] = rest[:, 0]  # a pause inside
    assert torch.equal(compat.without_padding(rest), rest)
    assert torch.equal(compat.without_padding(rest[:, :1]), rest[:, :1])
    assert compat.without_padding(torch.zeros(1, 4, small.ACTIONS)).shape == (1, 0, small.ACTIONS)
    assert compat.without_padding(torch.zeros(1, 0, small.ACTIONS)).shape == (1, 0, small.ACTIONS)


@pytest.mark.parametrize("padding", ["zeros", "repetition"])
def test_real_time_chunking_keeps_no_padding(padding):
    policy = small.ofp_policy()
    policy.config.rtc_config = RTCConfig(enabled=True, execution_horizon=8)
    policy.init_rtc_processor()
    rest = leftover(3)[0]
    pad = torch.zeros(5, small.ACTIONS) if padding == "zeros" else rest[-1:].expand(5, -1)
    batch, noise = small.batch(1), torch.full((1, small.HORIZON, 8), 0.5)
    free = policy.predict_action_chunk(batch, noise=noise)
    kept = policy.predict_action_chunk(
        batch, noise=noise, inference_delay=2, prev_chunk_left_over=torch.cat([rest, pad])
    )
    torch.testing.assert_close(kept[0, :2], rest[:2])
    torch.testing.assert_close(kept[:, 3:], free[:, 3:])


def test_dropped_actions_are_planned_anew():
    policy, batch = small.ofp_policy(warm_start=0.5), small.batch(1)
    policy.select_action(batch)
    policy.drop_queued_actions()
    chunk = policy.predict_action_chunk(small.batch(1, seed=9), noise=torch.ones(1, small.HORIZON, 8))
    fresh = policy.select_action(small.batch(1, seed=9), noise=torch.ones(1, small.HORIZON, 8))
    assert torch.equal(fresh, chunk[:, 0])


@pytest.mark.parametrize("kind", ["ofp", "ofp_unet"])
def test_lerobots_own_declaration_for_remote_serving_is_ours(kind):
    """What LeRobot 0.7's policy server asks of a policy that overrides nothing (`chunk_inference_spec`).

    One observation, whole finite chunks of `chunk_size` without gradients, `n_action_steps` of which are played, and a
    queue under a name that LeRobot knows.
    """
    if kind == "ofp":
        policy, batch = small.ofp_policy(), small.batch(1)
    else:
        policy = OFPUnetPolicy(OFPUnetConfig(device="cpu", **UNET, **small.features(cameras=()))).eval()
        batch = {OBS_STATE: torch.rand(1, small.STATES)}
    config = policy.config
    assert config.n_obs_steps == 1
    for sampled in ("observation_delta_indices", "image_observation_delta_indices", "state_observation_delta_indices"):
        assert getattr(config, sampled, None) in (None, [0])
    assert policy.supports_rtc() == (kind == "ofp")
    with torch.inference_mode():
        chunk = policy.predict_action_chunk(batch)
    assert chunk.shape == (1, small.HORIZON, small.ACTIONS) and torch.isfinite(chunk).all()
    policy.select_action(batch)
    assert len(policy._action_queue) == 3
    if hasattr(policy, "count_queued_actions"):
        assert policy.count_queued_actions() == 3
    policy.drop_queued_actions()
    assert not policy._action_queue
    if hasattr(policy, "chunk_inference_spec"):
        spec = policy.chunk_inference_spec()
        assert (spec.prediction_steps, spec.execution_steps) == (small.HORIZON, 4)
        assert [mode.value for mode in spec.modes] == (["chunk", "rtc_guided"] if kind == "ofp" else ["chunk"])


# Training


def test_a_policy_that_is_built_before_its_weights_come_resumes_teacher_and_step(saved, tmp_path, monkeypatch):
    """As LeRobot does where a checkpoint's weights are sharded: `from_pretrained` is not called."""
    pretrained = tmp_path / "000002" / "pretrained_model"
    shutil.copytree(saved, pretrained)
    policy = OFPPolicy.from_pretrained(pretrained).train()
    policy.forward(small.batch(2))
    policy.update()
    policy._save_training_state(pretrained)
    assert (pretrained.parent / "training_state" / FILENAME).is_file()
    flags = [f"--config_path={pretrained / 'train_config.json'}", "--resume=true"]
    monkeypatch.setattr("sys.argv", ["lerobot-train", *flags])
    monkeypatch.setattr(asked, "_lerobot_trains", lambda: True)
    (pretrained / "train_config.json").write_text("{}")
    config = PreTrainedConfig.from_pretrained(pretrained)
    config.pretrained_path = pretrained
    deferred = OFPPolicy(config).train()
    deferred.load_state_dict(policy.state_dict())
    deferred.forward(small.batch(2))
    assert deferred._step == 1
    for name, weight in policy.teacher_weights.items():
        assert torch.equal(deferred.teacher_weights[name], weight), name


def test_gradient_accumulation_counts_updates_and_draws_anew_for_each_micro_batch():
    policy, batch = small.ofp_policy().train(), small.batch(2)
    losses = [policy.forward(batch)[0].item() for _ in range(3)]
    policy.update()
    assert len(set(losses)) == 3
    assert policy._step == 1
    again = small.ofp_policy().train()
    again.load_state_dict(policy.state_dict())
    assert [again.forward(batch)[0].item() for _ in range(3)] == losses


def test_lora_alone_still_checks_the_base_checkpoints_processors(saved, tokenizer):
    """`--policy.use_peft=true` without `--peft.*` starts an adapter on pretrained_path since LeRobot 0.7."""
    config = small.ofp_config(use_peft=True, tokenizer_name="elsewhere")
    config.pretrained_path = saved
    with pytest.raises(ValueError, match="tokenizer_name=elsewhere has no effect"):
        OFPPolicy.from_pretrained(saved, config=config)
    config.tokenizer_name = str(tokenizer)
    peft = OFPPolicy.from_pretrained(saved, config=config).wrap_with_peft()
    trained = {name for name, p in peft.named_parameters() if p.requires_grad}
    assert any(".lora_A." in name for name in trained)
    assert any("target_time_mlp_out.modules_to_save" in name for name in trained)


def test_settings_are_those_that_lerobot_reads_back(tmp_path):
    config = small.ofp_config(dtype="bfloat16", warm_start=0.15)
    config._save_pretrained(tmp_path)
    read = PreTrainedConfig.from_pretrained(tmp_path)
    assert isinstance(read, OFPConfig)
    assert (read.precision, read.warm_start) == ("bfloat16", 0.15)
