from tests.serving.conftest import ofp, pi05

__all__ = ["ofp", "pi05"]
