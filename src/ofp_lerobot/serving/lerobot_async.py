"""`ofp-async-server`: LeRobot's own async-inference server, which then also takes this plugin's policies.

LeRobot's client imports plugins before it runs (last lines of `robot_client.py`); its server does not, and refuses
types that are not in `async_inference/constants.py`. That list is one object, looked into for each client, so it is
extended in place before the server starts, without changing LeRobot.
"""

import sys
from importlib.util import find_spec

EXTRA = "pip install 'lerobot_policy_ofp[async]'"
# LeRobot's own help cannot be had without gRPC: its package asks for it where it is imported.
HELP = f"""\
usage: ofp-async-server [--host HOST] [--port PORT] [--fps FPS] [--inference_latency S] [--obs_queue_timeout S]

LeRobot's async-inference server (python -m lerobot.async_inference.policy_server), which then also takes this plugin's
policies. The options are LeRobot's; with gRPC installed this help tells them in full: {EXTRA}
"""


def allow_plugin() -> None:
    """Registers the policy types and extends the list. Raises ImportError where LeRobot's `async` extra is missing."""
    from lerobot.async_inference.constants import SUPPORTED_POLICIES
    from lerobot.configs import PreTrainedConfig

    import lerobot_policy_ofp

    for name in lerobot_policy_ofp.__all__:
        kind = PreTrainedConfig.get_choice_name(getattr(lerobot_policy_ofp, name))
        if kind not in SUPPORTED_POLICIES:
            SUPPORTED_POLICIES.append(kind)


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
