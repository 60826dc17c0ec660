"""A SmolVLM of any size in a directory, as SmolVLA's `vlm_model_name`: configuration and processor, no weights.

For a SmolVLA from scratch without the Hub, as a quickstart's, a test's or a benchmark's.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

MARKS = {  # of its tokenizer, which SmolVLA asks for
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


class SmolVLMSize(NamedTuple):
    """Of the text model and, from `vision_width` on, of the image tower; pixels scaled down by `scale` after it."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    vision_heads: int
    pixels: int
    patch: int
    scale: int


def write_smolvlm(directory: Path, size: SmolVLMSize, words: Iterable[str] = ()) -> Path:
    """Writes what `AutoConfig` and `AutoProcessor` read; words: of its tokenizer, one token each."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    library: Any = transformers  # whose classes take other keywords than their types say
    known = dict.fromkeys(["<pad>", "<unk>", *MARKS.values(), *words])
    if len(known) > size.vocabulary:
        raise ValueError(f"{len(known)} words and marks do not fit a vocabulary of {size.vocabulary}: raise it")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = library.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=MARKS
    )
    tokens = (size.pixels // size.patch // size.scale) ** 2
    processor = library.SmolVLMProcessor(
        library.SmolVLMImageProcessor(), fast, library.SmolVLMVideoProcessor(), image_seq_len=tokens
    )
    processor.save_pretrained(directory)
    library.SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": size.width,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.width // size.heads,
            "vocab_size": size.vocabulary,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": size.vision_width,
            "intermediate_size": size.vision_mlp,
            "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads,
            "image_size": size.pixels,
            "patch_size": size.patch,
        },
        scale_factor=size.scale,
        image_token_id=2,
        pad_token_id=0,
    ).save_pretrained(directory)
    return directory
