"""Writing that a kill cannot leave half done."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes so that a reader, or a kill, meets the old content or the new."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
