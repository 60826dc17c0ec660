"""The policy's process and its client: right answers, isolated sessions, and it survives what clients do."""

import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ofp_lerobot.errors import UserError
from ofp_lerobot.evaluation.closed_loop.policies import PolicySpec
from ofp_lerobot.evaluation.closed_loop.workers import HarnessSpec, Player
from ofp_lerobot.inference.session import Runner
from robotwin_eval import serve as serve_module
from robotwin_eval.adapters.common import wire
from robotwin_eval.adapters.common.client import PolicyClient, PolicyError
from robotwin_eval.serve import PolicyServer, camera_names
from tests.processes import wait_until

from .conftest import CAMERAS, EXECUTED


def observation(seed=0, **changes):
    rng = np.random.default_rng(seed)
    names = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    images = {name: rng.integers(0, 256, (24, 32, 3), dtype=np.uint8) for name in names}
    state = rng.uniform(0, 1, 14).astype(np.float32)
    return {"images": images, "state": state, "instruction": "open the window", **changes}


def direct(runner, observations, seed=0):
    """The session core's answers to the same, without a wire."""
    session = runner.session(seed=seed)
    return [
        session.infer(
            {
                **dict(zip(CAMERAS, o["images"].values(), strict=True)),
                "observation.state": o["state"],
                "task": o["instruction"],
            }
        ).actions
        for o in observations
    ]


def serve(runner, port=0):
    server = PolicyServer(runner, "127.0.0.1", port, seed=0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def server(runner):
    server = serve(runner)
    yield server
    server.shutdown()
    server.server_close()


def connect(server, **changes):
    return PolicyClient(port=server.port, **{"reconnect_seconds": 60.0, **changes})


def test_answers_are_the_session_cores(server, runner):
    observations = [observation(i) for i in range(3)]
    with connect(server) as client:
        for o, expected in zip(observations, direct(runner, observations), strict=True):
            actions, chunk = client.plan(o)
            assert actions.shape == (EXECUTED, 14) and actions.dtype == np.float32
            np.testing.assert_array_equal(actions, expected)
            assert chunk["evaluations"] == 1 and chunk["latency_ms"] > 0
        assert client.policy["execution_horizon"] == EXECUTED


def test_two_clients_and_two_environments_do_not_mix(server, runner):
    first, second = [observation(i) for i in range(3)], [observation(10 + i) for i in range(3)]
    with connect(server) as a, connect(server) as b:
        interleaved = [(a.plan(x)[0], b.plan(y)[0]) for x, y in zip(first, second, strict=True)]
    np.testing.assert_array_equal([x for x, _ in interleaved], direct(runner, first))
    np.testing.assert_array_equal([y for _, y in interleaved], direct(runner, second))
    with connect(server) as client:
        together = [
            (client.plan(x, 0)[1]["jump"], client.plan(y, 1)[1]["jump"]) for x, y in zip(first, second, strict=True)
        ]
        assert together[0] == (None, None) and None not in together[1]
        client.reset([1])
        assert client.plan(first[0], 1)[1]["jump"] is None
        assert client.plan(first[0], 0)[1]["jump"] is not None
        client.reset()
        assert client.plan(first[0], 0)[1]["jump"] is None


def test_seeded_episodes_repeat(server):
    with connect(server) as client:
        answers = []
        for _ in range(2):
            client.reset([0], seed=5)
            answers.append([client.plan(observation(i))[0] for i in range(2)])
        np.testing.assert_array_equal(*answers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": np.full(14, np.nan, np.float32)}, "NaN"),
        ({"state": np.zeros(13, np.float32)}, "14"),
        ({"instruction": ""}, "instruction"),
        ({"images": {"cam_high": np.zeros((4, 4, 3), np.uint8)}}, "cam_left_wrist"),
    ],
)
def test_a_bad_observation_is_refused_and_the_session_goes_on(server, changes, message):
    with connect(server) as client:
        with pytest.raises(PolicyError, match=message):
            client.plan(observation(**changes))
        assert client.plan(observation())[0].shape == (EXECUTED, 14)


def raw(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def answer(connection):
    parts = b""
    while chunk := connection.recv(65536):
        parts += chunk
    return parts


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n" + b" " * 64,
        wire.MAGIC + b"\xff" * 12,  # announces 2^64 bytes
        wire.MAGIC + (200_000_000).to_bytes(4, "big") + bytes(8),
        wire.MAGIC + (2).to_bytes(4, "big") + bytes(8) + b"[]",
        wire.pack({"type": "connect", "protocol": 99, "session": "x"}),
        wire.pack({"type": "connect", "protocol": 1, "session": "x"})[:-4] + b"\xff\xff\xff\xff",
    ],
)
def test_garbage_ends_its_own_connection_only(server, data):
    with connect(server) as client, raw(server) as other:
        other.sendall(data)
        assert b'"type": "error"' in answer(other)
        assert client.plan(observation())[0].shape == (EXECUTED, 14)


def test_no_array_reaches_beyond_its_frame():
    frame = wire.pack({"type": "x"}, {"state": np.zeros(14, np.float32)})
    for old, new in (
        (b"[14]", b"[15]"),
        (b"[14]", b"[13]"),
        (b"float32", b"float64"),
        (b"[14]", b"[-4]"),
        (b"14", b"1e"),
    ):
        damaged = bytearray(frame.replace(old, new))
        damaged[4:8] = (len(damaged) - 16 - 14 * 4).to_bytes(4, "big")
        stream = iter(bytes(damaged))
        with pytest.raises(wire.WireError):
            wire.read(lambda n, stream=stream: bytes(next(stream) for _ in range(n)))
    with pytest.raises(wire.WireError, match="object|only"):
        wire.pack({}, {"x": np.array([{}])})


def test_a_client_killed_in_mid_episode_leaves_the_server_alive(server):
    code = (
        "import sys, time; sys.path.insert(0, 'robotwin_eval/adapters')\n"
        "from common.client import PolicyClient\n"
        f"client = PolicyClient(port={server.port}); client.reset(); print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait()
    process.stdout.close()
    with raw(server) as half:
        half.sendall(wire.MAGIC)  # and gone
    with connect(server) as client:
        assert client.plan(observation())[0].shape == (EXECUTED, 14)


def test_a_lost_connection_keeps_the_session(server, runner):
    observations = [observation(i) for i in range(3)]
    with connect(server) as client:
        answers = []
        for o in observations:
            answers.append(client.plan(o)[0])
            client._socket.shutdown(socket.SHUT_RDWR)
        assert client.reconnects >= 1
    np.testing.assert_array_equal(answers, direct(runner, observations))


def test_a_request_sent_twice_is_answered_once(server, runner):
    """The answer was lost on the way: asked again, the policy must not plan again."""
    observations = [observation(i) for i in range(2)]
    with connect(server) as client:
        receive, lost = client._receive, []

        def lose_one(length):
            if not lost:
                lost.append(receive(length))  # the answer is there, and is thrown away
                client._socket.close()
                raise ConnectionResetError
            return receive(length)

        client._receive = lose_one
        answers = [client.plan(o)[0] for o in observations]
    np.testing.assert_array_equal(answers, direct(runner, observations))


def test_another_connection_of_a_session_ends_the_older_one(server):
    hello = wire.pack({"type": "connect", "protocol": 1, "session": "x"})
    with raw(server) as older, raw(server) as newer:
        older.sendall(hello)
        assert b"connected" in older.recv(4096)
        newer.sendall(hello)
        assert b"connected" in newer.recv(4096)
        assert older.recv(4096) == b""
        newer.sendall(wire.pack({"type": "hello", "request": 1}))
        assert b"welcome" in newer.recv(65536)


def test_a_live_session_is_never_forgotten(server, runner, monkeypatch):
    observations = [observation(i) for i in range(2)]
    with connect(server) as client:
        answers = [client.plan(observations[0])[0]]
        monkeypatch.setattr(serve_module, "MAX_CLIENTS", 3)
        for _ in range(4):
            with connect(server):
                pass
            while server.connections > 1:
                time.sleep(0.01)
        client._socket.shutdown(socket.SHUT_RDWR)
        answers.append(client.plan(observations[1])[0])
    np.testing.assert_array_equal(answers, direct(runner, observations))
    assert len(server._clients) <= 3


def test_a_frame_has_one_deadline(server, monkeypatch):
    """A byte now and then does not keep a connection for ever; the time between two requests is nobody's business."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(serve_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with raw(server) as slow:
        slow.sendall(wire.pack({"type": "connect", "protocol": 1, "session": "x"}))
        assert b"connected" in slow.recv(4096)
        slow.sendall(wire.pack({"type": "hello", "request": 1}))
        assert b"welcome" in slow.recv(65536)
        wait_until(lambda: server._clients["x"].connection.gettimeout() is None)
        with pytest.raises(OSError):
            for byte in wire.pack({"type": "hello", "request": 2, "padding": 4000 * "x"})[:-1]:
                slow.sendall(bytes([byte]))
                clock.now += 10.0
                time.sleep(0.01)


def test_a_request_without_a_number_is_answered(server):
    frame = wire.pack({"type": "hello", "request": 12345})
    with raw(server) as connection:
        connection.sendall(wire.pack({"type": "connect", "protocol": 1, "session": "x"}))
        assert b"connected" in connection.recv(4096)
        connection.sendall(frame.replace(b"12345", b"  NaN"))
        assert b"welcome" in connection.recv(65536)


def test_the_client_waits_for_a_restart(runner):
    server = serve(runner)
    port = server.port
    client = connect(server)
    client.plan(observation())
    server.shutdown()
    server.server_close()
    client._socket.shutdown(socket.SHUT_RDWR)
    restarted = []
    later = threading.Timer(0.5, lambda: restarted.append(serve(runner, port)))
    later.start()
    assert client.plan(observation())[0].shape == (EXECUTED, 14)
    later.join()
    client.close()
    restarted[0].shutdown()
    restarted[0].server_close()


def test_nobody_there_is_said_in_time():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="ofp-policy-server"):
        PolicyClient(port=port, reconnect_seconds=0.3)


def test_a_slow_model_is_waited_for_up_to_the_limit(server, runner, monkeypatch):
    predict = runner.served.policy.predict_action_chunk

    begun, given_up, shapes = threading.Semaphore(0), threading.Event(), []

    def slow(*args, **kwargs):
        begun.release()
        assert given_up.wait(60)
        return predict(*args, **kwargs)

    monkeypatch.setattr(runner.served.policy, "predict_action_chunk", slow)
    with connect(server, answer_seconds=300) as patient, connect(server) as hasty:
        assert (patient._socket.gettimeout(), hasty._socket.gettimeout()) == (300, 600)
        asks = threading.Thread(target=lambda: shapes.append(patient.plan(observation())[0].shape))
        try:
            asks.start()
            assert begun.acquire(timeout=60)
            hasty._socket.settimeout(0.1)
            with pytest.raises(PolicyError, match="did not answer"):
                hasty.plan(observation())
        finally:
            given_up.set()
        asks.join(60)
    assert shapes == [(EXECUTED, 14)]


def test_camera_names():
    assert camera_names(CAMERAS) == {name.rpartition(".")[2]: name for name in CAMERAS}
    lerobots = tuple(f"observation.images.{side}_camera" for side in ("right", "head", "left"))
    assert camera_names(lerobots)["cam_left_wrist"] == "observation.images.left_camera"
    with pytest.raises(UserError, match="--rename_map"):
        camera_names(("observation.images.a", "observation.images.b", "observation.images.c"))
    renamed = {
        f"observation.images.{n}": f"observation.images.{m}"
        for n, m in zip(("cam_high", "cam_left_wrist", "cam_right_wrist"), "bca", strict=True)
    }
    named = camera_names(("observation.images.a", "observation.images.b", "observation.images.c"), renamed)
    assert named == {
        "cam_high": "observation.images.b",
        "cam_left_wrist": "observation.images.c",
        "cam_right_wrist": "observation.images.a",
    }


def test_a_policy_of_another_robot_is_refused(runner, monkeypatch):
    monkeypatch.setattr(type(runner), "state_size", 7)
    with pytest.raises(UserError, match="14"):
        PolicyServer(runner, "127.0.0.1", 0)


def test_options_and_specs_become_the_policys_settings(monkeypatch, capsys):
    seen = []

    def load(path, **settings):
        seen.append({"path": path, **settings})
        raise UserError("enough")

    monkeypatch.setattr(Runner, "load", load)
    flags = ["--num-inference-steps=2", "--warm-start=0.15", "--test-time-samples=8", "--noise-temperature=0.5"]
    assert serve_module.main(["somewhere", *flags]) == 2
    player = Player(HarnessSpec("none", {}), "cpu")
    player._harness = SimpleNamespace(close=lambda: None)
    with pytest.raises(UserError, match="enough"):
        player._runner(PolicySpec("one", "somewhere", steps=2, warm_start=0.15, samples=8, temperature=0.5))
    for settings in seen:
        known = {"path": "somewhere", "num_inference_steps": 2, "warm_start": 0.15, "test_time_samples": 8}
        assert known.items() <= settings.items() and settings["noise_temperature"] == 0.5
    assert len(seen) == 2
