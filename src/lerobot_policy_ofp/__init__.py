"""What LeRobot discovers: importing this registers the policy types, and loads no model code."""

from ofp_lerobot.policies.ofp.configuration_ofp import OFPConfig

__all__ = ["OFPConfig"]
