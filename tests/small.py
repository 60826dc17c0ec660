"""Small real things the tests share: an `ofp` policy, a batch, and stock LeRobot π₀.₅ of the same size."""

import functools
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from safetensors.torch import save_file

from benchmarks.speed.stock import shrunk
from ofp_lerobot.compat import released_name, released_names
from ofp_lerobot.policies.ofp.configuration_ofp import OFPConfig
from ofp_lerobot.policies.ofp.modeling_ofp import OFPPolicy
from ofp_lerobot.policies.paligemma.settings import SMALL_GEMMA, SMALL_SIGLIP

CAMERAS = ("observation.images.top", "observation.images.wrist")
SIZE, STATES, ACTIONS, HORIZON, TEXT, VOCABULARY = 32, 5, 5, 8, 12, 512


def features(cameras=CAMERAS):
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, SIZE, SIZE)) for key in cameras}
    inputs[OBS_STATE] = PolicyFeature(FeatureType.STATE, (STATES,))
    return {"input_features": inputs, "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (ACTIONS,))}}


def common(**changes):
    return {
        "device": "cpu",
        "image_resolution": (SIZE, SIZE),
        "chunk_size": HORIZON,
        "n_action_steps": 4,
        "max_action_dim": 8,
        "max_state_dim": 8,
        **features(),
        **changes,
    }


def ofp_config(**changes):
    sizes = {
        "paligemma_variant": "gemma_tiny",
        "action_expert_variant": "gemma_tiny",
        "vision_variant": "siglip_tiny",
        "vocabulary_size": VOCABULARY,
    }
    return OFPConfig(**common(**{**sizes, **changes}))


def ofp_policy(*, branch=0.0, **changes):
    """A small policy; `branch`: standard deviation of the target-time branch's weights, zero when training starts."""
    policy = OFPPolicy(ofp_config(**changes))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():  # AdaRMS starts silent too: give every path a say
            if "layernorm.dense" in name or "norm.dense" in name:
                parameter.normal_(std=0.1)
        policy.model.target_time_mlp_out.weight.normal_(std=branch) if branch else None
    return policy.eval()


def batch(b=2, *, cameras=CAMERAS, text=TEXT, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(TEXT)[None] < torch.tensor([[max(1, text - 3 * i)] for i in range(b)])
    return {
        **{key: torch.rand(b, 3, SIZE, SIZE, generator=g) for key in cameras},
        OBS_STATE: torch.rand(b, STATES, generator=g),
        OBS_LANGUAGE_TOKENS: torch.randint(1, VOCABULARY, (b, TEXT), generator=g),
        OBS_LANGUAGE_ATTENTION_MASK: mask,
        ACTION: torch.randn(b, HORIZON, ACTIONS, generator=g),
    }


def shrunk_stock():
    """LeRobot's own π₀.₅ code in the size of `ofp_policy`."""
    size = SMALL_GEMMA["gemma_tiny"]
    return shrunk({"gemma_2b": size, "gemma_300m": size}, SMALL_SIGLIP["siglip_tiny"], VOCABULARY, size.width)


def stock_policy(ofp: OFPPolicy, **changes):
    """Stock `PI05Policy` with the `ofp` policy's weights (its target-time branch left out)."""
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    with shrunk_stock():
        stock = PI05Policy(PI05Config(**common(**changes)))
    return with_weights_of(stock, ofp)


def with_weights_of(stock, ours):
    """The stock policy with our policy's weights, its target-time branch left out."""
    names = {released_name(name): name for name in stock.state_dict()}
    state = {names.get(name, name): w for name, w in ours.state_dict().items() if "target_time" not in name}
    stock.load_state_dict(state, strict=True)
    return stock.eval()


@functools.cache
def stock_fault():
    """Why LeRobot's own π₀.₅ cannot show here what a checkpoint in the released names holds; empty where it can."""
    from lerobot.policies.pi05.modeling_pi05 import PI05Policy

    state = {name: w.clone() for name, w in ofp_policy().state_dict().items() if "target_time" not in name}
    with TemporaryDirectory() as directory, shrunk_stock():
        save_file(state, Path(directory) / "model.safetensors")
        PI05Config(**common()).save_pretrained(directory)
        loaded = released_names(PI05Policy.from_pretrained(directory).state_dict())
    if all(torch.equal(loaded[name], w) for name, w in state.items() if "vision_tower" in name):
        return ""
    versions = f"LeRobot {version('lerobot')} with transformers {version('transformers')}"
    return f"{versions} leaves out the vision tower of π₀.₅'s released checkpoints"


def require_stock():
    """Skips the test where there is nothing to compare with: main of 2026-08-23 with transformers 5.6 and later."""
    if fault := stock_fault():
        import pytest  # not where `tests.tiny` runs

        pytest.skip(fault)


def stock_inputs(stock, batch):
    """What stock π₀.₅'s network takes of a batch."""
    images, masks = stock._preprocess_images(batch)
    return images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]


def densest_by_hand(samples: np.ndarray) -> np.ndarray:
    """Of each column the sample with the least mean distance to its ⌈k/4⌉ nearest others."""
    chosen = []
    for column in samples.transpose(1, 0, 2, 3):
        isolation = []
        for i, sample in enumerate(column):
            others = [np.sqrt(((sample - other) ** 2).sum()) for j, other in enumerate(column) if j != i]
            isolation.append(np.mean(sorted(others)[: int(np.ceil(len(column) / 4))]) if others else 0.0)
        chosen.append(column[int(np.argmin(isolation))])
    return np.stack(chosen)
