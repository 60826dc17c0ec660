"""FSDP2 over two processes against DDP: the same losses, weights and teacher. PyTorch's own, so on any LeRobot."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.policies.shard_probe", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(directory / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize(("how", "ddp"), [("fsdp2", "ddp"), ("checkpointed", "ddp"), ("pi0, fsdp2", "pi0, ddp")])
def test_losses_weights_and_teacher_are_ddps(ranks, how, ddp):
    for rank in ranks:
        assert rank[how]["losses"] == pytest.approx(rank[ddp]["losses"], rel=1e-5)
        for kind in ("weights", "teacher"):
            assert rank[how][kind].keys() == rank[ddp][kind].keys()
            for name, expected in rank[ddp][kind].items():
                torch.testing.assert_close(rank[how][kind][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_losses_are_the_ranks_own_and_the_weights_are_common(ranks):
    first, second = (rank["fsdp2"] for rank in ranks)
    assert first["losses"] != second["losses"]
    for kind in ("weights", "teacher"):
        for name, weight in first[kind].items():
            assert torch.equal(weight, second[kind][name]), name


def test_every_weight_is_shared_out(ranks):
    """Half of it to each, by its first dimension."""
    first, second = (rank["fsdp2"]["shares"] for rank in ranks)
    whole = ranks[0]["ddp"]["weights"]
    for name, weight in whole.items():
        rows = len(weight)
        assert (first[name][0], second[name][0]) == ((rows + 1) // 2, rows // 2), name


def test_bfloat16_computes_near_it_from_the_same_teacher(ranks):
    """Three steps of at most the learning rate, 1e-3, each: the weights stay within twice that of DDP's."""
    found, ddp = ranks[0]["bfloat16"], ranks[0]["ddp"]
    assert found["losses"] == pytest.approx(ddp["losses"], rel=0.05)
    for kind in ("weights", "teacher"):
        for name, weight in found[kind].items():
            assert weight.dtype == torch.float32
            torch.testing.assert_close(weight, ddp[kind][name], rtol=0, atol=6e-3, msg=name)


def test_what_is_refused_by_name(ranks):
    for rank in ranks:
        assert "--accelerator.mixed_precision=bf16" in rank["refusal"]  # two dtypes
        assert "'ofp_smolvla' does not shard (FSDP2)" in rank["smolvla, refusal"]
