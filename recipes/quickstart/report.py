"""What the quickstart leaves behind: a table, report.json, a plot and an animation."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .evaluation import Sampling

PACKAGES = ("lerobot_policy_ofp", "lerobot", "torch", "transformers", "metaworld", "mujoco", "numpy")


def wilson_interval(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, scale = successes / episodes, 1 + z**2 / episodes
    centre = (rate + z**2 / (2 * episodes)) / scale
    half = z / scale * sqrt(rate * (1 - rate) / episodes + z**2 / (4 * episodes**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def success_of(solved: Sequence[bool]) -> dict[str, Any]:
    """The report's keys for episodes that were solved or not."""
    low, high = wilson_interval(sum(solved), len(solved))
    return {
        "success": sum(solved) / len(solved),
        "episodes": len(solved),
        "ci95": [round(low, 4), round(high, 4)],
        "solved": [int(each) for each in solved],
    }


def row_of(policy: str, sampling: "Sampling", result: dict[str, Any], latency_ms: float) -> dict[str, Any]:
    """One policy answering in one way; result: of `evaluation.measure`."""
    return {
        "policy": policy,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "warm_start": sampling.warm_start,
        **success_of(result["solved"]),
        "actions_to_success": actions_to_success(result),
        "energy_distance": round(result["energy_distance"], 4),
        "spread": round(result["spread"], 4),
        "latency_ms": round(latency_ms, 2),
        "evaluations_per_chunk": sampling.steps,
    }


def actions_to_success(result: dict[str, Any]) -> float | None:
    """The mean length of the solved episodes."""
    lengths = [length for length, solved in zip(result["actions"], result["solved"], strict=True) if solved]
    return round(sum(lengths) / len(lengths), 1) if lengths else None


def table(report: dict[str, Any]) -> str:
    """The rows and baselines in Markdown."""
    header = (
        "| policy | sampler | steps | warm start | success [95 %] | actions | energy distance | spread | ms per chunk |"
    )
    lines = [header, "| --- " * (header.count("|") - 1) + "|"]
    for row in report["rows"]:
        lines.append(
            f"| {row['policy']} | {row['sampler']} | {row['steps']} | {row['warm_start'] or '–'} | {_success(row)} "
            f"| {row['actions_to_success'] or '–'} | {row['energy_distance']:.3f} | {row['spread']:.3f} "
            f"| {row['latency_ms']:.1f} |"
        )
    for row in report["baselines"]:
        lines.append(f"| *{row['name']}* | – | – | – | {_success(row)} | – | – | – | – |")
    demonstrator = report["demonstrator"]
    lines.append(
        f"| *demonstrator* | – | – | – | – | {demonstrator['actions']} | 0 | {demonstrator['spread']:.3f} | – |"
    )
    return "\n".join(lines)


def _success(row: dict[str, Any]) -> str:
    low, high = row["ci95"]
    return f"{row['success']:.2f} [{low:.2f}, {high:.2f}]"


def provenance() -> dict[str, Any]:
    """Versions, machine and commit."""

    def git(*arguments: str) -> str | None:
        try:
            return subprocess.check_output(
                ["git", *arguments], cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL
            ).strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or no repository
            return None

    commit = git("rev-parse", "HEAD")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "machine": platform.platform(),
        "commit": commit,
        "uncommitted_changes": bool(git("status", "--porcelain")) if commit else None,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Success with its interval, and energy distance, against network evaluations per chunk."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(6.4, 6.4), sharex=True, constrained_layout=True)
    curves = {
        "ofp, flow map": [r for r in report["rows"] if r["policy"] == "ofp" and r["sampler"] == "flow_map"],
        "ofp, Euler": [r for r in report["rows"] if r["policy"] == "ofp" and r["sampler"] == "euler"],
        "flow matching, Euler": [r for r in report["rows"] if r["policy"] == "flow_matching"],
    }
    for shift, (label, rows) in zip((0.97, 1.0, 1.03), curves.items(), strict=True):
        for warm, style in ((False, {"marker": "o"}), (True, {"marker": "^", "linestyle": "none"})):
            chosen = [row for row in rows if bool(row["warm_start"]) is warm]
            if not chosen:
                continue
            x = [shift * row["evaluations_per_chunk"] * (1.06 if warm else 1) for row in chosen]
            y = [row["success"] for row in chosen]
            errors = [
                [row["success"] - row["ci95"][0] for row in chosen],
                [row["ci95"][1] - row["success"] for row in chosen],
            ]
            colour = f"C{list(curves).index(label)}"
            name = f"{label}, warm start" if warm else label
            top.errorbar(x, y, yerr=errors, capsize=3, color=colour, label=name, **style)
            if not warm:
                bottom.plot(x, [row["energy_distance"] for row in chosen], color=colour, **style)
    for index, row in enumerate(report["baselines"]):
        top.axhline(row["success"], color="0.6", linestyle=("--", ":", "-.")[index % 3], label=row["name"])
    top.set(ylabel="success", ylim=(-0.02, 1.04), title=report["task"])
    top.legend(fontsize=8, loc="lower right")
    bottom.set(
        ylabel="energy distance to the demonstrator", ylim=(0, None), xscale="log", xlabel="evaluations per chunk"
    )
    bottom.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    bottom.minorticks_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def animate(episodes: Sequence[Sequence[NDArray[np.uint8]]], path: Path, rate: int) -> None:
    """A GIF of episodes side by side; each holds its last frame until all have ended. rate: frames a second."""
    from PIL import Image

    length = max(map(len, episodes))
    frames = [
        Image.fromarray(np.concatenate([episode[min(i, len(episode) - 1)] for episode in episodes], axis=1))
        for i in range(length)
    ]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // rate, loop=0, optimize=True)
