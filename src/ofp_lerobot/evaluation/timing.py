"""The clock of every measurement."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from ..devices import synchronise


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, with what it queues on the device and nothing that was queued before."""
    synchronise(device)
    start = perf_counter()
    work()
    synchronise(device)
    return 1e3 * (perf_counter() - start)
