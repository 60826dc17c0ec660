"""Measures of action chunks: how much successive ones disagree, and how alike two sets of them are."""

import numpy as np
from numpy.typing import NDArray


def jump(
    before: NDArray[np.floating] | None, after: NDArray[np.floating], executed: int, steps: int | None = None
) -> float | None:
    """Root mean square difference between two plans (h, a), the later made after `executed` steps of the earlier.

    Over the steps that both planned, or the first `steps` of them; where the earlier was executed whole, between the
    two actions at the seam. None without an earlier one.
    """
    if before is None:
        return None
    common = len(before) - executed if steps is None else min(steps, len(before) - executed)
    difference = after[:common] - before[executed:][:common] if common else after[:1] - before[-1:]
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))


def energy_distance(samples: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """2·E‖X − Y‖ − E‖X − X′‖ − E‖Y − Y′‖, 0 in the mean where X and Y have one distribution.

    X is estimated from independent draws `samples` (n, ...); Y is drawn from `reference` (m, ...), which need not be
    independent draws. Distances are root mean squares over the elements, so in units of one action.
    """

    def distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.floating]:
        gap = a.reshape(len(a), 1, -1) - b.reshape(1, len(b), -1)
        return np.sqrt(np.mean(gap**2, axis=-1))

    within = distances(samples, samples).sum() / (len(samples) * (len(samples) - 1))
    return float(2 * distances(samples, reference).mean() - within - distances(reference, reference).mean())


def spread(chunks: NDArray[np.floating]) -> float:
    """Root mean square standard deviation over the draws of chunks (observations, draws, ...)."""
    return float(np.sqrt(np.mean(np.var(chunks, axis=1, ddof=1))))
