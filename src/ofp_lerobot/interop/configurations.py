"""Configurations of both policy types, for the same network."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..checkpoints.families import FAMILIES, OURS
from ..checkpoints.reader import load_config
from ..checkpoints.stock import STOCK_SMOLVLA_STEPS
from ..compat import dtype_name
from ..errors import UserError
from ..policies.ofp.configuration_ofp import OFPConfig


def make_config(**settings: Any) -> OFPConfig:
    """π₀.₅ as openpi runs it: ten steps of its sampler.

    Raises UserError where a setting is out of range.
    """
    try:
        return OFPConfig(device="cpu", sampler="euler", num_inference_steps=10, push_to_hub=False, **settings)
    except ValueError as error:
        raise UserError(error) from error


def stock_config(config: Any) -> Any:
    """LeRobot's configuration of the same network, with the dtype that gives its rotary frequencies in stock code.

    Raises UserError where stock code has no network of this size.
    """
    stock = OURS[config.type].stock_config
    shared = {field.name: getattr(config, field.name) for field in fields(stock) if field.init}
    if config.tokenizer_max_length is None:
        del shared["tokenizer_max_length"]  # LeRobot's default is the network's
    if hasattr(config, "bfloat16_rotary"):
        shared["dtype"] = stock_dtype(config)
    shared |= {"use_peft": False, "repo_id": None}
    try:
        return stock(**shared)
    except ValueError as error:
        raise UserError(f"stock code has no network of this size: {error}") from error


def steps_setting(config: Any) -> str:
    """The name of a stock configuration's number of steps."""
    return STOCK_SMOLVLA_STEPS if hasattr(config, STOCK_SMOLVLA_STEPS) else "num_inference_steps"


def stock_dtype(config: Any) -> str:
    """Stock code rounds the rotary frequencies in bfloat16 and not in float32."""
    return "bfloat16" if config.bfloat16_rotary else "float32"


def save_config(config: Any, directory: Path) -> None:
    """Without a device: whoever loads it takes the best there is."""
    config.device = None
    config.pretrained_path = None
    config._save_pretrained(directory)


def read_config(source: str | Path, types: Sequence[str] = ("ofp", "pi05")) -> tuple[Any, str]:
    """A checkpoint's configuration as that of our policy of the network, on the CPU, and its type. Raises UserError."""
    config, kind = load_config(source, device="cpu", types=types, as_ofp=True, compile_model=False)
    if kind in FAMILIES and hasattr(config, "bfloat16_rotary"):
        config.bfloat16_rotary = dtype_name(config.dtype) == "bfloat16"
    return config, kind
