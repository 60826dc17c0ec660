"""Logging without waiting for the GPU."""

import torch
from torch import Tensor


class LaggingScalars:
    """Reads device scalars as Python numbers, on a GPU one call late, so that reading never stalls the device.

    The first call waits. All calls must give the same names.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._names: tuple[str, ...] = ()

    def read(self, scalars: dict[str, Tensor]) -> dict[str, float]:
        """Scalars on one device -> numbers. On a GPU those of the call before, the first time its own."""
        values = torch.stack([v.detach().float() for v in scalars.values()])
        if values.device.type != "cuda":
            return dict(zip(scalars, values.tolist(), strict=True))
        host = torch.empty(values.shape, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        previous, done = self._pending or (host, event)
        self._pending = (host, event)
        self._names = tuple(scalars)
        done.synchronize()
        return dict(zip(scalars, previous.tolist(), strict=True))

    def last(self) -> dict[str, float]:
        """Those of the last call, which waits for them; on a CPU, where it has returned them, none."""
        if self._pending is None:
            return {}
        values, done = self._pending
        done.synchronize()
        return dict(zip(self._names, values.tolist(), strict=True))
