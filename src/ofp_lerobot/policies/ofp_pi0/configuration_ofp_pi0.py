"""Configuration of the `ofp_pi0` policy: π₀'s (LeRobot's `pi0`) plus the one-step method's settings."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config

from ..paligemma.settings import PaliGemmaSettings
from ..vla.features import check_features

TOKENIZER_MAX_LENGTH = 48  # openpi's for π₀


@PreTrainedConfig.register_subclass("ofp_pi0")
@dataclass
class OFPPi0Config(PaliGemmaSettings, PI0Config):
    """Fields of `PI0Config` keep their meaning. Times: t = 1 noise, t = 0 action.

    Raises ValueError where a setting is out of range, naming it.
    """

    def __post_init__(self) -> None:
        # PI0Config's own check would refuse the small variants, so its parent's is called.
        wanted = self.device
        super(PI0Config, self).__post_init__()
        self.note_device(wanted)
        self.check_network()

    def validate_features(self) -> None:
        """As π₀'s, and action and state must fit into the network."""
        super().validate_features()
        check_features(self, projected_state=True)
