"""What a short visit to a GPU machine asks, most valuable first; each part is time-boxed and written at once.

    python -m benchmarks.speed.gpu --out outputs/gpu --deadline 420
    python -m benchmarks.speed.gpu --out outputs/gpu --parts build,training,compiled_ours,compiled_stock
    python -m benchmarks.speed.gpu --device cpu --preset cpu --dtype float32 --repeats 2 --out outputs/gpu   # rehearsal

A part that fails or runs out of time is noted and the next one runs. Policies are built on the device: on a CPU
4.1e9 random weights take minutes. Needs neither `datasets` nor a network.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from benchmarks.speed import pieces, timing
from benchmarks.speed.control import TASK, make_observation, our_step, stock_step
from benchmarks.speed.latency import DEPLOYED
from benchmarks.speed.presets import PI05, PRESETS, make_batch, make_ofp, make_stock
from benchmarks.speed.timing import difference
from benchmarks.speed.training import MODES, _ours, make_step
from ofp_lerobot.compat import released_names
from ofp_lerobot.evaluation.provenance import provenance
from ofp_lerobot.inference.policies import ServedPolicy
from ofp_lerobot.inference.session import Runner
from ofp_lerobot.policies.ofp.engine import Engine
from ofp_lerobot.policies.ofp.processor_ofp import make_ofp_pre_post_processors
from ofp_lerobot.policies.paligemma.small_tokenizer import build_tokenizer


class Visit:
    """The parts, what they share, and the report."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device
        self.cuda = self.device == "cuda"
        self.preset = PRESETS[arguments.preset]
        self.start = time.perf_counter()
        self.report: dict[str, Any] = {**provenance(self.device), "arguments": vars(arguments).copy()}

    def save(self) -> None:
        self.arguments.out.mkdir(parents=True, exist_ok=True)
        part = self.arguments.out / "gpu.json.part"
        part.write_text(json.dumps(self.report, indent=1, default=str))
        part.replace(self.arguments.out / "gpu.json")

    def build(self) -> dict[str, Any]:
        """Stock and ours with the same weights; ours with its engine, and without it the plain path."""
        start, arguments = time.perf_counter(), self.arguments
        torch.manual_seed(0)
        with torch.device(self.device):
            self.stock = make_stock(self.preset, self.device, dtype=arguments.dtype).eval()
            with torch.no_grad():
                for name, parameter in self.stock.named_parameters():
                    if "dense.weight" in name:  # silent at the start: give times a say
                        parameter.normal_(std=0.02)
            changes = {"dtype": arguments.dtype, "bfloat16_rotary": arguments.dtype == "bfloat16", **DEPLOYED}
            self.ours = make_ofp(self.preset, self.device, inference_engine=True, **changes).eval()
        self.ours.load_state_dict({**self.ours.state_dict(), **released_names(self.stock.state_dict())})
        self.engine = self.ours.engine
        self.noise = torch.randn(1, self.preset.horizon, 32, device=self.device)
        self.batches = {text: self.batch(text) for text in (self.preset.real_text, self.preset.text)}
        found = {"s": time.perf_counter() - start}
        return found | ({"gb": torch.cuda.memory_allocated() / 1e9} if self.cuda else {})

    def batch(self, text: int, seed: int = 0) -> dict[str, Any]:
        return make_batch(replace(self.preset, real_text=text), 1, self.device, seed=seed)

    def ask(self, who: str, steps: int, batch: dict[str, Any] | None = None, sampler: str | None = None) -> Tensor:
        """Actions on the host. who: stock, plain, engine."""
        batch = self.batches[self.preset.text] if batch is None else batch
        if who == "stock":
            self.stock.config.num_inference_steps, self.stock.model.sample_noise = steps, lambda *_: self.noise
            return self.stock.predict_action_chunk(batch).cpu()
        self.ours.engine = self.engine if who == "engine" else None
        self.ours.config.num_inference_steps = steps
        self.ours.config.sampler = sampler or ("euler" if steps == 10 else "flow_map")
        return self.ours.predict_action_chunk(batch, noise=self.noise).cpu()

    # Parts

    def machine(self) -> dict[str, Any]:
        """What it is and its two ceilings."""
        if not self.cuda:
            return {}
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        x, y = torch.randn(2 << 29, device="cuda"), torch.empty(2 << 29, device="cuda")
        return {
            "cudnn": torch.backends.cudnn.version(),
            "memory_gb": [size / 1e9 for size in torch.cuda.mem_get_info()],
            "matmul_tflops": 2 * 8192**3 / timing.device_ms(lambda: a @ b) / 1e9,
            "copy_tbps": 2 * x.numel() * 4 / timing.device_ms(lambda: y.copy_(x)) / 1e9,
        }

    def tests(self) -> dict[str, Any]:
        """The project's GPU tests, and the kernels' tests on the GPU."""
        if not self.cuda:
            return {}
        found: dict[str, Any] = {}
        where = {"gpu": ["-m", "gpu", "tests/policies"], "kernels": ["tests/policies/engine/test_operations.py"]}
        for name, which in where.items():
            more = ["-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "-k", "not compiled"]
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
            command = [sys.executable, "-m", "pytest", *which, *more]
            try:
                done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110)
                output, code = done.stdout + done.stderr, done.returncode
            except subprocess.TimeoutExpired as error:
                output, code = str(error.stdout or b"", "utf8", "replace"), 124
            (self.arguments.out / f"pytest_{name}.log").write_text(output)
            found[name] = {"rc": code, "tail": output[-2000:]}
        return found

    def correct(self) -> dict[str, Any]:
        """To stock, engine to plain, replays to themselves, other texts, bytes of a camera's size."""
        found: dict[str, Any] = {}
        start = time.perf_counter()
        self.ask("engine", 1)
        found["ready_s"] = time.perf_counter() - start  # all text lengths recorded
        found["replays_equal"] = bool(torch.equal(self.ask("engine", 1), self.ask("engine", 1)))
        expected = self.ask("stock", 10)
        found["stock_10_plain"] = difference(self.ask("plain", 10), expected)
        found["stock_10_engine"] = difference(self.ask("engine", 10), expected)
        for text in (1, self.preset.real_text, self.preset.text):
            batch = self.batch(text, seed=text)
            found[f"engine_plain_text_{text}"] = difference(self.ask("engine", 1, batch), self.ask("plain", 1, batch))
        raw = dict(self.batches[self.preset.text])
        for key in self.ours.config.image_features:
            raw[key] = torch.randint(0, 256, (1, 480, 640, 3), dtype=torch.uint8)
        found["engine_plain_bytes"] = difference(self.ask("engine", 1, raw), self.ask("plain", 1, raw))
        return found

    def latency(self) -> dict[str, Any]:
        """From a preprocessed batch to actions on the host, by turns."""
        found: dict[str, Any] = {}
        for text, batch in self.batches.items():
            runs = {f"{who}, {k}": partial(self.ask, who, k, batch) for who in WHO for k in (1, 2, 10)}
            times = timing.take_turns(runs, self.device, self.arguments.repeats)
            rows: dict[str, Any] = timing.summarise(times)
            for other in ("stock, 1", "stock, 10", "plain, 1"):
                ratios = [a / b for a, b in zip(times[other], times["engine, 1"], strict=True)]
                rows[f"{other} over engine, 1"] = statistics.median(ratios)
            found[f"text {text}"] = rows
        return found

    def draws(self) -> dict[str, Any]:
        """One evaluation of several draws at once (`test_time_samples`), of which the densest answers, by turns."""
        self.ours.engine, batch = self.engine, self.batches[self.preset.text]

        def answer(k: int) -> Tensor:
            config = self.ours.config
            config.num_inference_steps, config.sampler, config.test_time_samples = 1, "flow_map", k
            return self.ours.predict_action_chunk(batch, noise=self.noise.expand(k, -1, -1).contiguous()).cpu()

        counts = (1, *DRAWS)
        try:
            equal = {f"{k} equal draws over one": difference(answer(k), answer(1)) for k in DRAWS}
            times = timing.take_turns({f"{k}": partial(answer, k) for k in counts}, self.device, self.arguments.repeats)
        finally:
            self.ours.config.test_time_samples = 1
        ratios = {
            f"{k} over one": statistics.median([a / b for a, b in zip(times[f"{k}"], times["1"], strict=True)])
            for k in DRAWS
        }
        return {"rows": timing.summarise(times), **ratios, **equal}

    def replay(self) -> dict[str, Any]:
        """The graphs alone, on the device's clock, and their kernels."""
        if not self.cuda:
            return {}
        found: dict[str, Any] = {}
        for shape, graphs in self.engine._graphs.items():
            for text, graph in graphs.items():
                image = tuple(shape.images[0][0])
                name = f"{len(shape.images)} images {image}, {shape.steps} steps, {text} text tokens"
                found[name] = timing.device_ms(graph._graph.replay)
        return {**found, "one step": timing.kernels_of(partial(self.ask, "engine", 1))}

    def eight_bits(self) -> dict[str, Any]:
        """FP8's time, beside bfloat16's in blocks A B B A, and its error on random weights."""
        exact, eight = self.engine, Engine(self.ours.model, fp8=True)
        times: dict[str, list[float]] = {"bf16": [], "fp8": []}
        answers: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        try:
            for name in ("bf16", "fp8", "fp8", "bf16"):  # taking turns, two engines would rebuild each other's weights
                self.engine = exact if name == "bf16" else eight
                answers[name] = self.ask("engine", 1)
                times[name] += timing.take_turns(
                    {name: partial(self.ask, "engine", 1)}, self.device, self.arguments.repeats
                )[name]
            found["rows"] = timing.summarise(times)
            found["error, one step"] = difference(answers["fp8"], answers["bf16"])
            self.engine = eight
            found["error, ten steps"] = difference(self.ask("engine", 10), self.ask("plain", 10))
            found["one step"] = timing.kernels_of(partial(self.ask, "engine", 1)) if self.cuda else {}
        finally:
            self.engine = exact
        return found

    def control(self) -> dict[str, Any]:
        """The whole control step, from camera images on the host to actions on the host."""
        self.ours.engine, config, size = self.engine, self.ours.config, self.preset.action_dim
        quantiles = {n: {"q01": -torch.ones(size), "q99": torch.ones(size)} for n in (OBS_STATE, ACTION)}
        with tempfile.TemporaryDirectory() as directory:
            build_tokenizer(directory, [TASK])
            config.tokenizer_name, config.tokenizer_max_length = directory, self.preset.text
            processors = make_ofp_pre_post_processors(config, quantiles)
        stock, ours = (ServedPolicy("random", policy, *processors) for policy in (self.stock, self.ours))
        runner, parts = Runner(ours), {1: [], 10: []}  # type: ignore[var-annotated]
        runs: dict[str, Callable[[Any], Any]] = {}
        for k in parts:
            runs[f"stock, {k}"] = partial(stock_step, stock, k, self.noise)
            runs[f"ours, {k}"] = partial(our_step, runner, k, self.noise, parts[k])
        observation = make_observation(self.preset, 0)
        a, b = (torch.as_tensor(runs[name](observation)) for name in ("ours, 10", "stock, 10"))
        bound = {name: partial(run, observation) for name, run in runs.items()}
        times = timing.take_turns(bound, self.device, self.arguments.repeats)
        around = {f"ours, {k}": statistics.median(values[2:]) for k, values in parts.items()}
        return {"difference": difference(a, b), "rows": timing.summarise(times), "not_network_ms": around}

    def training(self) -> dict[str, Any]:
        """A step's time and peak, each side alone in memory, so that an 80 GB card has room."""
        for name in ("stock", "ours", "engine"):
            self.__dict__.pop(name, None)
        found: dict[str, Any] = {}
        for mode, changes in MODES.items():
            for side in ("ours", "stock"):
                found[f"{mode}, {side}"] = self._train(side, changes)
                self.report["training so far"] = found
                self.save()
            both = [found[f"{mode}, {side}"].get("median_ms") for side in ("ours", "stock")]
            if all(both):
                found[f"{mode}, ratio"] = both[0] / both[1]
        return found

    def _train(self, side: str, changes: dict[str, Any]) -> dict[str, Any]:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = make_batch(self.preset, self.arguments.train_batch, self.device)
        settings = {"dtype": self.arguments.dtype, **changes}
        try:
            with torch.device(self.device):
                if side == "ours":
                    policy = _ours(self.preset, self.device, settings)
                else:
                    policy = make_stock(self.preset, self.device, **settings)
            step = make_step(policy, batch)
            times = timing.take_turns({side: step}, self.device, self.arguments.repeats)
        except torch.OutOfMemoryError as error:
            return {"error": repr(error)[:200]}
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None
        return {**timing.summarise(times)[side], "batch": self.arguments.train_batch, "peak_gb": peak}

    def compiled(self, who: str) -> dict[str, Any]:
        """torch.compile's default mode ("max-autotune" of stock did not end in 460 s on an H200)."""
        found: dict[str, Any] = {}
        precision, plain_program, engine = (
            torch.get_float32_matmul_precision(),
            self.stock.model.sample_actions,
            self.engine,
        )
        torch.set_float32_matmul_precision("high")  # as both sides' compile_model sets it
        try:
            if who == "stock":
                self.stock.model.sample_actions = torch.compile(plain_program, mode="default")
            else:
                self.engine = Engine(self.ours.model, compile_mode="default")
            for k in (1, 10) if who == "stock" else (1,):
                start = time.perf_counter()
                answer = self.ask(who, k)
                first = time.perf_counter() - start
                times = timing.take_turns({who: partial(self.ask, who, k)}, self.device, self.arguments.repeats)
                expected = self.ask("plain", k, sampler="euler" if who == "stock" else None)
                row = {"first_s": first, **timing.summarise(times)[who], "difference": difference(answer, expected)}
                found[f"{who}, {k}"] = self.report[f"compiled {who}, {k}, so far"] = row
                self.save()
        finally:
            self.stock.model.sample_actions, self.engine = plain_program, engine
            torch.set_float32_matmul_precision(precision)
        return found


WHO = ("stock", "plain", "engine")
DRAWS = (4, 8, 16)
# Expected seconds, and the part. Policies are built before the first that needs them.
PARTS: dict[str, tuple[int, Callable[[Visit], dict[str, Any]]]] = {
    "machine": (5, Visit.machine),
    "tests": (60, Visit.tests),
    "build": (5, Visit.build),
    "correct": (20, Visit.correct),
    "latency": (25, Visit.latency),
    "draws": (10, Visit.draws),
    "replay": (8, Visit.replay),
    "eight_bits": (15, Visit.eight_bits),
    "gradients": (8, lambda visit: pieces.gradients(visit.device)),
    "control": (12, Visit.control),
    "products": (10, lambda visit: pieces.products() if visit.cuda else {}),
    "attention": (8, lambda visit: pieces.attention() if visit.cuda else {}),
    "element_wise": (5, lambda visit: pieces.element_wise() if visit.cuda else {}),
    "compiled_ours": (80, lambda visit: visit.compiled("engine")),
    "compiled_stock": (150, lambda visit: visit.compiled("stock")),
    "training": (70, Visit.training),
}


def _out_of_time(*_: Any) -> None:
    raise TimeoutError("out of time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="names, by default all; `build` before what asks")
    parser.add_argument("--deadline", type=float, default=500, help="seconds from the start")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=PI05, default="real")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--train-batch", type=int, default=4)
    arguments = parser.parse_args()
    names = arguments.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--parts: {', '.join(unknown)} unknown, there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: see CUDA_VISIBLE_DEVICES, or rehearse with --device cpu --preset cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(arguments)
    report = visit.report
    signal.signal(signal.SIGALRM, _out_of_time)
    for name in names:
        expected, part = PARTS[name]
        left = arguments.deadline - (time.perf_counter() - visit.start)
        if left < min(expected, 10):
            report[name] = f"left out: {left:.0f} s left"
            continue
        start = time.perf_counter()
        signal.alarm(max(1, int(left)))
        try:
            report[name] = part(visit)
        except Exception as error:  # the next part may still be had
            report[name] = {"error": repr(error)[:500], "traceback": traceback.format_exc()[-3000:]}
        signal.alarm(0)
        seconds = report.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        visit.save()
        print(f"== {name} {seconds} s\n{json.dumps(report[name], indent=1, default=str)[:4000]}", flush=True)
    visit.save()


if __name__ == "__main__":
    main()
