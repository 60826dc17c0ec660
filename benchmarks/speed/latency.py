"""A chunk's latency, ours against stock LeRobot's with the same weights, noise and inputs; of π₀.₅, π₀ or SmolVLA.

    python -m benchmarks.speed.latency --json outputs/latency.json
    python -m benchmarks.speed.latency --preset smolvla --repeats 5

Operations are counted at real size (`counting.py`); times are measured at `--preset` on `--device`. All policies
first answer from the same noise, and the run ends if they differ. Then they are timed by turns in one process, each
from a preprocessed batch to actions on the host; ours cuts the padded text, as it does in use. On a CPU the time is
the process's own, on one thread, so that other load does not stretch it. `--compile` adds torch.compile of both sides
of π₀.₅, which takes minutes.

`smolvla` is SmolVLA's real size. Its 33 answers and two networks take about four minutes of one core, and 5 GB.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.speed.counting import Counts, count, fake_gpu, host_reads
from benchmarks.speed.presets import PRESETS, REAL, Preset, as_on_a_gpu, make_batch, make_ofp, make_stock
from benchmarks.speed.timing import milliseconds_here
from ofp_lerobot.compat import released_names
from ofp_lerobot.evaluation.provenance import provenance
from ofp_lerobot.flow_map.path import sample_chunk
from ofp_lerobot.policies.ofp.engine.graph import Inputs

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# What deployment needs: an image tower that no longer trains is stored as it computes.
DEPLOYED = {"freeze_vision_encoder": True}


def count_engine(preset: Preset) -> dict[str, Counts]:
    """Operations of one answer in bfloat16, batch 1; the engine's are recorded and start as one launch."""
    counts = {}
    with warnings.catch_warnings(), fake_gpu():
        warnings.simplefilter("ignore")  # of fake tensors
        with torch.device("cuda"):
            stock = make_stock(preset, "cpu", dtype="bfloat16")
            ours = make_ofp(preset, "cpu", dtype="bfloat16", inference_engine=True, **DEPLOYED)
        batch = make_batch(preset, 1, "cuda")
        engine = ours.engine
        assert engine is not None
        weights = engine._current_weights(torch.device("cpu"))
        assert weights is not None
        images = tuple((batch[key].shape, batch[key].dtype) for key in ours.config.image_features)
        for steps in (1, 10):
            stock.config.num_inference_steps = steps
            counts[f"stock, {steps}"] = count(lambda: stock.predict_action_chunk(batch))
            for text in (preset.text, preset.real_text):
                chunk = torch.Size((1, preset.horizon, ours.config.max_action_dim))
                inputs = Inputs.empty(images, text, chunk, steps, torch.device("cuda"))
                run = engine._program(weights, padding="right", instantaneous=False)
                counts[f"ours, engine, {steps}, {text} text tokens"] = count(partial(run, *inputs))
        inputs = Inputs.empty(images, preset.real_text, torch.Size((8, *chunk[1:])), 1, torch.device("cuda"))
        counts[f"ours, engine, 1, {preset.real_text} text tokens, 8 draws"] = count(partial(run, *inputs))
    return counts


def count_plain(stock: Any, ours: Any, batch: dict[str, Any], noise: Tensor) -> dict[str, Counts]:
    """Operations of one answer without an engine."""
    return {
        f"{name}, {steps}": count(partial(act, policy, batch, noise, steps))
        for steps in (1, 10)
        for name, policy, act in (("stock", stock, _stock_acts), ("ours, plain", ours, _we_act))
    }


def count_all(preset: Preset, policies: dict[str, Any], device: str) -> dict[str, Counts]:
    """Operations of one answer at real size, batch 1. policies: SmolVLA's have that size.

    They run, since SmolVLA's image tower picks by values, which fake tensors have not.
    """
    if preset.family == "pi05":
        return count_engine(REAL["pi05"])
    if preset.family == "pi0":
        return count_pi0(REAL["pi0"])
    with torch.no_grad():
        batch, noise = make_batch(preset, 1, device), torch.randn(1, preset.horizon, 32, device=device)
        return count_plain(policies["stock"], policies["ours, plain"], batch, noise)


def count_pi0(preset: Preset) -> dict[str, Counts]:
    """As `count_plain`, in bfloat16, batch 1, without weights."""
    with warnings.catch_warnings(), fake_gpu():
        warnings.simplefilter("ignore")  # of fake tensors
        with torch.device("cuda"):
            stock = make_stock(preset, "cpu", dtype="bfloat16")
            ours = make_ofp(preset, "cpu", dtype="bfloat16", **DEPLOYED)
        noise = torch.randn(1, preset.horizon, 32, device="cuda")
        return count_plain(stock, ours, make_batch(preset, 1, "cuda"), noise)


def _stock_acts(policy: Any, batch: dict[str, Any], noise: Tensor, steps: int) -> None:
    set_steps(policy.config, steps)
    policy.predict_action_chunk(dict(batch), noise=noise)


def _we_act(policy: Any, batch: dict[str, Any], noise: Tensor, steps: int) -> None:
    """Without the checks of an answer, which read values."""
    prefix = policy._for_all_steps(policy.model.encode(*policy.prepare_observation(batch)))
    sample_chunk(partial(policy.model, prefix), noise, steps=steps)


def set_steps(config: Any, steps: int) -> None:
    """Of either side."""
    setattr(config, "num_inference_steps" if hasattr(config, "num_inference_steps") else "num_steps", steps)


def answer(policy: Any, batch: dict[str, Any], noise: Tensor, steps: int, sampler: str | None = None) -> Tensor:
    """Actions on the host. sampler: ours alone has one."""
    set_steps(policy.config, steps)
    if sampler is not None:
        policy.config.sampler = sampler
        return policy.predict_action_chunk(batch, noise=noise).cpu()
    policy.model.sample_noise = lambda *_: noise
    return policy.predict_action_chunk(batch).cpu()


def memory_taken(run: Callable[[], Any]) -> int:
    """Bytes the first call takes on the GPU beside the weights: activations and, of the engine, its graphs' pool."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    run()
    return torch.cuda.memory_reserved() - before


def make_policies(preset: Preset, device: str, dtype: str, compiled: bool) -> dict[str, Any]:
    """By name, all with the same random weights."""
    torch.manual_seed(0)
    smolvla, engine = preset.family == "smolvla", preset.family == "pi05"
    typed = {} if smolvla else {"dtype": dtype}  # its weights have the checkpoint's, here float32
    stock = make_stock(preset, device, **typed).eval()
    with torch.no_grad():  # AdaRMS starts silent: give the time and the prefix a say
        for name, parameter in stock.named_parameters():
            if "dense.weight" in name:
                parameter.normal_(std=0.02)
    changes: dict[str, Any] = {**typed, **DEPLOYED}
    if not smolvla:
        changes["bfloat16_rotary"] = dtype == "bfloat16"
    # The modes LeRobot's and ours leave to the user; the default is "max-autotune".
    compiling = {"compile_model": True, "compile_mode": "default" if device == "cpu" else "max-autotune"}
    policies = {"stock": stock, "ours, plain": make_ofp(preset, device, **changes)}
    if engine:
        policies["ours, engine"] = make_ofp(preset, device, inference_engine=True, **changes)
    if compiled and engine:
        policies["stock, compiled"] = make_stock(preset, device, dtype=dtype, **compiling).eval()
        policies["stock, compiled"].load_state_dict(stock.state_dict())
        policies["ours, engine, compiled"] = make_ofp(preset, device, inference_engine=True, **compiling, **changes)
    branch = policies["ours, plain"].state_dict()
    for name, policy in policies.items():
        if name.startswith("ours"):
            policy.load_state_dict({**branch, **released_names(stock.state_dict())})
            policy.eval()
    return policies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    preset, device = PRESETS[arguments.preset], arguments.device
    if preset.family == "smolvla" and arguments.dtype != "float32":
        parser.error("SmolVLA has the dtype of its checkpoint, here float32")
    if device == "cpu":
        torch.set_num_threads(1)  # steadier than several on cores that others use too

    policies = make_policies(preset, device, arguments.dtype, arguments.compile)
    batch = make_batch(preset, arguments.batch, device)
    noise = torch.randn(arguments.batch, preset.horizon, 32, device=device)
    counts = count_all(preset, policies, device)
    print("counted for one answer at real size, batch 1")
    for name, row in counts.items():
        print(f"  {name:38} {row.launches:6} launches {row.flops / 1e12:6.3f} TFLOP {row.bytes / 1e9:6.1f} GB touched")

    print(f"\n{arguments.preset} on {device}, {arguments.dtype}, batch {arguments.batch}, torch {torch.__version__}")
    runs = {
        f"{name}, {steps}": partial(answer, policy, batch, noise, steps, sampler_of(name, steps))
        for name, policy in policies.items()
        for steps in preset.steps
    }
    differences = differences_from_stock(runs, answer(policies["stock"], batch, noise, 10))
    for name, difference in differences.items():
        print(f"  {name:24} ten Euler steps, same noise: relative difference to stock {difference:.1e}")
    if not max(differences.values()) <= TOLERANCE[arguments.dtype]:
        raise SystemExit(f"a difference of more than {TOLERANCE[arguments.dtype]}: nothing measured")

    rows, times = measure(runs, device, arguments.repeats)
    ratios, ratio_ranges = compare(times)
    for name, row in rows.items():
        low, high = row["range_ms"]
        taken = "" if row["memory_bytes"] is None else f"  {row['memory_bytes'] / 1e6:.0f} MB beside the weights"
        print(f"  {name:28} {row['median_ms']:8.1f} ms [{low:.1f}, {high:.1f}]  {row['host_reads']} host reads{taken}")
    for name, value in ratios.items():
        low, high = ratio_ranges[name]
        print(f"  {name} {value:.2f} [{low:.2f}, {high:.2f}]")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            **provenance(device),
            **{name: getattr(arguments, name) for name in ("preset", "device", "dtype", "batch", "repeats")},
            "differences": differences,
            "counts": {name: row._asdict() for name, row in counts.items()},
            "rows": rows,
            "ratios": ratios,
            "ratio_ranges": ratio_ranges,
        }
        arguments.json.write_text(json.dumps(report, indent=2))
        plot(rows, arguments.json.with_suffix(".png"))


def sampler_of(name: str, steps: int) -> str | None:
    """Of the policy called `name`; stock has no choice."""
    if not name.startswith("ours"):
        return None
    return "euler" if steps == 10 else "flow_map"


def differences_from_stock(runs: Mapping[str, Callable[[], Tensor]], expected: Tensor) -> dict[str, float]:
    """The relative difference of each policy's ten steps to stock's answer, `expected`."""
    answers = {name.removesuffix(", 10"): run() for name, run in runs.items() if name.endswith(", 10")}
    return {name: float((actual - expected).norm() / expected.norm()) for name, actual in answers.items()}


def measure(
    runs: Mapping[str, Callable[[], Tensor]], device: str, repeats: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """By name the numbers of a row, and the milliseconds of each of `repeats` turns, in which each runs once."""
    memory: dict[str, int | None] = dict.fromkeys(runs)
    for name, run in tqdm(runs.items(), desc="warm-up"):
        if device == "cuda":
            memory[name] = memory_taken(run)
        if device == "cuda" or "compiled" in name:  # else counting warms up
            run()
    with as_on_a_gpu():
        counted = tqdm([name for name in runs if "compiled" not in name], desc="host reads")
        reads = {name: host_reads(runs[name]) for name in counted}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in tqdm([*runs.items()] * repeats, desc="answers"):
        times[name].append(milliseconds_here(run, torch.device(device)))
    rows = {
        name: {
            "median_ms": statistics.median(values),
            "range_ms": [min(values), max(values)],
            "host_reads": reads.get(name),
            "memory_bytes": memory[name],
        }
        for name, values in times.items()
    }
    return rows, times


def compare(times: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """By name the median and the range, over the turns, of a ratio within a turn: other load strikes both its sides."""
    fastest = "ours, engine" if "ours, engine, 1" in times else "ours, plain"
    compared = {
        "stock_1_step_over_ours": ("stock, 1", f"{fastest}, 1"),
        "stock_10_steps_over_ours": ("stock, 10", f"{fastest}, 1"),
        "stock_10_steps_over_ours_10": ("stock, 10", f"{fastest}, 10"),
        "plain_1_step_over_engine": ("ours, plain, 1", "ours, engine, 1"),
        "compiled_stock_1_step_over_ours": ("stock, compiled, 1", f"{fastest}, 1"),
        "compiled_stock_10_steps_over_ours": ("stock, compiled, 10", f"{fastest}, 1"),
    }
    turns = {
        name: [a / b for a, b in zip(times[above], times[below], strict=True)]
        for name, (above, below) in compared.items()
        if above in times and below in times
    }
    ratios = {name: statistics.median(values) for name, values in turns.items()}
    return ratios, {name: [min(values), max(values)] for name, values in turns.items()}


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """One bar a row, with its range."""
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(rows) + 1))
    medians = [row["median_ms"] for row in rows.values()]
    low, high = ([row["range_ms"][side] for row in rows.values()] for side in (0, 1))
    errors = [[m - a for m, a in zip(medians, low, strict=True)], [b - m for m, b in zip(medians, high, strict=True)]]
    axes.barh(list(rows), medians, xerr=errors, color=["#888888" if "stock" in name else "#3366aa" for name in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per chunk (median, range)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
