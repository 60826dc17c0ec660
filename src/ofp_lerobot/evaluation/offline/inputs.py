"""Episodes in, with an answer in one line where they do not fit the checkpoint."""

import json
from pathlib import Path

from httpx import HTTPError  # of the Hub's client
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ...checkpoints.reader import normaliser, statistics_problems
from ...datasets import DatasetSource
from ...errors import UserError
from ...inference.policies import ServedPolicy
from ...policies.normalisation import recompute
from ...policies.relative import check_relative
from ...policies.vla.prompt import NO_INSTRUCTION, count_empty, tasks_of


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


def check_features(checkpoint: ServedPolicy, metadata: LeRobotDatasetMetadata) -> None:
    """Raises UserError where the dataset lacks a camera of the policy, or state or action have another size."""
    config, rename = checkpoint.config, checkpoint.rename_map
    found = {rename.get(key, key): feature for key, feature in metadata.features.items()}
    expected = [key for key in config.image_features if not key.startswith(f"{OBS_IMAGES}.empty_camera")]
    if missing := [key for key in expected if key not in found]:
        cameras = list(metadata.camera_keys)
        example = json.dumps(dict(zip(cameras, missing, strict=False)))
        raise UserError(
            f"the policy's cameras are {expected}, the dataset's {cameras}: name them alike with "
            f"--rename_map='{example}'"
        )
    for key, feature in ((OBS_STATE, config.robot_state_feature), (ACTION, config.action_feature)):
        if feature is None:
            continue
        shape = tuple(found[key]["shape"]) if key in found else None
        if shape != tuple(feature.shape):
            there = "is missing in" if shape is None else f"has {shape[0]} dimensions in"
            raise UserError(
                f"{key} {there} {metadata.repo_id}, the policy has {feature.shape[0]}: the policy was not trained on "
                "data of this kind"
            )


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
