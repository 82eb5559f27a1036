"""csrc/common on the host, on all values where there are few: against quant/affine.py, quant/packing.py and torch."""

import itertools
import math

import pytest
import torch
from torch import from_numpy

from modiff_kernels.quant import affine, packing
from modiff_kernels.quant.spec import BITS, quant_max, quant_min

NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16"}


@pytest.fixture(scope="module")
def common(host_module):
    return host_module("common")


def every(dtype, finite=True):
    """Value of the 16-bit dtype."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return values[values.isfinite()] if finite else values


@pytest.mark.parametrize("dtype", NAMES, ids=str)
class TestConversions:
    def test_every_value_to_float32(self, common, dtype):
        values = every(dtype, finite=False)
        got = from_numpy(getattr(common, f"{NAMES[dtype]}_bits_to_float")(values.view(torch.uint16)))
        wanted = values.float()
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(got.nan_to_num(1.0), wanted.nan_to_num(1.0))

    def test_float32_rounds_to_nearest_even(self, common, dtype):
        """All values, all midpoints between two of them, and the float32 next to either: what rounding depends on."""
        values = every(dtype).double().unique()
        turning = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
        near = torch.cat([turning.view(torch.int32) + d for d in (-1, 0, 1)]).view(torch.float32)
        near = near[near.isfinite()]
        extremes = torch.tensor([float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 65519.0, 65520.0])
        x = torch.cat((near, extremes))
        convert = getattr(common, f"float_to_{NAMES[dtype]}_bits")
        assert torch.equal(from_numpy(convert(x)), x.to(dtype).view(torch.uint16))
        assert from_numpy(convert(torch.tensor([math.nan, -math.nan]))).view(dtype).isnan().all()


@pytest.mark.parametrize("bits", BITS)
class TestQuantiser:
    @pytest.mark.parametrize("scale", [2.0**-100, 0.1, 1.0, 3.7, 1e30])
    def test_codes_of_every_float16(self, common, bits, scale):
        x = every(torch.float16).float()
        for zero_point in (0, quant_min(bits), quant_max(bits), 1):
            got = from_numpy(common.code(x, scale, zero_point, bits))
            given = torch.tensor([zero_point], dtype=torch.int32)
            wanted = affine.quantize(x[None], torch.tensor([scale]), bits, given)
            assert torch.equal(got, wanted[0])

    @pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
    def test_scales_of_every_float16(self, common, bits, clip_ratio):
        absmax = every(torch.float16).float().abs()
        got = from_numpy(common.residual_scale(absmax, clip_ratio, bits))
        assert torch.equal(got, affine.residual_scale(absmax, bits, clip_ratio))

    @pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
    def test_multipliers_of_blocks(self, common, bits, clip_ratio):
        for spread in (0.0, 1.0, 3.0, 30.0) if bits < 8 else ():  # 8-bit codes have no multiplier
            absmax = 10.0 ** (spread * (torch.rand(1, 4096, 1) - 0.5))
            absmax[0, :2] = torch.tensor([[0.0], [1e-42]])
            scale, got = common.block_multipliers(absmax.flatten(), clip_ratio, bits)
            wanted_scale, wanted = affine.block_multipliers(absmax, bits, clip_ratio)
            assert scale == wanted_scale.item()
            assert torch.equal(from_numpy(got), wanted.flatten())

    def test_affine_ranges(self, common, bits):
        ends = torch.tensor([0.0, 1e-42, 2.0**-100, 1e-3, 0.5, 1.0, 1.7, 255.0, 65504.0, 1e38])
        pairs = torch.tensor(list(itertools.product(ends.tolist(), repeat=2)))
        low, high = torch.cat((-pairs[:, 0], -torch.rand(4096))), torch.cat((pairs[:, 1], torch.rand(4096) * 3))
        scale = common.affine_scale(low, high, bits)
        zero_point = common.affine_zero_point(low, scale, bits)
        wanted_scale, wanted_zero_point = affine.affine_range(low, high, bits)
        assert torch.equal(from_numpy(scale), wanted_scale)
        assert torch.equal(from_numpy(zero_point), wanted_zero_point)


class TestPacking:
    @pytest.mark.parametrize("bits", BITS)
    def test_rows_unpack(self, common, bits):
        for k in range(1, 40):
            assert common.packed_width(bits, k) == packing.packed_width(bits, k)
            codes = torch.randint(quant_min(bits), quant_max(bits) + 1, (5, k), dtype=torch.int8)
            assert torch.equal(from_numpy(common.unpack(packing.pack(codes, bits), bits, k)), codes)

    @pytest.mark.parametrize("bits", [3, 4])
    def test_eight_codes_pack(self, common, bits):
        """Every code at every place, beside neighbours of every kind."""
        values = range(quant_min(bits), quant_max(bits) + 1)
        rows = [
            [other] * place + [value] + [other] * (7 - place)
            for value, other, place in itertools.product(values, values, range(8))
        ]
        drawn = torch.randint(values.start, values.stop, (2000, 8), dtype=torch.int8)
        codes = torch.cat((torch.tensor(rows, dtype=torch.int8), drawn))
        assert torch.equal(from_numpy(common.pack_eights(codes, bits)), packing.pack(codes, bits))

    def test_words_of_nibbles_unpack(self, common):
        """All 16-bit halves, in the lower and in the upper place."""
        halves = torch.arange(1 << 16)
        words = torch.cat((halves, halves << 16 | 0x1234)).to(torch.uint32)
        wanted = packing.unpack(words.view(torch.uint8).view(-1, 4), 4, 8)
        assert torch.equal(from_numpy(common.unpack_words(words)), wanted)

    def test_planes_unpack(self, common):
        """Every code in every place among each other code, and random rows."""
        places = torch.eye(32, dtype=torch.bool)
        one = [torch.where(places, value, other) for value, other in itertools.product(range(-4, 4), repeat=2)]
        codes = torch.cat((*one, torch.randint(-4, 4, (4096, 32)))).to(torch.int8)
        assert torch.equal(from_numpy(common.unpack_planes(packing.pack(codes, 3))), codes)
