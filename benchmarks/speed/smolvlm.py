"""SmolVLA's own SmolVLM, and others of any size, as its `vlm_model_name`."""

import tempfile
from functools import cache
from pathlib import Path

from ofp_lerobot.policies.ofp_smolvla.small_vlm import SmolVLMSize, write_smolvlm

# HuggingFaceTB/SmolVLM2-500M-Video-Instruct with the 16 of its 32 layers that SmolVLA takes.
SMOLVLM_500M = SmolVLMSize(960, 2560, 16, 15, 5, 49280, 768, 3072, 12, 12, 512, 16, 4)


@cache
def smolvlm(size: SmolVLMSize, words: tuple[str, ...] = ()) -> Path:
    """As `write_smolvlm`, in a temporary directory, once in a process."""
    return write_smolvlm(Path(tempfile.mkdtemp(prefix="smolvlm")), size, words)
