"""Closed-loop success, and the chunks' distribution and jumps, of trained checkpoints."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.quickstart.evaluation import energy_distance, spread
from ofp_lerobot.evaluation.environments.metaworld import Simulator

from . import diffusion
from .demonstrations import IMAGE, STATE, Array, Pictures, Recording, View, demonstrate
from .training import as_seen


@dataclass(frozen=True)
class Evaluation:
    """Episode i starts from seed `seed` + i, which no demonstration does; every policy meets the same noise."""

    episodes: int = 50
    seed: int = 100_000
    max_steps: int = 150
    side_by_side: int = 10
    observations: int = 16  # starts at which the chunks' distribution is measured ...
    draws: int = 32  # ... and chunks drawn at each


class Sampling(NamedTuple):
    """How a checkpoint answers."""

    sampler: str
    steps: int
    warm_start: float = 0.0
    samples: int = 1  # of which the one in the densest place is taken
    temperature: float = 1.0  # factor of the noise


class Actor:
    """A trained `ofp_unet` with its processors and view.

    executed: how many actions of a chunk are executed.
    """

    def __init__(self, directory: Path) -> None:
        import torch
        from lerobot.policies.factory import make_pre_post_processors

        torch.set_num_threads(1)
        checkpoint = directory / "checkpoint"
        view = json.loads((directory / "view.json").read_text())
        self.view = View(tuple(view["dimensions"]), tuple(view["tasks"]), view["image_size"])
        self.policy = self._load(checkpoint)
        self.executed = self.policy.config.n_action_steps
        self._prepare, self._finish = make_pre_post_processors(self.policy.config, pretrained_path=str(checkpoint))

    def _load(self, checkpoint: Path) -> Any:
        from ofp_lerobot.policies.ofp_unet.modeling_ofp_unet import OFPUnetPolicy

        return OFPUnetPolicy.from_pretrained(checkpoint)

    def use(self, sampling: Sampling) -> None:
        config = self.policy.config
        config.sampler, config.num_inference_steps, config.warm_start = sampling[:3]
        config.test_time_samples, config.noise_temperature = sampling[3:]

    def _states(self, raw: Array, task: str) -> dict[str, Array]:
        return {STATE: self.view(raw, task)}

    def prepare(self, raw: Array, task: str, images: Pictures | None = None) -> dict[str, Any]:
        """What the policy's processor makes of raw observations (n, 39) and of their `pictures`."""
        import torch

        seen = {key: torch.from_numpy(value) for key, value in self._states(raw, task).items()}
        if images is not None:
            seen[IMAGE] = as_seen(images)
        return self._prepare(seen)

    def noise(self, rngs: Sequence[np.random.Generator]) -> Any:
        import torch

        config = self.policy.config
        samples = getattr(config, "test_time_samples", 1)
        shape = (samples, config.horizon, config.action_feature.shape[0])
        drawn = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs], axis=1)
        return torch.from_numpy(drawn).flatten(0, 1).to(config.device)

    def pictures(self, envs: Sequence[Simulator]) -> Pictures | None:
        """(n, pixels, pixels, 3) of what the policy sees, None where it sees states only."""
        size = self.view.image_size
        return np.stack([env.render(size) for env in envs]) if size else None

    def act(self, seen: dict[str, Any], noise: Any, rest: Any = None) -> tuple[Array, Any]:
        """Chunks (n, horizon, 4) for what `prepare` gave, and their unexecuted part, normalised: `rest` next time."""
        chunk = self.policy.predict_action_chunk(seen, noise=noise, prev_chunk_left_over=rest)
        return self._finish(chunk).numpy(), chunk[:, self.executed :]


class DiffusionActor(Actor):
    """LeRobot's `diffusion`, which has neither a warm start nor a choice among samples."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.policy.config.n_action_steps = self.policy.config.horizon  # so it answers whole chunks

    def _load(self, checkpoint: Path) -> Any:
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        return DiffusionPolicy.from_pretrained(checkpoint).eval()

    def use(self, sampling: Sampling) -> None:
        import torch

        if sampling != Sampling(sampling.sampler, sampling.steps):
            raise ValueError(f"diffusion has no warm start, choice or temperature here, got {sampling}")
        diffusion.use_sampler(self.policy, sampling.sampler, sampling.steps)
        torch.manual_seed(0)  # DDPM draws more noise on the way than the caller can give it

    def _states(self, raw: Array, task: str) -> dict[str, Array]:
        return diffusion.observation(self.view(raw, task))

    def act(self, seen: dict[str, Any], noise: Any, rest: Any = None) -> tuple[Array, Any]:
        return self._finish(self.policy.predict_action_chunk(seen, noise=noise)).numpy(), None


def actor_of(directory: Path) -> Actor:
    """What a trained checkpoint's type calls for."""
    kind = json.loads((directory / "checkpoint" / "config.json").read_text())["type"]
    return DiffusionActor(directory) if kind == diffusion.NAME else Actor(directory)


@lru_cache(maxsize=1)
def _made(task: str, action_repeat: int) -> tuple[list[Simulator], dict[int, Any]]:
    """Of the last task only: tens of MB each."""
    return [], {}


def simulators(task: str, action_repeat: int, count: int) -> list[Simulator]:
    made, renderers = _made(task, action_repeat)
    while len(made) < count:
        made.append(Simulator(task, action_repeat=action_repeat, renderers=renderers))
    return made[:count]


def roll_out(
    actor: Actor, task: str, seeds: Sequence[int], recording: Recording, max_steps: int
) -> tuple[list[bool], list[float]]:
    """Episodes side by side: which were solved, and the jumps between consecutive chunks (root mean squares)."""
    envs = simulators(task, recording.action_repeat, len(seeds))
    rngs = [np.random.default_rng(seed) for seed in seeds]
    raw = np.stack([env.reset(seed) for env, seed in zip(envs, seeds, strict=True)]).astype(np.float32)
    images = actor.pictures(envs)
    solved, jumps, taken = [False] * len(seeds), [], 0
    executed, rest, planned = actor.executed, None, None
    while not all(solved) and taken < max_steps:
        answers, rest = actor.act(actor.prepare(raw, task, images), actor.noise(rngs), rest)
        if planned is not None:
            gaps = np.sqrt(np.mean((answers[:, 0] - planned) ** 2, axis=1))
            jumps += [float(gap) for gap, done in zip(gaps, solved, strict=True) if not done]
        planned = answers[:, executed]
        for i, env in enumerate(envs):
            for action in answers[i, :executed]:
                if solved[i]:
                    break
                observation, solved[i] = env.step(action)
                raw[i] = observation
            if images is not None and not solved[i]:
                images[i] = env.render(actor.view.image_size)
        taken += executed
    return solved, jumps


def expert_chunks(task: str, condition: str, recording: Recording, evaluation: Evaluation, horizon: int) -> Array:
    """(observations, draws, horizon, 4): how the demonstrator begins from each start."""
    (simulator,) = simulators(task, recording.action_repeat, 1)
    recording = replace(recording, image_size=0)
    draws = evaluation.draws if condition == "noisy" else 1  # the clean expert always does the same
    return np.stack(
        [
            [
                demonstrate(simulator, seed, condition, recording, draw=draw, steps=horizon)[0].actions
                for draw in range(draws)
            ]
            for seed in range(evaluation.seed, evaluation.seed + evaluation.observations)
        ]
    )


def measure_experts(
    task: str, condition: str, recording: Recording, evaluation: Evaluation, horizon: int, path: Path
) -> dict[str, Any]:
    np.save(path, expert_chunks(task, condition, recording, evaluation, horizon))
    return {}


def measure(
    directory: Path, sampling: Sampling, task: str, recording: Recording, evaluation: Evaluation, experts: Path
) -> dict[str, Any]:
    """How a checkpoint does that answers by `sampling`; experts: what `measure_experts` saved."""
    actor, reference = actor_of(directory), np.load(experts)
    actor.use(sampling)
    seeds = range(evaluation.seed, evaluation.seed + evaluation.episodes)
    solved: list[bool] = []
    jumps: list[float] = []
    for first in range(0, len(seeds), evaluation.side_by_side):
        group = seeds[first : first + evaluation.side_by_side]
        done, gaps = roll_out(actor, task, group, recording, evaluation.max_steps)
        solved, jumps = solved + done, jumps + gaps
    (simulator,) = simulators(task, recording.action_repeat, 1)
    answers = []
    for seed in range(evaluation.seed, evaluation.seed + evaluation.observations):
        start = simulator.reset(seed).astype(np.float32)
        rngs = [np.random.default_rng((seed, draw)) for draw in range(evaluation.draws)]
        picture = actor.pictures([simulator])
        images = None if picture is None else picture.repeat(len(rngs), axis=0)
        answers.append(actor.act(actor.prepare(np.stack([start] * len(rngs)), task, images), actor.noise(rngs))[0])
    own = np.stack(answers)
    return {
        "solved": [int(each) for each in solved],
        "energy_distance": float(np.mean([energy_distance(a, b) for a, b in zip(own, reference, strict=True)])),
        "spread": spread(own),
        "jump": float(np.mean(jumps)) if jumps else None,
    }
