"""The stages of the tasks, at most two jobs at once."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from tqdm import tqdm

from examples.quickstart.demonstrations import REPO_ID
from examples.quickstart.training import Training, base_flags, branch_flags, checkpoint, lerobot_train
from ofp_lerobot.errors import UserError
from ofp_lerobot.evaluation.stages import STAMP, is_done, seconds_taken, stage
from ofp_lerobot.objectives.settings import Settings as Method
from robotwin_eval.adapters.cpu.recordings import settle
from robotwin_eval.cpu.checkout import require
from robotwin_eval.data.convert import INSTRUCTIONS, SHARD

from .observations import FLOW_MATCHING, OBSERVATIONS, OFP, PICTURES, Observations

SAVE_EVERY = 500  # training steps: an interrupted training goes on from the last checkpoint


@dataclass(frozen=True)
class Settings:
    """What is done of one task. variation: of the expert, so that there is more than one way."""

    observations: str  # of `OBSERVATIONS`
    demonstrations: int
    training: Training
    variation: int = 1
    episodes: int = 50

    @classmethod
    def usual(cls, observations: str) -> Self:
        """The defaults for one of `OBSERVATIONS`."""
        return cls(observations, OBSERVATIONS[observations].demonstrations, OBSERVATIONS[observations].training)


def run(tasks: Sequence[str], settings: Settings, output: Path, until: str) -> None:
    """Every stage up to `until` for every task. Raises UserError."""
    root = os.environ.get("ROBOTWIN_ROOT")
    if not root:
        raise UserError("set ROBOTWIN_ROOT, ROBOTWIN_PYTHON and, where needed, ROBOTWIN_VULKAN: docs/robotwin-cpu.md")
    require(Path(root))
    if not all(tasks) or len(set(tasks)) < len(tasks):
        raise UserError(f"--tasks {','.join(tasks)}: name each task once")
    workers = 2 if len(tasks) == 1 else 1
    suffix = "" if settings.observations == PICTURES else f"_{settings.observations}"
    jobs = [Job(task, settings, output / f"{task}{suffix}", workers) for task in tasks]
    last = max(i for i, (name, _) in enumerate(STAGES) if name == until)
    with _alone(output):
        for _, together in STAGES[: last + 1]:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(_unless_ending, [partial(each, job) for job in jobs for each in together]))
    for job in jobs:
        for stamp in sorted(job.output.rglob(STAMP)):
            print(f"{job.task}, {stamp.parent.relative_to(job.output)}: {seconds_taken(stamp.parent) / 60:.1f} minutes")
        if until == "compare":
            print((job.comparison / "report.md").read_text())


ENDING = threading.Event()  # nothing new is begun once it is set


def _unless_ending(work: Callable[[], None]) -> None:
    """Tells a failure at once: what runs beside it may take hours, and is let finish."""
    if not ENDING.is_set():
        try:
            work()
        except Exception as error:
            if not ENDING.is_set():
                tqdm.write(f"failed, what runs beside it goes on: {error}", file=sys.stderr)
            raise


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Raises UserError where another run works in `output`: either would empty the other's stages."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run works in {output}: wait for it, or choose another --output") from error
        yield


@dataclass(frozen=True)
class Job:
    """One task. workers: processes that convert and compare."""

    task: str
    settings: Settings
    output: Path
    workers: int

    @property
    def seen(self) -> Observations:
        return OBSERVATIONS[self.settings.observations]

    @property
    def recordings(self) -> Path:
        return Path(os.environ["ROBOTWIN_ROOT"]) / "data" / self.task / self.seen.config

    @property
    def dataset(self) -> Path:
        return self.output / "convert" / "dataset"

    @property
    def files(self) -> list[Path]:
        return [self.recordings / f"data/episode{i}.hdf5" for i in range(self.settings.demonstrations)]

    @property
    def texts(self) -> list[Path]:
        """The instructions of every recording."""
        return [self.recordings / f"instructions/{file.stem}.json" for file in self.files]

    @property
    def made_of(self) -> list[object]:
        """What tells these recordings from others; they are there.

        Without their instructions: RoboTwin draws all of them anew whenever it collects. The dataset keeps its own.
        """
        stats = [file.stat() for file in self.files]
        return [self.task, self.settings.variation, [[stat.st_size, stat.st_mtime_ns] for stat in stats]]

    def run_of(self, name: str) -> Path:
        return self.output / "train" / name / "run"

    @property
    def comparison(self) -> Path:
        """Of the two checkpoints that are there now, with these rows: others are other policies."""
        stamps = [(self.run_of(x).parent / STAMP).read_text() for x in (OFP, FLOW_MATCHING)]
        digest = hashlib.sha256(json.dumps([stamps, self.seen.rows]).encode())
        return self.output / "compare" / digest.hexdigest()[:8]

    def bar(self, what: str, total: int) -> tqdm:
        return tqdm(desc=f"{what} {self.task}", total=total)


def collect(job: Job) -> None:
    """By RoboTwin's own script, which goes on where it was interrupted."""
    wanted, source, log = job.settings.demonstrations, job.recordings, job.output / "collect.txt"

    def there() -> int:
        return sum(file.is_file() for file in job.files)

    def are_told() -> bool:
        return all(file.is_file() for file in job.texts)

    if there() < wanted or not are_told():
        flags = [f"--config={job.seen.config}", f"--episodes={wanted}", f"--variation={job.settings.variation}"]
        command = [sys.executable, "-m", "robotwin_eval.cpu", "collect", job.task, *flags]
        _watch(command, log, there, job.bar("collect", wanted))
        if not are_told():
            raise UserError(
                f"{source} lacks instructions, which RoboTwin generates by `python` after the last recording: set "
                f"ROBOTWIN_PYTHON to the bin/python of its packages, or see {log}"
            )
    try:
        settle(str(source), {"variation": job.settings.variation, "shadows": False})
    except ValueError as error:
        raise UserError(error) from error


def convert_recordings(job: Job) -> None:
    directory, wanted = job.dataset.parent, job.settings.demonstrations

    def done() -> int:
        shards = directory.glob(f"{job.dataset.name}.shards/{'[0-9]' * 5}")
        return wanted if job.dataset.is_dir() else min(wanted, SHARD * sum(1 for _ in shards))

    chosen = [*job.made_of, *([job.settings.training.chunk_size] if job.seen.relative else [])]
    if not is_done(directory, chosen):
        flags = [f"--output={job.dataset}", f"--repo-id={REPO_ID}", f"--episodes={wanted}", f"--workers={job.workers}"]
        command = [sys.executable, "-m", "robotwin_eval.data", "convert", str(job.recordings), *flags]
        with stage(directory, chosen, goes_on=True):
            shutil.rmtree(job.dataset, ignore_errors=True)  # whole but without a stamp: the command wants it empty
            _watch(command, job.output / "convert.txt", done, job.bar("convert", wanted))
            if job.seen.relative:
                _recompute(job)


def _recompute(job: Job) -> None:
    """Statistics of relative actions in place of the absolute ones, by LeRobot's own command."""
    command = [str(Path(sys.executable).with_name("lerobot-edit-dataset")), f"--repo_id={REPO_ID}"]
    command += [f"--root={job.dataset}", f"--new_root={job.dataset}", "--operation.type=recompute_stats"]
    command += ["--operation.overwrite=true", "--operation.relative_action=true"]
    command += [f"--operation.chunk_size={job.settings.training.chunk_size}"]
    command += ['--operation.relative_exclude_joints=["gripper"]']
    bar = tqdm(desc=f"statistics {job.task}", bar_format="{desc}: {elapsed}")
    _watch(command, job.output / "statistics.txt", lambda: 0, bar)


def train_base(job: Job) -> None:
    """Flow matching from scratch."""
    settings = job.settings.training
    lines = (job.dataset / "meta" / INSTRUCTIONS).read_text().splitlines()
    texts = [text for line in map(json.loads, lines) for kind in ("seen", "unseen") for text in line[kind]]
    network = job.seen.network(settings, job.output / "train" / "tokenizer", texts)
    if job.seen.relative:
        network = {**network, "policy.use_relative_actions": "true"}
    _train(job, job.run_of("base"), job.dataset.parent, base_flags(settings, network))


def train_branch(objective: str, job: Job) -> None:
    """`objective` from the checkpoint of the base, of the same length as the other one."""
    base = job.run_of("base")
    _train(job, job.run_of(objective), base.parent, branch_flags(job.settings.training, objective, checkpoint(base)))


def _train(job: Job, run: Path, after: Path, flags: dict[str, object]) -> None:
    """after: directory of the stage that this one builds on."""
    # The method's defaults too: no flag names them.
    chosen = [(after / STAMP).read_text(), flags, Method()]
    if not is_done(run.parent, chosen):
        with (
            stage(run.parent, chosen, goes_on=True),
            job.bar(f"train {run.parent.name}", int(str(flags["steps"]))) as bar,
        ):
            lerobot_train({**flags, "save_freq": SAVE_EVERY}, job.dataset, run, run.parent / "log.txt", bar)


def compare(job: Job) -> None:
    """`ofp-compare`, which goes on where it was interrupted."""
    output, episodes, baseline = job.comparison, job.settings.episodes, job.seen.rows[-1][0]
    command = [str(Path(sys.executable).with_name("ofp-compare")), "--env=robotwin", "--robotwin-cpu"]
    command += [f"--tasks={job.task}", f"--episodes={episodes}", f"--baseline={baseline}", f"--output={output}"]
    command += [f"--conditions={job.seen.condition}", "--instruction-type=seen"]
    command += ["--devices=cpu", "--videos=2", f"--workers={job.workers}"]
    for name, objective, sampling in job.seen.rows:
        command += ["--policy", f"name={name},path={checkpoint(job.run_of(objective))},{sampling}"]

    def played() -> int:
        lines = output / "episodes.jsonl"
        return len(lines.read_text().splitlines()) if lines.is_file() else 0

    _watch(command, job.output / "compare.txt", played, job.bar("compare", episodes * len(job.seen.rows)))


STAGES: tuple[tuple[str, tuple[Callable[[Job], None], ...]], ...] = (
    ("collect", (collect,)),
    ("convert", (convert_recordings,)),
    ("train", (train_base,)),
    ("train", (partial(train_branch, OFP), partial(train_branch, FLOW_MATCHING))),
    ("compare", (compare,)),
)
"""In order, each for all tasks before the next. What stands together may run at once."""


def _watch(command: Sequence[str], log: Path, done: Callable[[], int], bar: tqdm) -> None:
    """Runs a command, its output in `log`, its progress told by `done`. Raises UserError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, bar:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while True:
            bar.update(done() - bar.n)
            try:
                code = process.wait(timeout=5)
                break
            except subprocess.TimeoutExpired:
                continue
        bar.update(done() - bar.n)
    if code:
        raise UserError(f"{' '.join(command[:4])} failed with exit code {code}: {log.read_text()[-1500:]}")
