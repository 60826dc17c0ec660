"""Results of a run as rows, a table, paired differences and a plot."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ofp_lerobot.evaluation.environments.pillar import left_share
from ofp_lerobot.evaluation.statistics import bootstrap_interval, clustered_interval, wilson_interval
from ofp_lerobot.evaluation.tables import markdown_table
from ofp_lerobot.inference.sampling import Sampling

from ..objectives import name_of
from . import diffusion

KEYS = ("condition", "objective", "start", "sampler", "steps", "warm_start", "samples", "temperature")
Row = dict[str, Any]
# Points that one step may be behind flow matching's best, at the lower end of the interval.
LEAST = {"clean": -0.03, "noisy": -0.05, "styles": -0.05}
# How OFP answers, and which rows are meant.
ANSWERING: dict[str, Callable[[Row], bool]] = {
    "plain": lambda row: not row["warm_start"] and row["samples"] == 1 and row["temperature"] == 1,
    "warm start": lambda row: row["warm_start"] > 0,
    "densest of several": lambda row: row["samples"] > 1,
    "less noise": lambda row: row["temperature"] < 1,
}


def answering(sampling: Sampling) -> Row:
    """A row's keys for how it was answered."""
    return {key: getattr(sampling, key) for key in ("sampler", "steps", "warm_start", "samples", "temperature")}


def rows_of(results: Sequence[Row]) -> list[Row]:
    """One row per condition, policy and way of answering, over tasks and seeds.

    results: KEYS, task, seed, and what `evaluation.measure` found. `seed_spread` is the standard deviation of the mean
    success over seeds; `left` is the share that passed the pillar on that side, of the episodes that passed it;
    `solved` keeps every episode, by seed and task, for paired comparisons.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in KEYS), []).append(result)
    rows = []
    for key, group in groups.items():
        group = sorted(group, key=lambda result: (result["seed"], result["task"]))
        solved = [each for result in group for each in result["solved"]]
        low, high = wilson_interval(sum(solved), len(solved))
        seeds: dict[int, list[float]] = {}
        tasks: dict[str, list[float]] = {}
        for result in group:
            seeds.setdefault(result["seed"], []).append(float(np.mean(result["solved"])))
            tasks.setdefault(result["task"], []).append(float(np.mean(result["solved"])))
        means = [float(np.mean(each)) for each in seeds.values()]
        jumps = [result["jump"] for result in group if result["jump"] is not None]
        sides = [side for result in group for side in result.get("sides", ())]
        rows.append(
            {
                **dict(zip(KEYS, key, strict=True)),
                "success": round(float(np.mean(solved)), 4),
                "ci95": [round(low, 4), round(high, 4)],
                "episodes": len(solved),
                "seeds": len(seeds),
                "seed_spread": round(float(np.std(means, ddof=1)), 4) if len(means) > 1 else None,
                "energy_distance": round(float(np.mean([result["energy_distance"] for result in group])), 4),
                "spread": round(float(np.mean([result["spread"] for result in group])), 4),
                "jump": round(float(np.mean(jumps)), 4) if jumps else None,
                "left": left_share(sides),
                "by_task": {task: round(float(np.mean(each)), 3) for task, each in tasks.items()},
                "solved": {f"{result['seed']}/{result['task']}": result["solved"] for result in group},
            }
        )
    return rows


def pairs_of(a: Row, b: Row) -> dict[str, Any]:
    """success(a) − success(b) of each episode both met, by seed and task."""
    return {key: np.subtract(a["solved"][key], b["solved"][key]) for key in a["solved"] if key in b["solved"]}


def paired_difference(a: Row, b: Row) -> dict[str, float]:
    """`mean` of success(a) − success(b) over the episodes both met, `low` and `high` of its 95 % interval.

    Episodes share their start and, for as many samples, noise. The groups of `clustered_interval` are a seed's episodes
    of one task.
    """
    pairs = list(pairs_of(a, b).values())
    low, high = clustered_interval(pairs)
    return {"mean": float(np.mean([pair.mean() for pair in pairs])), "low": max(low, -1.0), "high": min(high, 1.0)}


def seed_differences(a: Row, b: Row) -> list[float]:
    """Mean of success(a) − success(b) with each training seed, whose tasks count alike."""
    seeds: dict[str, list[float]] = {}
    for key, pair in pairs_of(a, b).items():
        seeds.setdefault(key.partition("/")[0], []).append(float(pair.mean()))
    return [float(np.mean(tasks)) for tasks in seeds.values()]


def cells(rows: Sequence[Row]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The names of a table's columns and its lines."""
    names = (
        "data",
        "objective",
        "start",
        "steps",
        "warm",
        "samples",
        "noise",
        "success [95 %]",
        "± seeds",
        "energy distance",
        "spread",
        "jump",
        "left",
    )
    lines = []
    for row in rows:
        low, high = row["ci95"]
        seeds = "–" if row["seed_spread"] is None else f"{row['seed_spread']:.3f}"
        lines.append(
            (
                row["condition"],
                row["objective"],
                row["start"],
                f"{row['steps']} {row['sampler']}",
                f"{row['warm_start'] or '–'}",
                f"{row['samples']}",
                f"{row['temperature']:g}",
                f"{row['success']:.2f} [{low:.2f}, {high:.2f}]",
                seeds,
                f"{row['energy_distance']:.3f}",
                f"{row['spread']:.3f}",
                "–" if row["jump"] is None else f"{row['jump']:.3f}",
                "–" if row["left"] is None else f"{row['left']:.2f}",
            )
        )
    return names, lines


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    return "\n".join(markdown_table(*cells(rows)))


def differences(rows: Sequence[Row]) -> list[Row]:
    """One step of OFP, without a warm start, minus every other objective's rows on the same demonstrations.

    ours: objective with its settings, start, samples and noise temperature of OFP's; mean, low and high:
    `paired_difference`.
    """
    found = []
    for one in rows:
        if name_of(one["objective"]) != "ofp" or one["steps"] != 1 or one["warm_start"]:
            continue
        for other in rows:
            if name_of(other["objective"]) == "ofp" or other["condition"] != one["condition"]:
                continue
            if other["start"] != one["start"] and other["objective"] != diffusion.NAME:
                continue
            known = {key: other[key] for key in KEYS}
            ours = [one["objective"], one["start"], one["samples"], one["temperature"]]
            found.append({"ours": ours, **known, **paired_difference(one, other)})
    return found


def bars(rows: Sequence[Row]) -> list[Row]:
    """What must hold, of what was run.

    Each has `bar` (what OFP is compared with: "flow_matching", "ten_steps", "rival" or "one_step"; on styles also the
    bars of `styles_bars`), `objective` (OFP's, with its settings), `condition`, `answering` (a key of `ANSWERING`),
    `than` (KEYS of the row it is compared with), `what` in words, value, limit, whether it `holds`.

    One step of OFP with each of its settings, in each way of `ANSWERING`: against flow matching's best row of single
    answers, of any number of evaluations, warm start and noise; against its ten steps and the best rival's one,
    answered the same way; two steps against one.
    """
    objectives = dict.fromkeys(row["objective"] for row in rows if name_of(row["objective"]) == "ofp")
    conditions = dict.fromkeys(row["condition"] for row in rows)
    return [
        {**bar, "objective": objective, "condition": condition, "answering": answering}
        for condition, objective, answering in product(conditions, objectives, ANSWERING)
        for bar in _bars_of([row for row in rows if row["condition"] == condition], objective, answering)
    ]


def _bars_of(met: Sequence[Row], objective: str, answering: str) -> list[Row]:
    """Of one condition's rows, one of our objectives and one way of answering."""
    fits = ANSWERING[answering]
    ours = [row for row in met if row["objective"] == objective and fits(row)]
    one = _best([row for row in ours if row["steps"] == 1])
    if one is None:
        return []
    condition = one["condition"]
    name = f" ({objective.partition(':')[2]})" if ":" in objective else ""
    name += "" if answering == "plain" else f", {answering}"
    name += "" if condition == "clean" else f", on {condition} demonstrations"
    answers = [row for row in met if row["steps"] == 1 and fits(row)]
    flows = [row for row in met if row["objective"] == "flow_matching" and row["samples"] == 1]
    flow, ten = _best(flows), _best([row for row in flows if row["steps"] == 10 and fits(row)])
    rival = _best([row for row in answers if name_of(row["objective"]) not in ("ofp", "flow_matching")])
    two = _best([row for row in ours if row["steps"] == 2 and row["start"] == one["start"]])
    found = []
    if flow is not None:
        warm = ", warm start" if flow["warm_start"] else ""
        theirs = f"{flow['steps']} steps, noise times {flow['temperature']:g}{warm}"
        what = f"one step{name} - best flow matching ({theirs}), lower end"
        found.append(_check("flow_matching", what, one, flow, LEAST[condition], of="low"))
    if ten is not None:
        what = f"one step{name} - flow matching's ten, answered the same way, lower end"
        found.append(_check("ten_steps", what, one, ten, 0.0, of="low"))
    if rival is not None:
        found.append(_check("rival", f"one step{name} - best rival's ({rival['objective']})", one, rival, 0.0))
    if two is not None:
        found.append(_check("one_step", f"two steps{name} - one step", two, one, -0.03, reached=True))
    if condition == "styles":
        averaged = _best([row for row in flows if row["steps"] == 1 and fits(row)])
        found += styles_bars(name, one, averaged, ten)
    return found


def _best(group: Sequence[Row]) -> Row | None:
    return max(group, key=lambda row: row["success"], default=None)


def _check(bar: str, what: str, a: Row, b: Row, limit: float, *, of: str = "mean", reached: bool = False) -> Row:
    """Of the paired difference a − b; whether a `reached` limit is enough."""
    found = paired_difference(a, b)
    value = round(found[of], 9)
    holds = value > limit or (reached and value == limit)
    compared = {"bar": bar, "than": {key: b[key] for key in KEYS}}
    judged = {"value": value, "limit": limit, "holds": holds}
    return {"what": what, **compared, **judged, **found, "seeds": seed_differences(a, b)}


def styles_bars(name: str, one: Row, averaged: Row | None, ten: Row | None) -> list[Row]:
    """Whether averaging fails on styles ("averaging"), one step does not ("twice"), and both are kept ("styles").

    one: of OFP; averaged and ten: flow matching's one step and its ten.
    """
    found: list[Row] = []

    def add(bar: str, what: str, value: float, limit: float, holds: bool) -> None:
        numbers = {"value": value, "low": value, "high": value}
        found.append({"bar": bar, "what": what, "limit": limit, "holds": holds, **numbers})

    if averaged and ten:
        share = averaged["success"] / ten["success"] if ten["success"] else 1.0
        add("averaging", f"flow matching's one step{name} / its ten, at most", share, 0.5, share <= 0.5)
    if averaged:
        more = one["success"] - 2 * averaged["success"]
        add("twice", f"one step{name} - twice flow matching's", more, 0.0, more >= 0)
    if one["left"] is not None:
        rarer = min(one["left"], 1 - one["left"])
        add("styles", f"share of the rarer style, one step{name}", rarer, 0.35, rarer >= 0.35)
    return found


def speedups(timed: Sequence[Row], resamples: int = 10_000) -> list[Row]:
    """How many times as long as one evaluation, of `timed`, the others take: action passes alone, and whole chunks.

    Of the rounds' ratios the median and its 95 % interval, by a bootstrap over rounds (which takes them for
    independent: a load that lasts for several makes it too narrow).
    """
    (one,) = (row for row in timed if row["steps"] == 1)
    found = []
    for row, part in product(timed, ("action_pass", "chunk")):
        if row is one or not row[f"{part}_rounds"]:
            continue
        ratios = np.divide(row[f"{part}_rounds"], one[f"{part}_rounds"])
        low, high = bootstrap_interval(lambda drawn: np.median(drawn, axis=1), ratios, resamples=resamples)
        known = {"sampler": row["sampler"], "steps": row["steps"], "part": part}
        found.append({**known, "value": float(np.median(ratios)), "low": low, "high": high})
    return found


def speed_bar(found: Sequence[Row]) -> Row:
    """Of `speedups`: the passes of the flow policy, whose network is the same as every policy's here."""
    (passes,) = (each for each in found if each["sampler"] == "euler" and each["part"] == "action_pass")
    what = f"action passes of the flow policy's {passes['steps']} evaluations / of one"
    numbers = {key: passes[key] for key in ("value", "low", "high")}
    return {"what": what, "bar": "speed", "limit": 90.0, "holds": passes["value"] >= 90.0, **numbers}


def plot(report: Row, path: Path) -> None:
    """Success with its interval against evaluations, and against milliseconds, for each condition.

    One colour for an objective, one marker and line for a way of answering; on the left curves are moved aside by up to
    a tenth. Rivals without warm start and the densest of several, so that the curves can be told apart.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    times = {(row["sampler"], row["steps"], row["samples"]): row["chunk_ms"] for row in report["latency"]}
    conditions = sorted({row["condition"] for row in report["rows"]})
    objectives = list(dict.fromkeys(row["objective"] for row in report["rows"]))
    colours = dict(zip(objectives, colormaps["tab10"].colors, strict=False))
    figure = Figure(figsize=(11, 5 * len(conditions)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = np.array(figure.subplots(len(conditions), 2, sharey=True)).reshape(len(conditions), 2)
    for condition, (left, right) in zip(conditions, axes, strict=True):
        curves: dict[str, list[Row]] = {}
        for row in report["rows"]:
            drawn = row["objective"] in ("ofp", "flow_matching") or not (row["warm_start"] or row["samples"] > 1)
            if row["condition"] == condition and drawn:
                curves.setdefault(style_of(row)["label"], []).append(row)
        for place, rows in enumerate(curves.values()):
            rows = sorted(rows, key=lambda row: row["steps"])
            style = style_of(rows[0]) | {"color": colours[rows[0]["objective"]]}
            success = np.array([row["success"] for row in rows])
            error = np.abs(np.array([row["ci95"] for row in rows]).T - success)
            aside = 1.1 ** (2 * place / max(1, len(curves) - 1) - 1)  # or the intervals hide one another
            left.errorbar([row["steps"] * aside for row in rows], success, yerr=error, **style)
            right.errorbar(
                [times[row["sampler"], row["steps"], row["samples"]] for row in rows], success, yerr=error, **style
            )
        left.set(xscale="log", xlabel="evaluations per chunk", ylabel=f"success, {condition}", ylim=(0, 1))
        right.set(xscale="log", xlabel="milliseconds per chunk")
        steps = sorted({row["steps"] for row in report["rows"]})
        left.set_xticks(steps, [str(k) for k in steps])
        left.xaxis.set_minor_locator(NullLocator())
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_locator(NullLocator())
        for axis in (left, right):
            axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=120)


def style_of(row: Row) -> Row:
    """Of the curve a row belongs to: its label, one marker and line for a way of answering."""
    scratch, stock = row["start"] == "scratch", row["objective"] == diffusion.NAME
    temperature = row["temperature"]
    words = [
        row["objective"] + (f" ({row['sampler']})" if stock else "") + (" from scratch" if scratch else ""),
        *(["warm"] if row["warm_start"] else []),
        *([f"densest of {row['samples']}"] if row["samples"] > 1 else []),
        *([f"noise × {temperature:g}"] if temperature != 1 else []),
    ]
    style = "^--" if row["warm_start"] else "s" if row["samples"] > 1 else "D:" if temperature != 1 else "o-"
    faint = 0.6 if scratch and not stock else 1.0
    return {"label": ", ".join(words), "fmt": style, "alpha": faint, "markersize": 5, "capsize": 2, "elinewidth": 0.8}
