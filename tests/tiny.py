"""A tiny π₀.₅ and a dataset for it, to try the commands of the README on a CPU.

    python -m tests.tiny outputs/tiny     # outputs/tiny/pi05 and outputs/tiny/data; prints the commands

Weights and data are random: what is trained on them is good for nothing.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tests import runs

NOTE = """\
# After two steps on random data the verdict of the check means nothing. ofp-export refuses this size, which is not
# π₀.₅'s, and no simulator has these cameras and this action size."""

# The README's, with what this size and a CPU need. The last one, an environment, has no tiny one.
COMMANDS = """\
ofp-convert from-pi05 {pi05} --output {directory}/start
lerobot-train --config_path="$(ofp-recipe one_step)" --policy.path={directory}/start --dataset.repo_id={repo} \\
  --dataset.root={data} --output_dir={directory}/one_step --policy.device=cpu --policy.dtype=float32 --batch_size=2 \\
  --steps=2 --save_freq=2 --num_workers=0 --env_eval_freq=0 --dataset.eval_split=0.3
ofp-check {directory}/one_step/checkpoints/last/pretrained_model --dataset {repo} --root {data} --frames 4"""


def pi05(directory: Path, dataset: Path, tokenizer: Path, **settings) -> Path:
    """As LeRobot saves a fine-tuned `pi05`, of a size that our variants name. settings: of its config.json."""
    runs.pi05_checkpoint(directory, dataset, tokenizer)
    config = json.loads((directory / "config.json").read_text())
    sizes = {"paligemma_variant": "gemma_tiny", "action_expert_variant": "gemma_tiny", "vision_variant": "siglip_tiny"}
    (directory / "config.json").write_text(json.dumps({**config, **sizes, **settings}))
    preprocessor = directory / "policy_preprocessor.json"
    content = json.loads(preprocessor.read_text())
    content["steps"] = [step for step in content["steps"] if step.get("registry_name") != "ofp_text_extent"]
    preprocessor.write_text(json.dumps(content))
    return directory


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="not there yet")
    directory = parser.parse_args(argv).directory
    directory.mkdir(parents=True)
    dataset = runs.make_dataset(directory / "data")
    tokenizer = runs.make_tokenizer(directory / "tokenizer").absolute()
    checkpoint = pi05(directory / "pi05", dataset, tokenizer, n_action_steps=3)
    print(COMMANDS.format(pi05=checkpoint, directory=directory, repo=runs.REPO, data=dataset))
    print(NOTE)


if __name__ == "__main__":
    main()
