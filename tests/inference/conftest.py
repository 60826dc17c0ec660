from tests.serving.conftest import ofp, ofp_pi0, ofp_smolvla, pi05

__all__ = ["ofp", "ofp_pi0", "ofp_smolvla", "pi05"]
