"""Sizes the speed benchmarks run at, and our policy and LeRobot's built with them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE

from benchmarks.speed.smolvlm import SMOLVLM_500M, smolvlm
from benchmarks.speed.stock import shrunk
from ofp_lerobot.checkpoints.families import FAMILIES
from ofp_lerobot.policies.paligemma.settings import SMALL_GEMMA, SMALL_SIGLIP, GemmaSize
from ofp_lerobot.policies.vla import policy as vla_policy
from ofp_lerobot.policies.vla.text import TEXT_EXTENT, TextExtent


@dataclass(frozen=True)
class Preset:
    """Of LeRobot's `family`: cameras of `resolution` pixels, `text` tokens of which `real_text` are real, a chunk of
    `horizon` steps. steps: the numbers of them that are compared.
    """

    family: Literal["pi05", "pi0", "smolvla"]
    vlm: str
    expert: str
    vision: str
    vocabulary: int
    cameras: int
    resolution: int
    text: int
    real_text: int
    horizon: int
    action_dim: int
    steps: tuple[int, ...] = (1, 2, 10)


# Shared key and value shape, as in π₀.₅; prefix : suffix FLOPs above 100 : 1 (π₀.₅: 114 : 1), printed by the runs.
SMALL_GEMMA["bench_vlm"] = GemmaSize(width=512, depth=4, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64)
SMALL_GEMMA["bench_expert"] = GemmaSize(width=128, depth=4, mlp_dim=512, num_heads=8, num_kv_heads=1, head_dim=64)
_SMALL, _REAL = ("bench_vlm", "bench_expert", "siglip_tiny", 2048), ("gemma_2b", "gemma_300m", "siglip_so400m", 257152)
PRESETS = {
    "cpu": Preset("pi05", *_SMALL, 3, 112, 64, 16, 10, 14),
    "pi0_cpu": Preset("pi0", *_SMALL, 3, 112, 48, 16, 10, 14),
    "smolvla": Preset("smolvla", "", "", "", SMOLVLM_500M.vocabulary, 2, 512, 16, 16, 50, 6, steps=(1, 10)),
    "real": Preset("pi05", *_REAL, 3, 224, 200, 48, 50, 14),
    "pi0_real": Preset("pi0", *_REAL, 3, 224, 48, 16, 50, 14),
}
PI05 = [name for name, preset in PRESETS.items() if preset.family == "pi05"]
REAL = {"pi05": PRESETS["real"], "pi0": PRESETS["pi0_real"], "smolvla": PRESETS["smolvla"]}
"""By family, as released."""


def _features(preset: Preset) -> dict[str, Any]:
    pixels = (preset.resolution, preset.resolution)
    resized = {"resize_imgs_with_padding": pixels} if preset.family == "smolvla" else {"image_resolution": pixels}
    shape = (3, preset.resolution, preset.resolution)
    cameras = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, shape) for i in range(preset.cameras)}
    return {
        "input_features": {**cameras, OBS_STATE: PolicyFeature(FeatureType.STATE, (preset.action_dim,))},
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (preset.action_dim,))},
        **resized,
        "chunk_size": preset.horizon,
        "n_action_steps": preset.horizon,
    }


def make_ofp(preset: Preset, device: str = "cpu", **changes: Any) -> Any:
    """Our policy with random weights."""
    family = FAMILIES[preset.family]
    return family.policy(family.config(device=device, **_sizes(preset), **_features(preset), **changes))


def _sizes(preset: Preset) -> dict[str, Any]:
    """As our configuration says them."""
    if preset.family == "smolvla":
        return {"vlm_model_name": str(smolvlm(SMOLVLM_500M))}
    return {
        "paligemma_variant": preset.vlm,
        "action_expert_variant": preset.expert,
        "vision_variant": preset.vision,
        "vocabulary_size": preset.vocabulary,
    }


def make_stock(preset: Preset, device: str = "cpu", **changes: Any) -> Any:
    """LeRobot's policy with random weights."""
    family, small = FAMILIES[preset.family], SMALL_GEMMA.get(preset.vlm)
    patched = (
        shrunk(
            {"gemma_2b": small, "gemma_300m": SMALL_GEMMA[preset.expert]},
            SMALL_SIGLIP[preset.vision],
            preset.vocabulary,
            small.width,
        )
        if small
        else nullcontext()
    )
    sizes = _sizes(preset) if preset.family == "smolvla" else {}
    with patched:
        return family.stock_policy(family.stock_config(device=device, **sizes, **_features(preset), **changes))


def as_on_a_gpu() -> AbstractContextManager[Any]:
    """While open, the batch's text extent is taken as the processors found it, which the host else looks up itself."""
    return patch.object(vla_policy, "known_extent", lambda batch, *_: batch[TEXT_EXTENT])


def make_batch(preset: Preset, batch: int, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """A preprocessed random batch."""
    g = torch.Generator().manual_seed(seed)
    side = preset.resolution
    images = {f"observation.images.{i}": torch.rand(batch, 3, side, side, generator=g) for i in range(preset.cameras)}
    mask = (torch.arange(preset.text) < preset.real_text).expand(batch, -1)
    data = {
        **images,
        OBS_LANGUAGE_TOKENS: torch.randint(1, min(preset.vocabulary, 2000), (batch, preset.text), generator=g),
        OBS_LANGUAGE_ATTENTION_MASK: mask,
        OBS_STATE: torch.randn(batch, preset.action_dim, generator=g),
        ACTION: torch.randn(batch, preset.horizon, preset.action_dim, generator=g),
    }
    extent = TextExtent((batch, preset.text), preset.real_text, preset.real_text, 0)
    return {**{key: value.to(device) for key, value in data.items()}, TEXT_EXTENT: extent}
