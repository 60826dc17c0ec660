"""`lerobot-train` on two processes: FSDP2 against DDP, saved and resumed in both formats of checkpoints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ofp_lerobot import compat
from ofp_lerobot.policies.training_state import FILENAME, load_training_state
from tests import runs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(compat.UNTIL_0_6_1, reason="LeRobot shards by FSDP2 since 0.6.2")
SHARDED = "--parallelism.dp_shard=2"


def train(directory, *flags):
    """What each of the two ranks ended with."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "-m", "tests.lerobot.rank_probe", str(directory), *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


def start(directory, dataset, tokenizer, *flags):
    directory.mkdir()
    plain = runs.train_flags(dataset, directory / "out", steps=4, save_freq=2)
    return train(directory, *plain, *runs.policy_flags(tokenizer), *flags)


@pytest.fixture(scope="module")
def replicated(dataset, tokenizer, tmp_path_factory):
    return start(tmp_path_factory.mktemp("runs") / "ddp", dataset, tokenizer)


@pytest.fixture(scope="module", params=["safetensors", "dcp"])
def sharded(request, dataset, tokenizer, tmp_path_factory):
    """The run's directory and what its ranks ended with."""
    directory = tmp_path_factory.mktemp("runs") / request.param
    return directory, start(directory, dataset, tokenizer, SHARDED, f"--checkpoint_format={request.param}")


def test_noise_weights_and_teacher_are_ddps(replicated, sharded):
    for ours, theirs in zip(sharded[1], replicated, strict=True):
        assert ours["world"] == 2
        for one, other in zip(ours["times"], theirs["times"], strict=True):
            assert torch.equal(one, other)
        for kind in ("weights", "teacher"):
            assert ours[kind].keys() == theirs[kind].keys()
            for name, weight in theirs[kind].items():
                torch.testing.assert_close(ours[kind][name], weight, rtol=1e-4, atol=1e-6, msg=name)


def test_resumed_equals_uninterrupted(sharded, tmp_path):
    source, (uninterrupted, _) = sharded
    output = tmp_path / "out"
    shutil.copytree(source / "out" / "checkpoints" / "000002", output / "checkpoints" / "000002")
    config = runs.checkpoint(output, 2) / "train_config.json"
    # Its own settings say dp_shard already; the probe looks for it among the flags.
    resumed, _ = train(tmp_path, f"--config_path={config}", "--resume=true", f"--output_dir={output}", SHARDED)
    for kind in ("weights", "teacher"):
        for name, weight in uninterrupted[kind].items():
            assert torch.equal(resumed[kind][name], weight), name


def test_the_checkpoint_is_the_whole_policy(sharded):
    """What it says of the weights that train, and the teacher beside it."""
    source, (rank, _) = sharded
    checkpoint = runs.checkpoint(source / "out", 4)
    state = load_training_state(checkpoint.parent / "training_state" / FILENAME)
    assert state.step == 4
    for name, weight in rank["teacher"].items():
        assert torch.equal(state.teacher[name], weight), name
    if (checkpoint / "model.safetensors").is_file():  # not where the format is dcp alone
        saved = load_file(checkpoint / "model.safetensors")
        for name, weight in rank["weights"].items():
            assert torch.equal(saved[name], weight), name
