"""The one-step objective inside openpi's own PyTorch trainer.

It runs in openpi's environment and imports nothing of LeRobot: put this repository's `src` on PYTHONPATH. openpi's
classes are extended from outside; its script `scripts/train_pytorch.py` runs unchanged (docs/openpi.md).

    from ofp_lerobot.interop import openpi_training
    openpi_training.install(action_dim=14)
    runpy.run_path("scripts/train_pytorch.py", run_name="__main__")

What it writes holds the target-time branch beside π₀.₅'s weights: `ofp-convert from-openpi --type ofp` reads it.
Times: t = 1 noise, t = 0 action, in openpi too.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from openpi.models_pytorch import pi0_pytorch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ..flow_map.ema import TEACHER_DECAY, Weights, copy_weights, update_ema
from ..flow_map.randomness import folded_generator
from ..objectives import OBJECTIVES, Settings

logger = logging.getLogger(__name__)

_BRANCH = "target_time_mlp"
_PERIODS = {"min_period": 4e-3, "max_period": 4.0}  # openpi's, of the time embedding


class OneStepPi0(pi0_pytorch.PI0Pytorch):
    """openpi's π₀.₅ with the target-time branch; `forward` is the one-step loss (b,).

    settings: of the objective `ofp`. action_dim: the robot's, None to train the padded dimensions too, as openpi does.
    first_step: where a resumed run goes on.
    """

    settings = Settings()
    action_dim: int | None = None
    first_step = 0

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if not self.pi05:
            raise ValueError("only π₀.₅ has the time condition: set Pi0Config(pi05=True)")
        if config.dtype == "bfloat16":
            logger.warning(
                "openpi trains bfloat16 weights without a float32 copy, and rounds most of AdamW's small steps to "
                "nothing: train with --pytorch_training_precision float32 where the memory is there"
            )
        width = self.time_mlp_in.in_features
        self.target_time_mlp_in, self.target_time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.target_time_mlp_out.weight)
        nn.init.zeros_(self.target_time_mlp_out.bias)
        self._branch: Tensor | None = None
        self.time_mlp_out.register_forward_hook(lambda _module, _inputs, out: self._joined(out))
        self.teacher_weights: Weights = {}
        self._step = self.first_step - 1

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """A plain π₀.₅ leaves the branch as it is: silent."""
        branch = {name: w for name, w in self.state_dict().items() if name.startswith(_BRANCH)}
        return super().load_state_dict({**branch, **state_dict}, *args, **kwargs)

    def gradient_checkpointing_enable(self) -> None:
        """Not of transformers' layers, which drop the prefix's cache when they recompute."""
        self.gradient_checkpointing_enabled = True

    def forward(self, observation: Any, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Loss (b,) of observation and actions (b, horizon, action_dim), as openpi's data loader gives them."""
        if self.training:
            self._advance()
        images, image_masks, tokens, token_masks, state = self._preprocess_observation(observation, train=self.training)
        prefix = self._encode(images, image_masks, tokens, token_masks)
        mask = torch.ones_like(actions, dtype=torch.bool)
        mask[..., self.action_dim :] = self.action_dim is None
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        losses = OBJECTIVES["ofp"].function(
            partial(self.velocity, state, *prefix),
            partial(self._teacher_velocity, state, *prefix),
            actions * mask,
            mask,
            self.settings,
            max(self._step, 0),
            folded_generator(actions.device, torch.initial_seed(), self._step + 1, rank),
        )
        return losses.loss

    def velocity(
        self,
        state: Tensor,
        pad_masks: Tensor,
        cache: Any,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Average velocity over [r, t], see flow_map.path.Velocity. pad_masks (b, l) and cache: the prefix's."""
        n, b = len(x_t), len(pad_masks)
        row = torch.arange(n, device=x_t.device) % b
        rows = DynamicCache()
        for layer in range(len(cache)):
            rows.update(cache[layer][0][row], cache[layer][1][row], layer)
        visible = pad_masks[row] if keep is None else pad_masks[row] & keep[:, None]
        embedded = pi0_pytorch.create_sinusoidal_pos_embedding(
            t - r, self.time_mlp_in.in_features, device=t.device, **_PERIODS
        )
        branch = self.target_time_mlp_out(F.silu(self.target_time_mlp_in(embedded.to(t.dtype))))
        with self._joining(branch):
            return self.denoise_step(state[row], visible, rows, x_t, t)

    def _encode(self, *observation: Any) -> tuple[Tensor, DynamicCache]:
        """The prefix's padding mask and its keys and values, once for every pass."""
        hidden, pad_masks, att_masks = self.embed_prefix(*observation)
        model = self.paligemma_with_expert.paligemma.language_model
        hidden = hidden.to(model.layers[0].self_attn.q_proj.weight.dtype)
        mask = self._prepare_attention_masks_4d(pi0_pytorch.make_att_2d_masks(pad_masks, att_masks))
        model.config._attn_implementation = "eager"
        _, cache = self.paligemma_with_expert.forward(
            attention_mask=mask,
            position_ids=torch.cumsum(pad_masks, dim=1) - 1,
            inputs_embeds=[hidden, None],
            use_cache=True,
        )
        return pad_masks, cache

    # The branch joins what time_mlp_out answers, before openpi's last SiLU

    def _joined(self, out: Tensor) -> Tensor:
        return out if self._branch is None else out + self._branch

    @contextmanager
    def _joining(self, branch: Tensor | None) -> Iterator[None]:
        before, self._branch = self._branch, branch
        try:
            yield
        finally:
            self._branch = before

    def _apply_checkpoint(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        branch = self._branch

        def again(*inputs: Any, **named: Any) -> Any:  # in the backward pass too, with the branch of this call
            with self._joining(branch):
                return func(*inputs, **named)

        return super()._apply_checkpoint(again, *args, **kwargs)

    # Teacher: openpi's PyTorch trainer keeps no moving average, and tells nobody of a step

    def student_weights(self) -> dict[str, Tensor]:
        """The trainable parameters of the action side, by name."""
        return {
            name: w
            for name, w in self.named_parameters()
            if w.requires_grad and not name.startswith("paligemma_with_expert.paligemma.")
        }

    def _advance(self) -> None:
        """Called when a training pass begins: an optimizer step lies behind, except before the first."""
        if self.teacher_weights:
            update_ema(self.teacher_weights, self.student_weights(), TEACHER_DECAY)
        else:
            self.teacher_weights = copy_weights(self.student_weights())
        self._step += 1

    def _teacher_velocity(self, state: Tensor, pad_masks: Tensor, cache: Any, *args: Any) -> Tensor:
        student = self.student_weights()
        weights = {f"model.{name}": w.to(student[name].dtype) for name, w in self.teacher_weights.items()}
        return torch.func.functional_call(_Velocity(self), weights, (state, pad_masks, cache, *args))


class _Velocity(nn.Module):
    """`OneStepPi0.velocity` as the forward pass of a module, for functional_call."""

    def __init__(self, model: OneStepPi0) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Tensor:
        return self.model.velocity(*args)


def install(
    *,
    action_dim: int | None = None,
    settings: Settings | None = None,
    first_step: int = 0,
) -> type[OneStepPi0]:
    """From now on openpi builds `OneStepPi0` with these settings, in its trainer and in `load_pytorch`."""
    settings = settings or Settings()
    settings.check_settings()
    kept = {"action_dim": action_dim, "settings": settings, "first_step": first_step}
    installed = type("OneStepPi0", (OneStepPi0,), kept)
    pi0_pytorch.PI0Pytorch = installed
    return installed
