"""The command line of `ofp-check`."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...arguments import at_least
from ...errors import UserError

_DESCRIPTION = """\
Compares one and two network evaluations per action chunk with ten on recorded episodes: error to the demonstration,
spread over noises, jumps between chunks, latency, and a verdict in words. No simulator, no robot."""

_EXAMPLES = """\
examples:
  ofp-check outputs/train/run/checkpoints/last/pretrained_model --dataset lerobot/libero
  ofp-check user/policy --dataset user/data --root ~/data --episodes 90-99 --frames 256 --device cuda
  ofp-check lerobot/pi05_libero_finetuned --dataset lerobot/libero     # a plain pi05: its one-step flow matching"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the check. Returns 0, or 2 after one line on stderr where it cannot be done."""
    args = parse_arguments(argv)
    try:
        run(args)
    except UserError as error:
        print(f"ofp-check: {error}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of `ofp-check`. Ends the process with 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        "ofp-check",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint", help="directory or Hub id of a policy of ours or LeRobot's `pi05`, `pi0`, `smolvla`"
    )
    parser.add_argument("--dataset", metavar="DATASET", help="LeRobotDataset to check on, a directory or a Hub id")
    parser.add_argument("--root", type=Path, help="its local directory, where --dataset is its name")
    parser.add_argument(
        "--episodes",
        nargs="*",
        metavar="E",
        help="episodes, as 3 17 40-49 or [3,17] (default: what training held out by --dataset.eval_split, else what "
        "it left out by --dataset.episodes, else the last 10 %%)",
    )
    parser.add_argument("--frames", type=at_least(1), default=64, help="observations, spaced evenly (default 64)")
    parser.add_argument("--noises", type=at_least(2), default=8, help="noise draws for each of them (default 8)")
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="teacher: the EMA")
    parser.add_argument("--rename_map", "--rename-map", type=_rename_map, help="as LeRobot's, JSON: dataset to policy")
    parser.add_argument(
        "--warm-start", type=_fraction, help="fraction of the old plan to try (default: the policy's, or 0.15)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, mps, xpu or cpu (default: the best there is)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="observations at once (default 8)")
    parser.add_argument("--latency-calls", type=at_least(0), default=20, help="timed calls, 0 is off (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="default outputs/check/<checkpoint>-on-<dataset>.json")
    parser.add_argument("--plot", type=Path, help="default outputs/check/<checkpoint>-on-<dataset>.png")
    args = parser.parse_args(argv)
    if args.dataset is None and args.root is None:
        parser.error("name the dataset: --dataset <directory or Hub id>")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Loads, measures, prints and writes; returns what the JSON file holds."""
    from ...checkpoints.reader import load_config, resolve_source
    from ...datasets import resolve_dataset
    from ...devices import resolve_device
    from ...inference.policies import load_policy
    from . import history, inputs, measure, report, verdict

    source = resolve_source(args.checkpoint)
    device = resolve_device(args.device)
    how: dict[str, Any] = {"device": device, "as_ofp": True, "compile_model": False}
    config, _ = load_config(source, **how)
    dataset = resolve_dataset(args.dataset, args.root)
    metadata = inputs.load_metadata(dataset)
    wanted = parse_episodes(args.episodes)
    trained = history.read_history(source)
    episodes, reason = history.choose_episodes(metadata, wanted, trained.runs)
    checkpoint = load_policy(source, teacher=args.weights == "teacher", rename_map=args.rename_map, **how)
    described = inputs.describe_checkpoint(checkpoint)
    notes = [
        *inputs.check_features(checkpoint, metadata),
        *inputs.check_statistics(checkpoint, metadata),
        *inputs.check_instructions(checkpoint, metadata, episodes),
    ]
    data = inputs.load_episodes(metadata, dataset.root, config, episodes)
    fraction = args.warm_start or config.warm_start or measure.PAPERS_WARM_START
    # First: on a machine that cannot answer as the checkpoint asks it ends here.
    latency = measure.latency(checkpoint, data, calls=args.latency_calls, seed=args.seed)
    collected = measure.collect(
        checkpoint,
        data,
        frames=args.frames,
        draws=args.noises,
        batch_size=args.batch_size,
        fraction=fraction,
        seed=args.seed,
    )
    statistics = measure.summarise(collected, executed=config.n_action_steps, seed=args.seed)
    result = {
        "checkpoint": {
            "source": str(source),
            "weights": args.weights,
            **described,
            "device": device,
        },
        "data": {
            "repo_id": metadata.repo_id,
            "directory": None if dataset.root is None else str(dataset.root),
            "episodes": episodes,
            "chosen": reason,
            **history.describe_history(metadata, episodes, trained),
            "frames": collected.positions.tolist(),
            "noises": args.noises,
            "seed": args.seed,
        },
        "warm_start": fraction,
        **statistics,
        "per_dimension": {
            "names": inputs.action_names(metadata),
            **measure.per_dimension(collected.now),
        },
        "latency_ms": latency,
        "thresholds": verdict.THRESHOLDS,
    }
    result["verdicts"] = verdict.judge(result) + verdict.judge_sharpness(result)
    result["limits"] = [*notes, *verdict.limits(result)]
    result["versions"] = {name: version(name) for name in ("lerobot", "lerobot_policy_ofp", "torch")}
    name = report.output_name(str(source), args.weights, str(dataset.root or metadata.repo_id))
    json_path = args.json or Path("outputs/check") / f"{name}.json"
    plot_path = args.plot or Path("outputs/check") / f"{name}.png"
    for path in (json_path, plot_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(result, indent=2) + "\n")
    report.plot(result, collected, plot_path)
    print(report.table(result))
    print(f"\nwritten: {json_path}, {plot_path}")
    return result


def parse_episodes(words: Sequence[str] | None) -> list[int] | None:
    """["3", "40-42"] or ["[3,", "40]"] -> sorted episode numbers, None where the option was not given.

    Raises UserError on anything else and on an empty list.
    """
    if words is None:
        return None
    found: set[int] = set()
    for word in re.split(r"[\s,\[\]]+", " ".join(words)):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        if match:
            found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
        elif word:
            raise UserError(f"--episodes: {word!r} is neither a number nor a range such as 40-49")
    if not found:
        raise UserError("--episodes is empty: name some, as 3 17 40-49, or leave the option out")
    return sorted(found)


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError("must be between 0 and 1")
    return value


def _rename_map(text: str) -> dict[str, str]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from error
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise argparse.ArgumentTypeError(
            'must be an object of names, as {"observation.images.a": "observation.images.b"}'
        )
    return value
