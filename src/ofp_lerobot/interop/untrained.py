"""A checkpoint of ours that is still the stock network: what training to one step starts from."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..policies.vla import weights

RECIPES = {"pi05": "one_step", "pi0": "one_step_pi0", "smolvla": "one_step_smolvla"}
ACTS_IN_ONE_STEP = (
    "note        acts in one step, as config.json says: train it first, or give --policy.sampler=euler "
    "--policy.num_inference_steps=10"
)


@torch.no_grad()
def silent_branch(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The target-time branch a stock policy starts with: its input layer random, its output layer zero."""
    width = state[f"{weights.PREFIX}action_in_proj.weight"].shape[0]
    layers = {"target_time_mlp_in": nn.Linear(width, width), "target_time_mlp_out": nn.Linear(width, width)}
    nn.init.zeros_(layers["target_time_mlp_out"].weight)
    nn.init.zeros_(layers["target_time_mlp_out"].bias)
    return {
        f"{weights.PREFIX}{name}.{k}": w.detach() for name, layer in layers.items() for k, w in layer.named_parameters()
    }


def how_to_train(checkpoint: Path, stock: str) -> str:
    """The command that trains it to one step. stock: LeRobot's type of the network."""
    return (
        f'next        lerobot-train --config_path="$(ofp-recipe {RECIPES[stock]})" --policy.path={checkpoint} '
        "--dataset.repo_id=<its data> --output_dir=outputs/train/one_step"
    )
