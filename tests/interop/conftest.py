import json
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ofp_lerobot.policies.paligemma import network
from ofp_lerobot.policies.paligemma.settings import SMALL_GEMMA, SMALL_SIGLIP
from tests import small
from tests.interop.golden import cases
from tests.interop.golden.cases import ANSWERS

# What a user's checkpoint says, since stock code knows no other names.
REAL_NAMES = {
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "vision_variant": "siglip_so400m",
}

# Of the golden cases: openpi's name -> LeRobot's.
CAMERAS = {name: f"observation.images.{name}" for name in cases.IMAGES}


def flags(tokenizer, *more, state="--state-in-prompt"):
    return [
        *(f"--camera={theirs}={ours}" for theirs, ours in reversed(CAMERAS.items())),  # any order
        f"--chunk-size={cases.HORIZON}",
        f"--state-size={cases.STATES}",
        f"--action-size={cases.ROBOT_ACTIONS}",
        f"--max-token-len={cases.TEXT}",
        f"--tokenizer={tokenizer}",
        state,
        *more,
    ]


_gemma = network.get_gemma_config


@contextmanager
def real_sizes():
    """Undoes `tiny` for ours."""
    small_siglip = {name: sizes for name, sizes in SMALL_SIGLIP.items() if name != "siglip_so400m"}
    with patch.object(network, "get_gemma_config", _gemma), patch.dict(SMALL_SIGLIP, small_siglip, clear=True):
        yield


@contextmanager
def tiny():
    tiny = SMALL_GEMMA["gemma_tiny"]
    with (
        small.shrunk_stock(),
        patch.object(network, "get_gemma_config", lambda _: tiny),
        patch.dict(SMALL_SIGLIP, siglip_so400m=SMALL_SIGLIP["siglip_tiny"]),
    ):
        yield


@pytest.fixture(autouse=True, scope="package")
def tiny_real_sizes():
    """π₀.₅'s own size names mean tiny networks, in ours and in stock code: the commands run unchanged."""
    with tiny():
        yield


@pytest.fixture(scope="session")
def golden():
    return json.loads(ANSWERS.read_text())


def golden_state(golden, *, bfloat16=False):
    """The golden weights as openpi stores them: the tied pair once."""
    return {
        name: torch.tensor(cases.weight(name, tuple(shape))).to(torch.bfloat16 if half and bfloat16 else torch.float32)
        for name, (shape, half) in golden["manifest"]["tensors"].items()
    }


def openpi_checkpoint(directory, state, metadata=None, asset="robots/tiny", stats=cases.NORM_STATS):
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata=metadata)
    if stats is not None:
        (directory / "assets" / asset).mkdir(parents=True)
        (directory / "assets" / asset / "norm_stats.json").write_text(json.dumps({"norm_stats": stats}))
    return directory


def floats(text):
    """Golden chunks: (n, horizon, actions) float32."""
    array = np.frombuffer(bytes.fromhex(text), "<f4").reshape(-1, cases.HORIZON, cases.ACTIONS)
    return torch.tensor(array)
