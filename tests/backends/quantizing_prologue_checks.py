"""Checks of GroupNorm+SiLU, LayerNorm and GEGLU in front of the two quantisers, for the test modules of backends.

Norm and activation are float32 sums in another order than the reference's, so that x differs in its last bits and a
code at a rounding tie by one. Everywhere else codes equal the reference's, and the state is consistent with the codes
that were sent.
"""

import itertools

import pytest
import torch

from tests.backends.quantizing_cases import (
    DTYPE_PAIRS,
    GRANULARITIES,
    assert_results_like,
    assert_updated,
    expected,
    run,
    scales,
    skip_bfloat16,
    spread,
)
from tests.ops.op_cases import is_image, memory_format_of
from tests.ops.test_fused_prologues import Geglu, GroupNorm, LayerNorm

CASES = {
    "group_norm-2x96x8x8": lambda dtype: GroupNorm((2, 96, 8, 8), 8, dtype),
    "group_norm-2x63x4x4": lambda dtype: GroupNorm((2, 63, 4, 4), 3, dtype),
    "group_norm-1x32x13x5": lambda dtype: GroupNorm((1, 32, 13, 5), 8, dtype),
    "group_norm-2x9x12": lambda dtype: GroupNorm((2, 9, 12), 3, dtype),
    "layer_norm-2x7": lambda dtype: LayerNorm((2, 7), dtype),
    "layer_norm-3x5x63": lambda dtype: LayerNorm((3, 5, 63), dtype),
    "layer_norm-2x16x320": lambda dtype: LayerNorm((2, 16, 320), dtype),
    "geglu-2x7": lambda dtype: Geglu((2, 7), dtype),
    "geglu-3x5x63": lambda dtype: Geglu((3, 5, 63), dtype),
    "geglu-2x9x128": lambda dtype: Geglu((2, 9, 128), dtype),
}
LAYERS = {
    "group_norm-2x320x64x64": lambda dtype: GroupNorm((2, 320, 64, 64), 32, dtype),
    "group_norm-1x2560x8x8": lambda dtype: GroupNorm((1, 2560, 8, 8), 32, dtype),
    "group_norm-2x1024x640": lambda dtype: GroupNorm((2, 1024, 640), 32, dtype),
    "layer_norm-2x1024x640": lambda dtype: LayerNorm((2, 1024, 640), dtype),
    "geglu-2x256x5120": lambda dtype: Geglu((2, 256, 5120), dtype),
}
ON_GPU = [pytest.param(make, marks=pytest.mark.gpu, id=name) for name, make in LAYERS.items()]
ALL = [*(pytest.param(make, id=name) for name, make in CASES.items()), *ON_GPU]
ONE_EACH = [
    pytest.param(CASES[name], id=name) for name in ("group_norm-1x32x13x5", "layer_norm-3x5x63", "geglu-2x9x128")
]


def noise(x, largest):
    """How far two float32 evaluations of a norm or activation may lie apart: about 30 roundings of the values."""
    return 4e-6 * (1 + x.abs() + largest)


def assert_codes(codes, wanted, scaled, tolerance):
    """Equal, or one apart where `scaled`, float64, lies within `tolerance` (or 1e-4) of a tie."""
    difference = (codes.int() - wanted.int()).abs()
    assert difference.max() <= 1
    from_tie = (scaled - scaled.floor() - 0.5).abs()
    unexplained = (difference > 0) & (from_tie > tolerance + 1e-4)
    assert not unexplained.any(), f"{unexplained.sum()} of {codes.numel()} codes differ away from a tie"


def skip_layers(case, place):
    if not place.on_gpu and case.h.numel() > 1 << 17:
        pytest.skip("a layer of a UNet takes minutes without a GPU")


def check_residual(case, place, state_dtype, scale, bits, granularity, clip_ratio=1.0):
    skip_layers(case, place)
    x = case.x()
    memory_format = memory_format_of(case.image)
    x_hat = (x + 0.2 * torch.randn_like(x)).to(state_dtype).contiguous(memory_format=memory_format)
    op = f"{case.name}_quantize_residual"
    arguments = (case.h, *case.arguments, x_hat, scale, bits, granularity, clip_ratio)
    results, after = run(op, *arguments, place=place)
    wanted, _ = expected(op, *arguments)
    assert_results_like(results, wanted, memory_format)
    codes, used, absmax = results
    for i, argument in enumerate(arguments):
        if argument is not x_hat and isinstance(argument, torch.Tensor):
            assert torch.equal(after[i], argument)
    assert_updated(after[1 + len(case.arguments)], x_hat, codes, used)
    allowed = noise(x.abs().max(), 0).item()
    torch.testing.assert_close(absmax, wanted[2], rtol=0, atol=allowed)
    if scale is None:
        torch.testing.assert_close(used, wanted[1], rtol=0, atol=allowed)
    else:
        assert torch.equal(used, wanted[1])
    step, largest = spread(used, x.shape), spread(absmax, x.shape)
    if granularity == "per_block" and bits < 8:
        # The step is a multiple of the scale; half of it and the rounding of x bound the error where nothing clips.
        error = (x - after[1 + len(case.arguments)].double()).abs()
        step = step * 2 ** (8 - bits)
        assert (error <= 0.5001 * step + noise(x, largest) + torch.finfo(state_dtype).eps * x.abs()).all()
        assert (codes != wanted[0]).double().mean() <= 0.01  # ties, and multipliers whose ceiling jumps
    else:
        scaled = (x - x_hat.double()) / step
        assert_codes(codes, wanted[0], scaled, noise(x, largest) / step)


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
@pytest.mark.parametrize("make", ALL)
def test_dynamic_residual(place, make, granularity):
    check_residual(make(torch.float32), place, torch.float32, None, 4, granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("make", ALL)
def test_residual_with_given_scale(place, make, granularity):
    case = make(torch.float32)
    shape = case.h.shape if not isinstance(case, Geglu) else (*case.h.shape[:-1], case.h.shape[-1] // 2)
    check_residual(case, place, torch.float16, scales(shape, granularity)[-1], 4, granularity)


@pytest.mark.parametrize(("dtype", "state_dtype"), DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("make", ONE_EACH)
def test_residual_dtypes(place, make, dtype, state_dtype):
    skip_bfloat16(place, dtype, state_dtype)
    check_residual(make(dtype), place, state_dtype, None, 4, "per_sample")


@pytest.mark.parametrize(("bits", "clip_ratio"), [(3, 1.0), (8, 1.0), (4, 0.7)])
@pytest.mark.parametrize("make", ONE_EACH)
def test_residual_bits_and_clip_ratio(place, make, bits, clip_ratio):
    for granularity in ("per_sample", "per_token"):
        check_residual(make(torch.float32), place, torch.float32, None, bits, granularity, clip_ratio)


@pytest.mark.parametrize(("silu", "shift", "affine"), list(itertools.product([True, False], repeat=3)))
def test_group_norm_options(place, silu, shift, affine):
    for shape, groups in [((2, 24, 4, 4), 4), ((2, 5, 24), 1), ((2, 6, 3, 3), 6)]:
        case = GroupNorm(shape, groups, silu=silu, shift=shift, affine=affine, eps=1e-3)
        check_residual(case, place, torch.float32, None, 8, "per_sample")


def test_layer_norm_without_weights(place):
    check_residual(LayerNorm((2, 5, 24), affine=False, eps=1e-3), place, torch.float32, None, 8, "per_token")


@pytest.mark.parametrize("height", [8, 40, 160])
def test_group_norm_of_values_far_from_zero(place, height):
    """Statistics of 1, 5 and 20 row blocks, merged: the variance of 1000 +- 1 does not cancel."""
    case = GroupNorm((1, 32, height, 4), 4)
    case.h += 1000
    x = case.x()
    x_hat = torch.zeros(x.shape).contiguous(memory_format=torch.channels_last)
    scale = 2.0**-6
    arguments = (case.h, *case.arguments, x_hat, torch.tensor([scale]), 8, "per_sample")
    (codes, _, _), _ = run("group_norm_silu_quantize_residual", *arguments, place=place)
    # Half a step, and a few roundings of 1000 in float32 (3e-5 each), which the norm divides by about 1.
    assert ((codes - (x / scale).clamp(-128, 127)).abs() * scale <= 0.5 * scale + 2e-4).all()


@pytest.mark.parametrize(
    ("granularity", "affine"), [*((name, True) for name in GRANULARITIES), ("per_sample", False), ("per_token", False)]
)
@pytest.mark.parametrize("make", ALL)
def test_activation(place, make, granularity, affine):
    case = make(torch.float32)
    skip_layers(case, place)
    x = case.x()
    op = f"{case.name}_quantize_activation"
    arguments = (case.h, *case.arguments, 8, granularity, affine)
    results, after = run(op, *arguments, place=place)
    wanted, _ = expected(op, *arguments)
    assert_results_like(results, wanted, memory_format_of(is_image(x.shape)))
    assert torch.equal(after[0], case.h)
    codes, scale, zero_point = results
    torch.testing.assert_close(scale, wanted[1], rtol=0, atol=noise(x.abs().max(), 0).item())
    assert affine or not zero_point.any()
    step = spread(scale, x.shape)
    tolerance = noise(x, x.abs().max()) / step
    offset = (zero_point - wanted[2]).abs()
    assert offset.max() <= 1
    shifted = codes.int() - spread(zero_point, x.shape).int()
    assert_codes(shifted, wanted[0].int() - spread(wanted[2], x.shape).int(), x / step, tolerance)
