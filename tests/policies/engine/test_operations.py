"""Triton's kernels compute what PyTorch's do: on a GPU where there is one, else on Triton's interpreter."""

import pytest
import torch

from ofp_lerobot.policies.ofp.engine.operations import (
    Delta,
    Fused,
    Norm,
    Plain,
    Rotation,
    Seen,
    quantise,
    scaled_linear,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts where a GPU rounds, and multiplies bfloat16 wrongly: there attention is tested in float32.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 1e-2}
DTYPES = list(TOLERANCE)
PRODUCTS = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Float32's sums of 256 products depend on the CPU: either side is up to 1.3e-6 from float64, where it was looked at.
ATTENTION = 3e-6 if DEVICE == "cpu" else TOLERANCE[PRODUCTS]


@pytest.fixture(scope="module")
def fused():
    return Fused()


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def assert_same(actual, expected, tolerance):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def norms(width, dtype):
    return [
        Norm(0.1 * draw(width), None, 1e-6, offset=1.0),  # Gemma's
        Norm(draw(width, dtype=dtype), draw(width, dtype=dtype), 1e-5, centred=True),  # the vision tower's
        Norm(draw(width), draw(width), 1e-6),  # the action expert's
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [72, 128])
@pytest.mark.parametrize("moved", ["", "value", "value bias", "value gate", "value bias gate"])
def test_residual_sums_and_norms(fused, dtype, width, moved):
    for norm in norms(width, dtype):
        hidden = draw(2, 5, width, dtype=dtype)
        parts = {"value": draw(2, 5, width, dtype=dtype), "bias": draw(width, dtype=dtype), "gate": draw(width)}
        delta = Delta(**{name: parts[name] for name in moved.split()}) if moved else None
        expected, actual = (o.add_norm(hidden, delta, norm, dtype) for o in (Plain(), fused))
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, TOLERANCE[dtype])


def test_a_float32_stream_is_normed_into_bfloat16(fused):
    norm = norms(128, torch.float32)[1]
    arguments = draw(2, 5, 128), Delta(draw(2, 5, 128, dtype=torch.bfloat16)), norm, torch.bfloat16
    expected, actual = (o.add_norm(*arguments) for o in (Plain(), fused))
    assert_same(actual[0], expected[0], 1e-6)
    assert_same(actual[1], expected[1], TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (4, 2), (0, 1)])
def test_heads_are_split_turned_and_kept(fused, dtype, heads, kv_heads):
    b, n, d, slots = 2, 7, 16, 30
    projected = draw(b, n, (heads + 2 * kv_heads) * d, dtype=dtype)
    rotation = Rotation(draw(b, n, d, dtype=dtype), draw(b, n, d, dtype=dtype))
    expected, actual = (torch.zeros(2, b, kv_heads, slots, d, device=DEVICE, dtype=dtype) for _ in range(2))
    queries = Plain().split_heads(projected, rotation, *expected, 5, None)
    assert_same(fused.split_heads(projected, rotation, *actual, 5, None), queries, TOLERANCE[dtype])
    assert_same(actual, expected, TOLERANCE[dtype])

    expected.zero_()
    actual.zero_()
    first = torch.tensor([3, 11], dtype=torch.int32, device=DEVICE)
    for i, slot in enumerate((3, 11)):
        row = slice(i, i + 1)
        Plain().split_heads(projected[row], Rotation(*(t[row] for t in rotation)), *expected[:, row], slot, None)
    fused.split_heads(projected, rotation, *actual, 0, first)
    assert_same(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("d", [16, 256])
@pytest.mark.parametrize(("n", "slots"), [(3, 40), (300, 200)])  # few queries: the keys are split among programs
def test_attention_reads_as_many_keys_as_there_are(fused, n, slots, d):
    b, heads, kv_heads = 2, 4, 2
    n = min(n, 20) if DEVICE == "cpu" and d > 16 else n  # the interpreter is slow
    q = draw(b, heads, n, d, dtype=PRODUCTS)
    keys, values = (draw(b, kv_heads, slots, d, dtype=PRODUCTS) for _ in range(2))
    lengths = torch.tensor([slots, 1 + slots // 3], dtype=torch.int32, device=DEVICE)
    mask = (torch.arange(slots, device=DEVICE) < lengths[:, None])[:, None, None]
    expected = Plain().attend(q, keys, values, Seen(mask=mask), 0.3)
    values[1, :, 1 + slots // 3 :] = keys[1, :, 1 + slots // 3 :] = torch.nan  # what was there before is not read
    assert_same(fused.attend(q, keys, values, Seen(lengths=lengths), 0.3), expected, ATTENTION)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_gelu(fused, dtype):
    gate_up = 3 * draw(2, 3, 2 * 1500, dtype=dtype)
    assert_same(fused.gated_gelu(gate_up), Plain().gated_gelu(gate_up), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu(fused, dtype):
    x, weight, bias = draw(2, 3, 64, dtype=dtype), draw(48, 64, dtype=dtype), draw(48, dtype=dtype)
    expected = Plain().linear_gelu(x, weight, bias)
    assert_same(fused.linear_gelu(x, weight, bias), expected, 1e-5 if dtype == torch.float32 else 5e-3)


ROUNDING = 0.04 if DEVICE == "cuda" else 0.08  # 8 bits round by up to 1/16, cut by up to 1/8


def test_norms_and_gates_in_8_bits(fused):
    hidden, delta, norm = draw(2, 5, 128), Delta(draw(2, 5, 128)), norms(128, torch.float32)[0]
    hidden[0, 0] = delta.value[0, 0] = 0  # a row of zeros has a scale too
    expected = Plain().add_norm(hidden, delta, norm, torch.float32)
    out, quantised = fused.add_norm_fp8(hidden, delta, norm)
    assert_same(out, expected[0], 1e-6)
    assert_same(quantised.values.float() * quantised.scale, expected[1].flatten(0, 1), ROUNDING)
    gate_up = draw(2, 3, 2 * 1500)
    quantised = fused.gated_gelu_fp8(gate_up)
    assert_same(quantised.values.float() * quantised.scale, Plain().gated_gelu(gate_up).flatten(0, 1), ROUNDING)


def test_products_in_8_bits():
    x, weight = draw(16, 64), draw(48, 64)
    product = scaled_linear(quantise(x), quantise(weight), torch.bfloat16)
    assert_same(product, (x @ weight.t()).bfloat16(), 0.06)
