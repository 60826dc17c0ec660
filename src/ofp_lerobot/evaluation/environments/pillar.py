"""A pillar between the hand and its task, and a demonstrator that goes round it on one side or the other.

From the same start demonstrations go left and right, and the mean of the two is no solution: it leads into the pillar.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TASK = "button-press-topdown-v3"  # one with room for the pillar between the hand and what it does
LEFT, RIGHT = -1, 1  # the sign of x
CLEARANCE = 0.15  # metres from the pillar's axis, sideways ...
MARGIN = 0.06  # ... which is kept from so far before it to so far behind it

_GAIN = 10.0  # displacement per metre of distance
_ARRIVED = 0.015  # metres


def side_of(episode: int) -> int:
    """LEFT or RIGHT, on which a demonstrator passes the pillar in an episode of this number; they alternate."""
    return RIGHT if episode % 2 else LEFT


def left_share(sides: Sequence[int]) -> float | None:
    """Of the episodes that passed the pillar; None where none did. sides: LEFT, RIGHT, or 0 where it was not passed."""
    passed = [side for side in sides if side]
    return round(passed.count(LEFT) / len(passed), 3) if passed else None


@dataclass(frozen=True)
class Pillar:
    """An upright cylinder, a body of the physics; an episode that touches it has failed.

    x, y: of its axis in metres, in the hand's coordinates; radius and height likewise. By default in front of where the
    hand of the task starts, (0, 0.4, 0.2): after 8 cm straight ahead it touches.
    """

    x: float = 0.005
    y: float = 0.57
    radius: float = 0.04
    height: float = 0.4

    def add_to(self, scene: Any, name: str) -> None:
        """Adds the geometry `name` to a `mujoco.MjSpec`."""
        import mujoco

        scene.worldbody.add_geom(
            name=name,
            type=mujoco.mjtGeom.mjGEOM_CYLINDER,
            pos=[self.x, self.y, self.height / 2],
            size=[self.radius, self.height / 2, 0],
            rgba=[0.95, 0.75, 0.1, 1],
            contype=1,
            conaffinity=1,
        )


class AroundPillar:
    """MetaWorld's expert after a way round the pillar; call it with each raw observation (39,) in turn.

    Args:
        expert: of the task, as `metaworld.expert` gives it.
        start: the episode's first observation; the hand keeps its height until it is past.
        side: LEFT or RIGHT.
    """

    def __init__(
        self,
        expert: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        pillar: Pillar,
        start: NDArray[np.floating],
        side: int,
    ) -> None:
        self._expert = expert
        x, z = pillar.x + side * CLEARANCE, float(start[2])
        self._via = [np.array([x, pillar.y + along, z]) for along in (-MARGIN, MARGIN)]

    def __call__(self, raw: NDArray[np.floating]) -> NDArray[np.float64]:
        """Hand displacement and gripper effort (4,), each in [-1, 1]."""
        action = self._expert(np.asarray(raw, dtype=np.float64))
        while self._via and raw[1] > self._via[0][1] - _ARRIVED:
            self._via.pop(0)
        if self._via:
            offset = self._via[0] - raw[:3]
            action[:3] = _GAIN * offset / max(1.0, _GAIN * np.abs(offset).max())
        return action
