"""The fast inference path: the same answers as `OFPNetwork`, from fewer and larger operations."""

from .engine import Engine

__all__ = ["Engine"]
