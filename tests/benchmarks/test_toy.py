"""The toy benchmark: its measure, its goals, and one tiny run with every objective."""

import json

import pytest
import torch

from benchmarks.quality import toy
from ofp_lerobot.objectives import OBJECTIVES


def test_energy_distance_against_loops():
    x, y, z = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0)).double()

    def mean(pairs):
        return sum(float((a - b).norm()) for a, b in pairs) / len(pairs)

    within = mean([(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    across = mean([(a, b) for a in x for b in [*y, *z]])
    assert toy.energy_distance(x, y, z).item() == pytest.approx(
        2 * across - within - mean([(a, b) for a in y for b in z])
    )


def row(objective, start, steps, distance):
    return {"objective": objective, "start": start, "steps": steps, "energy_distance": distance}


def test_goals_are_ten_step_flow_matching_and_the_best_rival():
    rows = [
        row("flow_matching", "scratch", 1, 2.0),
        row("flow_matching", "scratch", 10, 0.02),
        row(toy.UNSHARPENED, "flow_matching", 1, 0.01),
        row("shortcut", "flow_matching", 1, 0.005),
        row("snapflow", "flow_matching", 1, 0.5),
    ]
    assert toy.goals(rows) == [
        ("flow_matching: one step <= ten-step flow matching", 0.01, 0.02),
        ("flow_matching: one step <= the best rival's (shortcut)", 0.01, 0.005),
    ]
    # Flow matching that trained on counts too, where it is better.
    assert toy.goals([*rows, row("flow_matching", "flow_matching", 10, 0.008)])[0][2] == 0.008


def test_a_tiny_run_of_every_objective_from_both_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "EVAL_SAMPLES", 8)
    monkeypatch.setattr(toy, "EVAL_OBSERVATIONS", 8)
    path = tmp_path / "toy.json"
    steps = ["--steps", "2", "--base-steps", "2", "--batch", "8", "--width", "16"]
    toy.main(["--seeds", "1", *steps, "--starts", "flow_matching", "scratch", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    cases = {(each["objective"], each["start"], each["steps"]) for each in rows}
    for objective in OBJECTIVES:
        for start in ("flow_matching", "scratch"):
            wanted = (1,) if objective == "drifting" else (1, 2, 10)
            assert {steps for name, begun, steps in cases if (name, begun) == (objective, start)} == set(wanted)
    wanted = {"objective", "start", "steps", "energy_distance", "accuracy", "entropy", "seed_spread"}
    assert all(wanted <= each.keys() for each in rows)
    single = {name for name, objective in OBJECTIVES.items() if not objective.uses_target_time}
    assert all(each["sampler"] == "euler" for each in rows if each["objective"] in single)
