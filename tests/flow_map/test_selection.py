"""The choice among samples, against the definition written out."""

import numpy as np
import pytest
import torch

from ofp_lerobot.flow_map.selection import densest
from tests.small import densest_by_hand


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_sample_nearest_to_its_nearest(k, seed):
    samples = torch.randn(k, 5, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    np.testing.assert_array_equal(densest(samples.float()).numpy(), densest_by_hand(samples.float().double().numpy()))


def test_it_stays_in_a_mode_where_the_medoid_is_between_them():
    modes = torch.tensor([-1.0, 1.0]).repeat_interleave(4) + 0.01 * torch.arange(8) / 8
    samples = torch.cat([torch.zeros(1), modes]).view(9, 1, 1, 1)
    medoid = samples.flatten()[torch.cdist(samples.flatten(1), samples.flatten(1)).sum(1).argmin()]
    assert medoid == 0
    assert abs(abs(densest(samples).item()) - 1) < 0.02


def test_samples_that_are_alike_are_told_apart():
    """Distances of 1e-4 beside coordinates of 10."""
    at = torch.cumsum(torch.cat([torch.tensor([0.0]), torch.linspace(40, 1, 31)]), dim=0)  # ever closer
    samples = (10 + 1e-4 * at).view(32, 1, 1, 1).expand(32, 1, 4, 8)
    np.testing.assert_array_equal(densest(samples).numpy(), densest_by_hand(samples.double().numpy()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("k", "which"), [(1, [0]), (2, [1]), (5, [1, 3, 4]), (8, [5]), (8, [0, 1, 2, 4, 5, 6, 7])])
def test_what_is_not_finite_does_not_go_unnoticed(bad, k, which):
    samples = torch.randn(k, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    samples[which, 1, 0, 0] = bad
    answer = densest(samples)
    assert torch.isfinite(answer[0]).all() and not torch.isfinite(answer[1]).all()
