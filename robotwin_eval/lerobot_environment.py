"""RoboTwin as LeRobot drives it, for `ofp-compare --env lerobot-robotwin`. Not by RoboTwin's own protocol.

The checkout must be on PYTHONPATH and the working directory.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count as count_from
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ofp_lerobot.evaluation.environments.lerobot_envs import LeRobotHarness
from ofp_lerobot.evaluation.episodes import Start

from .adapters.common.observation import CLASSIC_CAMERAS
from .data.keywords import TASKS
from .serve import camera_names

if TYPE_CHECKING:
    from ofp_lerobot.inference.session import Runner  # loads LeRobot, which no command's --help should wait for


class LeRobotRoboTwinHarness(LeRobotHarness):
    """LeRobot's environment with RoboTwin's camera names and step limits; unstable seeds are left out."""

    needs_instructions = True  # LeRobot draws some anew at every reset
    looks_for_starts = True

    def __init__(self, kind: str, settings: Mapping[str, Any], device: str | None = None) -> None:
        super().__init__("robotwin", settings, device)

    @classmethod
    def protocol(cls, kind: str, settings: Mapping[str, Any]) -> str:
        limit = settings.get("fields", {}).get("episode_length")
        limits = f"{limit} steps in every task" if limit else "RoboTwin's step limit of each task"
        return (
            "LeRobot's RoboTwin environment. Not RoboTwin's protocol: no expert check, only unstable seeds are left "
            "out; LeRobot's instructions, which are the task's name, or a template in the ranking of blocks; clean "
            f"scenes only; {limits}"
        )

    @classmethod
    def known_tasks(cls, kind: str) -> Sequence[str]:
        return TASKS

    def find_starts(self, task: str, condition: str, count: int, first: int, report: Callable[[Start], None]) -> None:
        """Seeds in order, without those at which RoboTwin finds the scene unstable, with LeRobot's instructions."""
        seeds = count_from(first)
        while count:
            seed = next(seeds)
            if self._is_stable(task, seed):
                report(Start(task, condition, seed, self._instruction()))
                count -= 1

    def _is_stable(self, task: str, seed: int) -> bool:
        from lerobot.envs.utils import NEW_ROLLOUT_OPTION

        self._open(task)
        try:
            self._env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
        except Exception as error:
            if type(error).__name__ == "UnStableError":  # RoboTwin's, which is not importable without it
                return False
            raise
        return True

    def _names(self, runner: "Runner", rename_map: Mapping[str, str]) -> Mapping[str, str]:
        cameras = camera_names(runner.cameras, dict(rename_map))
        return {f"observation.images.{CLASSIC_CAMERAS[name]}": feature for name, feature in cameras.items()}

    def _after_reset(self, start: Start) -> None:
        self._inner.episode_index = start.seed  # LeRobot sets up one more scene at the end: one that is stable

    def _settings(self, task: str) -> dict[str, Any]:
        return {"episode_length": step_limit(task), **super()._settings(task)}


def step_limit(task: str) -> int:
    """Of RoboTwin's own evaluation, which LeRobot's environment does not know; from the checkout on PYTHONPATH."""
    from envs import CONFIGS_PATH  # RoboTwin's

    return int(yaml.safe_load((Path(CONFIGS_PATH) / "_eval_step_limit.yml").read_text())[task])
