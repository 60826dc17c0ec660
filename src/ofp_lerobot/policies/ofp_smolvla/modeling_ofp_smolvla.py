"""The `ofp_smolvla` policy for LeRobot: one-step SmolVLA."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lerobot.policies.common.vla_utils import resize_with_pad
from torch import Tensor

from ...compat import extend_model_cards
from ..vla.attention import Prefix
from ..vla.images import as_float
from ..vla.model_card import describe
from ..vla.policy import Observation, VLAPolicy
from ..vla.prompt import PromptTokenizer
from .configuration_ofp_smolvla import SMOLVLM_MAX_LENGTH, OFPSmolVLAConfig
from .network import SmolVLANetwork


class OFPSmolVLAPolicy(VLAPolicy):
    """SmolVLA whose expert predicts average velocities, so that one evaluation answers."""

    config_class = OFPSmolVLAConfig
    name = "ofp_smolvla"
    stock = "smolvla"
    network_name = "SmolVLA"
    encoder = ("vlm_with_expert.vlm.", "state_proj.")
    trained_with = (
        "chunk_size",
        "resize_imgs_with_padding",
        "add_image_special_tokens",
        "empty_cameras",
        "min_period",
        "max_period",
        "normalization_mapping",
    )
    fitting = (
        "vlm_model_name, num_vlm_layers, expert_width_multiplier, attention_mode, self_attn_every_n_layers, "
        "max_state_dim and max_action_dim"
    )
    as_stored = "vlm_with_expert.vlm."
    vocabulary_setting = "--policy.vlm_model_name"
    adapted = r"model\.vlm_with_expert\.lm_expert\..*\.self_attn\.(q|k|v|o)_proj"
    small_layers = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")

    @staticmethod
    def make_network(config: OFPSmolVLAConfig, *, with_weights: bool = True) -> SmolVLANetwork:
        return SmolVLANetwork(config, with_weights=with_weights)

    @classmethod
    def _note_start(cls, config: OFPSmolVLAConfig, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("adapt_to_pi_aloha"):
            raise ValueError(
                "the starting checkpoint was trained with adapt_to_pi_aloha=true, which turns joints and grippers "
                f"inside the policy; {cls.name!r} does not, so its actions would mean others. Start from a checkpoint "
                "without it, such as lerobot/smolvla_base"
            )

    @staticmethod
    def _default_tokenizer(config: OFPSmolVLAConfig) -> PromptTokenizer:
        padded = config.pad_language_to == "max_length"
        length = config.tokenizer_max_length or SMOLVLM_MAX_LENGTH
        return PromptTokenizer(config.vlm_model_name, length, "as given", padded)

    def _prepare(self, observation: Observation) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        device, b = self.model.action_in_proj.weight.device, len(observation.tokens)
        images = prepare_images(
            [image.to(device) for image in observation.images.values()], self.config.resize_imgs_with_padding
        )
        there = torch.ones(b, dtype=torch.bool, device=device)
        masks = [observation.image_masks.get(key, there).to(device) for key in observation.images]
        text = self._prepare_text(observation)
        return images, torch.stack(masks, dim=1), *text, self._prepare_state(observation)

    def _for_all_steps(self, prefix: Prefix) -> Prefix:
        return self.model.project(prefix)


def prepare_images(images: Sequence[Tensor], size: tuple[int, int] | None) -> Tensor:
    """One camera each (b, 3, h, w) or (b, h, w, 3), [0, 1] or uint8 -> (b, cameras, 3, height, width) in [-1, 1].

    size: (width, height), as SmolVLA has it. Raises ValueError where there is none and the cameras' sizes differ.
    """
    floats = [as_float(image) for image in images]
    if size is not None:
        floats = [resize_with_pad(image, size[1], size[0], pad_value=0) for image in floats]
    if len({image.shape for image in floats}) > 1:
        raise ValueError("the cameras' images differ in size: set --policy.resize_imgs_with_padding")
    return torch.stack(floats, dim=1) * 2.0 - 1.0


extend_model_cards(OFPSmolVLAPolicy, OFPSmolVLAConfig, partial(describe, network=OFPSmolVLAPolicy.network_name))
