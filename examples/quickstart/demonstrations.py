"""Demonstrations of a MetaWorld task in two styles, recorded as a LeRobotDataset.

A pillar stands between the hand and a button. From the same start the hand goes round it, to the left or to the right,
and then follows MetaWorld's scripted expert. So the actions have two modes, and their average runs into the pillar. In
some episodes what is executed is noisy, which shows the policy how to recover. The recorded action is the
demonstrator's all the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
    state_of,
)
from ofp_lerobot.evaluation.environments.pillar import TASK, AroundPillar, Pillar, side_of
from ofp_lerobot.evaluation.environments.quickstart import ACTION_REPEAT, CAMERA, IMAGE_SIZE, MAX_STEPS
from ofp_lerobot.evaluation.pools import process_pool

ACTION = "action"
REPO_ID = "local/quickstart"


@dataclass(frozen=True)
class Recording:
    """What is recorded. Episode i starts from seed `seed` + i; styles and noise alternate."""

    task: str = TASK
    camera: str = CAMERA
    image_size: int = IMAGE_SIZE
    action_repeat: int = ACTION_REPEAT
    episodes: int = 160
    seed: int = 0
    pillar: Pillar = field(default_factory=Pillar)
    noise: float = 0.3  # standard deviation added to the executed displacement, in every other pair of episodes
    max_steps: int = MAX_STEPS

    def simulator(self) -> Simulator:
        """The task with its pillar."""
        return Simulator(self.task, self.camera, self.action_repeat, pillar=self.pillar)


class Episode(NamedTuple):
    """images (steps, size, size, 3) uint8, empty where not rendered; states, actions (steps, 4) float32."""

    images: NDArray[np.uint8]
    states: NDArray[np.float32]
    actions: NDArray[np.float32]
    solved: bool


def demonstrate(
    simulator: Simulator,
    seed: int,
    side: int,
    *,
    disturbances: NDArray[np.float64],
    image_size: int | None = None,
) -> Episode:
    """One episode from the start `seed` draws, until it is over or the disturbances (steps, 3) end.

    With `image_size` None without pictures.
    """
    raw = simulator.reset(seed)
    assert simulator.pillar is not None
    demonstrator = AroundPillar(expert(simulator.task), simulator.pillar, raw, side)
    images, states, actions, solved = [], [], [], False
    for disturbance in disturbances:
        if image_size is not None:
            images.append(simulator.render(image_size))
        states.append(state_of(raw))
        action = demonstrator(raw)
        actions.append(action.astype(np.float32))
        executed = action.copy()
        executed[:3] += disturbance
        raw, solved = simulator.step(executed)
        if solved or simulator.touched:
            break
    return Episode(np.array(images, dtype=np.uint8), np.stack(states), np.stack(actions), solved)


def disturbances(recording: Recording, index: int, seed: int | None = None) -> NDArray[np.float64]:
    """What is added to the displacements that episode `index` executes: (max_steps, 3), zero in calm episodes."""
    if index // 2 % 2 == 0:
        return np.zeros((recording.max_steps, 3))
    rng = np.random.default_rng((recording.seed if seed is None else seed, index))
    return recording.noise * rng.normal(size=(recording.max_steps, 3))


def record(recording: Recording, root: Path, processes: int) -> Iterator[int]:
    """Records into the LeRobotDataset at `root` and yields the length of each episode as it is saved.

    Raises RuntimeError where the demonstrator does not solve its task.
    """
    from lerobot.datasets import LeRobotDataset

    size = recording.image_size
    features = {
        IMAGE: {"dtype": "image", "shape": (size, size, 3), "names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": (STATE_DIM,), "names": ["x", "y", "z", "gripper"]},
        ACTION: {"dtype": "float32", "shape": (ACTION_DIM,), "names": ["dx", "dy", "dz", "gripper"]},
    }
    dataset = LeRobotDataset.create(
        REPO_ID, STEP_RATE // recording.action_repeat, features, root=root, use_videos=False
    )
    prompt = description(recording.task)
    with process_pool(processes, _start_worker, recording) as pool:
        for index, episode in enumerate(pool.map(_record_episode, range(recording.episodes))):
            if not episode.solved:
                raise RuntimeError(
                    f"the demonstrator did not solve {recording.task} in episode {index}: it touched the pillar, or "
                    f"{recording.max_steps} steps were too few. In `Recording` take another pillar, less noise or more"
                )
            for image, state, action in zip(episode.images, episode.states, episode.actions, strict=True):
                dataset.add_frame({IMAGE: image, STATE: state, ACTION: action, "task": prompt})
            dataset.save_episode()
            yield len(episode.actions)
    dataset.finalize()


class Demonstrations:
    """A recorded dataset, read back."""

    def __init__(self, root: Path) -> None:
        from lerobot.datasets import LeRobotDataset

        self._dataset = LeRobotDataset(REPO_ID, root=root)

    def actions(self) -> list[NDArray[np.float32]]:
        """(steps, action) of each episode."""
        columns = self._dataset.hf_dataset.with_format("numpy", columns=[ACTION, "episode_index"])[:]
        ends = np.flatnonzero(np.diff(columns["episode_index"])) + 1
        return np.split(np.stack(columns[ACTION]), ends)

    def mean_image(self, samples: int = 300) -> NDArray[np.uint8]:
        """The average of recorded pictures, (size, size, 3)."""
        chosen = np.linspace(0, len(self._dataset) - 1, samples).astype(int)
        mean = np.mean([self._dataset[int(i)][IMAGE].numpy() for i in chosen], axis=0)
        return np.round(255 * mean.transpose(1, 2, 0)).astype(np.uint8)


_recording: Recording
_simulator: Simulator


def _start_worker(recording: Recording) -> None:
    global _recording, _simulator
    _recording = recording
    _simulator = recording.simulator()


def _record_episode(index: int) -> Episode:
    return demonstrate(
        _simulator,
        _recording.seed + index,
        side_of(index),
        disturbances=disturbances(_recording, index),
        image_size=_recording.image_size,
    )
