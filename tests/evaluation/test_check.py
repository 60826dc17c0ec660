"""`ofp-check` against LeRobot's own calls, one observation and one noise at a time."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.policies.factory import make_pre_post_processors
from lerobot.utils.collate import lerobot_collate_fn
from safetensors.torch import load_file, save_file

from ofp_lerobot.errors import UserError
from ofp_lerobot.evaluation.offline import command, history, inputs, main, measure, report, verdict
from ofp_lerobot.flow_map.ema import copy_weights
from ofp_lerobot.inference.policies import ServedPolicy, load_policy
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.training_state import TrainingState, save_training_state, state_path
from ofp_lerobot.policies.vla.weights import NEW_PARAMETERS
from tests import runs, small

FRAMES, DRAWS, FRACTION = 5, 3, 0.3
EPISODES = (1, 2)
SAMPLINGS = {"one": (1, "flow_map"), "two": (2, "flow_map"), "ten": (10, "euler")}


def save_checkpoint(directory, dataset, tokenizer, **changes):
    """A policy with its processors, as lerobot-train leaves them; the target-time branch has a say."""
    torch.manual_seed(3)
    names = [f"j{i}.pos" for i in range(4)] + ["gripper.pos"]
    tokens = {"tokenizer_name": str(tokenizer), "tokenizer_max_length": 32, "action_feature_names": names}
    policy = small.ofp_policy(branch=0.5, **tokens, **changes)
    stats = LeRobotDatasetMetadata(runs.REPO, dataset).stats
    processors = make_pre_post_processors(policy.config, dataset_stats=stats)
    for part in (policy, *processors):
        part.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("check") / "run" / "checkpoints" / "000010" / "pretrained_model"


@pytest.fixture(scope="module")
def saved(directory, dataset, tokenizer):
    return save_checkpoint(directory, dataset, tokenizer)


@pytest.fixture
def copied(saved, tmp_path):
    """A checkpoint to spoil."""
    return shutil.copytree(saved, tmp_path / "copy" / "pretrained_model")


def check(checkpoint, dataset, out, *flags, exit_code=0):
    """Runs the command; its JSON."""
    settings = {
        "dataset": runs.REPO,
        "root": dataset,
        "episodes": "1-2",
        "frames": FRAMES,
        "noises": DRAWS,
        "batch-size": 2,
        "latency-calls": 0,
        "warm-start": FRACTION,
        "device": "cpu",
        "json": out / "out.json",
        "plot": out / "out.png",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    assert main([str(checkpoint), *options, *map(str, flags)]) == exit_code
    return json.loads((out / "out.json").read_text()) if exit_code == 0 else None


def reference(checkpoint, dataset):
    """Everything from `predict_action_chunk`, one call per frame and noise, and arithmetic written out."""
    policy = OFPPolicy.from_pretrained(checkpoint)
    config = policy.config
    pre, post = make_pre_post_processors(config, str(checkpoint))
    times = {"action": [i / 10 for i in range(config.chunk_size)]}
    data = LeRobotDataset(runs.REPO, dataset, episodes=list(EPISODES), delta_timestamps=times)
    chosen = sorted({round(x) for x in np.linspace(0, len(data) - 1, FRAMES)})
    shape, executed = (config.chunk_size, config.max_action_dim), config.n_action_steps

    def predict(position, stream, variant, rests=None):
        item = data[position]
        raw, pad = item["action"].numpy(), item["action_is_pad"].numpy()
        batch = pre(lerobot_collate_fn([item]))
        noise = measure.draw_noise((DRAWS, *shape), 0, stream, int(item["index"]))
        config.num_inference_steps, config.sampler = SAMPLINGS[variant]
        config.warm_start = 0.0 if rests is None else FRACTION
        chunks, real = [], []
        for draw in range(DRAWS):
            rest = None if rests is None else torch.from_numpy(rests[draw][None])
            chunk = policy.predict_action_chunk(batch, noise=noise[draw : draw + 1], prev_chunk_left_over=rest)
            chunks.append(chunk[0].numpy())
            real.append(post(chunk)[0].numpy())
        return SimpleNamespace(
            target=batch["action"][0].numpy(),
            steps=np.flatnonzero(~pad),
            raw=raw,
            chunks=np.stack(chunks),
            real=np.stack(real),
            episode=int(item["episode_index"]),
        )

    now = {variant: [predict(p, measure.NOW, variant) for p in chosen] for variant in SAMPLINGS}
    pairs = [
        (i, p + executed)
        for i, p in enumerate(chosen)
        if p + executed < len(data) and int(data[p + executed]["episode_index"]) == now["one"][i].episode
    ]
    later = {variant: [predict(p, measure.NEXT, variant) for _, p in pairs] for variant in SAMPLINGS}
    if executed < config.chunk_size and not config.use_relative_actions:
        for variant in ("one", "two"):
            later[f"{variant}_warm"] = [
                predict(p, measure.NEXT, variant, now[variant][i].chunks[:, executed:]) for i, p in pairs
            ]
    scale = (post(torch.ones(1, 1, small.ACTIONS)) - post(torch.zeros(1, 1, small.ACTIONS))).numpy()[0, 0]
    return SimpleNamespace(config=config, now=now, later=later, pairs=pairs, scale=scale)


def rms(squares):
    return np.sqrt(np.mean(squares))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.fixture(scope="module")
def expected(saved, dataset):
    return reference(saved, dataset)


@pytest.fixture(scope="module")
def result(saved, dataset, tmp_path_factory):
    return check(saved, dataset, tmp_path_factory.mktemp("out"))


def test_normalised_numbers(result, expected):
    every = [expected.now["one"][i].target[s] for i in range(FRAMES) for s in expected.now["one"][i].steps]
    close(result["demonstrations"]["std"], np.std(every))
    for variant, frames in expected.now.items():
        found, tens = result["normalised"][variant], expected.now["ten"]
        close(found["error"], rms([np.mean((f.chunks - f.target)[:, f.steps] ** 2) for f in frames]))
        first = [f.steps[f.steps < 4] for f in frames]
        errors = [np.mean((f.chunks - f.target)[:, s] ** 2) for f, s in zip(frames, first, strict=True)]
        close(found["error_executed"], rms(errors))
        gaps = [np.mean((f.chunks - t.chunks)[:, f.steps] ** 2) for f, t in zip(frames, tens, strict=True)]
        close(found["difference_to_ten"], rms(gaps))
        close(found["spread"], rms([f.chunks.var(axis=0, ddof=1)[f.steps].mean() for f in frames]))
        answers = np.concatenate([f.chunks[:, f.steps].reshape(-1) for f in frames])
        close(found["std_ratio"], answers.std() / np.std(every))
        close(found["largest"], np.abs(answers).max())


def test_errors_in_the_datas_units(result, expected):
    assert result["per_dimension"]["names"] == ["j0.pos", "j1.pos", "j2.pos", "j3.pos", "gripper.pos"]
    for variant, frames in expected.now.items():
        squares = [((f.real - f.raw)[:, f.steps] ** 2).mean(axis=(0, 1)) for f in frames]
        close(result["per_dimension"][variant], np.sqrt(np.mean(squares, axis=0)))


def overlap(expected, variant, i):
    """What the later chunk changes of the earlier one's plan, in normalised units of the later one's."""
    executed = expected.config.n_action_steps
    before = expected.now[variant.removesuffix("_warm")][expected.pairs[i][0]]
    after = expected.later[variant][i]
    change = (after.real[:, : small.HORIZON - executed] - before.real[:, executed:]) / expected.scale
    return np.mean(change[:, after.steps[after.steps < small.HORIZON - executed]] ** 2)


def test_successive_chunks_with_and_without_warm_start(result, expected):
    found = result["successive"]
    assert found["kind"] == "overlap" and found["pairs"] == len(expected.pairs)
    assert found.keys() >= {"one", "two", "ten", "one_warm", "two_warm"}
    for variant, frames in expected.later.items():
        close(found[variant]["error"], rms([np.mean((f.chunks - f.target)[:, f.steps] ** 2) for f in frames]))
        close(found[variant]["jump"], rms([overlap(expected, variant, i) for i in range(len(frames))]))
    assert found["one_warm"]["jump"] < found["one"]["jump"]


def test_padded_steps_do_not_count(result, expected):
    assert any(len(f.steps) < small.HORIZON for f in expected.now["one"]), "the test needs an episode's end"
    assert all(error is not None for error in result["error_by_step"]["one"])


def test_relative_actions_are_compared_on_one_state(dataset, tokenizer, tmp_path):
    saved = save_checkpoint(tmp_path / "pretrained_model", dataset, tokenizer, use_relative_actions=True)
    found, expected = check(saved, dataset, tmp_path), reference(saved, dataset)
    assert "one_warm" not in found["successive"]
    for variant in SAMPLINGS:
        close(
            found["successive"][variant]["jump"],
            rms([overlap(expected, variant, i) for i in range(len(expected.pairs))]),
        )
        squares = [((f.real - f.raw)[:, f.steps] ** 2).mean(axis=(0, 1)) for f in expected.now[variant]]
        close(found["per_dimension"][variant], np.sqrt(np.mean(squares, axis=0)))


def test_chunks_executed_whole_meet_at_a_seam(dataset, tokenizer, tmp_path, capsys):
    saved = save_checkpoint(tmp_path / "pretrained_model", dataset, tokenizer, n_action_steps=small.HORIZON)
    found, expected = check(saved, dataset, tmp_path)["successive"], reference(saved, dataset)
    assert found["kind"] == "seam" and "one_warm" not in found
    pairs = [
        (expected.now["one"][i], after) for (i, _), after in zip(expected.pairs, expected.later["one"], strict=True)
    ]
    close(found["one"]["jump"], rms([np.mean((b.chunks[:, 0] - a.chunks[:, -1]) ** 2) for a, b in pairs]))
    close(found["demonstrations_jump"], rms([np.mean((b.target[0] - a.target[-1]) ** 2) for a, b in pairs]))
    assert "warm start 0.3" in capsys.readouterr().out


def test_report(saved, dataset, tmp_path, capsys):
    found = check(saved, dataset, tmp_path, "--latency-calls=2")
    assert found.keys() == {
        *(
            "checkpoint",
            "data",
            "warm_start",
            "demonstrations",
            "normalised",
            "ratios_to_ten",
            "sharpness",
            "bootstrap",
        ),
        *("error_by_step", "successive", "per_dimension", "latency_ms", "thresholds", "verdicts", "limits", "versions"),
    }
    assert found["data"]["episodes"] == [1, 2] and len(found["data"]["frames"]) == FRAMES
    assert all(0 < t["median"] <= t["p95"] for t in found["latency_ms"].values())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for text in ("error to the demonstration", "gripper.pos", "verdict", "not success", "latency ms"):
        assert text in printed


def test_noise_does_not_depend_on_the_batch_size(result, saved, dataset, tmp_path):
    again = check(saved, dataset, tmp_path, "--batch-size=5")
    close(again["normalised"]["one"]["error"], result["normalised"]["one"]["error"])


def test_no_successor(saved, dataset, tmp_path, capsys):
    checkpoint = load_policy(saved, device="cpu", as_ofp=True, rename_map=None, compile_model=False)
    data = inputs.load_episodes(LeRobotDatasetMetadata(runs.REPO, dataset), dataset, checkpoint.config, [1])
    collected = measure.collect(checkpoint, data, frames=2, draws=2, batch_size=2, fraction=FRACTION, seed=0)
    statistics = measure.summarise(replace(collected, later=None), executed=4, seed=0)
    assert statistics["successive"] is None
    assert report.successive_rows(statistics)[0].split()[-3:] == ["n/a"] * 3


# Which weights


def test_teacher(copied, dataset, tmp_path, result):
    policy = OFPPolicy.from_pretrained(copied)
    teacher = {name: 1.1 * w for name, w in copy_weights(policy.student_weights()).items()}
    save_training_state(state_path(copied), TrainingState(teacher, 10, 0))
    found = check(copied, dataset, tmp_path, "--weights=teacher")
    assert found["checkpoint"]["weights"] == "teacher"
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            weight.copy_(teacher.get(name, weight))
    policy.save_pretrained(copied)
    close(found["normalised"]["one"]["error"], check(copied, dataset, tmp_path)["normalised"]["one"]["error"])
    assert abs(found["normalised"]["one"]["error"] - result["normalised"]["one"]["error"]) > 1e-3


def as_pi05(checkpoint):
    """The checkpoint as one of LeRobot's `pi05`: its type, no target-time branch."""
    config = json.loads((checkpoint / "config.json").read_text())
    for name in ("sampler", "warm_start", "objective", "ofp_paper"):
        del config[name]
    settings = {"type": "pi05", "tokenizer_max_length": 32, "num_inference_steps": 10, "compile_model": True}
    (checkpoint / "config.json").write_text(json.dumps({**config, **settings, "an_option_of_tomorrow": 1}))
    weights = load_file(checkpoint / "model.safetensors")
    new = {f"model.{name}" for name in NEW_PARAMETERS}
    save_file({n: w for n, w in weights.items() if n not in new}, checkpoint / "model.safetensors")


def test_plain_pi05_is_judged_by_one_step_flow_matching(copied, dataset, tmp_path):
    as_pi05(copied)
    found = check(copied, dataset, tmp_path)
    assert found["checkpoint"]["type"] == "pi05"
    checkpoint = load_policy(copied, device="cpu", as_ofp=True, rename_map=None, compile_model=False)
    batch, noise = small.batch(2), torch.randn(2, 1, small.HORIZON, 8)
    with torch.no_grad():
        ours = measure.sample(checkpoint.policy, batch, noise, {}, 0)
        prefix = checkpoint.policy.model.encode(*checkpoint.policy.prepare_observation(batch))
        one = torch.ones(2)
        euler = noise[:, 0] - checkpoint.policy.model(prefix, noise[:, 0], one, one)
    torch.testing.assert_close(ours["one"][:, 0], euler[..., : small.ACTIONS], atol=1e-5, rtol=1e-5)


def test_adapter(saved, tmp_path):
    policy = OFPPolicy.from_pretrained(saved)
    policy.config.pretrained_path = saved
    peft = policy.wrap_with_peft(peft_cli_overrides={"method_type": "LORA", "r": 2})
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    adapter = tmp_path / "pretrained_model"
    peft.save_pretrained(adapter)
    peft.config.save_pretrained(adapter)
    for file in saved.glob("policy_*"):
        shutil.copy(file, adapter)
    if (saved / "tokenizer").is_dir():  # LeRobot saves it with the processors since 0.6.2
        shutil.copytree(saved / "tokenizer", adapter / "tokenizer")
    loaded = load_policy(adapter, device="cpu", rename_map=None).policy
    batch, noise = small.batch(2), torch.randn(2, 1, small.HORIZON, 8)
    with torch.no_grad():
        ours = measure.sample(loaded, batch, noise, {}, 0)["one"][:, 0]
    policy.config.num_inference_steps = 1
    torch.testing.assert_close(ours, peft.predict_action_chunk(batch, noise=noise[:, 0]), atol=1e-5, rtol=1e-5)


# Which episodes


def metadata(tasks):
    return SimpleNamespace(repo_id="a/b", total_episodes=len(tasks), episodes={"tasks": [[task] for task in tasks]})


def run(name="newest", **dataset):
    return history.Run(name, {"repo_id": "a/b", "episodes": None, "eval_split": 0.0, **dataset})


def held_out(data, episodes, *past):
    return history.describe_history(data, episodes, history.History(list(past), None))["held_out"]


def test_episodes_by_default():
    twenty = metadata(["x"] * 15 + ["y"] * 5)
    assert history.choose_episodes(twenty, None, [])[0] == [18, 19]
    assert history.choose_episodes(metadata(["x"]), None, [])[0] == [0]
    split = run(eval_split=0.2)
    episodes, reason = history.choose_episodes(twenty, None, [split])
    assert episodes == [12, 13, 14, 19] and "eval_split" in reason
    assert held_out(twenty, episodes, split) is True
    assert held_out(twenty, [11, 12], split) is False
    assert held_out(twenty, [19], run(episodes=[0, 1])) is True
    assert held_out(twenty, [19], run(repo_id="other/data")) is None
    assert held_out(twenty, [19]) is None


def test_directories_of_one_name_are_not_one_dataset(tmp_path):
    here, there = tmp_path / "a" / "dataset", tmp_path / "b" / "dataset"
    twenty = metadata(["x"] * 20)
    twenty.repo_id, twenty.root = "local/dataset", here
    split = {"repo_id": "local/dataset", "eval_split": 0.1}
    assert held_out(twenty, [19], run(**split, root=str(here))) is True
    assert held_out(twenty, [19], run(**split, root=str(there))) is None
    twenty.repo_id = "a/b"  # a name of the Hub's is the same data wherever they lie
    assert held_out(twenty, [19], run(root=str(there), eval_split=0.1)) is True


@pytest.mark.parametrize("start", ["my start dir", "a--b", "outputs/gone"])
def test_a_start_that_is_gone_is_unknown(tmp_path, start):
    (tmp_path / "train_config.json").write_text(json.dumps({"dataset": {}, "policy": {"pretrained_path": start}}))
    assert history.read_history(tmp_path).unknown == start
    (tmp_path / "train_config.json").write_text("{")
    assert history.read_history(tmp_path).unknown == str(tmp_path)


def test_a_start_that_the_hub_refuses_is_unknown(tmp_path, monkeypatch):
    """Without access, or with the Hub out of order."""
    (tmp_path / "train_config.json").write_text(json.dumps({"dataset": {}, "policy": {"pretrained_path": "a/b"}}))
    find = history.find_file

    def refused(source, name):
        if source == "a/b":
            raise HfHubHTTPError("503", response=httpx.Response(503, request=httpx.Request("GET", "https://hub")))
        return find(source, name)

    monkeypatch.setattr(history, "find_file", refused)
    assert history.read_history(tmp_path).unknown == "a/b"


def test_episodes_that_the_start_was_trained_on():
    twenty, newest = metadata(["x"] * 20), run(episodes=[0, 1])
    before = run("base", episodes=list(range(2, 18)))
    assert history.choose_episodes(twenty, None, [newest, before])[0] == [18, 19]
    assert held_out(twenty, [18], newest, before) is True
    assert held_out(twenty, [17], newest, before) is False
    everything = run("base")
    episodes = history.choose_episodes(twenty, None, [newest, everything])[0]
    assert episodes == list(range(2, 20)) and held_out(twenty, episodes, newest, everything) is False
    other = run("base", repo_id="other/data")
    described = history.describe_history(twenty, [18], history.History([newest, other], "hub/base"))
    assert (described["held_out"], described["before"], described["unknown"]) == (
        True,
        {"base": "other/data"},
        "hub/base",
    )
    assert held_out(twenty, [18], other, everything) is False  # the newest does not say, the one before does


@pytest.mark.parametrize(
    ("words", "episodes"),
    [(["3", "40-42"], [3, 40, 41, 42]), (["[3,", "1]"], [1, 3]), (["[2,3]"], [2, 3]), (None, None)],
)
def test_parse_episodes(words, episodes):
    assert command.parse_episodes(words) == episodes


def test_rename_map(saved, dataset, tmp_path, tmp_path_factory, result):
    left, right = small.CAMERAS[0], "observation.images.other"
    other = runs.make_dataset(tmp_path_factory.mktemp("renamed") / "data", cameras=(right, small.CAMERAS[1]))
    check(saved, other, tmp_path, exit_code=2)
    found = check(saved, other, tmp_path, f'--rename_map={{"{right}": "{left}"}}')
    close(found["normalised"]["one"]["error"], result["normalised"]["one"]["error"])


# What cannot be checked


def fails(capsys, checkpoint, dataset, out, *flags):
    capsys.readouterr()
    check(checkpoint, dataset, out, *flags, exit_code=2)
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ofp-check: ")]
    assert len(message) == 1
    return message[0]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_clear_errors(copied, dataset, tmp_path, capsys, tmp_path_factory):
    def error(*flags, checkpoint=copied, data=dataset):
        return fails(capsys, checkpoint, data, tmp_path, *flags)

    cameras = runs.make_dataset(tmp_path_factory.mktemp("cameras") / "data", cameras=("observation.images.x",))
    message = error(data=cameras)
    assert all(text in message for text in (*small.CAMERAS, "observation.images.x", "--rename_map="))
    assert "empty" in error("--episodes")
    assert "0 to 2" in error("--episodes", "7")
    assert "neither a number" in error("--episodes", "last")
    assert "cuda" in error("--device=cuda")
    assert "--device abacus" in error("--device=abacus")
    assert "no teacher" in error("--weights=teacher")
    assert "not a directory" in error(checkpoint=tmp_path / "none")

    weights = copied / "model.safetensors"
    damaged = weights.read_bytes()
    weights.write_bytes(damaged[:1000])
    assert "damaged" in error()
    weights.write_bytes(damaged)

    edit(copied / "config.json", lambda c: c["output_features"]["action"].update(shape=[7]))
    assert "action has 5 dimensions" in error() and "has 7" in error()
    edit(copied / "config.json", lambda c: c.update(type="act"))
    assert "of type 'act'" in error()
    (copied / "config.json").unlink()
    assert "no LeRobot checkpoint" in error()


def test_missing_statistics(copied, dataset, tmp_path, capsys):
    file = next(copied.glob("*preprocessor*normalizer*.safetensors"))
    stats = load_file(file)
    save_file({k: v for k, v in stats.items() if k != "action.q99"}, file)
    message = fails(capsys, copied, dataset, tmp_path)
    assert "action.q99" in message and "--operation.type=recompute_stats" in message
    save_file({k: v for k, v in stats.items() if "state" not in k}, file)
    assert "observation.state.q01" in fails(capsys, copied, dataset, tmp_path)
    (copied / "policy_preprocessor.json").unlink()
    assert "processors" in fails(capsys, copied, dataset, tmp_path)


def test_a_setting_out_of_range(copied, dataset, tmp_path, capsys):
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "num_inference_steps": 0}))
    assert "num_inference_steps must be at least 1" in fails(capsys, copied, dataset, tmp_path)


def test_how_the_checkpoint_answers_is_told_where_it_is_not_what_was_measured(copied, dataset, tmp_path, result):
    said = "the checkpoint asks for test_time_samples=1, noise_temperature=0.5"
    assert not any(said in limit for limit in result["limits"])
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**settings, "noise_temperature": 0.5}))
    asked = check(copied, dataset, tmp_path)
    assert any(said in limit for limit in asked["limits"]) and asked["normalised"] == result["normalised"]


@pytest.mark.parametrize(
    "flags", [["x"], ["x", "--dataset=a/b", "--noises=1"], ["x", "--dataset=a", "--rename_map=no"]]
)
def test_bad_options_exit_with_2(flags):
    with pytest.raises(SystemExit) as stop:
        main(flags)
    assert stop.value.code == 2


def test_root_must_be_a_dataset(saved, tmp_path, capsys):
    assert main([str(saved), f"--root={tmp_path}", "--device=cpu"]) == 2
    assert "meta/info.json" in capsys.readouterr().err


# Statistics and verdict


def test_ratio_interval():
    rng = np.random.default_rng(0)
    base = rng.gamma(4, size=40)
    same = measure.ratio_interval(base, base, np.arange(40), seed=0)
    assert same == {"value": 1.0, "low": 1.0, "high": 1.0}
    double = measure.ratio_interval(4 * base, base, np.arange(40), seed=0)
    assert double["value"] == pytest.approx(2)
    noisy = base * rng.lognormal(0, 0.5, size=40)
    frames = measure.ratio_interval(noisy, base, np.arange(40), seed=0)
    assert frames["low"] < frames["value"] < frames["high"]
    assert measure.ratio_interval(noisy, base, np.arange(40), seed=0) == frames
    # Frames that are copies of each other say no more than one of them.
    copies = [np.repeat(x, 5) for x in (noisy, base, np.arange(40))]
    assert measure.ratio_interval(*copies, seed=0) == pytest.approx(frames)


def measured(
    *,
    few=None,
    ten=None,
    error=(1.0, 0.98, 1.05),
    spread=1.0,
    constant=1.0,
    unfollowed=None,
    sharpness=None,
    **checkpoint,
):
    good = {"error": 0.3, "spread": 0.3, "std_ratio": 1.0}
    few = {**good, **(few or {})}
    ratios = {
        "error": dict(zip(("value", "low", "high"), error, strict=True)),
        "spread": {"value": spread, "low": spread, "high": spread},
    }
    return {
        "normalised": {"one": few, "two": few, "ten": {**good, **(ten or {})}},
        "ratios_to_ten": {"one": ratios, "two": ratios},
        "demonstrations": {"std": 1.0, "constant_error": constant, "unfollowed": unfollowed or {}},
        "per_dimension": {"names": ["j0", "gripper"]},
        "bootstrap": {"unit": "episodes", "count": 12},
        "sharpness": {
            name: dict(zip(("value", "low", "high"), values, strict=True))
            for name, values in (sharpness or {"nearest": (1.0, 0.9, 1.1), "covered": (1.0, 0.9, 1.1)}).items()
        },
        "checkpoint": {"objective": "ofp", "sharpening_noise": 0.0, **checkpoint},
    }


@pytest.mark.parametrize(
    ("case", "label", "text"),
    [
        (measured(), "as_good", "one step is as good as ten on this data: error ratio 1.00 [0.98, 1.05]"),
        (measured(error=(1.3, 1.2, 1.4)), "worse", "1.30 [1.20, 1.40] (paired bootstrap over 12 episodes)"),
        (measured(error=(1.1, 0.9, 1.3)), "undecided", "more frames or episodes"),
        (measured(spread=0.2), "collapsed", "one step has collapsed: spread 0.20 of ten steps' (healthy 0.7 to 1.4)"),
        (measured(few={"std_ratio": 0.5}), "collapsed", "0.50 times the demonstrations' deviation"),
        (measured(few={"std_ratio": 1.8}), "over_guided", "lower --policy.consistency_weight"),
        (measured(few={"std_ratio": 1.8}, ten={"std_ratio": 1.9}), "wrong_size", "training diverged"),
        (measured(spread=1.9), "scattered", "noisier than ten"),
        (measured(spread=0.2, few={"spread": 0.01}, ten={"spread": 0.04}), "as_good", "the spread cannot tell"),
    ],
)
def test_verdict(case, label, text):
    one, two = verdict.judge(case)
    assert (one["about"], one["label"]) == ("one", label) and text in one["text"]
    assert two["label"] == label and two["text"] != one["text"]


CLOSE = (0.8, 0.7, 0.9)


@pytest.mark.parametrize(
    ("nearest", "covered", "changes", "label"),
    [
        (CLOSE, CLOSE, {"sharpening_noise": 0.5}, "as_good"),  # narrower around the same ways
        ((1.5, 1.4, 1.6), CLOSE, {"sharpening_noise": 0.5}, "collapsed"),  # between the ways
        (CLOSE, (1.8, 1.7, 1.9), {"sharpening_noise": 0.5}, "collapsed"),  # a way left out
        ((1.0, 0.9, 1.15), CLOSE, {"sharpening_noise": 0.5}, "collapsed"),  # not certain
        (CLOSE, (1.0, 0.9, 1.15), {"sharpening_noise": 0.5}, "collapsed"),
        (CLOSE, CLOSE, {"sharpening_noise": 0.0}, "collapsed"),
        (CLOSE, CLOSE, {"sharpening_noise": 0.5, "objective": "shortcut"}, "collapsed"),  # it does not sharpen
        (CLOSE, CLOSE, {"sharpening_noise": 0.5, "objective": None}, "collapsed"),  # a stock π₀.₅
    ],
)
def test_a_sharpened_step_may_be_narrow(nearest, covered, changes, label):
    sharpness = {"nearest": nearest, "covered": covered}
    one, two = verdict.judge(measured(spread=0.4, sharpness=sharpness, **changes))
    assert (one["label"], two["label"]) == (label, "collapsed")  # two steps are not sharpened
    assert ("sharpening_noise=0.5 narrows" in one["text"]) == (label == "as_good")


def test_what_did_not_sharpen_is_not_told_to_sharpen_less():
    names = ("value", "low", "high")
    sharp = {"spread": dict.fromkeys(names, 0.4), "nearest": dict.fromkeys(names, 2.0)}
    (found,) = verdict.judge_sharpness(measured(objective="shortcut", sharpening_noise=0.5) | {"sharpness": sharp})
    assert "train longer" in found["text"] and "sharpening_noise" not in found["text"]


def served(kind="ofp", **changes):
    """A policy as the check gets it, without its processors; a `pi05` comes as ours."""
    return ServedPolicy("a/b", small.ofp_policy(**changes), None, None, kind)


@pytest.mark.parametrize(
    ("kind", "changes", "objective", "noise", "silent"),
    [
        ("ofp", {}, None, 0.0, True),  # a conversion
        ("ofp", {"branch": 0.5}, "ofp", 0.5, False),
        ("ofp", {"branch": 0.5, "sharpening_noise": 0.3}, "ofp", 0.3, False),
        ("ofp", {"objective": "mean_flow"}, None, 0.0, True),
        ("ofp", {"objective": "flow_matching"}, "flow_matching", 0.5, False),  # its branch is silent by design
        ("pi05", {}, None, 0.0, False),
    ],
)
def test_a_silent_branch_was_trained_by_no_objective(kind, changes, objective, noise, silent):
    found = inputs.describe_checkpoint(served(kind, **changes))
    assert (found["objective"], found["sharpening_noise"], found["silent_branch"]) == (objective, noise, silent)


def test_verdict_on_one_step_that_is_not_trained():
    """Near the mean of one way it is not excused by sharpening, between two it is not told to sharpen less."""
    untrained = inputs.describe_checkpoint(served())
    one, _ = verdict.judge(measured(spread=0.05, sharpness={"nearest": CLOSE, "covered": CLOSE}, **untrained))
    assert one["label"] == "collapsed" and "sharpening" not in one["text"]
    names = ("value", "low", "high")
    sharp = {"spread": dict.fromkeys(names, 0.1), "nearest": dict.fromkeys(names, 1.9)}
    (found,) = verdict.judge_sharpness(measured(**untrained) | {"sharpness": sharp})
    assert found["label"] == "too_sharp" and "sharpening" not in found["text"]


def limits_of(checkpoint):
    seen = {"held_out": True, "before": {}, "unknown": None}
    unit = {"bootstrap": {"unit": "episodes"}, "successive": None, "latency_ms": None}
    described = {"source": "a/b", **inputs.describe_checkpoint(checkpoint)}
    return " ".join(verdict.limits({"checkpoint": described, "data": seen, **unit}))


@pytest.mark.parametrize(
    ("kind", "changes", "untrained", "other_steps"),
    [
        ("ofp", {}, True, False),
        ("ofp", {"sampler": "euler"}, True, False),  # as a conversion acts
        ("ofp", {"branch": 0.5}, False, False),
        ("ofp", {"branch": 0.5, "sampler": "euler"}, False, True),
        ("ofp", {"objective": "flow_matching"}, False, False),
        ("pi05", {"sampler": "euler"}, False, False),
    ],
)
def test_one_step_that_is_not_trained_or_not_taken_is_told(kind, changes, untrained, other_steps):
    found = limits_of(served(kind, num_inference_steps=3, **changes))
    assert ("branch is silent" in found) == untrained
    assert ("config.json says sampler=euler, num_inference_steps=3." in found) == other_steps
    assert ("--policy.sampler=flow_map --policy.num_inference_steps=1" in found) == other_steps


def test_eight_bits_are_told_where_they_answer():
    assert "inference_precision=fp8" in limits_of(served(inference_precision="fp8", inference_engine=True))
    assert "fp8" not in limits_of(served(inference_precision="fp8"))  # on a CPU nobody takes the engine unasked
    assert "fp8" not in limits_of(served(inference_engine=True))


def test_eight_bits_that_cannot_be_timed(monkeypatch):
    monkeypatch.setattr(measure, "load_items", lambda *_: small.batch(1))
    fast = served(inference_precision="fp8", inference_engine=True)._replace(preprocessor=lambda batch: batch)
    with pytest.raises(UserError, match="needs Triton and a GPU .* --latency-calls=0 leaves the latency out"):
        measure.latency(fast, None, calls=1, seed=0)


def law(rng, shape, *, width=1.0, modes=0.0, sides=(-1.0, 1.0)):
    """Chunks (f, k, 3, 2) of width `width` around one of two modes at ± `modes`."""
    side = modes * rng.choice(sides, size=(*shape, 1, 1))
    return side + width * rng.normal(size=(*shape, 3, 2))


@pytest.mark.parametrize(
    ("answers", "modes", "spread", "nearest", "covered"),
    [
        ({}, 0, (0.95, 1.05), (0.95, 1.05), (0.95, 1.05)),  # the demonstrations' own law
        ({"width": 2.0}, 0, (1.9, 2.1), (1.2, 3), (1.1, 2)),
        ({"width": 0.0}, 0, (0, 0.01), (0, 0.95), (1.2, 1.4)),  # their mean, in few dimensions
        ({}, 6, (0.95, 1.05), (0.95, 1.05), (0.95, 1.05)),
        ({"width": 0.3}, 6, (0.9, 1.05), (0, 0.95), (0, 0.95)),  # sharper, in both modes
        ({"width": 0.3, "modes": 0}, 6, (0, 0.2), (3, 10), (3, 10)),  # between them
        ({"width": 0.3, "sides": (1.0,)}, 6, (0, 0.2), (0, 0.95), (1.5, 6)),  # in one of them
    ],
)
def test_sharpness_of_known_laws(answers, modes, spread, nearest, covered):
    rng = np.random.default_rng(0)
    few = law(rng, (1600, 8), **{"modes": modes, **answers})
    ten, target = law(rng, (1600, 8), modes=modes), law(rng, (1600,), modes=modes)
    valid = np.arange(3) < rng.integers(1, 4, size=(1600, 1))
    found = measure.sharpness(few, ten, target, valid, np.arange(1600), seed=0)
    for name, (low, high) in (("spread", spread), ("nearest", nearest), ("covered", covered)):
        assert low - 0.05 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= high + 0.05
        assert low <= found[name]["value"] <= high


def test_nearest_against_loops():
    rng = np.random.default_rng(0)
    few, ten = rng.normal(size=(2, 5, 4, 3, 2))
    valid = np.arange(3) < np.array([[1], [2], [3], [3], [2]])
    for f, found in enumerate(measure.log_nearest(few, ten, valid)):
        distances = [
            min(np.mean((few[f, i, valid[f]] - ten[f, j, valid[f]]) ** 2) for j in range(4) if j != i) ** 0.5
            for i in range(4)
        ]
        assert found == pytest.approx(np.log(distances).mean())


@pytest.mark.parametrize(
    ("spread", "nearest", "noise", "label", "text"),
    [
        ((1.0, 0.9, 1.2), (1.0, 0.9, 1.1), 0.0, None, None),
        ((0.4, 0.3, 0.5), (0.8, 0.7, 0.9), 0.3, None, None),  # sharper than the data, and where the data is
        ((1.3, 1.2, 1.4), (1.0, 0.9, 1.3), 0.3, "too_spread", "raise --policy.sharpening_noise from 0.3 to 0.5"),
        ((2.0, 1.9, 2.1), (1.8, 1.7, 1.9), 0.0, "too_spread", "raise --policy.sharpening_noise from 0 to 0.2"),
        ((1.2, 1.0, 1.4), (1.0, 0.9, 1.3), 0.3, None, None),  # not certain
        ((0.4, 0.3, 0.5), (2.0, 1.8, 2.2), 0.5, "too_sharp", "lower --policy.sharpening_noise, which was 0.5"),
        ((0.4, 0.3, 0.5), (2.0, 1.8, 2.2), 0.0, "too_sharp", "train longer"),
    ],
)
def test_verdict_on_sharpness(spread, nearest, noise, label, text):
    names = ("value", "low", "high")
    result = measured() | {
        "sharpness": {
            "spread": dict(zip(names, spread, strict=True)),
            "nearest": dict(zip(names, nearest, strict=True)),
        },
        "checkpoint": {"objective": "ofp", "sharpening_noise": noise},
    }
    found = verdict.judge_sharpness(result)
    assert [each["label"] for each in found] == ([label] if label else [])
    assert not label or text in found[0]["text"]
    result["normalised"]["one"]["spread"] = 0.01
    assert verdict.judge_sharpness(result) == []


def test_verdict_on_a_policy_that_does_not_follow():
    verdicts = verdict.judge(measured(constant=0.3))
    assert [v["label"] for v in verdicts] == ["not_following", "not_telling", "not_telling"]
    assert "as good" not in " ".join(v["text"] for v in verdicts)


def test_verdict_on_one_dimension_that_is_not_followed():
    verdicts = verdict.judge(measured(unfollowed={1: {"error": 0.98, "constant": 0.95}}))
    assert [v["label"] for v in verdicts] == ["not_following", "not_telling", "not_telling"]
    assert "in action[1] (gripper), where their mean answer's error 0.98 is no smaller than 0.95" in verdicts[0]["text"]
    assert "do not follow this data in action[1] (gripper) either" in verdicts[1]["text"]


def test_each_dimension_is_followed_or_not():
    """Laws with a known answer: the share f of a dimension's variance that an answer cannot know."""
    rng, (f, k, h) = np.random.default_rng(0), (4000, 4, 2)
    known, unknown, other = rng.normal(size=(3, f, 1, 1)), rng.normal(size=(f, h, 1)), rng.normal(size=(f, k, h, 1))
    target = np.concatenate([known[0] + 0 * unknown, 0.6 * known[0] + 0.8 * unknown, unknown, 0 * unknown + 0.5], 2)
    exact = known[0][:, None] + np.zeros((f, k, h, 1))
    sampled = np.concatenate([exact, 0.6 * exact + 0.8 * other, other, 0.5 + 0.01 * other], axis=3)
    valid = np.arange(h) < rng.integers(1, h + 1, size=(f, 1))
    found = measure.follow_each(sampled, target, valid)
    errors, constants = ([each[name] for each in found] for name in ("error", "constant"))
    np.testing.assert_allclose(errors, [0, 0.8, 1, 0], atol=0.04)  # a draw's own would be 0.8 √2: not below 1
    np.testing.assert_allclose(constants, [1, 1, 1, 0], atol=0.04)
    noise = [each["noise"] for each in found]  # of two steps: 0 of what stays, .8² of it, all of it
    np.testing.assert_allclose(noise, [0, 0.64, 1, 0], atol=0.04)


@pytest.mark.parametrize(
    ("source", "weights", "data", "name"),
    [
        ("outputs/train/run/checkpoints/last/pretrained_model", "student", "user/data", "train-run-000010-on-data"),
        ("outputs/other/run/checkpoints/last/pretrained_model", "student", "user/data", "other-run-000010-on-data"),
        ("user/policy", "teacher", "some/where/mine", "user-policy-teacher-on-mine"),
    ],
)
def test_output_name(source, weights, data, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for run in ("train", "other"):
        (tmp_path / "outputs" / run / "run/checkpoints/000010/pretrained_model").mkdir(parents=True)
        (tmp_path / "outputs" / run / "run/checkpoints/last").symlink_to("000010")
    assert report.output_name(source, weights, data) == name
