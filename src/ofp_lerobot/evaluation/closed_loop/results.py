"""Episodes on disk: one JSON line each, appended by one process, so that a killed run loses only what was running."""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self, TextIO

PACKAGES = ("lerobot_policy_ofp", "lerobot", "torch", "transformers", "numpy", "metaworld", "mujoco", "libero")


class Key(NamedTuple):
    """What is counted once."""

    policy: str
    task: str
    condition: str
    seed: int


@dataclass(frozen=True)
class Chunk:
    """One answer of the policy.

    latency_ms: from the observation on the host to actions on the host, synchronised, after a warm-up.
    evaluations: network evaluations. jump: `planning.jump` to the last chunk, None for the first of an episode.
    """

    latency_ms: float
    evaluations: int
    jump: float | None


@dataclass(frozen=True)
class Episode:
    """One episode of one policy. An `error` is neither success nor failure: `success` is None then."""

    policy: str
    task: str
    condition: str
    seed: int
    instruction: str
    success: bool | None
    steps: int
    seconds: float
    chunks: list[Chunk] = field(default_factory=list)
    error: str | None = None
    versions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.success is None) != (self.error is not None):
            raise ValueError("an episode has either an outcome or an error")

    @property
    def key(self) -> Key:
        return Key(self.policy, self.task, self.condition, self.seed)

    @classmethod
    def from_json(cls, line: str) -> Self:
        values = json.loads(line)
        unknown = values.keys() - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields {sorted(unknown)}")
        chunks = [Chunk(**chunk) for chunk in values.pop("chunks")]
        return cls(**values, chunks=chunks)

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)


class Results:
    """The file of a comparison. Use `open_results`, which makes sure that nobody else writes to it."""

    def __init__(self, file: TextIO, episodes: Iterable[Episode]) -> None:
        self._file = file
        self._done: dict[Key, Episode] = {}
        self._errors: dict[Key, Episode] = {}
        for episode in episodes:
            self._count(episode)

    def _count(self, episode: Episode) -> None:
        if episode.key in self._done:
            raise ValueError(f"episode {tuple(episode.key)} has an outcome already")
        if episode.error is None:
            self._done[episode.key] = episode
            self._errors.pop(episode.key, None)
        else:
            self._errors[episode.key] = episode

    def add(self, episode: Episode) -> None:
        """Counts and writes through to the disk. Raises ValueError where this episode has an outcome."""
        self._count(episode)
        self._file.write(episode.to_json() + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def has_outcome(self, key: Key) -> bool:
        """Whether the episode ended with success or failure; one that ended with an error has none and is run again."""
        return key in self._done

    @property
    def episodes(self) -> list[Episode]:
        """Outcomes, and errors that no later attempt replaced."""
        return [*self._done.values(), *self._errors.values()]


@contextmanager
def open_results(path: Path) -> Iterator[Results]:
    """Reads what is there, cuts off a line that a killed run left unfinished, and locks the file.

    Raises RuntimeError where another run has it open, ValueError where a line is not an episode.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RuntimeError(f"{path} is in use by another run; wait for it, or choose another --output") from error
        file.seek(0)
        text = file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            file.truncate(len(whole.encode()))
        yield Results(file, _parse(whole, path))


def read_results(path: Path) -> list[Episode]:
    """The episodes of a file, whether or not its run has ended."""
    text = path.read_text(encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        return Results(nowhere, _parse(text[: text.rfind("\n") + 1], path)).episodes


def _parse(text: str, path: Path) -> Iterator[Episode]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield Episode.from_json(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}, is not an episode: {error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes so that a reader, or a kill, meets the old content or the new."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def provenance() -> dict[str, Any]:
    """Versions of what runs, and the commit where this is a checkout."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = git_commit(Path(__file__).parent)
    return versions | ({"commit": commit} if commit else {})


def git_commit(directory: Path) -> str | None:
    """HEAD of the checkout at `directory`, with "+" where files differ from it; None where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(
            ["git", *arguments], cwd=directory, text=True, stderr=subprocess.DEVNULL, timeout=20
        ).strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
