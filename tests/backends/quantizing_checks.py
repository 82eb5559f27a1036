"""Checks of quantize_residual and quantize_activation, for the test modules of backends: nothing in these ops depends
on the order of a sum, so that codes, scales, absmax and zero points equal those of the reference bit for bit.
"""

import math

import pytest
import torch

from tests.backends.quantizing_cases import (
    DTYPE_PAIRS,
    DTYPES,
    FLOATS,
    GRANULARITIES,
    assert_results_like,
    assert_updated,
    expected,
    run,
    scales,
    skip_bfloat16,
)
from tests.ops.op_cases import activation, is_image, memory_format_of

# 1, odd, one below, at and above a tile in rows (13 * 5 = 65) and channels, and layers of UNets.
SHAPES = [
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (1, 63, 4, 4),
    (3, 65, 5, 1),
    (2, 32, 13, 5),
    (1, 128, 8, 8),
    (1, 1),
    (65, 65),
    (3, 5, 63),
    (2, 33, 320),
]
FEW_SHAPES = [(2, 7, 3, 5), (2, 32, 13, 5), (9, 65), (3, 5, 63)]
PACKED_SHAPES = [
    (3, 1),
    (9, 7),
    (4, 8),
    (3, 5, 9),
    (2, 33, 320),
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 65, 5, 1),
    (2, 32, 13, 5),
]
LAYERS = [(2, 320, 64, 64), (2, 1280, 8, 8), (2, 1024, 640), (77, 768)]


def on(place, shapes):
    """A GPU takes the layers of UNets in full; a stand-in would need minutes."""
    return [*shapes, *LAYERS] if place.on_gpu else shapes


def check_residual(shape, place, dtype, state_dtype, scale, bits, granularity, clip_ratio=1.0, spread=1.0):
    x, x_hat = activation(shape, dtype, spread=spread), activation(shape, state_dtype, spread=spread)
    arguments = (x, x_hat, scale, bits, granularity, clip_ratio)
    results, after = run("quantize_residual", *arguments, place=place)
    wanted, _ = expected("quantize_residual", *arguments)
    assert_results_like(results, wanted, memory_format_of(is_image(shape)))
    for name, got, want in zip(("codes", "scale", "absmax"), results, wanted):
        assert torch.equal(got, want), f"{name} of {shape}: {(got != want).sum()} of {want.numel()} differ"
    assert torch.equal(after[0], x)
    assert_updated(after[1], x_hat, results[0], results[1])


# numpy reports the arithmetic with NaN that these tests are about.
with_nan = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class TestResidual:
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_shapes_and_sources_of_the_scale(self, place, granularity):
        for shape in on(place, SHAPES):
            for scale in scales(shape, granularity):
                check_residual(shape, place, torch.float32, torch.float32, scale, 4, granularity)

    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    @pytest.mark.parametrize(("dtype", "state_dtype"), DTYPE_PAIRS, ids=str)
    def test_dtypes(self, place, dtype, state_dtype, granularity):
        skip_bfloat16(place, dtype, state_dtype)
        for shape in on(place, FEW_SHAPES[1:3]):
            check_residual(shape, place, dtype, state_dtype, None, 4, granularity)

    @pytest.mark.parametrize("clip_ratio", [1.0, 0.7])
    @pytest.mark.parametrize("bits", [3, 4, 8])
    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    def test_bits_and_clip_ratio(self, place, granularity, bits, clip_ratio):
        for shape in on(place, FEW_SHAPES):
            check_residual(shape, place, torch.float32, torch.float16, None, bits, granularity, clip_ratio)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("bits", [3, 4])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_packed_codes(self, place, granularity, bits, dtype):
        for shape in on(place, PACKED_SHAPES):
            for scale in scales(shape, granularity):
                x, x_hat = activation(shape, dtype), activation(shape, dtype)
                arguments = (x, x_hat, scale, bits, granularity, 1.0)
                results, after = run("quantize_residual", *arguments, True, place=place)
                wanted, _ = expected("quantize_residual", *arguments, True)
                assert_results_like(results, wanted, memory_format_of(is_image(shape)))
                for name, got, want in zip(("codes", "scale", "absmax"), results, wanted):
                    assert torch.equal(got, want), f"{name} of {shape}: {(got != want).sum()} of {want.numel()} differ"
                (codes, *_), _ = expected("quantize_residual", *arguments)
                assert_updated(after[1], x_hat, codes, results[1])

    @pytest.mark.parametrize("bits", [3, 4, 8])
    def test_channels_of_uneven_range(self, place, bits):
        """Multipliers from 1 to their largest; one block, a last block of 16, 17 and 31 rows, none."""
        for shape in on(place, [(2, 32, 13, 5), (2, 31, 40), (3, 48, 33), (2, 32, 7, 9), (2, 9, 40)]):
            channels = shape[1] if is_image(shape) else shape[-1]
            ranges = 10.0 ** torch.linspace(-3, 0, channels)
            ranges = ranges.view(1, -1, 1, 1) if is_image(shape) else ranges
            check_residual(shape, place, torch.float32, torch.float32, None, bits, "per_block", spread=ranges)

    def test_rounding_is_half_to_even(self, place):
        ties = torch.arange(-9, 9, dtype=torch.float32).reshape(1, -1) + 0.5
        x_hat = torch.zeros_like(ties)
        (codes, _, absmax), _ = run("quantize_residual", ties, x_hat, torch.ones(1), 4, "per_tensor", place=place)
        assert codes.tolist() == [[-8, -8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 7, 7]]
        assert absmax.item() == 8.5

    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    def test_no_change_costs_no_code(self, place, granularity):
        x = activation((2, 32, 4, 4))
        (codes, scale, absmax), after = run("quantize_residual", x, x, None, 4, granularity, place=place)
        assert not codes.any()
        assert not absmax.any()
        assert (scale == 2.0**-100).all()
        assert torch.equal(after[1], x)

    @with_nan
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    def test_nan_and_inf_reach_absmax_and_scale(self, place, granularity, value):
        """Nothing is read on the host, so nothing can be raised: the numbers carry the news, in their granule only."""
        x, x_hat = activation((2, 32, 5, 5)), activation((2, 32, 5, 5))
        wanted, wanted_after = expected("quantize_residual", x, x_hat, None, 4, granularity)
        x[1, 3, 2, 1] = value
        (codes, scale, absmax), after = run("quantize_residual", x, x_hat, None, 4, granularity, place=place)
        bad = {"per_tensor": 0, "per_token": 25 + 11}.get(granularity, 1)
        assert not math.isfinite(absmax[bad])
        assert not math.isfinite(scale[bad])
        assert after[1][1, 3, 2, 1].isnan()
        good = torch.arange(absmax.numel()) != bad
        assert torch.equal(scale[good], wanted[1][good])
        assert torch.equal(absmax[good], wanted[2][good])
        if granularity != "per_tensor":
            assert torch.equal(codes[0], wanted[0][0])
            torch.testing.assert_close(after[1][0], wanted_after[1][0])

    @with_nan
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_nan_reaches_absmax_and_state_with_a_given_scale(self, place, granularity):
        x, x_hat = activation((2, 32, 5, 5)), activation((2, 32, 5, 5))
        x[1, 3, 2, 1] = math.nan
        (_, scale, absmax), after = run("quantize_residual", x, x_hat, torch.tensor([0.1]), 4, granularity, place=place)
        assert absmax.isnan().sum() == 1
        assert (scale == torch.tensor(0.1)).all()
        assert after[1].isnan().nonzero().tolist() == [[1, 3, 2, 1]]

    def test_two_runs_agree(self, place):
        x, x_hat = activation((2, 64, 9, 9), torch.float16), activation((2, 64, 9, 9), torch.float16)
        for granularity in (*GRANULARITIES, "per_block"):
            first, second = (run("quantize_residual", x, x_hat, None, 4, granularity, place=place) for _ in range(2))
            for a, b in zip((*first[0], first[1][1]), (*second[0], second[1][1])):
                assert torch.equal(a, b)


class TestActivation:
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "symmetric"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_equals_reference(self, place, dtype, affine, granularity):
        skip_bfloat16(place, dtype)
        for shape in on(place, SHAPES if dtype == torch.float32 else FEW_SHAPES):
            self.check(activation(shape, dtype), 8, granularity, affine, place)

    @pytest.mark.parametrize("offset", [-3.0, 0.0, 3.0])
    @pytest.mark.parametrize("bits", [3, 4, 8])
    def test_bits_and_one_sided_ranges(self, place, bits, offset):
        for granularity in GRANULARITIES:
            self.check(activation((2, 7, 3, 5)) + offset, bits, granularity, True, place)
            self.check(torch.full((2, 7), offset), bits, granularity, True, place)

    @staticmethod
    def check(x, bits, granularity, affine, place):
        arguments = (x, bits, granularity, affine)
        results, after = run("quantize_activation", *arguments, place=place)
        wanted, _ = expected("quantize_activation", *arguments)
        assert_results_like(results, wanted, memory_format_of(is_image(x.shape)))
        for name, got, want in zip(("codes", "scale", "zero_point"), results, wanted):
            assert torch.equal(got, want), f"{name} of {tuple(x.shape)}: {(got != want).sum()} differ"
        assert torch.equal(after[0], x)

    @with_nan
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("affine", [True, False])
    def test_nan_and_inf_reach_the_scale(self, place, affine, value):
        x = activation((2, 32, 3, 3))
        x[1, 3, 2, 1] = value
        for granularity in GRANULARITIES:
            (_, scale, _), _ = run("quantize_activation", x, 8, granularity, affine, place=place)
            assert (~scale.isfinite()).sum() == 1
