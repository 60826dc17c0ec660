"""Pre- and post-processing of the `ofp_unet` policy: LeRobot's default, and relative actions."""

from typing import Any

import torch
from lerobot.processor import (
    PolicyAction,
    PolicyProcessorPipeline,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from ..relative import make_relative_steps
from .configuration_ofp_unet import OFPUnetConfig


def make_ofp_unet_pre_post_processors(
    config: OFPUnetConfig,
    dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None,
) -> tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]:
    """Rename, batch, device, relative actions, normalisation; and back."""
    relative, absolute = make_relative_steps(config)
    steps = make_default_policy_processor_steps(config, dataset_stats)
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, steps.to_device, relative, steps.normalize],
        output_steps=[steps.unnormalize, absolute, steps.to_cpu],
    )
