"""LeRobot's own π₀ and π₀.₅ code at any size, shrunk from outside, so that it can run beside ours on a CPU."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from transformers.models.auto import CONFIG_MAPPING

from ofp_lerobot.policies.paligemma.settings import GemmaSize


def _freeze(config: Any, values: Mapping[str, Any]) -> None:
    """Sets attributes of one configuration object for good: LeRobot's own assignments to them have no effect."""
    for name, value in values.items():
        setattr(config, name, value)
    kind = type(config)
    kept = {name: property(lambda _, v=value: v, lambda *_: None) for name, value in values.items()}
    config.__class__ = type(kind.__name__, (kind,), kept)


@contextmanager
def shrunk(
    gemma: Mapping[str, GemmaSize], vision: Mapping[str, Any] | None, vocabulary_size: int, projection: int
) -> Iterator[None]:
    """While open, LeRobot builds π₀ and π₀.₅ with these Gemma sizes by variant, vision tower and vocabulary.

    Only what LeRobot asks for sizes is replaced: `get_gemma_config` and the configurations it fills in.
    """

    class Configurations:
        def __getitem__(self, name: str) -> Any:
            def make(**kwargs: Any) -> Any:
                if "vocab_size" in kwargs:
                    kwargs["vocab_size"] = vocabulary_size
                config = CONFIG_MAPPING[name](**kwargs)
                if name == "paligemma":
                    _freeze(config.vision_config, {**(vision or {}), "projection_dim": projection})
                    _freeze(config.text_config, {"vocab_size": vocabulary_size})
                    config.text_config.pad_token_id = None
                return config

            return make

    with ExitStack() as stack:
        for module in (modeling_pi0, modeling_pi05):
            stack.enter_context(patch.object(module, "get_gemma_config", lambda variant: gemma[variant]))
            stack.enter_context(patch.object(module, "CONFIG_MAPPING", Configurations()))
        yield
