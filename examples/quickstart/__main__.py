"""From nothing to a one-step policy in a simulator, on a CPU and without the Hub: `python -m examples.quickstart`."""

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path


def main() -> int:
    """Returns 0, or 2 after one line on stderr where it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--policy", choices=("pi05", "smolvla"), default="pi05", help="the small network's shape")
    parser.add_argument(
        "--output",
        type=Path,
        help="outputs/quickstart, with another policy outputs/quickstart_<policy>, with --smoke …_smoke",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: the numbers mean nothing")
    arguments = parser.parse_args()
    usual = "quickstart" if arguments.policy == "pi05" else f"quickstart_{arguments.policy}"
    output = arguments.output or Path("outputs") / (f"{usual}_smoke" if arguments.smoke else usual)

    # Before anything reads it, here and in the processes started from here, which import this module: so imports wait.
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    for name, value in {
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    from ofp_lerobot.errors import UserError
    from ofp_lerobot.evaluation.environments.metaworld import usable_backend

    try:
        os.environ["MUJOCO_GL"] = usable_backend()
    except UserError as error:
        print(f"examples.quickstart: {error}", file=sys.stderr)
        return 2
    if os.environ["MUJOCO_GL"] == "osmesa":
        print("EGL does not work here, so OSMesa draws: slower. `apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`")

    from .pipeline import Quickstart, Settings
    from .report import table

    settings = Settings(network=arguments.policy)
    if arguments.smoke:
        settings = Settings(
            replace(settings.recording, episodes=4),
            replace(settings.training, base_steps=4, steps=4, batch_size=4),
            replace(settings.evaluation, episodes=4, max_steps=12, observations=2, draws=4, latency_calls=4),
            arguments.policy,
        )
    start = time.perf_counter()
    try:
        report = Quickstart(settings, output).run()
    except UserError as error:
        print(f"examples.quickstart: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(report)}\n\nTook {(time.perf_counter() - start) / 60:.1f} minutes. See {output}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
