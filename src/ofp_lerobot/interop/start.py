"""From a fine-tuned stock policy to the checkpoint of ours that training to one step starts from."""

import json
import shutil
from pathlib import Path

from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.utils.constants import ACTION
from safetensors.torch import save_file

from ..checkpoints.families import FAMILIES
from ..checkpoints.reader import resolve_source
from ..compat import precision
from ..errors import UserError
from ..policies.sources import ORIGIN, start_from
from ..policies.vla import weights
from ..policies.vla.text import TextExtentProcessorStep
from . import openpi_layout as openpi
from .configurations import read_config, save_config
from .directories import find_file, refuse_existing, whole_directory
from .processors import PREPROCESSOR, read_processors
from .untrained import ACTS_IN_ONE_STEP, how_to_train, silent_branch

_TOKENIZER = "tokenizer_processor"


def convert_from_stock(
    source: str | Path, target: Path, stock: str = "pi05", *, dry_run: bool = False, overwrite: bool = False
) -> list[str]:
    """Writes a checkpoint of ours that is this stock one: weights, settings, processors and their tokenizer.

    The target-time branch is added, silent: ten Euler steps give the stock actions until it is trained. What
    `lerobot-train --policy.path=<target>` is not told it takes from there.

    Args:
        source: a directory, a training step's directory, or a Hub id.
        stock: its type, one of `families.FAMILIES`.
        dry_run: check and tell, write nothing.
        overwrite: replace an earlier conversion or export.

    Returns:
        What was done, a line each.

    Raises:
        UserError: where this is not a whole checkpoint of that type, or something would be lost.
    """
    source = resolve_source(str(source))
    refuse_existing(target, overwrite=overwrite, source=source)
    family = FAMILIES[stock]
    config, kind = read_config(source, types=(stock, family.policy.name))
    if kind != stock:
        raise UserError(f"{source} is of type {kind!r} already: train it with {start_from(source)}")
    if config.use_peft:
        raise UserError(f"{source} is a LoRA adapter of a {kind!r} policy: merge it into its base first")
    try:
        state = weights.load_state_dict(source, old_names=family.policy.old_names)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(error) from error
    network = {name.removeprefix(weights.PREFIX): weight for name, weight in state.items()}
    if hasattr(config, "vocabulary_size"):
        config.vocabulary_size = openpi.sizes(network)[2]  # stock configurations do not say
    openpi.refuse_differences(network, openpi.shapes(config), Path(source))
    config.sampler, config.num_inference_steps = "flow_map", 1
    config.base_model = None if Path(source).is_dir() else str(source)
    config.push_to_hub, config.repo_id = False, None
    processors = read_processors(source, config.output_features[ACTION].shape[0], for_openpi=False)
    steps = list(processors.preprocessor["steps"])
    names = [step.get("registry_name") for step in steps]
    if _TOKENIZER not in names:
        raise UserError(f"{PREPROCESSOR} of {source} has no {_TOKENIZER}: it is not a {stock}'s")
    extent = {"registry_name": TextExtentProcessorStep._registry_name, "config": {}}  # type: ignore[attr-defined]
    steps.insert(names.index(_TOKENIZER) + 1, extent)
    lines = [
        f"weights     {len(state)} tensors as they are, and a silent target-time branch",
        f"settings    the checkpoint's: chunks of {config.chunk_size}, {config.n_action_steps} executed, "
        f"dtype {precision(config)}",
        f"processors  the checkpoint's, tokenizer {steps[names.index(_TOKENIZER)]['config'].get('tokenizer_name')}",
        ACTS_IN_ONE_STEP,
    ]
    if dry_run:
        return [*lines, f"dry run     nothing written; would write {target}"]
    with whole_directory(target, overwrite=overwrite) as directory:
        named = {name: weight.clone().contiguous() for name, weight in (state | silent_branch(state)).items()}
        save_file(named, directory / openpi.WEIGHTS, metadata={"format": "pt"})
        save_config(config, directory)
        processors.write(directory)
        if (origin := find_file(source, TRAIN_CONFIG_NAME) or find_file(source, ORIGIN)) is not None:
            shutil.copyfile(origin, directory / ORIGIN)  # what it was trained on, for `ofp-check`
        (directory / PREPROCESSOR).write_text(json.dumps({**processors.preprocessor, "steps": steps}, indent=2) + "\n")
    return [*lines, f"written     {target}", how_to_train(target, stock)]
