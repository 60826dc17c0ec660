"""openpi's own client, run from its own environment, and a server of ours in this process."""

import asyncio
import json
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from ofp_lerobot.inference.session import Answer
from ofp_lerobot.serving.openpi_server import OpenPIServer, Settings

PYTHON = Path(__file__).parents[2] / ".venv" / "openpi-client" / "bin" / "python"
needs_client = pytest.mark.skipif(
    not PYTHON.exists(), reason="openpi-client has no environment: make .venv/openpi-client/.ready"
)

_PRELUDE = """
import json, sys, threading, time
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
port, argument = int(sys.argv[1]), json.loads(sys.argv[2])
def client(**kwargs):
    return WebsocketClientPolicy("127.0.0.1", port, **kwargs)
def error_of(act):
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
"""


def openpi_client(port, code, argument=None, timeout=120):
    """Runs `code` with openpi-client 0.1.2 and returns what it prints as JSON in its last line."""
    command = [PYTHON, "-c", _PRELUDE + code, str(port), json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


class Echo:
    """Robots that answer with the request's own number, once `gate` is open."""

    def __init__(self, gate=None):
        self.gate = gate
        self.started = threading.Semaphore(0)
        self.running = self.most = 0
        self.robots = []

    def warm_up(self):
        self.warm = True

    def describe(self):
        return {"served": "echo"}

    def robot(self, number):
        self.robots.append(_EchoRobot(self, number))
        return self.robots[-1]


class _EchoRobot:
    def __init__(self, echo, number):
        self.echo, self.number, self.resets, self.seen = echo, number, 0, []

    def reset(self):
        self.resets += 1

    def infer(self, request):
        echo = self.echo
        echo.running += 1
        echo.most = max(echo.most, echo.running)
        echo.started.release()
        if echo.gate is not None:
            assert echo.gate.wait(60)
        echo.running -= 1
        self.seen.append(request["n"])
        actions = np.full((5, 2), [request["n"], self.number], np.float32)
        return Answer(actions, plan=actions, evaluations=1, latency_ms=2.0, network_ms=1.0)


@contextmanager
def serving(robots, **settings):
    """An OpenPIServer in a thread. Gives (port, server); stops it cleanly at the end."""
    server = OpenPIServer(robots, Settings(**{"port": 0, **settings}))
    ready, ports, stop, errors = threading.Event(), [], [], []

    async def run():
        stop.append((asyncio.get_running_loop(), asyncio.Event()))
        await server.run(stop[0][1], lambda port: (ports.append(port), ready.set()))

    def work():
        try:
            asyncio.run(run())
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(60)
    if errors:
        raise errors[0]
    server.stop = lambda: stop[0][0].call_soon_threadsafe(stop[0][1].set)
    server.thread = thread
    try:
        yield ports[0], server
    finally:
        if thread.is_alive():
            server.stop()
        thread.join(30)
        assert not thread.is_alive() and not errors, errors
