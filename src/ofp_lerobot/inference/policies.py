"""The policies that can be served, and all that differs between them: our `ofp` and LeRobot's own `pi05`."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import draccus
from draccus.utils import ParsingError
from httpx import HTTPError  # of the Hub's client
from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.policies.pi05.modeling_pi05 import PI05Policy
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    DeviceProcessorStep,
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RelativeActionsProcessorStep,
    RenameObservationsProcessorStep,
    TokenizerProcessorStep,
)
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK
from torch import Tensor
from transformers.initialization import no_init_weights

from ..checkpoints.reader import load_adapter, load_processors, resolve_source, statistics_problems
from ..devices import resolve_device
from ..errors import UserError
from ..policies.ofp import weights
from ..policies.ofp.configuration_ofp import OFPConfig
from ..policies.ofp.modeling_ofp import OFPPolicy
from ..policies.ofp.processor_steps import PromptWithoutStateStep
from ..policies.ofp.prompt import require_whole
from ..policies.ofp.text import TextExtentProcessorStep
from .observations import TASK, ObservationError

logger = logging.getLogger(__name__)

_CONFIGS: dict[str, type[PreTrainedConfig]] = {"ofp": OFPConfig, "pi05": PI05Config}
_TOUCH_NO_IMAGE = (
    AddBatchDimensionProcessorStep,
    RelativeActionsProcessorStep,
    Pi05PrepareStateTokenizerProcessorStep,
    PromptWithoutStateStep,
    TokenizerProcessorStep,
    TextExtentProcessorStep,
)


class ServedPolicy(NamedTuple):
    """A policy and the processors saved with it. Their state makes them good for one call at a time."""

    source: str
    policy: OFPPolicy | PI05Policy
    preprocessor: PolicyProcessorPipeline[dict[str, Any], dict[str, Any]]
    postprocessor: PolicyProcessorPipeline[Tensor, Tensor]

    @property
    def config(self) -> OFPConfig | PI05Config:
        return self.policy.config

    @property
    def warm_start(self) -> float:
        """Share of the last chunk's rest in the start of the next one; stock π₀.₅ starts from noise."""
        return self.config.warm_start if isinstance(self.config, OFPConfig) else 0.0

    @property
    def sampler(self) -> str:
        return self.config.sampler if isinstance(self.config, OFPConfig) else "euler"

    @property
    def test_time_samples(self) -> int:
        """Samples of which one is the answer."""
        return self.config.test_time_samples if isinstance(self.config, OFPConfig) else 1

    @property
    def noise_temperature(self) -> float:
        """Factor of the noise that chunks start from."""
        return self.config.noise_temperature if isinstance(self.config, OFPConfig) else 1.0

    @property
    def inference_engine(self) -> bool:
        """Whether chunks go through our fast path."""
        return isinstance(self.config, OFPConfig) and self.config.uses_engine

    def preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What `predict` takes, of a batch with `Sample`'s images (b, ...) in the policy's names.

        Raises ObservationError where an instruction is too long for the prompt.
        """
        ready = self._preprocess(batch)
        tokenizers = [
            step.input_tokenizer for step in self.preprocessor.steps if isinstance(step, TokenizerProcessorStep)
        ]
        if tokenizers:
            try:
                require_whole(ready.get(TASK), ready[OBS_LANGUAGE_ATTENTION_MASK].bool(), tokenizers[0])
            except ValueError as error:
                raise ObservationError(str(error)) from None
        return ready

    def _preprocess(self, batch: dict[str, Any]) -> dict[str, Any]:
        images = {key: batch[key] for key in self.config.image_features if key in batch}
        # Ours takes bytes from the host, a quarter of what floats would move.
        if isinstance(self.policy, OFPPolicy) and all(map(_leaves_images, self.preprocessor.steps)):
            others = {key: value for key, value in batch.items() if key not in images}
            return {**self.preprocessor(others), **images}
        return self.preprocessor({**batch, **{key: _as_lerobot(image) for key, image in images.items()}})

    def predict(self, batch: dict[str, Any], noise: Tensor, rest: Tensor | None) -> Tensor:
        """Normalised chunks (b, chunk_size, a) of a preprocessed batch.

        noise (b, test_time_samples, chunk_size, max_action_dim), rest (b, steps, a) normalised: only with `warm_start`.
        """
        kwargs: dict[str, Any] = {} if rest is None else {"prev_chunk_left_over": rest}
        noise = noise.transpose(0, 1).flatten(0, 1)
        return self.policy.predict_action_chunk(batch, noise=noise.to(self.config.device), **kwargs)


def _leaves_images(step: ProcessorStep) -> bool:
    """Whether batches of images pass a preprocessor's step as they are, save for the device they are on."""
    if isinstance(step, RenameObservationsProcessorStep):
        return not step.rename_map
    if isinstance(step, NormalizerProcessorStep):
        return step.norm_map.get(FeatureType.VISUAL, NormalizationMode.IDENTITY) is NormalizationMode.IDENTITY
    if isinstance(step, DeviceProcessorStep):
        return step.float_dtype is None
    return type(step) in _TOUCH_NO_IMAGE


def _as_lerobot(image: Tensor) -> Tensor:
    """As its `preprocess_observation`: (b, 3, h, w) float32 in [0, 1]."""
    channels_first = image if image.shape[1] == 3 else image.permute(0, 3, 1, 2)
    return channels_first.contiguous().float() / 255


def load_policy(checkpoint: str | Path, *, device: str | None = None, **changes: Any) -> ServedPolicy:
    """A LeRobot checkpoint of type `ofp` or `pi05`, from a directory or the Hub; strict, whatever the type.

    device: the best there is by default. changes: fields of its configuration, for example num_inference_steps or
    sampler; None leaves a field as it is.
    Raises UserError where it cannot be loaded, or a field is unknown to it or out of range.
    """
    source = resolve_source(str(checkpoint))
    try:
        raw = weights.read_config(source)
        config = _config(raw, {"device": resolve_device(device), **changes}, source)
        processors = load_processors(source, config, rename_map={})  # observations come in the policy's names
        policy = _load_ofp(source, config) if isinstance(config, OFPConfig) else _load_pi05(source, config)
    except (ValueError, OSError, HTTPError) as error:
        raise UserError(error) from error
    for problem in statistics_problems(processors[0], config):
        logger.warning("the statistics of %s hardly fit its training data: %s", source, problem.text)
    return ServedPolicy(str(checkpoint), policy.eval(), *processors)


def _config(raw: dict[str, Any], changes: dict[str, Any], source: str | Path) -> PreTrainedConfig:
    kind = _CONFIGS[raw["type"]]
    changes = {name: value for name, value in changes.items() if value is not None}
    if unknown := sorted(changes.keys() - kind.__dataclass_fields__.keys()):
        raise UserError(f"{', '.join(unknown)}: the {raw['type']!r} checkpoint {source} has no such setting")
    # Real-time chunking has its own callers; here a chunk is answered whole.
    settings = {**raw, "pretrained_path": None, "rtc_config": None, **changes}
    settings.pop("type")
    try:
        return draccus.decode(kind, settings)
    except ParsingError as error:  # caused by the configuration's own ValueError, where it is one
        raise UserError(f"the configuration of {source} cannot be used: {error.__cause__ or error}") from error


def _load_ofp(source: str | Path, config: OFPConfig) -> OFPPolicy:
    return load_adapter(source, config) if config.use_peft else OFPPolicy.from_pretrained(source, config=config)


def _load_pi05(source: str | Path, config: PreTrainedConfig) -> PI05Policy:
    """LeRobot's own code with our strict loading: its `from_pretrained` goes on with random weights on an error."""
    if config.use_peft:
        raise UserError(f"{source} is a LoRA adapter of a 'pi05' policy: merge it into its base to serve it")
    with no_init_weights():
        policy = PI05Policy(config)
    weights.load_weights(policy, weights.load_state_dict(source), source, new=False)
    return policy
