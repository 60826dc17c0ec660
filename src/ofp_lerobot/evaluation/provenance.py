"""What a report's numbers came from."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("lerobot_policy_ofp", "lerobot", "torch", "transformers", "metaworld", "mujoco", "numpy")


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Versions, machine and commit."""
    commit = _git("rev-parse", "HEAD")
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain")) if commit else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.check_output(
            ["git", *arguments], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None
