"""quantize_residual: codes bit-exact against numpy, state, scales, clipping, ties, extremes."""

import itertools

import numpy as np
import pytest
import torch

from modiff_kernels import ops
from tests.ops.op_cases import (
    BITS,
    DTYPES,
    GRANULARITIES,
    QUANTIZE_SHAPES,
    activation,
    assert_codes_equal,
    granules,
    is_image,
    memory_format_of,
    oracle_codes,
    oracle_scale,
    run,
)

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check(backend, x, x_hat, scale, bits, granularity, clip_ratio=1.0):
    """Run the op and compare everything with the oracle; returns its results."""
    image = is_image(x.shape)
    residual = granules(x, granularity, image) - granules(x_hat, granularity, image)
    absmax = np.abs(residual).max(1)
    if scale is None:
        expected_scale = oracle_scale(absmax, bits, clip_ratio)
    else:
        expected_scale = np.broadcast_to(scale.numpy(), absmax.shape)
    expected = oracle_codes(residual, expected_scale, bits)
    new_x_hat = granules(x_hat, granularity, image) + expected_scale[:, None] * expected
    x_before, state = x.clone(), x_hat.clone()

    residual_q, used, seen = run("quantize_residual", x, state, scale, bits, granularity, clip_ratio, backend=backend)

    assert residual_q.dtype == torch.int8
    assert residual_q.shape == x.shape
    assert residual_q.is_contiguous(memory_format=memory_format_of(image))
    assert used.dtype == seen.dtype == torch.float32
    assert used.shape == seen.shape == (len(absmax),)
    np.testing.assert_array_equal(seen.numpy(), absmax)
    np.testing.assert_array_equal(used.numpy(), expected_scale)
    assert_codes_equal(residual_q, expected, granularity, image)
    eps = torch.finfo(state.dtype).eps
    np.testing.assert_allclose(
        granules(state, granularity, image), new_x_hat, rtol=eps, atol=eps * np.abs(new_x_hat).max()
    )
    assert torch.equal(x, x_before)
    return residual_q, used, seen, state


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", QUANTIZE_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dynamic_codes_match_oracle(backend, shape, bits, granularity):
    x = activation(shape)
    check(backend, x, x + activation(shape, spread=0.1), None, bits, granularity)


@pytest.mark.parametrize(("dtype", "state_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(2, 33, 5, 4), (2, 9, 40)], ids=["image", "rows"])
def test_dtypes(backend, shape, granularity, dtype, state_dtype):
    x = activation(shape, dtype)
    check(backend, x, activation(shape, state_dtype), None, 4, granularity)


@pytest.mark.parametrize("one_for_all", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(3, 17, 4, 5), (3, 6, 24)], ids=["image", "rows"])
def test_given_scale(backend, shape, bits, granularity, one_for_all):
    x = activation(shape)
    count = 1 if one_for_all else granules(x, granularity, is_image(shape)).shape[0]
    scale = torch.rand(count) * 0.05 + 0.01
    _, used, _, _ = check(backend, x, activation(shape), scale, bits, granularity)
    assert used.data_ptr() != scale.data_ptr()


@pytest.mark.parametrize("clip_ratio", [0.5, 0.9, 1.25])
def test_clip_ratio_changes_the_scale_but_not_absmax(backend, clip_ratio):
    x = activation((2, 16, 6, 6))
    check(backend, x, torch.zeros_like(x), None, 4, "per_sample", clip_ratio)


@pytest.mark.parametrize("bits", BITS)
def test_ties_round_half_to_even_and_clamp(backend, bits):
    steps = torch.arange(-(2**bits), 2**bits + 1) / 2  # every code, every tie, both ends beyond the range
    x = steps.repeat(1, 3).reshape(1, 3, -1).contiguous()
    residual_q, *_ = check(backend, x, torch.zeros_like(x), torch.tensor([1.0]), bits, "per_tensor")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    python = [min(max(round(v), low), high) for v in steps.tolist()]  # Python's round is half to even too
    assert residual_q[0, 1].tolist() == python


@pytest.mark.parametrize("bits", BITS)
def test_largest_error_is_half_a_step(backend, bits):
    x = torch.linspace(-1, 1, 4096).reshape(1, 64, 64)
    residual_q, _, _, state = check(backend, x, torch.zeros_like(x), None, bits, "per_tensor")
    top = 2 ** (bits - 1) - 1
    assert set(range(-top, top + 1)) <= set(residual_q.unique().tolist())
    assert (x - state).abs().max() <= 0.5001 / (top + 0.5)


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
def test_residual_zero_leaves_the_state(backend, state_dtype):
    x = activation((2, 8, 4, 4), state_dtype)
    residual_q, used, absmax, state = check(backend, x, x.clone(), None, 4, "per_sample")
    assert torch.equal(state, x)
    assert not residual_q.any()
    assert (absmax == 0).all()
    assert (used == 2.0**-100).all()


def test_one_outlier(backend):
    x = torch.zeros(2, 40, 3, 3).to(memory_format=torch.channels_last)
    x[1, 5, 1, 2] = 1e4
    residual_q, *_ = check(backend, x, torch.zeros_like(x), None, 3, "per_sample")
    assert residual_q[1, 5, 1, 2] == 3
    assert residual_q.count_nonzero() == 1


@pytest.mark.parametrize("exponent", [-40, -30, -10, 10, 30, 37])
def test_extreme_magnitudes(backend, exponent):
    x = activation((2, 3, 32)) * 10.0**exponent
    check(backend, x, torch.zeros_like(x), None, 8, "per_sample")


def test_error_shrinks_over_steps(backend):
    """The error stays in x_hat, so a constant input is reached step by step at any bit width."""
    x = activation((2, 16, 4, 4))
    x_hat = torch.zeros_like(x)
    errors = []
    for _ in range(6):
        run("quantize_residual", x, x_hat, None, 3, "per_sample", backend=backend)
        errors.append((x - x_hat).abs().max().item())
    assert all(after <= before / 6.9 for before, after in itertools.pairwise(errors))


@pytest.mark.parametrize("granularity", ["per_sample", "per_token"])
def test_two_half_batches_are_one_batch(backend, granularity):
    x = activation((4, 24, 5, 5))
    state = activation((4, 24, 5, 5))
    halves = [state[:2].clone(memory_format=torch.channels_last), state[2:].clone(memory_format=torch.channels_last)]
    whole = run("quantize_residual", x, state, None, 4, granularity, backend=backend)
    parts = [
        run("quantize_residual", x[2 * i : 2 * i + 2], half, None, 4, granularity, backend=backend)
        for i, half in enumerate(halves)
    ]
    for all_in_one, *split in zip(whole, *parts, strict=True):
        assert torch.equal(all_in_one, torch.cat(split))
    assert torch.equal(state, torch.cat(halves))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 5, 16)], ids=["image", "rows"])
def test_non_finite_input_raises_before_the_state_changes(backend, shape, value):
    x = activation(shape)
    x[(1, 3, 2, 1)[: x.ndim]] = value
    x_hat = activation(shape)
    before = x_hat.clone()
    with pytest.raises(ValueError, match="quantize_residual: x holds NaN or Inf"):
        run("quantize_residual", x, x_hat, None, 4, "per_sample", backend=backend)
    changed = (x_hat != before).flatten(1).any(1)
    assert not changed[1]
    assert not (backend == "reference" and changed.any())


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_reference_refuses_unusable_scales(value):
    x = activation((2, 4, 8))
    x_hat = torch.zeros_like(x)
    with pytest.raises(ValueError, match="not positive and finite"):
        run("quantize_residual", x, x_hat, torch.tensor([value]), 4, "per_tensor", backend="reference")
    assert not x_hat.any()


# Channels: 1, odd, one below, at and above the 8 whose codes fill whole bytes, and a layer.
PACKED_SHAPES = [(3, 1), (2, 5, 7), (4, 8), (2, 3, 9), (2, 64, 320), (1, 1, 1, 1), (2, 7, 3, 5), (2, 8, 4, 4)]


def rows_of(codes):
    """[rows, channels], of an image in NHWC order."""
    return (codes.movedim(1, -1) if is_image(codes.shape) else codes).flatten(0, -2)


def check_packed(backend, x, x_hat, scale, bits, granularity):
    """With and without `packed` the op does the same, and says the same in two formats."""
    states = [x_hat.clone(), x_hat.clone()]
    plain, *numbers = run("quantize_residual", x, states[0], scale, bits, granularity, backend=backend)
    packed, *same = run("quantize_residual", x, states[1], scale, bits, granularity, 1.0, True, backend=backend)
    rows = rows_of(plain)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous(memory_format=memory_format_of(is_image(x.shape)))
    assert torch.equal(rows_of(packed), ops.pack_weight(rows.contiguous(), bits))
    assert torch.equal(ops.unpack_weight(rows_of(packed), bits, *rows.shape), rows)
    for got, expected in zip((*same, states[1]), (*numbers, states[0]), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("shape", PACKED_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_packed_is_another_format_of_the_same(backend, shape, bits, granularity):
    for scale in (None, torch.tensor([0.4])):
        check_packed(backend, activation(shape), activation(shape), scale, bits, granularity)


@pytest.mark.parametrize(("dtype", "state_dtype"), list(itertools.product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("shape", [(2, 33, 5, 4), (2, 9, 40)], ids=["image", "rows"])
def test_packed_dtypes(backend, shape, dtype, state_dtype):
    check_packed(backend, activation(shape, dtype), activation(shape, state_dtype), None, 4, "per_sample")


@pytest.mark.parametrize(("bits", "expected"), [(4, [0xE1, 0x03]), (3, [0b00_11_10_01, 0b11111101])])
def test_packed_bytes_by_hand(backend, bits, expected):
    """Codes 1, -2, 3; at 3 bits they are stored as 5, 2, 7, and what is past the end as 4."""
    x = torch.tensor([[1.0, -2.0, 3.0]])
    arguments = (x, torch.zeros_like(x), torch.ones(1), bits, "per_tensor", 1.0, True)
    packed, *_ = run("quantize_residual", *arguments, backend=backend)
    assert packed.tolist() == [expected]


def test_cpu_kernels_refuse_to_pack_and_others_take_over():
    if ops.dispatch.why_unavailable("cpu") is not None:
        pytest.skip(ops.dispatch.why_unavailable("cpu"))
    x, x_hat = activation((2, 8)), torch.zeros(2, 8)
    with pytest.raises(ops.BackendUnavailable, match="cpu: packed=True: these passes store a code per byte"):
        ops.quantize_residual(x, x_hat, None, 4, "per_token", packed=True, backend="cpu")
    assert not x_hat.any()
    residual_q, *_ = ops.quantize_residual(x, x_hat, None, 4, "per_token", packed=True)
    assert residual_q.shape == (2, 4)
