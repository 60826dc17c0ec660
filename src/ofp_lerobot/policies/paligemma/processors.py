"""The tokenizer step that π₀'s and π₀.₅'s pipelines share."""

from typing import Any

from lerobot.processor import TokenizerProcessorStep

from .settings import PALIGEMMA_TOKENIZER


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
