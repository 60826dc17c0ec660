"""Closed-loop success, distribution of the chunks and latency of trained policies, and of trivial baselines.

Every policy meets the same starts with the same noise. Episodes run side by side, so that one call of the policy
serves them all, and frames are drawn only where it looks: once per chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import NormalDist, median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .demonstrations import IMAGE, STATE, Recording, demonstrate
from .simulator import Simulator, description, state_of

if TYPE_CHECKING:
    from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """What is measured. Episode i starts from seed `seed` + i, which no demonstration does."""

    episodes: int = 40
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
    return Actor(checkpoint, task)


@cache
def simulators(recording: Recording, count: int) -> list[Simulator]:
    return [Simulator(recording.task, recording.camera, recording.action_repeat) for _ in range(count)]


def roll_out(
    actor: Actor,
    recording: Recording,
    evaluation: Evaluation,
    seeds: Sequence[int],
    *,
    blindfold: NDArray[np.uint8] | None = None,
    film: int = 0,
) -> Iterator[tuple[bool, list[NDArray[np.uint8]]]]:
    """Runs one episode per seed: whether it solved the task, and `film` pixels wide frames of it (0: none).

    blindfold (size, size, 3): what the policy sees in place of the camera's picture.
    """
    width = min(evaluation.side_by_side, len(seeds))
    for first in range(0, len(seeds), width):
        group = seeds[first : first + width]
        yield from _roll_out_group(actor, recording, evaluation.max_steps, group, blindfold, film)


def _roll_out_group(
    actor: Actor,
    recording: Recording,
    max_steps: int,
    seeds: Sequence[int],
    blindfold: NDArray[np.uint8] | None,
    film: int,
) -> list[tuple[bool, list[NDArray[np.uint8]]]]:
    envs = simulators(recording, len(seeds))
    rngs = [np.random.default_rng(seed) for seed in seeds]
    states = [state_of(env.reset(seed)) for env, seed in zip(envs, seeds, strict=True)]
    images = np.zeros((len(seeds), recording.image_size, recording.image_size, 3), dtype=np.uint8)
    solved = [False] * len(seeds)
    frames: list[list[NDArray[np.uint8]]] = [[] for _ in seeds]
    executed, rest = actor.policy.config.n_action_steps, None
    for _ in range(0, max_steps, executed):
        for i, env in enumerate(envs):
            if not solved[i]:
                images[i] = env.render(recording.image_size) if blindfold is None else blindfold
        chunks, rest = actor.act(actor.prepare(images, np.stack(states)), actor.noise(rngs), rest)
        for i, env in enumerate(envs):
            for action in chunks[i, :executed]:
                if solved[i]:
                    break
                raw, solved[i] = env.step(action)
                states[i] = state_of(raw)
                if film:
                    frames[i].append(env.render(film))
        if all(solved):
            break
    return list(zip(solved, frames, strict=True))


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
                    recording.styles[draw % 2],
                    noise=recording.noise * (draw // 2 % 2),
                    rng=np.random.default_rng((seed, draw)),
                    max_steps=horizon,
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


def energy_distance(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """2·E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖ of samples x (n, ...) and y (m, ...): 0 in the mean for equal distributions.

    Distances are root mean squares over the elements, so in units of one action.
    """

    def distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
        gap = a.reshape(len(a), 1, -1) - b.reshape(1, len(b), -1)
        return np.sqrt(np.mean(gap**2, axis=-1))

    def within(a: NDArray[np.floating]) -> float:
        return float(distances(a, a).sum() / (len(a) * (len(a) - 1)))

    return float(2 * distances(x, y).mean()) - within(x) - within(y)


def spread(chunks: NDArray[np.floating]) -> float:
    """Root mean square standard deviation over the draws of chunks (observations, draws, ...)."""
    return float(np.sqrt(np.mean(np.var(chunks, axis=1, ddof=1))))


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, scale = successes / episodes, 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def latency(actor: Actor, recording: Recording, calls: int) -> float:
    """Median milliseconds of one chunk for one observation, from the prepared batch on; an eighth warms up."""
    size = recording.image_size
    batch = actor.prepare(np.full((1, size, size, 3), 128, dtype=np.uint8), np.zeros((1, 4), dtype=np.float32))
    noise = actor.noise([np.random.default_rng(0)])
    times = []
    for _ in range(calls):
        start = perf_counter()
        actor.policy.predict_action_chunk(batch, noise=noise)
        times.append(1e3 * (perf_counter() - start))
    return median(times[calls // 8 :])
