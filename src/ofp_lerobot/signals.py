"""Ending at a signal as an exception would, so that what is held is closed and what is half made is removed."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_sigterm(status: int = 128 + signal.SIGTERM) -> Iterator[None]:
    """Within, the first SIGTERM raises SystemExit(status). Later ones would break off clearing up: ignored."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(status)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
