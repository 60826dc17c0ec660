"""What the engine's tests compare with, and the ways in which a policy's weights change under it."""

import torch

from tests import small

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).norm() / expected.norm() <= tolerance


def set_in_place(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)


def set_past_autograd(policy):
    for parameter in policy.parameters():
        parameter.data.mul_(1.02)


def swap(policy):
    for module in policy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.data * 0.98)


def train_a_step(policy):
    policy.train()
    optimizer = torch.optim.AdamW(policy.get_optim_params(), lr=1e-3)
    policy(small.batch(2))[0].backward()
    optimizer.step()
    policy.update()
