"""How the recordings of a directory were made, so that those of another expert are not taken for them."""

import json
import os

MARK = "ofp_cpu.json"  # beside RoboTwin's seed.txt


def settle(directory, made):
    """Keeps how recordings are made in `directory`: data/<task>/<task_config>.

    made: `variation` (None or a number) and `shadows`, as of `mode.install`. Raises ValueError where there are
    recordings that were made otherwise, or of which it is not known.
    """
    mark = os.path.join(directory, MARK)
    before = None
    if os.path.isfile(mark):
        with open(mark) as file:
            before = json.load(file)
    if before == made:
        return
    if _has_recordings(directory):
        if before is None:
            raise ValueError(
                f"how the recordings in {directory} were made is not known: move them away; or, if it was with "
                f"{_flags(made)}, write {json.dumps(made)} into {mark}"
            )
        raise ValueError(
            f"the recordings in {directory} were made with {_flags(before)}, not with {_flags(made)}: move them away, "
            "or set that"
        )
    os.makedirs(directory, exist_ok=True)
    with open(mark + ".new", "w") as file:
        json.dump(made, file)
    os.replace(mark + ".new", mark)


def _has_recordings(directory):
    seeds, data = os.path.join(directory, "seed.txt"), os.path.join(directory, "data")
    if os.path.isdir(data) and os.listdir(data):
        return True
    if not os.path.isfile(seeds):
        return False
    with open(seeds) as file:
        return bool(file.read().strip())


def _flags(made):
    variation = "no --variation" if made["variation"] is None else f"--variation {made['variation']}"
    return f"{variation} and {'' if made['shadows'] else 'no '}--shadows"
