"""Seeds that are functions of (seed, step, rank) alone."""

import itertools

import numpy as np
import torch

from ofp_lerobot.flow_map.randomness import fold_in, folded_generator


def test_without_data_it_is_splitmix64():
    """The first outputs of the reference implementation, without their last bit."""
    assert fold_in(0) == 0xE220A8397B1DCDAF >> 1
    assert fold_in(1234567) == 6457827717110365317 >> 1


def test_distinct_across_seeds_steps_and_ranks():
    seeds, steps, ranks = (0, 1, 2, 1000, 2**62), range(400), range(8)
    folded = {fold_in(*key) for key in itertools.product(seeds, steps, ranks)}
    assert len(folded) == len(seeds) * len(steps) * len(ranks)


def test_order_and_length_matter():
    keys = [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (0, 1, 0), (0, 0, 1), (1, 2, 3), (3, 2, 1), (1, 3, 2)]
    assert len({fold_in(*key) for key in keys}) == len(keys)


def test_range_for_any_integers():
    for key in [(0,), (-1,), (2**64 - 1, -1), (-(2**63), 2**63), (10**30, 10**20), *((7, step) for step in range(500))]:
        assert 0 <= fold_in(*key) < 2**63


def test_any_flipped_bit_flips_half_of_the_result():
    base = (1234, 56, 7)
    flips = []
    for position, bit in itertools.product(range(3), range(63)):
        changed = list(base)
        changed[position] ^= 1 << bit
        flips.append([(fold_in(*base) ^ fold_in(*changed)) >> k & 1 for k in range(63)])
    flips = np.array(flips)
    assert abs(flips.mean() - 0.5) < 0.02
    assert flips.sum(axis=1).min() > 12 and flips.sum(axis=1).max() < 51
    assert abs(flips.mean(axis=0) - 0.5).max() < 0.2


def test_generators_repeat_and_differ():
    def draws(*key: int) -> torch.Tensor:
        return torch.randn(2000, generator=folded_generator("cpu", *key))

    assert torch.equal(draws(3, 10, 1), draws(3, 10, 1))
    different = torch.stack([draws(*key) for key in [(3, 10, 1), (3, 10, 0), (3, 11, 1), (4, 10, 1), (3,)]])
    correlation = np.corrcoef(different.numpy()) - np.eye(5)
    assert np.abs(correlation).max() < 0.1


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = torch.randn(5, generator=folded_generator("cpu", 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(5, generator=folded_generator("cpu", 1, 2)), first)
