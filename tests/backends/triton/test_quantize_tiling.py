"""How the quantising kernels of the backend triton share out a tensor."""

import pytest

from modiff_kernels.backends.triton.quantize_tiling import tiling, tiling_by_groups
from modiff_kernels.quant.operands import PROLOGUES
from modiff_kernels.quant.spec import GRANULARITIES


@pytest.mark.parametrize("channels", [128, 192, 256, 320, 384, 512, 640, 960, 1280, 1920, 2560])
def test_no_lane_of_an_image_is_masked(channels):
    for rows in (64 * 64, 32 * 32, 16 * 16, 8 * 8):
        p = tiling(2, rows, channels, "per_sample", 8, "group_norm", 2)
        assert (channels % p.block_c, rows % p.block_r) == (0, 0)


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tiles_cover_everything_in_powers_of_two(granularity, prologue):
    for samples in (1, 3):
        for rows in (1, 63, 64, 65, 4096):
            for channels in (1, 33, 320, 5120):
                p = tiling(samples, rows, channels, granularity, 4, prologue, 2)
                assert p.samples * p.rows * p.channels == samples * rows * channels
                for size in (p.block_r, p.block_c, p.num_warps):
                    assert size & (size - 1) == 0
                assert p.grid[0] * p.block_r * p.block_c >= samples * rows * channels
                whole_rows = granularity == "per_token" or prologue == "layer_norm"
                assert not whole_rows or p.block_c >= channels


# rows, channels and groups of a norm in float16: rows, lanes and groups of a tile; None where it takes a launch more
BY_GROUPS = [(64, 1280, 32, (64, 64, 1)), (256, 2560, 32, (64, 128, 1)), (1024, 320, 32, (256, 32, 2))]
BY_GROUPS += [(1024, 128, 32, (512, 16, 4)), (1024, 1280, 32, None), (4096, 320, 32, None), (64, 12, 3, None)]


@pytest.mark.parametrize(("rows", "channels", "num_groups", "tile"), BY_GROUPS)
def test_groups_that_programs_hold(rows, channels, num_groups, tile):
    found = tiling_by_groups(tiling(2, rows, channels, "per_sample", 8, "group_norm", 2), num_groups, 2)
    assert (None if found.width == 0 else (found.block_r, found.block_c, found.groups)) == tile
    if tile is not None:
        assert found.grid[0] == 2 * -(-rows // tile[0]) * num_groups // tile[2]
        assert found.block_r * found.block_c <= 32 * 32 * found.num_warps
