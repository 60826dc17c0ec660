"""Success rates, their intervals, and what paired episodes can tell apart. Exact wherever that is affordable."""

from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm, t

SIGNIFICANCE, POWER = 0.05, 0.8


class Interval(NamedTuple):
    low: float
    high: float


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a success rate (Wilson 1927), without continuity correction."""
    interval = binomtest(successes, episodes).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap_interval(
    statistic: Callable[..., NDArray[np.floating]],
    *samples: NDArray[np.floating],
    resamples: int,
    seed: int = 0,
) -> Interval:
    """95 % interval of a statistic of paired samples, by percentiles.

    `scipy.stats.bootstrap(paired=True)` draws other resamples, so with it published intervals would change in their
    last digits.

    Args:
        statistic: of samples (resamples, n) each, over their last axis: (resamples,).
        samples: (n,) each; element i of one belongs to element i of the others.
    """
    n = len(samples[0])
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    found = statistic(*(sample[drawn] for sample in samples))
    low, high = np.quantile(found, (0.025, 0.975))
    return Interval(float(low), float(high))


def clustered_interval(groups: Sequence[NDArray[np.number]]) -> Interval:
    """95 % interval of the mean over groups of samples that belong together, by Student's t over the groups' means.

    It is never narrower than what the samples within the groups allow: three groups can be alike by chance. One group's
    interval is that of its samples.

    Args:
        groups: (n,) each, of one size or nearly; such as the paired differences of a training's episodes.
    """
    count = len(groups)
    means = [float(group.mean()) for group in groups]
    within = sqrt(sum(float(group.var(ddof=1)) / len(group) for group in groups if len(group) > 1)) / count
    half = float(norm.ppf(0.975)) * within
    if count > 1:
        half = max(half, float(t.ppf(0.975, count - 1)) * float(np.std(means, ddof=1)) / sqrt(count))
    mean = float(np.mean(means))
    return Interval(mean - half, mean + half)


class Pairs(NamedTuple):
    """The same episodes under two policies, by outcome."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "Pairs":
        """From outcomes in the same order. Raises ValueError where the lengths differ."""
        both = first_only = second_only = neither = 0
        for a, b in zip(first, second, strict=True):
            both += a and b
            first_only += a and not b
            second_only += b and not a
            neither += not a and not b
        return cls(both, first_only, second_only, neither)

    @property
    def total(self) -> int:
        """Number of episodes."""
        return sum(self)

    @property
    def difference(self) -> float:
        """Success rate of the first minus that of the second."""
        return (self.first_only - self.second_only) / self.total

    @property
    def discordant(self) -> int:
        """Episodes that exactly one of the two solved; only these tell the policies apart."""
        return self.first_only + self.second_only


def mcnemar_p(pairs: Pairs) -> float:
    """Two-sided exact McNemar test: the discordant episodes are fair coin tosses if the policies are equal."""
    return float(binomtest(pairs.first_only, pairs.discordant).pvalue) if pairs.discordant else 1.0


def paired_interval(pairs: Pairs, confidence: float = 0.95) -> Interval:
    """Tango's score interval of the paired difference (Statistics in Medicine 17, 1998).

    Its test at a difference of 0 is McNemar's without continuity correction.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    d = pairs.difference

    def low(delta: float) -> float:
        return _tango_score(pairs, delta) - z

    def high(delta: float) -> float:
        return _tango_score(pairs, delta) + z

    edge = 1 - 1e-9
    return Interval(
        brentq(low, -edge, d) if d > -1 and low(-edge) > 0 else -1.0,
        brentq(high, d, edge) if d < 1 and high(edge) < 0 else 1.0,
    )


def _tango_score(pairs: Pairs, delta: float) -> float:
    """Standardised difference under the hypothesis that the true difference is `delta`."""
    n, b, c = pairs.total, pairs.first_only, pairs.second_only
    # q: the maximum-likelihood share of `second_only` episodes, a root of 2n·q² + B·q + C = 0.
    linear = -b - c + (2 * n - b + c) * delta
    constant = -c * delta * (1 - delta)
    q = (sqrt(max(linear**2 - 8 * n * constant, 0.0)) - linear) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    excess = b - c - n * delta
    return excess / sqrt(variance) if variance > 0 else np.inf * np.sign(excess) if excess else 0.0


def mcnemar_power(episodes: int, first_only: float, second_only: float, significance: float = SIGNIFICANCE) -> float:
    """Probability that the exact test rejects at `significance`, where these shares of episodes are discordant."""
    discordant = first_only + second_only
    if not discordant:
        return 0.0
    m = np.arange(episodes + 1)
    threshold = _rejection_thresholds(episodes, significance)
    share = first_only / discordant
    rejects = binom.cdf(threshold, m, share) + binom.sf(m - threshold - 1, m, share)
    return float((binom.pmf(m, episodes, min(discordant, 1.0)) * rejects).sum())


@cache
def _rejection_thresholds(episodes: int, significance: float) -> np.ndarray:
    """(episodes + 1,) For m discordant episodes the largest k that is significant, and m − k with it; or −1."""
    m = np.arange(episodes + 1)
    k = binom.ppf(significance / 2, m, 0.5)
    k = np.where(binom.cdf(k, m, 0.5) > significance / 2, k - 1, k)
    return np.where(m == 0, -1, k)


def smallest_difference(
    episodes: int, discordant: float, *, power: float = POWER, significance: float = SIGNIFICANCE
) -> float | None:
    """The smallest true difference in success that this many paired episodes detect with probability `power`.

    discordant: the share of episodes that exactly one of the policies solves. A difference cannot exceed it, so beyond
    it every discordant episode goes to one policy. None where even a difference of 1 is too small.
    """

    def shortfall(difference: float) -> float:
        total = max(discordant, difference)
        return mcnemar_power(episodes, (total + difference) / 2, (total - difference) / 2, significance) - power

    if shortfall(1.0) < 0:
        return None
    return float(brentq(shortfall, 0.0, 1.0, xtol=1e-4))
