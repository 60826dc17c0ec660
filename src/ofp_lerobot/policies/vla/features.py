"""Whether a dataset's features and statistics fit a policy."""

from typing import Any

from lerobot.utils.constants import ACTION
from torch import Tensor

from ...compat import names_are_mapped
from ..normalisation import lacking

_COMPUTE = "LeRobot's `python -m lerobot.scripts.augment_dataset_quantile_stats --repo-id=<dataset>`"


def check_features(config: Any, *, projected_state: bool) -> None:
    """Raises ValueError where they do not. projected_state: a layer of the network takes max_state_dim of the state."""
    if not config.output_features or ACTION not in config.output_features:
        raise ValueError("the policy needs 'action' among its output_features")
    sizes = {"action": config.output_features[ACTION].shape[0]}
    if projected_state:
        if config.robot_state_feature is None:
            raise ValueError("the policy needs observation.state among its input_features")
        sizes["state"] = config.robot_state_feature.shape[0]
    for name, size in sizes.items():
        most = getattr(config, f"max_{name}_dim")
        if size > most:
            raise ValueError(
                f"the data's {name} has {size} dimensions, max_{name}_dim is {most}: set --policy.max_{name}_dim "
                "(a checkpoint fixes it, released ones at 32)"
            )
    if not config.image_features:
        raise ValueError("the policy needs at least one camera (observation.images.*) in its input_features")


def check_statistics(config: Any, stats: dict[str, dict[str, Tensor]] | None) -> None:
    """Raises ValueError where the statistics of a dataset (None: not known yet) lack what the normalisation needs."""
    if stats is None:
        return
    features = {**(config.input_features or {}), **(config.output_features or {})}
    for key, missing in lacking(stats, features, config.normalization_mapping).items():
        if key not in stats:
            where = "give --rename_map" if names_are_mapped() else "rename it in the dataset (--rename_map will not do)"
            raise ValueError(
                f"the dataset has no statistics of {key!r}, only of {', '.join(sorted(stats))}: where it is there by "
                f"another name, {where}; else compute them with {_COMPUTE}"
            )
        kind = features[key].type
        raise ValueError(
            f"the dataset has no {' and '.join(missing)} statistics for {key!r}, which normalization_mapping "
            f"{kind.value}={config.normalization_mapping[kind].value} needs: compute them once with {_COMPUTE}, or set "
            "--policy.normalization_mapping to what the dataset has"
        )
