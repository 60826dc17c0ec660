"""Whether statistics can normalise what they are of, asked before training, before a verdict and by the servers.

LeRobot normalises whatever it is given: a gripper that closed in 1 of 120 frames has q01 = q99, and its closed
positions become 2e8. The test is what its formula makes of the smallest and the largest value that the data hold.
Statistics: feature -> name ("q01", "q99", "min", …) -> values (n,), in the data's units.
"""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.utils.constants import ACTION

from ..compat import names_are_mapped
from .sources import start_from
from .training_state import resumed_from

logger = logging.getLogger(__name__)

Statistics = Mapping[str, Mapping[str, Any]]
Mapped = Mapping[Any, NormalizationMode]  # LeRobot's normalization_mapping

BOUNDS = {
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.MEAN_STD: ("mean", "std"),
}
"""What a normalisation needs of a feature's statistics."""

_EPSILON = 1e-8  # LeRobot's, in place of a range that is 0 and beside a deviation
# Largest normalised values that are worth a warning, and that may stop a run. Quantiles hold 98 (80) in 100 values
# within ±1. A value of n can be √n deviations from their mean, so a deviation stops a run only where no dataset
# explains it.
_WARN = {NormalizationMode.MEAN_STD: 100.0}, 10.0
_STOP = {NormalizationMode.MEAN_STD: 10_000.0}, 100.0
# And only where they dominate the loss, which grows as their mean square: one broken frame of a million does not, a
# gripper does that closed in one of 120. Usual are 0.5 to 1. A first batch holds few values, one of which weighs more.
_DOMINATES, _DOMINATES_BATCH = 3.0, 30.0
FAR = 3.0  # half of a dimension's values beyond this: the statistics are of other data


def recompute(repo_id: str = "<dataset>", root: str = "<its directory>", *flags: str) -> str:
    """How to compute a dataset's statistics anew, to follow "by". root: quoted for a shell.

    LeRobot writes them into a copy, also with --operation.overwrite, unless --new_root names the dataset's directory.
    Its script that only adds quantiles pushes the dataset to the Hub.
    """
    command = f"lerobot-edit-dataset --operation.type=recompute_stats --repo_id={repo_id} --root={root}"
    return (
        f"{' '.join((command, *flags))}, then train on the copy that it writes, --dataset.repo_id="
        f"{repo_id}_recomputed_stats without --dataset.root"
    )


def lacking(
    statistics: Statistics, features: Mapping[str, PolicyFeature], mapping: Mapped
) -> dict[str, tuple[str, ...]]:
    """Of the features that cannot be normalised: the names of statistics that are missing for it.

    LeRobot passes such values through as they are.
    """
    found = {}
    for key, feature in features.items():
        needed = BOUNDS.get(mapping.get(feature.type, NormalizationMode.IDENTITY), ())
        if missing := tuple(name for name in needed if name not in statistics.get(key, {})):
            found[key] = missing
    return found


def check_statistics(config: Any, statistics: Statistics | None) -> None:
    """Raises ValueError where the statistics of a dataset (None: not known yet) lack what the normalisation needs."""
    if statistics is None:
        return
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for key, missing in lacking(statistics, features, config.normalization_mapping).items():
        if key not in statistics:
            where = "give --rename_map" if names_are_mapped() else "rename it in the dataset (--rename_map will not do)"
            raise ValueError(
                f"the dataset has no statistics of {key!r}, only of {', '.join(sorted(statistics))}: where it is there "
                f"by another name, {where}; else compute them by {recompute()}"
            )
        kind = features[key].type
        raise ValueError(
            f"the dataset has no {' and '.join(missing)} statistics for {key!r}, which normalization_mapping "
            f"{kind.value}={config.normalization_mapping[kind].value} needs: set "
            f"--policy.normalization_mapping to what the dataset has, or compute them by {recompute()}"
        )


class Problem(NamedTuple):
    """One dimension that the statistics do not fit.

    kind: "broken" (NaN, infinite, upside down or of another size), "narrow" (values leave the network's range) or
    "wide" (they may be rare but far). text: dimension and values, a sentence without its end.
    """

    key: str
    kind: Literal["broken", "narrow", "wide"]
    text: str


def find_problems(
    statistics: Statistics,
    features: Mapping[str, PolicyFeature],
    mapping: Mapped,
    names: Mapping[str, Sequence[str]] | None = None,
) -> list[Problem]:
    """What is wrong with the statistics of `features`, by LeRobot's formulas in float32; images are left out.

    Constant dimensions are fine, statistics that lack what the mode needs are another check's. Where min and max are
    not known, the deviation tells how far the data go at least. names: of a feature's dimensions.
    """
    found = []
    for key, feature in features.items():
        mode = mapping.get(feature.type, NormalizationMode.IDENTITY)
        known = {name: flat(value) for name, value in statistics.get(key, {}).items()}
        if feature.type is FeatureType.VISUAL or mode not in BOUNDS or not set(BOUNDS[mode]) <= known.keys():
            continue
        found += _of_feature(key, int(np.prod(feature.shape)), mode, known, (names or {}).get(key, ()))
    return found


def _of_feature(
    key: str, size: int, mode: NormalizationMode, known: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[Problem]:
    needed = BOUNDS[mode]
    if not key.startswith(ACTION):  # a checkpoint may declare its base model's padded size; the data's is what counts
        size = len(known[needed[0]])
    if wrong := [name for name in needed if len(known[name]) != size]:
        text = f"{key}: {wrong[0]} has {len(known[wrong[0]])} values, the data {size} dimensions"
        return [Problem(key, "broken", text)]
    low, high = (known[name] for name in needed)
    smallest, largest = _extent(known, size, needed)
    usual = _usual(known, low, high, mode)
    problems = []
    for i in range(size):
        where = f"{key}[{i}]{f' ({names[i]})' if len(names) == size else ''}"
        values = f"{needed[0]}={_number(low[i])}, {needed[1]}={_number(high[i])}"
        if not (np.isfinite(low[i]) and np.isfinite(high[i])):
            problems.append(Problem(key, "broken", f"{where}: {values}"))
            continue
        if high[i] < (0 if mode is NormalizationMode.MEAN_STD else low[i]):
            problems.append(Problem(key, "broken", f"{where}: {values}, upside down"))
            continue
        if not (np.isfinite(smallest[i]) and np.isfinite(largest[i])):
            extent = f"min={_number(smallest[i])}, max={_number(largest[i])}"
            problems.append(
                Problem(key, "broken", f"{where}: {values}, {extent}: the data hold NaN or infinite values")
            )
            continue
        with np.errstate(over="ignore"):
            reach = max(float(abs(normalise(value[i], low[i], high[i], mode))) for value in (smallest, largest))
        if reach <= _limit(_WARN, mode):
            continue
        weight = None if usual is None else float(usual[i])
        stops = reach > _limit(_STOP, mode) and (weight is None or not weight <= _DOMINATES)
        kind: Literal["narrow", "wide"] = "narrow" if stops else "wide"
        extent = f"the data reach from {_number(smallest[i])} to {_number(largest[i])}"
        problems.append(Problem(key, kind, f"{where}: {values}, {extent}, normalised up to {reach:.3g}"))
    return problems


def flat(value: Any) -> np.ndarray:
    """Float32, as LeRobot normalises, of a tensor on any device, an array or a list."""
    value = value.detach().float().cpu().numpy() if hasattr(value, "detach") else value
    with np.errstate(over="ignore"):
        return np.atleast_1d(np.asarray(value, np.float64).astype(np.float32)).reshape(-1)


def _extent(known: Mapping[str, np.ndarray], size: int, needed: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Values that the data reach, (size,) each; one that is surely among them where nothing tells more."""
    if all(name in known and len(known[name]) == size for name in ("min", "max")):
        return known["min"], known["max"]
    if all(name in known and len(known[name]) == size for name in ("mean", "std")):
        mean, low = known["mean"], known[needed[0]]
        std = np.where(np.abs(known["std"]) > 1e-6 * np.abs(mean), known["std"], 0)  # a constant's is rounding
        return np.where(std > 0, mean - std, low), np.where(std > 0, mean + std, low)
    return known[needed[0]], known[needed[0]]


def _usual(known: Mapping[str, np.ndarray], low: np.ndarray, high: np.ndarray, mode: NormalizationMode) -> Any:
    """Root mean square of the normalised values (n,), None where nothing tells it."""
    size = len(low)
    if mode is NormalizationMode.MEAN_STD or not all(len(known.get(name, ())) == size for name in ("mean", "std")):
        return None
    width = (high - low).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = 2 * known["std"].astype(np.float64) / np.where(width == 0, _EPSILON, width)
        return np.hypot(spread, normalise(known["mean"], low, high, mode))


def normalise(values: Any, low: Any, high: Any, mode: NormalizationMode) -> np.ndarray:
    """LeRobot's formula; low and high as of `BOUNDS`, everything (…, n) or broadcast to it, float32."""
    values, low, high = (np.asarray(x, np.float32) for x in (values, low, high))
    if mode is NormalizationMode.MEAN_STD:
        return (values - low) / (high + np.float32(_EPSILON))
    width = high - low
    return 2 * (values - low) / np.where(width == 0, np.float32(_EPSILON), width) - 1


def denormalise(values: Any, low: Any, high: Any, mode: NormalizationMode) -> np.ndarray:
    """What `normalise` made values (…, n) of."""
    values, low, high = (np.asarray(x, np.float32) for x in (values, low, high))
    if mode is NormalizationMode.MEAN_STD:
        return values * (high + np.float32(_EPSILON)) + low
    width = high - low
    return (values + 1) / 2 * np.where(width == 0, np.float32(_EPSILON), width) + low


def _limit(limits: tuple[dict[NormalizationMode, float], float], mode: NormalizationMode) -> float:
    return limits[0].get(mode, limits[1])


def _number(value: Any) -> str:
    return f"{float(value):.4g}"


def cure(problems: Collection[Problem], features: Mapping[str, PolicyFeature], mapping: Mapped) -> str:
    """What to do about the statistics of a dataset, as a sentence."""
    if any(problem.kind == "broken" for problem in problems):
        return f"Compute them anew by {recompute()}"
    types = {features[problem.key].type for problem in problems}
    changed = {
        **{getattr(kind, "value", kind): mode.value for kind, mode in mapping.items()},
        **{kind.value: NormalizationMode.MIN_MAX.value for kind in types},
    }
    return (
        "Normalise by the smallest and largest value, "
        f"--policy.normalization_mapping='{json.dumps(changed)}', or widen the named statistics in the dataset's "
        "meta/stats.json, which is also how to train on such data on purpose; a mistake in the data itself has to be "
        "mended there"
    )


def require_usable_statistics(config: Any, statistics: Statistics | None, binned: Collection[str] = ()) -> None:
    """Raises ValueError where a dataset's statistics are missing or would spoil training, warns where they may.

    config: a policy's. binned: features of which it only reads bins, so that values far outside lose detail, no more.
    """
    check_statistics(config, statistics)
    features = {**(config.input_features or {}), **(config.output_features or {})}
    mapping = config.normalization_mapping
    names = {ACTION: getattr(config, "action_feature_names", None) or ()}
    problems = find_problems(statistics or {}, features, mapping, names)
    severe = [p for p in problems if p.kind == "broken" or (p.kind == "narrow" and p.key not in binned)]
    verdict = "the statistics cannot normalise these data" if severe else "the statistics hardly fit these data"
    text = f"{verdict}: {'; '.join(p.text for p in severe or problems)}. {cure(severe or problems, features, mapping)}"
    if severe and (resumed := resumed_from(config.pretrained_path)) is not None:
        logger.warning(
            "%s: %s. This run goes on with the statistics that it began with. For others mend the dataset's, and start "
            "a new run from its weights with %s, without --resume",
            verdict,
            "; ".join(p.text for p in severe),
            start_from(resumed),
        )
    elif severe:
        raise ValueError(text)
    elif problems:
        logger.warning("%s", text)


def check_first_batch(
    largest: Sequence[float], usual: Sequence[float], mode: NormalizationMode, names: Sequence[str] = ()
) -> None:
    """Raises ValueError where normalised actions are far outside, warns where some are.

    largest, usual: the largest size and the root mean square of the first training batch's actions, for each dimension.
    That is how statistics of another dataset show: of a run that is resumed on other data, or of data that were
    changed afterwards. A single value that is far outside may be one broken frame of a large dataset.
    """
    if mode not in BOUNDS:
        return
    outside = [size > _DOMINATES_BATCH for size in usual]
    if mode is NormalizationMode.MEAN_STD:  # of few values one may be many deviations away
        outside = [value > _limit(_STOP, mode) for value in largest]
    far = {i: value for i, value in enumerate(largest) if outside[i] or value > _limit(_WARN, mode)}
    if not far:
        return
    listed = ", ".join(
        f"action[{i}]{f' ({names[i]})' if len(names) == len(largest) else ''} {v:.3g}" for i, v in far.items()
    )
    text = (
        f"the first batch's actions are far outside once normalised ({listed}; most should be within ±1): the "
        f"statistics are of other data. Where the dataset was changed, compute them anew by {recompute()}. Where a "
        "run is resumed on other data than it was started with, start a new one from its weights with --policy.path"
    )
    if any(outside):
        raise ValueError(text)
    logger.warning("%s", text.replace("are of other data", "may be of other data"))


def far_dimensions(values: np.ndarray, limit: float = FAR) -> dict[int, float]:
    """Of normalised values (…, n) the dimensions of which half are beyond `limit`, with the median size there."""
    if not np.size(values):
        return {}
    flat = np.abs(np.asarray(values, np.float64)).reshape(-1, np.shape(values)[-1])
    medians = np.nanmedian(np.where(np.isfinite(flat), flat, np.inf), axis=0)
    return {int(i): float(medians[i]) for i in np.flatnonzero(medians > limit)}
