"""Whether a prompt fits into its tokens.

π₀.₅'s prompt is "Task: …, State: …;\\nAction: ". A tokenizer cuts what is too long without a word, and the state is at
its end: opposite states then give the same answer. Nothing is cut here; a prompt that does not fit is refused.
π₀'s and SmolVLA's prompts are the instruction and a newline.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub.errors import HFValidationError
from lerobot.utils.constants import POLICY_PREPROCESSOR_DEFAULT_NAME
from torch import Tensor
from transformers import AutoTokenizer

logger = logging.getLogger(__name__)

_STATE_STEP = "pi05_prepare_state_tokenizer_processor_step"
_NEWLINE_STEPS = {"pi0_new_line_processor", "smolvla_new_line_processor"}
_SHOWN = 60  # characters of an instruction in a message
_WITH_STATE = re.compile(r"Task:(.*), State:[^,]*;\nAction: ", re.DOTALL)

NO_INSTRUCTION = (
    "the instruction is empty: the policy does whatever it learnt without one. Name the task: --task of "
    "lerobot-rollout, --operation.type=modify_tasks of lerobot-edit-dataset"
)


def _cleaned(task: str) -> str:
    return task.strip().replace("_", " ").replace("\n", " ")


# Each step's prompt of an instruction and a state: LeRobot's `Pi05PrepareStateTokenizerProcessorStep`, our
# `PromptWithoutStateStep`, and LeRobot's `Pi0NewLineProcessor` and `NewLineTaskProcessorStep`.
_PROMPTS: dict[str, Callable[[str, str], str]] = {
    "with state": lambda task, state: f"Task: {_cleaned(task)}, State: {state};\nAction: ",
    "without state": lambda task, _: f"{_cleaned(task)}\n",
    "as given": lambda task, _: task if task.endswith("\n") else f"{task}\n",
}


class PromptTokenizer(NamedTuple):
    """How prompts become tokens. name: a directory or a Hub id; length: the most tokens that a prompt has.

    form: what is made of an instruction. "with state" is LeRobot's π₀.₅, "without state" some of openpi's, "as given"
    π₀ and SmolVLA, which leave it as it is. padded: whether every prompt is padded to `length`, not only to the longest
    of its batch, as SmolVLA's are.
    """

    name: str
    length: int
    form: Literal["with state", "without state", "as given"] = "with state"
    padded: bool = True

    def load(self) -> Any:
        """The tokenizer, None where it cannot be had: then whoever makes the tokens will say so."""
        try:
            return AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError, HFValidationError):
            return None


def checkpoint_tokenizer(path: Path | None) -> PromptTokenizer | None:
    """What a checkpoint's preprocessor file says, None where it has no tokenizer or there is no file."""
    if path is None or not path.is_file():
        return None
    steps = {step.get("registry_name"): step.get("config", {}) for step in json.loads(path.read_text())["steps"]}
    config = steps.get("tokenizer_processor", {})
    if not config.get("tokenizer_name"):
        return None
    beside = path.parent / config["tokenizer_name"]  # LeRobot after 0.6.1 saves it with the checkpoint
    name = str(beside) if beside.is_dir() else config["tokenizer_name"]
    padded = config.get("padding", "max_length") == "max_length"
    if _STATE_STEP in steps:
        return PromptTokenizer(name, config["max_length"], "with state", padded)
    as_given = not _NEWLINE_STEPS.isdisjoint(steps)
    return PromptTokenizer(name, config["max_length"], "as given" if as_given else "without state", padded)


def require_whole(prompts: Any, mask: Tensor, tokenizer: Any) -> None:
    """Raises ValueError where a prompt needs more tokens than it was given.

    prompts: a string or one for each row of mask (b, text) bool, False at padding; anything else tells nothing.
    tokenizer: None where it cannot be had, then a row without padding counts as cut. Waits for the mask's device.
    """
    prompts = prompts_of(prompts)
    if len(prompts) != len(mask):
        return
    full = mask.all(dim=1).tolist()
    for prompt, filled in zip(prompts, full, strict=True):
        if filled and isinstance(prompt, str):
            needed = None if tokenizer is None else count_tokens(tokenizer, [prompt])[0]
            if needed is None or needed > mask.shape[1]:
                raise ValueError(too_long(prompt, needed, mask.shape[1]))


def prompts_of(value: Any) -> Sequence[Any]:
    """The prompts of a batch, as the processors leave them: a string or one for each row, else none."""
    value = [value] if isinstance(value, str) else value
    return value if isinstance(value, list | tuple) else []


def says_nothing(prompt: Any) -> bool:
    """Whether there is no instruction in a prompt, which is that of the processors with or without the state."""
    if not isinstance(prompt, str):
        return False
    held = _WITH_STATE.fullmatch(prompt)
    return not (held[1] if held else prompt).strip()


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens that each prompt needs, uncut."""
    return [len(tokens) for tokens in tokenizer(list(prompts), truncation=False, padding=False)["input_ids"]]


def too_long(prompt: str, needed: int | None, length: int) -> str:
    shown = prompt if len(prompt) <= _SHOWN else f"{prompt[:_SHOWN]}…"
    needs = "fills all" if needed is None else f"needs {needed} tokens, more than the"
    lost = "the state at its end" if _WITH_STATE.fullmatch(prompt) else "its end"
    enough = "more" if needed is None else f"{needed} or more"
    return (
        f"the prompt {shown!r} {needs} {length} that it is given, so {lost} would be cut: shorten the "
        f"instruction, or give it {enough} tokens with --policy.tokenizer_max_length (a checkpoint's is max_length of "
        f"the tokenizer_processor in its {POLICY_PREPROCESSOR_DEFAULT_NAME}.json; edit that in a copy)"
    )


def tasks_of(metadata: Any, episodes: Sequence[int] | None) -> list[str]:
    """The instructions of a dataset's episodes, of all where these are None; empty where an episode has none."""
    known = metadata.episodes
    if episodes is None or known is None or "tasks" not in known.column_names:
        return [str(task) if task is not None else "" for task in metadata.tasks.index]
    of_each = list(known["tasks"])
    return sorted({str(task) for e in episodes if e < len(of_each) for task in of_each[e] or [""]})


def count_empty(tasks: Iterable[str]) -> int:
    """Instructions that say nothing."""
    return sum(not task.strip() for task in tasks)


def check_tasks(tasks: Sequence[str], state_size: int, how: PromptTokenizer) -> None:
    """Raises ValueError where an instruction of a dataset leaves no room for the state, warns of empty ones.

    The state is taken at its longest: each of its dimensions is a bin of three digits, or -1 below the bins.
    """
    if empty := count_empty(tasks):
        logger.warning(
            "%d of the dataset's %d instructions are empty: the policy cannot tell these tasks apart, and the servers "
            "refuse an empty instruction. Name them with `lerobot-edit-dataset --operation.type=modify_tasks`",
            empty,
            len(tasks),
        )
    tokenizer = how.load()
    if tokenizer is None or not tasks:
        return
    bin_ = max(("255", "-1"), key=lambda text: count_tokens(tokenizer, [" ".join([text] * 8)])[0])
    state = " ".join([bin_] * state_size)
    prompts = [_PROMPTS[how.form](task, state) for task in tasks]
    counts = count_tokens(tokenizer, prompts)
    longest = max(range(len(counts)), key=counts.__getitem__)
    if counts[longest] > how.length:
        raise ValueError(too_long(prompts[longest], counts[longest], how.length))
