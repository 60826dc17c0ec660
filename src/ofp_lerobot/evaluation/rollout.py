"""The loop of closed-loop evaluation: observe, answer, execute, in any number of scenes at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .episodes import Chunk
from .metrics import jump

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.session import Answer, Session  # loads LeRobot, which no command's --help should wait for


class Scene(Protocol):
    """One environment during one episode."""

    success: bool

    def observe(self) -> Mapping[str, Any]:
        """What the policy is to see now, in its names."""

    def step(self, action: NDArray[np.float32]) -> bool:
        """Executes an action (a,) in the robot's units; whether the episode is over."""


class Answering(Protocol):
    """A `Runner`, or what answers as one."""

    def infer(
        self, sessions: Sequence[Any], observations: Sequence[Mapping[str, Any]], noise: "Tensor | None" = None
    ) -> "list[Answer]": ...


class MeasuredSession:
    """A session of the policy with what a comparison wants to know of each of its chunks."""

    def __init__(self, session: "Session") -> None:
        self.session = session
        self._last: NDArray[np.float32] | None = None  # (chunk_size, a), the last plan
        self._executed = 0

    def reset(self, seed: int | None = None) -> None:
        """An episode begins; seed: of its noise."""
        self.session.reset(seed)
        self._last = None

    def infer(self, observation: Mapping[str, Any]) -> tuple[NDArray[np.float32], Chunk]:
        """Actions (steps, a) in the robot's units, cut to the execution horizon. Observations in the policy's names."""
        answer = self.session.infer(observation)
        return answer.actions, self.measure(answer)

    def measure(self, answer: "Answer") -> Chunk:
        """Of this session's next answer."""
        chunk = Chunk(answer.latency_ms, answer.evaluations, jump(self._last, answer.plan, self._executed))
        self._last, self._executed = answer.plan, len(answer.actions)
        return chunk


class Course(NamedTuple):
    """How a scene's episode went: actions executed, chunks answered, and their plans (chunk_size, a)."""

    steps: int
    chunks: list[Chunk]
    plans: list[NDArray[np.float32]]


def roll_out(
    runner: Answering,
    sessions: Sequence[MeasuredSession],
    scenes: Sequence[Scene],
    *,
    limit: int,
    draw_noise: "Callable[[], Tensor] | None" = None,
) -> list[Course]:
    """Plays every scene to its end, or for `limit` actions.

    One call of the policy answers all scenes, those that have ended too, so that every call has the same size.

    Args:
        sessions: of the runner, one for each scene, new or reset.
        draw_noise: the noise of a call, as `Runner.infer` takes it; by default the sessions' own.
    """
    over = [False] * len(scenes)
    steps = [0] * len(scenes)
    courses: list[Course] = [Course(0, [], []) for _ in scenes]
    seen: list[Mapping[str, Any]] = [{} for _ in scenes]
    while not all(over):
        seen = [last if done else scene.observe() for scene, last, done in zip(scenes, seen, over, strict=True)]
        noise = None if draw_noise is None else draw_noise()
        answers = runner.infer([each.session for each in sessions], seen, noise)
        for i, (session, scene, answer) in enumerate(zip(sessions, scenes, answers, strict=True)):
            if over[i]:
                continue
            courses[i].chunks.append(session.measure(answer))
            courses[i].plans.append(answer.plan)
            for action in answer.actions:
                ended = scene.step(action)
                steps[i] += 1
                over[i] = ended or steps[i] >= limit
                if over[i]:
                    break
    return [course._replace(steps=count) for course, count in zip(courses, steps, strict=True)]
