"""openpi PyTorch checkpoints to LeRobot directories (`ofp` or `pi05`) and back. Exact, or refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi05.configuration_pi05 import PI05Config
from lerobot.utils.constants import ACTION, OBS_STATE
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.reader import resolve_source
from ..errors import UserError
from ..policies.ofp.configuration_ofp import OFPConfig
from ..policies.sources import ADAPTER_CONFIG
from ..policies.vla import weights
from ..policies.vla.weights import NEW_PARAMETERS
from . import openpi_layout as openpi
from .configurations import make_config, read_config, save_config, stock_config
from .directories import find_file, refuse_existing, whole_directory
from .norm_stats import FILENAME, coarse, find_asset, from_openpi, read_openpi, size, to_openpi
from .processors import Facts, exclusions, make_processors, read_processors
from .readme import OTHER_RESIZING, RELATIVE, ROTARY
from .untrained import ACTS_IN_ONE_STEP, how_to_train, silent_branch


@dataclass(frozen=True)
class OpenpiFacts:
    """What only openpi's train config knows of a checkpoint.

    cameras: openpi's name of each camera the robot has -> LeRobot's. chunk_size: Pi0Config.action_horizon.
    prompt_state: Pi0Config.discrete_state_input. delta_mask: of the DeltaActions transform, None without one.
    state_size, action_size: the robot's, where the statistics are padded. exact_rotary: whether training left the
    rotary frequencies exact, None to tell by the dtypes.
    """

    cameras: dict[str, str]
    chunk_size: int
    prompt_state: bool
    delta_mask: tuple[bool, ...] | None = None
    action_names: tuple[str, ...] | None = None
    state_size: int | None = None
    action_size: int | None = None
    token_length: int = 200
    exact_rotary: bool | None = None


def convert_from_openpi(
    source: Path,
    target: Path,
    facts: OpenpiFacts,
    *,
    kind: Literal["ofp", "pi05"] = "pi05",
    asset_id: str | None = None,
    tokenizer: str | None = None,
    pillow: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes the LeRobot directory and returns what was done, a line each; a dry run only returns it.

    pillow: keep openpi's resizing of images that are not 224 × 224. Raises UserError.
    """
    openpi.refuse_jax(source)
    refuse_existing(target, overwrite=overwrite, source=source)
    state = openpi.read_weights(source)
    asset, path = find_asset(source / openpi.ASSETS, asset_id)
    raw = read_openpi(path)
    sizes = {
        OBS_STATE: size(raw, OBS_STATE, facts.state_size, "--state-size"),
        ACTION: size(raw, ACTION, facts.action_size, "--action-size"),
    }
    stats = from_openpi(raw, sizes)
    rounded = openpi.rounded_rotary(source, state) if facts.exact_rotary is None else not facts.exact_rotary
    config = _ofp_config(facts, sizes, state, rounded=rounded, tokenizer=tokenizer)
    branch = bool(NEW_PARAMETERS & state.keys())  # `openpi_training` has trained it
    if branch and kind == "pi05":
        raise UserError(f"{source} was trained to answer in one step (it has a target-time branch): give --type ofp")
    openpi.refuse_differences(state, openpi.shapes(config, branch=branch), source)
    if kind == "ofp":
        config.sampler, config.num_inference_steps = "flow_map", 1
    written: PI05Config = config if kind == "ofp" else stock_config(config)
    lines = [
        f"weights     {len(state) - 1} tensors, {_sizes(state)}; lm_head and embed_tokens untied",
        f"statistics  assets/{asset}: state {sizes[OBS_STATE]}, action {sizes[ACTION]}; q99 + 1e-6",
        f"cameras     {', '.join(f'{k} <- {v}' for k, v in _ordered(facts.cameras).items())}",
        f"prompt      {'with' if facts.prompt_state else 'without'} state, {facts.token_length} tokens",
        f"actions     chunks of {facts.chunk_size}; {_mask_told(config, facts)}",
        f"rotary      {'rounded to bfloat16' if rounded else 'exact'}"
        + ("" if facts.exact_rotary is not None else ", by the weights' dtypes (--rotary to overrule)"),
        f"type        {kind}, dtype {written.dtype}",
        *([ACTS_IN_ONE_STEP] if kind == "ofp" and not branch else []),
        *_warnings(state, stats, facts, pillow=pillow),
    ]
    processors = make_processors(config, stats, stock=kind == "pi05", prompt_state=facts.prompt_state, pillow=pillow)
    if dry_run:
        return [*lines, f"dry run     nothing written; would write {target}"]
    with whole_directory(target, overwrite=overwrite) as directory:
        named = {weights.PREFIX + name: w.contiguous() for name, w in state.items()}
        if kind == "ofp" and not branch:
            named |= silent_branch(named)
        save_file(named, directory / openpi.WEIGHTS, metadata={"format": "pt"})
        save_config(written, directory)
        for pipeline in processors:
            pipeline.save_pretrained(directory)
    lines.append(f"written     {target}")
    return [*lines, how_to_train(target, "pi05")] if kind == "ofp" and not branch else lines


def convert_to_openpi(
    source: str | Path, target: Path, *, asset_id: str, dry_run: bool = False, overwrite: bool = False
) -> list[str]:
    """A `pi05` checkpoint, or an `ofp` one whose target-time branch is silent, in openpi's layout.

    Returns what was done, a line each; a dry run only returns it. Raises UserError.
    """
    source = resolve_source(str(source))
    refuse_existing(target, overwrite=overwrite, source=source)
    refuse_asset_id(asset_id)
    if find_file(source, ADAPTER_CONFIG) is not None:
        raise UserError(f"{source} is an adapter: `ofp-export {source} --steps 1 --layout openpi` merges and folds it")
    config, _ = read_config(source)
    try:
        state = {name.removeprefix(weights.PREFIX): w for name, w in weights.load_state_dict(source).items()}
    except (ValueError, FileNotFoundError) as error:
        raise UserError(error) from error
    branch = {name: state.pop(name) for name in NEW_PARAMETERS & state.keys()}
    if any(branch[name].any() for name in branch if name.startswith("target_time_mlp_out")):
        raise UserError(
            f"{source} has learnt average velocities (its target-time branch is not silent), for which openpi's "
            "network has no input: `ofp-export --steps 1 --layout openpi` folds them in for a fixed number of steps"
        )
    refuse_unsayable(config)
    config.vocabulary_size = openpi.sizes(state)[2]  # `pi05` configurations do not say
    openpi.refuse_differences(state, openpi.shapes(config), Path(source))
    processors = read_processors(source, config.output_features[ACTION].shape[0])
    lines = [
        f"weights     {len(state) - 1} tensors, {_sizes(state)}; lm_head is embed_tokens",
        f"statistics  assets/{asset_id}; q99 - 1e-6",
        "",
        *train_config_facts(config, processors, asset_id).splitlines(),
    ]
    if not torch.equal(state[openpi.HEAD], state[openpi.EMBEDDING]):
        lines.insert(1, "note        lm_head differed from embed_tokens; no π₀.₅ code reads it")
    if not processors.pillow:
        lines.append(f"note        {OTHER_RESIZING}")
    if not config.bfloat16_rotary:
        lines += ["note        openpi's server needs these lines after create_trained_policy:", *ROTARY.splitlines()]
    if dry_run:
        return [*lines, f"dry run     nothing written; would write {target}"]
    with whole_directory(target, overwrite=overwrite) as directory:
        write_openpi(directory, state, processors, asset_id, rounded=config.bfloat16_rotary)
    return [*lines, f"written     {target}"]


def write_openpi(directory: Path, state: dict[str, Tensor], facts: Facts, asset_id: str, *, rounded: bool) -> None:
    """Weights (openpi's names, untied) and statistics; rounded: whether they want rounded rotary frequencies."""
    openpi.write_weights(directory, state, rounded=rounded)
    asset = directory / openpi.ASSETS / asset_id
    asset.mkdir(parents=True)
    (asset / FILENAME).write_text(json.dumps(to_openpi(facts.stats), indent=2) + "\n")


def refuse_asset_id(asset_id: str) -> None:
    """Raises UserError where the statistics would not lie in a directory of their own under `assets`."""
    path = Path(asset_id)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise UserError(f"--asset-id {asset_id!r} is no name for a directory under {openpi.ASSETS}")


def refuse_unsayable(config: PI05Config) -> None:
    """Raises UserError where openpi's code has something fixed that this network has otherwise."""
    if len(_cameras(config)) > len(openpi.CAMERAS):
        raise UserError(
            f"openpi's network takes {len(openpi.CAMERAS)} cameras, this policy has {len(_cameras(config))}"
        )
    if (config.min_period, config.max_period) != (4e-3, 4.0):
        raise UserError(
            f"openpi's time embedding has periods of 0.004 to 4, this policy {config.min_period} to {config.max_period}"
        )


def train_config_facts(config: PI05Config, facts: Facts, asset_id: str) -> str:
    """What openpi's train config must say for this checkpoint, as Python to copy."""
    mask = facts.delta_mask
    delta = "none" if mask is None else f"DeltaActions({mask}), AbsoluteActions({mask})"
    cameras = ", ".join(f"{theirs} <- {ours}" for theirs, ours in zip(openpi.CAMERAS, _cameras(config), strict=False))
    return (
        f"model=pi0_config.Pi0Config(pi05=True, action_dim={config.max_action_dim}, "
        f"action_horizon={config.chunk_size}, max_token_len={facts.token_length}, "
        f"discrete_state_input={facts.prompt_state})\n"
        f'assets=AssetsConfig(asset_id="{asset_id}")\n'
        f"# data transforms, cameras in this order, the others masked: {cameras}\n"
        f"# delta actions: {delta}; the robot's actions are the first {config.output_features[ACTION].shape[0]}"
    )


def _ofp_config(
    facts: OpenpiFacts, sizes: dict[str, int], state: dict[str, Tensor], *, rounded: bool, tokenizer: str | None
) -> OFPConfig:
    mask = facts.delta_mask
    names = list(facts.action_names) if facts.action_names else None
    if names is not None and len(names) != sizes[ACTION]:
        raise UserError(f"--action-names has {len(names)} names for {sizes[ACTION]} action dimensions")
    excluded: list[str] = []
    if mask is not None:
        if len(mask) > sizes[ACTION]:
            raise UserError(f"--delta-mask covers {len(mask)} dimensions, the action has {sizes[ACTION]}")
        if len(mask) > sizes[OBS_STATE]:
            raise UserError(f"--delta-mask covers {len(mask)} dimensions, the state has {sizes[OBS_STATE]}")
        mask = (*mask, *(False,) * (sizes[ACTION] - len(mask)))
        if sizes[ACTION] > sizes[OBS_STATE]:
            raise UserError(
                f"the action has {sizes[ACTION]} dimensions and the state {sizes[OBS_STATE]}: LeRobot's relative "
                "actions need a state dimension for each action"
            )
        names, excluded = exclusions(mask, names)
    unknown = sorted(facts.cameras.keys() - set(openpi.CAMERAS))
    if unknown or not facts.cameras:
        raise UserError(
            f"--camera: openpi's cameras are {', '.join(openpi.CAMERAS)}, got {', '.join(unknown) or 'none'}"
        )
    width, pixels, vocabulary = openpi.sizes(state)
    return make_config(
        image_resolution=(pixels, pixels),
        vocabulary_size=vocabulary,
        input_features={
            **{key: PolicyFeature(FeatureType.VISUAL, (3, pixels, pixels)) for key in _ordered(facts.cameras).values()},
            OBS_STATE: PolicyFeature(FeatureType.STATE, (sizes[OBS_STATE],)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (sizes[ACTION],))},
        chunk_size=facts.chunk_size,
        n_action_steps=facts.chunk_size,
        max_action_dim=width,
        use_relative_actions=mask is not None,
        relative_exclude_joints=excluded,
        action_feature_names=names,
        tokenizer_name=tokenizer,
        tokenizer_max_length=facts.token_length,
        bfloat16_rotary=rounded,
    )


def _cameras(config: PI05Config) -> list[str]:
    return [key for key in config.image_features if "empty_camera" not in key]


def _ordered(cameras: dict[str, str]) -> dict[str, str]:
    return {name: cameras[name] for name in openpi.CAMERAS if name in cameras}


def _sizes(state: dict[str, Tensor]) -> str:
    count: dict[str, int] = {}
    for name, w in state.items():
        if name != openpi.EMBEDDING:
            dtype = str(w.dtype).removeprefix("torch.")
            count[dtype] = count.get(dtype, 0) + w.numel()
    return ", ".join(f"{n / 1e6:.1f} M {dtype}" for dtype, n in sorted(count.items()))


def _mask_told(config: OFPConfig, facts: OpenpiFacts) -> str:
    if facts.delta_mask is None:
        return "absolute"
    return f"relative to the state, except {', '.join(config.relative_exclude_joints) or 'none'}"


def _warnings(state: dict[str, Tensor], stats: dict[str, Any], facts: OpenpiFacts, *, pillow: bool) -> list[str]:
    notes = []
    if rounded := openpi.rounded_by_conversion(state):
        notes.append(
            f"note        {len(rounded)} weights are bfloat16 that openpi keeps in float32 ({rounded[0]}, …): convert "
            "from JAX again with --precision float32"
        )
    if dimensions := coarse(stats):
        notes.append(
            f"note        {', '.join(dimensions)}: nearly constant, LeRobot's float32 holds the range only roughly"
        )
    if facts.delta_mask is not None:
        notes.append(f"note        {RELATIVE}")
    if not pillow:
        notes.append("note        images that are not 224 × 224 are resized by LeRobot, which is not openpi's resizing")
    if not facts.prompt_state or pillow:
        notes.append("note        its processors have steps of this package: install lerobot_policy_ofp where it runs")
    notes.append(
        "note        state and actions are those after openpi's data transforms (ALOHA's adapt_to_pi: π's joint space)"
    )
    return notes
