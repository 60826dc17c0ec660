"""What the networks share: the prefix that every pass reads, and attention over it for several draws at once.

Shapes: b observations, n samples, k = n/b, l prefix tokens, s action steps, d head dimension.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.utils.constants import OPENPI_ATTENTION_MASK_VALUE
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.gemma.modeling_gemma import repeat_kv


class Prefix(NamedTuple):
    """What the action side reads of b observations.

    Per layer keys and values (b, kv heads, l, d); mask (b, l) bool, False at padding; state (b, max_state_dim) where
    the action side has a token of it; projected: whether the action side has projected what it projects of them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    state: Tensor | None = None
    projected: bool = False

    def detach(self) -> "Prefix":
        return self._each(Tensor.detach)

    def head(self, rows: int) -> "Prefix":
        """The prefixes of the first observations, not copied."""
        return self._each(lambda x: x[:rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Prefix":
        state = None if self.state is None else change(self.state)
        keys, values = tuple(map(change, self.keys)), tuple(map(change, self.values))
        return Prefix(keys, values, change(self.mask), state, self.projected)

    def visible(self, n: int, keep: Tensor | None) -> Tensor:
        """Which tokens each of n samples sees (n, l), nothing where `keep` (n,) is False. Raises ValueError on n."""
        if n % len(self.mask):
            raise ValueError(f"{n} samples cannot share {len(self.mask)} observations evenly")
        visible = self.mask.repeat(n // len(self.mask), 1)
        return visible if keep is None else visible & keep[:, None]


def mask_of_draws(visible: Tensor, b: int, s: int, *, causal: bool = False) -> Tensor:
    """(b, k·s, l + k·s): queries of all draws of an observation in one sequence.

    visible (k·b, l): what each draw sees before its own s steps; of these it sees all or, if causal, up to its own.
    """
    length, k = visible.shape[1], len(visible) // b
    seen = visible.view(k, b, 1, length).transpose(0, 1).expand(b, k, s, length).reshape(b, k * s, length)
    same_draw = torch.eye(k, dtype=torch.bool, device=visible.device).repeat_interleave(s, 0).repeat_interleave(s, 1)
    if causal:
        same_draw = same_draw & torch.ones(s, s, dtype=torch.bool, device=visible.device).tril().repeat(k, k)
    return torch.cat([seen, same_draw.expand(b, -1, -1)], dim=2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, implementation: Literal["sdpa", "eager"]
) -> Tensor:
    """Grouped-query attention. q (b, heads, nq, d), k and v (b, kv heads, nk, d), mask (b, 1, nq or 1, nk) bool.

    Returns (b, heads, nq, d). "eager" repeats LeRobot's arithmetic to the bit; "sdpa" folds the query heads of a
    group into its queries, so that no key is repeated, and takes None for a mask where all is seen.
    """
    b, heads, nq, d = q.shape
    group = heads // k.shape[1]
    if implementation == "eager":
        scores = torch.matmul(q, repeat_kv(k, group).transpose(2, 3)) * scaling
        assert mask is not None
        scores = scores + torch.where(mask, 0.0, OPENPI_ATTENTION_MASK_VALUE)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, repeat_kv(v, group))
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, None].expand(b, 1, group, nq, k.shape[2]).reshape(b, 1, group * nq, k.shape[2])
    q = q.reshape(b, k.shape[1], group * nq, d)
    with _sound_backward(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).reshape(b, heads, nq, d)


def _sound_backward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> AbstractContextManager[Any]:
    """Keeps training from cuDNN's attention where there is a mask.

    Its backward pass gives infinite gradients there where the number of keys is 64 modulo 128 and scores are strongly
    negative (seen: PyTorch 2.11 with cuDNN 9.19 on an H200, which is its default choice on Hopper; PyTorch #196678).
    Forward passes are right, so inference may take it.
    """
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if mask is None or not trains or q.device.type == "cpu":
        return nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def heads(x: Tensor, head_dim: int) -> Tensor:
    """(n, s, heads·d) -> (n, heads, s, d)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def pack(x: Tensor, b: int) -> Tensor:
    """(k·b, heads, s, d), sample i of observation i mod b -> (b, heads, k·s, d)."""
    return x.unflatten(0, (-1, b)).permute(1, 2, 0, 3, 4).flatten(2, 3)


def unpack(x: Tensor, k: int) -> Tensor:
    """(b, heads, k·s, d) -> (k·b, s, heads·d), the inverse of `pack` with the heads merged."""
    return x.unflatten(2, (k, -1)).permute(2, 0, 3, 1, 4).flatten(0, 1).flatten(2)
