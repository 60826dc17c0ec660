"""Statistics of absolute actions with relative ones, and the other way round."""

import numpy as np
import pytest
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.dataset_tools import recompute_stats
from lerobot.utils.constants import ACTION

from ofp_lerobot.policies.relative import check_relative, check_relative_features, distance, read_samples
from tests import runs, small


def make_arm(root, offset=1.5, moving=True):
    """Joints that turn slowly around 1.5 rad, each action 0.02 rad ahead: absolute and relative ones differ."""
    names = [f"j{i}.pos" for i in range(4)] + ["gripper.pos"]
    vector = {"dtype": "float32", "shape": (5,), "names": names}
    features = {"observation.state": vector, "action": vector}
    dataset = LeRobotDataset.create("local/arm", fps=10, features=features, root=root, use_videos=False)
    for episode in range(3):
        for i in range(30):
            state = np.full(5, offset + 0.02 * i * moving + 0.1 * episode, np.float32)
            dataset.add_frame({"observation.state": state, "action": state + np.float32(0.02), "task": "turn"})
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("local/arm", root)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    return make_arm(tmp_path_factory.mktemp("arm") / "data")


def config(relative, names=True):
    given = [f"j{i}.pos" for i in range(4)] + ["gripper.pos"] if names else None
    return small.ofp_config(use_relative_actions=relative, action_feature_names=given)


@pytest.fixture(scope="module")
def relative_stats(arm, tmp_path_factory):
    """As LeRobot's own lerobot-edit-dataset computes them."""
    copy = make_arm(tmp_path_factory.mktemp("relative") / "data")
    recompute_stats(copy, relative_action=True, relative_exclude_joints=["gripper"], chunk_size=small.HORIZON)
    return LeRobotDataset("local/arm", copy.root).meta.stats


def test_each_kind_with_its_own(arm, relative_stats):
    check_relative(config(False), arm.meta, arm.meta.stats)
    check_relative(config(True), arm.meta, relative_stats)


def test_relative_actions_with_absolute_statistics(arm):
    with pytest.raises(ValueError, match="use_relative_actions=true, but.*--operation.relative_action=true") as refused:
        check_relative(config(True), arm.meta, arm.meta.stats)
    assert f"--operation.chunk_size={small.HORIZON} " in str(refused.value)
    assert """--operation.relative_exclude_joints='["gripper"]'""" in str(refused.value)


def test_absolute_actions_with_relative_statistics(arm, relative_stats):
    with pytest.raises(ValueError, match="use_relative_actions=false, but.*set --policy.use_relative_actions=true"):
        check_relative(config(False), arm.meta, relative_stats)


def test_data_that_cannot_tell(arm, relative_stats, tmp_path, dataset):
    check_relative(config(True), arm.meta, {})
    check_relative(config(True), arm.meta, {ACTION: {"q01": np.zeros(5), "q99": np.ones(5)}})
    still = make_arm(tmp_path / "still", offset=0.0, moving=False)
    check_relative(config(True), still.meta, still.meta.stats)
    noise = LeRobotDataset(runs.REPO, dataset)  # the state says nothing of the action
    check_relative(config(True), noise.meta, noise.meta.stats)


@pytest.mark.parametrize(
    ("inputs", "features", "message"),
    [
        ({}, {}, "the policy's input_features lack: set --policy.use_relative_actions=false"),
        (None, {"observation.state": {"shape": (3,)}}, "the state, of 3 dimensions, taken from actions of 5"),
        (None, {ACTION: {"shape": (5,), "names": {"motors": ["a"] * 5}}}, r"motors.*relative_exclude_joints='\[\]'"),
    ],
)
def test_data_that_cannot_have_relative_actions(arm, inputs, features, message):
    made = config(True)
    made.input_features = made.input_features if inputs is None else inputs
    with pytest.raises(ValueError, match=message):
        check_relative_features(made, {**arm.meta.features, **features})


def test_data_that_can(arm):
    check_relative_features(config(True), arm.meta.features)
    check_relative_features(config(False), {ACTION: {"shape": (5,)}, "observation.state": {"shape": (3,)}})


def test_what_is_read(arm):
    samples = read_samples(config(True), arm.meta)
    assert samples.dimensions.tolist() == [0, 1, 2, 3]  # the gripper stays absolute
    assert samples.absolute.min() == pytest.approx(1.52) and samples.absolute.max() == pytest.approx(1.5 + 0.6 + 0.2)
    assert samples.relative.min() == pytest.approx(0.02, abs=1e-6)
    assert samples.relative.max() == pytest.approx(0.02 * small.HORIZON, abs=1e-6)
    assert read_samples(config(True, names=False), arm.meta).dimensions.tolist() == [0, 1, 2, 3, 4]


def test_distance():
    values = np.array([[-1.0, 5.0], [1.0, 5.0]])  # deviations 1 and 0, which does not count
    assert distance(values, np.zeros(2), np.ones(2)) == 0
    assert distance(values, np.array([2.0, 0.0]), np.ones(2)) == pytest.approx(1.0)
    assert distance(values, np.zeros(2), np.array([np.e, 1.0])) == pytest.approx(1.0)
