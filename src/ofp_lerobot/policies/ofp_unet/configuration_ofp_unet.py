"""Configuration of the `ofp_unet` policy: LeRobot's `diffusion` with the one-step method's settings."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lerobot.configs import PreTrainedConfig
from lerobot.optim import CosineDecayWithWarmupSchedulerConfig, LRSchedulerConfig
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.utils.constants import ACTION

from ...compat import precision
from ...errors import choice, within
from ..configuration import FlowMapConfig

RESNET_STRIDE = 32  # pixels that are one place of its last map
_DIFFUSION = (
    "noise_scheduler_type",
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)


@PreTrainedConfig.register_subclass("ofp_unet")
@dataclass
class OFPUnetConfig(FlowMapConfig, DiffusionConfig):
    """The network's and the encoder's fields are `DiffusionConfig`'s; a new run may not change those of its noise.

    A chunk starts at the current observation.
    """

    without_effect: ClassVar = {
        "scheduler_name": ("cosine", "scheduler_decay_steps and scheduler_decay_lr say how the learning rate ends"),
        "do_mask_loss_for_padding": (False, "padded steps never enter the loss"),
        **{
            name: (getattr(DiffusionConfig, name), "it is diffusion's, and this is flow matching")
            for name in _DIFFUSION
        },
    }

    n_obs_steps: int = 1
    horizon: int = 16
    n_action_steps: int = 8
    drop_n_last_frames: int = 0  # padded steps do not enter the loss
    # From scratch and with group norm, as the original diffusion policy.
    pretrained_backbone_weights: str | None = None
    use_group_norm: bool = True

    # Width of a network of the states, whose features the U-Net reads beside them; None: it reads the states alone.
    state_encoder_dim: int | None = None

    # The steps of a chunk are normalised one by one, after LeRobot's normalisation, which treats them alike.
    normalize_each_step: bool = False

    # As π₀.₅'s of LeRobot: the action minus the state at the chunk's start, but for the joints whose names hold these.
    use_relative_actions: bool = False
    relative_exclude_joints: list[str] = field(default_factory=lambda: ["gripper"])
    action_feature_names: list[str] | None = None  # LeRobot sets them from the dataset

    # Of the learning rate, after a warm-up: a cosine of so many steps, of `--steps` where that is less.
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 0.0

    @classmethod
    def _ofp_translate(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """`schedule_steps` was the length of the learning rate's decay, too."""
        decay = {"scheduler_decay_steps": raw["schedule_steps"]} if "schedule_steps" in raw else {}
        return super()._ofp_translate({**decay, **raw})

    def __post_init__(self) -> None:
        wanted = self.device
        super().__post_init__()
        self.note_device(wanted)
        self.check_method()
        within("n_action_steps", self.n_action_steps, 1, self.horizon)
        if self.n_obs_steps != 1:
            raise ValueError(f"n_obs_steps must be 1, got {self.n_obs_steps}: ofp_unet sees the current observation")
        choice("dtype", precision(self), ("float32",))
        width = self.state_encoder_dim
        if width is not None and (type(width) is not int or width < 1):
            raise ValueError(f"state_encoder_dim must be a whole number from 1, or null, got {width}")
        if self.compile_model:
            raise ValueError("ofp_unet does not compile: set --policy.compile_model=false")

    @property
    def chunk_size(self) -> int:
        return self.horizon

    @property
    def max_action_dim(self) -> int:
        assert self.output_features is not None
        return self.output_features[ACTION].shape[0]

    @property
    def observation_delta_indices(self) -> None:  # type: ignore[override]
        return None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.horizon))

    def get_scheduler_preset(self) -> LRSchedulerConfig:  # type: ignore[override]
        """Warm-up and a cosine."""
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    def validate_features(self) -> None:
        """Any of the robot's state, the environment's state and images; raises ValueError where there is none.

        And for images too small to tell anything: a keypoint is a place in the ResNet's last map.
        """
        if not (self.robot_state_feature or self.env_state_feature or self.image_features):
            raise ValueError(
                "the policy needs observation.state, observation.environment_state or observation.images.* among its "
                "input_features"
            )
        if self.state_encoder_dim is not None and not (self.robot_state_feature or self.env_state_feature):
            raise ValueError(
                "there is no observation.state or observation.environment_state for the state's encoder: set "
                "--policy.state_encoder_dim=null"
            )
        if not self.output_features or ACTION not in self.output_features:
            raise ValueError("the policy needs 'action' among its output_features")
        if self.image_features:
            super().validate_features()
            shape = self.crop_shape or self.resize_shape or next(iter(self.image_features.values())).shape[1:]
            if max(shape) <= RESNET_STRIDE:
                raise ValueError(
                    f"to the ResNet images of {shape[0]} x {shape[1]} pixels are one place, which tells nothing: "
                    f"resize or crop them to more than {RESNET_STRIDE}, such as --policy.resize_shape='[96, 96]'"
                )
