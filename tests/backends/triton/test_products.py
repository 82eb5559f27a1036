"""The integer product in all its forms, against oracles in int64 and float64 that share no code with it."""

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels.backends.triton import products
from modiff_kernels.backends.triton.product_kernel import ACCUMULATE, INITIALIZE, OUTPUT
from modiff_kernels.backends.triton.tile_configs import TileConfig
from modiff_kernels.quant.packing import pack
from tests.backends.product_cases import (
    CONVS,
    FLOAT_CASES,
    LINEARS,
    POINTWISE,
    assert_close,
    by_column,
    by_sample,
    codes_like,
    conv_of,
    float_case,
    integer_sums,
    state_like,
    weight_like,
)
from tests.ops.op_cases import ConvCase, LinearCase

SMALL = TileConfig(64, 64, 32, 4, 2)
DEEP = TileConfig(64, 64, 128, 4, 2)


def begins_at_bytes(case):
    """Whether every tap of a 3- or 4-bit weight does; `why_not` sends the others to the reference."""
    return case.kind == "linear" or case.kernel_size == (1, 1) or case.weight_shape[1] % 8 == 0


def product(device, codes, scale, packed, weight_scale, *, zero_point=None, bias=None, epilogue, y_hat=None, skip=None,
            write_out=True, out_dtype=torch.float32, bits=8, group_size=-1, conv=None, config=SMALL):  # fmt: skip
    """`integer_product` on `device`; y_hat is updated in place, the result comes back to the CPU."""
    moved = [None if t is None else t.to(device) for t in (codes, scale, zero_point, packed, weight_scale, bias)]
    state = None if y_hat is None else y_hat.to(device)
    skip = None if skip is None else skip.to(device)
    out = products.integer_product(*moved, epilogue, state, skip, write_out, out_dtype, bits, group_size, conv, config)
    if y_hat is not None and state is not y_hat:
        y_hat.copy_(state)
    return out.cpu()


def unit_product(device, case, codes, rows, bits, config, **more):
    """With scales of 1 the product is the integer sums, exactly as long as they are below 2^24."""
    return product(
        device, codes, torch.ones(1), pack(rows, bits), torch.ones(case.n), bits=bits, conv=conv_of(case),
        config=config, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "bits"),
    [(case, bits) for case in LINEARS + CONVS for bits in (8, 4, 3) if bits == 8 or begins_at_bytes(case)],
    ids=str,
)
def test_sums_are_exact(device, case, bits, poisoned_empty):
    codes = codes_like(case)
    rows, dense = weight_like(case, bits)
    expected = integer_sums(case, codes, dense)
    assert expected.abs().max() < 2**24
    out = unit_product(
        device, case, codes, rows, bits, SMALL, epilogue=ACCUMULATE, y_hat=state_like(case, torch.float32)
    )
    assert torch.equal(out.double(), expected)
    assert out.stride() == state_like(case, torch.float32).stride()


@pytest.mark.parametrize("config", [TileConfig(128, 128, 128, 8, 3), TileConfig(128, 64, 64, 4, 3), DEEP], ids=str)
@pytest.mark.parametrize("case", [LinearCase((130, 200), 130), ConvCase((2, 40, 9, 8), 65)], ids=str)
def test_every_tile_gives_the_same_sums(device, case, config, poisoned_empty):
    codes = codes_like(case)
    rows, dense = weight_like(case, 8)
    out = unit_product(device, case, codes, rows, 8, config, epilogue=OUTPUT)
    assert torch.equal(out.double(), integer_sums(case, codes, dense))


@pytest.mark.parametrize("group_m", [1, 3])
def test_the_order_of_tiles_covers_all(device, group_m, poisoned_empty):
    case = LinearCase((260, 32), 200)  # 5 x 4 tiles: bands of 3 leave a rest
    codes = codes_like(case)
    rows, dense = weight_like(case, 8)
    config = TileConfig(64, 64, 32, 4, 2, group_m=group_m)
    out = unit_product(device, case, codes, rows, 8, config, epilogue=OUTPUT)
    assert torch.equal(out.double(), integer_sums(case, codes, dense))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("split_k", [2, 3, 16])
@pytest.mark.parametrize("case", [LinearCase((5, 320), 33), ConvCase((1, 32, 4, 4), 65)], ids=str)
def test_splits_of_k_give_the_same_sums(device, case, split_k, bits, poisoned_empty):
    codes = codes_like(case)
    rows, dense = weight_like(case, bits)
    config = TileConfig(64, 64, 32, 4, 2, split_k=split_k)
    y_hat = state_like(case, torch.float32, 3.0)
    out = unit_product(device, case, codes, rows, bits, config, epilogue=ACCUMULATE, y_hat=y_hat)
    expected = integer_sums(case, codes, dense) + 3
    assert torch.equal(out.double(), expected)
    assert torch.equal(y_hat.double(), expected)


def test_the_largest_sums_do_not_leave_int32(device):
    codes = torch.full((1, 65536), -128, dtype=torch.int8)
    rows = torch.full((1, 65536), -128, dtype=torch.int8)
    zero_point = torch.full((1,), 127, dtype=torch.int32)
    out = product(
        device, codes, torch.ones(1), rows, torch.ones(1), zero_point=zero_point, epilogue=OUTPUT,
        config=TileConfig(64, 64, 128, 4, 2, split_k=4),
    )  # fmt: skip
    assert out.item() == 255 * 128 * 65536


STATES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("state_dtype", STATES, ids=str)
@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_accumulate_and_initialize(device, case, state_dtype, with_skip, split_k, poisoned_empty):
    if state_dtype is torch.bfloat16 and device.type != "cuda":
        pytest.skip("the interpreter truncates instead of rounding to bfloat16")
    out_dtype = torch.float16
    config = TileConfig(64, 64, 32, 4, 2, split_k=split_k)
    codes, scale, packed, weight_scale, dense = float_case(case, 8)
    scale = scale / 1e5  # float16 ends at 65504
    before = (state_like(case, torch.float32) + torch.randn(case.y_shape)).to(state_dtype)
    skip = (state_like(case, torch.float32) + torch.randn(case.y_shape)).to(out_dtype) if with_skip else None
    bias = torch.randn(case.n)
    v = case.apply(codes.double(), dense) * by_sample(scale.double(), case)
    magnitude = case.apply(codes.double().abs(), dense.abs()) * by_sample(scale.double(), case) + before.double().abs()
    for epilogue, given, expected in (
        (ACCUMULATE, None, before.double() + v),
        (INITIALIZE, bias, v + by_column(bias.double(), case)),
    ):
        y_hat = before.clone() if epilogue == ACCUMULATE else torch.full_like(before, torch.nan)
        out = product(
            device, codes, scale, packed, weight_scale, bias=given, epilogue=epilogue, y_hat=y_hat, skip=skip,
            out_dtype=out_dtype, conv=conv_of(case), config=config,
        )  # fmt: skip
        assert_close(y_hat, expected, magnitude)
        total = y_hat.float() if skip is None else y_hat.float() + skip.float()
        assert out.dtype == out_dtype
        assert torch.equal(out, total.to(out_dtype)), "out is made from y_hat as it was stored"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("case", [LinearCase((3, 200), 33), ConvCase((2, 64, 5, 4), 24)], ids=str)
def test_group_scales_and_zero_points(device, case, bits, group_size, split_k, poisoned_empty):
    codes, scale, packed, weight_scale, dense = float_case(case, bits, group_size)
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int32)
    bias, skip = torch.randn(case.n), state_like(case, torch.float32) + torch.randn(case.y_shape)
    out = product(
        device, codes, scale, packed, weight_scale, zero_point=zero_point, bias=bias, epilogue=OUTPUT, skip=skip,
        bits=bits, group_size=group_size, conv=conv_of(case), config=TileConfig(64, 64, 32, 4, 2, split_k=split_k),
    )  # fmt: skip
    values = codes.double() - zero_point.double().view(-1, *[1] * (codes.ndim - 1))
    expected = (
        case.apply(values, dense) * by_sample(scale.double(), case) + by_column(bias.double(), case) + skip.double()
    )
    magnitude = case.apply(values.abs(), dense.abs()) * by_sample(scale.double(), case) + skip.double().abs() + 4
    steps = codes[0].numel() // 32
    assert_close(out, expected, magnitude, extra=steps * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("case", [c for c in CONVS if begins_at_bytes(c)] + LINEARS[:4], ids=str)
def test_zero_points_reach_the_border(device, case, bits, poisoned_empty):
    """Padding stands for x = 0, which has the code zero_point: nothing comes from outside of the image."""
    codes, scale, _, weight_scale, _ = float_case(case, bits)
    rows, dense = weight_like(case, bits)
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int32)
    out = product(
        device, codes, torch.ones_like(scale), pack(rows, bits), torch.ones_like(weight_scale), zero_point=zero_point,
        epilogue=OUTPUT, bits=bits, conv=conv_of(case),
    )  # fmt: skip
    values = codes.double() - zero_point.double().view(-1, *[1] * (codes.ndim - 1))
    assert torch.equal(out.double(), case.apply(values, dense.double()))


@pytest.mark.parametrize("count", [1, 3, 15], ids=["per_tensor", "per_sample", "per_token"])
@pytest.mark.parametrize("pointwise", [False, True])
def test_scales_cover_consecutive_rows(device, count, pointwise, poisoned_empty):
    case = ConvCase((3, 32, 5, 1), 24, **POINTWISE) if pointwise else LinearCase((3, 5, 32), 24)
    codes, scale, packed, weight_scale, dense = float_case(case, 8, samples=count)
    out = product(device, codes, scale, packed, weight_scale, epilogue=OUTPUT, conv=conv_of(case))
    rows = scale.double().repeat_interleave(15 // count)
    rows = rows.view(3, 1, 5, 1) if pointwise else rows.view(3, 5, 1)
    expected = case.apply(codes.double(), dense) * rows
    assert_close(out, expected, case.apply(codes.double().abs(), dense.abs()) * rows)


@pytest.mark.parametrize("epilogue", [ACCUMULATE, INITIALIZE])
def test_without_out_the_state_alone_is_written(device, epilogue, poisoned_empty):
    case = LinearCase((3, 32), 24)
    codes = codes_like(case)
    rows, dense = weight_like(case, 8)
    y_hat = state_like(case, torch.float32)
    out = unit_product(device, case, codes, rows, 8, SMALL, epilogue=epilogue, y_hat=y_hat, write_out=False)
    assert out.shape == (0,)
    assert torch.equal(y_hat.double(), integer_sums(case, codes, dense))


def test_rows_past_the_end_are_not_touched(device):
    """The tile is larger than the tensors, which lie in the middle of a larger buffer."""
    case = LinearCase((3, 32), 24)
    codes = codes_like(case)
    rows, dense = weight_like(case, 8)
    buffer = torch.full((9, 24), 7.0)
    y_hat = buffer[3:6]
    y_hat.zero_()
    unit_product(device, case, codes, rows, 8, SMALL, epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(buffer[3:6].double(), integer_sums(case, codes, dense))
    assert (buffer[:3] == 7).all()
    assert (buffer[6:] == 7).all()


def test_a_layer_of_stable_diffusion(device, poisoned_empty):
    """Columns of the first resnet of SD 1.5 (320 channels at 64x64), cut to a few rows."""
    case = ConvCase((1, 320, 4, 16), 64)
    codes = codes_like(case, bits=4)
    rows, _ = weight_like(case, 4)
    dense = rows.view(64, 3, 3, 320).permute(0, 3, 1, 2)
    config = TileConfig(64, 64, 64, 4, 4)
    out = unit_product(device, case, codes, rows, 4, config, epilogue=OUTPUT)
    assert torch.equal(out.double(), F.conv2d(codes.double(), dense.double(), padding=1))


@pytest.mark.parametrize("channels", [8, 24])
@pytest.mark.parametrize("weight_bits", [4, 3])
def test_short_taps_of_packed_weights(device, weight_bits, channels, poisoned_empty):
    case = ConvCase((1, channels, 4, 4), 16)
    codes = codes_like(case)
    rows, dense = weight_like(case, weight_bits)
    out = unit_product(device, case, codes, rows, weight_bits, SMALL, epilogue=OUTPUT)
    assert torch.equal(out.double(), integer_sums(case, codes, dense))
