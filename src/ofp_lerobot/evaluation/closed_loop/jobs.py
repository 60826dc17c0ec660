"""What a comparison consists of: policies, and episodes that each of them plays."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import numpy as np
import yaml
from numpy.typing import NDArray

from ...errors import UserError
from .results import Chunk, Key

if TYPE_CHECKING:
    from ...inference.session import Runner  # loads LeRobot, which no command's --help should wait for


@dataclass(frozen=True)
class PolicySpec:
    """A checkpoint and how it answers; None is the checkpoint's own setting.

    steps: network evaluations per chunk; samples: of which one is answered; temperature: factor of the noise; horizon:
    actions executed of each chunk; engine: the fast path of `ofp`; rename_map: LeRobot's.
    """

    name: str
    path: str
    steps: int | None = None
    sampler: str | None = None
    warm_start: float | None = None
    samples: int | None = None
    temperature: float | None = None
    horizon: int | None = None
    engine: bool | None = None
    rename_map: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Raises UserError on unknown and missing keys and on wrong types."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise UserError(
                f"policy {values.get('name')!r}: {', '.join(unknown)} unknown, known are {', '.join(sorted(known))}"
            )
        if missing := sorted({"name", "path"} - values.keys()):
            raise UserError(f"a policy needs {' and '.join(missing)}, as name=one,path=<checkpoint>,steps=1")
        try:
            spec = cls(**{**values, "name": str(values["name"]), "path": str(values["path"])})
            kinds = {
                "steps": int,
                "samples": int,
                "temperature": float,
                "horizon": int,
                "warm_start": float,
                "engine": bool,
            }
            for key, kind in kinds.items():
                if (value := getattr(spec, key)) is not None:
                    object.__setattr__(spec, key, _as(kind, key, value))
        except (TypeError, ValueError) as error:
            raise UserError(f"policy {values.get('name')!r}: {error}") from error
        if spec.temperature is not None and not 0 <= spec.temperature <= 1:
            raise UserError(f"policy {spec.name!r}: temperature is {spec.temperature:g}, expected is 0 to 1")
        if not re.fullmatch(r"[\w.+-]+", spec.name):
            raise UserError(f"policy name {spec.name!r}: letters, digits and . + - _ only, it names files")
        return spec

    @classmethod
    def parse_flag(cls, text: str) -> Self:
        """name=one,path=<checkpoint>,steps=1"""
        pairs = [part.partition("=") for part in text.split(",")]
        return cls.parse({key.strip(): yaml.safe_load(value) for key, _, value in pairs})


def _as(kind: type, key: str, value: Any) -> Any:
    """Raises ValueError where the value would become another one."""
    if isinstance(value, bool) != (kind is bool) or (kind is int and not float(value).is_integer()):
        raise ValueError(f"{key} is {value!r}, expected is {kind.__name__}")
    return kind(value)


def read_policies(path: Path) -> list[PolicySpec]:
    """A YAML file: a list of policies, or `policies:` with one."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from error
    listed = content.get("policies") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise UserError(f"{path} must be a list of policies with name and path")
    return [PolicySpec.parse(each) for each in listed]


class Start(NamedTuple):
    """Where an episode begins. instruction None: the task's own, or still to be found."""

    task: str
    condition: str
    seed: int
    instruction: str | None = None

    def key(self, policy: str) -> Key:
        return Key(policy, self.task, self.condition, self.seed)


def read_starts(path: Path) -> list[Start]:
    """A frozen list: JSON lines of task, condition, seed, instruction. Raises UserError."""
    try:
        starts = [Start(**json.loads(line)) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no list of task, condition, seed and instruction: {error}") from error
    if len({start[:3] for start in starts}) != len(starts):
        raise UserError(f"{path} lists an episode twice")
    return starts


class Outcome(NamedTuple):
    """How an episode went. frames: (h, w, 3) uint8, empty unless they were asked for."""

    success: bool
    steps: int
    instruction: str
    chunks: list[Chunk]
    frames: list[NDArray[np.uint8]]


class Harness(Protocol):
    """Where episodes are played, in one process."""

    def find_starts(self, task: str, condition: str, count: int, first: int, report: Callable[[Start], None]) -> None:
        """Reports `count` starts, from seed `first` on, that the task's expert solves where there is one."""

    def play(
        self, start: Start, runner: "Runner", noise_seed: int, rename_map: Mapping[str, str], *, film: bool
    ) -> Outcome:
        """One episode. Raises whatever goes wrong; nothing that goes wrong is a failure of the policy."""

    def close(self) -> None:
        """Lets go of environments and policies; the next episode opens them again."""
