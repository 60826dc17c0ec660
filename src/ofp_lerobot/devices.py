"""The device a command runs on."""

import torch
from lerobot.utils.device_utils import auto_select_torch_device, is_torch_device_available

from .errors import UserError


def resolve_device(name: str | None) -> str:
    """Raises UserError where this machine has no such device; LeRobot would quietly take another."""
    if name is None:
        return auto_select_torch_device().type
    try:
        device = torch.device(name)
        there = is_torch_device_available(device.type)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--device {name}: {error}") from error
    if there and device.index is not None and device.type == "cuda":
        there = device.index < torch.cuda.device_count()
    if not there:
        raise UserError(f"--device {name} is not available on this machine (torch {torch.__version__})")
    return name


def synchronise(device: torch.device) -> None:
    """Waits for the work queued on the device, so that a clock read next has it all."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
