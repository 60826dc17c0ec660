"""`ofp-async-server`: LeRobot's own async-inference server, which then also takes this plugin's policies.

LeRobot's client imports plugins before it runs (last lines of `robot_client.py`); its server does not, and refuses
types that are not in `async_inference/constants.py`. That list is one object, looked into for each client, so it is
extended in place before the server starts, without changing LeRobot.
"""

import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

EXTRA = "pip install 'lerobot_policy_ofp[async]'"
# LeRobot's own help cannot be had without gRPC: its package asks for it where it is imported.
HELP = f"""\
usage: ofp-async-server [--host HOST] [--port PORT] [--fps FPS] [--inference_latency S] [--obs_queue_timeout S]

LeRobot's async-inference server (python -m lerobot.async_inference.policy_server), which then also takes this plugin's
policies. The options are LeRobot's; with gRPC installed this help tells them in full: {EXTRA}
"""


def allow_plugin() -> None:
    """Registers the policy types, extends the list, and leaves the resizing of images to policies that pad them.

    Raises ImportError where LeRobot's `async` extra is missing.
    """
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.async_inference.policy_server import PolicyServer
    from lerobot.configs import PreTrainedConfig

    import lerobot_policy_ofp

    for name in lerobot_policy_ofp.__all__:
        kind = PreTrainedConfig.get_choice_name(getattr(lerobot_policy_ofp, name))
        if kind not in SUPPORTED_POLICIES:
            SUPPORTED_POLICIES.append(kind)
    PolicyServer.policy_image_features = property(image_features)


def image_features(server: Any) -> dict[str, Any]:
    """The policy's cameras, to whose sizes LeRobot's server stretches the pictures.

    Our VLAs keep the aspect ratio and pad, so theirs have the sizes that the client sends.
    """
    from ..policies.vla.policy import VLAPolicy

    features = server.policy.config.image_features
    if not isinstance(server.policy, VLAPolicy):
        return features
    sent = {key: server.lerobot_features[key]["shape"] for key in features if key in server.lerobot_features}
    return {**features, **{key: replace(features[key], shape=(c, h, w)) for key, (h, w, c) in sent.items()}}


def main() -> int:
    """Takes the options of `python -m lerobot.async_inference.policy_server`. Serves until interrupted.

    Returns 0; 2 after one line where LeRobot's `async` extra is missing; 130 where it was interrupted.
    """
    if find_spec("grpc") is None:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(HELP, end="")
            return 0
        print(f"ofp-async-server: gRPC is not installed: {EXTRA}", file=sys.stderr)
        return 2
    allow_plugin()
    from lerobot.async_inference import policy_server

    try:
        policy_server.serve()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
