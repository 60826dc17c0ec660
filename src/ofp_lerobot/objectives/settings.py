"""The objectives' settings, declared once: a policy's configuration is a `Settings`, whose fields are its flags."""

from dataclasses import dataclass, field

from ..errors import within


@dataclass
class OFPPaperSettings:
    """Of `ofp_paper` alone."""

    consistency_weight: float = 0.5  # λ_c
    guidance_weight: float = 0.01  # λ_g, from the end of the contraction on
    condition_dropout: float = 0.1  # p_drop, in the flow term; it trains the velocity without condition
    contraction_start: float = 0.25  # ρ at step 0 ...
    contraction_end: float = 0.05  # ... and from step `contraction_steps` on
    contraction_steps: int = 15_000  # optimizer steps; half of the run is a sound value

    def check(self) -> None:
        """Raises ValueError where one is out of range or contradicts another."""
        within("ofp_paper.consistency_weight", self.consistency_weight, 0)
        within("ofp_paper.guidance_weight", self.guidance_weight, 0)
        within("ofp_paper.condition_dropout", self.condition_dropout, 0, 1)
        within("ofp_paper.contraction_start", self.contraction_start, 0, 1)
        within("ofp_paper.contraction_end", self.contraction_end, 0, 1)
        within("ofp_paper.contraction_steps", self.contraction_steps, 0)
        if self.guidance_weight > 0 and self.condition_dropout == 0:
            raise ValueError(
                "ofp_paper.guidance_weight > 0 needs the velocity without condition, which condition_dropout=0 never "
                "trains: set ofp_paper.condition_dropout=0.1 or ofp_paper.guidance_weight=0"
            )


@dataclass
class Settings:
    """What can be set about the objectives. Each reads its own; a rival's constants stand in its file."""

    # Of `ofp`: λ_c, and the noise τ to which one-step targets are renoised before the teacher denoises them (0: off;
    # measured: docs/evidence.md).
    consistency_weight: float = 0.5
    sharpening_noise: float = 0.5
    ofp_paper: OFPPaperSettings = field(default_factory=OFPPaperSettings)
    # Of every objective with a flow-matching term: its times, Beta(alpha, 1)·scale + offset; π₀.₅'s, under its names.
    time_sampling_beta_alpha: float = 1.5
    time_sampling_scale: float = 0.999
    time_sampling_offset: float = 0.001

    def check_settings(self) -> None:
        """Raises ValueError where one is out of range."""
        within("consistency_weight", self.consistency_weight, 0)
        within("sharpening_noise", self.sharpening_noise, 0, 0.9)  # at 1 every target is the mean
        within("time_sampling_beta_alpha", self.time_sampling_beta_alpha, 0.01)
        within("time_sampling_offset", self.time_sampling_offset, 0, 1)
        within("time_sampling_scale", self.time_sampling_scale, 0, 1 - self.time_sampling_offset)
        self.ofp_paper.check()
