"""Configuration of the `ofp` policy: π₀.₅'s (LeRobot's `pi05`) plus the one-step method's settings."""

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config

from ...compat import LaterSettings
from ...errors import choice
from ..paligemma.settings import PaliGemmaSettings
from ..vla.features import check_features

TOKENIZER_MAX_LENGTH = 200  # openpi's for π₀.₅


@PreTrainedConfig.register_subclass("ofp")
@dataclass
class OFPConfig(PaliGemmaSettings, PI05Config, LaterSettings):
    """Fields of `PI05Config` keep their meaning. Times: t = 1 noise, t = 0 action.

    Raises ValueError where a setting is out of range, naming it.
    """

    # The fast path of `engine/` for acting: joined matrices and, on a GPU, fused kernels in recorded CUDA graphs.
    # None: on a GPU, unless compile_model is set, with which it is compiled too (minutes).
    inference_engine: bool | None = None
    # Of the engine's products. "fp8" rounds the prefix's MLPs to 8 bits on GPUs that multiply those (from Ada and
    # Hopper on): faster, not exact. The error is logged with the first answer.
    inference_precision: str = "full"

    def __post_init__(self) -> None:
        # PI05Config's own check would refuse the small variants, so its parent's is called.
        wanted = self.device
        super(PI05Config, self).__post_init__()
        self.note_device(wanted)
        self.check_network()
        choice("inference_precision", self.inference_precision, ("full", "fp8"))
        if self.inference_precision == "fp8" and self.compile_model:
            raise ValueError("inference_precision='fp8' is not for compile_model: set --policy.compile_model=false")

    @property
    def uses_engine(self) -> bool:
        """Whether acting goes through the inference engine."""
        if self.inference_engine is None:
            return str(self.device).startswith("cuda") and not self.compile_model
        return self.inference_engine

    def validate_features(self) -> None:
        """As π₀.₅'s, and the action must fit into max_action_dim."""
        super().validate_features()
        check_features(self, projected_state=False)
