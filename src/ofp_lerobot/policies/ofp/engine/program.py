"""One answer as a function of fixed shapes: images and text in, actions out, nothing read by the host in between.

What `OFPNetwork.encode` and `forward` do, with joined matrices, one buffer for all keys and values, and everything
that depends on the times or positions alone computed once for all steps. Several samples of an observation are one
sequence behind one prefix, each blind to the others.
Shapes: b observations, l prefix tokens, s action steps of all samples of an observation, k evaluations, d head
dimension. Times: t = 1 noise, 0 action.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.models.gemma.modeling_gemma import rotate_half

from ....flow_map.path import interval_step
from ..images import prepare_images
from ..network import OFPNetwork, attend
from .weights import Joined, Weights


class Rotation(NamedTuple):
    """Of rotary positions: (b, 1, tokens, d)."""

    cos: Tensor
    sin: Tensor


def answer(
    network: OFPNetwork,
    weights: Weights,
    images: Sequence[Tensor],
    tokens: Tensor,
    token_mask: Tensor,
    x: Tensor,
    grid: Tensor,
    *,
    padded: bool,
    instantaneous: bool,
) -> Tensor:
    """Carries x (n, horizon, action_dim) float32 along grid (k + 1,), descending times, to the last of them.

    n is a multiple of b; sample i reads observation i modulo b. images: as `prepare_images` takes them; tokens
    (b, text) long; token_mask (b, text) bool, read where `padded`. instantaneous: velocities at t (r = t) instead of
    averages over the intervals.
    """
    b, horizon = len(tokens), x.shape[1]
    samples = len(x) // b
    x = x.unflatten(0, (samples, b)).transpose(0, 1).flatten(1, 2)
    s = x.shape[1]
    vlm, expert = network.vlm, network.expert
    side = vlm.vision_tower.config.image_size
    pixels = prepare_images(images, (side, side))
    patches = _embed_images(network, weights, pixels.flatten(0, 1))
    hidden = torch.cat([patches.reshape(b, -1, patches.shape[-1]), vlm.language_model.embed_tokens(tokens)], dim=1)
    length = hidden.shape[1]
    mask = torch.cat([token_mask.new_ones(b, length - tokens.shape[1]), token_mask], dim=1)
    rotation = _rotation(vlm.language_model.rotary_emb, hidden, torch.cumsum(mask, dim=1) - 1)
    attention = expert.layers[0].self_attn
    kv_heads = weights.prefix_kv.weight.shape[0] // 2 // attention.head_dim
    memory = hidden.new_empty(len(expert.layers), 2, b, kv_heads, length + s, attention.head_dim)
    _encode(network, weights, hidden, rotation, memory, mask[:, None, None] if padded else None)

    t = grid[:-1]
    r = t if instantaneous else grid[1:]
    modulations = _modulate(network, weights, network.condition(t, r))
    hidden_dtype = expert.layers[0].mlp.up_proj.weight.dtype
    position = mask.sum(dim=1, keepdim=True) + torch.arange(horizon, device=x.device).repeat(samples)
    rotation = _rotation(expert.rotary_emb, x.new_empty(0, dtype=hidden_dtype), position)
    seen = _seen(mask, samples, horizon, padded=padded)
    for step, modulation in enumerate(modulations):
        hidden = network.action_in_proj(x.to(network.action_in_proj.weight.dtype)).to(hidden_dtype)
        hidden = _evaluate(network, weights, hidden, modulation, rotation, memory, seen)
        velocity = network.action_out_proj(hidden.to(network.action_out_proj.weight.dtype)).float()
        x = interval_step(x, velocity, grid[step : step + 1], grid[step + 1 : step + 2])
    return x.unflatten(1, (samples, horizon)).transpose(0, 1).flatten(0, 1)


def _seen(mask: Tensor, samples: int, horizon: int, *, padded: bool) -> Tensor | None:
    """Where action queries look (b, 1, 1 or s, l + s), None for everywhere: at the prefix mask (b, l), at their own."""
    if samples == 1:
        return F.pad(mask, (0, horizon), value=True)[:, None, None] if padded else None
    sample = torch.arange(samples, device=mask.device).repeat_interleave(horizon)
    own = sample[:, None] == sample
    return torch.cat([mask[:, None].expand(-1, len(own), -1), own.expand(len(mask), -1, -1)], dim=2)[:, None]


def _embed_images(network: OFPNetwork, weights: Weights, pixels: Tensor) -> Tensor:
    """(b·cameras, 3, side, side) -> (b·cameras, patches, width)."""
    tower, projector = network.vlm.vision_tower.vision_model, network.vlm.multi_modal_projector.linear
    stored = tower.post_layernorm.weight.dtype
    computed = network.compute_dtype if stored == torch.float32 else stored
    hidden = tower.embeddings(pixels).to(stored)
    for layer, joined in zip(tower.encoder.layers, weights.vision_qkv, strict=True):
        attention = layer.self_attn
        qkv = _linear(_layer_norm(layer.layer_norm1, hidden).to(computed), joined)
        q, k, v = qkv.unflatten(-1, (3, -1, attention.head_dim)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2).flatten(2)
        hidden = hidden + _linear(attended, attention.out_proj)
        inner = _linear(_layer_norm(layer.layer_norm2, hidden).to(computed), layer.mlp.fc1)
        hidden = hidden + _linear(layer.mlp.activation_fn(inner), layer.mlp.fc2)
    hidden = _layer_norm(tower.post_layernorm, hidden)
    stored = projector.weight.dtype
    return _linear(hidden.to(network.compute_dtype if stored == torch.float32 else stored), projector)


def _encode(
    network: OFPNetwork, weights: Weights, hidden: Tensor, rotation: Rotation, memory: Tensor, seen: Tensor | None
) -> None:
    """Writes the prefix's keys and values into `memory` (layers, 2, b, kv heads, l + s, d). seen (b, 1, 1, l)."""
    *layers, last = network.vlm.language_model.layers
    length = hidden.shape[1]
    for layer, qkv, gate_up, (keys, values) in zip(
        layers, weights.prefix_qkv, weights.prefix_gate_up, memory[:-1], strict=True
    ):
        attention = layer.self_attn
        q = _attention_inputs(
            _linear(_rms_norm(layer.input_layernorm, hidden), qkv), rotation, keys[:, :, :length], values[:, :, :length]
        )
        attended = attend(q, keys[:, :, :length], values[:, :, :length], seen, attention.scaling, "sdpa")
        hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + _mlp(layer.mlp, gate_up, _rms_norm(layer.post_attention_layernorm, hidden))
    keys, values = memory[-1]
    kv = _linear(_rms_norm(last.input_layernorm, hidden), weights.prefix_kv)
    _attention_inputs(kv, rotation, keys[:, :, :length], values[:, :, :length])


def _evaluate(
    network: OFPNetwork,
    weights: Weights,
    hidden: Tensor,
    modulation: Tensor,
    rotation: Rotation,
    memory: Tensor,
    seen: Tensor | None,
) -> Tensor:
    """One pass of the action expert, hidden (b, s, width) -> (b, s, width); overwrites the memory's last s slots."""
    s, norms = hidden.shape[1], iter(modulation)
    for layer, qkv, gate_up, (keys, values) in zip(
        network.expert.layers, weights.expert_qkv, weights.expert_gate_up, memory, strict=True
    ):
        attention = layer.self_attn
        normed, gate = _ada_norm(layer.input_layernorm, hidden, next(norms))
        q = _attention_inputs(_linear(normed, qkv), rotation, keys[:, :, -s:], values[:, :, -s:])
        attended = attend(q, keys, values, seen, attention.scaling, "sdpa")
        hidden = torch.addcmul(hidden, attention.o_proj(attended.transpose(1, 2).flatten(2)), gate)
        normed, gate = _ada_norm(layer.post_attention_layernorm, hidden, next(norms))
        hidden = torch.addcmul(hidden, _mlp(layer.mlp, gate_up, normed), gate)
    return _ada_norm(network.expert.norm, hidden, next(norms))[0]


def _modulate(network: OFPNetwork, weights: Weights, condition: Tensor) -> Tensor:
    """AdaRMS's 1 + scale, shift and gate for every step and norm: (k, width) -> (k, norms, 3, width)."""
    modulation = _linear(condition, weights.modulation).unflatten(-1, (-1, 3, network.expert.config.hidden_size))
    modulation[:, :, 0] += 1
    return modulation


def _attention_inputs(projected: Tensor, rotation: Rotation, keys: Tensor, values: Tensor) -> Tensor:
    """Rotated queries (b, heads, n, d) of projections (b, n, (heads + 2·kv heads)·d); writes keys and values."""
    kv_heads, d = keys.shape[1], keys.shape[-1]
    heads = projected.unflatten(-1, (-1, d)).transpose(1, 2)
    turned = heads[:, :-kv_heads]
    turned = torch.addcmul(turned * rotation.cos, rotate_half(turned), rotation.sin)
    keys.copy_(turned[:, -kv_heads:])
    values.copy_(heads[:, -kv_heads:])
    return turned[:, :-kv_heads]


def _rotation(rotary: Any, like: Tensor, position: Tensor) -> Rotation:
    cos, sin = rotary(like, position)
    return Rotation(cos[:, None], sin[:, None])


def _linear(x: Tensor, weights: Joined | torch.nn.Linear) -> Tensor:
    bias = None if weights.bias is None else weights.bias.to(x.dtype)
    return F.linear(x, weights.weight.to(x.dtype), bias)


def _mlp(mlp: Any, gate_up: Joined, x: Tensor) -> Tensor:
    gate, up = _linear(x, gate_up).chunk(2, dim=-1)
    return mlp.down_proj(mlp.act_fn(gate) * up)


def _layer_norm(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    """LeRobot's PiGemmaRMSNorm: in float32."""
    return F.rms_norm(x.float(), (norm.dim,), 1.0 + norm.weight.float(), norm.eps).to(x.dtype)


def _ada_norm(norm: Any, x: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
    """The same with (3, width) instead of its weight: all rows share their time."""
    scale, shift, gate = modulation.float()
    return (F.rms_norm(x.float(), (norm.dim,), scale, norm.eps) + shift).to(x.dtype), gate.to(x.dtype)
