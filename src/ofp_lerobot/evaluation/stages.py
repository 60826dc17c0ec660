"""Stages that are done once: each has a directory with a stamp that says with which settings it was finished."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from time import time
from typing import Any

from ..files import write_whole
from .provenance import provenance

STAMP = "stamp.json"
BEGUN = "begun.json"


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


def made_by(directories: Iterable[Path]) -> dict[str, Any]:
    """Versions, machine and commit of the finished stages; several commits are all named."""
    found = [json.loads((directory / STAMP).read_text())["provenance"] for directory in directories]
    commits = sorted({str(one["commit"]) for one in found})
    return {
        **found[-1],
        "commit": ", ".join(commits),
        "uncommitted_changes": any(one["uncommitted_changes"] for one in found),
    }


@contextmanager
def stage(directory: Path, settings: Any, *, goes_on: bool = False) -> Iterator[None]:
    """Empties `directory` for new work and stamps it when the work ends without an error.

    goes_on: the work can take up what it left. Then `directory` is kept where the same settings began it, and the
    stamp's seconds count the earlier attempts, each until its last written file.
    """
    before = _spent(directory, settings) if goes_on else None
    if before is None and directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    began = time()
    begun = {"settings": plain(settings), "seconds_before": before or 0, "began": began}
    write_whole(directory / BEGUN, json.dumps(begun))
    yield
    seconds = (before or 0) + time() - began
    stamp = {"settings": plain(settings), "seconds": round(seconds, 1), "provenance": provenance()}
    write_whole(directory / STAMP, json.dumps(stamp, indent=2))


def _spent(directory: Path, settings: Any) -> float | None:
    """Seconds of the unfinished attempts with these settings that `directory` holds, None where there is none."""
    file = directory / BEGUN
    if (directory / STAMP).exists() or not file.is_file():
        return None
    begun = json.loads(file.read_text())
    if begun["settings"] != plain(settings):
        return None
    last = max(each.lstat().st_mtime for each in directory.rglob("*"))
    return begun["seconds_before"] + max(0.0, last - begun["began"])
