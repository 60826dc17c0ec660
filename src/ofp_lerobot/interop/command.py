"""The command lines of `ofp-convert` and `ofp-export`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..signals import ended_by_sigterm

_CONVERT = """\
Makes the checkpoint that training a π₀.₅, π₀ or SmolVLA to one step starts from, and carries π₀.₅ checkpoints between
openpi's PyTorch layout and LeRobot. What cannot be carried over exactly is refused."""

_CONVERT_EXAMPLES = """\
examples:
  ofp-convert from-pi05 user/my_pi05 --output outputs/start
  ofp-convert from-smolvla user/my_smolvla --output outputs/start
  ofp-convert from-openpi checkpoints/pi05_libero/run/30000 --output pi05_libero --chunk-size 10 --action-size 7 \\
    --state-size 8 --no-state-in-prompt --camera base_0_rgb=image --camera left_wrist_0_rgb=image2
  ofp-convert to-openpi outputs/train/run/checkpoints/last/pretrained_model --asset-id my_robot --output openpi_run"""

_FROM = """\
An openpi checkpoint directory (model.safetensors, assets/<asset id>/norm_stats.json) becomes a LeRobot one. Options
hold what only openpi's train config knows."""

_START = """\
A `{stock}` checkpoint, local or from the Hub, becomes an `{ours}` one that is the same policy until it is trained:
weights, settings, processors and tokenizer. `lerobot-train --policy.path=<output>` takes from it whatever it is not
told."""

_EXPORT = """\
Folds one, two or four steps of an `ofp`, `ofp_pi0` or `ofp_smolvla` checkpoint into a plain π₀.₅, π₀ or SmolVLA that
any engine runs with that many steps, and proves it against stock LeRobot before it is written."""

_EXPORT_EXAMPLES = """\
examples:
  ofp-export outputs/train/run/checkpoints/last/pretrained_model --steps 1 --output one_step
  ofp-export <run>/pretrained_model --steps 2 --weights teacher --layout openpi --asset-id my_robot --output two_step"""


_STARTS = {"pi05": "ofp", "pi0": "ofp_pi0", "smolvla": "ofp_smolvla"}  # LeRobot's types and ours


def convert(argv: Sequence[str] | None = None) -> int:
    """`ofp-convert`. Returns 0, or 2 after one message on stderr where it cannot be done."""
    args = parse_convert(argv)
    run = {"from-openpi": _from_openpi, "to-openpi": _to_openpi}.get(args.command, _from_stock)
    return _run("ofp-convert", lambda: print("\n".join(run(args))))


def export(argv: Sequence[str] | None = None) -> int:
    """`ofp-export`. Returns 0, or 2 after one message on stderr where it cannot be done."""
    args = parse_export(argv)
    return _run("ofp-export", lambda: _export(args))


def _run(name: str, work: Callable[[], None]) -> int:
    try:
        with ended_by_sigterm():  # so that what is half written is removed
            work()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def parse_convert(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _parser("ofp-convert", _CONVERT, _CONVERT_EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True)
    starts = {
        stock: commands.add_parser(
            f"from-{stock}",
            help=f"LeRobot's {stock} -> where `{ours}` starts",
            description=_START.format(stock=stock, ours=ours),
        )
        for stock, ours in _STARTS.items()
    }
    into = commands.add_parser("from-openpi", help="openpi -> LeRobot", description=_FROM)
    into.add_argument("--type", choices=("pi05", "ofp"), default="pi05", help="LeRobot's policy type (default pi05)")
    into.add_argument(
        "--camera",
        action="append",
        type=_camera,
        required=True,
        metavar="OPENPI=LEROBOT",
        help="base_0_rgb, left_wrist_0_rgb or right_wrist_0_rgb and the camera's name here; once for each camera",
    )
    into.add_argument("--chunk-size", type=int, required=True, help="action_horizon of the train config's Pi0Config")
    into.add_argument(
        "--state-in-prompt",
        action=argparse.BooleanOptionalAction,
        required=True,
        help="Pi0Config's discrete_state_input: on by default there, off in pi05_libero",
    )
    into.add_argument(
        "--delta-mask",
        type=_mask,
        help="of the DeltaActions transform, as make_bool_mask takes it: 6,-1,6,-1 (default: no such transform)",
    )
    into.add_argument("--action-names", type=_names, help="comma-separated; LeRobot marks absolute actions by name")
    into.add_argument("--state-size", type=int, help="the robot's, where the statistics are padded")
    into.add_argument("--action-size", type=int, help="the robot's, where the statistics are padded")
    into.add_argument("--max-token-len", type=int, default=200, help="Pi0Config's max_token_len (default 200)")
    into.add_argument("--asset-id", help="whose statistics, where there are several")
    into.add_argument("--tokenizer", help="directory or Hub name (default: PaliGemma's, gated on the Hub)")
    into.add_argument(
        "--rotary",
        choices=("exact", "bfloat16"),
        help="how training held the rotary frequencies: bfloat16 is openpi's PyTorch trainer in its default precision, "
        "exact its JAX trainer and float32 (default: by the weights' dtypes)",
    )
    into.add_argument(
        "--resize",
        choices=("openpi", "lerobot"),
        default="openpi",
        help="of images that are not 224 × 224: openpi's, by Pillow (default), or LeRobot's, which differs",
    )
    back = commands.add_parser("to-openpi", help="LeRobot -> openpi")
    back.add_argument("--asset-id", required=True, help="under which the train config looks for the statistics")
    for stock, start in starts.items():
        start.add_argument("source", help=f"directory or Hub id of a `{stock}` checkpoint")
        start.set_defaults(stock=stock)
    into.add_argument("source", type=Path, help="directory of the checkpoint")
    back.add_argument("source", help="directory or Hub id of the checkpoint")
    for command in (*starts.values(), into, back):
        command.add_argument("--output", type=Path, required=True, help="directory to write")
        command.add_argument("--dry-run", action="store_true", help="check and tell, write nothing")
        command.add_argument("--overwrite", action="store_true", help="replace an earlier conversion or export")
    return parser.parse_args(argv)


def parse_export(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = _parser("ofp-export", _EXPORT, _EXPORT_EXAMPLES)
    parser.add_argument("checkpoint", help="directory or Hub id of a policy of ours or its adapter")
    parser.add_argument("--steps", type=int, choices=(1, 2, 4), required=True, help="network evaluations per chunk")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument(
        "--layout",
        choices=("lerobot", "openpi", "both"),
        help="both, the default of `ofp`, writes <output>/lerobot and <output>/openpi; the others have lerobot alone",
    )
    parser.add_argument("--weights", choices=("student", "teacher"), default="student", help="teacher: the EMA")
    parser.add_argument("--asset-id", help="of openpi's statistics (default: the training data's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier conversion or export")
    return parser.parse_args(argv)


def _parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        name, description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _from_openpi(args: argparse.Namespace) -> list[str]:
    from .convert import OpenpiFacts, convert_from_openpi

    cameras = dict(args.camera)
    if len(cameras) < len(args.camera) or len(set(cameras.values())) < len(cameras):
        raise UserError("--camera: every camera once")
    facts = OpenpiFacts(
        cameras=cameras,
        chunk_size=args.chunk_size,
        prompt_state=args.state_in_prompt,
        delta_mask=args.delta_mask,
        action_names=args.action_names,
        state_size=args.state_size,
        action_size=args.action_size,
        token_length=args.max_token_len,
        exact_rotary=None if args.rotary is None else args.rotary == "exact",
    )
    return convert_from_openpi(
        args.source,
        args.output,
        facts,
        kind=args.type,
        asset_id=args.asset_id,
        tokenizer=args.tokenizer,
        pillow=args.resize == "openpi",
        dry_run=args.dry_run,
        overwrite=args.overwrite,
    )


def _from_stock(args: argparse.Namespace) -> list[str]:
    from .start import convert_from_stock

    return convert_from_stock(args.source, args.output, args.stock, dry_run=args.dry_run, overwrite=args.overwrite)


def _to_openpi(args: argparse.Namespace) -> list[str]:
    from .convert import convert_to_openpi

    return convert_to_openpi(
        args.source, args.output, asset_id=args.asset_id, dry_run=args.dry_run, overwrite=args.overwrite
    )


def _export(args: argparse.Namespace) -> None:
    from . import export

    found = export.export(
        args.checkpoint,
        args.output,
        steps=args.steps,
        layout=args.layout,
        which=args.weights,
        asset_id=args.asset_id,
        overwrite=args.overwrite,
    )
    print(f"{'stock policy against this policy':50} difference  allowed")
    for difference in found:
        print(f"{difference.what:50} {difference.relative:10.1e}  {difference.bound:.0e}")
    print(f"\nwritten: {args.output}; its README.md says how to run it")


def _camera(text: str) -> tuple[str, str]:
    theirs, separator, ours = text.partition("=")
    if not separator or not ours:
        raise argparse.ArgumentTypeError(f"{text!r} is not OPENPI=LEROBOT, as base_0_rgb=observation.images.top")
    return theirs, ours if ours.startswith("observation.") else f"observation.images.{ours}"


def _mask(text: str) -> tuple[bool, ...]:
    try:
        runs = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as 6,-1") from error
    if 0 in runs:
        raise argparse.ArgumentTypeError("0 stands for no dimension")
    return tuple(relative for run in runs for relative in (run > 0,) * abs(run))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
