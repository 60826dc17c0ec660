"""Checkpoint and episodes in, with an answer in one line where they do not fit each other."""

import json
from pathlib import Path
from typing import Any

from httpx import HTTPError  # of the Hub's client
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ...checkpoints.reader import masks_cameras, normaliser, state_size, statistics_problems
from ...compat import precision
from ...datasets import DatasetSource
from ...errors import UserError
from ...inference.policies import ServedPolicy
from ...objectives import OBJECTIVES
from ...policies.normalisation import recompute
from ...policies.relative import check_relative
from ...policies.vla.prompt import NO_INSTRUCTION, count_empty, tasks_of


def describe_checkpoint(checkpoint: ServedPolicy) -> dict[str, Any]:
    """The settings that the verdict depends on.

    objective and sharpening_noise: None and 0 where they have not trained the weights. A stock policy has neither, and
    in a conversion, whose branch is silent, they are for the training to come.
    """
    config = checkpoint.config
    ours = checkpoint.kind == config.type
    silent = ours and OBJECTIVES[config.objective].uses_target_time and checkpoint.policy.branch_is_silent
    trained = ours and not silent
    return {
        "type": checkpoint.kind,
        "chunk_size": config.chunk_size,
        "n_action_steps": config.n_action_steps,
        "sampler": config.sampler,
        "num_inference_steps": config.num_inference_steps,
        "test_time_samples": config.test_time_samples,
        "objective": config.objective if trained else None,
        "silent_branch": silent,
        "sharpening_noise": config.sharpening_noise if trained else 0.0,
        "noise_temperature": config.noise_temperature,
        "dtype": precision(config),
        "inference_precision": config.inference_precision if getattr(config, "uses_engine", False) else "full",
    }


def load_metadata(source: DatasetSource) -> LeRobotDatasetMetadata:
    """What a dataset says of itself. Raises UserError where it cannot be read."""
    try:
        return LeRobotDatasetMetadata(source.repo_id, source.root)
    except (OSError, ValueError, NotImplementedError, HTTPError) as error:
        raise UserError(f"the dataset cannot be loaded ({source}): {error}") from error


def check_statistics(checkpoint: ServedPolicy, metadata: LeRobotDatasetMetadata) -> list[str]:
    """What to know of the statistics beside the verdict. Raises UserError where they forbid one.

    The checkpoint's own, against the data that they came from as far as they tell, and against this dataset.
    """
    config = checkpoint.config
    problems = statistics_problems(checkpoint.preprocessor, config)
    if narrow := [problem.text for problem in problems if problem.kind == "narrow" and problem.key == ACTION]:
        raise UserError(
            f"the checkpoint's statistics cannot normalise its actions: {'; '.join(narrow)}. No number of steps can "
            f"answer with these; the dataset needs other ones ({recompute()}, or --policy.normalization_mapping with "
            "MIN_MAX for ACTION), and the policy a new training run"
        )
    step = normaliser(checkpoint.preprocessor)
    try:
        if hasattr(config, "use_relative_actions"):
            check_relative(config, metadata, step.stats if step is not None else None)
    except ValueError as error:
        raise UserError(f"the checkpoint was trained with statistics of the other kind of actions: {error}") from error
    return [f"Statistics that hardly fit the training data: {problem.text}." for problem in problems]


def check_instructions(checkpoint: ServedPolicy, metadata: LeRobotDatasetMetadata, episodes: list[int]) -> list[str]:
    """What to know of the episodes' instructions beside the verdict."""
    if not hasattr(checkpoint.config, "tokenizer_max_length"):  # it reads none
        return []
    tasks = tasks_of(metadata, episodes)
    empty = count_empty(tasks)
    return [f"{empty} of the {len(tasks)} instructions of these episodes are empty: {NO_INSTRUCTION}."] if empty else []


def check_features(checkpoint: ServedPolicy, metadata: LeRobotDatasetMetadata) -> list[str]:
    """What to know of the dataset's features beside the verdict: cameras of the policy that it lacks.

    As in LeRobot's training, a camera may be missing where no unknown one is there in its place. Raises UserError where
    the policy's cameras are not the dataset's, or state or action have another size.
    """
    config, rename = checkpoint.config, checkpoint.rename_map
    found = {rename.get(key, key): feature for key, feature in metadata.features.items()}
    expected = [key for key in config.image_features if not key.startswith(f"{OBS_IMAGES}.empty_camera")]
    missing = [key for key in expected if key not in found]
    unknown = [key for key in metadata.camera_keys if rename.get(key, key) not in expected]
    if missing and (unknown or len(missing) == len(expected) or not masks_cameras(config)):
        cameras = f"the policy's cameras are {expected}, the dataset's {list(metadata.camera_keys)}"
        if not unknown:
            raise UserError(f"{cameras}: the policy cannot act without {', '.join(missing)}")
        example = json.dumps({**rename, **dict(zip(unknown, missing, strict=False))})
        raise UserError(f"{cameras}: name them alike with --rename_map='{example}'")
    sizes = {OBS_STATE: state_size(config, checkpoint.preprocessor), ACTION: config.action_feature.shape[0]}
    for key, size in sizes.items():
        if size is None:
            continue
        shape = tuple(found[key]["shape"]) if key in found else None
        if shape != (size,):
            there = "is missing in" if shape is None else f"has {shape[0]} dimensions in"
            raise UserError(
                f"{key} {there} {metadata.repo_id}, the policy has {size}: the policy was not trained on "
                "data of this kind"
            )
    return [f"The dataset has no {', '.join(missing)}, which the policy then does not see."] if missing else []


def load_episodes(
    metadata: LeRobotDatasetMetadata, root: Path | None, config: PreTrainedConfig, episodes: list[int]
) -> LeRobotDataset:
    """These episodes; items hold the policy's action chunk and `action_is_pad`.

    root: the dataset's directory, None for the Hub's cache. Raises UserError where they cannot be read.
    """
    try:
        return LeRobotDataset(
            metadata.repo_id,
            root=root,
            episodes=episodes,
            delta_timestamps=resolve_delta_timestamps(config, metadata),
        )
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"episodes of {metadata.repo_id} cannot be loaded: {error}") from error


def action_names(metadata: LeRobotDatasetMetadata) -> list[str]:
    """Names of the action's dimensions, numbers where the dataset has none."""
    feature = metadata.features[ACTION]
    names = feature.get("names")
    if isinstance(names, dict):  # some datasets group them: {"motors": [...]}
        names = [name for group in names.values() for name in (group if isinstance(group, list) else [group])]
    size = feature["shape"][0]
    return [str(name) for name in names] if names and len(names) == size else [str(i) for i in range(size)]
