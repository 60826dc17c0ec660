"""The small problem: conditional action chunks with four modes, on a CPU in minutes.

A small network is trained by flow matching from scratch and then fine-tuned with every objective of the
package, or trained with it from scratch for as many steps as both together. What it generates is compared with
the data by the energy distance (0 for equal distributions), so a policy that averages or drops modes shows.
The run fails (exit code 1) when OFP without sharpening, which narrows the law on purpose, misses its bars.

    python -m benchmarks.quality.toy --objectives ofp:sharpening_noise=0 flow_matching shortcut --json outputs/toy.json
    python -m benchmarks.quality.toy --seeds 3 --starts flow_matching scratch --json outputs/toy.json
    python -m benchmarks.quality.toy --seeds 1 --objectives ofp ofp:sharpening_noise=0 ofp_paper

An objective can carry settings, `name:setting=value,setting=value`. The contraction of `ofp_paper` ends half-way
through each run.

Shapes: observations (n, 3), chunks (n, HORIZON, ACTION_DIM), times (n,) with t = 1 noise and t = 0 action.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ofp_lerobot.evaluation.pools import process_pool
from ofp_lerobot.flow_map.ema import TEACHER_DECAY, copy_weights, update_ema
from ofp_lerobot.flow_map.path import Velocity, sample_chunk
from ofp_lerobot.flow_map.randomness import folded_generator
from ofp_lerobot.objectives import OBJECTIVES

from .objectives import understand

HORIZON, ACTION_DIM, MODES = 8, 2, 4
REACH = 2.24  # length of a path, for actions of unit variance
NOISE_STD = 0.2
RADIUS = 1.5 * NOISE_STD * math.sqrt(HORIZON * ACTION_DIM)  # holds 99.7 % of a mode
BASE = "flow_matching"  # the objective that trains the network from scratch
UNSHARPENED = "ofp:sharpening_noise=0"  # for the bars: sharpening narrows the law on purpose
EVAL_OBSERVATIONS, EVAL_SAMPLES = 64, 1024


class Quality(NamedTuple):
    """energy_distance to the data; accuracy: share of samples inside a mode; entropy of the modes' use, 1 = even."""

    energy_distance: float
    accuracy: float
    entropy: float


class Case(NamedTuple):
    """One way to train and sample: a row of the table."""

    objective: str
    start: str
    steps: int
    sampler: str


def draw_observations(n: int, generator: Generator) -> Tensor:
    """(n, 3): cosine and sine of a heading in the first quarter, and a bend in [−1, 1]."""
    heading, bend = math.pi / 2 * torch.rand(n, generator=generator), 2 * torch.rand(n, generator=generator) - 1
    return torch.stack([heading.cos(), heading.sin(), bend], dim=1)


def mode_centres(observations: Tensor) -> Tensor:
    """The noiseless chunks (n, MODES, HORIZON, ACTION_DIM): four paths a quarter turn apart, bent left and right."""
    mode = torch.arange(MODES)
    heading = torch.atan2(observations[:, 1], observations[:, 0])[:, None] + mode * (2 * math.pi / MODES)
    bend = observations[:, 2:] * (1 - 2 * (mode % 2))
    reached = torch.arange(1, HORIZON + 1) / HORIZON
    angle = heading[..., None] + bend[..., None] * reached
    return REACH * reached[:, None] * torch.stack([angle.cos(), angle.sin()], dim=-1)


def draw_chunks(observations: Tensor, generator: Generator, mode: Tensor | None = None) -> Tensor:
    """One chunk (n, HORIZON, ACTION_DIM) per observation, of the given mode (n,) or one chosen evenly."""
    n = len(observations)
    if mode is None:
        mode = torch.randint(MODES, (n,), generator=generator)
    chosen = mode_centres(observations)[torch.arange(n), mode]
    return chosen + NOISE_STD * torch.randn(chosen.shape, generator=generator)


class Block(nn.Module):
    """Residual block whose input is scaled and shifted by the condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        return x + self.layers(self.norm(x) * (1 + scale) + shift)


class Network(nn.Module):
    """velocity(prefix, x_t, t, r, keep), an MLP; the prefix is the observation itself.

    r enters through t − r by a branch whose output is zero at the start, as in the π₀.₅ head.
    """

    def __init__(self, width: int = 128, blocks: int = 3, frequencies: int = 16) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.logspace(-2, 3, frequencies, base=2))
        self.chunk_in = nn.Linear(HORIZON * ACTION_DIM, width)
        self.observation_in = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width))
        self.time_in = nn.Linear(2 * frequencies, width)
        self.gap_in = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.chunk_out = nn.Linear(width, HORIZON * ACTION_DIM)
        for layer in (self.gap_in[-1], self.chunk_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def waves(self, t: Tensor) -> Tensor:
        """(n,) -> (n, 2 · frequencies)."""
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def forward(
        self,
        prefix: Tensor,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        seen = self.observation_in(prefix)
        seen = seen.repeat(len(x_t) // len(seen), 1)
        if keep is not None:
            seen = seen * keep[:, None]
        condition = nn.functional.silu(seen + self.time_in(self.waves(t)) + self.gap_in(self.waves(t - r)))
        x = self.chunk_in(x_t.flatten(1))
        for block in self.blocks:
            x = block(x, condition)
        return self.chunk_out(x).view_as(x_t)


def teacher_velocity(network: Network, weights: dict[str, Tensor], prefix: Tensor) -> Velocity:
    """The network with other weights."""

    def velocity(*args: Tensor | None) -> Tensor:
        return functional_call(network, weights, (prefix, *args))

    return velocity


def train(network: Network, objective: str, *, steps: int, batch: int, learning_rate: float, seed: int) -> None:
    """Trains in place on fresh data; Adam with a short warm-up and a cosine to zero. Seeds and schedules by step."""
    name, settings = understand(objective)
    compute, needs_teacher = OBJECTIVES[name].function, OBJECTIVES[name].needs_teacher
    settings = replace(settings, ofp_paper=replace(settings.ofp_paper, contraction_steps=steps // 2))
    parameters = dict(network.named_parameters())
    average = copy_weights(parameters) if needs_teacher else {}
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    mask = torch.ones(batch, HORIZON, ACTION_DIM, dtype=torch.bool)
    for step in tqdm(range(steps), desc=f"{objective}, seed {seed}", leave=False, mininterval=2):
        generator = folded_generator("cpu", seed, step)
        observations = draw_observations(batch, generator)
        actions = draw_chunks(observations, generator)
        teacher = teacher_velocity(network, average, observations)
        losses = compute(partial(network, observations), teacher, actions, mask, settings, step, generator)
        optimizer.param_groups[0]["lr"] = learning_rate * min(
            (step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2
        )
        optimizer.zero_grad()
        losses.loss.mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if needs_teacher:
            update_ema(average, parameters, TEACHER_DECAY)


def energy_distance(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """2·E‖x − y‖ − E‖x − x′‖ − E‖y − y′‖ without bias (so it can be below zero), of samples (n, d).

    y and z are independent of each other, x is compared with both. Not `evaluation.metrics.energy_distance`: there the
    demonstrator's chunks are the whole reference, here the truth can be drawn from twice, so no bias is left.
    """
    across = torch.cdist(x, torch.cat([y, z])).mean()
    return 2 * across - torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) - torch.cdist(y, z).mean()


class Judge:
    """Fixed observations, true chunks and starting noise of one seed.

    The true chunks use all modes equally often, which halves the noise of the energy distance.
    """

    def __init__(self, seed: int) -> None:
        generator = folded_generator("cpu", seed, -1)
        self.observations = draw_observations(EVAL_OBSERVATIONS, generator)
        self.centres = mode_centres(self.observations).flatten(2)
        repeated = self.observations.repeat(EVAL_SAMPLES, 1)
        mode = torch.arange(EVAL_SAMPLES).repeat_interleave(EVAL_OBSERVATIONS) % MODES
        self.truth, self.truth_again = (grouped(draw_chunks(repeated, generator, mode)) for _ in range(2))
        self.noise = torch.randn(len(repeated), HORIZON, ACTION_DIM, generator=generator)
        self.floor = self.assess(grouped(draw_chunks(repeated, generator)))

    def assess(self, chunks: Tensor) -> Quality:
        """Quality of chunks (obs, samples, HORIZON · ACTION_DIM)."""
        energy = torch.stack(list(map(energy_distance, chunks, self.truth, self.truth_again))).mean()
        distance, mode = torch.cdist(chunks, self.centres).min(dim=2)
        share = nn.functional.one_hot(mode, MODES).double().mean(dim=1)
        entropy = torch.special.entr(share).sum(dim=1).mean() / math.log(MODES)
        return Quality(float(energy), float((distance < RADIUS).double().mean()), float(entropy))

    @torch.no_grad()
    def __call__(self, network: Network, steps: int, sampler: str) -> Quality:
        """Quality of the network's samples."""
        velocity = partial(network, self.observations)
        pieces = self.noise.split(16 * EVAL_OBSERVATIONS)
        chunks = torch.cat([sample_chunk(velocity, noise, steps=steps, sampler=sampler) for noise in pieces])
        return self.assess(grouped(chunks))


def grouped(chunks: Tensor) -> Tensor:
    """(samples · obs, HORIZON, ACTION_DIM) -> (obs, samples, HORIZON · ACTION_DIM)."""
    return chunks.view(EVAL_SAMPLES, EVAL_OBSERVATIONS, -1).transpose(0, 1)


def cases(objective: str, start: str) -> list[Case]:
    """Few steps with the objective's own sampler, ten with Euler. Drifting trains one step and nothing else."""
    name, _ = understand(objective)
    sampler = OBJECTIVES[name].sampler
    few = [Case(objective, start, 1, sampler), Case(objective, start, 2, sampler), Case(objective, start, 10, "euler")]
    return few[:1] if name == "drifting" else few


def run_seed(seed: int, args: argparse.Namespace) -> dict[Case, Quality]:
    """Trains and assesses everything for one seed."""
    torch.manual_seed(seed)
    judge, network = Judge(seed), Network(args.width)
    initial = {name: w.clone() for name, w in network.state_dict().items()}
    train(network, BASE, steps=args.base_steps, batch=args.batch, learning_rate=args.base_lr, seed=2 * seed)
    trained = {name: w.clone() for name, w in network.state_dict().items()}
    results = {Case("data", "", 0, "euler"): judge.floor}
    results |= {case: judge(network, case.steps, case.sampler) for case in cases(BASE, "scratch")}
    for start in args.starts:
        for objective in args.objectives:
            if (objective, start) == (BASE, "scratch"):
                continue  # that is the start itself
            fine_tuned = start == BASE
            network.load_state_dict(trained if fine_tuned else initial)
            train(
                network,
                objective,
                steps=args.steps if fine_tuned else args.base_steps + args.steps,
                batch=args.batch,
                learning_rate=args.lr if fine_tuned else args.base_lr,
                seed=2 * seed + 1,
            )
            results |= {case: judge(network, case.steps, case.sampler) for case in cases(objective, start)}
    return results


def run_seeds(args: argparse.Namespace) -> Iterator[tuple[int, dict[Case, Quality]]]:
    """(seed, results) as seeds are done, on one thread each."""
    if args.processes == 1:
        torch.set_num_threads(1)
        for seed in range(args.seeds):
            yield seed, run_seed(seed, args)
        return
    with process_pool(args.processes, torch.set_num_threads, 1) as workers:
        runs = {workers.submit(run_seed, seed, args): seed for seed in range(args.seeds)}
        for run in as_completed(runs):
            yield runs[run], run.result()


def summarise(results: Sequence[dict[Case, Quality]]) -> list[dict[str, Any]]:
    """Means over the seeds, and the standard deviation of the energy distance between them."""
    rows = []
    for case in results[0]:
        values = torch.tensor([result[case] for result in results], dtype=torch.float64)
        spread = float(values[:, 0].std()) if len(results) > 1 else 0.0
        rows.append(case._asdict() | Quality(*values.mean(dim=0).tolist())._asdict() | {"seed_spread": spread})
    return rows


def bars(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, value, limit) for unsharpened OFP fine-tuned from flow matching; empty when it was not run."""
    distance = {(row["objective"], row["start"], row["steps"]): row["energy_distance"] for row in rows}
    if (UNSHARPENED, BASE, 1) not in distance:
        return []
    one, two, ten = (distance[UNSHARPENED, BASE, steps] for steps in (1, 2, 10))
    flow_one, flow_ten = distance[BASE, "scratch", 1], distance[BASE, "scratch", 10]
    return [
        ("one step <= 3 x ten-step flow matching", one, 3 * flow_ten),
        ("one step <= 1/10 x one-step flow matching", one, flow_one / 10),
        ("two steps <= 1.2 x ten-step flow matching", two, 1.2 * flow_ten),
        ("ten Euler steps <= 1.2 x before", ten, 1.2 * flow_ten),
    ]


def goals(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(what, value, limit) of what one step is after: ten-step flow matching's best, and every rival's one step."""
    distance = {(row["objective"], row["start"], row["steps"]): row["energy_distance"] for row in rows}
    flow_ten = min(value for (objective, _, steps), value in distance.items() if (objective, steps) == (BASE, 10))
    aims = []
    for start in (BASE, "scratch"):
        one = distance.get((UNSHARPENED, start, 1))
        if one is None:
            continue
        aims.append((f"{start}: one step <= ten-step flow matching", one, flow_ten))
        ones = {o: value for (o, s, steps), value in distance.items() if s == start and steps == 1}
        rivals = {o: value for o, value in ones.items() if o.partition(":")[0] != "ofp"}
        if rivals:
            best = min(rivals, key=lambda objective: rivals[objective])
            aims.append((f"{start}: one step <= the best rival's ({best})", one, rivals[best]))
    return aims


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--steps", type=int, default=1500, help="fine-tuning steps (default 1500)")
    parser.add_argument("--base-steps", type=int, default=3000, help="flow-matching steps before (default 3000)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=128, help="width of the network")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the fine-tuning")
    parser.add_argument("--base-lr", type=float, default=2e-3, help="learning rate from scratch")
    parser.add_argument("--objectives", nargs="+", default=[*OBJECTIVES, UNSHARPENED], help="default: all")
    parser.add_argument("--starts", nargs="+", choices=[BASE, "scratch"], default=[BASE])
    parser.add_argument("--processes", type=int, default=1, help="seeds at a time, one thread each (default 1)")
    parser.add_argument("--json", type=Path, help="where to write settings, rows and bars, after every seed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    methods = {objective: asdict(understand(objective)[1]) for objective in args.objectives}
    results: dict[int, dict[Case, Quality]] = {}
    for seed, found in tqdm(run_seeds(args), desc="seeds", total=args.seeds):
        results[seed] = found
        rows = summarise([results[each] for each in sorted(results)])
        checks, aims = bars(rows), goals(rows)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            content = {"settings": methods, "seeds_done": sorted(results)}
            content |= {"arguments": {key: value for key, value in vars(args).items() if key != "json"}}
            content |= {"rows": rows, "bars": checks, "goals": aims}
            args.json.write_text(json.dumps(content, indent=2) + "\n")

    columns = f"{'objective':<27}{'start':<15}{'steps':>5} {'sampler':<9}"
    print(f"{columns}{'ED':>9}{'± seeds':>9}{'accuracy':>10}{'entropy':>9}")
    for row in rows:
        print(
            f"{row['objective']:<27}{row['start']:<15}{row['steps']:>5} {row['sampler']:<9}"
            f"{row['energy_distance']:>9.4f}{row['seed_spread']:>9.4f}{row['accuracy']:>10.3f}{row['entropy']:>9.3f}"
        )
    for what, value, limit in checks:
        print(f"{'PASS' if value <= limit else 'FAIL'}  {what}: {value:.4f} <= {limit:.4f}")
    for what, value, limit in aims:
        print(f"{'met' if value <= limit else 'missed':<6}{what}: {value:.4f}, {limit:.4f}")
    return int(any(value > limit for _, value, limit in checks))


if __name__ == "__main__":
    sys.exit(main())
