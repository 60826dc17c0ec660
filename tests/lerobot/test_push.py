"""`lerobot-train` pushes to a stand-in of the Hub, starting from a π₀.₅ there, and what it pushed is downloaded again."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from tests import runs, small
from tests.lerobot import hub_server

BASE, REPO, TOKEN = "lerobot/pi05_tiny", "me/one-step", "hf_dummy"
WEIGHTS = "model.safetensors"
PROCESSORS = {"policy_preprocessor.json", "policy_postprocessor.json"}
BRANCH_BYTES = 2 * (128 * 128 + 128) * 4  # two float32 linear layers at the small expert's width


@pytest.fixture(scope="module")
def hub(dataset, tokenizer, tmp_path_factory):
    """The Hub after a run of two steps from BASE has pushed to the private REPO."""
    base = runs.pi05_checkpoint(tmp_path_factory.mktemp("base"), dataset, tokenizer)
    output = tmp_path_factory.mktemp("push") / "out"
    with hub_server.running() as hub:
        hub.readers = {TOKEN}
        hub.commit(BASE, {path.name: path.read_bytes() for path in base.iterdir()})
        flags = [
            *runs.train_flags(dataset, output, steps=2, save_freq=2),
            *runs.policy_flags(pretrained_path=BASE, push_to_hub="true", repo_id=REPO, private="true"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "tests.lerobot.hub_server", *flags],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **hub_server.environment(hub, TOKEN), "HF_HOME": str(output.parent / "hf")},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        hub.run = output
        yield hub


@pytest.fixture(scope="module")
def pushed(hub):
    return hub.repos[REPO][-1]


def test_weights_settings_processors_and_card_are_pushed_and_nothing_else(pushed):
    processors = {name for name in pushed.files if name.startswith(("policy_preprocessor", "policy_postprocessor"))}
    assert processors >= PROCESSORS
    assert set(pushed.files) - processors == {"config.json", WEIGHTS, "train_config.json", "README.md"}
    assert WEIGHTS in pushed.lfs and "config.json" not in pushed.lfs
    assert json.loads(pushed.files["config.json"])["type"] == "ofp"


def test_pushed_weights_are_a_pi05_and_the_branch(hub, pushed):
    base = hub.repos[BASE][-1].files[WEIGHTS]
    ours, theirs = load(pushed.files[WEIGHTS]), load(base)
    assert {name.split(".")[1] for name in ours.keys() - theirs.keys()} == {"target_time_mlp_in", "target_time_mlp_out"}
    assert theirs.keys() < ours.keys()
    assert 0 <= len(pushed.files[WEIGHTS]) - len(base) - BRANCH_BYTES < 1024  # the header names four more tensors


def test_pushed_weights_and_processors_are_the_runs(hub, pushed):
    saved = load((runs.checkpoint(hub.run, 2) / WEIGHTS).read_bytes())
    ours = load(pushed.files[WEIGHTS])
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], saved[name]) for name in saved)
    for name in pushed.files:
        if name.startswith(("policy_preprocessor", "policy_postprocessor")):
            assert pushed.files[name] == (runs.checkpoint(hub.run, 2) / name).read_bytes(), name
    start = load(hub.repos[BASE][-1].files[WEIGHTS])
    assert not torch.equal(ours["model.action_out_proj.weight"], start["model.action_out_proj.weight"])


def test_model_card_says_where_the_policy_came_from_and_how_to_run_it(hub, pushed):
    from huggingface_hub import ModelCard

    card = ModelCard(pushed.files["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.datasets == runs.REPO
    assert card.data.library_name == "lerobot" and "ofp" in card.data.tags
    text = " ".join(card.text.replace("\\\n", " ").split())
    for told in (
        "| Evaluations per chunk | 1 ",
        f"https://huggingface.co/{BASE}",
        f"| lerobot | {version('lerobot')} |",
        f"| lerobot_policy_ofp | {version('lerobot_policy_ofp')} |",
        "pip install lerobot_policy_ofp",
        f"lerobot-eval --policy.path={REPO} --env.type=<env> --eval.n_episodes=50 lerobot-eval",
        "--eval.n_episodes=50 --policy.sampler=euler --policy.num_inference_steps=10 ```",
    ):
        assert told in text, told
    assert pushed.files["README.md"].decode() in hub.cards  # what the Hub was asked to validate


def test_download_honours_revision_token_and_cache_dir(hub, pushed, tmp_path):
    newer = hub.commit(REPO, {WEIGHTS: b"not a checkpoint"})
    del hub.requests[:]
    with hub_server.connected(hub):
        policy = OFPPolicy.from_pretrained(REPO, revision=pushed.sha, token=TOKEN, cache_dir=tmp_path)
    seen = {request.path for request in hub.requests}
    assert {f"/{REPO}/resolve/{pushed.sha}/{name}" for name in ("config.json", WEIGHTS)} <= seen
    assert all(f"/resolve/{pushed.sha}/" in path for path in seen)
    assert {request.token for request in hub.requests} == {TOKEN}
    snapshots = tmp_path / "models--me--one-step" / "snapshots"
    assert [path.name for path in snapshots.iterdir()] == [pushed.sha]
    assert policy.config.base_model == REPO

    local = OFPPolicy.from_pretrained(runs.checkpoint(hub.run, 2))
    batch, noise = small.batch(2), torch.randn(2, small.HORIZON, 8)
    assert torch.equal(policy.predict_action_chunk(batch, noise=noise), local.predict_action_chunk(batch, noise=noise))

    with hub_server.connected(hub), pytest.raises(ValueError, match="damaged or incomplete"):
        OFPPolicy.from_pretrained(REPO, token=TOKEN, cache_dir=tmp_path)
    assert f"/{REPO}/resolve/main/{WEIGHTS}" in {request.path for request in hub.requests}
    assert (snapshots / newer.sha / WEIGHTS).exists()


def test_download_without_the_token_of_a_private_repository_is_one_clear_error(hub, tmp_path):
    with hub_server.connected(hub), pytest.raises(FileNotFoundError, match=f"{REPO}.*neither a directory nor a Hub"):
        OFPPolicy.from_pretrained(REPO, token=False, cache_dir=tmp_path)


def test_unknown_revision_is_an_error(hub, tmp_path):
    with hub_server.connected(hub), pytest.raises(Exception, match="Revision Not Found|revision"):
        OFPPolicy.from_pretrained(REPO, token=TOKEN, revision="v9", cache_dir=tmp_path)
