"""Clocks and differences that the benchmarks share."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ofp_lerobot.evaluation.timing import milliseconds


def difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖"""
    return float((a.double() - b.double()).norm() / b.double().norm())


def milliseconds_here(run: Callable[[], Any], device: torch.device) -> float:
    """What `run` takes: on a CPU the process's own time, which is the wall's on one thread where nothing else runs."""
    if device.type != "cpu":
        return milliseconds(run, device)
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def take_turns(runs: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run, `repeats` rounds of all, after two rounds that do not count."""
    for run in [*runs.values()] * 2:
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(milliseconds(run, torch.device(device)))
    return times


def summarise(times: dict[str, list[float]]) -> dict[str, Any]:
    return {n: {"median_ms": statistics.median(v), "range_ms": [min(v), max(v)], "n": len(v)} for n, v in times.items()}


def device_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Milliseconds a call by the GPU's own events: median of `repeats` calls queued without waiting."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def graphed_ms(runs: Sequence[Callable[[], Any]], replays: int = 7) -> float:
    """Device milliseconds of one of `runs`, recorded one behind the other.

    So neither launches count nor, where each reads weights of its own, a warm cache.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runs[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [run() for run in runs]
    taken = device_ms(graph.replay, replays) / len(runs)
    del kept
    return taken


def kernels_of(run: Callable[[], Any], most: int = 48) -> dict[str, Any]:
    """Calls of CUDA's interface, kernels and device milliseconds of one call, the longest kernels first."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.self_device_time_total / 1e3) for e in profile.key_averages()]
    kernels = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    return {
        "calls": {key: count for key, count, _ in rows if key.startswith("cuda")},
        "kernel_ms": sum(row[2] for row in kernels),
        "kernels": sum(row[1] for row in kernels),
        "longest": [f"{ms:.3f} ms {count:4} x {key[:100]}" for key, count, ms in kernels[:most]],
    }
