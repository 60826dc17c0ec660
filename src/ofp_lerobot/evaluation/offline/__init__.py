"""`ofp-check`: is one step as good as ten? Answered on recorded episodes, without a simulator or a robot."""

from .command import main

__all__ = ["main"]
