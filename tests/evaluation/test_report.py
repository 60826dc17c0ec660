"""The report compares like with like; expected values by hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from ofp_lerobot.evaluation.closed_loop.policies import PolicySpec
from ofp_lerobot.evaluation.closed_loop.report import markdown, plot, summarise
from ofp_lerobot.evaluation.episodes import Chunk, Episode

POLICIES = [PolicySpec("new", "x"), PolicySpec("old", "y")]
SETTINGS = {"harness": {"kind": "robotwin", "settings": {}}, "policies": {"new": {}, "old": {}}}


def episode(policy, task, seed, success, latency=1.0):
    error = None if success is not None else "lost"
    chunks = [Chunk(latency, 1 if policy == "new" else 10, None)]
    return Episode(policy, task, "", seed, "go", success, 5, 1.0, chunks, error)


def played(policy, task, outcomes, **changes):
    return [episode(policy, task, seed, bool(int(o)), **changes) for seed, o in enumerate(outcomes)]


def test_policies_are_compared_on_the_same_episodes(tmp_path):
    """The new policy has only met the easy task so far."""
    episodes = played("new", "easy", "111") + played("old", "easy", "1110") + played("old", "hard", "0000")
    report = summarise(episodes, POLICIES, SETTINGS)
    assert [(row["episodes"], row["success"]) for row in report["overall"]] == [(3, 1.0), (3, 1.0)]
    assert report["compared"] == {"episodes": 3, "of": 8}
    assert report["timing"]["old"]["chunks"] == 3
    assert "Incomplete: 3 of 8 episodes" in markdown(report)
    plot(report, Path(tmp_path / "report.png"))
    whole = summarise(episodes[:3] + episodes[3:6], POLICIES, SETTINGS)
    assert whole["compared"] == {"episodes": 3, "of": 3} and "Incomplete" not in markdown(whole)


def test_a_policy_without_outcomes_leaves_the_others_alone():
    report = summarise([*played("old", "easy", "10"), episode("new", "easy", 0, None)], POLICIES, SETTINGS)
    assert [(row["episodes"], row["errors"]) for row in report["overall"]] == [(0, 1), (2, 0)]
    assert report["paired"] == [{"policy": "new", "baseline": "old", "episodes": 0}]
    assert report["without_outcome"] == ["new"]
    assert "Incomplete: no outcome yet of new. Rates" in markdown(report)
    whole = summarise(played("old", "easy", "10"), POLICIES[1:], SETTINGS)
    assert whole["without_outcome"] == [] and "Incomplete" not in markdown(whole)


def test_each_task_has_its_difference_and_its_latency():
    episodes = played("new", "a", "111111", latency=2.0) + played("old", "a", "000000", latency=20.0)
    episodes += played("new", "b", "10", latency=4.0) + played("old", "b", "10", latency=40.0)
    report = summarise(episodes, POLICIES, SETTINGS)
    (first,), (second,) = (task["paired"] for task in report["tasks"])
    assert first["difference"] == 1 and first["mcnemar_p"] == pytest.approx(2 * 0.5**6)
    assert second["difference"] == 0 and second["mcnemar_p"] == 1
    assert [t["latency_ms_median"] for t in report["timing"]["new"]["tasks"]] == [2, 4]
    assert [t["latency_ms_p95"] for t in report["timing"]["old"]["tasks"]] == [20, 40]
    lines = [line for line in markdown(report).splitlines() if line.startswith("| a | new")]
    assert len(lines) == 1 and "+100.0 [" in lines[0] and "| 0.0312 | 2.0 (2.0) |" in lines[0]


def test_how_each_policy_answers_is_told():
    """One step of a flow-matching sampler is not one step of a flow map."""
    episodes = [*played("new", "a", "10"), *played("old", "a", "10")]
    answers = {"new": {"steps": 1, "sampler": "flow_map"}}  # a directory of before knows none
    report = summarise(episodes, POLICIES, {**SETTINGS, "answers": answers})
    assert report["answers"] == {**answers, "old": None}
    page = markdown(report)
    assert "| 1, flow_map |" in page and "| 10 |" in page


def test_other_instructions_are_other_episodes():
    episodes = played("new", "a", "1110") + played("old", "a", "0110")
    episodes[0] = replace(episodes[0], instruction="go elsewhere")
    report = summarise(episodes, POLICIES, SETTINGS)
    (pair,) = report["paired"]
    assert (pair["episodes"], pair["other_instructions"], pair["first_only"], pair["second_only"]) == (3, 1, 0, 0)
    assert "given different instructions: 1." in markdown(report)
    episodes = played("new", "a", "1") + [replace(each, instruction="x") for each in played("old", "a", "0")]
    report = summarise(episodes, POLICIES, SETTINGS)
    assert report["paired"] == [{"policy": "new", "baseline": "old", "other_instructions": 1, "episodes": 0}]
    assert "given different instructions: 1." in markdown(report)
