"""`ofp-export`: K steps of a checkpoint of ours as a plain stock policy, for LeRobot and, of a π₀.₅, for openpi."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lerobot.utils.constants import ACTION
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.families import FAMILIES, OURS
from ..checkpoints.reader import resolve_source, use_teacher
from ..errors import UserError
from ..objectives import OBJECTIVES
from ..policies.vla import weights
from ..policies.vla.adapters import load_peft
from ..policies.vla.policy import VLAPolicy
from ..policies.vla.weights import NEW_PARAMETERS
from . import openpi_layout as openpi
from .configurations import read_config, save_config, steps_setting, stock_config
from .convert import refuse_asset_id, refuse_unsayable, train_config_facts, write_openpi
from .directories import find_file, read_json, refuse_existing, whole_directory
from .fold import fold_length, fold_times
from .processors import read_processors
from .proof import Difference, make_probes, our_answers, prove
from .readme import OTHER_RESIZING, RELATIVE, Origin, describe_lerobot, describe_openpi

logger = logging.getLogger(__name__)

Layout = Literal["lerobot", "openpi", "both"]
Which = Literal["student", "teacher"]


def export(
    checkpoint: str,
    target: Path,
    *,
    steps: int,
    layout: Layout | None = None,
    which: Which = "student",
    asset_id: str | None = None,
    overwrite: bool = False,
) -> list[Difference]:
    """Folds, writes `target` (or `target`/lerobot and `target`/openpi), proves it, and returns the differences.

    layout: None is "both" for `ofp`, which alone has openpi's, and "lerobot" for the others.

    Raises UserError, and leaves nothing behind, where the checkpoint cannot be exported or the proof fails.
    """
    source = resolve_source(checkpoint)
    refuse_existing(target, overwrite=overwrite, source=source)
    config, kind = read_config(source, types=(*OURS, *FAMILIES))
    layout = _checked_layout(layout, kind, source)
    _refuse_other_sizes(source, config)
    for_openpi = layout != "lerobot"
    if for_openpi:
        with _openpi_is_a_choice():
            asset_id = trained_on(source) if asset_id is None else asset_id
            refuse_asset_id(asset_id)
            refuse_unsayable(config)
    origin = Origin(checkpoint, which, steps, config.use_peft, OURS[kind].policy.stock)
    _make_plain(config, steps)
    with _openpi_is_a_choice() if for_openpi else nullcontext():
        processors = read_processors(source, config.output_features[ACTION].shape[0], for_openpi=for_openpi)
    if for_openpi and not processors.pillow:
        logger.warning("%s was %s", source, OTHER_RESIZING)
    relative = processors.delta_mask is not None
    if relative and layout != "openpi":
        logger.warning(RELATIVE)
    policy = load_policy(source, config, which)
    _warn_of_a_silent_branch(policy, source, steps)
    rounded = getattr(policy.config, "bfloat16_rotary", False)
    stock = stock_config(replace(policy.config, tokenizer_max_length=processors.token_length))
    stock = replace(stock, **{steps_setting(stock): steps})
    if hasattr(stock, "gradient_checkpointing"):
        stock = replace(stock, gradient_checkpointing=False)
    folded = _folded(policy, steps)
    probes = make_probes(policy, processors.token_length)
    answers = our_answers(policy, probes)
    state = {name: w for name, w in policy.model.state_dict().items() if name not in NEW_PARAMETERS}
    state |= folded
    half = in_bfloat16(state, policy.as_stored)
    del policy
    _make_as_written(state, half)

    with whole_directory(target, overwrite=overwrite) as directory:
        written = {
            name: directory / name if layout == "both" else directory
            for name in ("lerobot", "openpi")
            if layout in (name, "both")
        }
        for name, part in written.items():
            part.mkdir(exist_ok=True)
            if name == "openpi":
                write_openpi(part, state, processors, str(asset_id), rounded=rounded)
            else:
                named = {weights.PREFIX + name: w for name, w in state.items()}
                metadata = {"format": "pt", "sha256": openpi.fingerprint(named)}
                save_file(named, part / openpi.WEIGHTS, metadata=metadata)
                save_config(replace(stock), part)
                processors.write(part)
        del state
        found = []
        for name, part in written.items():
            proven = [d._replace(what=f"{name} layout, {d.what}") for d in prove(part, stock, probes, answers, steps)]
            if name == "openpi":
                facts = train_config_facts(stock, processors, str(asset_id))
                text = describe_openpi(origin, facts, proven, rounded=rounded, pillow=processors.pillow)
            else:
                text = describe_lerobot(origin, stock, proven, needs_plugin=processors.needs_plugin, relative=relative)
            (part / "README.md").write_text(text)
            found += proven
    return found


def _checked_layout(layout: Layout | None, kind: str, source: str | Path) -> Layout:
    """The layout to write. Raises UserError where the type has none or not that one."""
    if kind == "pi05":
        raise UserError(f"{source} is a plain π₀.₅ already: `ofp-convert to-openpi` gives it openpi's layout")
    if kind in FAMILIES:
        raise UserError(f"{source} is a plain {kind!r} already")
    layout = layout or ("both" if kind == "ofp" else "lerobot")
    if layout != "lerobot" and kind != "ofp":
        raise UserError(f"openpi's layout is for `ofp` alone, {source} is of type {kind!r}: give --layout lerobot")
    return layout


def _make_plain(config: Any, steps: int) -> None:
    """Sets `config` to what a stock policy can do, and warns of what is lost.

    In float32, so that merging and the comparison do not round; the exported dtypes follow the values.
    """
    for name, plain in (("test_time_samples", 1), ("noise_temperature", 1.0), ("warm_start", 0.0)):
        if getattr(config, name) != plain:
            logger.warning("%s=%s does not carry over to a stock policy", name, getattr(config, name))
            setattr(config, name, plain)
    if hasattr(config, "precision"):
        config.dtype = "float32"
    config.compile_model, config.tokenizer_max_length = False, None
    config.sampler = OBJECTIVES[config.objective].sampler
    config.num_inference_steps, config.rtc_config = steps, None
    if hasattr(config, "inference_engine"):  # the proof is of the plain path
        config.inference_engine, config.inference_precision = False, "full"


def _warn_of_a_silent_branch(policy: VLAPolicy, source: str | Path, steps: int) -> None:
    if policy.config.sampler == "flow_map" and policy.branch_is_silent:
        logger.warning(
            "%s has not learnt average velocities (its target-time branch is silent): this is a %s of ten steps run "
            "with %d",
            source,
            policy.stock,
            steps,
        )


def _make_as_written(state: dict[str, Tensor], half: set[str]) -> None:
    """Gives each weight its own memory, those in `half` in bfloat16; a π₀.₅'s head becomes its embedding.

    What nobody else holds (so not the policy) is freed as it goes.
    """
    for name in list(state):
        w = state.pop(name)
        state[name] = (w.to(torch.bfloat16) if name in half else w.clone()).contiguous()
    # No π₀.₅ code of LeRobot reads the head, training leaves it behind, and other engines take it for the embedding.
    if openpi.HEAD in state:
        state[openpi.HEAD] = state[openpi.EMBEDDING].clone()


def _refuse_other_sizes(source: str | Path, config: Any) -> None:
    """Raises UserError where the stock policy of this kind has no network of the checkpoint's size."""
    try:
        stock_config(config)
    except UserError as error:
        model = OURS[config.type].policy.network_name
        raise UserError(
            f"ofp-export needs a checkpoint of {model}'s real size, since what it writes is run by stock code for "
            f"{model}. {source} is of another size: {error}"
        ) from error


@contextmanager
def _openpi_is_a_choice() -> Iterator[None]:
    """Errors of what openpi's layout asks for say how to do without it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}. (--layout lerobot exports for LeRobot alone, and asks nothing of openpi)") from error


def _folded(policy: VLAPolicy, steps: int) -> dict[str, Tensor]:
    """The weights of the stock network that stand for what the target-time branch adds."""
    if policy.name == "ofp":
        folded = fold_times(policy.model, steps, sampler=policy.config.sampler)
        return {"time_mlp_out.weight": folded.weight, "time_mlp_out.bias": folded.bias}
    return {"action_time_mlp_out.bias": fold_length(policy.model, steps, sampler=policy.config.sampler)}


def load_policy(source: str | Path, config: Any, which: Which) -> VLAPolicy:
    """The policy in float32 with the student's or the moving average's weights, an adapter merged into it.

    Raises UserError.
    """
    try:
        policy_class = OURS[config.type].policy
        if not config.use_peft:
            policy = policy_class.from_pretrained(source, config=config).float()
            if which == "teacher":
                use_teacher(policy, source)
            return policy.eval()
        wrapped = load_peft(policy_class, source, config).float()
        if which == "teacher":
            use_teacher(wrapped.get_base_model(), source)
        return wrapped.merge_and_unload().eval()
    except (ValueError, OSError, ImportError) as error:
        raise UserError(error) from error


def in_bfloat16(state: dict[str, Tensor], as_stored: str) -> set[str]:
    """Names of the weights to write in bfloat16, which loses nothing of them, except for what openpi keeps in float32.

    as_stored: `VLAPolicy.as_stored`. Where it is not empty the file's dtypes are those that whoever loads it computes
    in. These weights are then bfloat16 all or none, and the others float32.
    """
    if not as_stored:
        return {name for name, w in state.items() if not openpi.kept_in_float32(name) and _fits_bfloat16(w)}
    names = {name for name in state if name.startswith(as_stored)}
    return names if all(_fits_bfloat16(state[name]) for name in names) else set()


def _fits_bfloat16(w: Tensor) -> bool:
    return torch.equal(w.to(torch.bfloat16).to(w.dtype), w)


def trained_on(source: str | Path) -> str:
    """The data set's name, openpi's default for the asset id. Raises UserError where the checkpoint has none."""
    path = find_file(source, "train_config.json")
    name = (read_json(path).get("dataset") or {}).get("repo_id") if path is not None else None
    if not name:
        raise UserError("give --asset-id: the name under which openpi's train config looks for the statistics")
    return name
