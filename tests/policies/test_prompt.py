"""Prompts that do not fit into their tokens."""

import json
import logging

import pandas as pd
import pytest
import torch
from datasets import Dataset
from lerobot.policies.pi0.processor_pi0 import Pi0NewLineProcessor
from lerobot.processor import NewLineTaskProcessorStep

from ofp_lerobot.policies.ofp.processor_steps import PromptWithoutStateStep
from ofp_lerobot.policies.vla.prompt import PromptTokenizer, check_tasks, checkpoint_tokenizer, require_whole, tasks_of
from tests import small

FULL = torch.ones(1, 10, dtype=torch.bool)


@pytest.fixture(scope="module")
def words(tokenizer):
    return PromptTokenizer(str(tokenizer), 32).load()


def test_a_prompt_that_was_cut(words):
    prompt = "open " * 12
    with pytest.raises(ValueError, match="needs 12 tokens, more than the 10 that it is given.*tokenizer_max_length"):
        require_whole([prompt], FULL, words)


def test_which_row_was_cut(words):
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 5:] = False
    with pytest.raises(ValueError, match="'window window"):
        require_whole(["open the", "window " * 11], mask, words)


def test_prompts_that_fit(words):
    require_whole(["open " * 10], FULL, words)  # to the last token
    mask = FULL.clone()
    mask[0, 9] = False
    require_whole(["open " * 9], mask, words)
    require_whole(["open " * 9], mask, None)
    require_whole(None, FULL, words)  # tokens of the caller's own


def test_without_the_tokenizer_a_full_row_counts_as_cut():
    assert PromptTokenizer("nobody/nothing", 10).load() is None
    with pytest.raises(ValueError, match="fills all 10"):
        require_whole("open the window", FULL, None)


def test_a_tokenizer_that_cuts_at_the_front(tokenizer):
    """The instruction is lost then, and the row is as full."""
    from transformers import AutoTokenizer

    front = AutoTokenizer.from_pretrained(tokenizer, truncation_side="left")
    cut = front(["open " + "window " * 10], max_length=10, truncation=True, padding="max_length", return_tensors="pt")
    with pytest.raises(ValueError, match="needs 11 tokens"):
        require_whole(["open " + "window " * 10], cut["attention_mask"].bool(), front)


def test_instructions_of_a_dataset(tokenizer, caplog):
    # Task : open the window , State : 5 times - 1 ; Action : are 2 + 3 + 1 + 2 + 10 + 1 + 2
    check_tasks(["open the window", "open"], 5, PromptTokenizer(str(tokenizer), 21))
    with pytest.raises(ValueError, match="Task: open the window, .*needs 21 tokens, more than the 20"):
        check_tasks(["open", "open the window"], 5, PromptTokenizer(str(tokenizer), 20))
    with pytest.raises(ValueError, match="needs 75 tokens, more than the 64"):  # a state that the prompt cannot hold
        check_tasks(["open the window"], 32, PromptTokenizer(str(tokenizer), 64))
    check_tasks(["open the window"], 32, PromptTokenizer(str(tokenizer), 64, "without state"))
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "step"),
    [
        ("as given", Pi0NewLineProcessor()),
        ("as given", NewLineTaskProcessorStep()),
        ("without state", PromptWithoutStateStep()),
    ],
)
@pytest.mark.parametrize("task", ["open_the_window", "  open\nthe window\n"])
def test_tokens_are_counted_of_what_the_processors_make(form, step, task, tokenizer, words):
    (prompt,) = step.complementary_data({"task": [task]})["task"]
    (needed,) = map(len, words([prompt])["input_ids"])
    check_tasks([task], 32, PromptTokenizer(str(tokenizer), needed, form))
    with pytest.raises(ValueError, match=f"needs {needed} tokens, more than the {needed - 1} .* so its end would"):
        check_tasks([task], 32, PromptTokenizer(str(tokenizer), needed - 1, form))
    if "_" in task:
        assert needed == (5 if form == "as given" else 3)


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_instructions(tokenizer, caplog, empty):
    caplog.set_level(logging.WARNING)
    check_tasks([empty, "open the window"], 5, PromptTokenizer(str(tokenizer), 32))
    assert "1 of the dataset's 2 instructions are empty" in caplog.text


class Metadata:
    """What is asked of a LeRobotDataset's."""

    tasks = pd.DataFrame({"task_index": [0, 1, 2]}, index=["open", None, "close " * 30])
    episodes = Dataset.from_dict({"tasks": [["open"], [], ["close " * 30], ["open", "shut"]]})


@pytest.mark.parametrize(
    ("episodes", "expected"),
    [
        (None, ["open", "", "close " * 30]),
        ([0, 3], ["open", "shut"]),
        ([0, 1], ["", "open"]),
        ([2], ["close " * 30]),
        ([0, 99], ["open"]),  # LeRobot says what is wrong with that
    ],
)
def test_instructions_of_some_episodes(episodes, expected):
    assert tasks_of(Metadata, episodes) == expected


def test_a_checkpoints_tokenizer(tmp_path):
    path = tmp_path / "policy_preprocessor.json"
    assert checkpoint_tokenizer(path) is None
    state = {"registry_name": "pi05_prepare_state_tokenizer_processor_step"}
    tokens = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "tokens", "max_length": 64}}
    path.write_text(json.dumps({"steps": [state, tokens]}))
    assert checkpoint_tokenizer(path) == PromptTokenizer("tokens", 64, "with state")
    for newline in ("pi0_new_line_processor", "smolvla_new_line_processor"):
        path.write_text(json.dumps({"steps": [{"registry_name": newline}, tokens]}))
        assert checkpoint_tokenizer(path) == PromptTokenizer("tokens", 64, "as given")
    path.write_text(json.dumps({"steps": [{"class": "PromptWithoutStateStep"}, tokens]}))
    (tmp_path / "tokens").mkdir()
    assert checkpoint_tokenizer(path) == PromptTokenizer(str(tmp_path / "tokens"), 64, "without state")


def test_the_policy_asks_wherever_it_acts(tokenizer):
    policy = small.ofp_policy(tokenizer_name=str(tokenizer))
    batch = {**small.batch(1), "task": ["open " * (small.TEXT + 1)]}  # all of its tokens are text
    for act in (policy.predict_action_chunk, policy.select_action, policy.train().forward):
        with pytest.raises(ValueError, match=f"needs {small.TEXT + 1} tokens, more than the {small.TEXT}"):
            act(batch)
    policy.predict_action_chunk({**batch, "task": ["open " * small.TEXT]})
