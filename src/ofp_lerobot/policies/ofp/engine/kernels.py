"""Triton kernels of the fast path: element-wise work that PyTorch would spread over several launches.

Each has its twin in `operations.Plain`, which says what it computes; the tests compare the two. Arithmetic is float32
whatever is stored. Only imported where Triton is: it comes with PyTorch's builds for GPUs.
Shapes: b observations, n tokens, d head dimension.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def add_norm(
    hidden, delta, bias, gate, scale, shift, out, normed, row_scale,
    width, eps, offset,
    HAS_DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    CENTRED: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    x = tl.load(hidden + at, inside, 0.0).to(tl.float32)
    if HAS_DELTA:
        d = tl.load(delta + at, inside, 0.0).to(tl.float32)
        if HAS_BIAS:
            d += tl.load(bias + column, inside, 0.0).to(tl.float32)
        if HAS_GATE:
            d *= tl.load(gate + column, inside, 0.0).to(hidden.dtype.element_ty).to(tl.float32)
        x = (x + d).to(hidden.dtype.element_ty)
        tl.store(out + at, x, inside)
        x = x.to(tl.float32)
    if CENTRED:
        x = tl.where(inside, x - tl.sum(x, 0) / width, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y *= tl.load(scale + column, inside, 0.0).to(tl.float32) + offset
    if HAS_SHIFT:
        y += tl.load(shift + column, inside, 0.0).to(tl.float32)
    if FP8:
        step = tl.maximum(tl.max(tl.abs(y), 0) / 448.0, 1e-12)
        tl.store(row_scale + row, step)
        y /= step
    tl.store(normed + at, y.to(normed.dtype.element_ty), inside)


@triton.jit
def split_heads(
    projected, cos, sin, queries, keys, values, first,
    n, heads, kv_heads, offset, keys_row, keys_head, keys_batch, rotation_batch,
    HAS_FIRST: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    batch, token = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    head = tl.arange(0, BLOCK_H)
    inside_d = column < HALF
    inside = (head < heads + 2 * kv_heads)[:, None] & inside_d[None]
    at = (batch * n + token) * (heads + 2 * kv_heads) * 2 * HALF + head[:, None] * 2 * HALF + column[None]
    low = tl.load(projected + at, inside, 0.0).to(tl.float32)
    high = tl.load(projected + at + HALF, inside, 0.0).to(tl.float32)
    turn = batch * rotation_batch + token * 2 * HALF + column
    cos_low = tl.load(cos + turn, inside_d, 0.0).to(tl.float32)[None]
    cos_high = tl.load(cos + turn + HALF, inside_d, 0.0).to(tl.float32)[None]
    sin_low = tl.load(sin + turn, inside_d, 0.0).to(tl.float32)[None]
    sin_high = tl.load(sin + turn + HALF, inside_d, 0.0).to(tl.float32)[None]
    turned_low = low * cos_low - high * sin_low
    turned_high = high * cos_high + low * sin_high
    kind = projected.dtype.element_ty
    is_query = (head < heads)[:, None] & inside_d[None]
    query = ((batch * heads + head[:, None]) * n + token) * 2 * HALF + column[None]
    tl.store(queries + query, turned_low.to(kind), is_query)
    tl.store(queries + query + HALF, turned_high.to(kind), is_query)
    row = token + (tl.load(first + batch) if HAS_FIRST else offset)
    slot = batch * keys_batch + row.to(tl.int64) * keys_row + column[None]
    key_head = head - heads
    is_key = ((key_head >= 0) & (key_head < kv_heads))[:, None] & inside_d[None]
    key = slot + key_head[:, None] * keys_head
    tl.store(keys + key, turned_low.to(kind), is_key)
    tl.store(keys + key + HALF, turned_high.to(kind), is_key)
    value_head = key_head - kv_heads
    is_value = ((value_head >= 0) & (value_head < kv_heads))[:, None] & inside_d[None]
    value = slot + value_head[:, None] * keys_head
    tl.store(values + value, low.to(kind), is_value)
    tl.store(values + value + HALF, high.to(kind), is_value)


@triton.jit
def gated_gelu(gate_up, out, width, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    # gelu's tanh form: x·sigmoid(2u)
    u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    tl.store(out + row * width + column, (gate * tl.sigmoid(u) * up).to(out.dtype.element_ty), inside)


@triton.jit
def gated_gelu_fp8(gate_up, out, row_scale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, inside, 0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, inside, 0.0).to(tl.float32)
    u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    y = gate * tl.sigmoid(u) * up
    step = tl.maximum(tl.max(tl.abs(y), 0) / 448.0, 1e-12)
    tl.store(row_scale + row, step)
    tl.store(out + row * width + column, (y / step).to(out.dtype.element_ty), inside)


@triton.jit
def attend(
    queries, keys, values, lengths, out, partial, partial_top, partial_sum,
    heads, n, scaling_log2, keys_batch, keys_head, keys_row,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Queries (b, heads, n, d) of one key head, as one sequence of GROUP·n rows; keys in rows below its length."""
    block, split = tl.program_id(0), tl.program_id(1)
    batch, kv_head = tl.program_id(2) // (heads // GROUP), tl.program_id(2) % (heads // GROUP)
    rows = GROUP * n
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, D)
    near = tl.arange(0, BLOCK_N)
    first = (batch * heads + kv_head * GROUP).to(tl.int64) * n
    q = tl.load(queries + (first + row)[:, None] * D + column[None], (row < rows)[:, None], 0.0)
    length = tl.load(lengths + batch)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), SPLITS) * BLOCK_N
    start, stop = split * share, tl.minimum((split + 1) * share, length)
    place = batch.to(tl.int64) * keys_batch + kv_head.to(tl.int64) * keys_head
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, D], tl.float32)
    for at in range(start, stop, BLOCK_N):
        inside = at + near < stop
        k = tl.load(keys + place + (at + near)[None] * keys_row + column[:, None], inside[None], 0.0)
        scores = tl.where(inside[None], tl.dot(q, k) * scaling_log2, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        v = tl.load(values + place + (at + near)[:, None] * keys_row + column[None], inside[:, None], 0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None])
        total = total * fade + tl.sum(weights, 1)
        top = higher
    if SPLITS == 1:
        head = kv_head * GROUP + row // n
        to = ((batch.to(tl.int64) * n + row % n) * heads + head)[:, None] * D + column[None]
        tl.store(out + to, (sums / total[:, None]).to(out.dtype.element_ty), (row < rows)[:, None])
    else:
        to = (tl.program_id(2).to(tl.int64) * SPLITS + split) * rows + row
        tl.store(partial + to[:, None] * D + column[None], sums, (row < rows)[:, None])
        tl.store(partial_top + to, top, row < rows)
        tl.store(partial_sum + to, total, row < rows)


@triton.jit
def merge(
    out, partial, partial_top, partial_sum, heads, n,
    GROUP: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of `attend`'s parts."""
    row, place = tl.program_id(0), tl.program_id(1)
    batch, kv_head = place // (heads // GROUP), place % (heads // GROUP)
    rows = GROUP * n
    column, split = tl.arange(0, D), tl.arange(0, SPLITS)
    at = (place.to(tl.int64) * SPLITS + split) * rows + row
    top = tl.load(partial_top + at)
    weights = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weights * tl.load(partial_sum + at), 0)
    sums = tl.sum(weights[:, None] * tl.load(partial + at[:, None] * D + column[None]), 0)
    to = ((batch.to(tl.int64) * n + row % n) * heads + kv_head * GROUP + row // n) * D
    tl.store(out + to + column, (sums / total).to(out.dtype.element_ty))
