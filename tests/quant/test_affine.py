"""The affine quantiser: formulas, rounding, granules, weights."""

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels.quant import affine
from modiff_kernels.quant.spec import granule_count, group_count, quant_max, quant_min

BITS = (3, 4, 8)


def test_granules_are_views_in_memory_order():
    x = torch.arange(2 * 3 * 2 * 2.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    per_pixel = affine.granules(x, granule_count(x.shape, "per_token", True), True)
    assert per_pixel.shape == (8, 3)
    assert per_pixel[5].tolist() == x[1, :, 0, 1].tolist()
    per_pixel[5] = -1
    assert (x[1, :, 0, 1] == -1).all()
    assert affine.granules(x, granule_count(x.shape, "per_sample", True), True).shape == (2, 12)
    assert affine.granules(x, granule_count(x.shape, "per_tensor", True), True).shape == (1, 24)
    rows = torch.zeros(2, 5, 7)
    for granularity, count in (("per_tensor", 1), ("per_sample", 2), ("per_token", 10)):
        assert granule_count(rows.shape, granularity, False) == count


@pytest.mark.parametrize("method", affine.WEIGHT_METHODS)
@pytest.mark.parametrize("group_size", [-1, 1, 8, 9, 64, 1000])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(5, 19), (1, 1), (6, 4, 3, 3), (7, 5, 1, 1)], ids=lambda s: "x".join(map(str, s)))
def test_quantize_weight(shape, bits, group_size, method):
    weight = torch.randn(shape)
    if len(shape) == 4:
        weight = weight.to(memory_format=torch.channels_last)
    weight_q, weight_scale = affine.quantize_weight(weight, bits, group_size, method)
    n, k = shape[0], weight[0].numel()
    assert (weight_q.shape, weight_q.dtype) == ((n, k), torch.int8)
    assert weight_q.is_contiguous()
    assert weight_scale.dtype == torch.float32
    assert weight_scale.shape == ((n,) if group_size == -1 else (n, group_count(k, group_size)))
    assert quant_min(bits) <= weight_q.min() <= weight_q.max() <= quant_max(bits)
    again = affine.dequantize_weight(weight_q, weight_scale, group_size, shape)
    assert again.shape == weight.shape
    half_step = affine.expand_weight_scale(weight_scale, k, group_size).expand(n, k) / 2
    if method == "absmax":
        error = (affine.weight_rows(again) - affine.weight_rows(weight)).abs()
        assert (error <= half_step * (1 + 1e-4) + 1e-7).all()


def test_conv_weights_run_in_r_s_c_order():
    weight = torch.randn(4, 3, 2, 5)
    rows = affine.weight_rows(weight)
    for n, c, r, s in [(0, 0, 0, 0), (1, 2, 1, 4), (3, 1, 0, 3)]:
        assert rows[n, (r * 5 + s) * 3 + c] == weight[n, c, r, s]
    assert torch.equal(affine.rows_to_weight(rows, weight.shape), weight)
    x = torch.randn(1, 3, 6, 6)
    patches = F.unfold(x, (2, 5)).reshape(1, 3, 10, -1).transpose(1, 2).reshape(1, 30, -1)
    torch.testing.assert_close((rows @ patches).reshape(1, 4, 5, 2), F.conv2d(x, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [-1, 16])
def test_mse_is_never_worse_than_absmax(bits, group_size):
    weight = torch.randn(32, 64) ** 3

    def error(method):
        codes, scale = affine.quantize_weight(weight, bits, group_size, method)
        return (affine.dequantize_weight(codes, scale, group_size) - weight).square().sum()

    assert error("mse") <= error("absmax")
    if bits < 8:
        assert error("mse") < error("absmax")


def test_weights_of_zeros():
    weight_q, weight_scale = affine.quantize_weight(torch.zeros(3, 8), 4)
    assert not weight_q.any()
    assert (weight_scale > 0).all()
    assert torch.isfinite(weight_scale).all()


def test_errors():
    for arguments, message in (
        ({"bits": 5}, "bits=5 is not supported; choose one of 3, 4, 8"),
        ({"group_size": 0}, "group_size=0 is not allowed"),
        ({"group_size": -2}, "group_size=-2 is not allowed"),
        ({"method": "best"}, "method='best' is not known; choose one of 'absmax', 'mse'"),
        ({"weight": torch.zeros(2, 3, 4)}, "expected .N, K. or .N, C, R, S."),
        ({"weight": torch.tensor([[1.0, torch.nan]])}, "holds NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            affine.quantize_weight(**{"weight": torch.randn(4, 8), "bits": 4, **arguments})
