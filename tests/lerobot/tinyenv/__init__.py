"""A small environment for LeRobot's own scripts: `--env.discover_packages_path=tests.lerobot.tinyenv`."""

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from tests import small

LENGTH = 12  # three chunks an episode


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
