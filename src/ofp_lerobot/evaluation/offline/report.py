"""Table and plot."""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Collected, square_error
from .verdict import THRESHOLDS

_VARIANTS = ("one", "two", "ten")
_TITLES = {"one": "one step", "two": "two steps", "ten": "ten (Euler)"}
_COLOURS = {"one": "#d1495b", "two": "#edae49", "ten": "#30638e"}
_LABEL, _CELL = 44, 19
_NOTHING = "n/a"


def output_name(source: str, weights: str, data: str) -> str:
    """A file name that says what was checked: the run's directories, its step, the weights and the dataset.

    A checkpoint in a directory is named by its path from here, or by the last five parts of it. `last` is the step that
    it stands for.
    """
    path = Path(source)
    if path.is_dir():
        whole, here = path.resolve(), Path.cwd()
        path = whole.relative_to(here) if whole.is_relative_to(here) else Path(*whole.parts[-5:])
    parts = [p for p in path.parts if p not in ("/", "outputs", "checkpoints", "pretrained_model")]
    parts += [weights] * (weights != "student") + ["on", Path(data).name]
    return re.sub(r"[^\w.]+", "-", "-".join(parts)).strip("-.")


def table(result: dict[str, Any]) -> str:
    """The whole report as text."""
    lines = [*_head(result), "", *_normalised(result), "", *_dimensions(result), "", "verdict"]
    lines += [line for verdict in result["verdicts"] for line in _bullet(verdict["text"])]
    return "\n".join([*lines, "limits", *(line for limit in result["limits"] for line in _bullet(limit))])


def _head(result: dict[str, Any]) -> list[str]:
    checkpoint, data = result["checkpoint"], result["data"]
    return [
        f"policy   {checkpoint['source']} ({checkpoint['type']}, {checkpoint['weights']} weights, "
        f"{checkpoint['dtype']} on {checkpoint['device']}), chunk {checkpoint['chunk_size']}, "
        f"{checkpoint['n_action_steps']} executed",
        f"data     {data['directory'] or data['repo_id']}, episodes {_ranges(data['episodes'])} ({data['chosen']}), "
        f"{len(data['frames'])} frames x {data['noises']} noises",
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] -> "1-3 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _row(label: str, cells: Sequence[str]) -> str:
    return label.ljust(_LABEL) + "".join(cell.rjust(_CELL) for cell in cells)


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _normalised(result: dict[str, Any]) -> list[str]:
    checkpoint, values, ratios = result["checkpoint"], result["normalised"], result["ratios_to_ten"]

    def row(label: str, get: Callable[[str], float | None]) -> str:
        return _row(label, [_number(get(variant)) for variant in _VARIANTS])

    def ratio(label: str, name: str) -> str:
        cells = [ratios[variant][name] for variant in ("one", "two")]
        return _row(label, [*(f"{c['value']:.2f} [{c['low']:.2f}, {c['high']:.2f}]" for c in cells), "1"])

    lines = [
        _row("normalised units, root mean squares", [_TITLES[variant] for variant in _VARIANTS]),
        row("error to the demonstration", lambda variant: values[variant]["error"]),
        row(
            f"  executed actions only ({checkpoint['n_action_steps']})",
            lambda variant: values[variant]["error_executed"],
        ),
        ratio("  ratio to ten", "error"),
        row("difference to ten from the same noise", lambda variant: values[variant]["difference_to_ten"]),
        row("spread over noises", lambda variant: values[variant]["spread"]),
        ratio(f"  ratio to ten (healthy {_band('spread_ratio')})", "spread"),
        row(f"deviation / data's (healthy {_band('std_ratio')})", lambda variant: values[variant]["std_ratio"]),
        row("largest |action|", lambda variant: values[variant]["largest"]),
    ]
    return lines + successive_rows(result) + _latency(result)


def _band(name: str) -> str:
    low, high = THRESHOLDS[name]
    return f"{low} to {high}"


def successive_rows(result: dict[str, Any]) -> list[str]:
    found = result["successive"]
    if found is None:
        return [_row("jump between successive chunks", [_NOTHING] * 3)]
    kind = (
        "on the steps both plan" if found["kind"] == "overlap" else f"seam; data's {found['demonstrations_jump']:.4g}"
    )

    def cells(name: str, suffix: str) -> list[str]:
        return [_number(found.get(variant + suffix, {}).get(name)) for variant in _VARIANTS]

    warm = f"  warm start {result['warm_start']:g}"
    return [
        _row(f"jump to next chunk ({kind})", cells("jump", "")),
        _row(warm, cells("jump", "_warm")),
        _row("error of the next chunk", cells("error", "")),
        _row(warm, cells("error", "_warm")),
        _row("spread of the next chunk", cells("spread", "")),
        _row(warm, cells("spread", "_warm")),
    ]


def _latency(result: dict[str, Any]) -> list[str]:
    found = result["latency_ms"]
    if found is None:
        return [_row("latency", [_NOTHING] * 3)]
    return [_row("latency ms, median / p95", [f"{found[w]['median']:.1f} / {found[w]['p95']:.1f}" for w in _VARIANTS])]


def _dimensions(result: dict[str, Any]) -> list[str]:
    found = result["per_dimension"]
    lines = [_row("error per action dimension, data's units", [_TITLES[variant] for variant in _VARIANTS])]
    for i, name in enumerate(found["names"]):
        lines.append(_row(f"  {name}", [_number(found[variant][i]) for variant in _VARIANTS]))
    return lines


def _bullet(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="  - ", subsequent_indent="    ")


def plot(result: dict[str, Any], collected: Collected, path: Path) -> None:
    """Four panels as a PNG: error along the chunk, error per frame, sizes and spreads, latency."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    along, pairs, health, speed = figure.subplots(2, 2).flat
    _plot_along(along, result)
    _plot_pairs(pairs, collected)
    _plot_health(health, result)
    _plot_latency(speed, result)
    figure.suptitle(f"{result['checkpoint']['source']} on {result['data']['repo_id']}", fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def _plot_along(axes: Axes, result: dict[str, Any]) -> None:
    for variant in _VARIANTS:
        errors = [float("nan") if e is None else e for e in result["error_by_step"][variant]]
        axes.plot(errors, color=_COLOURS[variant], label=_TITLES[variant])
    axes.axvline(result["checkpoint"]["n_action_steps"] - 0.5, color="grey", linestyle=":", label="executed up to here")
    axes.set(title="error to the demonstration", xlabel="step of the chunk", ylabel="RMS, normalised", ylim=(0, None))
    axes.legend()


def _plot_pairs(axes: Axes, collected: Collected) -> None:
    now = collected.now
    error = {variant: square_error(now.sampled[variant], now.target, now.valid) ** 0.5 for variant in _VARIANTS}
    for variant in ("two", "one"):
        axes.scatter(error["ten"], error[variant], s=12, alpha=0.7, color=_COLOURS[variant], label=_TITLES[variant])
    top = 1.05 * max(float(e.max()) for e in error.values())
    axes.plot([0, top], [0, top], color="grey", linewidth=1)
    axes.set(title="error of each frame", xlabel="ten steps", ylabel="few steps", xlim=(0, top), ylim=(0, top))
    axes.legend()


def _plot_health(axes: Axes, result: dict[str, Any]) -> None:
    axes.axhspan(*THRESHOLDS["std_ratio"], color="#66a182", alpha=0.25, label="healthy")
    axes.axhline(1, color="grey", linewidth=1)
    names = ("deviation / data's", "spread / ten's")
    for i, variant in enumerate(_VARIANTS):
        spread = result["normalised"][variant]["spread"] / max(result["normalised"]["ten"]["spread"], 1e-12)
        heights = (result["normalised"][variant]["std_ratio"], spread)
        axes.bar([j + 0.25 * (i - 1) for j in range(2)], heights, 0.25, color=_COLOURS[variant], label=_TITLES[variant])
    axes.set(title="size and spread of the answers", xticks=range(2), xticklabels=names)
    axes.legend()


def _plot_latency(axes: Axes, result: dict[str, Any]) -> None:
    axes.set(title="latency of a chunk, ms (p95 as a line)")
    if result["latency_ms"] is None:
        axes.text(0.5, 0.5, "not measured", ha="center")
        return
    medians = [result["latency_ms"][variant]["median"] for variant in _VARIANTS]
    above = [max(result["latency_ms"][variant]["p95"] - m, 0) for variant, m in zip(_VARIANTS, medians, strict=True)]
    colours = [_COLOURS[variant] for variant in _VARIANTS]
    axes.bar([_TITLES[variant] for variant in _VARIANTS], medians, yerr=[[0] * 3, above], color=colours)
