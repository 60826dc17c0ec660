"""A whole control step: from camera images on the host to actions on the host, ours against LeRobot's own loop.

    python -m benchmarks.speed.control --json outputs/control.json

Stock: `prepare_observation_for_inference`, the preprocessor, π₀.₅, the postprocessor. Ours: the session core that the
servers use, with the inference engine. Same random weights, processors, noise and images of a usual camera's size;
the ten-step answers are compared first. What is not network is the step's time less the policy's, per call.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.utils.constants import ACTION, OBS_STATE
from tqdm import tqdm

from benchmarks.speed.latency import TOLERANCE, make_policies
from benchmarks.speed.presets import PI05, PRESETS, Preset
from ofp_lerobot.evaluation.provenance import provenance
from ofp_lerobot.evaluation.timing import milliseconds
from ofp_lerobot.inference.policies import ServedPolicy
from ofp_lerobot.inference.session import Runner
from ofp_lerobot.policies.ofp.processor_ofp import make_ofp_pre_post_processors
from ofp_lerobot.policies.paligemma.small_tokenizer import build_tokenizer

CAMERA = (480, 640, 3)
TASK = "put the red block on the left plate"


def make_observation(preset: Preset, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    cameras = [f"observation.images.{i}" for i in range(preset.cameras)]
    return {
        **{key: rng.integers(0, 256, CAMERA, dtype=np.uint8) for key in cameras},
        OBS_STATE: rng.uniform(-1, 1, preset.action_dim).astype(np.float32),
    }


def stock_step(served: ServedPolicy, steps: int, noise: torch.Tensor, observation: dict[str, Any]) -> np.ndarray:
    policy: Any = served.policy
    policy.config.num_inference_steps = steps
    policy.model.sample_noise = lambda *_: noise
    batch = prepare_observation_for_inference(dict(observation), torch.device(policy.config.device), TASK)
    chunk = policy.predict_action_chunk(served.preprocessor(batch))
    return served.postprocessor(chunk)[0].numpy()


def our_step(
    runner: Runner, steps: int, noise: torch.Tensor, parts: list[float], observation: dict[str, Any]
) -> np.ndarray:
    config: Any = runner.served.config
    config.num_inference_steps, config.sampler = steps, "euler" if steps == 10 else "flow_map"
    answer = runner.session(seed=0).infer({**observation, "task": TASK}, noise[0])
    parts.append(answer.latency_ms - answer.network_ms)
    return answer.actions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PI05, default="cpu")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    preset, device = PRESETS[arguments.preset], arguments.device
    if device == "cpu":
        torch.set_num_threads(1)  # steadier than several on cores that others use too

    policies = make_policies(preset, device, arguments.dtype, compiled=False)
    config = policies["ours, engine"].config
    quantiles = {
        name: {"q01": -torch.ones(preset.action_dim), "q99": torch.ones(preset.action_dim)}
        for name in (OBS_STATE, ACTION)
    }
    with tempfile.TemporaryDirectory() as directory:
        build_tokenizer(directory, [TASK])
        config.tokenizer_name, config.tokenizer_max_length = directory, preset.text
        processors = make_ofp_pre_post_processors(config, quantiles)
    noise = torch.randn(1, preset.horizon, 32, device=device)
    runs: dict[str, Callable[[dict[str, Any]], np.ndarray]] = {}
    parts: dict[str, list[float]] = {}
    for steps in (1, 10):
        for name, policy in policies.items():
            served, row = ServedPolicy("random", policy, *processors), f"{name}, {steps}"
            if name == "stock":
                runs[row] = partial(stock_step, served, steps, noise)
            else:
                runs[row] = partial(our_step, Runner(served), steps, noise, parts.setdefault(row, []))

    observation = make_observation(preset, 0)
    expected, actual = (runs[name](observation) for name in ("stock, 10", "ours, engine, 10"))
    difference = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    print(f"{arguments.preset} on {device}, {arguments.dtype}: ten Euler steps differ from stock by {difference:.1e}")
    if not difference <= TOLERANCE[arguments.dtype]:
        raise SystemExit(f"more than {TOLERANCE[arguments.dtype]}: nothing measured")
    for run in runs.values():
        run(observation)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for found in parts.values():
        found.clear()
    for turn in tqdm(range(arguments.repeats), desc="turns"):
        observation = make_observation(preset, turn)
        for name, run in runs.items():
            times[name].append(milliseconds(partial(run, observation), torch.device(device)))
    rows = {
        name: {
            "median_ms": statistics.median(values),
            "range_ms": [min(values), max(values)],
            "not_network_ms": statistics.median(parts[name]) if name in parts else None,
        }
        for name, values in times.items()
    }
    ratios = {
        name: statistics.median(b / a for a, b in zip(times["ours, engine, 1"], times[f"stock, {steps}"], strict=True))
        for name, steps in (("stock_1_step_over_ours", 1), ("stock_10_steps_over_ours", 10))
    }
    for name, row in rows.items():
        other = "" if row["not_network_ms"] is None else f"  not network {row['not_network_ms']:.2f} ms"
        print(f"  {name:20} {row['median_ms']:8.1f} ms [{row['range_ms'][0]:.1f}, {row['range_ms'][1]:.1f}]{other}")
    for name, value in ratios.items():
        print(f"  {name} {value:.2f}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(arguments, name) for name in ("preset", "device", "dtype", "repeats")}
        report = {**provenance(device), **settings, "difference": difference, "rows": rows, "ratios": ratios}
        arguments.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
