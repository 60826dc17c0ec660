"""Demonstrations of MetaWorld's scripted experts, one LeRobotDataset for each task and condition.

"clean" records the expert. "noisy" is a demonstrator of mixed quality: every episode has a pace of its own, and what it
does, and what is recorded, is disturbed. "styles" goes round a pillar, left in half of the episodes and right in the
others, so that the mean of the demonstrations is no solution; what is executed is disturbed in some, what is recorded
is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ofp_lerobot.evaluation.environments.metaworld import (
    ACTION_DIM,
    IMAGE,
    STATE,
    STATE_DIM,
    STEP_RATE,
    Simulator,
    description,
    expert,
)
from ofp_lerobot.evaluation.environments.pillar import TASK, AroundPillar, Pillar, side_of

ACTION = "action"
RAW_DIM = 39
CONDITIONS = ("clean", "noisy", "styles")
# Two of each of LeRobot's four levels of difficulty, from easy to very hard.
SUBSET = (
    "dial-turn-v3",
    "window-open-v3",
    "hammer-v3",
    "peg-insert-side-v3",
    "push-v3",
    "assembly-v3",
    "stick-push-v3",
    "disassemble-v3",
)
STYLED = (TASK,)  # where there is room for the pillar between hand and task
STYLES_NOISE = 0.3  # standard deviation of what disturbs every other pair of the styles' episodes
LEAST_STD = 1e-3  # dimensions of the raw observation that move less are left out

Array = NDArray[np.float32]
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Recording:
    """How a task is demonstrated. Starts are drawn from `seed` on, failures are left out."""

    episodes: int = 50
    seed: int = 0
    action_repeat: int = 2
    max_steps: int = 150
    noise: float = 0.15  # standard deviation of the noisy demonstrator's displacements ...
    slowest: float = 0.6  # ... and the slowest of its paces, U(slowest, 1)
    image_size: int = 0  # pixels of a picture of every step; 0: none


class Episode(NamedTuple):
    """observations (steps, RAW_DIM) and actions (steps, ACTION_DIM), float32; images (steps, size, size, 3)."""

    observations: Array
    actions: Array
    images: Pictures | None = None


def simulator_of(task: str, condition: str, recording: Recording, renderers: dict[int, Any] | None = None) -> Simulator:
    """The task as a condition sets it up."""
    pillar = Pillar() if condition == "styles" else None
    return Simulator(task, action_repeat=recording.action_repeat, renderers=renderers, pillar=pillar)


class Demonstrator:
    """The expert under a condition; one for each episode, which begins at the raw observation `start`.

    number: of the episode; styles alternate with it.
    """

    def __init__(
        self,
        simulator: Simulator,
        condition: str,
        recording: Recording,
        rng: np.random.Generator,
        start: NDArray[np.float64],
        number: int,
    ) -> None:
        self._expert, self._rng = expert(simulator.task), rng
        if simulator.pillar is not None:
            self._expert = AroundPillar(self._expert, simulator.pillar, start, side_of(number))
        self._noise = recording.noise if condition == "noisy" else 0.0
        self._pace = rng.uniform(recording.slowest, 1) if condition == "noisy" else 1.0
        self._disturbed = STYLES_NOISE if condition == "styles" and number // 2 % 2 else 0.0

    def execute(self, action: Array) -> Array:
        """What is executed of an action: of the styles' every other pair a disturbed one."""
        if not self._disturbed:
            return action
        return action + self._disturbed * self._rng.normal(size=4).astype(np.float32) * (1, 1, 1, 0)

    def __call__(self, raw: NDArray[np.float64]) -> Array:
        action = self._expert(raw)
        action[:3] = self._pace * action[:3] + self._noise * self._rng.normal(size=3)
        return np.clip(action, -1, 1).astype(np.float32)


def demonstrate(
    simulator: Simulator, seed: int, condition: str, recording: Recording, *, draw: int = 0, steps: int | None = None
) -> tuple[Episode, bool]:
    """One episode from the start `seed` draws, and whether it solved the task; with `steps` only its beginning."""
    raw, observations, actions, images, solved = simulator.reset(seed), [], [], [], False
    rng = np.random.default_rng((seed, draw))
    demonstrator = Demonstrator(simulator, condition, recording, rng, raw, seed + draw)
    for _ in range(steps or recording.max_steps):
        observations.append(raw.astype(np.float32))
        if recording.image_size:
            images.append(simulator.render(recording.image_size))
        actions.append(demonstrator(raw))
        raw, done = simulator.step(demonstrator.execute(actions[-1]))
        solved = solved or done
        if (solved or simulator.touched) and steps is None:
            break
    return Episode(np.stack(observations), np.stack(actions), np.stack(images) if images else None), solved


def record(task: str, condition: str, recording: Recording, root: Path) -> dict[str, int]:
    """Writes the LeRobotDataset of a task and condition to `root`; counts of episodes, frames and failures.

    Raises RuntimeError where the demonstrator fails more often than it succeeds.
    """
    from lerobot.datasets import LeRobotDataset

    size = recording.image_size
    features: dict[str, dict[str, Any]] = {
        STATE: {"dtype": "float32", "shape": (RAW_DIM,), "names": [f"raw{i}" for i in range(RAW_DIM)]},
        ACTION: {"dtype": "float32", "shape": (ACTION_DIM,), "names": ["dx", "dy", "dz", "gripper"]},
    }
    if size:
        features[IMAGE] = {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]}
    rate, prompt = STEP_RATE // recording.action_repeat, description(task)
    dataset = LeRobotDataset.create(f"local/{task}", rate, features, root=root, use_videos=False)
    simulator = simulator_of(task, condition, recording)
    saved, frames, failures = 0, 0, 0
    while saved < recording.episodes:
        episode, solved = demonstrate(simulator, recording.seed + saved + failures, condition, recording)
        if not solved:
            failures += 1
            if failures > recording.episodes:
                raise RuntimeError(f"the {condition} demonstrator solves {task} too rarely: leave the task out")
            continue
        for step, (observation, action) in enumerate(zip(episode.observations, episode.actions, strict=True)):
            picture = {} if episode.images is None else {IMAGE: episode.images[step]}
            dataset.add_frame({STATE: observation, ACTION: action, **picture, "task": prompt})
        dataset.save_episode()
        saved, frames = saved + 1, frames + len(episode.actions)
    dataset.finalize()
    return {"episodes": saved, "frames": frames, "failures": failures}


def read(roots: Sequence[tuple[str, Path]]) -> list[list[Episode]]:
    """The episodes of every (task, dataset)."""
    from lerobot.datasets import LeRobotDataset

    tasks = []
    for task, root in roots:
        dataset = LeRobotDataset(f"local/{task}", root=root).hf_dataset
        names = {STATE: np.float32, ACTION: np.float32, IMAGE: np.uint8}
        names = {name: kind for name, kind in names.items() if name in dataset.column_names}
        columns = dataset.with_format("numpy", columns=[*names, "episode_index"])[:]
        ends = np.flatnonzero(np.diff(columns["episode_index"])) + 1
        parts = (np.split(np.stack(columns[name]).astype(kind, copy=False), ends) for name, kind in names.items())
        tasks.append([Episode(*each) for each in zip(*parts, strict=True)])
    return tasks


@dataclass(frozen=True)
class View:
    """What a policy sees of a raw observation: some dimensions, and which of the tasks it is, one-hot.

    image_size: pixels of the picture that it sees beside; 0: none.
    """

    dimensions: tuple[int, ...]
    tasks: tuple[str, ...]
    image_size: int = 0

    @property
    def size(self) -> int:
        return len(self.dimensions) + (len(self.tasks) if len(self.tasks) > 1 else 0)

    def __call__(self, raw: NDArray[np.floating], task: str) -> Array:
        """(..., RAW_DIM) -> (..., size)."""
        seen = raw[..., list(self.dimensions)].astype(np.float32)
        if len(self.tasks) == 1:
            return seen
        one_hot = np.zeros((*seen.shape[:-1], len(self.tasks)), dtype=np.float32)
        one_hot[..., self.tasks.index(task)] = 1
        return np.concatenate([seen, one_hot], axis=-1)


def view_of(tasks: Sequence[str], episodes: Sequence[Sequence[Episode]]) -> View:
    """The view that these demonstrations call for: what varies, with pictures only of the robot's own state."""
    images = episodes[0][0].images
    known, size = (RAW_DIM, 0) if images is None else (STATE_DIM, images.shape[1])
    everything = np.concatenate([episode.observations[:, :known] for task in episodes for episode in task])
    return View(tuple(int(i) for i in np.flatnonzero(everything.std(axis=0) > LEAST_STD)), tuple(tasks), size)
