"""A chunk's latency, ours against stock LeRobot's π₀.₅ with the same weights, noise and inputs.

    python -m benchmarks.latency --json outputs/latency.json

Both first answer from the same noise with ten Euler steps, and the run ends if they differ. Then they are timed by
turns in one process, each from a preprocessed batch to actions on the host; ours cuts the padded text, as it does in
use. Operator launches are those that reach PyTorch's dispatcher.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.presets import PRESETS, make_batch, make_ofp, make_stock

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
VIEWS = {"aten.view", "aten.transpose", "aten.unsqueeze", "aten.slice", "aten.expand", "aten.permute", "aten.t"}


class Launches(TorchDispatchMode):
    """Counts operators, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func.overloadpacket) not in VIEWS
        return func(*args, **(kwargs or {}))


def answer(policy: Any, batch: dict[str, Tensor], noise: Tensor, steps: int, sampler: str | None = None) -> Tensor:
    """Actions on the host. sampler: ours alone has one."""
    policy.config.num_inference_steps = steps
    if sampler is not None:
        policy.config.sampler = sampler
        return policy.predict_action_chunk(batch, noise=noise).cpu()
    policy.model.sample_noise = lambda *_: noise
    return policy.predict_action_chunk(batch).cpu()


def launches(run: Callable[[], Any]) -> int:
    with Launches() as counter:
        run()
    return counter.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    preset, device = PRESETS[arguments.preset], arguments.device

    torch.manual_seed(0)
    stock = make_stock(preset, device, dtype=arguments.dtype).eval()
    ours = make_ofp(preset, device, dtype=arguments.dtype, bfloat16_rotary=arguments.dtype == "bfloat16").eval()
    with torch.no_grad():  # AdaRMS starts silent: give the time and the prefix a say
        for name, parameter in stock.named_parameters():
            if "dense.weight" in name:
                parameter.normal_(std=0.02)
    ours.load_state_dict(stock.state_dict(), strict=False)
    batch = make_batch(preset, arguments.batch, device)
    noise = torch.randn(arguments.batch, preset.horizon, 32, device=device)

    expected = answer(stock, batch, noise, 10)
    difference = float((answer(ours, batch, noise, 10, "euler") - expected).norm() / expected.norm())
    print(f"{arguments.preset} on {device}, {arguments.dtype}, batch {arguments.batch}, torch {torch.__version__}")
    print(f"ten Euler steps, same noise: relative difference to stock {difference:.1e}")
    if not difference <= TOLERANCE[arguments.dtype]:
        raise SystemExit(f"differs by more than {TOLERANCE[arguments.dtype]}: nothing measured")

    runs: dict[str, Callable[[], Tensor]] = {
        "ours, 1 step": lambda: answer(ours, batch, noise, 1, "flow_map"),
        "ours, 2 steps": lambda: answer(ours, batch, noise, 2, "flow_map"),
        "ours, 10 steps": lambda: answer(ours, batch, noise, 10, "euler"),
        "stock, 1 step": lambda: answer(stock, batch, noise, 1),
        "stock, 10 steps": lambda: answer(stock, batch, noise, 10),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(arguments.repeats), desc="turns"):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    rows = {
        name: {
            "median_ms": statistics.median(values) * 1e3,
            "range_ms": [min(values) * 1e3, max(values) * 1e3],
            "launches": launches(runs[name]),
        }
        for name, values in times.items()
    }

    def ratio(name: str) -> float:
        return statistics.median(b / a for a, b in zip(times["ours, 1 step"], times[name], strict=True))

    ratios = {"stock_1_step_over_ours": ratio("stock, 1 step"), "stock_10_steps_over_ours": ratio("stock, 10 steps")}
    for name, row in rows.items():
        low, high = row["range_ms"]
        print(f"  {name:16} {row['median_ms']:8.1f} ms [{low:.1f}, {high:.1f}]  {row['launches']:6} launches")
    for name, value in ratios.items():
        print(f"  {name} {value:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        report = {**vars(arguments), "json": None, "difference": difference, "rows": rows, "ratios": ratios}
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
