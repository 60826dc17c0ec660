"""What the quickstart leaves behind: a table, report.json, a plot and an animation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ofp_lerobot.evaluation.environments.pillar import left_share
from ofp_lerobot.evaluation.statistics import wilson_interval
from ofp_lerobot.evaluation.tables import markdown_table
from ofp_lerobot.inference.sampling import Sampling


def success_of(result: dict[str, Any]) -> dict[str, Any]:
    """The report's keys for episodes; result: `solved` and, where they are known, the lengths `actions` and the `sides`
    of the pillar (-1 left, 1 right, 0: it was not passed)."""
    solved, lengths = result["solved"], result.get("actions", [])
    done = [length for length, each in zip(lengths, solved, strict=False) if each]
    low, high = wilson_interval(sum(solved), len(solved))
    return {
        "success": sum(solved) / len(solved),
        "episodes": len(solved),
        "ci95": [round(low, 4), round(high, 4)],
        "solved": [int(each) for each in solved],
        "actions_to_success": round(sum(done) / len(done), 1) if done else None,
        "left": left_share(result.get("sides", [])),
    }


def row_of(policy: str, sampling: Sampling, result: dict[str, Any], latency_ms: float) -> dict[str, Any]:
    """One policy answering in one way; result: of `evaluation.measure`."""
    return {
        "policy": policy,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "samples": sampling.samples,
        **success_of(result),
        "energy_distance": round(result["energy_distance"], 4),
        "spread": round(result["spread"], 4),
        "latency_ms": round(latency_ms, 2),
        "evaluations_per_chunk": sampling.steps,
    }


def table(report: dict[str, Any]) -> str:
    """The rows and baselines in Markdown."""
    names = ("policy", "sampler", "steps", "densest of", "success [95 %]", "left", "actions", "energy distance",
             "spread", "ms")  # fmt: skip
    lines = []
    for row in report["rows"]:
        policy = [row["policy"], row["sampler"], row["steps"], "–" if row["samples"] == 1 else row["samples"]]
        measures = [f"{row['energy_distance']:.3f}", f"{row['spread']:.3f}", f"{row['latency_ms']:.1f}"]
        lines.append([*policy, *_success(row), *measures])
    for row in report["baselines"]:
        lines.append([row["name"], *["–"] * 3, *_success(row), *["–"] * 3])
    row = report["demonstrator"]
    lines.append(["demonstrator", *["–"] * 3, *_success(row), "0", f"{row['spread']:.3f}", "–"])
    return "\n".join(markdown_table(names, lines))


def _success(row: dict[str, Any]) -> list[str]:
    low, high = row["ci95"]
    left = "–" if row["left"] is None else f"{row['left']:.2f}"
    return [f"{row['success']:.2f} [{low:.2f}, {high:.2f}]", left, str(row["actions_to_success"] or "–")]


def plot(report: dict[str, Any], path: Path) -> None:
    """Success with its interval, and energy distance, against network evaluations per chunk."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        densest = f", densest of {row['samples']}" if row["samples"] > 1 else ""
        curves.setdefault(f"{row['policy']}, {row['sampler'].replace('_', ' ')}{densest}", []).append(row)
    for index, (label, rows) in enumerate(curves.items()):
        x = [row["evaluations_per_chunk"] * (0.94 + 0.04 * index) for row in rows]  # side by side
        success = np.array([row["success"] for row in rows])
        intervals = np.array([row["ci95"] for row in rows]).T
        top.errorbar(x, success, yerr=np.abs(intervals - success), marker="o", capsize=3, label=label)
        bottom.plot(x, [row["energy_distance"] for row in rows], marker="o")
    for row, style in zip(report["baselines"], ("--", ":", "-."), strict=True):
        top.axhline(row["success"], color="0.6", linestyle=style, label=row["name"])
    top.set(ylabel="success", ylim=(-0.02, 1.04), title=report["task"])
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    bottom.set(ylabel="energy distance to the demonstrator", ylim=(0, None))
    bottom.set(xscale="log", xlabel="evaluations per chunk")
    bottom.set_xticks([1, 2, 5, 10], ["1", "2", "5", "10"])
    bottom.minorticks_off()
    figure.savefig(path, dpi=150)


def animate(columns: Mapping[str, Sequence[Sequence[NDArray[np.uint8]]]], path: Path, rate: int) -> None:
    """A GIF of episodes side by side, a column for each title and its episodes below one another.

    Each episode holds its last frame until all have ended. rate: frames a second.
    """
    from PIL import Image, ImageDraw

    length = max(len(episode) for column in columns.values() for episode in column)
    frames = []
    for i in range(length):
        parts = [
            np.concatenate([episode[min(i, len(episode) - 1)] for episode in column], axis=0)
            for column in columns.values()
        ]
        frame = Image.fromarray(np.concatenate(parts, axis=1))
        draw, width = ImageDraw.Draw(frame), frame.width // len(columns)
        for number, title in enumerate(columns):
            draw.text((number * width + 4, 4), title, fill="white", stroke_width=1, stroke_fill="black")
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000 // rate, loop=0, optimize=True)
