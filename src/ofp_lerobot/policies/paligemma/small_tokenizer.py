"""A tokenizer small enough for a quickstart: one token for each word, number and punctuation mark of the prompts.

PaliGemma's own is gated on the Hub. This one loads offline through LeRobot's `TokenizerProcessorStep`
(`--policy.tokenizer_name=<directory> --policy.vocabulary_size=<size>`).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN = "<pad>", "<unk>"
PROMPT_WORDS = ("Task", "State", "Action", ":", ",", ";", ".")  # π₀.₅'s "Task: …, State: …;\nAction: "
STATE_BINS = range(-1, 257)  # the bins of the state, and those just outside

_PIECE = Regex(r"-?\d+|\w+|[^\w\s]")  # a number, a word or one mark


def build_tokenizer(directory: Path | str, texts: Iterable[str]) -> int:
    """Saves a tokenizer of π₀.₅'s prompts about the tasks `texts`; returns the size of its vocabulary."""
    pieces = pre_tokenizers.Split(_PIECE, behavior="removed", invert=True)
    words = {word for text in texts for word, _ in pieces.pre_tokenize_str(text)}
    known = dict.fromkeys([PAD, UNKNOWN, *PROMPT_WORDS, *map(str, STATE_BINS), *sorted(words)])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pieces
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN)
    fast.save_pretrained(str(directory))
    return len(known)
