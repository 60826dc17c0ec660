"""The steps that π₀'s and π₀.₅'s pipelines share."""

from typing import Any

from lerobot.processor import (
    AbsoluteActionsProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
)

from .settings import PALIGEMMA_TOKENIZER


def make_relative_steps(config: Any) -> tuple[RelativeActionsProcessorStep, AbsoluteActionsProcessorStep]:
    """Actions relative to the state, where that is set, and back with the same state."""
    relative = RelativeActionsProcessorStep(
        enabled=config.use_relative_actions,
        exclude_joints=config.relative_exclude_joints,
        action_names=config.action_feature_names,
    )
    return relative, AbsoluteActionsProcessorStep(enabled=config.use_relative_actions, relative_step=relative)


def make_tokenizer(config: Any, length: int) -> TokenizerProcessorStep:
    """Of π₀.₅'s and π₀'s prompts; length: padded to where nothing is set. Raises ValueError where it cannot be had."""
    name = config.tokenizer_name or PALIGEMMA_TOKENIZER
    try:
        return TokenizerProcessorStep(
            tokenizer_name=name,
            max_length=config.tokenizer_max_length or length,
            padding_side="right",
            padding="max_length",
        )
    except OSError as error:
        raise ValueError(
            f"the tokenizer {name} cannot be loaded: offline, or gated on the Hub (accept its licence there and log in "
            "with `hf auth login`). --policy.tokenizer_name=<directory> takes one on this machine, and a checkpoint to "
            f"start from brings its own. {' '.join(str(error).split())}"
        ) from error
