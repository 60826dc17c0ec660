"""The teacher's weights against a float64 loop."""

import numpy as np
import pytest
import torch

from ofp_lerobot.flow_map.ema import copy_weights, update_ema


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_ema_against_a_float64_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    student = {
        "a": torch.randn(5, 3, generator=generator).to(dtype),
        "b": torch.randn((), generator=generator).to(dtype),
    }
    average = copy_weights(student)
    expected = {name: w.double().numpy().copy() for name, w in student.items()}
    for _ in range(200):
        student = {
            name: (w + 0.01 * torch.randn(w.shape, generator=generator)).to(dtype) for name, w in student.items()
        }
        update_ema(average, student, 0.99)
        for name in expected:
            expected[name] = 0.99 * expected[name] + 0.01 * student[name].double().numpy()
    for name in expected:
        assert average[name].dtype == torch.float32
        np.testing.assert_allclose(average[name].numpy(), expected[name], atol=2e-6)


def test_small_changes_of_a_bf16_student_are_not_lost():
    """One bf16 step above 1 is 2⁻⁷; a hundredth of it would vanish in a bf16 average."""
    average = copy_weights({"w": torch.ones(1, dtype=torch.bfloat16)})
    update_ema(average, {"w": torch.full((1,), 1 + 2**-7, dtype=torch.bfloat16)}, 0.99)
    assert float(average["w"]) == pytest.approx(1 + 0.01 * 2**-7, abs=1e-7)


def test_copy_is_detached_and_independent():
    parameter = torch.nn.Parameter(torch.ones(3))
    average = copy_weights({"w": parameter})
    assert not average["w"].requires_grad
    update_ema(average, {"w": torch.nn.Parameter(torch.zeros(3))}, 0.5)
    assert average["w"].tolist() == [0.5] * 3 and parameter.tolist() == [1.0] * 3
    assert not average["w"].requires_grad


@pytest.mark.parametrize(("decay", "expected"), [(1.0, 2.0), (0.0, 4.0)])
def test_limits_of_the_decay(decay, expected):
    average = {"w": torch.full((2,), 2.0)}
    update_ema(average, {"w": torch.full((2,), 4.0)}, decay)
    assert average["w"].tolist() == [expected] * 2
