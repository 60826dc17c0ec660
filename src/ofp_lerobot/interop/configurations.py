"""Configurations of both policy types, for the same network."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lerobot.policies.pi05.configuration_pi05 import PI05Config

from ..checkpoints.reader import load_config
from ..compat import dtype_name
from ..errors import UserError
from ..policies.ofp.configuration_ofp import OFPConfig


def make_config(**settings: Any) -> OFPConfig:
    """π₀.₅ as openpi runs it until it is trained to answer in one step: ten steps of its sampler.

    Raises UserError where a setting is out of range.
    """
    try:
        return OFPConfig(device="cpu", sampler="euler", num_inference_steps=10, push_to_hub=False, **settings)
    except ValueError as error:
        raise UserError(error) from error


def stock_config(config: OFPConfig) -> PI05Config:
    """The `pi05` configuration of the same network, with the dtype that gives its rotary frequencies in stock code.

    Raises UserError where stock code has no network of this size.
    """
    shared = {field.name: getattr(config, field.name) for field in fields(PI05Config) if field.init}
    shared |= {"dtype": stock_dtype(config), "tokenizer_max_length": config.tokenizer_max_length or 200}
    shared |= {"use_peft": False, "repo_id": None}
    try:
        return PI05Config(**shared)
    except ValueError as error:
        raise UserError(f"stock π₀.₅ has no network of this size, in LeRobot or in openpi: {error}") from error


def stock_dtype(config: OFPConfig) -> str:
    """Stock code rounds the rotary frequencies in bfloat16 and not in float32."""
    return "bfloat16" if config.bfloat16_rotary else "float32"


def save_config(config: PI05Config, directory: Path) -> None:
    """Without a device: whoever loads it takes the best there is."""
    config.device = None
    config.pretrained_path = None
    config._save_pretrained(directory)


def read_config(source: str | Path) -> tuple[OFPConfig, str]:
    """A `pi05` or `ofp` checkpoint's configuration as `ofp`'s, on the CPU, and its type. Raises UserError."""
    config, kind = load_config(source, device="cpu", types=("ofp", "pi05"), as_ofp=True, compile_model=False)
    assert isinstance(config, OFPConfig)
    if kind == "pi05":
        config.bfloat16_rotary = dtype_name(config.dtype) == "bfloat16"
    return config, kind
