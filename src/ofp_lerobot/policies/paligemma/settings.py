"""Settings that π₀ and π₀.₅ share, and the sizes of their networks."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ...compat import dtype_name, refuse_foreign_settings
from ...errors import choice, within
from ..configuration import FlowMapConfig

PALIGEMMA_TOKENIZER = "google/paligemma-3b-pt-224"
PALIGEMMA_VOCABULARY = 257152


class GemmaSize(NamedTuple):
    """Sizes of a Gemma transformer, named as in openpi and LeRobot."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


# Networks that train on a CPU. The vision towers cut images into patches of 16 pixels.
SMALL_GEMMA = {
    "gemma_tiny": GemmaSize(width=128, depth=2, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=16),
    "gemma_small": GemmaSize(width=256, depth=4, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=32),
}
SMALL_SIGLIP = {
    "siglip_tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 16,
    },
}


@dataclass
class PaliGemmaSettings(FlowMapConfig):
    """What the policies on PaliGemma add to π₀'s and π₀.₅'s configuration beyond the one-step method's settings."""

    vision_variant: str = "siglip_so400m"
    vocabulary_size: int = PALIGEMMA_VOCABULARY  # not "vocab_size": PEFT would look for it in a π₀.₅'s configuration

    # Tokenizer of the prompt (Hub name or local path) and its padded length. None: the starting checkpoint's, or
    # PaliGemma's and what openpi has. A checkpoint brings its own processors, so both can only be set without one.
    tokenizer_name: str | None = None
    tokenizer_max_length: int | None = None

    # Facts of the starting checkpoint, set by loading. Its Hub name, for the model card; and whether it was trained
    # with rotary frequencies rounded to bfloat16, as LeRobot does with dtype=bfloat16 and openpi's JAX not.
    base_model: str | None = None
    bfloat16_rotary: bool = False

    def check_network(self: Any) -> None:
        """Raises ValueError where a setting that π₀ and π₀.₅ share is out of range."""
        gemma = ("gemma_2b", "gemma_300m", *SMALL_GEMMA)
        choice("paligemma_variant", self.paligemma_variant, gemma)
        choice("action_expert_variant", self.action_expert_variant, gemma)
        choice("vision_variant", self.vision_variant, ("siglip_so400m", *SMALL_SIGLIP))
        choice("dtype", self.precision, ("float32", "bfloat16"))
        within("chunk_size", self.chunk_size, 1)
        within("n_action_steps", self.n_action_steps, 1)
        self.check_method()
        refuse_foreign_settings(self)
        if self.n_action_steps > self.chunk_size:
            raise ValueError(
                f"n_action_steps ({self.n_action_steps}) must not exceed chunk_size ({self.chunk_size}): "
                "set --policy.n_action_steps"
            )
        if self.time_sampling_beta_beta != 1.0:
            raise ValueError("time_sampling_beta_beta must be 1 (flow times are drawn on the device as u^(1/alpha))")
        if self.image_resolution[0] != self.image_resolution[1]:
            raise ValueError(f"image_resolution must be square, got {tuple(self.image_resolution)}")

    @property
    def precision(self: Any) -> str:
        """The name of `dtype`."""
        return dtype_name(self.dtype)
