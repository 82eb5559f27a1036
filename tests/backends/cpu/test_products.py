"""The raw integer products of the CPU library and its weight layout: exact sums, epilogues, odd windows."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from tests.backends.cpu.cases import (
    ACCUMULATE,
    DTYPES,
    EPS32,
    GRANULARITIES,
    INITIALIZE,
    OUTPUT,
    UNAVAILABLE,
    dtype_id,
    equal,
    needs_vnni,
    pack_vnni,
    weight_codes,
)

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))

GEOMETRIES = 60


class Geometry:
    """A random convolution that has at least one output pixel."""

    def __init__(self, seed):
        choose = random.Random(seed).choice
        while True:
            self.groups = choose([1, 1, 1, 2, 3])
            self.c_in, self.c_out = (choose([1, 3, 17, 33, 64, 130]) * self.groups for _ in range(2))
            self.samples = choose([1, 2, 3, 8])
            self.size = choose([1, 2, 5, 8, 13]), choose([1, 3, 7, 16, 33])
            self.kernel = choose([1, 2, 3, 3, 4, 5]), choose([1, 2, 3, 3, 4, 5])
            self.stride = choose([1, 1, 2, 3]), choose([1, 1, 2, 3])
            self.padding = choose([0, 1, 2, 4]), choose([0, 1, 2, 5])
            self.dilation = choose([1, 1, 2, 3]), choose([1, 1, 2, 3])
            span = [
                n + 2 * p - d * (k - 1) - 1 for n, p, d, k in zip(self.size, self.padding, self.dilation, self.kernel)
            ]
            if min(span) >= 0:
                break
        self.out_size = tuple(s // stride + 1 for s, stride in zip(span, self.stride))

    @property
    def weight_shape(self):
        return self.c_out, self.c_in // self.groups, *self.kernel

    @property
    def arguments(self):
        sizes = [self.samples, *self.size, self.c_in, self.c_out]
        return [*sizes, *self.kernel, *self.stride, *self.padding, *self.dilation, self.groups]

    def apply(self, x, weight):
        return F.conv2d(x.double(), weight.double(), None, self.stride, self.padding, self.dilation, self.groups)


class Pointwise(Geometry):
    """1x1 with stride 1, where a scale per pixel is allowed."""

    def __init__(self, seed):
        super().__init__(seed)
        self.kernel, self.stride, self.padding, self.dilation = (1, 1), (1, 1), (0, 0), (1, 1)
        self.out_size = self.size


def image(shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8).to(memory_format=torch.channels_last)


def convolve(
    geometry,
    codes,
    scale,
    granularity,
    weight_q,
    weight_scale,
    epilogue,
    *,
    zero_point=None,
    bias=None,
    y_hat=None,
    skip=None,
    write_out=True,
    out_dtype=torch.float32,
):
    return torch.ops.modiff_cpu.convolve(
        codes, scale, GRANULARITIES.index(granularity), zero_point, pack_vnni(weight_q, geometry.groups), weight_scale,
        bias, epilogue, y_hat, skip, write_out, out_dtype, geometry.arguments,
    )  # fmt: skip


class Guarded:
    """A channels_last tensor in the middle of a larger buffer of a known value, at an odd address."""

    MARGIN, SENTINEL = 131, 77.0

    def __init__(self, values, dtype):
        n, c, h, w = values.shape
        self.buffer = torch.full((values.numel() + 2 * self.MARGIN,), self.SENTINEL, dtype=dtype)
        inside = self.buffer[self.MARGIN : self.MARGIN + values.numel()]
        self.tensor = inside.view(n, h, w, c).permute(0, 3, 1, 2)
        self.tensor.copy_(values)

    def assert_untouched_around(self):
        for end in (self.buffer[: self.MARGIN], self.buffer[-self.MARGIN :]):
            assert (end == self.SENTINEL).all()


def scales_for(granularity, geometry):
    rows = geometry.samples * geometry.out_size[0] * geometry.out_size[1]
    count = {"per_tensor": 1, "per_sample": geometry.samples, "per_token": rows}[granularity]
    return torch.rand(count) * 0.1 + 0.01, torch.randint(-128, 128, (count,), dtype=torch.int32)


def over_pixels(values, geometry):
    """Scales or zero points [granules], broadcast over an NCHW image."""
    shape = {1: (1, 1, 1, 1), geometry.samples: (-1, 1, 1, 1)}
    return values.double().view(shape.get(values.numel(), (geometry.samples, 1, *geometry.size)))


def assert_rounded(got, exact, terms, *dtypes):
    """got == exact up to float32 arithmetic on `terms` and one rounding to each of `dtypes`."""
    rounding = sum(torch.finfo(dtype).eps / 2 * terms for dtype in dtypes)
    smallest = sum(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in dtypes)
    # Int to float, two scales, two additions: five roundings of half an eps.
    excess = ((got.double() - exact).abs() - 2.5 * EPS32 * terms - rounding - smallest).max().item()
    assert excess <= 0, excess  # fails on NaN too


@needs_vnni
class TestConvolve:
    @pytest.mark.parametrize("seed", range(GEOMETRIES))
    def test_sums_are_exact(self, seed, poisoned_empty):
        self.check_sums(seed)

    @pytest.mark.parametrize("seed", range(1, GEOMETRIES, 3))
    def test_sums_are_exact_with_two_threads(self, seed, two_threads, poisoned_empty):
        self.check_sums(seed)

    @staticmethod
    def check_sums(seed):
        geometry = Geometry(seed)
        codes, weight_q = image((geometry.samples, geometry.c_in, *geometry.size)), weight_codes(geometry.weight_shape)
        ones = torch.ones(geometry.c_out)
        for granularity in ("per_tensor", "per_sample"):
            scale, zero_point = scales_for(granularity, geometry)
            for zero in (None, zero_point):
                # Padding is x = 0, whose code is the zero point: conv2d pads the shifted codes with 0.
                shifted = codes.double() - (0 if zero is None else over_pixels(zero, geometry))
                out = convolve(
                    geometry, codes, torch.ones_like(scale), granularity, weight_q, ones, OUTPUT, zero_point=zero
                )
                assert out.is_contiguous(memory_format=torch.channels_last)
                equal(out, geometry.apply(shifted, weight_q).float(), "sums", granularity)

    @pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("state_dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("seed", range(0, GEOMETRIES, 5))
    def test_epilogues(self, seed, state_dtype, dtype, poisoned_empty):
        geometry = Geometry(seed)
        self.check_epilogues(geometry, "per_sample" if seed % 2 else "per_tensor", state_dtype, dtype)

    @pytest.mark.parametrize("seed", range(2, GEOMETRIES, 9))
    def test_epilogues_with_two_threads(self, seed, two_threads, poisoned_empty):
        self.check_epilogues(Geometry(seed), "per_sample", torch.float16, torch.float32)

    @pytest.mark.parametrize("state_dtype", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("seed", range(6))
    def test_epilogues_with_a_scale_per_pixel(self, seed, state_dtype, poisoned_empty):
        self.check_epilogues(Pointwise(seed), "per_token", state_dtype, torch.float32)

    @staticmethod
    def check_epilogues(geometry, granularity, state_dtype, dtype):
        codes, weight_q = image((geometry.samples, geometry.c_in, *geometry.size)), weight_codes(geometry.weight_shape)
        weight_scale, bias = torch.rand(geometry.c_out) * 0.01 + 1e-3, torch.randn(geometry.c_out)
        scale, zero_point = scales_for(granularity, geometry)
        factor = over_pixels(scale, geometry) * weight_scale.double().view(1, -1, 1, 1)
        product = geometry.apply(codes, weight_q) * factor
        offset = bias.double().view(1, -1, 1, 1)
        old = torch.randn(product.shape).to(state_dtype)
        skip = torch.randn(product.shape).to(dtype).to(memory_format=torch.channels_last)
        arguments = geometry, codes, scale, granularity, weight_q, weight_scale

        for epilogue, start, before in ((ACCUMULATE, old.double(), old), (INITIALIZE, offset, old * torch.nan)):
            exact = product + start
            terms = product.abs() + start.abs()
            for skipped, write_out in ((None, True), (skip, True), (None, False)):
                y_hat = Guarded(before, state_dtype)
                out = convolve(
                    *arguments,
                    epilogue,
                    bias=None if epilogue == ACCUMULATE else bias,
                    y_hat=y_hat.tensor,
                    skip=skipped,
                    write_out=write_out,
                    out_dtype=dtype,
                )
                assert_rounded(y_hat.tensor, exact, terms, state_dtype)
                y_hat.assert_untouched_around()
                assert out.dtype == dtype
                if not write_out:
                    assert out.numel() == 0
                    continue
                added = torch.zeros(()) if skipped is None else skipped
                assert_rounded(out, exact + added.double(), terms + added.double().abs(), state_dtype, dtype)

        shifted = codes.double() - over_pixels(zero_point, geometry)
        product = geometry.apply(shifted, weight_q) * factor
        for skipped, added in ((None, None), (skip, bias)):
            out = convolve(*arguments, OUTPUT, zero_point=zero_point, bias=added, skip=skipped, out_dtype=dtype)
            extra = torch.zeros((), dtype=torch.double) if added is None else offset
            more = torch.zeros((), dtype=torch.double) if skipped is None else skipped.double()
            assert_rounded(out, product + extra + more, product.abs() + extra.abs() + more.abs(), dtype)

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (3, 300, 17)], ids=str)
    @pytest.mark.parametrize("c_out", [1, 17, 130])
    def test_rows_of_a_linear(self, shape, c_out, granularity, threads, poisoned_empty):
        rows = math.prod(shape[:-1])
        samples = shape[0]
        codes = torch.randint(-128, 128, shape, dtype=torch.int8)
        weight_q = weight_codes((c_out, shape[-1], 1, 1))
        count = {"per_tensor": 1, "per_sample": samples, "per_token": rows}[granularity]
        zero_point = torch.randint(-128, 128, (count,), dtype=torch.int32)
        spread = zero_point.repeat_interleave(rows // count).view(-1, 1)
        out = torch.ops.modiff_cpu.convolve(
            codes, torch.ones(count), GRANULARITIES.index(granularity), zero_point, pack_vnni(weight_q, 1),
            torch.ones(c_out), None, OUTPUT, None, None, True, torch.float32,
            [samples, rows // samples, 1, shape[-1], c_out, 1, 1, 1, 1, 0, 0, 1, 1, 1],
        )  # fmt: skip
        expected = (codes.view(rows, -1).double() - spread) @ weight_q.view(c_out, -1).double().T
        assert out.shape == (*shape[:-1], c_out)
        equal(out.view(rows, c_out), expected.float(), "sums", granularity)

    @pytest.mark.parametrize("zero_point", [None, -128, 127])
    @pytest.mark.parametrize("weight_value", [127, -127])
    @pytest.mark.parametrize("code", [-128, 127])
    def test_largest_magnitudes_are_exact(self, code, weight_value, zero_point, poisoned_empty):
        geometry = Geometry(0)
        geometry.groups, geometry.samples, geometry.c_in, geometry.c_out = 1, 2, 512, 20
        geometry.size = geometry.out_size = (4, 3)
        geometry.kernel, geometry.stride, geometry.padding, geometry.dilation = (3, 3), (1, 1), (1, 1), (1, 1)
        codes = torch.full((2, 512, 4, 3), code, dtype=torch.int8).to(memory_format=torch.channels_last)
        weight_q = torch.full((20, 512, 3, 3), weight_value, dtype=torch.int8)
        zero = None if zero_point is None else torch.full((2,), zero_point, dtype=torch.int32)
        out = convolve(geometry, codes, torch.ones(2), "per_sample", weight_q, torch.ones(20), OUTPUT, zero_point=zero)
        exact = geometry.apply(codes.double() - (zero_point or 0), weight_q)
        largest = abs(code - (zero_point or 0)) * 127 * 512 * 9
        assert exact.abs().max() == largest
        # Beyond 2^24 the int32 sum is rounded once, when it becomes a float.
        equal(out, exact.float(), "sums", largest)

    @pytest.mark.parametrize("groups", [1, 2, 3])
    @pytest.mark.parametrize(("n", "c"), [(1, 1), (3, 17), (16, 4), (17, 33), (33, 64), (130, 5)])
    @pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)], ids=str)
    def test_packing_round_trip(self, kernel, n, c, groups, poisoned_empty):
        weight_q = torch.randint(-128, 128, (n * groups, *kernel, c), dtype=torch.int8)
        packed = torch.ops.modiff_cpu.pack_vnni(weight_q, groups)
        equal(torch.ops.modiff_cpu.unpack_vnni(packed, list(weight_q.shape), groups), weight_q, "weight", groups)
        scale = torch.rand(n * groups)
        weight = torch.ops.modiff_cpu.dequantize_vnni(packed, scale, list(weight_q.shape), groups)
        equal(weight, scale[:, None, None, None] * weight_q, "dequantised weight", groups)
        # Panels of 16 output channels by 4 input channels, padded with zeros, then an int32 sum per channel.
        panels = groups * math.ceil(n / 16)
        assert packed.numel() == panels * 16 * (math.prod(kernel) * math.ceil(c / 4) * 4 + 4)
        sums = packed[-panels * 16 * 4 :].view(torch.int32).view(groups, -1)
        equal(sums[:, :n].flatten(), weight_q.flatten(1).sum(1, dtype=torch.int32), "sums", groups)
        assert not sums[:, n:].any()

    def test_a_weight_of_another_shape_is_refused(self):
        geometry = Pointwise(0)
        codes = image((geometry.samples, geometry.c_in, *geometry.size))
        weight_q = weight_codes((geometry.c_out + 16, geometry.c_in // geometry.groups, 1, 1))
        geometry.groups = 1
        with pytest.raises(RuntimeError, match="layout vnni_v1"):
            convolve(geometry, codes, torch.ones(1), "per_tensor", weight_q, torch.ones(geometry.c_out), OUTPUT)

    def test_dequantisation_refuses_what_does_not_fit(self):
        packed = torch.ops.modiff_cpu.pack_vnni(torch.ones(5, 3, 3, 4, dtype=torch.int8), 1)
        for sizes, scales, message in (([5, 3, 3, 9], 5, "bytes expected"), ([5, 3, 3, 4], 4, "per output channel")):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.modiff_cpu.dequantize_vnni(packed, torch.ones(scales), sizes, 1)
