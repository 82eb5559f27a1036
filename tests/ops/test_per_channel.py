"""Granularity per_channel: few-bit codes times an integer multiplier per (sample, channel), in one int8."""

import numpy as np
import pytest
import torch

from modiff_kernels import ModiffConfig, ops
from tests.ops.op_cases import activation, is_image, memory_format_of

SHAPES = [(2, 16, 5, 4), (1, 33, 7, 3), (8, 64, 4, 4), (3, 9, 40), (2, 7)]


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
    """Codes times multipliers, scale and multipliers, in float32 steps as the contract orders them."""
    reach, most = np.float32(2 ** (bits - 1) - 0.5), np.float32(2 ** (8 - bits))
    absmax = np.abs(residual).max(1) * np.float32(clip_ratio)
    scale = np.maximum(absmax.max(1) / (reach * most), np.float32(2.0**-100))
    multiplier = np.clip(np.ceil(absmax / (reach * scale)[:, None]), 1, most)
    inverse = np.float32(1) / (scale[:, None] * multiplier)
    codes = np.clip(np.rint(residual * inverse[:, None]), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes * multiplier[:, None], scale, multiplier


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_match_oracle(only_quantising, shape, bits, clip_ratio, state_dtype):
    x = uneven(shape)
    x_hat = torch.zeros_like(x, dtype=state_dtype)
    before = by_channel(x_hat).copy()
    residual_q, scale, absmax = ops.quantize_residual(x, x_hat, None, bits, "per_channel", clip_ratio, only_quantising)
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
def test_largest_error_is_half_a_step_of_the_channel(only_quantising, bits):
    x = uneven((2, 24, 6, 6))
    x_hat = torch.zeros_like(x)
    ops.quantize_residual(x, x_hat, None, bits, "per_channel", 1.0, only_quantising)
    _, scale, multiplier = oracle(by_channel(x), bits, 1.0)
    error = np.abs(by_channel(x) - by_channel(x_hat)).max(1)
    assert (error <= 0.5 * scale[:, None] * multiplier * (1 + 1e-5)).all()
    assert multiplier.min() == 1
    assert multiplier.max() == 2 ** (8 - bits)


def test_eight_bits_equal_per_sample(only_quantising):
    x = uneven((3, 20, 4, 4))
    states = torch.zeros_like(x), torch.zeros_like(x)
    channel = ops.quantize_residual(x, states[0], None, 8, "per_channel", 1.0, only_quantising)
    sample = ops.quantize_residual(x, states[1], None, 8, "per_sample", 1.0, only_quantising)
    for found, expected in zip((*channel, states[0]), (*sample, states[1])):
        assert torch.equal(found, expected)


def test_fused_passes_take_it(only_quantising):
    h = activation((2, 32, 5, 5))
    args = (None, torch.rand(32), torch.rand(32), 8, 1e-5, True)
    x_hat = torch.zeros_like(h)
    residual_q, scale, _ = ops.group_norm_silu_quantize_residual(
        h, *args, x_hat, None, 4, "per_channel", 1.0, only_quantising
    )
    x = torch.nn.functional.silu(torch.nn.functional.group_norm(h.double(), 8, *[a.double() for a in args[1:3]], 1e-5))
    codes, expected_scale, multiplier = oracle(by_channel(x), 4, 1.0)
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=1e-5)
    # The norm's float rounding may move a value over a tie or a maximum over an integer: one step, rarely.
    difference = np.abs(by_channel(residual_q) - codes) / multiplier[:, None]
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
        codes, scale, _ = ops.quantize_residual(x * (1 + 0.1 * step), x_hat, None, 3, "per_channel", 1.0, "reference")
        ops.accumulate_conv2d(
            codes, scale, packed, weight_scale, y_hat, None, 8, -1, layout, *conv, torch.float32, True, backend
        )
    weight = (weight_q.double() * weight_scale.double()[:, None]).view(8, 3, 3, 16).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(x_hat.double(), weight, None, *conv[1:])
    # Five float32 additions onto values of this size.
    torch.testing.assert_close(y_hat.double(), expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def test_errors_say_what_is_allowed():
    x = activation((2, 8, 4, 4))
    with pytest.raises(ValueError, match=r"per_channel.*scale None"):
        ops.quantize_residual(x, torch.zeros_like(x), torch.ones(2), 4, "per_channel")
    with pytest.raises(ValueError, match=r"per_channel.*'per_sample'"):
        ops.quantize_activation(x, 4, "per_channel")
    with pytest.raises(ValueError, match=r"granularity='per_channel'.*scale_mode='dynamic'.*delayed"):
        ModiffConfig(granularity="per_channel", scale_mode="delayed")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModiffConfig(act_bits=4), "per_channel"),
        (ModiffConfig(act_bits=3), "per_channel"),
        (ModiffConfig(act_bits=8), "per_sample"),
        (ModiffConfig(act_bits=4, scale_mode="delayed"), "per_sample"),
        (ModiffConfig(act_bits=4, mode="quantized"), "per_sample"),
        (ModiffConfig(act_bits=4, granularity="per_tensor"), "per_tensor"),
    ],
    ids=str,
)
def test_default_granularity_of_layers(config, expected):
    assert config.layer_granularity == expected
