"""A session of the policy with what a comparison wants to know of each of its chunks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .results import Chunk

if TYPE_CHECKING:
    from ...inference.session import Session  # loads LeRobot, which no command's --help should wait for


class Planner:
    """One environment's run: observations in, actions to execute out, and the measures of each chunk."""

    def __init__(self, session: "Session") -> None:
        self._session = session
        self._last: NDArray[np.float32] | None = None  # (chunk_size, a), the last plan
        self._executed = 0

    def reset(self, seed: int | None = None) -> None:
        """An episode begins; seed: of its noise."""
        self._session.reset(seed)
        self._last = None

    def plan(self, observation: Mapping[str, Any]) -> tuple[NDArray[np.float32], Chunk]:
        """Actions (steps, a) in the robot's units, cut to the execution horizon. Observations in the policy's names."""
        answer = self._session.infer(observation)
        chunk = Chunk(answer.latency_ms, answer.evaluations, jump(self._last, answer.plan, self._executed))
        self._last, self._executed = answer.plan, len(answer.actions)
        return answer.actions, chunk


def jump(before: NDArray[np.float32] | None, after: NDArray[np.float32], executed: int) -> float | None:
    """Root mean square difference between two plans (h, a), the later made after `executed` steps of the earlier.

    Over the steps that both planned; where the earlier was executed whole, between the two actions at the seam.
    """
    if before is None:
        return None
    common = len(before) - executed
    difference = after[:common] - before[executed:] if common else after[:1] - before[-1:]
    return float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
