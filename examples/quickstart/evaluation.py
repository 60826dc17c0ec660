"""Closed-loop success, distribution of the chunks and latency of trained policies, and of trivial baselines.

Every policy meets the same starts with the same noise. Episodes run side by side, so that one call of the policy
serves them all, and frames are drawn only where it looks: once per chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ofp_lerobot.evaluation.environments.metaworld import STEP_RATE, Simulator, description, state_of

from .demonstrations import IMAGE, STATE, Demonstrations, Recording, demonstrate, disturbances
from .report import animate

if TYPE_CHECKING:
    pass

Array = NDArray[np.float32]

FILM_SIZE, FILM_EPISODES = 160, 4


@dataclass(frozen=True)
class Evaluation:
    """What is measured. Episode i starts from seed `seed` + i, which no demonstration does."""

    episodes: int = 60
    seed: int = 100_000
    max_steps: int = 150
    side_by_side: int = 10
    observations: int = 16  # starts at which the chunks' distribution is measured ...
    draws: int = 32  # ... and chunks drawn at each
    latency_calls: int = 40

    def seeds(self) -> range:
        return range(self.seed, self.seed + self.episodes)


class Sampling(NamedTuple):
    """How a checkpoint answers; `warm_start` as in the policy's configuration."""

    sampler: str
    steps: int
    warm_start: float = 0.0


class Actor:
    """A checkpoint with its processors: observations in, chunks out."""

    def __init__(self, checkpoint: Path, task: str) -> None:
        from lerobot.policies.factory import make_pre_post_processors

        from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy

        self.policy: OFPPolicy = OFPPolicy.from_pretrained(checkpoint)
        self._prepare, self._finish = make_pre_post_processors(self.policy.config, pretrained_path=str(checkpoint))
        self._prompt = description(task)

    def use(self, sampling: Sampling) -> None:
        config = self.policy.config
        config.sampler, config.num_inference_steps, config.warm_start = sampling

    def prepare(self, images: NDArray[np.uint8], states: Array) -> dict[str, Any]:
        """images (n, size, size, 3), states (n, 4) -> the policy's batch."""
        import torch

        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        return self._prepare({IMAGE: pixels, STATE: torch.from_numpy(states), "task": [self._prompt] * len(states)})

    def noise(self, rngs: Sequence[np.random.Generator]) -> Any:
        """One start of the sampler (horizon, action) per generator."""
        import torch

        config = self.policy.config
        shape = (config.chunk_size, config.max_action_dim)
        return torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs]))

    def act(self, batch: dict[str, Any], noise: Any, rest: Any = None) -> tuple[Array, Any]:
        """Chunks of actions (n, horizon, action), and what `rest` is next time: the unexecuted part, normalised."""
        chunk = self.policy.predict_action_chunk(batch, noise=noise, prev_chunk_left_over=rest)
        return self._finish(chunk).numpy(), chunk[:, self.policy.config.n_action_steps :]


@cache
def load_actor(checkpoint: Path, task: str) -> Actor:
    """An `Actor`, once per process."""
    return Actor(checkpoint, task)


@cache
def simulators(recording: Recording, count: int) -> list[Simulator]:
    """Simulators of the recorded task, once per process."""
    return [Simulator(recording.task, recording.camera, recording.action_repeat) for _ in range(count)]


class Outcome(NamedTuple):
    """One episode: whether it was solved, after how many actions, and frames of it where a film was asked for."""

    solved: bool
    actions: int
    frames: list[NDArray[np.uint8]]


def roll_out(
    actor: Actor,
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
        for outcome in _roll_out_together(actor, recording, evaluation.max_steps, group, blindfold, film)
    ]


def _roll_out_together(
    actor: Actor,
    recording: Recording,
    max_steps: int,
    seeds: Sequence[int],
    blindfold: NDArray[np.uint8] | None,
    film: int | None,
) -> list[Outcome]:
    envs = simulators(recording, len(seeds))
    rngs = [np.random.default_rng(seed) for seed in seeds]
    states = np.stack([state_of(env.reset(seed)) for env, seed in zip(envs, seeds, strict=True)])
    images = np.zeros((len(seeds), recording.image_size, recording.image_size, 3), dtype=np.uint8)
    solved, lengths = [False] * len(seeds), [0] * len(seeds)
    frames: list[list[NDArray[np.uint8]]] = [[] for _ in seeds]
    executed, rest = actor.policy.config.n_action_steps, None
    while not all(solved) and max(lengths) < max_steps:
        for i, env in enumerate(envs):
            if not solved[i]:
                images[i] = env.render(recording.image_size) if blindfold is None else blindfold
        chunks, rest = actor.act(actor.prepare(images, states), actor.noise(rngs), rest)
        for i, env in enumerate(envs):
            for action in chunks[i, :executed]:
                if solved[i]:
                    break
                raw, solved[i] = env.step(action)
                states[i] = state_of(raw)
                lengths[i] += 1
                if film is not None:
                    frames[i].append(env.render(film))
    return [Outcome(*each) for each in zip(solved, lengths, frames, strict=True)]


def play(simulator: Simulator, seed: int, actions: Array, max_steps: int) -> bool:
    """Whether these actions, executed blindly from the start `seed` draws, solve the task; the last one is held."""
    simulator.reset(seed)
    return any(simulator.step(actions[min(step, len(actions) - 1)])[1] for step in range(max_steps))


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
                    recording.detours[draw % 2],
                    disturbances=disturbances(recording, draw, seed)[:horizon],
                ).actions
                for draw in range(evaluation.draws)
            ]
            for seed in evaluation.seeds()[: evaluation.observations]
        ]
    )


def policy_chunks(actor: Actor, recording: Recording, evaluation: Evaluation) -> Array:
    """(observations, draws, horizon, action): what the policy answers at the same starts."""
    simulator = simulators(recording, 1)[0]
    chunks = []
    for seed in evaluation.seeds()[: evaluation.observations]:
        state = state_of(simulator.reset(seed))
        image = simulator.render(recording.image_size)
        rngs = [np.random.default_rng((seed, draw)) for draw in range(evaluation.draws)]
        batch = actor.prepare(np.stack([image] * len(rngs)), np.stack([state] * len(rngs)))
        chunks.append(actor.act(batch, actor.noise(rngs))[0])
    return np.stack(chunks)


def energy_distance(samples: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """2·E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖, 0 in the mean where X and Y have one distribution.

    X is estimated from independent draws `samples` (n, ...); Y is drawn from `reference` (m, ...), which need not be
    independent draws. Distances are root mean squares over the elements, so in units of one action.
    """

    def distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
        gap = a.reshape(len(a), 1, -1) - b.reshape(1, len(b), -1)
        return np.sqrt(np.mean(gap**2, axis=-1))

    own = distances(samples, samples).sum() / (len(samples) * (len(samples) - 1))
    return float(2 * distances(samples, reference).mean() - own - distances(reference, reference).mean())


def spread(chunks: NDArray[np.floating]) -> float:
    """Root mean square standard deviation over the draws of chunks (observations, draws, ...)."""
    return float(np.sqrt(np.mean(np.var(chunks, axis=1, ddof=1))))


# What the quickstart's worker processes run; results are plain JSON.


def measure(
    checkpoint: Path, sampling: Sampling, recording: Recording, evaluation: Evaluation, experts: Path
) -> dict[str, Any]:
    """Closed-loop episodes of a checkpoint, and how its chunks at fixed starts compare with those in `experts`."""
    actor = load_actor(checkpoint, recording.task)
    actor.use(sampling)
    outcomes = roll_out(actor, recording, evaluation, evaluation.seeds())
    chunks = policy_chunks(actor, recording, evaluation)
    distances = [energy_distance(own, theirs) for own, theirs in zip(chunks, np.load(experts), strict=True)]
    return {**_plain(outcomes), "energy_distance": float(np.mean(distances)), "spread": spread(chunks)}


def measure_demonstrator(recording: Recording, evaluation: Evaluation, horizon: int, experts: Path) -> dict[str, Any]:
    """The demonstrator itself, undisturbed, in both styles; its chunks are saved to `experts` (.npy) for `measure`."""
    chunks = expert_chunks(recording, evaluation, horizon)
    np.save(experts, chunks)
    calm = np.zeros((evaluation.max_steps, 3))
    episodes = [
        demonstrate(simulators(recording, 1)[0], seed, recording.detours[seed % 2], disturbances=calm)
        for seed in evaluation.seeds()
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
    actor = load_actor(checkpoint, recording.task)
    actor.use(sampling)
    blindfold = Demonstrations(dataset).mean_image()
    return _plain(roll_out(actor, recording, evaluation, evaluation.seeds(), blindfold=blindfold))


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
    medians = []
    for checkpoint, sampling in cases:
        actor = load_actor(checkpoint, recording.task)
        actor.use(sampling)
        batch = actor.prepare(np.full((1, size, size, 3), 128, dtype=np.uint8), np.zeros((1, 4), dtype=np.float32))
        noise = actor.noise([np.random.default_rng(0)])
        times = []
        for _ in range(calls + calls // 4):
            start = perf_counter()
            actor.policy.predict_action_chunk(batch, noise=noise)
            times.append(1e3 * (perf_counter() - start))
        medians.append(median(times[calls // 4 :]))
    return {"milliseconds": medians}


def film(
    checkpoint: Path, sampling: Sampling, recording: Recording, evaluation: Evaluation, path: Path
) -> dict[str, Any]:
    """A GIF of the first episodes, every other frame."""
    actor = load_actor(checkpoint, recording.task)
    actor.use(sampling)
    seeds = evaluation.seeds()[:FILM_EPISODES]
    outcomes = roll_out(actor, recording, evaluation, seeds, film=FILM_SIZE)
    rate = STEP_RATE // recording.action_repeat // 2
    animate([[*outcome.frames[::2], outcome.frames[-1]] for outcome in outcomes], path, rate)
    return {"frames": max(outcome.actions for outcome in outcomes)}


def _play_all(recording: Recording, evaluation: Evaluation, plans: Sequence[Array]) -> dict[str, Any]:
    simulator = simulators(recording, 1)[0]
    return {
        "solved": [
            play(simulator, seed, plan, evaluation.max_steps)
            for seed, plan in zip(evaluation.seeds(), plans, strict=True)
        ]
    }


def _plain(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {"solved": [each.solved for each in outcomes], "actions": [each.actions for each in outcomes]}
