"""How a checkpoint answers: one type for every command, its flags, and the settings of LeRobot's that it stands for."""

import argparse
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

from ..arguments import at_least
from ..checkpoints.stock import STOCK_SMOLVLA_STEPS
from ..flow_map.samplers import SAMPLERS

if TYPE_CHECKING:
    from lerobot.configs import PreTrainedConfig  # loads LeRobot, which no command's --help should wait for

# The field of a policy's configuration that each field of `Sampling` stands for.
SETTINGS = {
    "steps": "num_inference_steps",
    "sampler": "sampler",
    "warm_start": "warm_start",
    "samples": "test_time_samples",
    "temperature": "noise_temperature",
    "engine": "inference_engine",
}
# How a policy answers that has no such setting, as LeRobot's own.
_WITHOUT: dict[str, Any] = {"sampler": "euler", "warm_start": 0.0, "samples": 1, "temperature": 1.0, "engine": False}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a checkpoint answers. None is the checkpoint's own setting.

    Args:
        steps: network evaluations for a chunk.
        sampler: "flow_map", steps of average velocities, or "euler", π₀.₅'s own sampler.
        warm_start: share of the last chunk's unexecuted actions in the start of the next one, 0 is off.
        samples: chunks drawn for an answer, which is the one in the densest place.
        temperature: factor of the noise that a chunk starts from.
        engine: whether `ofp` and `pi05` answer by our fast path.
    """

    steps: int | None = None
    sampler: str | None = None
    warm_start: float | None = None
    samples: int | None = None
    temperature: float | None = None
    engine: bool | None = None

    @classmethod
    def plain(cls, sampler: str, steps: int, **others: Any) -> Self:
        """A single answer from full noise without a warm start, whatever the checkpoint asks for, save for `others`."""
        return cls(
            **{"steps": steps, "sampler": sampler, "warm_start": 0.0, "samples": 1, "temperature": 1.0, **others}
        )

    @classmethod
    def of(cls, config: "PreTrainedConfig") -> "Sampling":
        """How a policy with this configuration answers, nothing left open. What it has no setting for, π₀.₅ has not."""
        found: dict[str, Any] = {
            name: getattr(config, setting, _WITHOUT.get(name)) for name, setting in SETTINGS.items()
        }
        steps = found["steps"] or getattr(config, STOCK_SMOLVLA_STEPS, None)
        return Sampling(**{**found, "steps": steps, "engine": getattr(config, "uses_engine", False)})

    @property
    def settings(self) -> dict[str, Any]:
        """What is not left to the checkpoint, under the configuration's names."""
        found = {setting: getattr(self, name) for name, setting in SETTINGS.items()}
        return {setting: value for setting, value in found.items() if value is not None}

    def apply(self, config: "PreTrainedConfig") -> None:
        """Sets what is not left to the checkpoint. Raises ValueError where the policy has no such setting."""
        for name, setting in SETTINGS.items():
            if name == "steps" and not hasattr(config, setting):
                setting = STOCK_SMOLVLA_STEPS
            value = getattr(self, name)
            if value is None or (not hasattr(config, setting) and value == _WITHOUT.get(name)):
                continue
            if not hasattr(config, setting):
                raise ValueError(f"policies of type {config.type!r} have no {setting}")
            setattr(config, setting, value)


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field; what is left out is the checkpoint's own setting."""
    group = parser.add_argument_group("sampling", "default: the checkpoint's own settings")
    group.add_argument("--num-inference-steps", type=at_least(1), help="network evaluations for a chunk")
    group.add_argument(
        "--sampler", choices=SAMPLERS, help="average velocities, or the stock sampler; not of stock policies"
    )
    group.add_argument(
        "--warm-start",
        type=at_least(0.0),
        help="share of the last chunk's rest in the next one's start, 0 is off, .15 the paper's; not of stock policies",
    )
    group.add_argument(
        "--test-time-samples",
        type=at_least(1),
        help="chunks drawn for an answer, which is the one in the densest place; not of stock policies",
    )
    group.add_argument(
        "--noise-temperature",
        type=at_least(0.0, at_most=1.0),
        help="factor of the noise that a chunk starts from; not of stock policies",
    )
    group.add_argument(
        "--inference-engine",
        action=argparse.BooleanOptionalAction,
        help="the fast path of `ofp` and `pi05`, on a GPU the default",
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Of the flags of `add_sampling_flags`."""
    return Sampling(**{field.name: getattr(args, SETTINGS[field.name]) for field in fields(Sampling)})
