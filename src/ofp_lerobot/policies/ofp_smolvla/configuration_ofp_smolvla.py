"""Configuration of the `ofp_smolvla` policy: SmolVLA's (LeRobot's `smolvla`) plus the one-step method's settings."""

from dataclasses import dataclass
from typing import ClassVar

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

from ...compat import refuse_foreign_settings
from ...errors import within
from ..configuration import FlowMapConfig
from ..vla.features import check_features

SMOLVLM_MAX_LENGTH = 48  # SmolVLA's default of tokenizer_max_length


@PreTrainedConfig.register_subclass("ofp_smolvla")
@dataclass
class OFPSmolVLAConfig(FlowMapConfig, SmolVLAConfig):
    """Fields of `SmolVLAConfig` keep their meaning. Times: t = 1 noise, t = 0 action.

    Raises ValueError where a setting is out of range, naming it.
    """

    foreign: ClassVar = {
        "num_steps": (10, "num_inference_steps is its name here"),
        "use_cache": (True, "the prefix is always kept"),
        "adapt_to_pi_aloha": (False, "convert the dataset, or its processors"),
    }

    # Padded length of the prompt. None: the starting checkpoint's, or SmolVLA's 48. A checkpoint brings its own
    # processors, so it can only be set without one.
    tokenizer_max_length: int | None = None  # type: ignore[assignment]

    # A fact of the starting checkpoint, set by loading: its Hub name, for the model card.
    base_model: str | None = None

    def __post_init__(self) -> None:
        wanted = self.device
        super().__post_init__()
        self.note_device(wanted)
        within("chunk_size", self.chunk_size, 1)
        within("n_action_steps", self.n_action_steps, 1)
        self.check_method()
        refuse_foreign_settings(self)
        if self.add_image_special_tokens and self.empty_cameras:  # LeRobot shows the network an absent camera's tokens
            raise ValueError(
                f"empty_cameras={self.empty_cameras} and add_image_special_tokens=true are not for policy type "
                f"{self.type!r} together: set --policy.empty_cameras=0 and give a picture for each camera"
            )

    @property
    def observation_delta_indices(self) -> None:  # type: ignore[override]
        """The current observation, without a dimension of time."""
        return None

    def validate_features(self) -> None:
        """As SmolVLA's, and the data must fit into the network."""
        super().validate_features()
        check_features(self, projected_state=True)
