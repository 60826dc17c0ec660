import pytest

from ofp_lerobot.evaluation.closed_loop.results import open_results, read_results
from ofp_lerobot.evaluation.episodes import Chunk, Episode


def episode(seed=0, success=True, **changes):
    values = {"policy": "ofp", "task": "t", "condition": "", "seed": seed, "instruction": "do", "steps": 3}
    return Episode(**{**values, "seconds": 0.5, "success": success, "chunks": [Chunk(1.0, 1, None)], **changes})


def test_written_episodes_are_read_back(tmp_path):
    path = tmp_path / "episodes.jsonl"
    written = [episode(0), episode(1, False), episode(2, None, error="the simulator crashed")]
    with open_results(path) as results:
        for each in written:
            results.add(each)
    assert read_results(path) == written


def test_a_line_cut_by_a_kill_is_dropped_and_run_again(tmp_path):
    path = tmp_path / "episodes.jsonl"
    with open_results(path) as results:
        results.add(episode(0))
        results.add(episode(1))
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:cut])
        assert [each.seed for each in read_results(path)] == [0]
        with open_results(path) as results:
            assert results.has_outcome(episode(0).key) and not results.has_outcome(episode(1).key)
            results.add(episode(1))
        assert [each.seed for each in read_results(path)] == [0, 1]


def test_no_episode_counts_twice(tmp_path):
    with open_results(tmp_path / "episodes.jsonl") as results:
        results.add(episode())
        with pytest.raises(ValueError, match="already"):
            results.add(episode(success=False))
    with open_results(tmp_path / "episodes.jsonl") as results, pytest.raises(ValueError, match="already"):
        results.add(episode(success=None, error="late"))


def test_an_error_waits_for_another_attempt(tmp_path):
    path = tmp_path / "episodes.jsonl"
    with open_results(path) as results:
        results.add(episode(success=None, error="lost connection"))
        assert not results.has_outcome(episode().key)
        assert [each.error for each in results.episodes] == ["lost connection"]
        results.add(episode())
    assert [each.success for each in read_results(path)] == [True]


def test_an_error_cannot_be_a_failure():
    with pytest.raises(ValueError, match="either"):
        episode(success=False, error="boom")
    with pytest.raises(ValueError, match="either"):
        episode(success=None)


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "episodes.jsonl"
    with open_results(path), pytest.raises(RuntimeError, match="in use"), open_results(path):
        pass


def test_damage_is_named(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text(episode().to_json() + "\n" + "{}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_results(path)
