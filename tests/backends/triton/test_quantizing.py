"""quantize_residual and quantize_activation of the backend triton, and how it cuts them into tiles."""

import pytest

from modiff_kernels.backends.triton import quantize_passes
from modiff_kernels.backends.triton.quantize_device import GEGLU, GROUP_NORM, IDENTITY, LAYER_NORM
from modiff_kernels.backends.triton.quantizing import why_not
from modiff_kernels.ops.problem import Problem
from tests.backends.quantizing_cases import GRANULARITIES
from tests.backends.quantizing_checks import TestActivation, TestResidual

__all__ = ["TestActivation", "TestResidual"]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


class TestPlan:
    PROLOGUES = (IDENTITY.value, GROUP_NORM.value, LAYER_NORM.value, GEGLU.value)

    @pytest.mark.parametrize("channels", [128, 192, 256, 320, 384, 512, 640, 960, 1280, 1920, 2560])
    def test_no_lane_of_an_image_is_masked(self, channels):
        for rows in (64 * 64, 32 * 32, 16 * 16, 8 * 8):
            plan = quantize_passes.plan(2, rows, channels, "per_sample", 8, GROUP_NORM.value, 2)
            assert channels % plan.block_c == 0
            assert rows % plan.block_r == 0

    @pytest.mark.parametrize("prologue", PROLOGUES)
    @pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_block"])
    def test_tiles_cover_everything_in_powers_of_two(self, granularity, prologue):
        for samples in (1, 3):
            for rows in (1, 63, 64, 65, 4096):
                for channels in (1, 33, 320, 5120):
                    p = quantize_passes.plan(samples, rows, channels, granularity, 4, prologue, 2)
                    assert p.samples * p.rows * p.channels == samples * rows * channels
                    for size in (p.block_r, p.block_c, p.num_warps):
                        assert size & (size - 1) == 0
                    assert p.grid[0] * p.block_r * p.block_c >= samples * rows * channels
                    whole_rows = granularity == "per_token" or prologue == LAYER_NORM.value
                    assert not whole_rows or p.block_c >= channels

    def test_packed_codes_of_a_tile_fill_whole_bytes(self):
        for channels in (1, 2, 4, 7, 8, 9, 24, 33, 320):
            for granularity in GRANULARITIES:
                p = quantize_passes.plan(2, 64, channels, granularity, 4, IDENTITY.value, 2, packed=True)
                assert p.block_c % 8 == 0
                assert p.channels == channels

    def test_one_image_of_the_first_level_fills_the_gpu(self):
        for rows, channels in ((64 * 64, 320), (32 * 32, 640), (16 * 16, 1280)):
            assert quantize_passes.plan(1, rows, channels, "per_sample", 8, IDENTITY.value, 2).grid[0] >= 132

    def test_rows_too_long_for_registers_are_refused(self):
        sizes = {"device_type": "cuda", "m": 4, "k": quantize_passes.MAX_ROW + 1}
        reason = f"{quantize_passes.MAX_ROW + 1} channels: rows are held in registers"
        assert reason in why_not(Problem("quantize_residual", granularity="per_token", **sizes))
        assert reason in why_not(Problem("layer_norm_quantize_residual", granularity="per_tensor", **sizes))
        assert why_not(Problem("quantize_residual", granularity="per_sample", **sizes)) is None
        sizes["k"] -= 1
        assert why_not(Problem("quantize_residual", granularity="per_token", **sizes)) is None
