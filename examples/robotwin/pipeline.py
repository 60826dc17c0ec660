"""The stages of the tasks; two pieces of work run at once."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from examples.quickstart.demonstrations import REPO_ID
from examples.quickstart.training import Training, base_flags, branch_flags, checkpoint, lerobot_train, pi05
from ofp_lerobot.errors import UserError
from ofp_lerobot.evaluation.stages import STAMP, is_done, seconds_taken, stage
from robotwin_eval.adapters.cpu.recordings import settle
from robotwin_eval.cpu.checkout import CONFIG, require
from robotwin_eval.data.convert import INSTRUCTIONS, convert

OFP, FLOW_MATCHING = "ofp", "flow_matching"
# name, whose checkpoint, further settings of ofp-compare's --policy
ROWS = (
    ("ofp-1", OFP, "steps=1"),
    ("ofp-1-warm", OFP, "steps=1,warm_start=0.15"),
    ("ofp-2", OFP, "steps=2"),
    ("ofp-euler-10", OFP, "steps=10,sampler=euler"),
    ("fm-1", FLOW_MATCHING, "steps=1,sampler=euler"),
    ("fm-10", FLOW_MATCHING, "steps=10,sampler=euler"),
)
BASELINE = "fm-10"
PROMPT_LENGTH = 96  # tokens: RoboTwin's longest instructions, and the state's 14 numbers


@dataclass(frozen=True)
class Settings:
    """Sizes of one task. variation: of the expert, so that there is more than one way."""

    demonstrations: int = 50
    variation: int = 1
    episodes: int = 50
    image_size: int = 96
    training: Training = field(
        default_factory=lambda: Training(chunk_size=16, executed=16, base_steps=3000, steps=1200)
    )


def run(tasks: Sequence[str], settings: Settings, output: Path, until: str) -> None:
    """Every stage up to `until` for every task. Raises UserError."""
    root = os.environ.get("ROBOTWIN_ROOT")
    if not root:
        raise UserError("set ROBOTWIN_ROOT, ROBOTWIN_PYTHON and, where needed, ROBOTWIN_VULKAN: docs/robotwin-cpu.md")
    require(Path(root))
    workers = 2 if len(tasks) == 1 else 1
    jobs = [Job(task, settings, output / task, position, workers) for position, task in enumerate(tasks)]
    names = list(STAGES)
    for name in names[: names.index(until) + 1]:
        for together in STAGES[name]:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda work: work(), [partial(each, job) for job in jobs for each in together]))
    for job in jobs:
        for stamp in sorted(job.output.rglob(STAMP)):
            print(f"{job.task}, {stamp.parent.relative_to(job.output)}: {seconds_taken(stamp.parent) / 60:.1f} minutes")
        if until == "compare":
            print((job.comparison / "report.md").read_text())


@dataclass(frozen=True)
class Job:
    """One task. position: of its progress bar. workers: processes of one stage."""

    task: str
    settings: Settings
    output: Path
    position: int
    workers: int

    @property
    def recordings(self) -> Path:
        return Path(os.environ["ROBOTWIN_ROOT"]) / "data" / self.task / CONFIG

    @property
    def dataset(self) -> Path:
        return self.output / "convert" / "dataset"

    @property
    def files(self) -> list[Path]:
        return [self.recordings / f"data/episode{i}.hdf5" for i in range(self.settings.demonstrations)]

    @property
    def made_of(self) -> list[object]:
        """What tells these recordings from others; they are there."""
        stats = [file.stat() for file in self.files]
        return [self.task, self.settings.variation, [[stat.st_size, stat.st_mtime_ns] for stat in stats]]

    def run_of(self, name: str) -> Path:
        return self.output / "train" / name / "run"

    @property
    def comparison(self) -> Path:
        """Of the two checkpoints that are there now: those of another training are other policies."""
        digest = hashlib.sha256(b"".join((self.run_of(x).parent / STAMP).read_bytes() for x in (OFP, FLOW_MATCHING)))
        return self.output / "compare" / digest.hexdigest()[:8]

    def bar(self, what: str, total: int, beside: int = 0) -> tqdm:
        """beside: of which other bar of the same task it stands below."""
        return tqdm(desc=f"{what} {self.task}", total=total, position=self.position + beside)


def collect(job: Job) -> None:
    """By RoboTwin's own script, which goes on where it was interrupted."""
    wanted, source = job.settings.demonstrations, job.recordings

    def there() -> int:
        return sum(file.is_file() for file in job.files)

    if there() < wanted or len(list((source / "instructions").glob("episode*.json"))) < wanted:
        flags = [f"--episodes={wanted}", f"--variation={job.settings.variation}"]
        command = [sys.executable, "-m", "robotwin_eval.cpu", "collect", job.task, *flags]
        _watch(command, job.output / "collect.txt", there, job.bar("collect", wanted))
    try:
        settle(str(source), {"variation": job.settings.variation, "shadows": False})
    except ValueError as error:
        raise UserError(error) from error


def convert_recordings(job: Job) -> None:
    directory = job.dataset.parent
    if not is_done(directory, job.made_of):
        with stage(directory, job.made_of):
            sizes = {"count": job.settings.demonstrations, "workers": job.workers}
            convert([job.recordings], job.dataset, repo_id=REPO_ID, **sizes)


def train_base(job: Job) -> None:
    """Flow matching from scratch."""
    settings = job.settings.training
    lines = (job.dataset / "meta" / INSTRUCTIONS).read_text().splitlines()
    texts = [text for line in map(json.loads, lines) for kind in ("seen", "unseen") for text in line[kind]]
    tokenizer = job.output / "train" / "tokenizer"
    flags = base_flags(settings, pi05(settings, tokenizer, texts, job.settings.image_size))
    flags |= {"policy.max_action_dim": 16, "policy.max_state_dim": 16, "policy.tokenizer_max_length": PROMPT_LENGTH}
    _train(job, job.run_of("base"), [*job.made_of, settings, flags], flags)


def train_branch(objective: str, job: Job) -> None:
    """`objective` from the checkpoint of the base, of the same length as the other one."""
    base, flags = job.run_of("base"), branch_flags(job.settings.training, objective, checkpoint(job.run_of("base")))
    _train(job, job.run_of(objective), [(base.parent / STAMP).read_text(), flags], flags)


def _train(job: Job, run: Path, chosen: object, flags: dict[str, object]) -> None:
    if not is_done(run.parent, chosen):
        name = run.parent.name
        bar = job.bar(name, int(str(flags["steps"])), beside=2 * (name == FLOW_MATCHING))
        with stage(run.parent, chosen), bar:
            lerobot_train(flags, job.dataset, run, run.parent / "log.txt", bar)


def compare(job: Job) -> None:
    """`ofp-compare`, which goes on where it was interrupted."""
    output, episodes = job.comparison, job.settings.episodes
    command = [str(Path(sys.executable).with_name("ofp-compare")), "--env=robotwin", "--robotwin-cpu"]
    command += [f"--tasks={job.task}", f"--episodes={episodes}", f"--baseline={BASELINE}", f"--output={output}"]
    command += ["--instruction-type=seen", "--devices=cpu", "--videos=2", f"--workers={job.workers}"]
    for name, objective, sampling in ROWS:
        command += ["--policy", f"name={name},path={checkpoint(job.run_of(objective))},{sampling}"]

    def played() -> int:
        lines = output / "episodes.jsonl"
        return len(lines.read_text().splitlines()) if lines.is_file() else 0

    _watch(command, job.output / "compare.txt", played, job.bar("compare", episodes * len(ROWS)))


STAGES: dict[str, tuple[tuple[Callable[[Job], None], ...], ...]] = {
    "collect": ((collect,),),
    "convert": ((convert_recordings,),),
    "train": ((train_base,), (partial(train_branch, OFP), partial(train_branch, FLOW_MATCHING))),
    "compare": ((compare,),),
}
"""Of each stage what is done one after another; the members of each may run side by side."""


def _watch(command: Sequence[str], log: Path, done: Callable[[], int], bar: tqdm) -> None:
    """Runs a command, its output at the end of `log`, its progress told by `done`. Raises UserError where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, bar:  # another run may be writing there, by which this one may be refused
        begin = file.tell()
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
        raise UserError(f"{' '.join(command[:4])} failed with exit code {code}: {_end_of(log, begin)}")


def _end_of(log: Path, begin: int) -> str:
    """The last lines, of progress the last state alone."""
    with log.open(errors="replace", newline="") as file:
        file.seek(begin)
        lines = [line.rpartition("\r")[2] for line in file.read().replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if line.strip())[-1500:]
