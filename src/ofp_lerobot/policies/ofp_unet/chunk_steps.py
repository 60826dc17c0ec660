"""Every step of a chunk normalised by itself.

LeRobot normalises all steps of a chunk by the same statistics. Where actions are relative to the state at the chunk's
start, the first ones are small beside the last ones and are learned last, though a robot executes them first.

Shapes: actions (…, steps, action), the chunk's first step first; normalised is what LeRobot's processors made of them.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from ..normalisation import BOUNDS, flat, normalise
from ..relative import relative_dimensions

SMALLEST = 0.01
"""The least deviation of a step, as a share of its dimension's over all steps: what hardly moves is not blown up."""
_OFF = "--policy.normalize_each_step=false"
_CONSTANT = 1e-6  # the largest deviation of a dimension that does not move


class ChunkSteps(nn.Module):
    """Mean and deviation of every step, (horizon, action) each, part of a checkpoint; NaN until they are set."""

    mean: Tensor
    std: Tensor

    def __init__(self, horizon: int, actions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((horizon, actions), torch.nan))
        self.register_buffer("std", torch.full((horizon, actions), torch.nan))

    @property
    def is_set(self) -> bool:
        return bool(self.mean.isfinite().all())

    def set(self, mean: np.ndarray, std: np.ndarray) -> None:
        """mean, std (horizon, action): of normalised actions, as of `measure_steps`."""
        self.mean.copy_(torch.as_tensor(mean))
        self.std.copy_(torch.as_tensor(std))

    def apply_to(self, actions: Tensor) -> Tensor:
        """Normalised actions (…, horizon, action) with every step normalised by itself."""
        return (actions - self.mean) / self.std

    def undo(self, actions: Tensor) -> Tensor:
        """Back to normalised actions."""
        return actions * self.std + self.mean


def measure_steps(
    config: Any,
    metadata: Any,
    statistics: Mapping[str, Mapping[str, Any]],
    episodes: Collection[int] | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, (horizon, action) each, of every step of a LeRobotDataset's chunks as the policy gets them.

    config: a policy's. statistics: what its normalisation uses. episodes: those that are measured, None for all. names:
    the dataset's names of features, by the policy's, where they differ. Steps past an episode's end do not count. No
    deviation is below `SMALLEST` of its dimension's, and one that never moves has 1. Raises ValueError where the
    dataset is not on this machine, or does not have what is measured.
    """
    size, horizon = config.output_features[ACTION].shape[0], config.chunk_size
    moving = relative_dimensions(config, size) if config.use_relative_actions else np.zeros(size, bool)
    columns = [(names or {}).get(name, name) for name in ((ACTION, OBS_STATE) if moving.any() else (ACTION,))]
    low, high, mode = _normalisation(config, statistics)
    count, total, squares = np.zeros((horizon, 1)), np.zeros((horizon, size)), np.zeros((horizon, size))
    for episode, actions, *states in _read(metadata, episodes, columns):
        origin = np.zeros_like(actions)
        if states:
            origin[:, moving] = states[0][:, :size][:, moving]
        for step in range(min(horizon, len(actions))):
            starts = np.flatnonzero(episode[: len(episode) - step] == episode[step:])
            values = actions[starts + step] - origin[starts]
            if mode is not None:
                values = normalise(values, low, high, mode)
            count[step] += len(values)
            total[step] += values.sum(axis=0, dtype=np.float64)
            squares[step] += np.square(values, dtype=np.float64).sum(axis=0)
    if not count.all():
        raise ValueError(
            f"normalize_each_step: the dataset's episodes are all shorter than a chunk of {horizon}: set a smaller "
            f"--policy.horizon, or {_OFF}"
        )
    mean, deviation = total / count, _deviation(count, total, squares)
    whole = _deviation(*(x.sum(axis=0) for x in (count, total, squares)))
    return mean, np.where(whole > _CONSTANT, np.maximum(deviation, SMALLEST * whole), 1.0)


def _deviation(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(squares / count - np.square(total / count), 0.0))


def _normalisation(
    config: Any, statistics: Mapping[str, Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray, NormalizationMode] | tuple[None, None, None]:
    """Of the actions: the two statistics that LeRobot's formula takes, and its mode; None where it leaves them."""
    mode = config.normalization_mapping.get(FeatureType.ACTION, NormalizationMode.IDENTITY)
    known = statistics.get(ACTION, {})
    if mode not in BOUNDS or not set(BOUNDS[mode]) <= known.keys():
        return None, None, None
    low, high = (flat(known[name]) for name in BOUNDS[mode])
    return low, high, mode


def _read(metadata: Any, episodes: Collection[int] | None, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """By file: the episodes (n,) of its frames, and their `columns` (n, size)."""
    chosen = range(metadata.total_episodes) if episodes is None else episodes
    for path in sorted({metadata.root / metadata.get_data_file_path(i) for i in chosen}):
        if not path.is_file():
            raise ValueError(
                f"normalize_each_step reads the whole dataset, of which {path} is not on this machine: set "
                f"--dataset.streaming=false, or {_OFF}"
            )
        if missing := sorted(set(columns) - set(pq.read_schema(path).names)):
            raise ValueError(f"normalize_each_step finds no {' and '.join(missing)} in {path}: set {_OFF}")
        filters = None if episodes is None else [("episode_index", "in", sorted(episodes))]
        table = pq.read_table(path, columns=[*columns, "episode_index"], filters=filters)
        values = (np.stack(table[name].to_numpy()).astype(np.float64) for name in columns)
        yield table["episode_index"].to_numpy(), *values
