"""One-Step Flow Policy (arXiv 2603.12480) for π₀.₅ in LeRobot."""

__version__ = "0.1.0"
