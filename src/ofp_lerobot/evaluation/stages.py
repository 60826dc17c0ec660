"""Stages that are done once: each has a directory with a stamp that says with which settings it was finished."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from time import perf_counter, time
from typing import Any, NamedTuple

from ..files import write_whole
from .provenance import provenance

STAMP, BEGUN, RESULT = "stamp.json", "begun.json", "result.json"


def plain(settings: Any) -> Any:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings, default=lambda x: asdict(x) if is_dataclass(x) else str(x)))  # type: ignore[arg-type]


def is_done(directory: Path, settings: Any) -> bool:
    """Whether `directory` holds a stage finished with exactly these settings."""
    stamp = directory / STAMP
    return stamp.is_file() and json.loads(stamp.read_text())["settings"] == plain(settings)


def seconds_taken(directory: Path) -> float:
    """How long a finished stage took."""
    return json.loads((directory / STAMP).read_text())["seconds"]


def result_of(directory: Path) -> Any:
    """What the function of a finished `Job` returned."""
    return json.loads((directory / RESULT).read_text())


def made_by(directories: Iterable[Path]) -> dict[str, Any]:
    """Versions, machine and commit of the finished stages; several commits are all named."""
    return _joined([json.loads((directory / STAMP).read_text())["provenance"] for directory in directories])


def _joined(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last one's versions and machine, and the commits of all."""
    commits = sorted({commit for one in found for commit in str(one["commit"]).split(", ")})
    return {
        **found[-1],
        "commit": ", ".join(commits),
        "uncommitted_changes": any(one["uncommitted_changes"] for one in found),
    }


@contextmanager
def stage(directory: Path, settings: Any, *, goes_on: bool = False) -> Iterator[None]:
    """Empties `directory` for new work and stamps it when the work ends without an error.

    goes_on: the work can take up what it left. Then `directory` is kept where the same settings began it, and the stamp
    counts the seconds of the earlier attempts, each until its last written file, and names their commits.
    """
    attempts = _attempts(directory, settings) if goes_on else []
    if not attempts and directory.exists():
        for mark in (STAMP, BEGUN):  # first: what is half deleted must not be taken for work
            (directory / mark).unlink(missing_ok=True)
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    attempt = {"began": time(), "provenance": provenance()}
    write_whole(directory / BEGUN, json.dumps({"settings": plain(settings), "attempts": [*attempts, attempt]}))
    start = perf_counter()
    yield
    seconds = perf_counter() - start + sum(one["seconds"] for one in attempts)
    made = [one["provenance"] for one in (*attempts, attempt)]
    stamp = {"settings": plain(settings), "seconds": round(seconds, 1), "provenance": _joined(made)}
    write_whole(directory / STAMP, json.dumps(stamp, indent=2))


def _attempts(directory: Path, settings: Any) -> list[dict[str, Any]]:
    """The unfinished attempts with these settings whose work `directory` holds, each with its seconds."""
    file = directory / BEGUN
    if (directory / STAMP).exists() or not file.is_file():
        return []
    begun = json.loads(file.read_text())
    if begun["settings"] != plain(settings):
        return []
    *earlier, last = begun["attempts"]
    written = max(each.lstat().st_mtime for each in directory.rglob("*"))
    return [*earlier, {**last, "seconds": max(0.0, written - last["began"])}]


class Job(NamedTuple):
    """A stage whose work is `function(*arguments)`, with a result that fits into JSON. Workers get it pickled."""

    directory: Path
    settings: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def is_done(self) -> bool:
        return is_done(self.directory, self.settings)

    def run(self) -> None:
        with stage(self.directory, self.settings):
            (self.directory / RESULT).write_text(json.dumps(self.function(*self.arguments)))

    def result(self) -> Any:
        return result_of(self.directory)
