"""A MetaWorld task set up as by LeRobot's `MetaworldEnv`, which renders every step; here frames are drawn on request.

Rendering needs OpenGL without a display. MuJoCo reads `MUJOCO_GL` when it is imported, so `usable_backend` tries the
candidates in processes of their own and the result belongs into the environment before this module's users start.
"""

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import mujoco

STATE_DIM = 4  # hand position and gripper opening, the state of LeRobot's `MetaworldEnv`
ACTION_DIM = 4  # hand displacement and gripper effort, each in [-1, 1]
CONTROL_RATE = 80  # steps a second, LeRobot's `render_fps`

_PROBE = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 64, 64) as renderer:
    renderer.update_scene(data)
    assert renderer.render().any()
"""
_INSTALL = (
    "MuJoCo cannot draw without a display: no OpenGL backend works on this machine.\n"
    "On Debian or Ubuntu install EGL with `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, or the slower OSMesa "
    "with `apt-get install libosmesa6`.\nWhat was tried:\n"
)


def usable_backend() -> str:
    """The first value of MUJOCO_GL that draws here: the one already set, else EGL, else OSMesa (software).

    Raises RuntimeError with what to install where none does.
    """
    chosen = os.environ.get("MUJOCO_GL")
    candidates = [chosen] if chosen is not None else (["egl", "osmesa"] if sys.platform == "linux" else [""])
    failures = []
    for name in candidates:
        run = subprocess.run(
            [sys.executable, "-c", _PROBE], env={**os.environ, "MUJOCO_GL": name}, capture_output=True, text=True
        )
        if run.returncode == 0:
            return name
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        failures.append(f"  MUJOCO_GL={name or '(unset)'}: {reason}")
    raise RuntimeError(_INSTALL + "\n".join(failures))


class Simulator:
    """One MetaWorld task. Raw observations are MetaWorld's (39,); a policy sees `state_of(raw)` and `render()`."""

    def __init__(self, task: str, camera: str = "corner2") -> None:
        """task: MetaWorld's name, such as "window-open-v3". Raises KeyError for an unknown one."""
        from lerobot.envs.metaworld import MetaworldEnv

        self.task, self.camera = task, camera
        self._lerobot = MetaworldEnv(task, camera_name=camera)
        self._lerobot._ensure_env()
        self._env = self._lerobot._env
        self._renderers: dict[int, mujoco.Renderer] = {}

    @property
    def description(self) -> str:
        """The task in words, the policy's prompt."""
        return self._lerobot.task_description

    def reset(self, seed: int) -> NDArray[np.float64]:
        """The raw observation of the start that `seed` draws."""
        self._env.seed(seed)
        return self._env.reset(seed=seed)[0]

    def step(self, action: NDArray[np.floating]) -> tuple[NDArray[np.float64], bool]:
        """One control step: the raw observation and whether the task is solved."""
        raw, _, _, _, info = self._env.step(np.clip(action, -1, 1))
        return raw, bool(info["success"])

    def render(self, size: int = 64) -> NDArray[np.uint8]:
        """What the camera sees, (size, size, 3)."""
        if size not in self._renderers:
            self._renderers[size] = self._make_renderer(size)
        renderer = self._renderers[size]
        renderer.update_scene(self._env.data, camera=self.camera)
        image = renderer.render()
        # LeRobot turns this camera's picture upright.
        return np.ascontiguousarray(image[::-1, ::-1] if self.camera == "corner2" else image)

    def _make_renderer(self, size: int) -> "mujoco.Renderer":
        import mujoco

        model = self._env.model
        # Shadows and multisampling cost more than everything else together where a CPU draws.
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0
        renderer = mujoco.Renderer(model, size, size)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer

    def close(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()
        self._lerobot.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def state_of(raw: NDArray[np.float64]) -> NDArray[np.float32]:
    """The agent's state (4,) in a raw observation."""
    return raw[:STATE_DIM].astype(np.float32)
