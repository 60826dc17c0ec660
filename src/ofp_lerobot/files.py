"""Writing that a kill cannot leave half done."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which then becomes `path`: a reader, or a kill, meets the old content or the new.

    Its suffix is that of `path`, by which writers choose their format. Where an exception comes it is removed.
    """
    scratch = path.with_name(f".new.{path.name}")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Text is written in UTF-8."""
    with whole_file(path) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
