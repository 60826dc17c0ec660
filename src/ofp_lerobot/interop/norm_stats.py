"""Statistics: openpi's norm_stats.json and LeRobot's normalisation.

π₀.₅ scales by the 1 % and 99 % quantiles in both. openpi divides by q99 − q01 + 1e-6, LeRobot by q99 − q01, so
q99 + 1e-6 makes LeRobot's formula openpi's. In both the action's statistics are of what the network answers, after
the delta transform.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lerobot.utils.constants import ACTION, OBS_STATE

from ..errors import UserError
from .directories import read_json

FILENAME = "norm_stats.json"
EPSILON = 1e-6  # openpi's, in transforms.Normalize
_LEROBOTS = 1e-8  # LeRobot's normaliser divides by it where q99 = q01
_NAMES = {OBS_STATE: "state", ACTION: "actions"}
_KINDS = ("mean", "std", "q01", "q99")

Statistics = dict[str, dict[str, np.ndarray]]


def find_asset(assets: Path, asset_id: str | None) -> tuple[str, Path]:
    """(asset id, norm_stats.json) under a checkpoint's `assets`. Raises UserError where there is none, or several."""
    found = {str(path.parent.relative_to(assets)): path for path in sorted(assets.rglob(FILENAME))}
    if not found:
        raise UserError(
            f"{assets} has no <asset id>/{FILENAME}: copy it from the training run's assets (openpi's conversion "
            "from JAX does not bring it along)"
        )
    if asset_id is None and len(found) > 1:
        raise UserError(f"{assets} has statistics for {', '.join(found)}: choose with --asset-id")
    name = asset_id if asset_id is not None else next(iter(found))
    if name not in found:
        raise UserError(f"{assets} has no statistics for --asset-id {name}, but for {', '.join(found)}")
    return name, found[name]


def read_openpi(path: Path) -> Statistics:
    """openpi's statistics under LeRobot's keys, as they are. Raises UserError where some are missing or damaged."""
    raw = read_json(path).get("norm_stats")
    if not isinstance(raw, dict) or not all(isinstance(raw.get(name), dict) for name in _NAMES.values()):
        raise UserError(f"{path} is not openpi's: it needs norm_stats.state and norm_stats.actions")
    stats: Statistics = {}
    for key, name in _NAMES.items():
        missing = [kind for kind in _KINDS if raw[name].get(kind) is None]
        if missing:
            raise UserError(
                f"{path} lacks {' and '.join(missing)} of {name}: π₀.₅ is normalised by quantiles, compute them with "
                "openpi's scripts/compute_norm_stats.py"
            )
        stats[key] = {kind: np.asarray(raw[name][kind], np.float64) for kind in _KINDS}
        sizes = {value.shape for value in stats[key].values()}
        if len(sizes) > 1 or not all(np.isfinite(value).all() for value in stats[key].values()):
            raise UserError(f"{path}: the statistics of {name} have different lengths or are not finite")
    return stats


def size(stats: Statistics, key: str, wanted: int | None, flag: str) -> int:
    """The robot's dimensions. openpi's older statistics are padded to the network's, with zeros.

    Raises UserError where they cannot be told apart from padding, or `wanted` exceeds them.
    """
    q01, q99 = stats[key]["q01"], stats[key]["q99"]
    if wanted is not None:
        if not 1 <= wanted <= len(q01):
            raise UserError(f"{flag} {wanted}: the statistics have {len(q01)} dimensions")
        return wanted
    if q01[-1] == q99[-1] == 0:
        raise UserError(
            f"the statistics of {_NAMES[key]} have {len(q01)} dimensions and end in zeros, which may be padding: give "
            f"the robot's number with {flag}"
        )
    return len(q01)


def from_openpi(stats: Statistics, sizes: dict[str, int]) -> Statistics:
    """For LeRobot's normaliser: cut to the robot's dimensions, q99 + 1e-6."""
    cut = {key: {kind: value[: sizes[key]] for kind, value in of.items()} for key, of in stats.items()}
    return {key: {**of, "q99": of["q99"] + EPSILON} for key, of in cut.items()}


def to_openpi(stats: Statistics) -> dict[str, Any]:
    """What norm_stats.json holds: q99 − 1e-6, and LeRobot's answer to q99 = q01 kept."""
    written = {}
    for key, name in _NAMES.items():
        of = {kind: stats[key][kind].astype(np.float64) for kind in _KINDS}
        width = np.where(of["q99"] == of["q01"], _LEROBOTS, of["q99"] - of["q01"])
        written[name] = {kind: value.tolist() for kind, value in {**of, "q99": of["q01"] + width - EPSILON}.items()}
    return {"norm_stats": written}


def coarse(stats: Statistics) -> list[str]:
    """Dimensions whose range float32 holds to worse than one part in a thousand: LeRobot keeps float32 only."""
    found = []
    for key, of in stats.items():
        q01, q99 = of["q01"].astype(np.float32), of["q99"].astype(np.float32)
        exact = of["q99"] - of["q01"]
        wrong = np.abs((q99 - q01).astype(np.float64) - exact) > 1e-3 * np.abs(exact)
        found += [f"{key}[{i}]" for i in np.flatnonzero(wrong)]
    return found
