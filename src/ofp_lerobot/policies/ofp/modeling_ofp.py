"""The `ofp` policy for LeRobot: one-step π₀.₅, with its inference engine."""

import logging
from functools import partial
from typing import Any, Self

from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from ...compat import extend_model_cards
from ...flow_map.path import time_grid
from ..paligemma.policy import PaliGemmaPolicy
from ..paligemma.settings import PALIGEMMA_TOKENIZER
from ..vla.model_card import describe
from ..vla.policy import Observation
from ..vla.prompt import PromptTokenizer
from .configuration_ofp import TOKENIZER_MAX_LENGTH, OFPConfig
from .engine import Engine
from .network import OFPNetwork

logger = logging.getLogger(__name__)


class OFPPolicy(PaliGemmaPolicy):
    """π₀.₅ whose expert predicts average velocities, so that one evaluation answers."""

    config_class = OFPConfig
    name = "ofp"
    stock = "pi05"
    network_name = "π₀.₅"
    binned = (OBS_STATE,)
    small_layers = ("action_in_proj", "action_out_proj", "time_mlp_in", "time_mlp_out")

    engine: Engine | None = None

    def __init__(self, config: OFPConfig, *args: Any, **kwargs: Any) -> None:
        """As `VLAPolicy`."""
        super().__init__(config, *args, **kwargs)
        if config.uses_engine:
            mode = config.compile_mode if config.compile_model else None
            fp8, asked = config.inference_precision == "fp8", config.inference_engine is True
            self.engine = Engine(self.model, compile_mode=mode, fp8=fp8, asked=asked)
        elif config.inference_precision == "fp8":
            logger.warning("inference_precision=fp8 is the inference engine's, which is off here: products are exact")

    @staticmethod
    def make_network(config: OFPConfig, *, with_weights: bool = True) -> OFPNetwork:
        return OFPNetwork(config)

    @staticmethod
    def _default_tokenizer(config: OFPConfig) -> PromptTokenizer:
        return PromptTokenizer(
            config.tokenizer_name or PALIGEMMA_TOKENIZER, config.tokenizer_max_length or TOKENIZER_MAX_LENGTH
        )

    def train(self, mode: bool = True) -> Self:
        if mode and self.engine is not None:
            self.engine.release()  # training needs the memory
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Of `to` and its kind: what the engine holds would keep the old memory."""
        if self.engine is not None:
            self.engine.release()
        return super()._apply(*args, **kwargs)

    def _sample(self, observation: Observation, x: Tensor, start: float) -> Tensor:
        if self.engine is not None:
            actions = self.engine(
                list(observation.images.values()),
                observation.tokens,
                observation.token_mask,
                observation.extent,
                x,
                time_grid(self.config.num_inference_steps, start),
                instantaneous=self.config.sampler == "euler",
            )
            if actions is not None:
                return actions
        return super()._sample(observation, x, start)


extend_model_cards(OFPPolicy, OFPConfig, partial(describe, network=OFPPolicy.network_name))
