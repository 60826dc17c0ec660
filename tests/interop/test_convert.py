"""Conversions: the round trip, what is refused, and that nothing half written is left."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import make_pi05_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import load_file, save_file

from ofp_lerobot.compat import released_names
from ofp_lerobot.interop import convert as module
from ofp_lerobot.interop import norm_stats as statistics
from ofp_lerobot.interop import openpi_layout, processors, readme
from ofp_lerobot.interop.command import convert
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from tests import runs, small
from tests.interop.conftest import REAL_NAMES, flags, golden_state, openpi_checkpoint
from tests.interop.golden import cases


@pytest.fixture
def checkpoint(golden, tmp_path):
    return openpi_checkpoint(tmp_path / "openpi", golden_state(golden))


@pytest.fixture
def refusal(capsys):
    """The message with which `ofp-convert` refuses; nothing may be left of the output."""

    def run(*arguments):
        assert convert([str(a) for a in arguments]) == 2
        outputs = [Path(str(a).removeprefix("--output=")) for a in arguments if str(a).startswith("--output=")]
        assert not any(path.exists() or list(path.parent.glob(f".{path.name}.*")) for path in outputs)
        return " ".join(capsys.readouterr().err.split())

    return run


def lerobot(source, target, tokenizer, *more):
    assert convert(["from-openpi", str(source), f"--output={target}", *flags(tokenizer, *more)]) == 0
    return target


# Round trip


@pytest.mark.parametrize("kind", ["pi05", "ofp"])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_round_trip(golden, tokenizer, tmp_path, kind, bfloat16):
    """Weights to the bit with their dtypes, statistics to float32 rounding."""
    state = golden_state(golden, bfloat16=bfloat16)
    source = openpi_checkpoint(tmp_path / "openpi", state, metadata=golden["manifest"]["metadata"])
    there = lerobot(source, tmp_path / "lerobot", tokenizer, f"--type={kind}")
    assert convert(["to-openpi", str(there), f"--output={tmp_path / 'back'}", "--asset-id=robots/tiny"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    for name, w in state.items():
        assert back[name].dtype == w.dtype, name
        assert torch.equal(back[name], w), name
    stats = json.loads((tmp_path / "back/assets/robots/tiny/norm_stats.json").read_text())["norm_stats"]
    for name, size in (("state", cases.STATES), ("actions", cases.ROBOT_ACTIONS)):
        for kind_of, values in cases.NORM_STATS[name].items():
            np.testing.assert_allclose(stats[name][kind_of], values[:size], rtol=3e-7, atol=1e-12)


def test_bfloat16_weights_reach_both_policies_unrounded(golden, tokenizer, tmp_path):
    """LeRobot keeps more in float32 than openpi stores; every stored value must be the one the network holds."""
    small.require_stock()
    state = golden_state(golden, bfloat16=True)
    source = openpi_checkpoint(tmp_path / "openpi", state)
    for kind, policy_class in (("pi05", PI05Policy), ("ofp", OFPPolicy)):
        policy = policy_class.from_pretrained(lerobot(source, tmp_path / kind, tokenizer, f"--type={kind}"))
        loaded = released_names(policy.model.state_dict())
        for name, w in state.items():
            assert torch.equal(loaded[name].float(), w.float()), name
        assert loaded["time_mlp_in.weight"].dtype == loaded["action_in_proj.weight"].dtype == torch.float32


def test_processors_are_lerobots_own(checkpoint, tokenizer, tmp_path, monkeypatch):
    """Without the settings that LeRobot has no step for, to the letter."""
    there = lerobot(checkpoint, tmp_path / "out", tokenizer, "--resize=lerobot")
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi05 import processor_pi05

    original = processor_pi05.TokenizerProcessorStep
    monkeypatch.setattr(
        processor_pi05,
        "TokenizerProcessorStep",
        lambda **settings: original(**{**settings, "tokenizer_name": str(tokenizer)}),
    )
    for pipeline in make_pi05_pre_post_processors(PreTrainedConfig.from_pretrained(there)):
        pipeline.save_pretrained(tmp_path / "stock")
        name = f"{pipeline.name}.json"
        ours, stock = (json.loads((d / name).read_text()) for d in (there, tmp_path / "stock"))
        for step in (*ours["steps"], *stock["steps"]):
            step.pop("state_file", None)
        assert ours == stock


def test_untied(checkpoint, tokenizer, tmp_path):
    """openpi stores one of the tied pair; LeRobot needs both."""
    state = load_file(lerobot(checkpoint, tmp_path / "out", tokenizer) / "model.safetensors")
    head, embedding = f"model.{openpi_layout.HEAD}", f"model.{openpi_layout.EMBEDDING}"
    assert torch.equal(state[head], state[embedding])


def test_export_ties_the_head_to_the_embedding(golden, checkpoint, tokenizer, tmp_path):
    """LeRobot trains the embedding alone, and the two part."""
    there = lerobot(checkpoint, tmp_path / "out", tokenizer)
    state = load_file(there / "model.safetensors")
    trained = state[f"model.{openpi_layout.EMBEDDING}"].add(1)
    save_file({**state, f"model.{openpi_layout.EMBEDDING}": trained}, there / "model.safetensors")
    assert convert(["to-openpi", str(there), f"--output={tmp_path / 'back'}", "--asset-id=a"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back[openpi_layout.HEAD], trained)
    assert openpi_layout.EMBEDDING not in back


def test_ofp_starts_with_a_silent_branch(checkpoint, tokenizer, tmp_path, capsys):
    policy = OFPPolicy.from_pretrained(lerobot(checkpoint, tmp_path / "out", tokenizer, "--type=ofp"))
    t = torch.rand(3)
    assert torch.equal(policy.model.condition(t, t), policy.model.condition(t, t * 0.3))
    # Training takes them over: it must not end in a policy of one step that acts in ten.
    assert (policy.config.num_inference_steps, policy.config.sampler) == (1, "flow_map")
    told = capsys.readouterr().out
    assert "train it first, or give --policy.sampler=euler --policy.num_inference_steps=10" in told
    assert f"--policy.path={tmp_path / 'out'}" in told.splitlines()[-1]


def test_what_openpi_training_writes_keeps_its_branch(golden, tokenizer, tmp_path, refusal):
    """One-step weights trained inside openpi: `ofp` takes them with the branch, `pi05` is refused."""
    branch = {
        f"target_time_mlp_{layer}.{kind}": torch.tensor(cases.weight(f"{layer}{kind}", shape))
        for layer in ("in", "out")
        for kind, shape in (("weight", (128, 128)), ("bias", (128,)))
    }
    source = openpi_checkpoint(tmp_path / "openpi", {**golden_state(golden), **branch})
    policy = OFPPolicy.from_pretrained(lerobot(source, tmp_path / "out", tokenizer, "--type=ofp"))
    for name, w in branch.items():
        assert torch.equal(policy.model.state_dict()[name], w)
    assert (policy.config.num_inference_steps, policy.config.sampler) == (1, "flow_map")
    message = refusal("from-openpi", source, f"--output={tmp_path / 'pi05'}", *flags(tokenizer))
    assert "--type ofp" in message
    del branch["target_time_mlp_in.bias"]
    half = openpi_checkpoint(tmp_path / "half", {**golden_state(golden), **branch})
    message = refusal("from-openpi", half, f"--output={tmp_path / 'half_out'}", *flags(tokenizer, "--type=ofp"))
    assert "1 missing: target_time_mlp_in.bias" in message


# Statistics


def test_statistics_of_a_lerobot_run(tmp_path):
    """LeRobot's formula on its statistics is openpi's on the exported ones, for equal quantiles too."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=5)
    high = low + np.array([1.0, 1e-3, 0.0, 50.0, 0.0])
    stats = {key: {"mean": low, "std": low**2, "q01": low, "q99": high} for key in (OBS_STATE, ACTION)}
    written = statistics.to_openpi(stats)["norm_stats"]["state"]
    x = rng.normal(size=(20, 5))
    width = np.where(high == low, 1e-8, high - low)  # LeRobot's normaliser
    q01, q99 = np.array(written["q01"]), np.array(written["q99"])
    openpis = (x - q01) / (q99 - q01 + 1e-6) * 2 - 1  # openpi's transforms.Normalize
    np.testing.assert_allclose(openpis, (x - low) / width * 2 - 1, rtol=1e-6)


def test_nearly_constant_dimensions_are_told():
    stats = {"action": {"q01": np.array([0.0, 100.0]), "q99": np.array([1.0, 100.000001])}}
    assert statistics.coarse(stats) == ["action[1]"]


def test_padded_statistics_need_the_robots_size(checkpoint, tokenizer, tmp_path, refusal):
    wanted = [f for f in flags(tokenizer) if not f.startswith("--state-size")]
    assert "--state-size" in refusal("from-openpi", checkpoint, f"--output={tmp_path / 'out'}", *wanted)
    wanted = [*wanted, "--state-size=9"]
    assert "have 6 dimensions" in refusal("from-openpi", checkpoint, f"--output={tmp_path / 'out'}", *wanted)


# What is refused


def test_missing_and_unknown_weights(golden, tokenizer, tmp_path, refusal):
    """Where stock code only prints a warning, and goes on."""
    state = golden_state(golden)
    gone = "time_mlp_out.weight"
    source = openpi_checkpoint(tmp_path / "openpi", {k: v for k, v in state.items() if k != gone})
    message = refusal("from-openpi", source, f"--output={tmp_path / 'out'}", *flags(tokenizer))
    assert f"1 missing: {gone}" in message
    source = openpi_checkpoint(tmp_path / "other", {**state, "extra.weight": torch.zeros(1)})
    message = refusal("from-openpi", source, f"--output={tmp_path / 'out'}", *flags(tokenizer))
    assert "1 unknown: extra.weight" in message
    source = openpi_checkpoint(tmp_path / "third", {**state, "time_mlp_out.bias": torch.zeros(3)})
    message = refusal("from-openpi", source, f"--output={tmp_path / 'out'}", *flags(tokenizer))
    assert "time_mlp_out.bias (3,) instead of (128,)" in message


def test_stock_code_goes_on_with_random_weights(golden, checkpoint, tokenizer, tmp_path, capsys):
    """Why ours raises: the same missing weight, loaded by stock code."""
    there = lerobot(checkpoint, tmp_path / "out", tokenizer)
    state = load_file(there / "model.safetensors")
    del state["model.time_mlp_out.weight"]
    save_file(state, there / "model.safetensors")
    policy = PI05Policy.from_pretrained(there)
    assert "Could not load state dict" in capsys.readouterr().out
    expected = golden_state(golden)["time_mlp_out.weight"]
    assert not torch.equal(policy.model.time_mlp_out.weight, expected)
    with pytest.raises(ValueError, match="1 missing"):
        OFPPolicy.from_pretrained(there, config=small.ofp_config(**REAL_NAMES))


@pytest.mark.parametrize("inside", [True, False])
def test_jax_checkpoints_name_the_command(tokenizer, tmp_path, refusal, inside):
    params = tmp_path / "pi05_run" / "params"
    params.mkdir(parents=True)
    (params / "_METADATA").write_text("{}")
    source = params if inside else params.parent
    message = refusal("from-openpi", source, f"--output={tmp_path / 'out'}", *flags(tokenizer))
    assert f"examples/convert_jax_model_to_pytorch.py --checkpoint_dir {params.parent} --config_name" in message
    assert "--precision float32" in message
    assert "strict=False" in message


def test_weights_rounded_by_openpis_converter_are_told(golden, tokenizer, tmp_path, capsys):
    state = {k: w.bfloat16() for k, w in golden_state(golden).items()}
    source = openpi_checkpoint(tmp_path / "openpi", state)
    there = lerobot(source, tmp_path / "out", tokenizer)
    output = capsys.readouterr().out
    assert "weights are bfloat16 that openpi keeps in float32" in output
    assert "rotary      exact" in output  # it came from JAX
    assert json.loads((there / "config.json").read_text())["dtype"] == "float32"


def test_other_wrong_inputs(golden, checkpoint, tokenizer, tmp_path, refusal):
    out = f"--output={tmp_path / 'out'}"
    ask = lambda *more: refusal("from-openpi", checkpoint, out, *flags(tokenizer, *more))  # noqa: E731
    assert "is part of a relative action's name" in ask("--delta-mask=2,-1", "--action-names=arm_x,arm_y,arm")
    assert "--delta-mask covers 5 dimensions" in ask("--delta-mask=4,-1")
    assert "2 names for 3" in ask("--action-names=a,b")
    assert "robots/tiny" in ask("--asset-id=other")
    assert "every camera once" in ask("--camera=base_0_rgb=observation.images.x")
    assert "openpi's cameras are" in ask("--camera=base=observation.images.x")
    assert "has no model.safetensors" in refusal("from-openpi", tmp_path / "none", out, *flags(tokenizer))
    assert "--tokenizer" in refusal("from-openpi", checkpoint, out, *flags(tmp_path / "no_tokenizer"))

    path = checkpoint / "assets/robots/tiny/norm_stats.json"
    good = path.read_text()
    path.write_text(good[:-20])
    assert "damaged" in ask()
    path.write_text(good.replace('"q99"', '"q95"'))
    assert "lacks q99 of state" in ask()
    shutil.rmtree(checkpoint / "assets")
    assert "does not bring it along" in ask()
    (checkpoint / "model.safetensors").write_bytes(b"not a file of weights")
    assert "damaged" in ask()
    openpi_checkpoint(tmp_path / "pi0", {**golden_state(golden), "state_proj.weight": torch.zeros(1)})
    assert "is a π₀ checkpoint" in refusal("from-openpi", tmp_path / "pi0", out, *flags(tokenizer))


def test_a_tokenizer_that_joins_the_newline_is_refused(checkpoint, tokenizer, tmp_path, refusal, monkeypatch):
    """openpi encodes it apart: another prompt, then."""
    original = processors.make_ofp_pre_post_processors

    def joining(*arguments):
        before, after = original(*arguments)
        step = next(step for step in before.steps if hasattr(step, "input_tokenizer"))
        step.input_tokenizer = lambda text, **_: SimpleNamespace(input_ids=[hash(word) for word in text.split(" ")])
        return before, after

    monkeypatch.setattr(processors, "make_ofp_pre_post_processors", joining)
    wanted = flags(tokenizer, state="--no-state-in-prompt")
    assert "newline" in refusal("from-openpi", checkpoint, f"--output={tmp_path / 'out'}", *wanted)


def test_to_openpi_refuses_what_openpi_cannot_say(checkpoint, dataset, tokenizer, tmp_path, refusal):
    out = f"--output={tmp_path / 'out'}"
    trained = runs.ofp_checkpoint(tmp_path / "trained", dataset, tokenizer, **REAL_NAMES)
    assert "ofp-export" in refusal("to-openpi", trained, out, "--asset-id=a")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "ofp-export" in refusal("to-openpi", adapter, out, "--asset-id=a")
    there = lerobot(checkpoint, tmp_path / "lerobot", tokenizer)
    path = there / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert "damaged" in refusal("to-openpi", there, out, "--asset-id=a")
    path.unlink()
    assert "has no model.safetensors" in refusal("to-openpi", there, out, "--asset-id=a")
    path.write_bytes(whole)
    path = there / "config.json"
    good = path.read_text()
    config = json.loads(good)
    config["input_features"] |= {f"observation.images.{i}": {"type": "VISUAL", "shape": [3, 32, 32]} for i in range(2)}
    path.write_text(json.dumps(config))
    assert "takes 3 cameras, this policy has 5" in refusal("to-openpi", there, out, "--asset-id=a")
    path.write_text(json.dumps({**json.loads(good), "max_period": 8.0}))
    assert "0.004 to 4" in refusal("to-openpi", there, out, "--asset-id=a")
    path.write_text(good)
    path = there / "policy_preprocessor.json"
    path.write_text(path.read_text().replace("QUANTILES", "MEAN_STD"))
    assert "normalization_mapping" in refusal("to-openpi", there, out, "--asset-id=a")
    path.unlink()
    assert "policy_preprocessor.json" in refusal("to-openpi", there, out, "--asset-id=a")


# Nothing half written


def test_dry_run_writes_nothing(checkpoint, tokenizer, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert (
        convert(["from-openpi", str(checkpoint), f"--output={tmp_path / 'a/b'}", "--dry-run", *flags(tokenizer)]) == 0
    )
    output = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for fact in ("assets/robots/tiny", "base_0_rgb <- observation.images.base_0_rgb", "with state", "dry run"):
        assert fact in output
    assert readme.RELATIVE not in output
    there = lerobot(checkpoint, tmp_path / "there", tokenizer, "--delta-mask=2,-1")
    assert readme.RELATIVE in capsys.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    assert convert(["to-openpi", str(there), f"--output={tmp_path / 'c'}", "--asset-id=a", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    output = capsys.readouterr().out
    assert readme.OTHER_RESIZING not in output and readme.ROTARY in f"{output}\n"
    for fact in ("action_horizon=8", "discrete_state_input=True", "(True, True, False)", 'asset_id="a"'):
        assert fact in output


def test_lerobots_resizing_is_told(checkpoint, tokenizer, tmp_path, capsys):
    there = lerobot(checkpoint, tmp_path / "there", tokenizer, "--resize=lerobot")
    capsys.readouterr()
    assert convert(["to-openpi", str(there), f"--output={tmp_path / 'c'}", "--asset-id=a", "--dry-run"]) == 0
    assert readme.OTHER_RESIZING in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tokenizer, tmp_path, monkeypatch, error, existing):
    """Neither half a directory nor, with --overwrite, the loss of the old one."""
    target = tmp_path / "out"
    if existing:
        lerobot(checkpoint, target, tokenizer)
        (target / "README.md").write_text("mark")
    before = sorted(tmp_path.rglob("*"))

    def stop(*_):
        raise error

    monkeypatch.setattr(module, "save_config", stop)  # after the weights
    with pytest.raises(error):
        convert(["from-openpi", str(checkpoint), f"--output={target}", "--overwrite", *flags(tokenizer)])
    assert sorted(tmp_path.rglob("*")) == before


def test_killed_in_the_middle(tmp_path):
    """Even SIGKILL leaves no directory of the target's name, only a hidden one beside it."""
    import subprocess
    import sys

    script = (
        "import os, signal\nfrom pathlib import Path\n"
        "from ofp_lerobot.interop.directories import whole_directory\n"
        f"with whole_directory(Path({str(tmp_path / 'out')!r})) as d:\n"
        "    (d / 'model.safetensors').write_bytes(b'0' * 10)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "out").exists()


def test_terminated_in_the_middle(checkpoint, tokenizer, tmp_path, monkeypatch):
    """SIGTERM leaves nothing, and afterwards does what it did before."""
    handler, before = signal.getsignal(signal.SIGTERM), sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(module, "save_config", lambda *_: signal.raise_signal(signal.SIGTERM))  # after the weights
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what fails here must not end the whole run
    try:
        with pytest.raises(SystemExit) as ended:
            convert(["from-openpi", str(checkpoint), f"--output={tmp_path / 'out'}", *flags(tokenizer)])
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ended.value.code == 143
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_unasked(checkpoint, tokenizer, tmp_path, capsys):
    there = lerobot(checkpoint, tmp_path / "out", tokenizer)
    (there / "README.md").touch()
    assert convert(["from-openpi", str(checkpoint), f"--output={there}", *flags(tokenizer)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (there / "README.md").exists()
    lerobot(checkpoint, there, tokenizer, "--overwrite")
    assert not (there / "README.md").exists()
    assert there.stat().st_mode & 0o777 == tmp_path.joinpath("openpi").stat().st_mode & 0o777


def test_overwrite_replaces_only_what_was_written_here(checkpoint, tokenizer, tmp_path, capsys):
    """Never the source, what holds it, or a directory with anything else in it."""
    there = lerobot(checkpoint, tmp_path / "out", tokenizer)
    (there / "train_config.json").touch()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(there)
    dangling.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for target, problem in (
        (checkpoint, "is the checkpoint"),
        (tmp_path / "out" / ".." / "openpi", "is the checkpoint"),
        (tmp_path, "holds it or lies in it"),
        (checkpoint / "assets", "holds it or lies in it"),
        (checkpoint / "new", "holds it or lies in it"),
        (there, "holds train_config.json"),
        (link, "symbolic link"),
        (dangling, "symbolic link"),
    ):
        assert convert(["from-openpi", str(checkpoint), f"--output={target}", "--overwrite", *flags(tokenizer)]) == 2
        message = capsys.readouterr().err
        assert problem in message and "--output" in message
        assert sorted(tmp_path.rglob("*")) == before
    for target in (there, tmp_path):
        assert convert(["to-openpi", str(there), f"--output={target}", "--asset-id=a", "--overwrite"]) == 2
        assert "is the checkpoint" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
