"""The integer product in all its forms, emulated under sanitizers and on a GPU, against oracles in int64 and float64
that share no code with it.
"""

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels.backends.cuda import library, products
from modiff_kernels.quant.packing import pack, pack_channels
from tests.backends.product_cases import (
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

ACCUMULATE, INITIALIZE, OUTPUT = range(3)
LARGE, NARROW, SMALL = range(3)  # csrc/cuda/sm80/tile_config.h kTiles

LINEARS = [
    LinearCase((1, 16), 1),
    LinearCase((2, 3, 48), 65),  # less than a step along K, one above a tile
    LinearCase((65, 64), 64),
    LinearCase((63, 144), 63),
    LinearCase((64, 320), 320),  # SD 1.5, first level
]
CONVS = [
    ConvCase((2, 16, 5, 7), 24),  # four taps in a step along K
    ConvCase((1, 32, 9, 9), 8, stride=(2, 2), padding=(0, 0)),  # diffusers pads by hand before downsampling
    ConvCase((2, 48, 7, 5), 65, stride=(2, 2)),  # a step begins inside of a tap
    ConvCase((1, 16, 7, 9), 12, padding=(2, 2), dilation=(2, 2)),
    ConvCase((2, 64, 4, 4), 65, **POINTWISE),
    ConvCase((1, 16, 8, 8), 8, (1, 1), (2, 2), (0, 0)),
    ConvCase((1, 16, 3, 3), 8, (1, 1), (1, 1), (1, 1)),
    ConvCase((2, 16, 6, 7), 8, (3, 1), padding=(1, 0)),
    ConvCase((1, 32, 8, 8), 7, (5, 5), (2, 1), (2, 2)),
    ConvCase((3, 16, 2, 2), 8, (3, 3), padding=(3, 3)),  # whole windows lie outside
]


class Kernels:
    """`product` with tensors of the CPU, where the kernels run. The tile can be chosen in the emulation alone."""

    def __init__(self, device, emulator=None):
        self.device, self.emulator = device, emulator

    def product(self, codes, scale, packed, weight_scale, *, zero_point=None, bias=None, epilogue=OUTPUT, y_hat=None,
                skip=None, write_out=True, out_dtype=torch.float32, bits=8, conv=None, tile=SMALL, splits=1,
                falling=False, cut=()):  # fmt: skip
        if self.emulator is not None:
            self.emulator.tile, self.emulator.splits, self.emulator.falling = tile, splits, falling
        elif (tile, splits, falling) != (SMALL, 1, False):
            pytest.skip("a GPU gets the tile that is chosen for it")
        tensors = (codes, scale, zero_point, packed, weight_scale, bias)
        moved = [None if t is None else t.to(self.device) for t in tensors]
        state = None if y_hat is None else y_hat.to(self.device)
        skip = None if skip is None else skip.to(self.device)
        out = products.integer_product(*moved, epilogue, state, skip, write_out, out_dtype, bits, conv, cut)
        if state is not y_hat:
            y_hat.copy_(state)
        return out.cpu()

    def sums(self, case, codes, rows, bits, **more):
        """With scales of 1 the product is the integer sums, exactly as long as they are below 2^24."""
        packed = pack(rows, bits)
        return self.product(
            codes, torch.ones(1), packed, torch.ones(case.n), bits=bits, conv=conv_of(case), **more
        ).double()  # fmt: skip

    def chosen(self):
        """For `product`: the tile that is chosen for a GPU of four multiprocessors."""
        return {} if self.emulator is None else {"tile": self.emulator.CHOOSE, "splits": 4}


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request, monkeypatch):
    if request.param == "cuda":
        if (reason := library.unavailable()) is not None:
            pytest.skip(reason)
        return Kernels(torch.device("cuda"))
    emulator = request.getfixturevalue("product_emulator")
    monkeypatch.setattr(library, "product_op", lambda: emulator.product)
    return Kernels(torch.device("cpu"), emulator)


UNFIT = "packed rows are whole pieces of 32 codes"


def fits(case, bits):
    """Whether the kernels read such a weight; `why_not` refuses the others."""
    return bits == 8 or torch.Size(case.weight_shape[1:]).numel() % 32 == 0


def operands(case, bits):
    codes = codes_like(case)
    rows, dense = weight_like(case, bits)
    expected = integer_sums(case, codes, dense)
    assert expected.abs().max() < 2**24
    return codes, rows, expected


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", LINEARS + CONVS, ids=str)
def test_sums_are_exact(kernels, case, bits):
    if not fits(case, bits):
        pytest.skip(UNFIT)
    codes, rows, expected = operands(case, bits)
    y_hat = state_like(case, torch.float32)
    out = kernels.sums(case, codes, rows, bits, epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(out, expected)
    assert torch.equal(y_hat.double(), expected)


CASES = [LinearCase((130, 320), 130), ConvCase((2, 48, 9, 8), 65), ConvCase((1, 32, 12, 12), 136)]


@pytest.mark.parametrize("tile", [LARGE, NARROW, SMALL])
@pytest.mark.parametrize(("case", "bits"), [(CASES[0], 8), (CASES[1], 8), (CASES[0], 4), (CASES[2], 3)], ids=str)
def test_every_tile_gives_the_same_sums(kernels, case, bits, tile):
    codes, rows, expected = operands(case, bits)
    assert torch.equal(kernels.sums(case, codes, rows, bits, tile=tile), expected)


@pytest.mark.parametrize("cut", [(80, 128, 128, 1), (80, 128, 64, 2), (80, 64, 64, 3)], ids=str)
def test_the_caller_may_name_the_cut(kernels, cut):
    codes, rows, expected = operands(CASES[1], 8)
    assert torch.equal(kernels.sums(CASES[1], codes, rows, 8, cut=cut), expected)


@pytest.mark.parametrize("tile", [LARGE, NARROW, SMALL])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_order_of_threads_and_the_time_of_copies_change_nothing(kernels, bits, tile):
    """Falling order: copies arrive when they are issued; rising order: when they are waited for."""
    codes, rows, expected = operands(CASES[0], bits)
    assert torch.equal(kernels.sums(CASES[0], codes, rows, bits, tile=tile, falling=True), expected)


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize(
    ("case", "bits"),
    [(LinearCase((5, 320), 33), 8), (LinearCase((5, 320), 33), 4), (ConvCase((1, 32, 4, 4), 65), 8)],
    ids=str,
)
def test_splits_of_k_give_the_same_sums(kernels, case, bits, splits):
    """320 codes are five steps, so that three splits have two, two and one; 288 are four and a half."""
    codes, rows, expected = operands(case, bits)
    y_hat = state_like(case, torch.float32, 3.0)
    out = kernels.sums(case, codes, rows, bits, splits=splits, epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(out, expected + 3)
    assert torch.equal(y_hat.double(), expected + 3)


def test_bands_of_tiles_cover_all(kernels):
    case = LinearCase((64 * 9 + 1, 16), 130)  # 10 x 3 tiles: a band of 8 and a rest
    codes, rows, expected = operands(case, 8)
    assert torch.equal(kernels.sums(case, codes, rows, 8), expected)


def test_the_largest_sums_do_not_leave_int32(kernels):
    k = products.MAX_K
    codes, rows = (torch.full((1, k), -128, dtype=torch.int8) for _ in range(2))
    zero_point = torch.full((1,), 127, dtype=torch.int32)
    ones = torch.ones(1)
    out = kernels.product(codes, ones, rows, ones, zero_point=zero_point, **kernels.chosen())
    assert out.item() == 255 * 128 * k


NIBBLE_CASES = [
    LinearCase((3, 32), 9),
    LinearCase((65, 160), 72),
    ConvCase((2, 32, 5, 7), 24),
    ConvCase((1, 96, 6, 5), 66, stride=(2, 2)),
    ConvCase((2, 64, 4, 4), 65, **POINTWISE),
]


@pytest.mark.parametrize(("tile", "splits"), [(SMALL, 1), (SMALL, 2), (NARROW, 1), (LARGE, 1)])
@pytest.mark.parametrize("case", NIBBLE_CASES, ids=str)
def test_packed_codes_are_multiplied_as_they_are(kernels, case, tile, splits):
    if kernels.device.type == "cuda" and not library.LEAST_CAPABILITY <= library.capability(kernels.device) < (9, 0):
        pytest.skip("this GPU has no 4-bit tensor cores")
    codes = codes_like(case, bits=4)
    rows, dense = weight_like(case, 4)
    packed = pack_channels(codes, 4)
    assert packed.dtype == torch.uint8
    out = kernels.sums(case, packed, rows, 4, tile=tile, splits=splits, falling=splits == 2)
    assert torch.equal(out, integer_sums(case, codes, dense))


FLOAT_CASES = [LinearCase((3, 5, 64), 33), ConvCase((2, 16, 5, 7), 24), ConvCase((2, 32, 5, 5), 20, stride=(2, 2))]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_accumulate_and_initialize(kernels, case, state_dtype, with_skip, splits):
    out_dtype = torch.bfloat16 if state_dtype is torch.float16 else torch.float16
    codes, scale, packed, weight_scale, dense = float_case(case, 8)
    scale = scale / 1e5  # float16 ends at 65504
    before = (state_like(case, torch.float32) + torch.randn(case.y_shape)).to(state_dtype)
    skip = (state_like(case, torch.float32) + torch.randn(case.y_shape)).to(out_dtype) if with_skip else None
    bias = torch.randn(case.n).to(out_dtype)
    v = case.apply(codes.double(), dense) * by_sample(scale.double(), case)
    magnitude = case.apply(codes.double().abs(), dense.abs()) * by_sample(scale.double(), case) + before.double().abs()
    for epilogue, given, expected in (
        (ACCUMULATE, None, before.double() + v),
        (INITIALIZE, bias, v + by_column(bias.double(), case)),
    ):
        y_hat = before.clone() if epilogue == ACCUMULATE else torch.full_like(before, torch.nan)
        out = kernels.product(
            codes, scale, packed, weight_scale, bias=given, epilogue=epilogue, y_hat=y_hat, skip=skip,
            out_dtype=out_dtype, conv=conv_of(case), splits=splits,
        )  # fmt: skip
        assert_close(y_hat, expected, magnitude)
        total = y_hat.float() if skip is None else y_hat.float() + skip.float()
        assert out.dtype == out_dtype
        assert out.stride() == y_hat.stride()
        assert torch.equal(out, total.to(out_dtype)), "out is made from y_hat as it was stored"


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FLOAT_CASES, ids=str)
def test_output_with_zero_points_bias_and_skip(kernels, case, out_dtype, splits):
    codes, scale, packed, weight_scale, dense = float_case(case, 8)
    scale = scale / 1e5
    zero_point = torch.randint(-128, 128, scale.shape, dtype=torch.int32)
    bias, skip = torch.randn(case.n), (state_like(case, torch.float32) + torch.randn(case.y_shape)).to(out_dtype)
    out = kernels.product(
        codes, scale, packed, weight_scale, zero_point=zero_point, bias=bias, skip=skip, out_dtype=out_dtype,
        conv=conv_of(case), splits=splits,
    )  # fmt: skip
    values = codes.double() - zero_point.double().view(-1, *[1] * (codes.ndim - 1))
    v = case.apply(values, dense) * by_sample(scale.double(), case)
    magnitude = case.apply(values.abs(), dense.abs()) * by_sample(scale.double(), case) + skip.double().abs() + 4
    assert_close(out, v + by_column(bias.double(), case) + skip.double(), magnitude)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("case", CONVS[1:] + LINEARS[2:4], ids=str)
def test_zero_points_reach_the_border(kernels, case, bits):
    """Padding stands for x = 0, which has the code zero_point: nothing comes from outside of the image."""
    if not fits(case, bits):
        pytest.skip(UNFIT)
    codes = codes_like(case)
    rows, dense = weight_like(case, bits)
    samples = case.x_shape[0]
    zero_point = torch.randint(-128, 128, (samples,), dtype=torch.int32)
    out = kernels.product(
        codes, torch.ones(samples), pack(rows, bits), torch.ones(case.n), zero_point=zero_point, bits=bits,
        conv=conv_of(case),
    )  # fmt: skip
    values = codes.double() - zero_point.double().view(-1, *[1] * (codes.ndim - 1))
    assert torch.equal(out.double(), case.apply(values, dense.double()))


@pytest.mark.parametrize("count", [1, 3, 15], ids=["per_tensor", "per_sample", "per_token"])
@pytest.mark.parametrize("pointwise", [False, True])
def test_scales_cover_consecutive_rows(kernels, count, pointwise):
    case = ConvCase((3, 32, 5, 1), 24, **POINTWISE) if pointwise else LinearCase((3, 5, 32), 24)
    codes, scale, packed, weight_scale, dense = float_case(case, 8, samples=count)
    out = kernels.product(codes, scale, packed, weight_scale, conv=conv_of(case))
    rows = scale.double().repeat_interleave(15 // count)
    rows = rows.view(3, 1, 5, 1) if pointwise else rows.view(3, 5, 1)
    expected = case.apply(codes.double(), dense) * rows
    assert_close(out, expected, case.apply(codes.double().abs(), dense.abs()) * rows)


@pytest.mark.parametrize("epilogue", [ACCUMULATE, INITIALIZE])
def test_without_out_the_state_alone_is_written(kernels, epilogue):
    codes, rows, expected = operands(LINEARS[2], 8)
    y_hat = state_like(LINEARS[2], torch.float32)
    out = kernels.sums(LINEARS[2], codes, rows, 8, epilogue=epilogue, y_hat=y_hat, write_out=False)
    assert out.shape == (0,)
    assert torch.equal(y_hat.double(), expected)


def test_tensors_on_addresses_that_are_not_aligned(kernels):
    """Views into larger tensors: codes and weights are copied, everything else is read as it is."""
    case = LinearCase((7, 64), 24)
    codes, rows, expected = operands(case, 8)
    shifted = torch.cat((torch.zeros(1, dtype=torch.int8), codes.flatten()))[1:].view(codes.shape)
    packed = torch.cat((torch.zeros(3, dtype=torch.int8), rows.flatten()))[3:].view(rows.shape)
    assert shifted.data_ptr() % 16 != 0
    assert packed.data_ptr() % 16 != 0
    y_hat = torch.full((7 * 24 + 1,), 2.0)[1:].view(7, 24)
    out = kernels.product(shifted, torch.ones(1), packed, torch.ones(24), epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(out.double(), expected + 2)


def test_rows_past_the_end_are_not_touched(kernels):
    """The tile is larger than the tensors, which lie in the middle of a larger buffer."""
    case = LinearCase((3, 32), 24)
    codes, rows, expected = operands(case, 8)
    buffer = torch.full((9, 24), 7.0)
    y_hat = buffer[3:6]
    y_hat.zero_()
    kernels.sums(case, codes, rows, 8, epilogue=ACCUMULATE, y_hat=y_hat)
    assert torch.equal(buffer[3:6].double(), expected)
    assert (buffer[:3] == 7).all()
    assert (buffer[6:] == 7).all()


def test_a_layer_of_stable_diffusion(kernels):
    """Columns of the first resnet of SD 1.5 (320 channels at 64x64), cut to a few rows, in the tile that is chosen."""
    case = ConvCase((1, 320, 4, 16), 64)
    codes = codes_like(case, bits=4)
    rows, _ = weight_like(case, 4)
    dense = rows.view(64, 3, 3, 320).permute(0, 3, 1, 2)
    out = kernels.sums(case, codes, rows, 4, **kernels.chosen())
    assert torch.equal(out, F.conv2d(codes.double(), dense.double(), padding=1))
