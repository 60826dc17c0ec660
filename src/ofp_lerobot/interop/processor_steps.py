"""Where checkpoints of version 0.1 name the steps that are now in `policies.ofp.processor_steps`."""

from ..policies.ofp.processor_steps import PillowResizeStep, PromptWithoutStateStep

__all__ = ["PillowResizeStep", "PromptWithoutStateStep"]
