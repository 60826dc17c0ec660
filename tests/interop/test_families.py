"""`ofp-convert from-<stock>` and `ofp-export` for every family, against LeRobot's own code."""

import json

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

from ofp_lerobot.checkpoints.families import OURS
from ofp_lerobot.checkpoints.reader import load_config, read_policy
from ofp_lerobot.interop.command import convert, export
from ofp_lerobot.interop.fold import fold_length
from tests import runs, small
from tests.interop.conftest import REAL_NAMES
from tests.kinds import KINDS, released_smolvlm

NEW = ("ofp_pi0", "ofp_smolvla")  # of `ofp` more is tested in test_convert.py and test_export.py
BOUNDS = {1: 1e-6, 2: 1e-5, 4: 1e-5}


@pytest.fixture(scope="module", params=NEW)
def name(request):
    if request.param == "ofp_pi0":
        small.require_stock()
    return request.param


@pytest.fixture(scope="module")
def stock(name, dataset, tokenizer, tmp_path_factory):
    return runs.stock_checkpoint(name, tmp_path_factory.mktemp("stock") / "checkpoint", dataset, tokenizer)


@pytest.fixture(scope="module")
def trained(name, dataset, tokenizer, tmp_path_factory):
    """With a loud branch."""
    sizes = REAL_NAMES if name == "ofp_pi0" else {}  # stock code knows no other names
    return runs.vla_checkpoint(name, tmp_path_factory.mktemp("ours") / "checkpoint", dataset, tokenizer, **sizes)


def answer(policy, seed=0, **observed):
    batch, noise = small.batch(2, seed=seed, **observed), torch.randn(2, small.HORIZON, 8)
    return policy.predict_action_chunk(dict(batch), noise=noise), batch, noise


def test_a_start_is_the_stock_policy(name, stock, tmp_path):
    family = OURS[name]
    command = f"from-{family.policy.stock}"
    assert convert([command, str(stock), f"--output={tmp_path / 'start'}"]) == 0
    theirs = family.stock_policy.from_pretrained(stock).eval()
    config = PreTrainedConfig.from_pretrained(
        tmp_path / "start", cli_overrides=["--sampler=euler", "--num_inference_steps=10"]
    )
    ours = family.policy.from_pretrained(tmp_path / "start", config=config)
    actions, batch, noise = answer(ours)
    torch.testing.assert_close(actions, theirs.predict_action_chunk(dict(batch), noise=noise), atol=1e-5, rtol=1e-5)
    before, after = load_file(stock / "model.safetensors"), load_file(tmp_path / "start/model.safetensors")
    assert all(torch.equal(weight, after[key]) for key, weight in before.items())
    assert {key.split(".")[1] for key in after.keys() - before.keys()} == {"target_time_mlp_in", "target_time_mlp_out"}
    steps = json.loads((tmp_path / "start/policy_preprocessor.json").read_text())["steps"]
    assert "ofp_text_extent" in [step.get("registry_name") for step in steps]


def test_pi0s_time_layers_under_the_names_of_pi05s(dataset, tokenizer, tmp_path):
    """LeRobot reads them in files without its `model.`, so ours does wherever it reads a π₀."""
    small.require_stock()
    family, source = OURS["ofp_pi0"], runs.stock_checkpoint("ofp_pi0", tmp_path / "stock", dataset, tokenizer)
    expected, batch, noise = answer(family.stock_policy.from_pretrained(source).eval())
    path = source / "model.safetensors"
    state = {
        name.removeprefix("model.").replace("action_time_mlp", "time_mlp"): w for name, w in load_file(path).items()
    }
    assert {"time_mlp_in.weight", "time_mlp_out.bias"} < state.keys()
    save_file(state, path)
    assert convert(["from-pi0", str(source), f"--output={tmp_path / 'start'}"]) == 0
    sizes = {"paligemma_variant": "gemma_tiny", "action_expert_variant": "gemma_tiny", "vision_variant": "siglip_tiny"}
    euler = {"sampler": "euler", "num_inference_steps": 10}
    for policy in (
        family.stock_policy.from_pretrained(source),
        family.policy.from_pretrained(source, config=KINDS["ofp_pi0"].config(**sizes, **euler)),
        family.policy.from_pretrained(
            tmp_path / "start",
            config=PreTrainedConfig.from_pretrained(
                tmp_path / "start", cli_overrides=[f"--{key}={value}" for key, value in euler.items()]
            ),
        ),
        read_policy(source, load_config(source, "cpu")[0]),
    ):
        actions = policy.eval().predict_action_chunk(dict(batch), noise=noise)
        torch.testing.assert_close(actions, expected, atol=1e-5, rtol=1e-5)
    save_file(state | {"action_time_mlp_in.bias": state["time_mlp_in.bias"] + 1}, path)
    with pytest.raises(
        ValueError, match=r"has model\.action_time_mlp_in\.bias twice, as .*action_time_mlp_in.* and as"
    ):
        family.policy.from_pretrained(source, config=KINDS["ofp_pi0"].config(**sizes))
    save_file({f"model.{name}": w for name, w in state.items()}, path)  # there LeRobot does not, and goes on without
    names = r"4 missing: model\.action_time_mlp_in\.bias.*4 unexpected: model\.time_mlp_in"
    with pytest.raises(ValueError, match=names):
        family.policy.from_pretrained(source, config=KINDS["ofp_pi0"].config(**sizes))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_export_acts_as_the_policy(name, trained, tmp_path, steps):
    """On observations it has not proved itself with, by LeRobot's code at the number of steps its config.json says."""
    family = OURS[name]
    assert export([str(trained), f"--output={tmp_path / 'out'}", f"--steps={steps}"]) == 0
    theirs = family.stock_policy.from_pretrained(tmp_path / "out").eval()
    ours = family.policy.from_pretrained(trained)
    ours.config.num_inference_steps = steps
    actions, batch, noise = answer(ours, seed=5, text=7)
    expected = theirs.predict_action_chunk(dict(batch), noise=noise)
    assert float((actions - expected).abs().max() / expected.abs().max()) <= BOUNDS[steps]
    ours.config.num_inference_steps = 4 if steps == 1 else 1  # the branch is loud, so the number matters
    other, *_ = answer(ours, seed=5, text=7)
    assert float((other - expected).abs().max() / expected.abs().max()) > 1e-2
    page = (tmp_path / "out/README.md").read_text()
    network = {"ofp": "π₀.₅", "ofp_pi0": "π₀", "ofp_smolvla": "SmolVLA"}[name]
    assert f"# {network} in {steps} step" in page and f"(`{name}`)" in page and "exactly" in page


@pytest.mark.parametrize("vlm", ["bfloat16", "float32"])
def test_an_export_of_smolvla_is_read_by_stock_code_and_by_ours(vlm, dataset, tokenizer, tmp_path):
    """Over a VLM in bfloat16, in which stock code builds its expert too; and where only some weights fit bfloat16."""
    kind = KINDS["ofp_smolvla"]
    settings = {"vlm_model_name": str(released_smolvlm(tmp_path / "vlm"))} if vlm == "bfloat16" else {}
    policy = kind.policy(branch=0.5, push_to_hub=False, **settings)
    with torch.no_grad():
        for name, w in policy.named_parameters():
            if ".vlm." in name and (vlm == "bfloat16" or kind.tower in name):
                w.copy_(w.bfloat16())
    policy.save_pretrained(tmp_path / "ours")
    runs.add_processors(tmp_path / "ours", dataset, policy.config)
    out = tmp_path / "out"
    assert export([str(tmp_path / "ours"), f"--output={out}", "--steps=1"]) == 0
    state = load_file(out / "model.safetensors")
    expected = {name: torch.bfloat16 if vlm == "bfloat16" and ".vlm." in name else torch.float32 for name in state}
    assert {name: w.dtype for name, w in state.items()} == expected
    stock = OURS["ofp_smolvla"].stock_policy.from_pretrained(out).eval().float()
    stock.load_state_dict(state, strict=False)
    actions, batch, noise = answer(policy.float())
    theirs = stock.predict_action_chunk(dict(batch), noise=noise)
    assert float((actions - theirs).abs().max() / theirs.abs().max()) <= BOUNDS[1]
    for as_ofp in (False, True):
        config, _ = load_config(out, "cpu", as_ofp=as_ofp, num_inference_steps=1, sampler="euler" if as_ofp else None)
        read = read_policy(out, config).eval().predict_action_chunk(dict(batch), noise=noise)
        assert float((read - theirs).abs().max() / theirs.abs().max()) <= (5e-2 if vlm == "bfloat16" else 1e-5)


def test_a_wrong_fold_is_refused(trained, tmp_path, monkeypatch, capsys):
    from ofp_lerobot.interop import export as module

    monkeypatch.setattr(module, "fold_length", lambda *args, **kwargs: fold_length(*args, **kwargs) + 1e-3)
    assert export([str(trained), f"--output={tmp_path / 'out'}", "--steps=1"]) == 2
    assert "is not this policy" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_is_refused(name, stock, trained, tmp_path, capsys):
    family, output = OURS[name], f"--output={tmp_path / 'out'}"
    for run, arguments, text in (
        (export, [str(stock), "--steps=1"], "is a plain"),
        (export, [str(trained), "--steps=1", "--layout=openpi"], "give --layout lerobot"),
        (convert, [f"from-{family.policy.stock}", str(trained)], "already: train it with"),
        (convert, ["from-pi05", str(stock)], "are not understood"),
    ):
        assert run([*arguments, output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line


def test_the_kinds_are_the_families():
    assert KINDS.keys() == OURS.keys()
