"""What is said where a training begins: settings that are allowed and hardly meant."""

import logging
from typing import Any

from ..objectives import OBJECTIVES
from .asked import training_steps
from .training_state import resumed_from

logger = logging.getLogger(__name__)


def tell_before_training(config: Any) -> None:
    """Warns of them. config: a policy's."""
    _tell_how_it_will_act(config)
    _tell_of_guidance_too_late(config)


def _tell_how_it_will_act(config: Any) -> None:
    """Warns where the trained policy would not answer in the way that its objective trains."""
    objective = OBJECTIVES[config.objective]
    if objective.uses_target_time and config.sampler == "euler":
        logger.warning(
            "the policy will act by sampler=euler, which does not use the average velocities that objective=%s trains: "
            "set --policy.sampler=flow_map --policy.num_inference_steps=%d",
            config.objective,
            objective.steps,
        )
    elif config.num_inference_steps == 1 < objective.steps:
        logger.warning(
            "the policy will act in 1 of Euler's steps, which objective=%s does not train: set "
            "--policy.num_inference_steps=%d",
            config.objective,
            objective.steps,
        )


def _tell_of_guidance_too_late(config: Any) -> None:
    """Warns where a run of the paper's form ends before its guidance begins."""
    paper, steps = config.ofp_paper, training_steps(resumed_from(config.pretrained_path))
    if config.objective == "ofp_paper" and paper.guidance_weight and steps and steps <= paper.contraction_steps:
        logger.warning(
            "the guidance of objective=ofp_paper begins after %d steps, and this run has %d: set "
            "--policy.ofp_paper.contraction_steps to less",
            paper.contraction_steps,
            steps,
        )
