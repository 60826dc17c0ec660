"""LeRobot's async inference with our policy: its own server behind our launcher, its own client, real gRPC."""

import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.policies.factory import make_pre_post_processors

from ofp_lerobot.serving import lerobot_async
from ofp_lerobot.serving.lerobot_async import allow_plugin
from tests import small
from tests.kinds import POLICIES
from tests.serving.tinyrobot import JOINTS, TinyRobotConfig

pytest.importorskip("grpc")

SEED, EXECUTED = 5, 4
LAUNCH = f"""
import sys, torch
from importlib.metadata import entry_points
torch.manual_seed({SEED})
(entry,) = entry_points(group="console_scripts", name="ofp-async-server")
sys.exit(entry.load()())
"""


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """LeRobot's modules make a folder for logs where they are imported."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(somewhere):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(somewhere / "server.log", "w")  # noqa: SIM115
    command = [sys.executable, "-c", LAUNCH, "--host=127.0.0.1", f"--port={port}", "--inference_latency=0"]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None and time.monotonic() < end, (somewhere / "server.log").read_text()
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        log.close()


def test_help_without_grpc(somewhere, monkeypatch, capsys):
    """It names LeRobot's options; without --help there is only the extra to name."""
    from lerobot.async_inference.configs import PolicyServerConfig

    monkeypatch.setattr(lerobot_async, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["ofp-async-server", "--help"])
    assert lerobot_async.main() == 0
    printed = capsys.readouterr().out
    assert set(re.findall(r"--(\w+)", printed)) == {field.name for field in fields(PolicyServerConfig)}
    assert "lerobot_policy_ofp[async]" in printed
    monkeypatch.setattr(sys, "argv", ["ofp-async-server"])
    assert lerobot_async.main() == 2
    assert "lerobot_policy_ofp[async]" in capsys.readouterr().err


def test_lerobots_server_refuses_the_type_until_it_is_allowed(somewhere):
    """The day the first half fails, LeRobot's own server may do and the launcher can go."""
    from lerobot.async_inference import constants, policy_server
    from lerobot.async_inference.configs import PolicyServerConfig
    from lerobot.async_inference.helpers import RemotePolicyConfig

    kept = list(constants.SUPPORTED_POLICIES)
    server = policy_server.PolicyServer(PolicyServerConfig())
    instructions = RemotePolicyConfig("ofp", str(somewhere / "nothing"), {}, EXECUTED)
    request = SimpleNamespace(data=pickle.dumps(instructions))
    context = SimpleNamespace(peer=lambda: "robot")
    with pytest.raises(ValueError, match="Policy type ofp not supported"):
        server.SendPolicyInstructions(request, context)
    try:
        allow_plugin()
        allow_plugin()
        assert [*kept, "ofp", "ofp_pi0", "ofp_smolvla", "ofp_unet"] == constants.SUPPORTED_POLICIES
        with pytest.raises(FileNotFoundError, match="nothing is not a directory on this machine"):
            server.SendPolicyInstructions(request, context)
    finally:
        constants.SUPPORTED_POLICIES[:] = kept


def test_pictures_reach_the_policy_as_the_camera_gives_them(somewhere):
    """LeRobot's server would stretch them to the size of the policy's feature; the policy pads."""
    from lerobot.async_inference.helpers import raw_observation_to_observation
    from lerobot.async_inference.policy_server import PolicyServer

    camera, size = "observation.images.top", (60, 80, 3)
    policy = small.ofp_policy()
    assert policy.config.image_features[camera].shape[1:] != size[:2]
    features = {
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["a", "b"]},
        camera: {"dtype": "image", "shape": size, "names": ["height", "width", "channels"]},
    }
    picture = np.random.default_rng(0).integers(256, size=size, dtype=np.uint8)
    allow_plugin()
    server = SimpleNamespace(policy=policy, lerobot_features=features)
    shapes = PolicyServer.policy_image_features.fget(server)
    seen = raw_observation_to_observation({"a": 0.0, "b": 1.0, "top": picture}, features, shapes)
    assert np.array_equal(seen[camera][0].permute(1, 2, 0) * 255, picture)
    server.policy = SimpleNamespace(config=policy.config)  # of another kind, which LeRobot resizes for
    assert PolicyServer.policy_image_features.fget(server) == policy.config.image_features


@pytest.mark.parametrize("kind", ["ofp", "ofp_smolvla"])  # ofp_pi0 has the class of ofp
def test_lerobots_client_drives_the_policy(server, kind, request, somewhere):
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    checkpoint = request.getfixturevalue(kind)
    client = RobotClient(
        RobotClientConfig(
            policy_type=kind,
            pretrained_name_or_path=str(checkpoint),
            robot=TinyRobotConfig(id="tiny", calibration_dir=somewhere),
            actions_per_chunk=EXECUTED,
            task="open the window",
            server_address=server,
        )
    )
    assert client.start()
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    client.start_barrier.wait(60)
    try:
        for _ in range(2):
            client.control_loop_observation("open the window")
            end = time.monotonic() + 60
            while not client.actions_available():
                assert time.monotonic() < end, (somewhere / "server.log").read_text()
                time.sleep(0.01)
            while client.actions_available():
                client.control_loop_action()
    finally:
        client.stop()
        receiver.join(60)
    # The second chunk starts at the last executed step, whose action the client drops.
    expected = first_chunks(kind, checkpoint, client.robot.get_observation())
    sent = np.array(client.robot.sent, np.float32)
    assert np.array_equal(sent, np.concatenate([expected[0], expected[1][1:]]))


def test_the_server_looks_at_the_first_state(server, ofp, somewhere):
    """In degrees, say; LeRobot's client reads no answer to that, so it is in the server's log.

    The checkpoint was trained on a GPU, which this server has not.
    """
    from lerobot.async_inference.configs import RobotClientConfig
    from lerobot.async_inference.robot_client import RobotClient

    checkpoint = shutil.copytree(ofp, somewhere / "checkpoint")
    saved = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**saved, "device": "cuda"}))
    config = {"policy_type": "ofp", "pretrained_name_or_path": str(checkpoint), "actions_per_chunk": EXECUTED}
    robot = TinyRobotConfig(id="tiny", calibration_dir=somewhere)
    client = RobotClient(RobotClientConfig(**config, robot=robot, task="open the window", server_address=server))
    seen = client.robot.get_observation()
    client.robot.get_observation = lambda: {**seen, JOINTS[1]: 90.0}
    assert client.start()
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    client.start_barrier.wait(60)
    try:
        client.control_loop_observation("open the window")
        end = time.monotonic() + 60
        while not client.actions_available():
            assert time.monotonic() < end, (somewhere / "server.log").read_text()
            time.sleep(0.01)
    finally:
        client.stop()
        receiver.join(60)
    log = (somewhere / "server.log").read_text()
    assert log.count("is far from what the policy was trained on: [1] is 90") == 1


def first_chunks(kind, checkpoint, raw):
    """What a server that was seeded alike answers first, by the policy's own code."""
    torch.manual_seed(SEED)
    policy = POLICIES[kind].from_pretrained(checkpoint)
    pre, post = make_pre_post_processors(policy.config, str(checkpoint))
    batch = {
        f"observation.images.{key}": torch.from_numpy(raw[key]).permute(2, 0, 1)[None].float() / 255
        for key in ("top", "wrist")
    }
    batch["observation.state"] = torch.tensor([[raw[joint] for joint in JOINTS]], dtype=torch.float32)
    chunks = [policy.predict_action_chunk(pre({**batch, "task": ["open the window"]})) for _ in range(2)]
    return [post(chunk)[0, :EXECUTED].numpy() for chunk in chunks]
