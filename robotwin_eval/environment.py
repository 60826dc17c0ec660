"""Episodes on a RoboTwin checkout: its simulator in its own Python, the policy here."""

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ofp_lerobot.errors import UserError
from ofp_lerobot.evaluation.closed_loop.jobs import Outcome, Start
from ofp_lerobot.evaluation.closed_loop.results import Chunk
from ofp_lerobot.inference.session import Runner

from .adapters.install import layout_of
from .serve import PolicyServer

DRIVER = Path(__file__).parent / "adapters" / "driver.py"
CONDITIONS = ("demo_clean", "demo_randomized")
MAX_TRIES = 20  # seeds per episode wanted, before the expert is taken to be broken


class RoboTwinHarness:
    """One driver process (`adapters/driver.py`), started anew after an error."""

    def __init__(self, root: Path, python: str, *, instruction_type: str = "unseen", device: str | None = None) -> None:
        """python: RoboTwin's. device: of the policy; the simulator renders on the same GPU. Raises UserError."""
        try:
            layout_of(root)
        except ValueError as error:
            raise UserError(error) from error
        self._root, self._python, self._instruction_type = root, python, instruction_type
        self._environment = dict(os.environ)
        if device is not None and device.startswith("cuda:"):
            self._environment["CUDA_VISIBLE_DEVICES"] = _physical(device, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._process: subprocess.Popen[str] | None = None
        self._server: PolicyServer | None = None

    def find_starts(self, task: str, condition: str, count: int, first: int, report: Callable[[Start], None]) -> None:
        """Seeds that the scripted expert solves, as RoboTwin's own evaluation takes them, with an instruction each."""
        found, reason = 0, ""
        for seed in range(first, first + MAX_TRIES * count):
            request = {"task": task, "condition": condition, "seed": seed, "instruction_type": self._instruction_type}
            answer = self._ask("check", **request)
            if answer["solved"]:
                report(Start(task, condition, seed, answer["instruction"]))
                found += 1
                if found == count:
                    return
            else:
                reason = f" (the last: {answer['reason']})"
        raise UserError(
            f"{task}: the expert solved {found} of {MAX_TRIES * count} seeds from {first} on, not {count}{reason}"
        )

    def play(
        self, start: Start, runner: Runner, noise_seed: int, rename_map: Mapping[str, str], *, film: bool
    ) -> Outcome:
        if self._server is None or self._server.runner is not runner:
            self._stop_server()
            self._server = PolicyServer(runner, "127.0.0.1", 0, dict(rename_map))
            threading.Thread(target=self._server.serve_forever, daemon=True).start()
        assert start.instruction is not None
        with tempfile.TemporaryDirectory() as scratch:
            frames = str(Path(scratch) / "frames.npy") if film else None
            answer = self._ask(
                "play",
                **start._asdict(),
                noise_seed=noise_seed,
                host="127.0.0.1",
                port=self._server.port,
                film=frames,
            )
            pictures = list(np.load(frames)) if frames else []
        chunks = [Chunk(**chunk) for chunk in answer["chunks"]]
        return Outcome(answer["success"], answer["steps"], start.instruction, chunks, pictures)

    def close(self) -> None:
        self._stop_server()
        self._stop_driver()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError with the end of the driver's output where it fails; the next call starts a new one."""
        if self._process is None:
            self._start_driver()
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "RoboTwin's process has ended"}
        if "error" in answer:
            self._stop_driver()
            tail = "".join(self._log).strip()
            raise RuntimeError(f"{answer['error']}; the end of RoboTwin's output:\n{tail[-2000:]}")
        return answer

    def _start_driver(self) -> None:
        command = [self._python, str(DRIVER), "--root", str(self._root)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=self._environment,
            )
        except OSError as error:
            raise UserError(
                f"RoboTwin's Python {self._python!r} does not start: {error}; set --robotwin-python"
            ) from error
        self._log: deque[str] = deque(maxlen=40)
        self._reader = threading.Thread(target=self._read_log, args=(self._process.stderr, self._log), daemon=True)
        self._reader.start()

    @staticmethod
    def _read_log(stream: Any, log: deque[str]) -> None:
        for line in stream:
            log.append(line)

    def _stop_driver(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # closing flushes what a process that is gone did not read
                    stream.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join(timeout=5)

    def _stop_server(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def _physical(device: str, visible: str | None) -> str:
    """What this process calls cuda:<n>, as CUDA_VISIBLE_DEVICES names it. Raises UserError where there is none."""
    number = device.partition(":")[2]
    if visible is None:
        return number
    listed = [each.strip() for each in visible.split(",") if each.strip()]
    if not number.isdigit() or int(number) >= len(listed):
        raise UserError(f"--devices {device}: CUDA_VISIBLE_DEVICES={visible} has {len(listed)} devices")
    return listed[int(number)]
