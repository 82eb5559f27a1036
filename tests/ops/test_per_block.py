"""Granularity per_block: few-bit codes times an integer multiplier per (sample, 16 rows, channel), in one int8."""

import numpy as np
import pytest
import torch

from modiff_kernels import ModiffConfig, ops
from tests.ops.op_cases import activation, is_image, memory_format_of

# Rows of a sample: one block, fewer, a last block of 31, exact multiples, more than one loop block or thread takes.
SHAPES = [(2, 16, 5, 4), (1, 33, 7, 9), (8, 64, 4, 4), (3, 9, 47), (2, 17, 48), (3, 70, 15), (1, 130, 16, 9), (2, 7)]


def uneven(shape, dtype=torch.float32):
    """An activation whose channels differ in range by a factor of thousands."""
    x = activation(shape, torch.float32)
    channels = shape[1] if is_image(shape) else shape[-1]
    spread = 10.0 ** (-3.5 * torch.rand(channels))
    scaled = x * spread.view((1, -1, 1, 1) if is_image(shape) else (-1,))
    return scaled.to(dtype).contiguous(memory_format=memory_format_of(is_image(shape)))


def by_channel(x):
    """float32 numpy [samples, rows, channels]."""
    x = x.to(torch.float32)
    if is_image(x.shape):
        return x.permute(0, 2, 3, 1).flatten(1, 2).numpy()
    return x.reshape(x.shape[0], -1, x.shape[-1]).numpy()


def oracle(residual, bits, clip_ratio):
    """Codes times multipliers, scale [samples] and multipliers [samples, rows, channels], in the contract's steps."""
    rows = residual.shape[1]
    blocked = bits < 8 and rows >= 16
    reach = np.float32(2 ** (bits - 1) - (13 / 16 if blocked else 0.5))
    most = np.float32(2 ** (8 - bits) if blocked else 1)
    magnitude = np.abs(residual) * np.float32(clip_ratio)
    starts = range(0, 16 * (rows // 16), 16) if blocked else [0]
    absmax = np.empty_like(magnitude)
    for start in starts:
        end = rows if start == starts[-1] else start + 16
        absmax[:, start:end] = magnitude[:, start:end].max(1, keepdims=True)
    scale = np.maximum(magnitude.max((1, 2)) / (reach * most), np.float32(2.0**-100))
    multiplier = np.clip(np.ceil(absmax / (reach * scale)[:, None, None]), 1, most)
    inverse = np.float32(1) / (scale[:, None, None] * multiplier)
    codes = np.clip(np.rint(residual * inverse), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes * multiplier, scale, multiplier


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_match_oracle(only_quantising, shape, bits, clip_ratio, state_dtype):
    x = uneven(shape)
    x_hat = torch.zeros_like(x, dtype=state_dtype)
    before = by_channel(x_hat).copy()
    residual_q, scale, absmax = ops.quantize_residual(
        x, x_hat, None, bits, "per_block", clip_ratio, backend=only_quantising
    )
    codes, expected_scale, _ = oracle(by_channel(x) - before, bits, clip_ratio)
    np.testing.assert_array_equal(by_channel(residual_q), codes)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(absmax.numpy(), np.abs(by_channel(x) - before).max((1, 2)))
    eps = torch.finfo(state_dtype).eps
    grown = before + codes * expected_scale[:, None, None]
    np.testing.assert_allclose(by_channel(x_hat), grown, rtol=eps, atol=eps * np.abs(grown).max())


@pytest.fixture(params=["reference", "cpu"])
def only_quantising(request):
    """A backend that has quantize_residual."""
    reason = ops.dispatch.why_unavailable(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.mark.parametrize("bits", [3, 4])
def test_largest_error_is_half_a_step_of_the_block(only_quantising, bits):
    x = uneven((2, 24, 8, 6))
    x_hat = torch.zeros_like(x)
    ops.quantize_residual(x, x_hat, None, bits, "per_block", 1.0, backend=only_quantising)
    _, scale, multiplier = oracle(by_channel(x), bits, 1.0)
    error = np.abs(by_channel(x) - by_channel(x_hat))
    assert (error <= 0.5 * scale[:, None, None] * multiplier * (1 + 1e-5)).all()
    assert multiplier.min() == 1
    assert multiplier.max() == 2 ** (8 - bits)
    assert (multiplier[:, 0] != multiplier[:, 16]).any(), "two blocks of a channel, two multipliers"


@pytest.mark.parametrize(("shape", "bits"), [((3, 20, 4, 4), 8), ((3, 20, 5, 3), 4), ((4, 33), 3)], ids=str)
def test_equals_per_sample_where_there_is_no_room(only_quantising, shape, bits):
    x = uneven(shape)
    states = torch.zeros_like(x), torch.zeros_like(x)
    block = ops.quantize_residual(x, states[0], None, bits, "per_block", 1.0, backend=only_quantising)
    sample = ops.quantize_residual(x, states[1], None, bits, "per_sample", 1.0, backend=only_quantising)
    for found, expected in zip((*block, states[0]), (*sample, states[1])):
        assert torch.equal(found, expected)


def test_fused_passes_take_it(only_quantising):
    h = activation((2, 32, 5, 5))
    args = (None, torch.rand(32), torch.rand(32), 8, 1e-5, True)
    x_hat = torch.zeros_like(h)
    residual_q, scale, _ = ops.group_norm_silu_quantize_residual(
        h, *args, x_hat, None, 4, "per_block", 1.0, only_quantising
    )
    x = torch.nn.functional.silu(torch.nn.functional.group_norm(h.double(), 8, *[a.double() for a in args[1:3]], 1e-5))
    codes, expected_scale, multiplier = oracle(by_channel(x), 4, 1.0)
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-5)
    # The norm's float rounding may move a value over a tie or a maximum over an integer: one step, rarely.
    difference = np.abs(by_channel(residual_q) - codes) / multiplier
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


def test_integer_product_needs_no_change(backend):
    """accumulate_conv2d takes the codes as they are: y_hat equals the convolution of the new x_hat."""
    if backend not in ("reference", "cpu"):
        pytest.skip(f"backend {backend} is covered by the contract tests of accumulate_conv2d")
    x = uneven((2, 16, 6, 6))
    weight_q = torch.randint(-127, 128, (8, 9 * 16), dtype=torch.int8)
    weight_scale = torch.rand(8) * 0.01 + 0.001
    layout = ops.preferred_layout(
        "accumulate_conv2d", "cpu", n=8, k=144, weight_bits=8, kernel_size=(3, 3), padding=(1, 1), backend=backend
    )
    packed = ops.prepare_weight(
        ops.pack_weight(weight_q, 8), 8, 8, 144, layout_to=layout, kernel_size=(3, 3), backend=backend
    )
    x_hat, y_hat = torch.zeros_like(x), torch.zeros((2, 8, 6, 6)).contiguous(memory_format=torch.channels_last)
    conv = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    for step in range(5):
        codes, scale, _ = ops.quantize_residual(
            x * (1 + 0.1 * step), x_hat, None, 3, "per_block", 1.0, backend="reference"
        )
        ops.accumulate_conv2d(
            codes, scale, packed, weight_scale, y_hat, None, 8, -1, layout, *conv, torch.float32, True, backend
        )
    weight = (weight_q.double() * weight_scale.double()[:, None]).view(8, 3, 3, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(x_hat.double(), weight, None, *conv[1:])
    # Five float32 additions onto values of this size.
    torch.testing.assert_close(y_hat.double(), expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def test_errors_say_what_is_allowed():
    x = activation((2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"per_block.*scale None"):
        ops.quantize_residual(x, torch.zeros_like(x), torch.ones(2), 4, "per_block")
    with pytest.raises(ValueError, match=r"per_block.*'per_sample'"):
        ops.quantize_activation(x, 4, "per_block")
    with pytest.raises(ValueError, match=r"granularity='per_block'.*scale_mode='dynamic'.*delayed"):
        ModiffConfig(granularity="per_block", scale_mode="delayed")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModiffConfig(act_bits=4), "per_block"),
        (ModiffConfig(act_bits=3), "per_block"),
        (ModiffConfig(act_bits=8), "per_sample"),
        (ModiffConfig(act_bits=4, scale_mode="delayed"), "per_sample"),
        (ModiffConfig(act_bits=4, mode="quantized"), "per_sample"),
        (ModiffConfig(act_bits=4, granularity="per_tensor"), "per_tensor"),
    ],
    ids=str,
)
def test_default_granularity_of_layers(config, expected):
    assert config.layer_granularity == expected
