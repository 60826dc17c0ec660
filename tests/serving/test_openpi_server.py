"""The server, talked to by openpi's own client and by raw sockets."""

import gc
import inspect
import json
import logging
import os
import signal
import socket
import threading
import tracemalloc
import urllib.error
import urllib.request
from importlib.metadata import entry_points

import msgpack
import numpy as np
import pytest
import websockets.sync.client
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from ofp_lerobot.errors import UserError
from ofp_lerobot.inference.session import Runner
from ofp_lerobot.serving.command import main, parse_arguments
from ofp_lerobot.serving.layouts import Translator, load_layout
from ofp_lerobot.serving.openpi_server import PolicyRobots
from ofp_lerobot.serving.wire import pack, unpack
from tests import small
from tests.processes import wait_until
from tests.serving.clients import Echo, needs_client, openpi_client, serving

LAYOUT = """
images: {images/top: observation.images.top, wrist: observation.images.wrist}
state: {state/arm: 4, state/gripper: 1}
"""


def observation(seed, size=32):
    """As a client sends it; its process gets this function as source."""
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(2)]
    state = rng.normal(size=5)
    return {
        "images": {"top": images[0].transpose(2, 0, 1)},
        "wrist": images[1],
        "state": {"arm": state[:4], "gripper": state[4]},
        "prompt": "open the window",
    }


OBSERVATION = inspect.getsource(observation)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    path = tmp_path_factory.mktemp("layout") / "tiny.yaml"
    path.write_text(LAYOUT)
    return path


@pytest.fixture(scope="module")
def runner(ofp):
    return Runner.load(str(ofp), device="cpu")


@pytest.fixture(scope="module")
def robots(runner, layout):
    translator = Translator(
        load_layout(str(layout)), cameras=small.CAMERAS, state_size=small.STATES, action_size=small.ACTIONS
    )
    return PolicyRobots(runner, translator, seed=11)


def direct(runner, number, seeds):
    """What session `number` must have answered, in LeRobot's names and without the server."""
    session, answers = runner.session(11, number), []
    for seed in seeds:
        o = observation(seed)
        raw = {
            "observation.images.top": o["images"]["top"],
            "observation.images.wrist": o["wrist"],
            "observation.state": np.append(o["state"]["arm"], o["state"]["gripper"]),
            "task": o["prompt"],
        }
        answers.append(session.infer(raw).actions)
    return answers


def connect(port, **kwargs):
    """A connection of any WebSocket client, past the metadata."""
    connection = websockets.sync.client.connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None, **kwargs)
    assert unpack(connection.recv())["session"] >= 0
    return connection


def ask(connection, n):
    connection.send(pack({"n": n}))
    return unpack(connection.recv())["actions"][0].tolist()


def get(port, path, **headers):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.status, response.headers["Content-Type"], response.read().decode()


# With openpi-client


@needs_client
def test_infer_and_a_whole_chunk_through_the_broker(robots, runner):
    code = (
        OBSERVATION
        + """
policy = client()
metadata = policy.get_server_metadata()
replies = [policy.infer(observation(0)), policy.infer(observation(1))]
policy = client()
broker = ActionChunkBroker(policy, action_horizon=4)
steps = [broker.infer(observation(2 if i < 4 else 3)) for i in range(8)]
print(json.dumps({
    "metadata": metadata,
    "actions": [reply["actions"].tolist() for reply in replies],
    "kind": str(replies[0]["actions"].dtype),
    "timings": [[reply["policy_timing"], reply["server_timing"]] for reply in replies],
    "steps": [step["actions"].tolist() for step in steps],
}))
"""
    )
    with serving(robots) as (port, _):
        found = openpi_client(port, code)
    expected = direct(runner, 0, [0, 1])
    assert np.array_equal(np.array(found["actions"], np.float32), np.stack(expected)) and found["kind"] == "float32"
    assert np.array_equal(np.array(found["steps"], np.float32), np.concatenate(direct(runner, 1, [2, 3])))
    assert found["metadata"]["policy"] == "ofp" and found["metadata"]["execution_horizon"] == 4
    assert found["metadata"]["layout"]["images"] == {
        "images/top": "observation.images.top",
        "wrist": "observation.images.wrist",
    }
    (first_policy, first), (_, second) = found["timings"]
    assert first_policy["evaluations"] == 1 and 0 < first_policy["infer_ms"] <= first["infer_ms"]
    assert "prev_total_ms" not in first and second["prev_total_ms"] >= first["infer_ms"]


@needs_client
def test_two_clients_at_once_are_two_sessions(robots, runner):
    """Each its own observations, noise and warm start, whatever the order in which the server takes them."""
    code = (
        OBSERVATION
        + """
found = {}
def act(base):
    policy = client()
    number = policy.get_server_metadata()["session"]
    found[base] = [number, [policy.infer(observation(base + i))["actions"].tolist() for i in range(5)]]
threads = [threading.Thread(target=act, args=(base,)) for base in (100, 200)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(found))
"""
    )
    with serving(robots) as (port, _):
        found = openpi_client(port, code)
    assert sorted(number for number, _ in found.values()) == [0, 1]
    for base, (number, actions) in found.items():
        expected = direct(runner, number, range(int(base), int(base) + 5))
        assert np.array_equal(np.array(actions, np.float32), np.stack(expected))


@needs_client
def test_a_reset_by_request_forgets_the_plan(robots, runner):
    code = (
        OBSERVATION
        + """
policy = client()
replies = [policy.infer(observation(0)), policy.infer({"reset": True})]
replies += [policy.infer(observation(1)), policy.infer({**observation(1), "reset": True})]
print(json.dumps([reply["actions"].tolist() if "actions" in reply else reply for reply in replies]))
"""
    )
    with serving(robots) as (port, _):
        found = openpi_client(port, code)
    session = runner.session(11, 0)
    expected = []
    translator = robots._translator
    for seed in (0, 1, 1):
        session.reset()
        expected.append(session.infer(translator.observation(observation(seed))).actions)
    assert found.pop(1) == {"reset": True}
    assert np.array_equal(np.array(found, np.float32), np.stack(expected))


@needs_client
def test_bad_requests_end_their_connection_only(robots):
    code = (
        OBSERVATION
        + """
def bad(**changes):
    return {**observation(0), **changes}
state = {"arm": np.zeros(4), "gripper": np.float64("nan")}
cases = {
    "camera": {k: v for k, v in observation(0).items() if k != "wrist"},
    "prompt": {k: v for k, v in observation(0).items() if k != "prompt"},
    "size": bad(state={"arm": np.zeros(3), "gripper": 0.0}),
    "nan": bad(state=state),
    "image": bad(wrist=np.zeros((32, 32), np.uint8)),
}
other = client()
errors = {}
for name, request in cases.items():
    policy = client()
    errors[name] = error_of(lambda: policy.infer(request))
    errors[name + " again"] = error_of(lambda: policy.infer(observation(0)))
errors["refused"] = error_of(lambda: client().infer({"x": np.array([1j])}))
print(json.dumps([errors, other.infer(observation(0))["actions"].shape]))
"""
    )
    with serving(robots) as (port, server):
        errors, shape = openpi_client(port, code)
        wait_until(lambda: server._connections == 0)
        assert server.statistics.summary()["errors"] == {"ObservationError": 5}
    for name, message in {
        "camera": "the request has no wrist; it has images/top, prompt, state/arm, state/gripper",
        "prompt": "the request has no prompt",
        "size": "state/arm must have 4 floats, got shape (3,)",
        "nan": "observation.state has NaN or infinite values at [4]",
        "image": "observation.images.wrist must be an RGB image",
    }.items():
        assert errors[name].startswith("RuntimeError: Error in inference server:\n") and message in errors[name]
        assert "1011" in errors[f"{name} again"]
    assert "Unsupported dtype" in errors["refused"]  # by the client itself
    assert shape == [4, small.ACTIONS]


@needs_client
def test_five_hundred_requests_of_eight_clients(caplog):
    """None is lost or crossed, one works at a time, and memory does not grow."""
    for logger in (None, "websockets", "websockets.server"):
        caplog.set_level(logging.WARNING, logger=logger)  # pytest keeps every record, at DEBUG with the frame in it
    code = """
found = {}
def act(k):
    policy = client()
    number = policy.get_server_metadata()["session"]
    blob = np.zeros(20_000, np.uint8)
    rows = [policy.infer({"n": 1000 * k + i, "blob": blob})["actions"][0].tolist() for i in range(argument)]
    found[k] = all(row == [1000 * k + i, number] for i, row in enumerate(rows))
threads = [threading.Thread(target=act, args=(k,)) for k in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(found))
"""
    echo = Echo()
    with serving(echo) as (port, server):
        openpi_client(port, code, 13)
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.take_snapshot()
        assert openpi_client(port, code, 63) == {str(k): True for k in range(8)}
        wait_until(lambda: server._connections == 0)
        gc.collect()  # in a big process the collector comes by rarely
        grown = sum(s.size_diff for s in tracemalloc.take_snapshot().compare_to(before, "filename"))
        tracemalloc.stop()
        assert server.statistics.requests == 8 * (13 + 63) and not server.statistics.errors
    assert echo.most == 1
    assert grown < 1_000_000  # the requests were 10 MB


@needs_client
def test_api_key():
    code = """
found = [error_of(client), error_of(lambda: client(api_key="wrong"))]
print(json.dumps([*found, client(api_key="secret").infer({"n": 3})["actions"][0, 0].item()]))
"""
    with serving(Echo(), api_key="secret") as (port, _):
        without, wrong, answer = openpi_client(port, code)
        assert get(port, "/healthz")[0] == 200
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(port, "/stats")
        assert get(port, "/stats", Authorization="Api-Key secret")[0] == 200
    assert "401" in without and "401" in wrong and answer == 3.0


# With any client


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1 garbage",
        os.urandom(1000),
        msgpack.packb([1, 2]),
        b"\x81" * 5000,
        "text",
        msgpack.packb({"n": {b"__ndarray__": True, b"data": b"12", b"dtype": "|O", b"shape": [1]}}),
        msgpack.packb({"n": {b"__ndarray__": True, b"data": b"12", b"dtype": "<f8", b"shape": [10**12]}}),
        msgpack.packb({"n": {b"__ndarray__": True}}),
        msgpack.packb({"n": {b"__npgeneric__": True, b"data": 1, b"dtype": "V8"}}),
        pack({"reset": np.zeros(2)}),
    ],
)
def test_garbage_is_told_and_the_server_lives(frame):
    with serving(Echo()) as (port, _), connect(port) as other:
        with connect(port) as connection:
            connection.send(frame)
            assert connection.recv().startswith("ofp_lerobot.serving.wire.WireError: ")
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
            assert closed.value.rcvd.code == 1011
        assert ask(other, 5) == [5.0, 0.0]


def test_an_error_of_the_policy_sends_its_traceback():
    with serving(Echo()) as (port, server), connect(port) as connection:
        connection.send(pack({"no number": 1}))
        text = connection.recv()
        assert text.startswith("Traceback (most recent call last):") and "KeyError: 'n'" in text
        wait_until(lambda: server.statistics.errors == {"KeyError": 1})


def test_frames_over_the_limit():
    """200 MB against 1 MB: refused at the frame's header, before its content is taken in."""
    with serving(Echo(), max_frame_bytes=2**20) as (port, server), connect(port) as other:
        connection = connect(port)
        with pytest.raises(ConnectionClosed):  # with 1009, if the client still reads while it sends
            connection.send(bytes(200 * 2**20))
            connection.recv()
        wait_until(lambda: server.statistics.errors == {"frame too large": 1})
        assert ask(other, 5) == [5.0, 0.0]


def test_bytes_that_are_no_http():
    with serving(Echo()) as (port, _):
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(os.urandom(4096))
        with connect(port) as connection:
            assert ask(connection, 1)[0] == 1.0


def test_a_ping_is_answered_while_the_model_works():
    """A model on the event loop would leave a client's unanswered, which then gives up."""
    gate = threading.Event()
    echo = Echo(gate=gate)
    with serving(echo) as (port, _), connect(port) as connection:
        connection.send(pack({"n": 1}))
        assert echo.started.acquire(timeout=60)
        assert connection.ping().wait(30)
        gate.set()
        assert unpack(connection.recv())["actions"][0, 0] == 1.0


def test_a_client_that_answers_no_ping_is_let_go():
    with (
        serving(Echo(), ping_interval=0.1, ping_timeout=0.1) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=15) as mute,  # sooner than by the default settings
    ):
        client, seen = ClientProtocol(parse_uri(f"ws://127.0.0.1:{port}")), []
        client.send_request(client.connect())
        mute.sendall(b"".join(client.data_to_send()))
        while Opcode.CLOSE not in seen:
            client.receive_data(mute.recv(4096))
            seen += [event.opcode for event in client.events_received() if isinstance(event, Frame)]
        assert Opcode.PING in seen[:-1]


def test_a_client_that_leaves_in_mid_request():
    """The running request ends, the one that waits is dropped, later clients are answered."""
    gate = threading.Event()
    echo = Echo(gate=gate)
    with serving(echo) as (port, server):
        running, waiting = connect(port), connect(port)
        running.send(pack({"n": 1}))
        assert echo.started.acquire(timeout=60)
        waiting.send(pack({"n": 2}))
        wait_until(lambda: server._pending == 2)
        for connection in (running, waiting):
            connection.socket.shutdown(socket.SHUT_RDWR)
        wait_until(lambda: server._pending == 1)
        gate.set()
        wait_until(lambda: server._connections == 0 and server._pending == 0)
        with connect(port) as connection:
            assert ask(connection, 3) == [3.0, 2.0]
        assert server.statistics.errors == {"client left": 2}
    assert [robot.seen for robot in echo.robots] == [[1], [], [3]]


def test_a_full_queue_refuses_and_recovers():
    gate = threading.Event()
    echo = Echo(gate=gate)
    with serving(echo, max_queue=1) as (port, server):
        connections = [connect(port) for _ in range(3)]
        for n, connection in enumerate(connections[:2]):
            connection.send(pack({"n": n}))
            wait_until(lambda n=n: server._pending == n + 1)
        connections[2].send(pack({"n": 2}))
        assert "BusyError: 1 requests are waiting" in connections[2].recv()
        with pytest.raises(ConnectionClosed) as closed:
            connections[2].recv()
        assert closed.value.rcvd.code == 1013
        gate.set()
        assert [unpack(c.recv())["actions"][0, 0] for c in connections[:2]] == [0.0, 1.0]
        with connect(port) as again:
            assert ask(again, 4)[0] == 4.0
        for connection in connections[:2]:
            connection.close()


def test_too_many_connections():
    with serving(Echo(), max_connections=1) as (port, server):
        with connect(port), pytest.raises(InvalidStatus, match="503"):
            connect(port)
        wait_until(lambda: server._connections == 0)
        connect(port).close()


def test_healthz_and_stats():
    echo = Echo()
    with serving(echo) as (port, server), connect(port) as connection:
        assert echo.warm  # before it listened
        assert get(port, "/healthz") == (200, "text/plain; charset=utf-8", "OK\n")
        for n in range(3):
            ask(connection, n)
        connect(port).send("text")
        wait_until(lambda: server.statistics.errors.total() == 1)
        status, kind, body = get(port, "/stats")
        stats = json.loads(body)
        assert (status, kind) == (200, "application/json")
        assert stats["requests"] == 3 and stats["errors"] == {"WireError": 1} and stats["pending"] == 0
        assert stats["serving"]["served"] == "echo" and stats["latest"] == 3
        total, policy = stats["total_ms"], stats["policy_ms"]
        assert 0 < policy["p50"] <= total["p50"] <= total["p95"] <= total["p99"] <= total["max"]


def test_shutdown_answers_what_runs():
    """Running and waiting requests are answered, idle connections are closed with 1001, new ones are refused."""
    gate = threading.Event()
    echo = Echo(gate=gate)
    with serving(echo) as (port, server):
        running, waiting, idle = (connect(port) for _ in range(3))
        running.send(pack({"n": 1}))
        assert echo.started.acquire(timeout=60)
        waiting.send(pack({"n": 2}))
        wait_until(lambda: server._pending == 2)
        server.stop()
        with pytest.raises(ConnectionClosed) as closed:
            idle.recv(timeout=60)
        assert closed.value.rcvd.code == 1001
        with pytest.raises(OSError):
            connect(port)
        gate.set()
        for connection, n in ((running, 1.0), (waiting, 2.0)):
            assert unpack(connection.recv())["actions"][0, 0] == n
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv()
            assert closed.value.rcvd.code == 1001
        server.thread.join(60)
        assert not server.thread.is_alive()


def test_a_port_that_is_taken():
    with (
        serving(Echo()) as (port, _),
        pytest.raises(UserError, match=f"cannot listen on --host 127.0.0.1 --port {port}"),
        serving(Echo(), port=port),
    ):
        pass


# The command


def test_the_command_serves_and_stops_on_a_signal(ofp, layout, capsys):
    """A real SIGTERM, while or after a request runs: the command returns in good order."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []

    def act():
        wait_until(lambda: listens(port))
        with connect(port) as connection:
            connection.send(pack(observation(0)))
            found.append(unpack(connection.recv())["policy_timing"]["evaluations"])
            connection.send(pack(observation(1)))
            os.kill(os.getpid(), signal.SIGTERM)
            try:
                while True:
                    found.append(unpack(connection.recv())["actions"].shape)
            except ConnectionClosed as closed:
                found.append(closed.rcvd.code)

    (entry,) = entry_points(group="console_scripts", name="ofp-serve")
    client = threading.Thread(target=act)
    client.start()
    flags = ["--layout", str(layout), "--port", str(port), "--device", "cpu", "--num-inference-steps", "2"]
    assert entry.load()([str(ofp), *flags]) == 0
    client.join(60)
    assert found[0] == 2 and found[-1] == 1001
    assert "warm_start=0.15: robots must execute all 4 actions" in capsys.readouterr().err


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.parametrize(
    "flag",
    [
        "--port=-1",
        "--port=65536",
        "--noise-temperature=2",
        "--noise-temperature=-1",
        f"--seed={2**63}",
        f"--seed={-(2**63) - 1}",
    ],
)
def test_numbers_that_cannot_be_are_refused_when_parsing(capsys, flag):
    with pytest.raises(SystemExit):
        parse_arguments(["checkpoint", "--layout=libero", flag])
    assert f"argument {flag.split('=')[0]}: must be at " in capsys.readouterr().err
    args = parse_arguments(["checkpoint", "--layout=libero", "--port=65535", f"--seed={2**63 - 1}"])
    assert (args.port, args.seed) == (65535, 2**63 - 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layout", "spot"], "--layout spot is neither a file nor one of aloha, aloha_pi, robotwin, droid, libero"),
        (["--layout", "libero"], "the layout has nothing for the policy's observation.images.top"),
        (["--warm-start", "2"], "warm_start must be in [0, 0.99]"),
        (["--execution-horizon", "9"], "the execution horizon must be 1 to chunk_size (8), got 9"),
        (["--device", "cuda:9"], "--device cuda:9 is not available"),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(ofp, layout, capsys, flags, message):
    flags = [*([] if "--layout" in flags else ["--layout", str(layout)]), "--device", "cpu", *flags]
    assert main([str(ofp), *flags]) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("ofp-serve: ") and message in last_line
