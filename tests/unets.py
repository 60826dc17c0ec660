"""A tiny `ofp_unet`, its batches and the flags of its training."""

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION, OBS_ENV_STATE, OBS_STATE

from ofp_lerobot.policies.ofp_unet.configuration_ofp_unet import OFPUnetConfig
from ofp_lerobot.policies.ofp_unet.modeling_ofp_unet import OFPUnetPolicy
from tests import small

HORIZON, CAMERA = small.HORIZON, small.CAMERAS[0]
SIZES = {"down_dims": (16, 32), "diffusion_step_embed_dim": 16, "spatial_softmax_num_keypoints": 4, "horizon": HORIZON}
STATE = PolicyFeature(FeatureType.STATE, (small.STATES,))
ENVIRONMENT = PolicyFeature(FeatureType.ENV, (3,))
LARGER = (64, 64)  # so that the ResNet leaves more than one place of an image
IMAGE = PolicyFeature(FeatureType.VISUAL, (3, small.SIZE, small.SIZE))


def unet_policy(inputs=None, branch=0.0, **changes) -> OFPUnetPolicy:
    inputs = inputs or {OBS_STATE: STATE, OBS_ENV_STATE: ENVIRONMENT}
    action = {ACTION: PolicyFeature(FeatureType.ACTION, (small.ACTIONS,))}
    settings = {**SIZES, "n_action_steps": 4, "noise_temperature": 1.0, "device": "cpu", **changes}
    policy = OFPUnetPolicy(OFPUnetConfig(input_features=inputs, output_features=action, **settings))
    if branch:
        torch.nn.init.normal_(policy.model.target_time[-1].weight, std=branch)
    return policy.eval()


def batch(b=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        OBS_STATE: torch.randn(b, small.STATES, generator=g),
        OBS_ENV_STATE: torch.randn(b, 3, generator=g),
        CAMERA: torch.rand(b, 3, small.SIZE, small.SIZE, generator=g),
        ACTION: torch.randn(b, HORIZON, small.ACTIONS, generator=g),
    }


def unet_flags(**changes):
    flags = {
        "type": "ofp_unet",
        "device": "cpu",
        "push_to_hub": "false",
        "scheduler_decay_steps": 6,
        "n_action_steps": 4,
        "scheduler_warmup_steps": 1,
        **SIZES,
        **changes,
    }
    return [f"--policy.{k}={list(v) if isinstance(v, tuple) else v}" for k, v in flags.items()]
