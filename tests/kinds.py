"""The vision-language-action policies, small, each with the stock policy that it is until it is trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from lerobot.policies.pi0.modeling_pi0 import PI0Policy
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS

from benchmarks.speed.smolvlm import smolvlm as write_smolvlm_once
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.ofp_pi0.configuration_ofp_pi0 import OFPPi0Config
from ofp_lerobot.policies.ofp_pi0.modeling_ofp_pi0 import OFPPi0Policy
from ofp_lerobot.policies.ofp_smolvla.configuration_ofp_smolvla import OFPSmolVLAConfig
from ofp_lerobot.policies.ofp_smolvla.modeling_ofp_smolvla import OFPSmolVLAPolicy
from ofp_lerobot.policies.ofp_smolvla.small_vlm import SmolVLMSize
from tests import small


class Kind(NamedTuple):
    """config(**changes), policy(branch=0.0, **changes), stock(policy, **changes): with the policy's weights.

    inputs(stock, batch): what its network takes of a batch. steps: the name of its number of steps. tower: part of the
    names of its vision tower's weights. expert: part of its expert's.
    """

    config: Callable[..., Any]
    policy: Callable[..., Any]
    stock: Callable[..., Any]
    inputs: Callable[..., tuple]
    steps: str
    tower: str
    expert: str


WORDS = ("open", "the", "window", "-", *map(str, range(257)))


def smolvlm() -> Path:
    """A directory with a small SmolVLM's configuration and processor, as `vlm_model_name`."""
    return write_smolvlm_once(SmolVLMSize(64, 96, 6, 4, 2, small.VOCABULARY, 32, 64, 2, 4, small.SIZE, 8, 2), WORDS)


def released_smolvlm(directory: Path) -> Path:
    """As `smolvlm`, and as the Hub has it: weights in bfloat16 and a configuration that says so."""
    from transformers import AutoConfig, SmolVLMForConditionalGeneration

    shutil.copytree(smolvlm(), directory)
    SmolVLMForConditionalGeneration(AutoConfig.from_pretrained(directory)).bfloat16().save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(config))
    return directory


def _smolvla_settings(**changes: Any) -> dict[str, Any]:
    settings = {
        "vlm_model_name": str(smolvlm()),
        "num_vlm_layers": 4,
        "resize_imgs_with_padding": (small.SIZE, small.SIZE),
        **changes,
    }
    common = small.common(**settings)
    common.pop("image_resolution")
    return common


def _smolvla_policy(*, branch: float = 0.0, **changes: Any) -> OFPSmolVLAPolicy:
    return _with_branch(OFPSmolVLAPolicy(OFPSmolVLAConfig(**_smolvla_settings(**changes))), branch)


def _pi0_config(**changes: Any) -> OFPPi0Config:
    gemma = {"paligemma_variant": "gemma_tiny", "action_expert_variant": "gemma_tiny", "vision_variant": "siglip_tiny"}
    return OFPPi0Config(**small.common(**{**gemma, "vocabulary_size": small.VOCABULARY, **changes}))


def _with_branch(policy: Any, branch: float) -> Any:
    with torch.no_grad():
        policy.model.target_time_mlp_out.weight.normal_(std=branch) if branch else None
    return policy.eval()


def _stock_smolvla(ours: OFPSmolVLAPolicy, **changes: Any) -> SmolVLAPolicy:
    return small.with_weights_of(SmolVLAPolicy(SmolVLAConfig(**_smolvla_settings(**changes))), ours)


def _stock_pi0(ours: OFPPi0Policy, **changes: Any) -> PI0Policy:
    with small.shrunk_stock():
        stock = PI0Policy(PI0Config(**small.common(**changes)))
    return small.with_weights_of(stock, ours)


def _text(batch: dict[str, Any]) -> tuple[Any, Any]:
    return batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]


KINDS = {
    "ofp": Kind(
        small.ofp_config,
        small.ofp_policy,
        small.stock_policy,
        small.stock_inputs,
        "num_inference_steps",
        "vision_tower",
        "gemma_expert",
    ),
    "ofp_pi0": Kind(
        _pi0_config,
        lambda *, branch=0.0, **changes: _with_branch(OFPPi0Policy(_pi0_config(**changes)), branch),
        _stock_pi0,
        lambda stock, batch: (*stock._preprocess_images(batch), *_text(batch), stock.prepare_state(batch)),
        "num_inference_steps",
        "vision_tower",
        "gemma_expert",
    ),
    "ofp_smolvla": Kind(
        lambda **changes: OFPSmolVLAConfig(**_smolvla_settings(**changes)),
        _smolvla_policy,
        _stock_smolvla,
        lambda stock, batch: (*stock.prepare_images(batch), *_text(batch), stock.prepare_state(batch)),
        "num_steps",
        "vision_model",
        "lm_expert",
    ),
}
POLICIES = {"ofp": OFPPolicy, "ofp_pi0": OFPPi0Policy, "ofp_smolvla": OFPSmolVLAPolicy}
