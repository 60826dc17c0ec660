"""Puts the adapter into a RoboTwin or XPolicyLab checkout."""

import os
import shutil
from pathlib import Path
from typing import Literal

NAME = "OFP"
_HERE = Path(__file__).parent
_SHARED = ("observation.py", "client.py", "wire.py")  # the first tells this adapter from another of its name

Layout = Literal["classic", "current"]


def layout_of(root: Path) -> Layout:
    """Which harness a RoboTwin checkout has. Raises ValueError where it has none."""
    if (root / "scripts" / "eval_policy_xpolicylab.py").is_file():
        return "current"
    if (root / "script" / "eval_policy.py").is_file():
        return "classic"
    raise ValueError(
        f"{root} is no RoboTwin checkout: it has neither script/eval_policy.py nor scripts/eval_policy_xpolicylab.py"
    )


def adapter_of(root: Path) -> tuple[Path, list[Path]]:
    """Where the adapter that the checkout's layout wants goes, and the files that it consists of.

    Raises ValueError where `root` is no checkout, its XPolicyLab submodule is empty, or something else is in the way.
    """
    layout = layout_of(root)
    if layout == "classic":
        source, target = _HERE / "classic" / NAME, root / "policy" / NAME
    else:
        lab = Path(os.environ.get("XPOLICYLAB_ROOT") or root / "XPolicyLab")
        if not (lab / "setup_policy_server.py").is_file():
            raise ValueError(f"{lab} is empty: run `git submodule update --init XPolicyLab` in {root}")
        source, target = _HERE / "xpolicylab" / NAME, lab / "policy" / NAME
    if target.exists() and any(target.iterdir()) and not (target / _SHARED[0]).exists():
        raise ValueError(f"{target} exists and is not this adapter: move it away")
    return target, [_HERE / "common" / name for name in _SHARED] + sorted(p for p in source.iterdir() if p.is_file())


def install(root: Path, *, link: bool = False) -> Path:
    """Copies (or links) the adapter that the checkout's layout wants; returns its new directory.

    Raises ValueError as `adapter_of`.
    """
    target, files = adapter_of(root)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        destination = target / file.name
        destination.unlink(missing_ok=True)
        if link:
            destination.symlink_to(file.resolve())
        else:
            shutil.copy(file, destination)
    return target
