"""Episodes on LeRobot's own environments: MetaWorld, LIBERO, and RoboTwin as LeRobot drives it."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Mapping
from itertools import count as count_from
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lerobot.envs import make_env, make_env_config, make_env_pre_post_processors, preprocess_observation
from lerobot.envs.utils import NEW_ROLLOUT_OPTION
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_IMAGES, OBS_STATE
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from robotwin_eval.adapters.common.observation import CLASSIC_CAMERAS
from robotwin_eval.serve import camera_names

from ...errors import UserError
from ...inference.session import Runner
from ..closed_loop.jobs import Outcome, Start
from ..closed_loop.planning import Planner


class LeRobotHarness:
    """One environment at a time, made by `lerobot.envs.make_env`.

    Tasks are named as LeRobot's `--env.task`, with `/<task id>` where that is a suite: `libero_spatial/3`. RoboTwin's
    run here too, if the checkout is on PYTHONPATH and the working directory; not by RoboTwin's own protocol.
    Frames are rendered where the policy looks, if the environment can do without the others.
    """

    def __init__(self, kind: str, settings: Mapping[str, Any], *, fast_rendering: bool = False) -> None:
        """settings: fields of LeRobot's configuration of that environment. fast_rendering: MetaWorld without shadows,
        reflections and multisampling, which on a CPU take nearly all the time."""
        if fast_rendering and kind != "metaworld":
            raise UserError("fast_rendering is MetaWorld's; leave it out for other environments")
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
        self._kind, self._settings, self._fast = kind, dict(settings), fast_rendering
        self._task: str | None = None

    def find_starts(self, task: str, condition: str, count: int, first: int, report: Callable[[Start], None]) -> None:
        """Seeds in order: LeRobot's environments have no expert to ask. RoboTwin's unstable ones are left out."""
        if self._kind.startswith("libero"):
            self._open(task)
            self._check_initial_state(first + count - 1)
        seeds = count_from(first)
        while count:
            seed = next(seeds)
            if self._kind != "robotwin" or self._is_stable(task, seed):
                report(Start(task, condition, seed))
                count -= 1

    def play(
        self, start: Start, runner: Runner, noise_seed: int, rename_map: Mapping[str, str], *, film: bool
    ) -> Outcome:
        planner = Planner(runner.session(noise_seed))
        if self._kind == "robotwin":
            cameras = camera_names(runner.cameras, dict(rename_map))
            rename_map = {f"{OBS_IMAGES}.{CLASSIC_CAMERAS[name]}": feature for name, feature in cameras.items()}
        self._open(start.task)
        self._choose_initial_state(start.seed)
        raw, _ = self._env.reset(seed=[start.seed], options={NEW_ROLLOUT_OPTION: True})
        if self._kind == "robotwin":
            self._inner.episode_index = start.seed  # LeRobot sets up one more scene at the end: one that is stable
        limit = self._env.call("_max_episode_steps")[0]
        instruction = start.instruction or self._instruction()
        chunks, frames, steps, success, done = [], [], 0, False, False
        if film:
            frames.append(self._frame())
        while not done and steps < limit:
            actions, chunk = planner.plan(self._observation(raw, instruction, rename_map))
            chunks.append(chunk)
            for action in actions:
                raw, _, terminated, truncated, info = self._env.step(self._finish(action))
                steps += 1
                done = bool(terminated[0] or truncated[0])
                success = done and _is_success(info)
                if film and not done:  # LeRobot's environments have reset themselves by then
                    frames.append(self._frame())
                if done or steps >= limit:
                    break
        return Outcome(success, steps, instruction, chunks, frames)

    def close(self) -> None:
        if self._task is not None:
            self._env.close()
            self._task = None

    def _open(self, task: str) -> None:
        if task == self._task:
            return
        self.close()
        suite, _, number = task.partition("/")
        settings = {**self._settings, "task": suite} | ({"task_ids": [int(number)]} if number else {})
        try:
            if self._kind == "robotwin":
                settings.setdefault("episode_length", robotwin_step_limit(task))
            config = make_env_config(self._kind, **settings)
            with contextlib.redirect_stdout(io.StringIO()):  # LeRobot prints one line per environment
                made = make_env(config, n_envs=1)
        except (TypeError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"LeRobot's environment {self._kind!r} with {settings}: {error}") from error
        environments = [env for group in made.values() for env in group.values()]
        if len(environments) != 1:
            names = [f"{group}/{number}" for group, envs in made.items() for number in envs]
            raise UserError(f"task {task!r} stands for {len(environments)} tasks, name them: {', '.join(names)}")
        self._env, self._task = environments[0], task
        self._before, self._after = make_env_pre_post_processors(config, None)
        self._inner = self._env.envs[0].unwrapped
        self._lazy = self._kind == "metaworld"
        if self._lazy:
            _render_on_request(self._inner, fast=self._fast)

    def _is_stable(self, task: str, seed: int) -> bool:
        self._open(task)
        try:
            self._env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
        except Exception as error:
            if type(error).__name__ == "UnStableError":  # RoboTwin's, which is not importable without it
                return False
            raise
        return True

    def _choose_initial_state(self, seed: int) -> None:
        """LIBERO counts resets through its list of initial states; here the seed chooses."""
        if hasattr(self._inner, "init_state_id"):
            self._check_initial_state(seed)
            self._inner.init_state_id = seed

    def _check_initial_state(self, seed: int) -> None:
        """Another round through the list would be the same episodes again. Raises UserError."""
        states = getattr(self._inner, "_init_states", None)
        if states is not None and not 0 <= seed < len(states):
            raise UserError(
                f"{self._task} has {len(states)} initial states, and seed {seed} would repeat one: at most "
                f"--episodes={len(states)} from --first-seed=0"
            )

    def _instruction(self) -> str:
        return str(getattr(self._inner, "task_description", None) or self._inner.task)

    def _frame(self) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self._inner.render())

    def _observation(self, raw: dict[str, Any], instruction: str, rename_map: Mapping[str, str]) -> dict[str, Any]:
        """The policy's names, images uint8 again: LeRobot's own steps work on floats."""
        if self._lazy:
            raw = {**raw, "pixels": self._frame()[None]}
        batch = self._before({**preprocess_observation(raw), "task": [instruction]})
        found: dict[str, Any] = {"task": instruction}
        for key, value in batch.items():
            name = rename_map.get(key, key)
            if key.startswith(OBS_IMAGE) and isinstance(value, Tensor):
                found[name] = (value[0] * 255).round().byte().permute(1, 2, 0).numpy()
            elif key == OBS_STATE:
                found[name] = value[0].numpy()
        return found

    def _finish(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._after({ACTION: from_numpy(action)[None]})[ACTION].numpy()


def robotwin_step_limit(task: str) -> int:
    """Of RoboTwin's own evaluation, which LeRobot's environment does not know; from the checkout on PYTHONPATH."""
    from envs import CONFIGS_PATH  # RoboTwin's

    return int(yaml.safe_load((Path(CONFIGS_PATH) / "_eval_step_limit.yml").read_text())[task])


def _is_success(info: Mapping[str, Any]) -> bool:
    final = info.get("final_info", info)
    return bool(np.asarray(final.get("is_success", [False])).reshape(-1)[0])


def _render_on_request(env: Any, *, fast: bool) -> None:
    """MetaWorld draws a frame at every step, of which a policy that executes chunks sees one in n_action_steps."""
    blank = np.zeros(env.observation_space["pixels"].shape, dtype=np.uint8)
    env._format_raw_obs = lambda raw: {"pixels": blank, "agent_pos": raw[:4]}
    if not fast:
        return
    import mujoco

    env._ensure_env()
    model = env._env.model
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    viewer = env._env.mujoco_renderer._get_viewer("rgb_array")
    viewer.scn.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = viewer.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
