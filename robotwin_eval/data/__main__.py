"""`python -m robotwin_eval.data prepare|convert`: RoboTwin's demonstrations for `lerobot-train`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ofp_lerobot.arguments import at_least
from ofp_lerobot.errors import UserError
from ofp_lerobot.signals import ended_by_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 after one line on stderr where it cannot be done."""
    parser = argparse.ArgumentParser("python -m robotwin_eval.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_prepare(commands.add_parser("prepare", help="a subset of the Hub's dataset: episodes, statistics, recipes"))
    _add_convert(commands.add_parser("convert", help="RoboTwin's own HDF5 files to a LeRobotDataset"))
    args = parser.parse_args(argv)
    try:
        with ended_by_sigterm():  # so that the workers end too
            {"prepare": _prepare, "convert": _convert}[args.command](args)
    except UserError as error:
        print(f"robotwin_eval.data {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    from .prepare import REPO_ID, Order

    parser.add_argument("--tasks", default="", help="comma-separated (default: all 50)")
    parser.add_argument("--condition", choices=("clean", "randomized", "both"), default="clean")
    parser.add_argument("--episodes", type=at_least(1), help="of each task and condition (default: all)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--repo-id", default=REPO_ID, help="the dataset, on the Hub (default %(default)s) or a directory"
    )
    parser.add_argument("--root", type=Path, help="its directory, where it is on this machine already")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/robotwin_expert.yaml"))
    order = Order()
    parser.add_argument(
        "--per-task",
        default=f"{order.clean},{order.randomized}",
        help="clean and randomized episodes of each task in the dataset (default %(default)s, as reported)",
    )
    parser.add_argument("--exclude", default="", help="episodes to leave out, comma-separated")


def _prepare(args: argparse.Namespace) -> None:
    from ofp_lerobot.datasets import resolve_dataset

    from .prepare import Order, prepare

    try:
        clean, randomized = map(int, args.per_task.split(","))
        exclude = [int(number) for number in args.exclude.split(",") if number]
    except ValueError as error:
        raise UserError(f"--per-task is two numbers, as 50,500, and --exclude numbers: {error}") from error
    dataset = resolve_dataset(args.repo_id, args.root, name_flag="--repo-id")
    print(f"dataset: {dataset}")
    content = prepare(
        args.output,
        [task.strip() for task in args.tasks.split(",") if task.strip()],
        args.condition,
        args.episodes,
        repo_id=dataset.repo_id,
        root=dataset.root,
        recipe=args.recipe,
        order=Order(clean=clean, randomized=randomized),
        exclude=exclude,
    )
    print(f"{len(content['dataset']['episodes'])} episodes. Now, equally long for both:")
    for name in ("train", "train_flow_matching"):
        print(f"  lerobot-train --config_path={args.output / name}.yaml --output_dir={args.output / name}")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="+", help="data/<task>/<task_config> of RoboTwin, one or several")
    parser.add_argument("--output", type=Path, required=True, help="directory of the new dataset")
    parser.add_argument("--repo-id", default="local/robotwin")
    parser.add_argument("--episodes", type=at_least(1), help="of each source (default: all)")
    parser.add_argument("--instructions", choices=("seen", "unseen"), default="seen", help="which to train on")
    parser.add_argument(
        "--save-freq",
        type=at_least(1),
        help="simulation steps to a frame, for recordings that do not hold it (default: task_config/'s, or 15)",
    )
    parser.add_argument("--workers", type=int, default=1)


def _convert(args: argparse.Namespace) -> None:
    from .convert import convert

    frames = convert(
        args.source,
        args.output,
        repo_id=args.repo_id,
        count=args.episodes,
        instructions=args.instructions,
        save_freq=args.save_freq,
        workers=args.workers,
    )
    print(f"{frames} frames in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
