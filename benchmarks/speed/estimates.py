"""What one answer takes on cards that nobody has measured: counted work, data-sheet rates, the H200's efficiency.

    python -m benchmarks.speed.estimates        # the table of docs/speed.md; nothing runs

An answer is the prefix (images and text, once) and its steps. The floor of each is the longer of computing and reading
(`floor_ms`). Measured on an H200, the prefix takes `slowdown` times its floor and a step `overhead_ms` beyond its own,
which is the start of its small kernels and does not depend on the card's rates. Other cards are taken to be the same.
"""

import json
from pathlib import Path
from typing import NamedTuple

from ofp_lerobot.evaluation.tables import markdown_table

RESULTS = Path(__file__).parents[1] / "results"


class Work(NamedTuple):
    """Of three cameras, 200 text tokens and 50 actions in bfloat16, batch 1: TFLOP and GB read."""

    tflop: float
    gigabytes: float


VISION = Work(0.661, 0.83)
PREFIX = Work(3.756, 3.75)
STEP = Work(0.039, 0.64)


class Card(NamedTuple):
    """By its data sheet: dense bfloat16 TFLOP/s (float32 sums), memory TB/s and GB. published: another engine's."""

    name: str
    tflops: float
    tbps: float
    memory: int
    published: str = "–"


H200 = Card("H200", 989, 4.8, 141)
CARDS = (
    Card("A100 80 GB", 312, 2.04, 80),
    Card("L40S", 362, 0.864, 48, "32 at one step (LeRobot, compiled)"),
    Card("RTX 5090", 209, 1.79, 32, "34 at ten (realtime-vla, no prompt)"),
    Card("RTX 4090", 165, 1.01, 24, "39 at ten (realtime-vla, no prompt)"),
    Card("Jetson Thor", 258, 0.273, 128, "132 at ten (TensorRT)"),
    Card("Jetson AGX Orin 64 GB", 42, 0.205, 64, "193 at ten (FlashRT)"),
)


def floor_ms(work: Work, card: Card) -> float:
    """The least time of this work on this card, in ms."""
    return max(work.tflop / card.tflops, work.gigabytes / 1e3 / card.tbps) * 1e3


def efficiency() -> tuple[float, float]:
    """slowdown, overhead_ms of the H200's measurement (`h200_engine.json`)."""
    rows = json.loads((RESULTS / "h200_engine.json").read_text())["latency"]["rows"]
    one, ten = (rows[f"engine, {steps}"]["median_ms"] for steps in (1, 10))
    step = (ten - one) / 9
    return (one - step) / (floor_ms(VISION, H200) + floor_ms(PREFIX, H200)), step - floor_ms(STEP, H200)


def estimate_ms(card: Card, steps: int) -> float:
    """One answer of `steps` evaluations, in ms."""
    slowdown, overhead = efficiency()
    prefix = slowdown * (floor_ms(VISION, card) + floor_ms(PREFIX, card))
    return prefix + steps * (floor_ms(STEP, card) + overhead)


def table() -> list[str]:
    """Markdown lines, one row a card."""
    head = ("card", "bf16 TFLOP/s", "TB/s", "memory, GB", "one step, ms", "ten steps, ms", "published by others, ms")
    rows = [
        (
            card.name,
            f"{card.tflops:g}",
            f"{card.tbps:g}",
            card.memory,
            f"{estimate_ms(card, 1):.0f}",
            f"{estimate_ms(card, 10):.0f}",
            card.published,
        )
        for card in CARDS
    ]
    return markdown_table(head, rows)


if __name__ == "__main__":
    slowdown, overhead = efficiency()
    print(f"H200: the prefix takes {slowdown:.2f} times its floor, a step {overhead:.2f} ms beyond its own\n")
    print("\n".join(table()))
