"""Everything that a short visit to a GPU machine asks, most valuable first; each part is time-boxed and written at once.

    python -m benchmarks.speed.gpu --out $OUT --deadline 420                                   # first call
    python -m benchmarks.speed.gpu --out $OUT --deadline 480 --parts build,training,compiled_stock,compiled_ours
    python -m benchmarks.speed.gpu --device cpu --preset cpu --dtype float32 --repeats 2 --out outputs/gpu     # rehearsal

A part that fails or runs out of time is noted and the next one runs. Policies are built on the device: on a CPU
4.1e9 random weights take one to three minutes a policy.
"""

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed.latency import DEPLOYED
from benchmarks.speed.presets import PRESETS, make_batch, make_ofp, make_stock
from ofp_lerobot.evaluation.provenance import provenance
from ofp_lerobot.policies.ofp.engine import Engine
from ofp_lerobot.policies.ofp.engine.operations import Fused, Seen, quantise, scaled_linear

START = time.perf_counter()
A: Any = None  # arguments
CUDA = False
KEPT: dict[str, Any] = {}  # policies and inputs that parts share
REPORT: dict[str, Any] = {}


def save() -> None:
    A.out.mkdir(parents=True, exist_ok=True)
    part = A.out / "gpu.json.part"
    part.write_text(json.dumps(REPORT, indent=1, default=str))
    part.replace(A.out / "gpu.json")


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def clock(run: Callable[[], Any]) -> float:
    sync()
    start = time.perf_counter()
    run()
    sync()
    return 1e3 * (time.perf_counter() - start)


def device_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Per call by events, median of `repeats` calls queued without waiting."""
    for _ in range(3):
        run()
    if not CUDA:
        return statistics.median(clock(run) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    sync()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False))


def table(times: dict[str, list[float]]) -> dict[str, Any]:
    return {n: {"median_ms": statistics.median(v), "range_ms": [min(v), max(v)], "n": len(v)} for n, v in times.items()}


def policies() -> tuple[Any, Any, dict[str, Any], torch.Tensor]:
    """Stock and ours with the same weights, a batch, noise. Ours has an engine; without it, it is the plain path."""
    if not KEPT:
        preset = PRESETS[A.preset]
        torch.manual_seed(0)
        with torch.device(A.device):
            stock = make_stock(preset, A.device, dtype=A.dtype).eval()
            with torch.no_grad():
                for name, parameter in stock.named_parameters():
                    if "dense.weight" in name:
                        parameter.normal_(std=0.02)
            ours = make_ofp(preset, A.device, dtype=A.dtype, bfloat16_rotary=A.dtype == "bfloat16",
                            inference_engine=True, **DEPLOYED).eval()  # fmt: skip
        ours.load_state_dict({**ours.state_dict(), **stock.state_dict()})
        noise = torch.randn(1, preset.horizon, 32, device=A.device)
        KEPT.update(stock=stock, ours=ours, engine=ours._engine, batch=make_batch(preset, 1, A.device), noise=noise)
    return KEPT["stock"], KEPT["ours"], KEPT["batch"], KEPT["noise"]


def ask(who: str, steps: int, sampler: str = "", batch: Any = None, noise: Any = None) -> torch.Tensor:
    """Actions on the host. who: stock, plain, engine."""
    stock, ours, known_batch, known_noise = policies()
    batch, noise = known_batch if batch is None else batch, known_noise if noise is None else noise
    if who == "stock":
        stock.config.num_inference_steps, stock.model.sample_noise = steps, lambda *_: noise
        return stock.predict_action_chunk(batch).cpu()
    ours._engine = KEPT["engine"] if who == "engine" else None
    ours.config.num_inference_steps = steps
    ours.config.sampler = sampler or ("euler" if steps == 10 else "flow_map")
    return ours.predict_action_chunk(batch, noise=noise).cpu()


# Parts ---------------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What it is and its two ceilings; which attention backend is the default there."""
    if not CUDA:
        return {}
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "memory_gb": [x / 1e9 for x in torch.cuda.mem_get_info()],
        "CUDA_VISIBLE_DEVICES": __import__("os").environ.get("CUDA_VISIBLE_DEVICES"),
    }
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found["matmul_tflops"] = 2 * 8192**3 / device_ms(lambda: a @ b) / 1e9
    x, y = torch.randn(2 << 29, device="cuda"), torch.empty(2 << 29, device="cuda")
    found["copy_tbps"] = 2 * x.numel() * 4 / device_ms(lambda: y.copy_(x)) / 1e9
    return found


def tests() -> dict[str, Any]:
    """The project's own GPU tests: named files (others need packages that are not there), the GPU made visible."""
    env = {**__import__("os").environ, "CUDA_VISIBLE_DEVICES": "0"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider",
               "--durations=8", "tests/policies", "-k", "not compiled"]  # fmt: skip
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=110)
        output, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        output, code = str(error.stdout or b"", "utf8", "replace"), 124
    (A.out / "pytest.log").write_text(output)
    return {"rc": code, "tail": output[-3000:]}


def build() -> dict[str, Any]:
    took = clock(policies)
    return {"s": took / 1e3, "gb": torch.cuda.memory_allocated() / 1e9 if CUDA else None}


def correct() -> dict[str, Any]:
    """At real size: to stock, engine to plain, replays to themselves, other texts, bytes at a camera's size."""
    found: dict[str, Any] = {}
    preset = PRESETS[A.preset]
    free = torch.cuda.mem_get_info()[0] if CUDA else 0
    start = time.perf_counter()
    ask("engine", 1)
    found["first_answer_s"] = time.perf_counter() - start  # all text lengths recorded
    if CUDA:
        found["taken_gb_one_shape"] = (free - torch.cuda.mem_get_info()[0]) / 1e9
    found["replay_bitwise"] = bool(torch.equal(ask("engine", 1), ask("engine", 1)))
    expected = ask("stock", 10)
    found["stock_10_plain"] = difference(ask("plain", 10), expected)
    found["stock_10_engine"] = difference(ask("engine", 10), expected)
    for text in (1, preset.real_text, preset.text):
        from dataclasses import replace

        batch = make_batch(replace(preset, real_text=text), 1, A.device, seed=text)
        found[f"engine_plain_text_{text}"] = difference(ask("engine", 1, batch=batch), ask("plain", 1, batch=batch))
    raw = {**KEPT["batch"]}
    for key in KEPT["ours"].config.image_features:
        raw[key] = torch.randint(0, 256, (1, 480, 640, 3), dtype=torch.uint8)
    found["engine_plain_uint8_host"] = difference(ask("engine", 1, batch=raw), ask("plain", 1, batch=raw))
    return found


def latency() -> dict[str, Any]:
    runs = {f"{who}, {k}": (lambda w=who, k=k: ask(w, k)) for who in ("stock", "plain", "engine") for k in (1, 2, 10)}
    for run in runs.values():
        run(), run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(A.repeats):
        for name, run in runs.items():
            times[name].append(clock(run))
    found = {"rows": table(times)}
    for other in ("stock, 1", "stock, 10", "plain, 1"):
        pairs = zip(times[other], times["engine, 1"], strict=True)
        found[f"{other} over engine, 1"] = statistics.median(a / b for a, b in pairs)
    return found


def replay() -> dict[str, Any]:
    """The graphs alone, on the device's clock; and what surrounds them on the host."""
    found: dict[str, Any] = {}
    if not CUDA:
        return found
    engine = KEPT["engine"]
    for shape, graphs in engine._graphs.items():
        for text, graph in graphs.items():
            if shape.steps in (1, 2, 10) and text in (min(graphs), 64, max(graphs)):
                name = f"{len(shape.images)} images {tuple(shape.images[0][0])}, {shape.steps} steps, text {text}"
                found[name] = device_ms(graph._graph.replay)
    found["intact_ms"] = clock(lambda: [engine._weights.intact() for _ in range(20)]) / 20
    found.update(profile_once())
    return found


def profile_once() -> dict[str, Any]:
    """Kernels of one answer, by their device time."""
    found: dict[str, Any] = {}
    ask("engine", 1)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        ask("engine", 1)
        sync()
    rows = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profile.key_averages()]
    found["api"] = {k: n for k, n, _ in rows if k.startswith("cuda")}
    kernels = sorted((r for r in rows if r[2] > 0), key=lambda r: -r[2])
    found["kernel_ms"], found["kernels"] = sum(r[2] for r in kernels), sum(r[1] for r in kernels)
    found["top"] = [f"{ms:.3f} ms {n:4} x {k[:100]}" for k, n, ms in kernels[:48]]
    return found


def hazards() -> dict[str, Any]:
    """What tests do not ask of graphs: two shapes at once on two streams, eviction, another engine's release."""
    found: dict[str, Any] = {}
    if not CUDA:
        return found
    preset = PRESETS["cpu"]
    with torch.device("cuda"):
        one, two = (make_ofp(preset, "cuda", dtype="bfloat16", inference_engine=True, **DEPLOYED).eval() for _ in "ab")
    inputs = {}
    for b in (1, 4):
        batch = make_batch(preset, b, "cuda")
        inputs[b] = (*one._observe(batch), torch.randn(b, preset.horizon, 32, device="cuda"), [1.0, 0.0])
    call = lambda policy, b: policy._engine(*inputs[b], instantaneous=False)  # noqa: E731
    alone = {b: call(one, b).clone() for b in inputs}
    sync()
    streams, wrong = [torch.cuda.Stream() for _ in inputs], 0
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    answers = []
    for _ in range(100):
        for stream, b in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                answers.append((b, call(one, b)))
    sync()
    wrong = sum(not torch.equal(answer, alone[b]) for b, answer in answers)
    found["two_shapes_on_two_streams_wrong_of_200"] = wrong
    other = call(two, 1).clone()
    two._engine.release()
    gc.collect(), torch.cuda.empty_cache()
    junk = [torch.full((1 << 22,), float("nan"), device="cuda") for _ in range(64)]
    found["after_anothers_release"] = bool(torch.equal(call(one, 1), alone[1]))
    del junk
    for b in range(5, 14):  # nine shapes
        batch = make_batch(preset, b, "cuda")
        one._engine(*one._observe(batch), torch.randn(b, preset.horizon, 32, device="cuda"), [1.0, 0.0],
                    instantaneous=False)  # fmt: skip
    found["kept_shapes"] = len(one._engine._graphs)
    found["after_eviction"] = bool(torch.equal(call(one, 1), alone[1])) and bool(torch.equal(call(two, 1), other))
    return found


def graphed_ms(runs: list[Callable[[], Any]], replays: int = 7) -> float:
    """Device time of one of `runs`, recorded behind each other, so that neither launches nor a warm cache count."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runs[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [run() for run in runs]
    times = device_ms(graph.replay, replays)
    del kept
    return times / len(runs)


def pieces() -> dict[str, Any]:
    """Products in bfloat16 and FP8, attention by backend, the fused kernels: device time of each at real size."""
    found: dict[str, Any] = {}
    if not CUDA:
        return found
    many = 12

    def put(name: str, runs: Callable[[], list[Callable[[], Any]]]) -> None:
        try:
            found[name] = round(graphed_ms(runs()), 5)
        except Exception as error:
            found[name] = repr(error)[:120]
            torch.cuda.synchronize()

    def weights(n: int, k: int) -> list[torch.Tensor]:
        return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5 for _ in range(many)]

    shapes = {"prefix qkv": (968, 2560, 2048), "prefix o": (968, 2048, 2048), "prefix gate up": (968, 32768, 2048),
              "prefix down": (968, 2048, 16384), "vision qkv": (768, 3456, 1152), "vision out": (768, 1152, 1152),
              "vision fc1": (768, 4304, 1152), "vision fc2": (768, 1152, 4304), "expert qkv": (50, 2560, 1024),
              "expert gate up": (50, 8192, 1024), "expert down": (50, 1024, 4096), "expert o": (50, 1024, 2048)}  # fmt: skip
    for name, (m, n, k) in shapes.items():
        x, ws = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), weights(n, k)
        bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
        put(name, lambda: [lambda w=w: F.linear(x, w) for w in ws])
        if name.startswith("vision"):
            put(f"{name}, bias", lambda: [lambda w=w: F.linear(x, w, bias) for w in ws])
            put(
                f"{name}, bias, gelu",
                lambda: [lambda w=w: torch._addmm_activation(bias, x, w.t(), use_gelu=True) for w in ws],
            )
        if name in ("prefix gate up", "prefix down"):
            x8, eights = quantise(x), [quantise(w) for w in ws]
            put(f"{name}, fp8", lambda: [lambda w=w: scaled_linear(x8, w, torch.bfloat16) for w in eights])
            put(f"{name}, fp8 exact sums", lambda: [lambda w=w: torch._scaled_mm(x8.values, w.values.t(), x8.scale, w.scale.t(),
                out_dtype=torch.bfloat16) for w in eights])  # fmt: skip
            del eights
        del ws
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = Fused()

    def attention(name: str, h: int, q_len: int, kv: int, d: int, kv_heads: int) -> None:
        q = torch.randn(1, h, q_len, d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(1, kv_heads, kv, d, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        mask = torch.ones(1, 1, 1, kv, dtype=torch.bool, device="cuda")
        folded = q.reshape(1, kv_heads, -1, d)
        for masked in (None, mask):
            for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                label = (
                    f"{name}, {'masked' if masked is not None else 'whole'}, {backend.name if backend else 'default'}"
                )
                with sdpa_kernel(backend) if backend else nullcontext():
                    put(label, lambda: [lambda: F.scaled_dot_product_attention(folded, k, v, attn_mask=masked)] * many)
        if kv_heads == 1:
            kernels, out = fused._kernels, q.new_empty(1, q_len, h * d)
            lengths = torch.tensor([kv], dtype=torch.int32, device="cuda")
            rows = h * q_len
            for m, n, warps, stages, splits in A.attention:
                partial = torch.empty(1, splits, rows, d, device="cuda")
                top, total = torch.empty(1, splits, rows, device="cuda"), torch.empty(1, splits, rows, device="cuda")

                def run(m: int = m, n: int = n, warps: int = warps, stages: int = stages, splits: int = splits) -> None:
                    kernels.attend[(-(-rows // m), splits, 1)](
                        q, k, v, lengths, out, partial, top, total, h, q_len, d**-0.5 * kernels.LOG2_E,
                        k.stride(0), k.stride(1), k.stride(2), GROUP=h, D=d, BLOCK_M=m, BLOCK_N=n, SPLITS=splits,
                        num_warps=warps, num_stages=stages)  # fmt: skip
                    if splits > 1:
                        kernels.merge[(rows, 1)](
                            out, partial, top, total, h, q_len, GROUP=h, D=d, SPLITS=splits, num_warps=2
                        )

                put(f"{name}, triton {m}x{n} warps {warps} stages {stages} splits {splits}", lambda: [run] * many)

    attention("vision", 48, 256, 256, 72, 48)
    attention("prefix", 8, 968, 968, 256, 1)
    attention("suffix", 8, 50, 1018, 256, 1)
    kernels = fused._kernels
    gate_up = [torch.randn(968, 32768, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    out = torch.empty(968, 16384, device="cuda", dtype=torch.bfloat16)
    for block in (1024, 2048, 4096):
        for warps in (4, 8):
            put(f"gated gelu, block {block}, warps {warps}", lambda: [
                lambda g=g: kernels.gated_gelu[(968, 16384 // block)](g, out, 16384, BLOCK=block, num_warps=warps)
                for g in gate_up * 4])  # fmt: skip
    put("gated gelu fp8", lambda: [lambda g=g: fused.gated_gelu_fp8(g) for g in gate_up * 4])
    from ofp_lerobot.policies.ofp.engine.operations import Delta, Norm

    for rows, width, kind in ((968, 2048, "rms"), (768, 1152, "layer"), (50, 1024, "rms")):
        hidden, delta = (torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in "hd")
        norm = Norm(torch.randn(width, device="cuda"), torch.randn(width, device="cuda"), 1e-6, centred=kind == "layer")
        put(f"add norm {rows}x{width}", lambda: [
            lambda: fused.add_norm(hidden, Delta(delta), norm, torch.bfloat16)] * many)  # fmt: skip
    return found


def gradients() -> dict[str, Any]:
    """The backward pass of PyTorch's own choice under a mask, and of ours."""
    found: dict[str, Any] = {}
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from ofp_lerobot.policies.ofp.network import attend

    def both(length: int, d: int) -> None:
        """pytorch issue 196678: cuDNN's backward, masked, length % 128 == 64, strongly negative scores."""
        for choice in ("default", "cudnn", "ours"):
            q, k, v = (0.1 * torch.randn(1, h, length, d, device=A.device, dtype=torch.bfloat16) for h in (8, 1, 1))
            q[..., 0], k[..., 0] = 1.0, -120 * d**0.5
            q, k, v = (t.requires_grad_() for t in (q, k, v))
            mask = torch.ones(1, 1, 1, length, dtype=torch.bool, device=A.device)
            try:
                if choice == "ours":
                    attend(q, k, v, mask, d**-0.5, "sdpa").float().sum().backward()
                else:
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if choice == "cudnn" else nullcontext():
                        folded = q.reshape(1, 1, -1, d)
                        F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).float().sum().backward()
                found[f"finite, {length} keys, d {d}, {choice}"] = [
                    bool(torch.isfinite(t.grad).all()) for t in (q, k, v)
                ]
            except Exception as error:
                found[f"finite, {length} keys, d {d}, {choice}"] = repr(error)[:80]

    both(832, 256), both(968, 256), both(832, 64)
    return found


def eight_bits() -> dict[str, Any]:
    """FP8: its time beside bfloat16's in the same turns, and its error on random weights."""
    _, ours, _, _ = policies()
    plain_engine, KEPT["engine"] = KEPT["engine"], None
    engines = {"bf16": plain_engine, "fp8": Engine(ours.model, fp8=True)}
    times: dict[str, list[float]] = {name: [] for name in engines}
    answers = {}
    found: dict[str, Any] = {}
    try:
        for name in (*engines, *reversed(engines)):  # two engines of one network would build each other anew every turn
            KEPT["engine"] = engines[name]
            ask("engine", 1), ask("engine", 1)
            for _ in range(A.repeats):
                times[name].append(clock(lambda: answers.update({name: ask("engine", 1)})))  # noqa: B023
        found["rows"] = table(times)
        found["error"] = difference(answers["fp8"], answers["bf16"])
        KEPT["engine"] = engines["fp8"]
        found["error of ten steps"] = difference(ask("engine", 10), ask("plain", 10))
        found["kernels"] = profile_once()
    finally:
        KEPT["engine"] = plain_engine
    return found


def control() -> dict[str, Any]:
    """The control step by `benchmarks.control`'s own functions, on the policies that are there."""
    import tempfile
    from functools import partial

    from lerobot.utils.constants import ACTION, OBS_STATE

    from benchmarks.speed.control import TASK, make_observation, our_step, stock_step
    from ofp_lerobot.policies.ofp.processor_ofp import make_ofp_pre_post_processors
    from ofp_lerobot.inference.policies import ServedPolicy
    from ofp_lerobot.inference.session import Runner
    from ofp_lerobot.policies.ofp.small_tokenizer import build_tokenizer

    stock, ours, _, noise = policies()
    preset, config = PRESETS[A.preset], ours.config
    ours._engine = KEPT["engine"]
    quantiles = {
        n: {"q01": -torch.ones(preset.action_dim), "q99": torch.ones(preset.action_dim)} for n in (OBS_STATE, ACTION)
    }
    with tempfile.TemporaryDirectory() as directory:
        build_tokenizer(directory, [TASK])
        config.tokenizer_name, config.tokenizer_max_length = directory, preset.text
        processors = make_ofp_pre_post_processors(config, quantiles)
    parts: dict[str, list[float]] = {"ours, 1": [], "ours, 10": []}
    runs = {}
    for k in (1, 10):
        runs[f"stock, {k}"] = partial(stock_step, ServedPolicy("random", stock, *processors), k, noise)
        runs[f"ours, {k}"] = partial(
            our_step, Runner(ServedPolicy("random", ours, *processors)), k, noise, parts[f"ours, {k}"]
        )
    observation = make_observation(preset, 0)
    a, b = (torch.as_tensor(runs[n](observation)) for n in ("ours, 10", "stock, 10"))
    for run in runs.values():
        run(observation)
    for values in parts.values():
        values.clear()
    times: dict[str, list[float]] = {n: [] for n in runs}
    for turn in range(A.repeats):
        observation = make_observation(preset, turn)
        for name, run in runs.items():
            times[name].append(clock(lambda run=run: run(observation)))
    return {"difference": difference(a, b), "rows": table(times),
            "not_network_ms": {n: statistics.median(v) for n, v in parts.items()}}  # fmt: skip


def training() -> dict[str, Any]:
    """A step's time and peak, each side alone in memory, so that an 80 GB card has room; the ratio is of medians."""
    from benchmarks.speed.training import MODES, _ours, make_step

    KEPT.clear()
    found: dict[str, Any] = {}
    preset = PRESETS[A.preset]
    for batch_size in A.train_batches:
        for mode, changes in MODES.items():
            for side in ("ours", "stock"):
                gc.collect()
                if CUDA:
                    torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
                name = f"{mode}, {side}, batch {batch_size}"
                try:
                    batch = make_batch(preset, batch_size, A.device)
                    with torch.device(A.device):
                        policy = (_ours(preset, A.device, {"dtype": A.dtype, **changes}) if side == "ours"
                                  else make_stock(preset, A.device, dtype=A.dtype, **changes))  # fmt: skip
                    step = make_step(policy, batch)
                    step(), step()
                    times = [clock(step) for _ in range(A.repeats)]
                    peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else None
                    found[name] = {
                        "median_ms": statistics.median(times),
                        "range_ms": [min(times), max(times)],
                        "peak_gb": peak,
                    }
                except torch.OutOfMemoryError as error:
                    found[name] = repr(error)[:200]
                policy = step = None
                REPORT["training so far"] = found
                save()
                print("   ", name, found[name], flush=True)
            both = [found.get(f"{mode}, {side}, batch {batch_size}") for side in ("ours", "stock")]
            if all(isinstance(row, dict) for row in both):
                found[f"{mode}, ratio, batch {batch_size}"] = both[0]["median_ms"] / both[1]["median_ms"]  # type: ignore[index]
    return found


def _compiled(who: str, steps: tuple[int, ...], mode: str) -> dict[str, Any]:
    stock, ours, batch, noise = policies()
    found: dict[str, Any] = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as both sides' compile_model sets it
    plain_program = stock.model.sample_actions
    try:
        if who == "stock":
            stock.model.sample_actions = torch.compile(plain_program, mode=mode)
        else:
            KEPT["engine"] = Engine(ours.model, compile_mode=mode)
        for k in steps:
            name = "stock" if who == "stock" else "engine"
            start = time.perf_counter()
            answer = ask(name, k)
            first = time.perf_counter() - start
            ask(name, k), ask(name, k)
            times = [clock(lambda k=k: ask(name, k)) for _ in range(A.repeats)]
            found[f"{who}, {k}"] = {"first_s": first, "median_ms": statistics.median(times), "range_ms": [min(times), max(times)],
                                    "difference": difference(answer, ask("plain", k, "euler" if who == "stock" else ""))}  # fmt: skip
            REPORT[f"compiled {who} {mode} so far"] = found
            save()
            print("   ", f"{who}, {k}", found[f"{who}, {k}"], flush=True)
    finally:
        stock.model.sample_actions = plain_program
        torch.set_float32_matmul_precision(precision)
    return found


PARTS: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {  # expected seconds
    "machine": (5, machine),
    "tests": (60, tests),
    "build": (15, build),
    "correct": (40, correct),
    "latency": (20, latency),
    "replay": (8, replay),
    "hazards": (30, hazards),
    "control": (15, control),
    "gradients": (5, gradients),
    "eight_bits": (20, eight_bits),
    "pieces": (40, pieces),
    "compiled_ours_default": (70, lambda: _compiled("ours", (1,), "default")),
    # For a second call, in this order.
    "compiled_stock": (300, lambda: _compiled("stock", (1, 10), "default")),
    "compiled_ours": (100, lambda: _compiled("ours", (1,), "max-autotune")),
    "training": (70, training),
}
FIRST = [name for name in PARTS if name not in ("compiled_ours", "compiled_stock", "training")]


def _alarm(*_: Any) -> None:
    raise TimeoutError("out of time")


def main() -> None:
    global A, CUDA
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(FIRST))
    parser.add_argument("--deadline", type=float, default=500, help="seconds from the start")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=PRESETS, default="real")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--train-batches", type=lambda s: [int(x) for x in s.split(",")], default=[4])
    parser.add_argument("--attention", type=lambda s: [tuple(map(int, c.split(":"))) for c in s.split(",")],
                        default=[(64, 64, 4, 2, 1)], help="rows:keys:warps:stages:splits,... to try")  # fmt: skip
    A = parser.parse_args()
    CUDA = A.device == "cuda"
    if CUDA and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible")
    signal.signal(signal.SIGALRM, _alarm)
    REPORT.update(provenance(A.device), arguments=vars(A).copy())
    for name in A.parts.split(","):
        expected, part = PARTS[name]
        left = A.deadline - (time.perf_counter() - START)
        if left < min(expected, 10):
            REPORT[name] = f"left out: {left:.0f} s left"
            continue
        start = time.perf_counter()
        signal.alarm(max(1, int(left)))
        try:
            REPORT[name] = part()
        except (Exception, TimeoutError) as error:
            REPORT[name] = {"error": repr(error)[:500], "traceback": traceback.format_exc()[-3000:]}
        signal.alarm(0)
        REPORT.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        save()
        print(
            f"== {name} {REPORT['seconds'][name]} s\n{json.dumps(REPORT[name], indent=1, default=str)[:4000]}",
            flush=True,
        )
    save()


if __name__ == "__main__":
    main()
