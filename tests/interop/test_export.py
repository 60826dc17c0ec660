"""The folded export, against stock LeRobot's `PI05Policy` loaded from what it writes."""

import json
import logging
import shutil

import pytest
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ofp_lerobot.flow_map.ema import copy_weights
from ofp_lerobot.interop import export as module
from ofp_lerobot.interop import openpi_layout, proof, readme
from ofp_lerobot.interop.command import convert, export
from ofp_lerobot.interop.fold import fold_times
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.training_state import TrainingState, save_training_state, state_path
from tests import runs, small
from tests.interop.conftest import REAL_NAMES

BOUNDS = {1: 1e-6, 2: 1e-5, 4: 1e-5}
# The plain path repeats stock's arithmetic, but takes all cameras in one product: on some processors the library rounds
# that otherwise than one camera's (seen: 0 on one Xeon, 9e-8 on another).
SAME_ARITHMETIC = 3e-7


@pytest.fixture(scope="module", autouse=True)
def _stock():
    small.require_stock()


def with_teacher(pretrained_model):
    """Beside a checkpoint, a moving average that is far from the student."""
    policy = OFPPolicy.from_pretrained(pretrained_model)
    teacher = {name: 1.2 * w + 0.01 for name, w in copy_weights(policy.student_weights()).items()}
    save_training_state(state_path(pretrained_model), TrainingState(teacher, 10, 0))
    return teacher


@pytest.fixture(scope="module")
def trained(dataset, tokenizer, tmp_path_factory):
    """An `ofp` checkpoint with a loud target-time branch, and its moving average."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints" / "000004" / "pretrained_model"
    runs.ofp_checkpoint(directory, dataset, tokenizer, **REAL_NAMES)
    with_teacher(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(dataset, tokenizer, tmp_path_factory):
    """LoRA on a π₀.₅, through lerobot-train."""
    base = tmp_path_factory.mktemp("base")
    policy = small.ofp_policy(tokenizer_name=str(tokenizer), tokenizer_max_length=32, **REAL_NAMES)
    small.stock_policy(policy).save_pretrained(base)
    runs.add_processors(base, dataset, policy.config)
    output = tmp_path_factory.mktemp("lora") / "out"
    runs.lerobot_train(
        *runs.train_flags(dataset, output, steps=3, save_freq=3, **{"peft.method_type": "LORA", "peft.r": 4}),
        *runs.policy_flags(pretrained_path=base, optimizer_lr=0.01, **REAL_NAMES),
    )
    return runs.checkpoint(output, 3)


def run(checkpoint, target, steps, *more):
    return export([str(checkpoint), f"--output={target}", f"--steps={steps}", "--asset-id=a", *more])


def largest(a, b):
    return float((a - b).abs().max() / b.abs().max())


def ours(policy, steps, attention, batch, noise):
    policy.config.num_inference_steps, policy.config.sampler = steps, "flow_map"
    policy.model.attention = attention
    return policy.predict_action_chunk(batch, noise=noise)


def stock(directory, batch, noise, config=None):
    """Stock code at the number of steps its config.json says."""
    return PI05Policy.from_pretrained(directory, config=config).predict_action_chunk(batch, noise=noise)


def teacher_policy(source):
    policy = OFPPolicy.from_pretrained(source)
    parameters = dict(policy.model.named_parameters())
    with torch.no_grad(), safe_open(state_path(source), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            parameters[name].copy_(file.get_tensor(name))
    return policy


@pytest.mark.parametrize("weights", ["student", "teacher"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_stock_code_acts_as_the_policy(trained, tmp_path, steps, weights):
    """On observations the export has not proved itself with. One step is the same arithmetic on the plain path."""
    assert run(trained, tmp_path / "out", steps, f"--weights={weights}", "--layout=lerobot") == 0
    policy = OFPPolicy.from_pretrained(trained) if weights == "student" else teacher_policy(trained)
    batch, noise = small.batch(1, seed=11), torch.randn(1, small.HORIZON, 8)
    answer = stock(tmp_path / "out", batch, noise)
    assert largest(answer, ours(policy, steps, "eager", batch, noise)) <= (
        SAME_ARITHMETIC if steps == 1 else BOUNDS[steps]
    )
    assert largest(answer, ours(policy, steps, "sdpa", batch, noise)) <= BOUNDS[steps]
    other = 4 if steps == 1 else 1  # the branch is loud, so the number of steps matters
    assert largest(answer, ours(policy, other, "eager", batch, noise)) > 1e-2


def test_student_and_average_differ(trained, tmp_path):
    batch, noise = small.batch(1, seed=12), torch.randn(1, small.HORIZON, 8)
    answers = []
    for weights in ("student", "teacher"):
        assert run(trained, tmp_path / weights, 1, f"--weights={weights}", "--layout=lerobot") == 0
        answers.append(stock(tmp_path / weights, batch, noise))
    assert largest(*answers) > 1e-2


@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_adapters_are_merged(adapter, tmp_path, weights):
    from lerobot.rollout.context import _load_pretrained_policy

    config = PreTrainedConfig.from_pretrained(adapter)
    config.pretrained_path = adapter
    policy = _load_pretrained_policy(config).eval()  # as LeRobot acts with it, not merged
    inner = policy.get_base_model()
    if weights == "teacher":
        parameters = dict(inner.model.named_parameters())
        with torch.no_grad(), safe_open(state_path(adapter), "pt") as file:
            for name in file.keys():  # noqa: SIM118
                parameters[name].copy_(file.get_tensor(name))
    batch, noise = small.batch(1, seed=13), torch.randn(1, small.HORIZON, 8)
    for steps in (1, 2):
        assert run(adapter, tmp_path / str(steps), steps, f"--weights={weights}", "--layout=lerobot") == 0
        answer = stock(tmp_path / str(steps), batch, noise)
        assert largest(answer, ours(inner, steps, "eager", batch, noise)) <= BOUNDS[steps]
    assert json.loads((tmp_path / "1/config.json").read_text())["use_peft"] is False


def test_the_command_prints_what_it_proved(trained, tmp_path, capsys):
    assert run(trained, tmp_path / "out", 1, "--layout=both") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "layout" in line]
    assert len(lines) == 8  # two layouts, two implementations of attention, two observations
    for line in lines:
        assert float(line.split()[-2]) <= 1e-6
        if "eager, whole" in line:
            assert float(line.split()[-2]) <= SAME_ARITHMETIC


def test_a_wrong_fold_is_refused(trained, tmp_path, monkeypatch, capsys):
    original = fold_times

    def wrong(network, steps, **settings):
        folded = original(network, steps, **settings)
        return folded._replace(bias=folded.bias + 1e-4)

    monkeypatch.setattr(module, "fold_times", wrong)
    assert run(trained, tmp_path / "out", 1) == 2
    assert "is not this policy" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_weight_that_stock_code_does_not_take_over_is_refused(trained, tmp_path, monkeypatch, capsys):
    """Stock code would answer with a random one."""
    write = module.save_file

    def lose(state, path, metadata=None):
        write({k: v for k, v in state.items() if "action_in_proj.bias" not in k}, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", lose)
    assert run(trained, tmp_path / "out", 1, "--layout=lerobot") == 2
    assert "action_in_proj.bias" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_map_is_the_smallest(steps):
    """Against the explicit minimum-norm solution; the times are those of stock code's samplers, added in float32."""
    network = small.ofp_policy(branch=0.5, **REAL_NAMES).model
    folded = fold_times(network, steps)
    time, dt, times = torch.tensor(1.0), torch.tensor(-1.0 / steps), []
    while time >= -dt / 2:  # openpi's loop
        times.append(time.clone())
        time += dt
    assert len(times) == steps
    assert [float(t) for t in times] == [1.0 + k * (-1.0 / steps) for k in range(steps)]  # LeRobot's
    with torch.no_grad():
        hidden = torch.stack([network.hidden_time(t[None])[0] for t in times])
        c = torch.stack([network.joined_times(t[None], (t + dt)[None])[0] for t in times])
        condition = torch.stack([network.condition(t[None], (t + dt)[None])[0] for t in times])
        answers = torch.nn.functional.silu(hidden @ folded.weight.T + folded.bias)
    torch.testing.assert_close(answers, condition, atol=2e-6, rtol=1e-5)
    if steps == 1:
        assert torch.equal(folded.bias, c[0]) and not folded.weight.any()
        return
    known = torch.cat([hidden, torch.ones(steps, 1)], dim=1).double()
    explicit = known.T @ torch.linalg.inv(known @ known.T) @ c.double()
    torch.testing.assert_close(folded.weight.double(), explicit[:-1].T, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(folded.bias.double(), explicit[-1], atol=1e-5, rtol=1e-3)


def test_layouts(trained, tmp_path):
    """`both` holds what each holds alone; openpi's file has its names, and our note on the rotary frequencies."""
    assert run(trained, tmp_path / "both", 2) == 0
    for layout in ("lerobot", "openpi"):
        assert run(trained, tmp_path / layout, 2, f"--layout={layout}") == 0
        together, alone = tmp_path / "both" / layout, tmp_path / layout
        files = sorted(p.relative_to(alone) for p in alone.rglob("*"))
        assert files == sorted(p.relative_to(together) for p in together.rglob("*"))
        a, b = (load_file(d / "model.safetensors") for d in (alone, together))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    state = load_file(tmp_path / "openpi" / "model.safetensors")
    assert not any(k.startswith("model.") or "target_time" in k for k in state)
    assert openpi_layout.EMBEDDING not in state
    assert not openpi_layout.rounded_rotary(tmp_path / "openpi", state)
    assert (tmp_path / "openpi/assets/a/norm_stats.json").is_file()


def test_other_engines_find_the_embedding_and_tell_checkpoints_apart(trained, tmp_path):
    """What FlashRT reads: `lm_head` as the embedding, and the file's beginning as the checkpoint's name."""
    source = shutil.copytree(trained.parent, tmp_path / "000004") / trained.name
    raw = load_file(source / "model.safetensors")
    head, embedding = (f"model.{name}" for name in (openpi_layout.HEAD, openpi_layout.EMBEDDING))
    raw[head] = raw[head] + 1  # training moves the one and not the other
    save_file(raw, source / "model.safetensors", metadata={"format": "pt"})
    beginnings = set()
    for weights in ("student", "teacher"):
        out = tmp_path / weights
        assert run(source, out, 1, f"--weights={weights}") == 0
        stock, openpi = (load_file(out / layout / "model.safetensors") for layout in ("lerobot", "openpi"))
        assert torch.equal(stock[head], stock[embedding])
        assert torch.equal(openpi[openpi_layout.HEAD].float(), stock[embedding].float())
        for layout in ("lerobot", "openpi"):
            beginnings.add((out / layout / "model.safetensors").read_bytes()[:1024])  # before the list of tensors ends
    assert len(beginnings) == 4


def test_processors_come_along(trained, dataset, tmp_path):
    assert run(trained, tmp_path / "out", 1, "--layout=lerobot") == 0
    raw = {**small.batch(1), "task": ["open the window"]}
    raw = {k: v for k, v in raw.items() if k not in (ACTION,) and not k.startswith("observation.language")}
    seen = []
    for directory in (trained, tmp_path / "out"):
        before, after = make_pre_post_processors(PreTrainedConfig.from_pretrained(directory), str(directory))
        seen.append((before(raw)[OBS_LANGUAGE_TOKENS], after(torch.ones(1, small.ACTIONS))))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    steps = json.loads((tmp_path / "out/policy_preprocessor.json").read_text())["steps"]
    assert not any(step["registry_name"].startswith("ofp") for step in steps)  # loads where only LeRobot is installed
    config = PreTrainedConfig.from_pretrained(tmp_path / "out")
    assert (config.type, config.num_inference_steps, config.tokenizer_max_length) == ("pi05", 1, 32)


@pytest.mark.parametrize("branch", [0.0, 0.5])
def test_objectives_without_a_target_time(dataset, tokenizer, tmp_path, branch):
    """They sample by Euler's rule, r = t, silent branch or not."""
    source = runs.ofp_checkpoint(
        tmp_path / "run", dataset, tokenizer, branch=branch, objective="flow_matching", sampler="euler", **REAL_NAMES
    )
    assert run(source, tmp_path / "out", 2, "--layout=lerobot") == 0
    policy = OFPPolicy.from_pretrained(source)
    batch, noise = small.batch(1, seed=15), torch.randn(1, small.HORIZON, 8)
    policy.config.num_inference_steps, policy.model.attention = 2, "eager"
    answer = stock(tmp_path / "out", batch, noise)
    assert largest(answer, policy.predict_action_chunk(batch, noise=noise)) <= BOUNDS[2]


def test_normalisation_that_openpi_has_not(trained, tmp_path, capsys):
    """Goes to LeRobot, which has it, and is refused for openpi."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        (copy / name).write_text((copy / name).read_text().replace("QUANTILES", "MEAN_STD"))
    assert run(copy, tmp_path / "lerobot", 1, "--layout=lerobot") == 0
    assert "MEAN_STD" in (tmp_path / "lerobot/policy_preprocessor.json").read_text()
    assert run(copy, tmp_path / "both", 1) == 2
    assert "normalization_mapping" in capsys.readouterr().err


def test_rounded_rotary_frequencies(dataset, tokenizer, tmp_path):
    """Trained with them: the export says bfloat16, where stock code rounds them, and proves itself in float32 too."""
    source = runs.ofp_checkpoint(
        tmp_path / "run", dataset, tokenizer, bfloat16_rotary=True, dtype="bfloat16", **REAL_NAMES
    )
    assert run(source, tmp_path / "out", 1) == 0
    written = tmp_path / "out" / "lerobot"
    assert json.loads((written / "config.json").read_text())["dtype"] == "bfloat16"
    assert openpi_layout.rounded_rotary(tmp_path / "out/openpi", {})
    policy = OFPPolicy.from_pretrained(source)
    batch, noise = small.batch(1, seed=14), torch.randn(1, small.HORIZON, 8)
    answer = stock(written, batch, noise).float()
    assert largest(answer, ours(policy, 1, "eager", batch, noise)) < proof.BFLOAT16_TOLERANCE


def test_exact_rotary_frequencies_are_exported_as_float32(dataset, tokenizer, tmp_path):
    source = runs.ofp_checkpoint(tmp_path / "run", dataset, tokenizer, dtype="bfloat16", **REAL_NAMES)
    assert run(source, tmp_path / "out", 1) == 0
    assert json.loads((tmp_path / "out/lerobot/config.json").read_text())["dtype"] == "float32"
    state = load_file(tmp_path / "out/lerobot/model.safetensors")
    layer = "model.paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj.weight"
    assert state[layer].dtype == torch.bfloat16  # as stored: nothing is lost
    assert state["model.time_mlp_out.bias"].dtype == torch.float32


def test_readme_has_the_settings_to_run_with(trained, tmp_path):
    """And a row for each proof, and no path of the machine that made it."""
    assert run(trained, tmp_path / "out", 2, "--weights=teacher") == 0
    for layout, settings in {
        "lerobot": ["--policy.num_inference_steps=2"],
        "openpi": ['sample_kwargs={"num_steps": 2}', "action_horizon=8", 'asset_id="a"'],
    }.items():
        text = (tmp_path / "out" / layout / "README.md").read_text()
        assert all(setting in text for setting in settings)
        assert text.count(f"| {layout} layout") == 4
        assert str(tmp_path) not in text


def test_damaged_files_are_one_message(trained, tmp_path, capsys):
    """For each layout, and nothing is written: a damaged normaliser would be copied."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    normalisers = sorted(copy.glob("policy_*normalizer_processor.safetensors"))
    assert len(normalisers) == 2
    for path in (copy / "config.json", *normalisers):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        for layout in ("lerobot", "both"):
            assert run(copy, tmp_path / "out", 1, f"--layout={layout}") == 2
            message = capsys.readouterr().err
            assert f"{path} is damaged or incomplete" in message and message.count("\n") == 1
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_steps_that_openpi_has_not(trained, tmp_path, capsys, caplog):
    """Unknown ones are refused by name; LeRobot's resizing is told, here and in the README.md."""
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    path = copy / "policy_preprocessor.json"
    good = json.loads(path.read_text())
    crop = {"registry_name": "image_crop_resize_processor", "config": {}}
    path.write_text(json.dumps({**good, "steps": [*good["steps"], crop]}))
    assert run(copy, tmp_path / "out", 1) == 2
    assert "image_crop_resize_processor" in capsys.readouterr().err
    assert run(copy, tmp_path / "lerobot", 1, "--layout=lerobot") == 0
    for resizes in (False, True):
        pillow = {"class": "ofp_lerobot.interop.processor_steps.PillowResizeStep", "config": {"size": 32}}
        path.write_text(json.dumps({**good, "steps": [*good["steps"], *[pillow] * resizes]}))
        caplog.clear()
        assert run(copy, tmp_path / "out", 1, "--layout=openpi", "--overwrite") == 0
        warnings = (caplog.text, (tmp_path / "out/README.md").read_text())
        assert [readme.OTHER_RESIZING in text for text in warnings] == [not resizes] * 2


def test_a_silent_branch_is_told(dataset, tokenizer, tmp_path, caplog):
    for branch in (0.0, 0.5):
        caplog.clear()
        source = runs.ofp_checkpoint(tmp_path / f"run{branch}", dataset, tokenizer, branch=branch, **REAL_NAMES)
        assert run(source, tmp_path / f"out{branch}", 1, "--layout=lerobot") == 0
        assert ("has not learnt average velocities" in caplog.text) == (not branch)


def test_what_does_not_carry_over_is_told(trained, dataset, tokenizer, tmp_path, caplog):
    """And the proof is of full noise, on the plain path."""
    only_ours = {"noise_temperature": 0.5, "warm_start": 0.15, "inference_engine": True, "inference_precision": "fp8"}
    source = runs.ofp_checkpoint(tmp_path / "run", dataset, tokenizer, **only_ours, **REAL_NAMES)
    assert run(source, tmp_path / "out", 1, "--layout=lerobot") == 0
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.partition(" ")[0] for line in told] == ["noise_temperature=0.5", "warm_start=0.15"]
    assert all("does not carry over" in line for line in told)
    caplog.clear()
    assert run(trained, tmp_path / "plain", 1, "--layout=lerobot") == 0
    assert "carry over" not in caplog.text


def test_relative_actions_are_told(trained, tmp_path, caplog):
    """LeRobot adds the actions that wait in the queue to newer states."""
    source = shutil.copytree(trained, tmp_path / "copy")
    for name, step in (("pre", "relative"), ("post", "absolute")):
        path = source / f"policy_{name}processor.json"
        content = json.loads(path.read_text())
        (found,) = (s for s in content["steps"] if s["registry_name"] == f"{step}_actions_processor")
        found["config"]["enabled"] = True
        path.write_text(json.dumps(content))
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_relative_actions": True}))
    for checkpoint, relative in ((source, True), (trained, False)):
        caplog.clear()
        assert run(checkpoint, tmp_path / "out", 1, "--layout=lerobot", "--overwrite") == 0
        page = (tmp_path / "out/README.md").read_text()
        assert [readme.RELATIVE in caplog.text, readme.RELATIVE[1:] in page] == [relative] * 2
        (command,) = (line for line in page.splitlines() if line.startswith("lerobot-eval"))
        assert ("--policy.n_action_steps=1" in command) == relative


@pytest.mark.parametrize("name", ["", ".", "..", "/robot", "a/../b"])
def test_asset_ids_stay_in_their_directory(trained, tmp_path, capsys, name):
    assert export([str(trained), f"--output={tmp_path / 'out'}", "--steps=1", f"--asset-id={name}"]) == 2
    assert f"--asset-id {name!r}" in capsys.readouterr().err
    assert convert(["to-openpi", str(trained), f"--output={tmp_path / 'out'}", f"--asset-id={name}"]) == 2
    assert f"--asset-id {name!r}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_code_for_openpis_server_undoes_its_rounding(trained, tmp_path):
    assert run(trained, tmp_path / "out", 1) == 0
    page = (tmp_path / "out" / "openpi" / "README.md").read_text()
    server = next(code for code in page.split("```python")[1:] if "serve_forever" in code.split("```")[0])
    assert readme.ROTARY in server
    compile(server.split("```")[0], "README.md", "exec")


def test_refusals(trained, dataset, tokenizer, tmp_path, capsys, caplog):
    def refusal(*arguments):
        assert export([str(a) for a in arguments]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    out = f"--output={tmp_path / 'out'}"
    message = refusal(trained, out, "--steps=1")  # this run has no train_config.json
    assert "--asset-id" in message and "--layout lerobot" in message
    small_one = runs.ofp_checkpoint(tmp_path / "tiny", dataset, tokenizer, test_time_samples=4)
    for layout in ("--layout=lerobot", "--layout=both"):  # before it asks for an asset id or warns of anything
        caplog.clear()
        message = refusal(small_one, out, "--steps=1", layout)
        assert message.startswith("ofp-export: ofp-export needs a checkpoint of π₀.₅'s real size")
        assert "no network of this size" in message
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    untrained = runs.ofp_checkpoint(tmp_path / "untrained", dataset, tokenizer, **REAL_NAMES)
    assert "no teacher" in refusal(untrained, out, "--steps=1", "--layout=lerobot", "--weights=teacher")
    policy = small.ofp_policy(tokenizer_name=str(tokenizer), tokenizer_max_length=32, **REAL_NAMES)
    small.stock_policy(policy).save_pretrained(tmp_path / "pi05")
    assert "plain π₀.₅ already" in refusal(tmp_path / "pi05", out, "--steps=1", "--layout=lerobot")
    missing = tmp_path / "nobody"
    assert "is not a directory" in refusal(missing, out, "--steps=1")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    assert "--overwrite" in refusal(trained, f"--output={tmp_path / 'there'}", "--steps=1", "--asset-id=a")
    for target in (trained, trained.parent, trained.parents[2], trained / "new"):
        wanted = [f"--output={target}", "--steps=1", "--asset-id=a", "--overwrite"]
        assert "is the checkpoint" in refusal(trained, *wanted)
        assert "is the checkpoint" in refusal(trained.parent, *wanted)  # the step's directory stands for it
    assert (trained / "model.safetensors").is_file()
    with pytest.raises(SystemExit):
        export([str(trained), out, "--steps=3"])


def test_an_earlier_export_is_replaced(trained, tmp_path):
    for layout in ("both", "openpi", "lerobot", "both"):
        assert run(trained, tmp_path / "out", 1, f"--layout={layout}", "--overwrite") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lerobot", "openpi"]


def test_asset_id_of_the_training_data(adapter, tmp_path):
    assert export([str(adapter), f"--output={tmp_path / 'out'}", "--steps=1", "--layout=openpi"]) == 0
    assert (tmp_path / "out/assets" / runs.REPO / "norm_stats.json").is_file()
