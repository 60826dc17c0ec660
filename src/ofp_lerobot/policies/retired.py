"""Settings that are no more: old checkpoints and files for `lerobot-train` load all the same.

draccus refuses a key that it does not know. LeRobot decodes a policy's configuration from config.json, within
train_config.json where a run resumes, and within a user's own file. All pass `decode_dataclass` of draccus, so what is
old is translated there and nowhere else. (A decoder registered for the class would take the policy's flags from
`lerobot-train`, and a file within a file would not reach it.) A flag is typed anew, so it is refused, by name.
"""

import logging
import sys
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import yaml
from draccus import argparsing
from draccus.parsers import decoding
from lerobot.configs import PreTrainedConfig, parser

logger = logging.getLogger(__name__)

# Until the paper's form became an objective of its own. Values: what held where a file did not say.
_BEFORE_OFP_PAPER: dict[str, Any] = {
    "consistency_norm": "huber",
    "guidance_weight": 0.0,
    "condition_dropout": 0.0,
    "first_segment": "marginal",
    "halved_share": 1.0,
    "contraction_start": 0.25,
    "contraction_end": 0.05,
    "contraction_fraction": 0.5,
    "schedule_steps": 30_000,
}
_OURS = {"consistency_norm": "huber", "guidance_weight": 0.0, "condition_dropout": 0.0, "halved_share": 1.0}
_PAPERS = {"consistency_norm": "squared", "first_segment": "conditional", "halved_share": 0.0}


def translate(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of an `ofp` or `ofp_unet` configuration under today's names.

    What trained with the paper's form under `objective: ofp` has `objective: ofp_paper`. Mixtures of both forms, which
    are gone, act as before and would train as `ofp` does: a warning says so.
    """
    old = {name: raw[name] for name in raw if name in _BEFORE_OFP_PAPER}
    if not old:
        return raw
    kept = {"sharpening_noise": 0.0, **{name: value for name, value in raw.items() if name not in old}}  # younger
    if raw.get("objective", "ofp") != "ofp":
        return kept  # it did not read them
    was = _BEFORE_OFP_PAPER | old
    if all(was[name] == value for name, value in _PAPERS.items()):
        paper = {
            "guidance_weight": was["guidance_weight"],
            "condition_dropout": was["condition_dropout"],
            "contraction_start": was["contraction_start"],
            "contraction_end": was["contraction_end"],
            "contraction_steps": round(was["contraction_fraction"] * was["schedule_steps"]),
        }
        if "consistency_weight" in kept:
            paper["consistency_weight"] = kept.pop("consistency_weight")
        return {**kept, "objective": "ofp_paper", "ofp_paper": paper}
    mixed = {name: was[name] for name, value in _OURS.items() if was[name] != value}
    if mixed:
        logger.warning(
            "the configuration has settings that objective=ofp no longer has (%s). The policy acts as before; training "
            "on takes today's ofp, or the paper's form with --policy.objective=ofp_paper",
            ", ".join(f"{name}={value}" for name, value in mixed.items()),
        )
    return kept


# What a flag that is gone is told: why, and what to give instead.
_ONE_FORM = "objective=ofp has one form now; the paper's form is --policy.objective=ofp_paper"
_OF_THE_PAPER = "it is of the paper's form, an objective of its own now: --policy.objective=ofp_paper and --policy."
_CONTRACTION = f"{_OF_THE_PAPER}ofp_paper.contraction_steps"
_INSTEAD = {
    "consistency_norm": _ONE_FORM,
    "first_segment": _ONE_FORM,
    "halved_share": _ONE_FORM,
    "contraction_fraction": _CONTRACTION,
    "schedule_steps": f"{_CONTRACTION}. The learning rate's is --policy.scheduler_decay_steps",
    **{
        name: f"{_OF_THE_PAPER}ofp_paper.{name}"
        for name in ("guidance_weight", "condition_dropout", "contraction_start", "contraction_end")
    },
}


def explain(config_class: Any, config_path: Any, args: Sequence[str]) -> str | None:
    """What to say of a flag that is gone, None where there is none.

    config_class, config_path and args: what draccus is asked to read. LeRobot asks twice: for everything, where the
    policy's flags begin with "policy.", and with --policy.path for the policy's configuration alone.
    """
    start = "--" if hasattr(config_class, "_ofp_translate") else "--policy."
    for arg in args:
        name = arg.removeprefix(start).partition("=")[0]
        if arg.startswith(start) and name in _INSTEAD and (start == "--" or _is_ours(config_path, args)):
            return f"--policy.{name} was removed: {_INSTEAD[name]}"
    return None


def _is_ours(config_path: Any, args: Sequence[str]) -> bool:
    """Whether a whole run's policy is of this package, by its flags or its file."""
    named = parser.parse_arg("policy.type", args)
    if named is None and config_path is not None and Path(config_path).is_file():
        policy = (yaml.safe_load(Path(config_path).read_text()) or {}).get("policy")
        named = policy.get("type") if isinstance(policy, dict) else None
    known = PreTrainedConfig.get_known_choices()
    return named in known and hasattr(known[named], "_ofp_translate")


_parse_known_args = argparsing.ArgumentParser.parse_known_args


@wraps(_parse_known_args)
def _explaining(self: Any, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
    removed = explain(self.config_class, self.config_path, sys.argv[1:] if args is None else args)
    if removed is not None:
        self.parser.error(removed)
    return _parse_known_args(self, args, *rest, **kwargs)


argparsing.ArgumentParser.parse_known_args = _explaining  # type: ignore[method-assign]

_decode_dataclass = decoding.decode_dataclass


@wraps(_decode_dataclass)
def _translated(cls: Any, raw: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(raw, dict) and hasattr(cls, "_ofp_translate"):  # every other class is left as it is
        raw = cls._ofp_translate(raw)
    return _decode_dataclass(cls, raw, *args, **kwargs)


decoding.decode_dataclass = _translated  # type: ignore[assignment]
