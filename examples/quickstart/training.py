"""Training with LeRobot's own `lerobot-train`, in a process of its own.

Flow matching from scratch first; from its checkpoint two branches of equal length, `ofp` and more flow matching.
"""

import re
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ofp_lerobot.errors import UserError

from .demonstrations import REPO_ID

PROMPT_LENGTH = 24  # tokens, longer than the prompt


@dataclass(frozen=True)
class Training:
    """A small policy and how it is trained; `network` and `vision` are π₀.₅'s.

    Every policy takes `base_steps` + `steps` optimizer steps.
    """

    network: str = "gemma_tiny"
    vision: str = "siglip_tiny"
    chunk_size: int = 8
    executed: int = 8  # whole chunks: which way round the pillar is decided within one
    batch_size: int = 32
    noise_draws: int = 2
    base_steps: int = 1200
    base_learning_rate: float = 1e-3
    steps: int = 800
    learning_rate: float = 5e-4
    seed: int = 1


def pi05(training: Training, directory: Path, prompts: Sequence[str], image_size: int) -> dict[str, object]:
    """A small π₀.₅; its tokenizer, of the prompts' words, is written into `directory`."""
    from ofp_lerobot.policies.paligemma.small_tokenizer import build_tokenizer

    return {
        "policy.type": "ofp",
        **_action_sizes(training),
        "policy.paligemma_variant": training.network,
        "policy.action_expert_variant": training.network,
        "policy.vision_variant": training.vision,
        "policy.image_resolution": f"[{image_size},{image_size}]",
        "policy.tokenizer_name": directory,
        "policy.tokenizer_max_length": PROMPT_LENGTH,
        "policy.vocabulary_size": build_tokenizer(directory, prompts),
    }


def smolvla(training: Training, directory: Path, prompts: Sequence[str], image_size: int) -> dict[str, object]:
    """A small SmolVLA, all of which trains; its VLM's sizes and tokenizer are written into `directory`."""
    from ofp_lerobot.policies.ofp_smolvla.small_vlm import SmolVLMSize, write_smolvlm

    size = SmolVLMSize(
        width=128, mlp=512, layers=4, heads=8, kv_heads=2, vocabulary=64, vision_width=128, vision_mlp=512,
        vision_layers=2, vision_heads=4, pixels=image_size, patch=8, scale=2,
    )  # fmt: skip
    write_smolvlm(directory, size, re.findall(r"\w+|[^\w\s]+", " ".join(prompts)))
    return {
        "policy.type": "ofp_smolvla",
        **_action_sizes(training),
        "policy.vlm_model_name": directory,
        "policy.num_vlm_layers": size.layers,
        "policy.resize_imgs_with_padding": f"[{image_size},{image_size}]",
        "policy.train_expert_only": "false",
        "policy.freeze_vision_encoder": "false",
        "policy.max_state_dim": 4,
    }


def _action_sizes(training: Training) -> dict[str, object]:
    return {
        "policy.chunk_size": training.chunk_size,
        "policy.n_action_steps": training.executed,
        "policy.max_action_dim": 4,
    }


NETWORKS: dict[str, Callable[[Training, Path, Sequence[str], int], dict[str, object]]] = {
    "pi05": pi05,
    "smolvla": smolvla,
}
"""The flags of a network from scratch."""


def base_flags(training: Training, network: Mapping[str, object]) -> dict[str, object]:
    """Flow matching from scratch."""
    return {
        **network,
        "policy.objective": "flow_matching",
        "policy.device": "cpu",
        **_common_flags(training, training.base_steps, training.base_learning_rate, last=0.1),
        "seed": training.seed,
        "num_workers": 1,  # nothing else runs meanwhile
    }


def branch_flags(training: Training, objective: str, base: Path) -> dict[str, object]:
    """`objective` from the checkpoint of the base."""
    return {
        "policy.path": base,
        "policy.objective": objective,
        **_common_flags(training, training.steps, training.learning_rate, last=0.05),
        "seed": training.seed + 1,
        "num_workers": 0,
    }


def _common_flags(training: Training, steps: int, learning_rate: float, last: float) -> dict[str, object]:
    return {
        "policy.num_noise_draws": training.noise_draws,
        "policy.monitor_freq": 0,
        "policy.optimizer_lr": learning_rate,
        "policy.scheduler_warmup_steps": 30,
        "policy.scheduler_decay_steps": steps,
        "policy.scheduler_decay_lr": last * learning_rate,
        "policy.push_to_hub": "false",
        "batch_size": training.batch_size,
        "steps": steps,
        "save_freq": 0,
        "log_freq": 50,
        "env_eval_freq": 0,
    }


def checkpoint(run: Path) -> Path:
    """The last checkpoint of a training run."""
    return run / "checkpoints" / "last" / "pretrained_model"


def lerobot_train(flags: dict[str, object], dataset: Path, run: Path, log: Path, bar: tqdm) -> None:
    """Runs `lerobot-train` into the directory `run`; its output is added to `log`, its progress goes to `bar`.

    Where `run` has a checkpoint, it goes on from there. Raises UserError with the end of the log where it fails.
    """
    script = Path(sys.executable).with_name("lerobot-train")
    begun = checkpoint(run) / "train_config.json"
    resumes = begun.is_file()
    if resumes:
        everything: dict[str, object] = {"config_path": begun, "resume": "true"}
    else:
        # Of a training that ended before its first checkpoint: LeRobot refuses a directory that is there.
        shutil.rmtree(run, ignore_errors=True)
        everything = {**flags, "dataset.repo_id": REPO_ID, "dataset.root": dataset, "output_dir": run}
    command = [str(script), *(f"--{name}={value}" for name, value in everything.items())]
    steps, last = int(str(flags["steps"])), deque[str](maxlen=5)
    with log.open("a", buffering=1) as file:
        file.write(" ".join(command) + "\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
        assert process.stdout is not None
        # Universal newlines: each update of LeRobot's own progress bar is a line. A resumed one counts what is left.
        for line in process.stdout:
            file.write(line)
            last.append(line.strip())
            if found := re.match(r"Training:.*?\b(\d+)/(\d+) \[", line):
                bar.update(steps - int(found[2]) + int(found[1]) - bar.n)
            if found := re.search(r"\bloss:(\S+)", line):
                bar.set_postfix(loss=found[1])
    if process.wait():
        anew = f" It went on from a checkpoint; to begin anew, delete {run}." if resumes else ""
        raise UserError(f"lerobot-train failed with exit code {process.returncode}, see {log}.{anew} {' '.join(last)}")
