"""Episodes as videos, and the same episode under several policies side by side."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import whole_file, write_whole

FRAMES_PER_SECOND = 20


def write_frames(path: Path, frames: Sequence[NDArray[np.uint8]]) -> None:
    """frames: (h, w, 3) each. The file is there when all of them are in it."""
    from lerobot.utils.io_utils import write_video

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as scratch:
        write_video(scratch, list(frames), FRAMES_PER_SECOND)


def read_frames(path: Path) -> list[NDArray[np.uint8]]:
    """All frames of a video file, each (h, w, 3) RGB."""
    import av

    container = av.open(str(path))
    try:
        return [np.asarray(frame.to_ndarray(format="rgb24"), np.uint8) for frame in container.decode(video=0)]
    finally:
        container.close()


def side_by_side(directory: Path, policies: Sequence[str]) -> Iterator[Path]:
    """For each episode filmed under several policies one video, in this order; each holds its last frame to the end.

    One that is there of the same films is kept.
    """
    for episode in sorted(path for path in directory.glob("*/*") if path.is_dir()):
        films = [episode / f"{name}.mp4" for name in policies if (episode / f"{name}.mp4").is_file()]
        if len(films) < 2:
            continue
        together, made_of = episode.with_suffix(".mp4"), episode / "side_by_side.json"
        shown = json.dumps([[film.name, film.stat().st_mtime_ns] for film in films])
        if not together.exists() or not made_of.is_file() or made_of.read_text() != shown:
            frames = [read_frames(film) for film in films]
            length = max(map(len, frames))
            write_frames(
                together,
                [np.concatenate([each[min(i, len(each) - 1)] for each in frames], axis=1) for i in range(length)],
            )
            write_whole(made_of, shown)
        yield together
