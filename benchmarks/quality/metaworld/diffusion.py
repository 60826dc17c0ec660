"""LeRobot's own `diffusion` policy on the benchmark's data: what it trains on, and how it answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

from ofp_lerobot.inference.sampling import Sampling
from ofp_lerobot.inference.session import Answer

from .demonstrations import ACTION, IMAGE, STATE, Array, View
from .training import Training, as_seen, fit, observed, seen_pictures, shared_settings, statistics

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


class Runner:
    """A checkpoint of LeRobot's `diffusion` that answers as `ofp_lerobot.inference.session.Runner` does.

    It has neither a warm start nor a choice among samples.
    """

    samples = 1

    def __init__(self, checkpoint: Path) -> None:
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
        from lerobot.policies.factory import make_pre_post_processors

        self.policy = DiffusionPolicy.from_pretrained(checkpoint).eval()
        self._prepare, self._finish = make_pre_post_processors(self.policy.config, pretrained_path=str(checkpoint))
        self.horizon, self.chunk_size = self.policy.config.n_action_steps, self.policy.config.horizon
        self.policy.config.n_action_steps = self.chunk_size  # so it answers whole chunks
        self._steps = 1

    def use(self, sampling: Sampling) -> None:
        """Raises ValueError where more than sampler and steps is asked for."""
        import torch

        assert sampling.sampler is not None and sampling.steps is not None
        if sampling != Sampling.plain(sampling.sampler, sampling.steps):
            raise ValueError(f"diffusion has no warm start, choice or temperature here, got {sampling}")
        use_sampler(self.policy, sampling.sampler, sampling.steps)
        self._steps = sampling.steps
        torch.manual_seed(0)  # DDPM draws more noise on the way than the caller can give it

    def session(self, seed: int) -> Any:
        """It keeps nothing between two chunks."""
        return seed

    def infer(
        self, sessions: Sequence[Any], observations: Sequence[Mapping[str, Any]], noise: Any = None
    ) -> list[Answer]:
        """Chunks of actions; noise (n, 1, horizon, action) or (n, horizon, action)."""
        import torch

        seen = {key: torch.from_numpy(x) for key, x in observation(np.stack([o[STATE] for o in observations])).items()}
        if IMAGE in observations[0]:
            seen[IMAGE] = as_seen(np.stack([o[IMAGE] for o in observations]))
        start = noise.reshape(-1, *noise.shape[-2:]).to(self.policy.config.device)
        plans = self._finish(self.policy.predict_action_chunk(self._prepare(seen), noise=start)).numpy()
        return [Answer(plan[: self.horizon], plan, self._steps, 0.0, 0.0) for plan in plans]
