"""The figure of the README and of docs/evidence.md, from the reports in `benchmarks/results`.

python -m benchmarks.figures
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.quality.metaworld.report import ANSWERING
from benchmarks.tables import CONDITIONS, ROOT, result

COLOURS = {"ofp": "#d1495b", "flow_matching": "#30638e"}
LABELS = {"ofp": "OFP", "flow_matching": "flow matching"}


def plot(path: Path) -> None:
    """Success against evaluations for each chunk, one panel for each kind of demonstrations."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(CONDITIONS), sharey=True)
    for condition, panel in zip(CONDITIONS, panels, strict=True):
        _draw(panel, result(f"metaworld_{condition}")["rows"])
        panel.set(title=f"{condition} demonstrations", xlabel="evaluations per chunk", xscale="log", ylim=(0, 1))
        panel.set_xticks([1, 2, 10], ["1", "2", "10"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("success")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def _draw(panel: Axes, rows: list[dict[str, Any]]) -> None:
    """Answers without a warm start; the colour says what was trained, the mark how it answers."""
    marks = (("plain", "o-", ""), ("less noise", "D:", ", half of the noise"))
    densest = (("densest of several", "*", ", densest of eight"),)
    for objective, colour in COLOURS.items():
        for answering, style, words in (*marks, *(densest if objective == "ofp" else ())):
            fits = ANSWERING[answering]
            curve = [row for row in rows if row["objective"] == objective and fits(row)]
            curve.sort(key=lambda row: row["steps"])
            success = [row["success"] for row in curve]
            error = [[abs(row["ci95"][end] - row["success"]) for row in curve] for end in (0, 1)]
            panel.errorbar(
                [row["steps"] for row in curve],
                success,
                yerr=error,
                fmt=style,
                color=colour,
                label=LABELS[objective] + words,
                markersize=11 if style == "*" else 5,
                capsize=2,
                elinewidth=0.8,
            )


if __name__ == "__main__":
    plot(ROOT / "docs" / "success.png")
