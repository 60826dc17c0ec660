"""The `ofp_pi0` policy for LeRobot: one-step π₀."""

from functools import partial
from types import MappingProxyType

from torch import Tensor

from ...compat import extend_model_cards
from ..paligemma.policy import PaliGemmaPolicy
from ..paligemma.settings import PALIGEMMA_TOKENIZER
from ..vla.model_card import describe
from ..vla.policy import Observation
from ..vla.prompt import PromptTokenizer
from .configuration_ofp_pi0 import TOKENIZER_MAX_LENGTH, OFPPi0Config
from .network import Pi0Network


class OFPPi0Policy(PaliGemmaPolicy):
    """π₀ whose expert predicts average velocities, so that one evaluation answers."""

    config_class = OFPPi0Config
    name = "ofp_pi0"
    stock = "pi0"
    network_name = "π₀"
    old_names = MappingProxyType({f"time_mlp_{part}.": f"action_time_mlp_{part}." for part in ("in", "out")})
    small_layers = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")

    @staticmethod
    def make_network(config: OFPPi0Config, *, with_weights: bool = True) -> Pi0Network:
        return Pi0Network(config)

    @staticmethod
    def _default_tokenizer(config: OFPPi0Config) -> PromptTokenizer:
        name, length = config.tokenizer_name, config.tokenizer_max_length
        return PromptTokenizer(name or PALIGEMMA_TOKENIZER, length or TOKENIZER_MAX_LENGTH, "as given")

    def _prepare(self, observation: Observation) -> tuple[Tensor, ...]:
        return *super()._prepare(observation), self._prepare_state(observation)


extend_model_cards(OFPPi0Policy, OFPPi0Config, partial(describe, network=OFPPi0Policy.network_name))
