"""Samples from a policy on recorded observations, and what they say.

Shapes: f frames, g of them with a successor (the frame `n_action_steps` later in the same episode), k noise draws,
h chunk length, a action dimensions. Normalised units are the policy's. "one", "two" and "ten" name the network
evaluations of a chunk; "one_warm" and "two_warm" start from the previous chunk's rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lerobot.datasets import LeRobotDataset
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from tqdm import tqdm

from ...errors import UserError
from ...flow_map.path import sample_chunk, warm_start
from ...flow_map.randomness import folded_generator
from ...inference.policies import ServedPolicy
from ...inference.sampling import Sampling
from ...policies.normalisation import far_dimensions
from ..statistics import bootstrap_interval
from ..timing import milliseconds

PAPERS_WARM_START = 0.15  # arXiv 2603.12480
MIN_EPISODES = 8  # the bootstrap draws episodes from this many on, frames below
RESAMPLES = 2000
WARM_UP_CALLS = 3
MOVES = 0.02  # deviation of a dimension that is more than rounding, in normalised units
NOISE = 0.5  # mean square step over twice the variance (von Neumann's ratio): 0 of what moves smoothly, 1 of noise
NOW, NEXT = 0, 1  # streams of noise


SAMPLINGS = {
    "one": Sampling.plain("flow_map", 1),
    "two": Sampling.plain("flow_map", 2),
    "ten": Sampling.plain("euler", 10),
}
FEW = ("one", "two")


@dataclass
class Chunks:
    """Demonstrated and sampled chunks. `valid` is False at steps past the episode's end."""

    target: np.ndarray  # (f, h, a) normalised
    valid: np.ndarray  # (f, h) bool
    real_target: np.ndarray  # (f, h, a) in the dataset's units
    origin: np.ndarray  # (f, a) the dataset's units at normalised 0 ...
    unit: np.ndarray  # (f, a) ... and of 1 more
    state: np.ndarray  # (f, s) normalised; s is 0 where the policy has none
    sampled: dict[str, np.ndarray]  # (f, k, h, a) normalised
    real: dict[str, np.ndarray]  # (f, k, h, a) in the dataset's units


@dataclass
class Collected:
    """`later` are the successors of the frames `earlier` (g,), None where no frame has one."""

    now: Chunks
    later: Chunks | None
    earlier: np.ndarray
    positions: np.ndarray  # (f,) frame numbers in the whole dataset
    episodes: np.ndarray  # (f,)


# Sampling


def spread_evenly(total: int, frames: int) -> np.ndarray:
    """At most `frames` of the positions 0 … total − 1, evenly."""
    return np.unique(np.linspace(0, total - 1, min(frames, total)).round().astype(int))


def draw_noise(shape: tuple[int, ...], seed: int, stream: int, position: int) -> Tensor:
    """Standard normal, a function of the frame's number in the dataset, whatever the batch size and device."""
    return torch.randn(shape, generator=folded_generator("cpu", seed, stream, position))


def collect(
    checkpoint: ServedPolicy,
    dataset: LeRobotDataset,
    *,
    frames: int,
    draws: int,
    batch_size: int,
    fraction: float,
    seed: int,
) -> Collected:
    """Samples every way on evenly spaced frames and on their successors, with the same noise for all ways.

    fraction: of the old plan, in the warm starts.
    """
    config = checkpoint.policy.config
    executed = config.n_action_steps
    relative = getattr(config, "use_relative_actions", False)
    columns = dataset.hf_dataset.data
    episodes = columns.column("episode_index").to_numpy()
    absolute = columns.column("index").to_numpy()
    chosen = spread_evenly(len(episodes), frames)
    warm = executed < config.chunk_size and not relative
    shape = (draws, config.chunk_size, config.max_action_dim)

    def noise(positions: np.ndarray, stream: int) -> Tensor:
        return torch.stack([draw_noise(shape, seed, stream, int(p)) for p in absolute[positions]])

    now: list[Chunks] = []
    later: list[Chunks] = []
    earlier: list[int] = []
    for start in tqdm(range(0, len(chosen), batch_size), desc="observations", unit="batch"):
        here = chosen[start : start + batch_size]
        now.append(_chunks(checkpoint, dataset, here, noise(here, NOW)))
        follows = [
            i for i, p in enumerate(here) if p + executed < len(episodes) and episodes[p + executed] == episodes[p]
        ]
        if not follows:
            continue
        earlier += [start + i for i in follows]
        there = here[follows] + executed
        rests = {variant: now[-1].sampled[variant][follows, :, executed:] for variant in FEW} if warm else {}
        later.append(_chunks(checkpoint, dataset, there, noise(there, NEXT), rests, fraction))
    return Collected(
        now=_join(now),
        later=_join(later) if later else None,
        earlier=np.array(earlier, dtype=int),
        positions=absolute[chosen],
        episodes=episodes[chosen],
    )


def load_items(dataset: LeRobotDataset, positions: Iterable[int]) -> dict[str, Any]:
    """A batch as LeRobot's data loader makes it."""
    items: list[Any] = [dataset[int(p)] for p in positions]
    batch = lerobot_collate_fn(items)
    assert batch is not None
    return batch


@torch.no_grad()
def _chunks(
    checkpoint: ServedPolicy,
    dataset: LeRobotDataset,
    positions: np.ndarray,
    noise: Tensor,
    rests: dict[str, np.ndarray] | None = None,
    fraction: float = 0.0,
) -> Chunks:
    """noise (b, k, h, max_action_dim); rests: per way the unexecuted actions (b, k, steps, a) to start warm from."""
    items = load_items(dataset, positions)
    try:
        batch = checkpoint.preprocessor(items)
    except (ValueError, KeyError) as error:
        raise UserError(f"the checkpoint's preprocessor cannot take this data: {error}") from error
    target = batch[ACTION].float().cpu()
    state = batch.get(OBS_STATE, target.new_zeros(len(target), 0)).float().cpu()
    if not (torch.isfinite(target).all() and torch.isfinite(state).all()):
        raise UserError(
            "the dataset has NaN or infinite values in its actions or states: mend the data, or choose other --episodes"
        )
    try:
        sampled = sample(checkpoint.policy, batch, noise, rests or {}, fraction)
    except ValueError as error:
        raise UserError(error) from error
    if not all(torch.isfinite(x).all() for x in sampled.values()):
        raise UserError("the policy answered NaN or infinite actions: check the checkpoint")
    # The postprocessor may add the state that the preprocessor has just seen, one row per observation.
    post = checkpoint.postprocessor
    real = {
        variant: torch.stack([post(x).float() for x in draws.unbind(1)], dim=1) for variant, draws in sampled.items()
    }
    origin, one = (post(torch.full_like(target[:, :1], value)).float()[:, 0] for value in (0.0, 1.0))
    return Chunks(
        target=target.numpy(),
        valid=~items["action_is_pad"].numpy(),
        real_target=items[ACTION].float().numpy(),
        origin=origin.numpy(),
        unit=(one - origin).numpy(),
        state=state.numpy(),
        sampled={variant: x.numpy() for variant, x in sampled.items()},
        real={variant: x.numpy() for variant, x in real.items()},
    )


def sample(
    policy: Any, batch: dict[str, Any], noise: Tensor, rests: dict[str, np.ndarray], fraction: float
) -> dict[str, Tensor]:
    """Chunks (b, k, h, a) on the CPU for each way from the same noise (b, k, h, max_action_dim).

    The prefix is encoded once and shared by all draws; sample i reads observation i modulo b.
    """
    b, k = noise.shape[:2]
    size = policy.config.output_features[ACTION].shape[0]
    prefix = policy.model.encode(*policy.prepare_observation(batch))
    velocity = partial(policy.model, prefix)
    start = noise.transpose(0, 1).flatten(0, 1).to(next(policy.parameters()).device)

    def draws(x: Tensor, t: float, sampling: Sampling) -> Tensor:
        chunks = sample_chunk(velocity, x, steps=sampling.steps or 1, sampler=sampling.sampler or "flow_map", start=t)
        actions = policy.from_path(chunks)[..., :size]
        return actions.unflatten(0, (k, b)).transpose(0, 1).float().cpu()

    chunks = {name: draws(start, 1.0, sampling) for name, sampling in SAMPLINGS.items()}
    for name, rest in rests.items():
        plan = torch.from_numpy(rest).transpose(0, 1).flatten(0, 1).to(start.device)
        chunks[f"{name}_warm"] = draws(*warm_start(start, plan, fraction, policy.to_path), SAMPLINGS[name])
    return chunks


def _join(parts: list[Chunks]) -> Chunks:
    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], dict):
            return {variant: np.concatenate([value[variant] for value in values]) for variant in values[0]}
        return np.concatenate(values)

    return Chunks(**{field.name: joined(field.name) for field in fields(Chunks)})


# Statistics


def step_mean(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over the valid steps of values (f, …, h, a), over draws and dimensions: (f,)."""
    values = values.astype(np.float64).mean(axis=-1)
    values = values.mean(axis=1) if values.ndim == 3 else values
    return (values * valid).sum(axis=1) / np.maximum(valid.sum(axis=1), 1)


def square_error(sampled: np.ndarray, target: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean square of sampled (f, k, h, a) against target (f, h, a) or (f, k, h, a), per frame: (f,)."""
    target = target[:, None] if target.ndim == 3 else target
    return step_mean((sampled.astype(np.float64) - target) ** 2, valid)


def variance(sampled: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Variance over the draws of one observation, per frame: (f,)."""
    return step_mean(sampled.astype(np.float64).var(axis=1, ddof=1), valid)


def log_nearest(sampled: np.ndarray, reference: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logarithm of the root mean square distance of samples (f, k, h, a) to the nearest of `reference`: (f,).

    Of another draw, because the same one began from the same noise. The logarithm, because a way that one draw alone
    took is far from all others, and would outweigh them.
    """
    weight = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1) / sampled.shape[-1]
    gaps = sampled[:, :, None].astype(np.float64) - reference[:, None]
    squares = np.einsum("fijha,fh->fij", gaps**2, weight)
    squares[:, np.arange(sampled.shape[1]), np.arange(sampled.shape[1])] = np.inf
    return 0.5 * np.log(np.maximum(squares.min(axis=2), 1e-30)).mean(axis=1)


def sharpness(
    few: np.ndarray, ten: np.ndarray, target: np.ndarray, valid: np.ndarray, groups: np.ndarray, seed: int
) -> dict[str, dict[str, float]]:
    """Whether answers (f, k, h, a) vary as demonstrations do, and lie where ten steps' do; ratios with intervals.

    spread: of the answers, over the demonstrations' around the answers' mean. An answer and a demonstration of one
    observation are independent, so E‖answer − demonstration‖² = spread² + that². It is 1 for answers of the
    demonstrations' own law and 0 for their mean; above 1 the answers vary more, whatever their mean.
    nearest: distance to the nearest of ten steps' answers, over the same among these. It is 1 for answers of the same
    law, less for narrower ones around the same ways, more for answers between the ways.
    covered: distance of ten steps' answers to the nearest of these, over the same. It is 1 for the same law, less for
    narrower answers around all of the ways, more where a way is left out.
    """
    varies = variance(few, valid)
    around = square_error(few, target, valid) - varies
    among = log_nearest(ten, ten, valid)
    return {
        "spread": ratio_interval(varies, around, groups, seed),
        "nearest": geometric_interval(log_nearest(few, ten, valid) - among, groups, seed),
        "covered": geometric_interval(log_nearest(ten, few, valid) - among, groups, seed),
    }


def geometric_interval(logarithms: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """Geometric mean over frames, of their logarithms (f,), and its 95 % interval by a bootstrap over their groups."""
    _, group = np.unique(groups, return_inverse=True)
    sums = np.stack([np.bincount(group, weights=logarithms), np.bincount(group)])
    drawn = np.random.default_rng(seed).integers(sums.shape[1], size=(RESAMPLES, sums.shape[1]))
    means, counts = sums[:, drawn].sum(axis=2)
    low, high = np.exp(np.quantile(means / counts, (0.025, 0.975)))
    return {"value": float(np.exp(logarithms.mean())), "low": float(low), "high": float(high)}


def root(squares: np.ndarray) -> float:
    """Root of the mean over frames."""
    return float(np.sqrt(squares.mean()))


def ratio_interval(over: np.ndarray, under: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, float]:
    """Ratio of two root mean squares and its 95 % interval, by a paired bootstrap over the groups of frames."""
    _, group = np.unique(groups, return_inverse=True)
    sums: list[Any] = [np.bincount(group, weights=x) for x in (over, under)]

    def ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
        return np.sqrt(top.sum(axis=1) / np.maximum(bottom.sum(axis=1), 1e-30))

    low, high = bootstrap_interval(ratio, *sums, resamples=RESAMPLES, seed=seed)
    value = np.sqrt(over.sum() / max(under.sum(), 1e-30))
    return {"value": float(value), "low": low, "high": high}


def per_dimension(chunks: Chunks) -> dict[str, list[float]]:
    """Root mean square error per action dimension in the dataset's units, for each way: (a,)."""
    weight = chunks.valid / chunks.valid.sum(axis=1, keepdims=True)

    def errors(real: np.ndarray) -> list[float]:
        squares = ((real.astype(np.float64) - chunks.real_target[:, None]) ** 2).mean(axis=1)
        return np.sqrt((squares * weight[..., None]).sum(axis=1).mean(axis=0)).tolist()

    return {variant: errors(real) for variant, real in chunks.real.items()}


def follow_each(sampled: np.ndarray, target: np.ndarray, valid: np.ndarray) -> list[dict[str, float]]:
    """For each dimension the root mean square error of the answers' mean, and of the demonstrations' own mean.

    `noise` is the mean square of a demonstration's step over twice its variance: 1 of independent noise, which nobody
    can follow, such as the jitter of a joint that idles; next to 0 of a motion, or a gripper that closes once.
    sampled (f, k, h, a), target (f, h, a). The mean of k draws is off by their variance / k, which is taken away. What
    is left is what an answer cannot know, whatever its spread: answers that follow are below the demonstrations' mean.
    """
    weight = (valid / np.maximum(valid.sum(axis=1, keepdims=True), 1))[..., None]
    weight = weight / weight.sum()
    answers = sampled.astype(np.float64)
    bias = answers.var(axis=1, ddof=1) / sampled.shape[1]
    errors = (((answers.mean(axis=1) - target) ** 2 - bias) * weight).sum(axis=(0, 1))
    mean = (target * weight).sum(axis=(0, 1))
    constants = ((target - mean) ** 2 * weight).sum(axis=(0, 1))
    both = (valid[:, 1:] & valid[:, :-1])[..., None]
    steps = (np.diff(target.astype(np.float64), axis=1) ** 2 * both).sum(axis=(0, 1)) / max(both.sum(), 1)
    noise = steps / np.maximum(2 * constants, 1e-12)
    rows = zip(np.sqrt(np.maximum(errors, 0)), np.sqrt(constants), noise, strict=True)
    return [{"error": float(error), "constant": float(c), "noise": float(n)} for error, c, n in rows]


def jumps(collected: Collected, variant: str, executed: int) -> np.ndarray:
    """Mean square by which successive chunks disagree, per pair (g,), in normalised units.

    Over all steps that both plan; where a chunk is executed whole (the seam), from its last action to the next first.
    Not `metrics.jump`, which compares two plans in the robot's units: here are several draws for each pair, padded
    frames, and relative actions of two origins.
    """
    later, now = collected.later, collected.now
    assert later is not None
    before = now.sampled[variant.removesuffix("_warm")][collected.earlier]
    return _disagreement(before, later.sampled[variant], _shift(collected), later.valid, executed)


def seam_of_demonstrations(collected: Collected, executed: int) -> np.ndarray:
    """What `jumps` gives at the seam for the demonstrations themselves, per pair (g,)."""
    later = collected.later
    assert later is not None
    before = collected.now.target[collected.earlier]
    return _disagreement(before[:, None], later.target[:, None], _shift(collected), later.valid, executed)


def _shift(collected: Collected) -> np.ndarray:
    """(g, a) What to add to the earlier chunk: with relative actions the two are relative to different states."""
    now, later = collected.now, collected.later
    assert later is not None
    moved = now.origin[collected.earlier] - later.origin
    return np.divide(moved, later.unit, out=np.zeros_like(moved), where=moved != 0)


def _disagreement(
    before: np.ndarray, after: np.ndarray, shift: np.ndarray, valid: np.ndarray, executed: int
) -> np.ndarray:
    """before and after (g, k, h, a), `after` planned `executed` steps later; valid (g, h) of the later one: (g,)."""
    before = before.astype(np.float64) + shift[:, None, None]
    if executed == before.shape[2]:
        return ((after[:, :, 0] - before[:, :, -1]) ** 2).mean(axis=(1, 2))
    common = before.shape[2] - executed
    return step_mean((after[:, :, :common] - before[:, :, executed:]) ** 2, valid[:, :common])


def summarise(collected: Collected, *, executed: int, seed: int) -> dict[str, Any]:
    """Every statistic of the report that is in normalised units."""
    now, later = collected.now, collected.later
    ten = now.sampled["ten"]
    by_episode = len(np.unique(collected.episodes)) >= MIN_EPISODES
    groups = collected.episodes if by_episode else np.arange(len(collected.episodes))
    errors = {variant: square_error(x, now.target, now.valid) for variant, x in now.sampled.items()}
    variances = {variant: variance(x, now.valid) for variant, x in now.sampled.items()}
    demonstrated = now.target[now.valid]
    normalised = {
        variant: {
            "error": root(errors[variant]),
            "error_executed": root(square_error(x[:, :, :executed], now.target[:, :executed], now.valid[:, :executed])),
            "difference_to_ten": root(square_error(x, ten, now.valid)),
            "spread": root(variances[variant]),
            "std_ratio": float(_valid(x, now.valid).std() / max(demonstrated.std(), 1e-6)),
            "largest": float(np.abs(_valid(x, now.valid)).max()),
        }
        for variant, x in now.sampled.items()
    }
    return {
        "demonstrations": {
            "std": float(demonstrated.std()),
            "constant_error": root(step_mean((now.target - demonstrated.mean(axis=0)) ** 2, now.valid)),
            "unfollowed": {
                i: each
                for i, each in enumerate(follow_each(ten, now.target, now.valid))
                if each["constant"] > MOVES and each["noise"] < NOISE and each["error"] >= each["constant"]
            },
            # Dimensions whose values are mostly outside of what the statistics normalise, with their median size.
            "far": {ACTION: far_dimensions(demonstrated), OBS_STATE: far_dimensions(now.state)},
        },
        "normalised": normalised,
        "ratios_to_ten": {
            variant: {
                "error": ratio_interval(errors[variant], errors["ten"], groups, seed),
                "spread": ratio_interval(variances[variant], variances["ten"], groups, seed),
            }
            for variant in FEW
        },
        "sharpness": sharpness(now.sampled["one"], ten, now.target, now.valid, groups, seed),
        "bootstrap": {"unit": "episodes" if by_episode else "frames", "count": len(np.unique(groups))},
        "error_by_step": {variant: _by_step(x, now) for variant, x in now.sampled.items()},
        "successive": None if later is None else _successive(collected, executed),
    }


def _valid(sampled: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(f, k, h, a) -> (n, k, a), the n valid steps."""
    return sampled.swapaxes(1, 2)[valid]


def _by_step(sampled: np.ndarray, chunks: Chunks) -> list[float | None]:
    """Root mean square error at each step of the chunk, (h,); None where no frame has that step."""
    squares = ((sampled.astype(np.float64) - chunks.target[:, None]) ** 2).mean(axis=(1, 3))
    counts = chunks.valid.sum(axis=0)
    sums = (squares * chunks.valid).sum(axis=0)
    return [float(np.sqrt(s / n)) if n else None for s, n in zip(sums, counts, strict=True)]


def _successive(collected: Collected, executed: int) -> dict[str, Any]:
    later = collected.later
    assert later is not None
    seam = executed == later.target.shape[1]
    variants = {
        variant: {
            "jump": root(jumps(collected, variant, executed)),
            "error": root(square_error(x, later.target, later.valid)),
            "spread": root(variance(x, later.valid)),
        }
        for variant, x in later.sampled.items()
    }
    return {
        "kind": "seam" if seam else "overlap",
        "pairs": len(collected.earlier),
        "demonstrations_jump": root(seam_of_demonstrations(collected, executed)) if seam else 0.0,
        **variants,
    }


# Latency


def latency(checkpoint: ServedPolicy, dataset: LeRobotDataset, *, calls: int, seed: int) -> dict[str, Any] | None:
    """Median and 95th percentile of `predict_action_chunk` in ms, one observation, interleaved; None without calls.

    From a preprocessed observation on the device to actions that are there, without pre- and postprocessing. Raises
    UserError where the policy cannot answer here, as with products in 8 bits on a machine that has none.
    """
    if calls == 0:
        return None
    policy = checkpoint.policy
    batch = checkpoint.preprocessor(load_items(dataset, [0]))
    device = next(policy.parameters()).device
    noise = draw_noise((1, policy.config.chunk_size, policy.config.max_action_dim), seed, NOW, 0).to(device)
    before = replace(checkpoint.sampling, engine=None)  # which nothing here changes
    times: dict[str, list[float]] = {name: [] for name in SAMPLINGS}
    for call in tqdm(range(WARM_UP_CALLS + calls), desc="latency", unit="round"):
        for name, sampling in SAMPLINGS.items():
            sampling.apply(policy.config)
            try:
                taken = milliseconds(lambda: policy.predict_action_chunk(batch, noise=noise), device)
            except ValueError as error:
                raise UserError(f"{error}; --latency-calls=0 leaves the latency out") from error
            if call >= WARM_UP_CALLS:
                times[name].append(taken)
    before.apply(policy.config)
    return {
        name: {"median": float(np.median(x)), "p95": float(np.percentile(x, 95)), "calls": calls}
        for name, x in times.items()
    }
