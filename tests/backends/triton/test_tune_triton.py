"""The tuner's way to the Triton kernels: every tile is exact in the interpreter, and a wrong one is found."""

import pytest

from benchmarks.shapes import Layer
from benchmarks.tile_tuning import Scratch
from modiff_kernels.backends.triton import product_launch, tiles
from modiff_kernels.backends.triton.tiles import Shape, TileConfig
from tools.tune_triton import TritonProducts

LAYERS = [Layer("conv", 32, 24, 4, 4, 3, 1, 1), Layer("linear", 64, 40, 16, 1, 1)]
TILES = [TileConfig(64, 64, 32, 4, 2), TileConfig(64, 64, 32, 4, 2, split_k=2)]


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_tiles_are_exact(device, layer, weight_bits):
    tunable = TritonProducts(device)
    scratch = Scratch(layer, 2, weight_bits, device)
    for tile in TILES:
        assert scratch.is_exact(tunable.update(scratch, tile))
    taps = 9 if layer.kind == "conv" else 1
    shape = Shape(32, layer.c_out, layer.c_in, taps, 1, weight_bits, -1)
    assert tunable.shape(scratch) == shape
    assert tunable.candidates(scratch) == tiles.ranked(shape, tunable.gpu)
    assert [tunable.tile(tile) for tile in TILES] == [(TILES[0], 1), (TILES[0], 2)]


def test_a_wrong_tile_is_found(device, monkeypatch):
    tunable, scratch = TritonProducts(device), Scratch(LAYERS[0], 1, 8, device)
    right = product_launch.product

    def wrong(*arguments):
        right(*arguments)
        arguments[4][0, 0, 0, 0] += 1

    monkeypatch.setattr(product_launch, "product", wrong)
    assert not scratch.is_exact(tunable.update(scratch, TILES[0]))
