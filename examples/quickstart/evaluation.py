"""Closed-loop success, distribution of the chunks and latency of trained policies, and of trivial baselines.

Every policy meets the same starts with the same noise. Episodes run side by side, so that one call of the policy
serves them all, and frames are drawn only where it looks: once per chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ofp_lerobot.evaluation.environments.metaworld import (
    IMAGE,
    STATE,
    STEP_RATE,
    MetaworldScene,
    Simulator,
    description,
)
from ofp_lerobot.evaluation.environments.pillar import side_of
from ofp_lerobot.evaluation.environments.quickstart import MAX_STEPS
from ofp_lerobot.evaluation.metrics import energy_distance, spread
from ofp_lerobot.evaluation.rollout import MeasuredSession, roll_out
from ofp_lerobot.evaluation.timing import milliseconds
from ofp_lerobot.inference.policies import load_policy
from ofp_lerobot.inference.sampling import Sampling
from ofp_lerobot.inference.session import Runner

from .demonstrations import Demonstrations, Recording, demonstrate, disturbances
from .report import animate

Array = NDArray[np.float32]

FILM_SIZE, FILM_EPISODES = 192, 2


@dataclass(frozen=True)
class Evaluation:
    """What is measured. Episode i starts from seed `seed` + i, which no demonstration does."""

    episodes: int = 60
    seed: int = 100_000
    max_steps: int = MAX_STEPS
    side_by_side: int = 10
    observations: int = 16  # starts at which the chunks' distribution is measured ...
    draws: int = 32  # ... and chunks drawn at each
    latency_calls: int = 40

    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


@cache
def load_runner(checkpoint: Path) -> Runner:
    """The checkpoint ready to act, once per process."""
    return Runner(load_policy(checkpoint, device="cpu"))


def runner_of(checkpoint: Path, sampling: Sampling) -> Runner:
    """The checkpoint, answering in this way."""
    runner = load_runner(checkpoint)
    sampling.apply(runner.served.config)
    return runner


def draw_noise(runner: Runner, rngs: Sequence[np.random.Generator]) -> torch.Tensor:
    """Starts of the sampler (n, samples, horizon, action), one of the n per generator."""
    config = runner.served.config
    shape = (config.test_time_samples, config.chunk_size, config.max_action_dim)
    return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))


@cache
def simulators(recording: Recording, count: int) -> list[Simulator]:
    """Simulators of the recorded task, once per process."""
    return [recording.simulator() for _ in range(count)]


class Outcome(NamedTuple):
    """One episode: whether it was solved, after how many actions, on which side of the pillar (-1 left, 1 right, 0: it
    was not passed), and frames of it where a film was asked for."""

    solved: bool
    actions: int
    side: int
    frames: list[NDArray[np.uint8]]


class Blindfolded(MetaworldScene):
    """Shows the same picture, whatever the camera sees."""

    blindfold: NDArray[np.uint8]

    def picture(self) -> NDArray[np.uint8]:
        return self.blindfold


def play_all(
    runner: Runner,
    recording: Recording,
    evaluation: Evaluation,
    seeds: Sequence[int],
    *,
    blindfold: NDArray[np.uint8] | None = None,
    film: int | None = None,
) -> list[Outcome]:
    """One episode per seed.

    blindfold (size, size, 3): what the policy sees in place of the camera's picture. film: the frames' size in pixels.
    """
    width = evaluation.side_by_side
    groups = [seeds[first : first + width] for first in range(0, len(seeds), width)]
    return [
        outcome
        for group in groups
        for outcome in _play_together(runner, recording, evaluation.max_steps, group, blindfold, film)
    ]


def _play_together(
    runner: Runner,
    recording: Recording,
    max_steps: int,
    seeds: Sequence[int],
    blindfold: NDArray[np.uint8] | None,
    film: int | None,
) -> list[Outcome]:
    prompt = description(recording.task)
    scenes = [
        (MetaworldScene if blindfold is None else Blindfolded)(env, seed, prompt, recording.image_size, film_size=film)
        for env, seed in zip(simulators(recording, len(seeds)), seeds, strict=True)
    ]
    for scene in scenes if blindfold is not None else ():
        assert isinstance(scene, Blindfolded)
        scene.blindfold = blindfold
    rngs = [np.random.default_rng(seed) for seed in seeds]
    courses = roll_out(
        runner,
        [MeasuredSession(runner.session(seed)) for seed in seeds],
        scenes,
        limit=-(-max_steps // runner.horizon) * runner.horizon,  # whole chunks
        draw_noise=lambda: draw_noise(runner, rngs),
    )
    return [
        Outcome(scene.success, course.steps, env.side, scene.frames)
        for scene, env, course in zip(scenes, simulators(recording, len(seeds)), courses, strict=True)
    ]


def play(simulator: Simulator, seed: int, actions: Array, max_steps: int) -> bool:
    """Whether these actions, executed blindly from the start `seed` draws, solve the task; the last one is held."""
    simulator.reset(seed)
    for step in range(max_steps):
        solved = simulator.step(actions[min(step, len(actions) - 1)])[1]
        if solved or simulator.touched:
            return solved
    return False


def mean_demonstration(demonstrations: Sequence[Array]) -> Array:
    """The average action at each step; a demonstration that has ended goes on with its last one."""
    length = max(map(len, demonstrations))
    return np.stack([np.concatenate([d, np.repeat(d[-1:], length - len(d), axis=0)]) for d in demonstrations]).mean(0)


def expert_chunks(recording: Recording, evaluation: Evaluation, horizon: int) -> Array:
    """(observations, draws, horizon, action): how the demonstrator begins from each start, in both styles."""
    simulator = simulators(recording, 1)[0]
    return np.stack(
        [
            [
                demonstrate(
                    simulator,
                    seed,
                    side_of(draw),
                    disturbances=disturbances(recording, draw, seed)[:horizon],
                ).actions
                for draw in range(evaluation.draws)
            ]
            for seed in evaluation.seeds()[: evaluation.observations]
        ]
    )


def policy_chunks(runner: Runner, recording: Recording, evaluation: Evaluation) -> Array:
    """(observations, draws, horizon, action): what the policy answers at the same starts."""
    simulator, prompt = simulators(recording, 1)[0], description(recording.task)
    chunks = []
    for seed in evaluation.seeds()[: evaluation.observations]:
        observation = MetaworldScene(simulator, seed, prompt, recording.image_size).observe()
        draws = range(evaluation.draws)
        sessions = [runner.session(seed, draw) for draw in draws]
        noise = draw_noise(runner, [np.random.default_rng((seed, draw)) for draw in draws])
        answers = runner.infer(sessions, [observation] * len(draws), noise)
        chunks.append(np.stack([answer.plan for answer in answers]))
    return np.stack(chunks)


# What the quickstart's worker processes run; results are plain JSON.


def measure(
    checkpoint: Path, sampling: Sampling, recording: Recording, evaluation: Evaluation, experts: Path
) -> dict[str, Any]:
    """Closed-loop episodes of a checkpoint, and how its chunks at fixed starts compare with those in `experts`."""
    runner = runner_of(checkpoint, sampling)
    outcomes = play_all(runner, recording, evaluation, evaluation.seeds())
    chunks = policy_chunks(runner, recording, evaluation)
    distances = [energy_distance(ours, theirs) for ours, theirs in zip(chunks, np.load(experts), strict=True)]
    return {**_plain(outcomes), "energy_distance": float(np.mean(distances)), "spread": spread(chunks)}


def measure_demonstrator(recording: Recording, evaluation: Evaluation, horizon: int, experts: Path) -> dict[str, Any]:
    """The demonstrator itself, undisturbed, in both styles; its chunks are saved to `experts` (.npy) for `measure`."""
    chunks = expert_chunks(recording, evaluation, horizon)
    np.save(experts, chunks)
    calm = np.zeros((evaluation.max_steps, 3))
    episodes = [
        demonstrate(simulators(recording, 1)[0], seed, side_of(seed), disturbances=calm) for seed in evaluation.seeds()
    ]
    return {
        "solved": [episode.solved for episode in episodes],
        "actions": [len(episode.actions) for episode in episodes],
        "spread": spread(chunks),
    }


def measure_blind(
    checkpoint: Path, sampling: Sampling, recording: Recording, evaluation: Evaluation, dataset: Path
) -> dict[str, Any]:
    """The same policy, shown the average of the recorded pictures whatever happens."""
    runner = runner_of(checkpoint, sampling)
    blindfold = Demonstrations(dataset).mean_image()
    return _plain(play_all(runner, recording, evaluation, evaluation.seeds(), blindfold=blindfold))


def measure_replay(recording: Recording, evaluation: Evaluation, dataset: Path) -> dict[str, Any]:
    """A randomly chosen demonstration's actions in each episode."""
    demonstrations = Demonstrations(dataset).actions()
    choices = np.random.default_rng(evaluation.seed).integers(len(demonstrations), size=evaluation.episodes)
    return _play_all(recording, evaluation, [demonstrations[i] for i in choices])


def measure_mean(recording: Recording, evaluation: Evaluation, dataset: Path) -> dict[str, Any]:
    """The average demonstration's actions in each episode."""
    average = mean_demonstration(Demonstrations(dataset).actions())
    return _play_all(recording, evaluation, [average] * evaluation.episodes)


def measure_latency(
    cases: Sequence[tuple[Path, Sampling]], recording: Recording, evaluation: Evaluation
) -> dict[str, list[float]]:
    """Median milliseconds of one chunk for one observation, from the prepared batch on; the first calls warm up."""
    size, calls = recording.image_size, evaluation.latency_calls
    shown = {IMAGE: np.full((size, size, 3), 128, dtype=np.uint8), STATE: np.zeros(4, dtype=np.float32)}
    medians = []
    for checkpoint, sampling in cases:
        runner = runner_of(checkpoint, sampling)
        served, noise = runner.served, draw_noise(runner, [np.random.default_rng(0)])
        batch = served.preprocess(runner.batch([{**shown, "task": description(recording.task)}]))
        answer = partial(served.policy.predict_action_chunk, batch, noise=noise[0])
        times = [milliseconds(answer, torch.device("cpu")) for _ in range(calls + calls // 4)]
        medians.append(median(times[calls // 4 :]))
    return {"milliseconds": medians}


def film(
    ways: Sequence[tuple[str, Path, Sampling]], recording: Recording, evaluation: Evaluation, path: Path
) -> dict[str, Any]:
    """A GIF of the first episodes, every other frame; a column for each way: its title, checkpoint and sampling."""
    columns, longest, seeds = {}, 0, evaluation.seeds()[:FILM_EPISODES]
    for title, checkpoint, sampling in ways:
        outcomes = play_all(runner_of(checkpoint, sampling), recording, evaluation, seeds, film=FILM_SIZE)
        columns[title] = [[*outcome.frames[::2], outcome.frames[-1]] for outcome in outcomes]
        longest = max(longest, *(outcome.actions for outcome in outcomes))
    animate(columns, path, STEP_RATE // recording.action_repeat // 2)
    return {"frames": longest}


def _play_all(recording: Recording, evaluation: Evaluation, plans: Sequence[Array]) -> dict[str, Any]:
    simulator = simulators(recording, 1)[0]
    return {
        "solved": [
            play(simulator, seed, plan, evaluation.max_steps)
            for seed, plan in zip(evaluation.seeds(), plans, strict=True)
        ]
    }


def _plain(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        "solved": [each.solved for each in outcomes],
        "actions": [each.actions for each in outcomes],
        "sides": [each.side for each in outcomes],
    }
