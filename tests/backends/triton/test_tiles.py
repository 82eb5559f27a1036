"""The choice of a tile: deterministic and fitting."""

import pytest

from modiff_kernels.backends.triton import tiles
from modiff_kernels.backends.triton.tiles import Gpu, Shape

H200 = Gpu("NVIDIA H200", (9, 0), 132)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108)
GPUS = [H200, A100, Gpu("NVIDIA RTX A6000", (8, 6), 84), Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128)]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_large_shapes_get_large_tiles_and_small_ones_are_split(gpu):
    large = tiles.choose(Shape(65536, 1280, 1280, 9), gpu)
    assert (large.block_m, large.block_n, large.split_k) == (128, 128, 1)
    small = tiles.choose(Shape(128, 1280, 1280, 9), gpu)  # 8x8 level at batch 2: 20 tiles of 128x64
    count = -(-128 // small.block_m) * -(-1280 // small.block_n)
    assert small.split_k > 1
    assert count * small.split_k > gpu.multiprocessors / 2


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("group_size", [32, 64, 96, 128])
def test_a_step_stays_inside_a_group(group_size, gpu):
    config = tiles.choose(Shape(4096, 640, 640, 1, 1, 4, group_size), gpu)
    assert group_size % config.block_k == 0
    if 384 % group_size == 0:
        config = tiles.choose(Shape(4096, 640, 384, 9, 1, 4, group_size), gpu)
        assert 384 % config.block_k == 0


def test_a_group_size_that_fits_no_tile_is_refused():
    with pytest.raises(ValueError, match="group_size must be a multiple of 32"):
        tiles.choose(Shape(4096, 640, 640, 1, 1, 4, 48), H200)
    with pytest.raises(ValueError, match="no tile computes m4096-n640-channels48"):
        tiles.choose(Shape(4096, 640, 48, 9, 1, 4, 32), H200)
