"""Episodes in, with an answer in one line where they do not fit the checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

from httpx import HTTPError  # of the Hub's client
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from ...checkpoints.reader import normaliser, statistics_problems
from ...datasets import DatasetSource
from ...errors import UserError
from ...inference.policies import ServedPolicy
from ...policies.normalisation import RECOMPUTE
from ...policies.ofp import weights
from ...policies.relative import check_relative

HELD_OUT_SHARE = 0.1  # of the episodes, where nothing says what training left out


def load_metadata(source: DatasetSource) -> LeRobotDatasetMetadata:
    try:
        return LeRobotDatasetMetadata(source.repo_id, source.root)
    except (OSError, ValueError, NotImplementedError, HTTPError) as error:
        raise UserError(f"the dataset cannot be loaded ({source}): {error}") from error


def training_dataset(source: str | Path) -> dict[str, Any] | None:
    """The `dataset` section of the checkpoint's training configuration, None where it has none."""
    try:
        path = weights.find_file(source, "train_config.json")
    except FileNotFoundError:  # offline, and not in the cache
        return None
    return json.loads(path.read_text()).get("dataset") if path is not None else None


def trained_episodes(metadata: LeRobotDatasetMetadata, training: dict[str, Any] | None) -> set[int] | None:
    """The episodes of this dataset that training used, None where that is not known.

    LeRobot holds out the last `eval_split` of each task's episodes.
    """
    if training is None or not _is_same_dataset(metadata, training):
        return None
    listed = training.get("episodes")
    episodes = range(metadata.total_episodes) if listed is None else listed
    if max(episodes, default=0) >= metadata.total_episodes:  # the name is the same, the data are not
        return None
    split = training.get("eval_split", 0.0)
    assert metadata.episodes is not None
    tasks, by_task = metadata.episodes["tasks"], dict[str, list[int]]()
    for episode in episodes:
        by_task.setdefault(tasks[episode][0] if tasks[episode] else "", []).append(episode)
    return {episode for group in by_task.values() for episode in group[: len(group) - math.ceil(len(group) * split)]}


def _is_same_dataset(metadata: LeRobotDatasetMetadata, training: dict[str, Any]) -> bool:
    """By its directory, whatever it is called, or by its name on the Hub."""
    root, used = getattr(metadata, "root", None), training.get("root")
    if root is not None and used is not None and Path(root).resolve() == Path(used).expanduser().resolve():
        return True
    return training.get("repo_id") == metadata.repo_id


def choose_episodes(
    metadata: LeRobotDatasetMetadata, wanted: list[int] | None, training: dict[str, Any] | None
) -> tuple[list[int], str]:
    """Episodes to check on, and why these: those asked for, else all that training left out, else the last ones."""
    total = metadata.total_episodes
    if wanted is not None:
        if wanted[-1] >= total:
            raise UserError(f"--episodes: {metadata.repo_id} has episodes 0 to {total - 1}, not {wanted[-1]}")
        return wanted, "as asked"
    if total == 0:
        raise UserError(f"{metadata.repo_id} has no episodes")
    trained = trained_episodes(metadata, training)
    if trained is not None and training is not None:
        split = training.get("eval_split")
        if split:  # of the episodes that it was given; others may be left out for a reason
            listed = training.get("episodes") or range(total)
            return sorted(set(listed) - trained), f"training held them out by eval_split={split}"
        if unseen := sorted(set(range(total)) - trained):
            return unseen, "training left them out by dataset.episodes"
    return list(range(total - math.ceil(total * HELD_OUT_SHARE), total)), f"the last {HELD_OUT_SHARE:.0%}, by default"


def held_out(metadata: LeRobotDatasetMetadata, episodes: list[int], training: dict[str, Any] | None) -> bool | None:
    """Whether training has seen none of the episodes, None where that is not known."""
    trained = trained_episodes(metadata, training)
    return None if trained is None else trained.isdisjoint(episodes)


def check_statistics(checkpoint: ServedPolicy, metadata: LeRobotDatasetMetadata) -> list[str]:
    """What to know of the statistics beside the verdict. Raises UserError where they forbid one.

    The checkpoint's own, against the data that they came from as far as they tell, and against this dataset.
    """
    config = checkpoint.config
    problems = statistics_problems(checkpoint.preprocessor, config)
    if narrow := [problem.text for problem in problems if problem.kind == "narrow" and problem.key == ACTION]:
        raise UserError(
            f"the checkpoint's statistics cannot normalise its actions: {'; '.join(narrow)}. No number of steps can "
            f"answer with these; the dataset needs other ones ({RECOMPUTE}, or --policy.normalization_mapping with "
            "MIN_MAX for ACTION), and the policy a new training run"
        )
    step = normaliser(checkpoint.preprocessor)
    try:
        if hasattr(config, "use_relative_actions"):  # `ofp_unet` knows absolute ones only
            check_relative(config, metadata, step.stats if step is not None else None)
    except ValueError as error:
        raise UserError(f"the checkpoint was trained with statistics of the other kind of actions: {error}") from error
    return [f"Statistics that hardly fit the training data: {problem.text}." for problem in problems]


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
    """Items hold the policy's action chunk and `action_is_pad`."""
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
