"""The insides of `product` of the backend triton: tiles, splits, the order of tiles, and what chooses one."""

import pytest
import torch

from modiff_kernels.backends.triton import product_launch
from modiff_kernels.backends.triton.tiles import TileConfig
from tests.backends.exact_product import THREE, ExactProduct, check_largest_sum

pytestmark = pytest.mark.usefixtures("poisoned_empty")
SMALL = TileConfig(64, 64, 32, 4, 2)
TILES = [TileConfig(128, 128, 128, 8, 3), TileConfig(128, 64, 64, 4, 3), TileConfig(64, 64, 128, 4, 2)]


@pytest.fixture
def product(device):
    """`product` with tensors of the CPU, on `device`."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return value._replace(packed=moved(value.packed), scale=moved(value.scale)) if hasattr(value, "n") else value

    def call(*args, tile=SMALL):
        there = [moved(value) for value in args]
        out = product_launch.product(*there, tile)
        if args[4] is not None:
            args[4].copy_(there[4])
        return out.cpu()

    return call


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", [ExactProduct((130, 200), 130), ExactProduct((2, 40, 9, 8), 65, THREE)], ids=str)
def test_every_tile_gives_the_same_sums(product, case, tile):
    case.check(product, tile=tile)


@pytest.mark.parametrize("group_m", [1, 3])
def test_the_order_of_tiles_covers_all(product, group_m):
    """5 x 4 tiles: bands of 3 leave a rest."""
    ExactProduct((260, 32), 200).check(product, tile=TileConfig(64, 64, 32, 4, 2, group_m=group_m))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("split_k", [3, 16])
@pytest.mark.parametrize(("x_shape", "n", "window"), [((5, 320), 33, None), ((1, 32, 4, 4), 65, THREE)], ids=str)
def test_splits_of_k_give_the_same_sums(product, x_shape, n, window, split_k, bits):
    ExactProduct(x_shape, n, window, bits).check(product, tile=TileConfig(64, 64, 32, 4, 2, split_k=split_k))


def test_the_largest_sums_do_not_leave_int32(product):
    check_largest_sum(product, 65536, tile=TileConfig(64, 64, 128, 4, 2, split_k=4))
