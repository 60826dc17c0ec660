"""SmolVLA's network split in two: `encode` (images, text and state, once per batch) and the velocity pass.

The prefix never attends to the actions, so its keys and values serve every pass. Modules, parameter names and
arithmetic are those of LeRobot's `VLAFlowMatching`, plus the target-time branch. Every second layer of the expert
attends to prefix and actions jointly; the others attend to the prefix alone, whose keys and values they project once
more. These projections are the expert's, the student's and the teacher's differ, so they belong to the velocity pass;
`project` makes them once for all passes of the same weights.
Shapes: b observations, n samples, k = n/b, l prefix tokens, s action steps, d head dimension.
Times: t = 1 noise, t = 0 action.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.policies.common.vla_utils import create_sinusoidal_pos_embedding
from lerobot.policies.smolvla.smolvlm_with_expert import SmolVLMWithExpertModel
from torch import Tensor, nn

from ...objectives import OBJECTIVES
from ..vla.attention import Prefix, attend, heads, mask_of_draws, pack, unpack
from .configuration_ofp_smolvla import OFPSmolVLAConfig

_ROTARY_PERIOD = 10_000  # SmolVLA's, whatever its VLM was trained with


class Rotary(NamedTuple):
    """cos and sin (n, 1, s, d) float32 of positions."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, position: Tensor, d: int) -> "Rotary":
        """position (n, s)."""
        exponent = torch.arange(d // 2, dtype=torch.float32, device=position.device) * (2.0 / d)
        angles = position[:, None, :, None].float() / _ROTARY_PERIOD**exponent
        angles = torch.cat([angles, angles], dim=-1)
        return cls(angles.cos(), angles.sin())

    def turn(self, x: Tensor) -> Tensor:
        """x (n, heads, s, d)."""
        return (x * self.cos + _half_turned(x) * self.sin).to(x.dtype)


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class SmolVLANetwork(nn.Module):
    """prefix = encode(images, image_mask, tokens, token_mask, state); u = forward(prefix, x_t, t, r, keep)."""

    def __init__(self, config: OFPSmolVLAConfig, *, with_weights: bool = True) -> None:
        super().__init__()
        self.vlm_with_expert = SmolVLMWithExpertModel(
            model_id=config.vlm_model_name,
            freeze_vision_encoder=config.freeze_vision_encoder,
            train_expert_only=config.train_expert_only,
            load_vlm_weights=config.load_vlm_weights and with_weights,
            attention_mode=config.attention_mode,
            num_expert_layers=config.num_expert_layers,
            num_vlm_layers=config.num_vlm_layers,
            self_attn_every_n_layers=config.self_attn_every_n_layers,
            expert_width_multiplier=config.expert_width_multiplier,
        )
        if self.vlm_with_expert.num_expert_layers != self.vlm_with_expert.num_vlm_layers:
            raise ValueError(
                "num_expert_layers must be the VLM's, since LeRobot's SmolVLA cannot act with fewer: set "
                "--policy.num_expert_layers=-1"
            )
        self.expert.float()  # made in the VLM's dtype, in which an optimizer's small steps round to nothing
        if not config.train_expert_only:
            self.vlm_with_expert.vlm.float()
        width = self.vlm_with_expert.expert_hidden_size
        self.state_proj = nn.Linear(config.max_state_dim, self.vlm_with_expert.config.text_config.hidden_size)
        self.action_in_proj = nn.Linear(config.max_action_dim, width)
        self.action_out_proj = nn.Linear(width, config.max_action_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.target_time_mlp_in = nn.Linear(width, width)
        self.target_time_mlp_out = nn.Linear(width, width)
        self.zero_target_time()
        self.state_proj.requires_grad_(config.train_state_proj)
        if not OBJECTIVES[config.objective].uses_target_time:  # plain SmolVLA: the branch would only learn a bias
            self.target_time_mlp_in.requires_grad_(False)
            self.target_time_mlp_out.requires_grad_(False)
        self.min_period, self.max_period = config.min_period, config.max_period
        self.image_tokens = config.add_image_special_tokens
        self.attention: Literal["sdpa", "eager"] = "sdpa"

    @property
    def vlm(self) -> Any:  # Any: torch types every submodule as Tensor | Module
        return self.vlm_with_expert.get_vlm_model()

    @property
    def expert(self) -> Any:
        return self.vlm_with_expert.lm_expert

    @property
    def vocabulary_size(self) -> int:
        return self.vlm.text_model.get_input_embeddings().num_embeddings

    @torch.no_grad()
    def zero_target_time(self) -> None:
        """The branch starts silent: the network is SmolVLA, for every t and r."""
        nn.init.zeros_(self.target_time_mlp_out.weight)
        nn.init.zeros_(self.target_time_mlp_out.bias)

    def encode(self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor, state: Tensor) -> Prefix:
        """Keys and values of the VLM over the prefix.

        images (b, cameras, 3, height, width) float32 in [-1, 1], present cameras only; image_mask (b, cameras) bool,
        False where a sample has no such image; tokens (b, text) long; token_mask (b, text) bool, False at padding;
        state (b, max_state_dim) float32. Images and text see each other; the state's token sees them, not they it.
        """
        seen, mask = self._embed_observation(images, image_mask, tokens, token_mask)
        state_token = self.state_proj(state)[:, None]
        dtype = torch.promote_types(seen.dtype, state_token.dtype)  # as LeRobot's torch.cat of them
        seen, state_token = seen.to(dtype), state_token.to(dtype)
        whole = F.pad(mask, (0, 1), value=True)
        rotary = Rotary.of(torch.cumsum(whole, dim=1) - 1, self._head_dim)
        if state_token.requires_grad and not seen.requires_grad:  # gradients through one token, not through all
            before = Rotary(rotary.cos[:, :, :-1], rotary.sin[:, :, :-1])
            last = Rotary(rotary.cos[:, :, -1:], rotary.sin[:, :, -1:])
            observed = self._run_vlm(seen, mask[:, None, None], before, None)
            return Prefix(*self._run_vlm(state_token, whole[:, None, None], last, observed), whole)
        causal = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool, device=whole.device)
        causal[:-1, -1] = False
        hidden = torch.cat([seen, state_token], dim=1)
        return Prefix(*self._run_vlm(hidden, whole[:, None, None] & causal, rotary, None), whole)

    @property
    def _head_dim(self) -> int:
        return self.vlm_with_expert.config.text_config.head_dim

    def _embed_observation(
        self, images: Tensor, image_mask: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Images and text as tokens (b, l, width), and which of them are there (b, l)."""
        both = self.vlm_with_expert
        patches = both.embed_image(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        scale = patches.shape[-1] ** 0.5
        patches = patches * torch.tensor(scale, dtype=patches.dtype, device=patches.device)
        mask = image_mask[:, :, None].expand(-1, -1, patches.shape[2])
        if self.image_tokens:
            around = both.processor.tokenizer  # as LeRobot, these are not scaled
            marks = tokens.new_tensor([around.fake_image_token_id, around.global_image_token_id])
            embedded = both.embed_language_tokens(marks).expand(*images.shape[:2], -1, -1)
            patches = torch.cat([embedded, patches, embedded[:, :, :1]], dim=2)
            mask = F.pad(mask, (2, 1), value=True)
        text = both.embed_language_tokens(tokens) * scale
        return torch.cat([patches.flatten(1, 2), text], dim=1), torch.cat([mask.flatten(1, 2), token_mask], dim=1)

    def _run_vlm(
        self,
        hidden: Tensor,
        mask: Tensor,
        rotary: Rotary,
        seen: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each layer's keys and values (b, kv heads, l, d) of tokens hidden (b, m, width), after those `seen`."""
        layers, keys, values = self.vlm.text_model.layers, [], []
        for i, layer in enumerate(layers):
            normed = _normed(layer, hidden)
            q, k, v = (heads(p(normed), self._head_dim) for p in _projections(layer))
            q, k = rotary.turn(q), rotary.turn(k)
            if seen is not None:
                k, v = torch.cat([seen[0][i], k], dim=2), torch.cat([seen[1][i], v], dim=2)
            keys.append(k)
            values.append(v)
            if i + 1 < len(layers):  # nothing reads what the last one would make of it
                attended = attend(q, k, v, mask, self._head_dim**-0.5, self.attention)
                hidden = _rest_of_layer(layer, hidden, attended.transpose(1, 2).flatten(2))
        return tuple(keys), tuple(values)

    def project(self, prefix: Prefix) -> Prefix:
        """A prefix with the keys and values that `forward` attends to, for several passes with the same weights."""
        if prefix.projected:
            return prefix
        keys, values = list(prefix.keys), list(prefix.values)
        for i, layer in enumerate(self.expert.layers):
            if not self._attends_jointly(i):
                _, to_k, to_v = _projections(layer)
                keys[i], values[i] = self._reprojected(to_k, keys[i]), self._reprojected(to_v, values[i])
        return prefix._replace(keys=tuple(keys), values=tuple(values), projected=True)

    def forward(
        self,
        prefix: Prefix,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Average velocity over [r, t]: (n, s, action_dim) float32, see flow_map.path.Velocity for the arguments.

        A sample that sees no condition counts its positions from 0, and takes nothing from the layers that attend to
        the prefix alone.
        """
        n, s = x_t.shape[:2]
        prefix = self.project(prefix)
        visible, b = prefix.visible(n, keep), len(prefix.mask)
        step = torch.arange(s, device=x_t.device)
        joint = Rotary.of(visible.sum(dim=1, keepdim=True) + step, self._head_dim)
        alone = Rotary.of(step[None], self._head_dim)
        both, prefix_only = mask_of_draws(visible, b, s, causal=True)[:, None], prefix.mask[:, None, None]

        hidden = self.embed(x_t, t, r)
        for i, (layer, keys, values) in enumerate(zip(self.expert.layers, prefix.keys, prefix.values, strict=True)):
            normed, (to_q, to_k, to_v) = _normed(layer, hidden), _projections(layer)
            q = heads(to_q(normed), self._head_dim)
            if self._attends_jointly(i):
                q, new = joint.turn(q), joint.turn(heads(to_k(normed), self._head_dim))
                keys = torch.cat([keys.to(q.dtype), pack(new, b)], dim=2)
                values = torch.cat([values.to(q.dtype), pack(heads(to_v(normed), self._head_dim), b)], dim=2)
                mask = both
            else:
                q, mask = alone.turn(q).to(keys.dtype), prefix_only
            attended = attend(pack(q, b), keys, values, mask, self._head_dim**-0.5, self.attention)
            attended = unpack(attended, n // b)
            if keep is not None and mask is prefix_only:
                attended = torch.where(keep[:, None, None], attended, 0)
            hidden = _rest_of_layer(layer, hidden, attended)
        return self.action_out_proj(self.expert.norm(hidden).float()).float()

    def _attends_jointly(self, layer: int) -> bool:
        every = self.vlm_with_expert.self_attn_every_n_layers
        return "cross" not in self.vlm_with_expert.attention_mode or (every > 0 and layer % every == 0)

    def _reprojected(self, projection: nn.Linear, cached: Tensor) -> Tensor:
        """The VLM's keys or values (b, kv heads, l, d) as a layer of the expert reads them."""
        return heads(projection(cached.transpose(1, 2).flatten(2).to(projection.weight.dtype)), self._head_dim)

    def embed(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The expert's input (n, s, width): SmolVLA's MLP of actions and t, plus the target-time branch of t − r."""
        actions = self.action_in_proj(x_t)
        time = self._embed_time(t).to(actions.dtype)[:, None].expand_as(actions)
        fused = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([actions, time], dim=2))))
        return fused + self.target_time(t - r)[:, None]

    def target_time(self, length: Tensor) -> Tensor:
        """The branch: intervals' lengths (n,) -> (n, width)."""
        hidden = self.target_time_mlp_in(self._embed_time(length).to(self.target_time_mlp_in.weight.dtype))
        return self.target_time_mlp_out(F.silu(hidden))

    def _embed_time(self, t: Tensor) -> Tensor:
        width = self.action_in_proj.out_features
        return create_sinusoidal_pos_embedding(t, width, self.min_period, self.max_period, device=t.device)


def _projections(layer: Any) -> tuple[Any, Any, Any]:
    attention = layer.self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def _normed(layer: Any, hidden: Tensor) -> Tensor:
    return layer.input_layernorm(hidden).to(layer.self_attn.q_proj.weight.dtype)


def _rest_of_layer(layer: Any, hidden: Tensor, attended: Tensor) -> Tensor:
    """What follows the attention in a Llama layer; from the first one on, in the dtype of its weights."""
    out = layer.self_attn.o_proj(attended.to(layer.self_attn.o_proj.weight.dtype))
    hidden = (out + hidden).to(out.dtype)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
