"""The insides of `product` of the backend triton: tiles, splits, the order of tiles, and the tuner's way to them."""

import pytest
import torch

from benchmarks.shapes import Layer
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends.triton import product_launch, tiles
from modiff_kernels.backends.triton.tiles import Shape, TileConfig
from tests.backends.exact_product import THREE, ExactProduct, check_largest_sum
from tools.tune_triton import TritonProducts

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


LAYERS = [Layer("conv", 32, 24, 4, 4, 3, 1, 1), Layer("linear", 64, 40, 16, 1, 1)]
TUNED = [TileConfig(64, 64, 32, 4, 2), TileConfig(64, 64, 32, 4, 2, split_k=2)]


@pytest.mark.parametrize(("layer", "weight_bits"), zip(LAYERS, (8, 4)), ids=str)
def test_what_the_tuner_measures_is_exact(device, layer, weight_bits):
    tunable, scratch = TritonProducts(device), Scratch(layer, 2, weight_bits, device)
    for tile in TUNED:
        assert scratch.is_exact(tunable.update(scratch, tile))
    taps = 9 if layer.kind == "conv" else 1
    shape = Shape(32, layer.c_out, layer.c_in, taps, 1, weight_bits, -1)
    assert tunable.shape(scratch) == shape
    assert tunable.candidates(scratch) == tiles.ranked(shape, tunable.gpu)
    assert [tunable.tile(tile) for tile in TUNED] == [(TUNED[0], 1), (TUNED[0], 2)]


def test_the_tuner_finds_a_wrong_tile(device, monkeypatch):
    tunable, scratch = TritonProducts(device), Scratch(LAYERS[0], 1, 8, device)
    right = product_launch.product

    def wrong(*arguments):
        right(*arguments)
        arguments[4][0, 0, 0, 0] += 1

    monkeypatch.setattr(product_launch, "product", wrong)
    assert not scratch.is_exact(tunable.update(scratch, TUNED[0]))
