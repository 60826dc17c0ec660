"""One observation, as a robot or simulator has it, checked and turned into tensors."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

TASK = "task"  # LeRobot's key of the instruction


class ObservationError(ValueError):
    """An observation the policy cannot act on; the message names what is wrong with it."""


class Sample(NamedTuple):
    """images: feature name -> (h, w, 3) or (3, h, w) uint8 as it came, RGB; state (s,) float32; the instruction."""

    images: dict[str, Tensor]
    state: Tensor
    task: str

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """What must agree for samples to share a batch."""
        return tuple(image.shape for image in self.images.values())


class ObservationReader:
    """Knows which cameras and how many state values a policy was trained with."""

    def __init__(self, config: PreTrainedConfig, absent: Collection[str] = ()) -> None:
        """absent: cameras of the policy that a robot has not, which π₀.₅ masks out."""
        assert config.robot_state_feature is not None  # π₀.₅'s validate_features adds it where it is missing
        # Empty cameras are π₀.₅'s own placeholders of that kind.
        self.cameras = tuple(key for key in config.image_features if "empty_camera" not in key and key not in absent)
        self._shapes = {key: tuple(config.image_features[key].shape) for key in self.cameras}
        self.state_size = int(config.robot_state_feature.shape[0])

    def read(self, observation: Mapping[str, Any]) -> Sample:
        """`observation`: LeRobot's names.

        `observation.images.*` uint8 (h, w, 3) or (3, h, w) in RGB order, one for each camera of the policy;
        `observation.state` (s,) floats; `task` the instruction. Raises ObservationError for anything else.
        """
        if not isinstance(observation, Mapping):
            raise ObservationError(f"an observation is a mapping of names to values, got {type(observation).__name__}")
        expected = {*self.cameras, OBS_STATE, TASK}
        missing = sorted(expected - observation.keys())
        unknown = sorted(str(key) for key in observation.keys() - expected)
        if missing or unknown:
            told = [f"{', '.join(missing)} missing"] if missing else []
            told += [f"{', '.join(unknown)} unknown to this policy"] if unknown else []
            raise ObservationError(
                f"observation: {' and '.join(told)}; its cameras are {', '.join(self.cameras)}, its other keys "
                f"{OBS_STATE} and {TASK}"
            )
        return Sample(
            images={key: _image(key, observation[key]) for key in self.cameras},
            state=self._state(observation[OBS_STATE]),
            task=_task(observation[TASK]),
        )

    def blank(self, resolution: tuple[int, int] | None = None) -> dict[str, Any]:
        """An observation that shows nothing, to warm up with. resolution: the training data's by default."""
        return {
            **{
                key: np.zeros(shape if resolution is None else (3, *resolution), np.uint8)
                for key, shape in self._shapes.items()
            },
            OBS_STATE: np.zeros(self.state_size, np.float32),
            TASK: "warm up",
        }

    def _state(self, value: Any) -> Tensor:
        state = np.asarray(value)
        if state.dtype.kind != "f":
            raise ObservationError(f"{OBS_STATE} must be floats, got {state.dtype}")
        if state.shape != (self.state_size,):
            raise ObservationError(
                f"{OBS_STATE} must have {self.state_size} values, shape ({self.state_size},), got {state.shape}"
            )
        with np.errstate(over="ignore"):
            state = state.astype(np.float32)
        if not np.isfinite(state).all():
            bad = np.flatnonzero(~np.isfinite(state)).tolist()
            raise ObservationError(f"{OBS_STATE} has NaN or infinite values at {bad}")
        return torch.from_numpy(state)


def _image(key: str, value: Any) -> Tensor:
    image = np.asarray(value)
    if image.dtype != np.uint8:
        raise ObservationError(f"{key} must be uint8 in 0 ... 255, got {image.dtype}")
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]) or 0 in image.shape:
        raise ObservationError(
            f"{key} must be an RGB image, (height, width, 3) or (3, height, width), got {image.shape}"
        )
    if image.shape[0] == image.shape[2] == 3:
        raise ObservationError(f"{key} could be (height, width, 3) or (3, height, width): its shape is {image.shape}")
    # What comes off a wire is read-only, which PyTorch does not know.
    return torch.from_numpy(np.require(image, requirements=["C", "W"]))


def _task(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ObservationError(f"{TASK} must be the instruction, a string that is not empty, got {value!r}"[:200])
    return str(value)


def collate(samples: list[Sample]) -> dict[str, Any]:
    """A batch for `ServedPolicy.preprocess`, of samples whose `shapes` agree."""
    return {
        **{key: _stack([sample.images[key] for sample in samples]) for key in samples[0].images},
        OBS_STATE: torch.stack([sample.state for sample in samples]),
        TASK: [sample.task for sample in samples],
    }


def _stack(images: list[Tensor]) -> Tensor:
    """One robot's images are not copied."""
    return images[0][None] if len(images) == 1 else torch.stack(images)
