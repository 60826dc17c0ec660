"""LeRobot's diffusion-policy network as an average velocity.

Shapes: b observations, n samples, s action steps. Times: t = 1 noise, t = 0 action.
"""

import math
from typing import NamedTuple

import torch
from lerobot.policies.diffusion.modeling_diffusion import DiffusionConditionalUnet1d, DiffusionRgbEncoder
from torch import Tensor, nn

from ...objectives import OBJECTIVES
from .configuration_ofp_unet import OFPUnetConfig

TIME_SCALE = 100.0  # the diffusion policy's steps, for which the U-Net's time embedding is made


class Prefix(NamedTuple):
    """What the U-Net reads of an observation: features (b, d)."""

    features: Tensor

    def detach(self) -> "Prefix":
        return Prefix(self.features.detach())

    def head(self, rows: int) -> "Prefix":
        """The first observations."""
        return Prefix(self.features[:rows])


class ObservationEncoder(nn.Module):
    """States and images to features (b, d), by LeRobot's ResNet with spatial softmax, one for each camera or shared.

    The U-Net's blocks read features by one linear layer each, after an activation. `state_encoder_dim` adds those of a
    network of the states.
    """

    def __init__(self, config: OFPUnetConfig) -> None:
        super().__init__()
        cameras = len(config.image_features)
        count = cameras if config.use_separate_rgb_encoder_per_camera else min(cameras, 1)
        self.cameras = nn.ModuleList(DiffusionRgbEncoder(config) for _ in range(count))
        states = sum(f.shape[0] for f in (config.robot_state_feature, config.env_state_feature) if f is not None)
        width = config.state_encoder_dim
        self.states = None
        if width is not None:
            self.states = nn.Sequential(
                nn.Linear(states, width), nn.Mish(), nn.Linear(width, width), nn.Mish(), nn.Linear(width, width)
            )
        self.feature_dim = states + (width or 0) + cameras * 2 * config.spatial_softmax_num_keypoints

    def forward(self, states: Tensor, images: Tensor | None) -> Tensor:
        """states (b, state dimensions); images (b, cameras, 3, h, w) in the processor's normalisation, None if none."""
        features = [states] if self.states is None else [states, self.states(states)]
        if images is not None:
            for i in range(images.shape[1]):
                features.append(self.cameras[i % len(self.cameras)](images[:, i]))
        return torch.cat(features, dim=1)


class SinusoidalEmbedding(nn.Module):
    """LeRobot's `DiffusionSinusoidalPosEmb` with its frequencies computed once: x (n,) -> (n, width).

    On a CPU the same to the bit, in half the time.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        frequencies = torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = x[:, None] * self.frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


class UnetNetwork(nn.Module):
    """prefix = encode(states, images); u = forward(prefix, x_t, t, r, keep), as `flow_map.path.Velocity`.

    t enters as the U-Net's own timestep. t − r enters beside the observation, by a branch of the same form whose output
    is zero at the start: a network trained by flow matching is one to start from.
    """

    def __init__(self, config: OFPUnetConfig) -> None:
        super().__init__()
        self.encoder = ObservationEncoder(config)
        width = config.diffusion_step_embed_dim
        silent = nn.Linear(4 * width, width)
        nn.init.zeros_(silent.weight)
        nn.init.zeros_(silent.bias)
        self.target_time = nn.Sequential(SinusoidalEmbedding(width), nn.Linear(width, 4 * width), nn.Mish(), silent)
        self.unet = DiffusionConditionalUnet1d(config, global_cond_dim=self.encoder.feature_dim + width)
        if not OBJECTIVES[config.objective].uses_target_time:
            self.target_time.requires_grad_(False)

    def encode(self, states: Tensor, images: Tensor | None) -> Prefix:
        return Prefix(self.encoder(states, images))

    def forward(
        self,
        prefix: Prefix,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(n, s, action) float32. A sample that sees no condition reads zeros."""
        features = prefix.features
        if len(x_t) % len(features):
            raise ValueError(f"{len(x_t)} samples cannot share {len(features)} observations evenly")
        if len(x_t) != len(features):
            features = features.repeat(len(x_t) // len(features), 1)
        if keep is not None:
            features = features * keep[:, None]
        condition = torch.cat([features, self.target_time(TIME_SCALE * (t - r))], dim=1)
        return self.unet(x_t, TIME_SCALE * t, condition).float()
