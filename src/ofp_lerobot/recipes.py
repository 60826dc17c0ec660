"""`ofp-recipe`: the settings files for `lerobot-train` that come with this package."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# In a wheel the files lie beside this module, in a checkout at its root.
_PLACES = (Path(__file__).parent / "_recipes", Path(__file__).parents[2] / "recipes")


def recipes() -> dict[str, Path]:
    """The file of each recipe by its name."""
    directory = next(place for place in _PLACES if place.is_dir())
    return {path.stem: path for path in sorted(directory.glob("*.yaml"))}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the path of a recipe, without a name what there are. Returns 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        "ofp-recipe",
        description=__doc__,
        epilog='example: lerobot-train --config_path="$(ofp-recipe one_step)" --policy.path=... --dataset.repo_id=...',
    )
    parser.add_argument("name", nargs="?", help="of a recipe, whose path is printed (default: lists them)")
    parser.add_argument("--print", action="store_true", help="the file itself, to change a copy of it")
    args = parser.parse_args(argv)
    known = recipes()
    if args.name is None:
        for name, path in known.items():
            print(f"{name:18} {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    if args.name not in known:
        print(f"ofp-recipe: there is no {args.name!r}, only {', '.join(known)}", file=sys.stderr)
        return 2
    print(known[args.name].read_text() if args.print else known[args.name], end="" if args.print else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
