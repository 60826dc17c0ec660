"""Names that LeRobot's own policies have for settings of ours; loads nothing."""

STOCK_SMOLVLA_STEPS = "num_steps"
"""SmolVLA's name of `num_inference_steps`."""
