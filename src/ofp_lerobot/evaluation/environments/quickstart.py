"""Episodes on the simulator of `make quickstart`, so that its checkpoints can be compared. Needs the repository."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from ...inference.session import Runner
from ..closed_loop.jobs import Outcome, Start
from ..closed_loop.planning import Planner


class QuickstartHarness:
    """MetaWorld as the quickstart records and evaluates it: 64 pixels, two simulator steps to an action."""

    def __init__(self) -> None:
        try:
            from examples.quickstart.demonstrations import Recording
            from examples.quickstart.evaluation import Evaluation

            from .metaworld import usable_backend
        except ImportError as error:
            raise ImportError(
                "the quickstart's simulator is in the repository: run there, with the metaworld extra"
            ) from error
        os.environ["MUJOCO_GL"] = usable_backend()  # before anything imports MuJoCo
        self._recording, self._max_steps = Recording(), Evaluation().max_steps
        self._simulator: Any = None

    def find_starts(self, task: str, condition: str, count: int, first: int, report: Callable[[Start], None]) -> None:
        for seed in range(first, first + count):
            report(Start(task, condition, seed))

    def play(
        self, start: Start, runner: Runner, noise_seed: int, rename_map: Mapping[str, str], *, film: bool
    ) -> Outcome:
        planner = Planner(runner.session(noise_seed))
        from examples.quickstart.demonstrations import IMAGE, STATE

        from .metaworld import Simulator, description, state_of

        size, chunks, frames, steps, solved = self._recording.image_size, [], [], 0, False
        instruction = start.instruction or description(start.task)
        if self._simulator is None or self._simulator.task != start.task:
            self.close()
            self._simulator = Simulator(start.task, self._recording.camera, self._recording.action_repeat)
        simulator = self._simulator
        raw = simulator.reset(start.seed)
        while not solved and steps < self._max_steps:
            observation = {IMAGE: simulator.render(size), STATE: state_of(raw), "task": instruction}
            actions, chunk = planner.plan({rename_map.get(key, key): value for key, value in observation.items()})
            chunks.append(chunk)
            for action in actions:
                raw, solved = simulator.step(action)
                steps += 1
                if film:
                    frames.append(simulator.render(4 * size))
                if solved or steps >= self._max_steps:
                    break
        return Outcome(solved, steps, instruction, chunks, frames)

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
            self._simulator = None
