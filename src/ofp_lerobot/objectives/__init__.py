"""Training objectives: one file and one function each, one signature for all (`base.Objective`)."""

from .base import Losses, Objective, Settings
from .flow_matching import flow_matching
from .ofp import ofp

OBJECTIVES: dict[str, Objective] = {
    "ofp": Objective(ofp, needs_teacher=True),
    "flow_matching": Objective(flow_matching, needs_teacher=False),
}

__all__ = ["OBJECTIVES", "Losses", "Objective", "Settings", "flow_matching", "ofp"]
