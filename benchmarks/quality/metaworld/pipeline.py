"""The benchmark's stages, their order and their cache."""

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ofp_lerobot.evaluation.pools import process_pool
from ofp_lerobot.evaluation.provenance import provenance
from ofp_lerobot.evaluation.stages import Job, made_by, seconds_taken
from ofp_lerobot.inference.sampling import Sampling
from ofp_lerobot.objectives import OBJECTIVES, Settings

from ..objectives import name_of
from . import diffusion
from . import evaluation as ev
from . import report as reports
from .demonstrations import CONDITIONS, STYLED, SUBSET, Recording, record
from .evaluation import Evaluation
from .latency import PLAIN, measure_latency
from .training import Training, train

BASE = "flow_matching"
WARM_START, SAMPLES, TEMPERATURE = 0.15, 8, 0.5
LATENCY_STEPS = (1, 2, 4, 10, 100)
LATENCY_ROUNDS, SPEEDUP_ROUNDS, TURN = 5, 40, 25


@dataclass(frozen=True)
class Budget:
    """What a run does. On styles the tasks are `STYLED`, and whole chunks are executed."""

    tasks: tuple[str, ...] = SUBSET
    conditions: tuple[str, ...] = CONDITIONS
    objectives: tuple[str, ...] = (*OBJECTIVES, diffusion.NAME)
    starts: tuple[str, ...] = (BASE,)
    steps: tuple[int, ...] = (1, 2, 10)  # evaluations per chunk
    variants: bool = True  # also answers with a warm start, and the densest of several
    seeds: int = 3
    recording: Recording = field(default_factory=Recording)
    training: Training = field(default_factory=Training)
    evaluation: Evaluation = field(default_factory=Evaluation)


BUDGETS = {
    "minutes": Budget(
        tasks=("window-open-v3", "push-v3"),
        conditions=("clean",),
        objectives=("ofp", BASE),
        seeds=1,
        recording=Recording(episodes=25),
        training=Training(base_steps=800, steps=400, batch_size=64),
        evaluation=Evaluation(episodes=20, observations=8),
    ),
    "small": Budget(
        tasks=("window-open-v3", "hammer-v3", "push-v3", "stick-push-v3"),
        conditions=("clean",),
        objectives=("ofp", BASE, "shortcut"),
        seeds=1,
        recording=Recording(episodes=40),
        training=Training(base_steps=1500, steps=1500, batch_size=64),
        evaluation=Evaluation(episodes=30, observations=8),
    ),
    "hours": Budget(
        conditions=("clean",),
        objectives=("ofp", BASE, "shortcut", diffusion.NAME),
        recording=Recording(episodes=150),
        training=Training(steps=2000),
        evaluation=Evaluation(side_by_side=25),
    ),
    "day": Budget(training=Training(down_dims=(128, 256), base_steps=8000, steps=4000)),
}


class Run(NamedTuple):
    """A policy: `objective` from `start`, "scratch" or the base that flow matching trained; None is that base.

    LeRobot's `diffusion` is an objective here, always from scratch.
    """

    condition: str
    seed: int
    objective: str | None = None
    start: str = "scratch"

    @property
    def name(self) -> str:
        if self.objective is None:
            return f"{self.condition}_{self.seed}_base"
        name = f"{self.condition}_{self.seed}_{self.objective.replace(':', '_')}"
        return name + ("_scratch" if self.start == "scratch" else "")


class Benchmark:
    """A run in the directory `output`."""

    def __init__(self, budget: Budget, output: Path, processes: int) -> None:
        self.budget, self.output, self.processes = budget, output.resolve(), processes

    def run(self) -> dict[str, Any]:
        """Does what is missing and returns the report, which it also writes."""
        *stages, latency = self._stages().items()
        with process_pool(self.processes) as workers:
            for name, jobs in stages:
                self._work(workers, name, jobs)
        self._work(None, *latency)  # alone on the machine, as far as this run goes
        report = self._report()
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        reports.plot(report, self.output / "success.png")
        return report

    def _stages(self) -> dict[str, list[Job]]:
        """All work by the name of its stage, in order."""
        sources = self._sources()
        return {
            "demonstrations": [self._recording(*source) for source in sources],
            "train the base": [self.training_of(run) for run in self._bases()],
            "train objectives": [self.training_of(run) for run in self.policies()],
            "experts": [self._experts(*source) for source in sources],
            "evaluate": [self._evaluation(*key) for key in self._evaluated()],
            "latency": list(self._latencies().values()),
        }

    def _tasks(self, condition: str) -> tuple[str, ...]:
        return STYLED if condition == "styles" else self.budget.tasks

    def _sources(self) -> list[tuple[str, str]]:
        return [(condition, task) for condition in self.budget.conditions for task in self._tasks(condition)]

    def _plan(self, condition: str) -> Training:
        """The styles' decision falls within one chunk, so all of it is executed, as RoboTwin does with π₀.₅."""
        plan = self.budget.training
        return replace(plan, executed=plan.horizon) if condition == "styles" else plan

    def _bases(self) -> list[Run]:
        return list(dict.fromkeys(self.base_of(run) for run in self.policies() if run.start == BASE))

    def policies(self) -> list[Run]:
        budget = self.budget
        pairs = [pair for pair in product(budget.objectives, budget.starts) if pair[0] != diffusion.NAME]
        if diffusion.NAME in budget.objectives:
            pairs.append((diffusion.NAME, "scratch"))
        return [Run(*key, *pair) for *key, pair in product(budget.conditions, range(budget.seeds), pairs)]

    def base_of(self, run: Run) -> Run:
        return Run(run.condition, run.seed)

    def _work(self, workers: ProcessPoolExecutor | None, name: str, jobs: Sequence[Job]) -> None:
        missing = [job for job in jobs if not job.is_done()]
        with tqdm(desc=name, total=len(jobs), initial=len(jobs) - len(missing), unit="job") as bar:
            if workers is None:
                for job in missing:
                    job.run()
                    bar.update()
                return
            for future in as_completed([workers.submit(job.run) for job in missing]):
                future.result()
                bar.update()

    def _recording(self, condition: str, task: str) -> Job:
        directory, recording = self.output / "demonstrations" / condition / task, self.budget.recording
        return Job(directory, recording, record, (task, condition, recording, directory / "dataset"))

    def _datasets(self, condition: str) -> list[tuple[str, Path]]:
        return [(task, self._recording(condition, task).directory / "dataset") for task in self._tasks(condition)]

    def _trained(self, run: Run) -> Path:
        return self.output / "training" / run.name

    def training_of(self, run: Run) -> Job:
        """From scratch an objective takes as many steps as the base and its own from there together."""
        budget, plan = self.budget, self._plan(run.condition)
        if run.objective is None:
            start, steps, seed = None, plan.base_steps, 2 * run.seed
        elif run.start == BASE:
            start, steps, seed = self._trained(self.base_of(run)) / "checkpoint", plan.steps, 2 * run.seed + 1
        else:
            start, steps, seed = None, plan.base_steps + plan.steps, 2 * run.seed
        directory, objective, datasets = self._trained(run), run.objective or BASE, self._datasets(run.condition)
        settings = [budget.recording, self._tasks(run.condition), plan, Settings(), run]
        if objective == diffusion.NAME:
            return Job(directory, settings, diffusion.train, (datasets, plan, steps, seed, directory))
        return Job(directory, settings, train, (datasets, plan, objective, steps, seed, start, directory))

    def _experts(self, condition: str, task: str) -> Job:
        budget, directory = self.budget, self.output / "experts" / f"{condition}_{task}"
        arguments = (task, condition, budget.recording, budget.evaluation, budget.training.horizon)
        settings = [budget.recording, budget.evaluation, budget.training.horizon, condition, task]
        return Job(directory, settings, ev.measure_experts, (*arguments, directory / "chunks.npy"))

    def samplings(self, objective: str) -> list[Sampling]:
        """One, two, … evaluations with the sampler that the objective trains, and with less noise; with the budget's
        variants one also warm and with more samples. From ten on, where average velocities gain nothing, `euler`; with
        less noise only flow matching's.
        """
        plain = Sampling.plain
        if objective == diffusion.NAME:
            return [*(plain("ddim", steps) for steps in self.budget.steps), plain("ddpm", 100)]
        sampler = OBJECTIVES[name_of(objective)].sampler
        variants = [plain(sampler, 1, warm_start=WARM_START), plain(sampler, 1, samples=SAMPLES)]
        variants += [plain("euler", 10, warm_start=WARM_START)] * (objective == BASE)
        steps = self.budget.steps if objective != "drifting" else (1,)
        single = [plain(sampler if count < 10 else "euler", count) for count in steps]
        few = [each for each in single if (each.steps or 0) < 10 or objective == BASE]
        cool = [replace(each, temperature=TEMPERATURE) for each in few]
        return [*single, *cool, *(variants if self.budget.variants else ())]

    def _evaluated(self) -> list[tuple[Run, str, Sampling]]:
        return [
            (run, task, sampling)
            for condition, task in self._sources()  # a worker keeps one task's simulators
            for run in self.policies()
            if run.condition == condition
            for sampling in self.samplings(run.objective or BASE)
        ]

    def _evaluation(self, run: Run, task: str, sampling: Sampling) -> Job:
        budget, trained = self.budget, self._trained(run)
        experts = self._experts(run.condition, task).directory / "chunks.npy"
        arguments = (trained, sampling, task, run.condition, budget.recording, budget.evaluation, experts)
        settings = [self.training_of(run).settings, reports.answering(sampling), task, budget.evaluation]
        name = "_".join(map(str, reports.answering(sampling).values()))
        return Job(self.output / "evaluation" / f"{run.name}_{task}" / name, settings, ev.measure, arguments)

    def _timed(self) -> Run:
        """The policy whose latency is measured: one that learned to answer in one step, if there is one."""
        policies = [run for run in self.policies() if run.objective != diffusion.NAME]
        return next((run for run in policies if name_of(run.objective or "") == "ofp"), policies[0])

    def _latencies(self) -> dict[str, Job]:
        """Of every way to answer; and of one evaluation against a hundred with more rounds, for `reports.speedups`."""
        budget, run = self.budget, self._timed()
        steps = sorted({*LATENCY_STEPS, *budget.steps})
        plain = Sampling.plain
        every = [plain(sampler, count) for sampler in ("flow_map", "euler") for count in steps]
        every += [plain(sampler, 1, samples=SAMPLES) for sampler in ("flow_map", "euler")]
        every += self.samplings(diffusion.NAME)
        extremes = [plain("flow_map", 1), *(plain(name, 100) for name in (PLAIN, "euler", "ddpm"))]

        def job(name: str, samplings: list[Sampling], rounds: int) -> Job:
            arguments = (self._trained(run), samplings, budget.training, rounds, TURN)
            named = [reports.answering(sampling) for sampling in samplings]
            settings = [self.training_of(run).settings, named, rounds, TURN]
            return Job(self.output / name, settings, measure_latency, arguments)

        return {"latency": job("latency", every, LATENCY_ROUNDS), "speedup": job("speedup", extremes, SPEEDUP_ROUNDS)}

    def _report(self) -> dict[str, Any]:
        budget, results = self.budget, []
        for run, task, sampling in self._evaluated():
            found = self._evaluation(run, task, sampling).result()
            results.append({**run._asdict(), "task": task, **reports.answering(sampling), **found})
        latency = {
            name: [
                {**reports.answering(sampling), **found}
                for sampling, found in zip(job.arguments[1], job.result(), strict=True)
            ]
            for name, job in self._latencies().items()
        }
        speedups = reports.speedups(latency["speedup"])
        rows = reports.rows_of(results)
        finished = [job.directory for jobs in self._stages().values() for job in jobs]
        device = "cuda" if torch.cuda.is_available() else "cpu"  # as LeRobot chooses
        return {
            "rows": rows,
            "bars": [*reports.bars(rows), reports.speed_bar(speedups)],
            "differences": reports.differences(rows),
            "latency": latency["latency"],
            "speedups": speedups,
            "timed": self._timed().name,
            "training": {run.name: self.training_of(run).result() for run in (*self._bases(), *self.policies())},
            "demonstrations": {
                f"{condition}/{task}": self._recording(condition, task).result() for condition, task in self._sources()
            },
            "seconds": {str(each.relative_to(self.output)): seconds_taken(each) for each in finished},
            "settings": asdict(budget),
            **made_by(finished),
            "accelerator": provenance(device)["accelerator"],
        }
