"""A checkpoint's processors: made from openpi's facts, and read back."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from lerobot.policies.pi05.processor_pi05 import Pi05PrepareStateTokenizerProcessorStep
from lerobot.processor import (
    AddBatchDimensionProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStep,
    RelativeActionsProcessorStep,
    TokenizerProcessorStep,
)
from lerobot.utils.constants import (
    ACTION,
    OBS_STATE,
    POLICY_POSTPROCESSOR_DEFAULT_NAME,
    POLICY_PREPROCESSOR_DEFAULT_NAME,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from ..policies.ofp.configuration_ofp import OFPConfig
from ..policies.ofp.processor_ofp import make_ofp_pre_post_processors
from ..policies.ofp.processor_steps import PillowResizeStep, PromptWithoutStateStep
from ..policies.paligemma.settings import PALIGEMMA_TOKENIZER
from ..policies.vla.text import TextExtentProcessorStep
from .directories import find_file, read_json
from .norm_stats import Statistics

PREPROCESSOR = f"{POLICY_PREPROCESSOR_DEFAULT_NAME}.json"
POSTPROCESSOR = f"{POLICY_POSTPROCESSOR_DEFAULT_NAME}.json"
_TEXT_EXTENT = TextExtentProcessorStep._registry_name  # type: ignore[attr-defined]
_WITHOUT_STATE, _PILLOW = (f"{s.__module__}.{s.__qualname__}" for s in (PromptWithoutStateStep, PillowResizeStep))
_OURS = {_WITHOUT_STATE, _PILLOW}
# Version 0.1 saved these steps from another module.
_MOVED = {f"ofp_lerobot.interop.processor_steps.{name.rpartition('.')[2]}": name for name in _OURS}
# What openpi does as well, or train_config_facts tells.
_KNOWN = _OURS | {
    "rename_observations_processor",
    "to_batch_processor",
    "relative_actions_processor",
    "normalizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
    "tokenizer_processor",
    "device_processor",
    "unnormalizer_processor",
    "absolute_actions_processor",
}


def make_processors(
    config: OFPConfig, stats: Statistics, *, stock: bool, prompt_state: bool, pillow: bool
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """LeRobot's steps of π₀.₅, with openpi's prompt without state or its resizing where these are asked for.

    stock: for a `pi05` policy, without what only `ofp` reads.
    Raises UserError where the tokenizer cannot be loaded.
    """
    tensors = {key: {kind: torch.from_numpy(value) for kind, value in of.items()} for key, of in stats.items()}
    try:
        preprocessor, postprocessor = make_ofp_pre_post_processors(config, tensors)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer {config.tokenizer_name or PALIGEMMA_TOKENIZER!r} cannot be loaded: give --tokenizer a "
            f"directory, or log in to the Hub, where PaliGemma's is gated ({(str(error).splitlines() or [''])[0]})"
        ) from error
    if not prompt_state:
        _refuse_other_newline(preprocessor)
    steps: list[ProcessorStep] = []
    for step in preprocessor.steps:
        if isinstance(step, TextExtentProcessorStep) and stock:
            continue
        if isinstance(step, Pi05PrepareStateTokenizerProcessorStep) and not prompt_state:
            step = PromptWithoutStateStep()
        steps.append(step)
        if isinstance(step, AddBatchDimensionProcessorStep) and pillow:
            steps.append(PillowResizeStep(config.image_resolution[0]))
    preprocessor.steps = steps
    return preprocessor, postprocessor


def _refuse_other_newline(preprocessor: PolicyProcessorPipeline) -> None:
    """openpi encodes the newline that ends a prompt without state apart. Raises UserError where that matters."""
    tokenizer = next(step.input_tokenizer for step in preprocessor.steps if isinstance(step, TokenizerProcessorStep))
    whole, text, newline = (tokenizer(x, add_special_tokens=False).input_ids for x in ("pick up\n", "pick up", "\n"))
    if whole != text + newline:
        raise UserError(
            "this tokenizer joins a newline with the word before it, which openpi's does not: see --tokenizer"
        )


class Facts(NamedTuple):
    """What a checkpoint's processors say."""

    stats: Statistics  # state and action, as LeRobot's normaliser holds them; empty where not for openpi
    prompt_state: bool
    delta_mask: tuple[bool, ...] | None  # per action dimension, True where actions are relative to the state
    token_length: int
    preprocessor: dict[str, Any]  # for a `pi05` policy
    files: tuple[Path, ...]  # the postprocessor's, and both pipelines' state
    needs_plugin: bool  # has steps that only this package brings
    pillow: bool  # resizes images as openpi does

    def write(self, directory: Path) -> None:
        """For a `pi05` policy in `directory`."""
        (directory / PREPROCESSOR).write_text(json.dumps(self.preprocessor, indent=2) + "\n")
        for path in self.files:
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)


def read_processors(source: str | Path, action_size: int, *, for_openpi: bool = True) -> Facts:
    """for_openpi: with the statistics, and refusing what openpi has no counterpart of.

    Raises UserError there, and where files are missing or damaged. They are read, not run: the tokenizer need not be
    there.
    """
    preprocessor, postprocessor = read_json(_file(source, PREPROCESSOR)), _file(source, POSTPROCESSOR)
    pre = [step for step in preprocessor.get("steps", ()) if step.get("registry_name") != _TEXT_EXTENT]
    both = (*pre, *read_json(postprocessor).get("steps", ()))
    states = {name: _file(source, name) for step in both if (name := step.get("state_file"))}
    loaded = {name: _load(path) for name, path in states.items()}
    steps = {_name(step): step for step in pre}
    with_state = "pi05_prepare_state_tokenizer_processor_step" in steps
    if for_openpi:
        if unknown := sorted({_name(step) for step in both} - _KNOWN):
            raise UserError(f"the processors of {source} have steps that openpi has not: {', '.join(unknown)}")
        _refuse_other_steps(steps, with_state, source)
    return Facts(
        _statistics(loaded[steps["normalizer_processor"]["state_file"]], source) if for_openpi else {},
        with_state,
        _delta_mask(steps.get("relative_actions_processor", {}).get("config", {}), action_size),
        steps.get("tokenizer_processor", {}).get("config", {}).get("max_length", 200),
        {**preprocessor, "steps": pre},
        (postprocessor, *states.values(), *_artifacts(source, both)),
        any(_name(step) in _OURS for step in pre),
        _PILLOW in steps,
    )


def _artifacts(source: str | Path, steps: Sequence[dict[str, Any]]) -> list[Path]:
    """Directories that come with the steps: the tokenizer. Raises UserError where one is missing."""
    names = sorted({name for step in steps for name in step.get("artifacts", {}).values()})
    if not names:
        return []
    root = Path(source)
    if not root.is_dir():
        root = Path(snapshot_download(str(source), allow_patterns=[f"{name}/**" for name in names]))
    if missing := [name for name in names if not (root / name).is_dir()]:
        raise UserError(f"{source} has no {missing[0]}: its processors belong to the checkpoint, save both")
    return [root / name for name in names]


def _refuse_other_steps(steps: dict[str, dict[str, Any]], with_state: bool, source: str | Path) -> None:
    normaliser = steps.get("normalizer_processor", {})
    if not normaliser.get("state_file"):
        raise UserError(f"the processors of {source} hold no statistics (no normalizer_processor in {PREPROCESSOR})")
    modes = {"VISUAL": "IDENTITY", **normaliser["config"]["norm_map"]}
    if [modes.get(kind) for kind in ("VISUAL", "STATE", "ACTION")] != ["IDENTITY", "QUANTILES", "QUANTILES"]:
        raise UserError(
            f"{source} is normalised by {json.dumps(modes)} (normalization_mapping); π₀.₅ in openpi by quantiles of "
            "state and action only"
        )
    if with_state == (_WITHOUT_STATE in steps):
        raise UserError(f"{PREPROCESSOR} of {source} makes neither of π₀.₅'s two prompts")


def _name(step: dict[str, Any]) -> str:
    name = step.get("registry_name") or step.get("class", "")
    return _MOVED.get(name, name)


def _file(source: str | Path, name: str) -> Path:
    path = find_file(source, name)
    if path is None:
        raise UserError(f"{source} has no {name}: its processors belong to the checkpoint, save both")
    return path


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or incomplete ({error}): download or copy it again") from error


def _statistics(state: dict[str, torch.Tensor], source: str | Path) -> Statistics:
    flat = {name: value.numpy().astype(np.float64) for name, value in state.items()}
    stats: Statistics = {}
    for key in (OBS_STATE, ACTION):
        missing = [kind for kind in ("mean", "std", "q01", "q99") if f"{key}.{kind}" not in flat]
        if missing:
            raise UserError(f"the processors of {source} lack {' and '.join(missing)} of {key}")
        stats[key] = {kind: flat[f"{key}.{kind}"] for kind in ("mean", "std", "q01", "q99")}
    return stats


def _delta_mask(relative: dict[str, Any], action_size: int) -> tuple[bool, ...] | None:
    return tuple(RelativeActionsProcessorStep(**relative)._build_mask(action_size)) if relative.get("enabled") else None


def exclusions(mask: tuple[bool, ...], names: list[str] | None) -> tuple[list[str], list[str]]:
    """(action names, names kept absolute) with which LeRobot's relative step has exactly this mask.

    LeRobot excludes by parts of names. Raises UserError where the robot's names do not allow it.
    """
    names = names or [f"action_{i:02d}" for i in range(len(mask))]
    excluded = [name for name, relative in zip(names, mask, strict=True) if not relative]
    step = RelativeActionsProcessorStep(enabled=True, exclude_joints=excluded, action_names=names)
    if tuple(step._build_mask(len(mask))) != mask:
        raise UserError(
            f"--action-names: LeRobot excludes by parts of names, and one of {', '.join(excluded)} is part of a "
            "relative action's name: rename it"
        )
    return names, excluded
