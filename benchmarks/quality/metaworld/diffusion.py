"""LeRobot's own `diffusion` policy on the benchmark's data: what it trains on, and how it answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

from .demonstrations import ACTION, STATE, Array, View
from .training import Training, fit, observed, seen_pictures, shared_settings, statistics

NAME = "diffusion"
SAMPLERS = ("ddim", "ddpm")


def policy_config(training: Training, view: View, steps: int) -> Any:
    """Network, learning rate and warm-up as of `ofp_unet`, less what the target time adds there; noise schedule and
    normalisation are its own.

    It sees `view` as the environment's state. It insists on a robot's state beside that, which is a zero here.
    """
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    return DiffusionConfig(
        input_features={
            OBS_STATE: PolicyFeature(FeatureType.STATE, (1,)),
            OBS_ENV_STATE: PolicyFeature(FeatureType.ENV, (view.size,)),
            **seen_pictures(view),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (4,))},
        normalization_mapping={
            "STATE": NormalizationMode.IDENTITY,
            "ENV": NormalizationMode.MEAN_STD,
            "VISUAL": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MIN_MAX,
        },
        n_obs_steps=1,
        num_train_timesteps=100,
        do_mask_loss_for_padding=True,
        **shared_settings(training, steps),
    )


def observation(states: Array) -> dict[str, Array]:
    """States (n, size) as the policy sees them: (n, 1, size) and zeros (n, 1, 1); 1 is for an observation's time."""
    return {OBS_ENV_STATE: states[:, None], OBS_STATE: np.zeros((len(states), 1, 1), dtype=np.float32)}


def train(
    datasets: Sequence[tuple[str, Path]], training: Training, steps: int, seed: int, directory: Path
) -> dict[str, Any]:
    """Trains from random weights and saves as `training.fit` does."""
    import torch
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    view, data = observed(datasets, training.horizon)
    stats = statistics(data)
    stats[OBS_ENV_STATE] = stats.pop(STATE)
    policy = DiffusionPolicy(policy_config(training, view, steps))
    data |= observation(data[STATE])
    return fit(policy, policy.diffusion.unet, view, data, stats, training, steps, seed, directory)


def use_sampler(policy: Any, name: str, steps: int) -> None:
    """Makes a `DiffusionPolicy` answer with `steps` evaluations of DDPM or DDIM, which keeps its noise schedule.

    DDIM begins at the last time of the schedule (spacing "trailing"). LeRobot leaves diffusers' "leading", whose single
    step takes pure noise for an almost clean action.
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    diffusion = policy.diffusion
    known = diffusion.noise_scheduler.config
    if name == "ddim":
        diffusion.noise_scheduler = DDIMScheduler.from_config(known, timestep_spacing="trailing")
    else:
        diffusion.noise_scheduler = DDPMScheduler.from_config(known, timestep_spacing="leading")
    diffusion.num_inference_steps = steps
