"""`lerobot-eval`, LeRobot's own script, on a small environment."""

import json
import shutil
import sys
from dataclasses import dataclass, field
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch
from draccus import ParsingError
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from safetensors.torch import load_file, save_file

from ofp_lerobot.policies.ofp.network import OFPNetwork
from tests import runs, small

EXECUTED, LENGTH, SEED = 4, 12, 1000  # three chunks an episode


class Env(gym.Env):
    """Ends after LENGTH steps with reward 1 each; the episodes of even seeds succeed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    task = task_description = "open the window"
    actions: list[np.ndarray] = []  # noqa: RUF012

    def __init__(self, cameras=("top", "wrist"), render_mode="rgb_array"):
        self.render_mode = render_mode
        image = gym.spaces.Box(0, 255, (small.SIZE, small.SIZE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(cameras, image)),
                "agent_pos": gym.spaces.Box(-10, 10, (small.STATES,), np.float64),
            }
        )
        self.action_space = gym.spaces.Box(-100, 100, (small.ACTIONS,), np.float32)
        self._seed = 0

    def _observation(self):
        pixels = {camera: np.full(space.shape, 10 * self._step, np.uint8) for camera, space in self._cameras()}
        return {"pixels": pixels, "agent_pos": np.full(small.STATES, self._seed % 7 / 7 + self._step / 10)}

    def _cameras(self):
        return self.observation_space["pixels"].spaces.items()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._seed, self._step = seed if seed is not None else self._seed, 0
        return self._observation(), {}

    def step(self, action):
        self._step += 1
        Env.actions.append(action)
        done = self._step == LENGTH
        return self._observation(), 1.0, done, False, {"is_success": done and self._seed % 2 == 0}

    def render(self):
        return np.zeros((small.SIZE, small.SIZE, 3), np.uint8)


gym.register("gym_tiny_ofp/Open-v0", entry_point=Env, max_episode_steps=LENGTH + 4)


@EnvConfig.register_subclass("tiny_ofp")
@dataclass
class TinyEnv(EnvConfig):
    task: str | None = "Open-v0"
    fps: int = 10
    cameras: list[str] = field(default_factory=lambda: ["top", "wrist"])

    def __post_init__(self):
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (small.ACTIONS,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (small.STATES,)),
        }
        self.features_map = {ACTION: ACTION, "agent_pos": OBS_STATE}
        for camera in self.cameras:
            key = f"pixels/{camera}"
            self.features[key] = PolicyFeature(FeatureType.VISUAL, (small.SIZE, small.SIZE, 3))
            self.features_map[key] = f"{OBS_IMAGES}.{camera}"

    @property
    def gym_kwargs(self):
        return {"cameras": tuple(self.cameras)}


@pytest.fixture(scope="module")
def trained(dataset, tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    runs.lerobot_train(*runs.train_flags(dataset, output, steps=2), *runs.policy_flags(tokenizer, optimizer_lr=0.01))
    return runs.checkpoint(output, 2)


@pytest.fixture
def evaluate(trained, tmp_path, monkeypatch):
    """lerobot-eval of three episodes, two at a time: eval_info.json, the actions, (t, r) of each evaluation."""
    from lerobot.scripts import lerobot_eval as script

    def run(*flags, checkpoint=trained):
        times, forward = [], OFPNetwork.forward

        def counted(self, prefix, x_t, t, r, *args, **kwargs):
            times.append((round(t[0].item(), 4), round(r[0].item(), 4)))
            return forward(self, prefix, x_t, t, r, *args, **kwargs)

        output = tmp_path / f"eval{len(list(tmp_path.iterdir()))}"
        output.mkdir()
        argv = ["lerobot-eval", f"--policy.path={checkpoint}", "--env.type=tiny_ofp", f"--output_dir={output}"]
        argv += ["--eval.batch_size=2", "--eval.n_episodes=3", "--eval.use_async_envs=false", f"--seed={SEED}"]
        Env.actions = []
        with patch.object(sys, "argv", [*argv, *flags]), patch.object(OFPNetwork, "forward", counted):
            script.main()
        info = json.loads((output / "eval_info.json").read_text())
        return info, np.stack(Env.actions).reshape(2, LENGTH, 2, small.ACTIONS), times

    return run


def assert_complete(info, actions):
    assert info["overall"]["n_episodes"] == 3
    assert info["overall"]["pc_success"] == pytest.approx(200 / 3)  # seeds 1000 and 1002 of 1000, 1001, 1002
    assert info["overall"]["avg_sum_reward"] == pytest.approx(LENGTH)
    assert np.isfinite(actions).all()


def test_one_evaluation_per_chunk(evaluate):
    info, actions, times = evaluate()
    assert_complete(info, actions)
    assert times == [(1.0, 0.0)] * (2 * LENGTH // EXECUTED)


def test_ten_euler_steps_by_flags(evaluate):
    info, actions, times = evaluate("--policy.sampler=euler", "--policy.num_inference_steps=10")
    assert_complete(info, actions)
    assert times == [(round(1 - k / 10, 4),) * 2 for k in range(10)] * (2 * LENGTH // EXECUTED)
    assert not np.allclose(actions[0, :EXECUTED], evaluate()[1][0, :EXECUTED], atol=1e-3)


def test_warm_start_begins_with_the_second_chunk_of_each_episode(evaluate):
    info, warm, times = evaluate("--policy.warm_start=0.15")
    assert_complete(info, warm)
    assert times == [(1.0, 0.0), (0.85, 0.0), (0.85, 0.0)] * 2
    cold = evaluate()[1]
    assert np.array_equal(warm[:, :EXECUTED], cold[:, :EXECUTED])  # the same seed, the same noise
    assert not np.allclose(warm[:, EXECUTED:], cold[:, EXECUTED:], atol=1e-3)


def test_one_of_the_policys_cameras_is_enough(evaluate):
    info, actions, _ = evaluate("--env.cameras=[top]")
    assert_complete(info, actions)


def test_renamed_camera(evaluate):
    rename = json.dumps({"observation.images.front": "observation.images.top"})
    info, actions, _ = evaluate("--env.cameras=[front]", f"--rename_map={rename}")
    assert_complete(info, actions)
    assert np.array_equal(actions, evaluate("--env.cameras=[top]")[1])


def test_no_camera_of_the_policys_is_an_error(evaluate):
    with pytest.raises(ValueError, match=r"(?s)observation.images.top.*observation.images.front"):
        evaluate("--env.cameras=[front]")


def test_camera_renamed_to_something_unknown_is_an_error(evaluate):
    rename = json.dumps({"observation.images.front": "observation.images.tip"})
    with pytest.raises(ValueError, match=r"the policy's cameras.*observation.images.tip"):
        evaluate("--env.cameras=[front]", f"--rename_map={rename}")


def test_weights_with_nan_are_an_error(evaluate, trained, tmp_path_factory):
    broken = tmp_path_factory.mktemp("broken") / "pretrained_model"
    shutil.copytree(trained, broken)
    state = load_file(broken / "model.safetensors")
    state["model.action_out_proj.bias"][0] = torch.nan
    save_file(state, broken / "model.safetensors")
    with pytest.raises(ValueError, match="NaN or infinite actions: check the checkpoint"):
        evaluate(checkpoint=broken)
    assert Env.actions == []


@pytest.mark.parametrize("setting, value", [("n_action_steps", small.HORIZON + 1), ("num_inference_steps", 0)])
def test_impossible_setting_ends_in_an_error_that_names_it(setting, value, evaluate):
    with pytest.raises(ParsingError) as caught:  # what LeRobot's parser makes of a configuration's ValueError
        evaluate(f"--policy.{setting}={value}")
    told = caught.value.__cause__
    assert type(told) is ValueError and setting in str(told) and str(value) in str(told)
    assert Env.actions == []
