"""The expected values come from published tables, exact fractions and brute force, never from the module itself."""

from fractions import Fraction
from itertools import product
from math import comb, sqrt

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ofp_lerobot.evaluation.statistics import (
    Pairs,
    clustered_interval,
    mcnemar_p,
    mcnemar_power,
    paired_interval,
    smallest_difference,
    wilson_interval,
)

# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3 (score without continuity correction).
NEWCOMBE = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)}


@pytest.mark.parametrize(("counts", "expected"), NEWCOMBE.items())
def test_wilson_interval_reproduces_newcombes_table(counts, expected):
    assert wilson_interval(*counts) == pytest.approx(expected, abs=5e-5)


def test_wilson_interval_is_where_the_score_test_turns():
    for successes, n in ((0, 7), (3, 10), (60, 60), (371, 400)):
        for p in wilson_interval(successes, n):
            if 0 < p < 1:
                assert abs(successes / n - p) / sqrt(p * (1 - p) / n) == pytest.approx(1.959964, abs=1e-4)


def exact_p(b, c):
    """Probability of a split at least as uneven as b : c under fair tosses, in fractions."""
    n = b + c
    return sum(Fraction(comb(n, k), 2**n) for k in range(n + 1) if abs(2 * k - n) >= abs(b - c)) if n else Fraction(1)


def test_mcnemar_against_fractions():
    for b, c in product(range(12), repeat=2):
        assert mcnemar_p(Pairs(5, b, c, 3)) == pytest.approx(float(exact_p(b, c)), rel=1e-12)


def test_mcnemar_on_agrestis_approval_ratings():
    # Agresti, Categorical Data Analysis, section 10.1: 794, 150, 86, 570; difference .04, interval (.02, .06).
    pairs = Pairs(794, 150, 86, 570)
    assert pairs.difference == pytest.approx(0.04)
    assert paired_interval(pairs) == pytest.approx((0.02, 0.06), abs=2e-3)
    assert mcnemar_p(pairs) < 1e-4


def constrained_score(pairs, delta):
    """The score statistic with the discordant share fitted numerically under the constraint p12 − p21 = delta."""
    n, b, c = pairs.total, pairs.first_only, pairs.second_only
    rest = n - b - c

    def negative(q):
        cells = ((q + delta, b), (q, c), (1 - 2 * q - delta, rest))
        return -sum(count * np.log(max(p, 1e-300)) for p, count in cells if count)

    low, high = max(0.0, -delta), (1 - delta) / 2
    q = minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return (b - c - n * delta) / sqrt(n * (2 * q + delta - delta**2))


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (20, 5, 5, 20), (3, 0, 9, 8), (90, 1, 4, 5), (794, 150, 86, 570)])
def test_paired_interval_is_where_tangos_score_turns(cells):
    pairs = Pairs(*cells)
    low, high = paired_interval(pairs)
    assert low < pairs.difference < high
    assert constrained_score(pairs, low) == pytest.approx(1.959964, abs=2e-3)
    assert constrained_score(pairs, high) == pytest.approx(-1.959964, abs=2e-3)


def test_paired_interval_at_the_edges():
    assert paired_interval(Pairs(10, 0, 0, 0)).low == pytest.approx(-paired_interval(Pairs(10, 0, 0, 0)).high)
    assert paired_interval(Pairs(0, 10, 0, 0)).high == 1.0
    assert paired_interval(Pairs(0, 0, 10, 0)).low == -1.0


def brute_power(n, p, q):
    """Sum over all outcomes of n episodes, one by one in counts."""
    total = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            if exact_p(b, c) <= Fraction(1, 20):
                ways = comb(n, b) * comb(n - b, c)
                total += ways * p**b * q**c * (1 - p - q) ** (n - b - c)
    return total


@pytest.mark.parametrize(("n", "p", "q"), [(8, 0.5, 0.1), (20, 0.3, 0.05), (25, 0.02, 0.02), (12, 1.0, 0.0)])
def test_power_against_brute_force(n, p, q):
    assert mcnemar_power(n, p, q) == pytest.approx(brute_power(n, p, q), abs=1e-9)


def test_smallest_difference_has_the_power_it_claims():
    for n, discordant in ((20, 0.3), (60, 0.2), (100, 0.0), (400, 0.1)):
        difference = smallest_difference(n, discordant)
        total = max(discordant, difference)
        p, q = (total + difference) / 2, (total - difference) / 2
        assert mcnemar_power(n, p, q) == pytest.approx(0.8, abs=5e-3)
    # Five discordant episodes are never significant: 2 · 2⁻⁵ > .05.
    assert smallest_difference(5, 0.5) is None
    assert smallest_difference(6, 0.5) is not None


def test_pairs_want_the_same_episodes():
    assert Pairs.of([True, True, False, False], [True, False, True, False]) == Pairs(1, 1, 1, 1)
    with pytest.raises(ValueError):
        Pairs.of([True], [])


def coins(rng, groups, n, deviation):
    """Paired differences of −1, 0 and 1 around 0, whose mean has `deviation` from group to group."""
    lead = rng.normal(0, deviation, size=(groups, 1)) / 2
    draw = rng.random((groups, n))
    return (draw < 0.1 + lead).astype(int) - (draw > 0.9 + lead)


@pytest.mark.parametrize(("groups", "deviation"), [(24, 0.0), (24, 0.05), (3, 0.05)])
def test_clustered_interval_holds_the_truth_as_often_as_it_says(groups, deviation):
    rng = np.random.default_rng(0)
    found = [clustered_interval(coins(rng, groups, 50, deviation)) for _ in range(500)]
    assert 0.93 <= np.mean([low <= 0 <= high for low, high in found]) <= 0.99


def test_clustered_interval_of_independent_samples_is_that_of_their_mean():
    differences = coins(np.random.default_rng(1), 24, 50, 0.0)
    low, high = clustered_interval(differences)
    assert high - low == pytest.approx(3.92 * differences.std() / sqrt(differences.size), rel=0.2)
    low, high = clustered_interval([differences.ravel()])
    assert high - low == pytest.approx(3.92 * differences.std() / sqrt(differences.size), rel=0.01)
    # Groups that are alike by chance say no more than their samples.
    alike = np.tile([1, 0, 0, -1] * 5, (3, 1))
    low, high = clustered_interval(alike)
    assert high - low == pytest.approx(3.92 * alike.std() / sqrt(alike.size), rel=0.05)
