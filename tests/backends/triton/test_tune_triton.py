"""The tuner: refuses without a GPU, never times a wrong tile, keeps the fastest. Its clock is a stand-in."""

import sys

import pytest
import torch

from benchmarks.shapes import Layer
from modiff_kernels.backends import triton as backend
from modiff_kernels.backends.triton import products
from modiff_kernels.backends.triton.tile_configs import Gpu, Shape, TileConfig
from tools import tune_triton

GPU = Gpu("stand-in", (9, 0), 4)
LAYERS = [Layer("conv", 32, 24, 4, 4, 3, 1, 1), Layer("linear", 64, 40, 16, 1, 1)]
TILES = [TileConfig(64, 64, 32, 4, 2), TileConfig(64, 64, 64, 4, 2), TileConfig(64, 64, 32, 4, 2, split_k=2)]


@pytest.fixture
def few_tiles(monkeypatch):
    monkeypatch.setattr("modiff_kernels.backends.triton.tile_configs.ranked", lambda shape, gpu: TILES)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_fastest_tile_is_kept(device, layer, weight_bits, few_tiles):
    scratch = tune_triton.Scratch(layer, 2, weight_bits, device)
    times = iter((3.0, 1.0, 2.0))
    timed = []

    def clock(call):
        call()
        timed.append(call)
        return next(times)

    assert tune_triton.best_tile(scratch, GPU, clock) == (TILES[1], 1.0)
    assert len(timed) == len(TILES)
    taps = 9 if layer.kind == "conv" else 1
    assert scratch.shape() == Shape(32, layer.c_out, layer.c_in, taps, 1, weight_bits, -1)


def test_a_wrong_tile_is_never_timed(device, few_tiles, monkeypatch):
    scratch = tune_triton.Scratch(LAYERS[0], 1, 8, device)
    right = products.integer_product

    def wrong(*arguments):
        right(*arguments)
        arguments[7][0, 0, 0, 0] += 1

    monkeypatch.setattr(products, "integer_product", wrong)
    with pytest.raises(RuntimeError, match=r"tile 64x64x32-w4-s2-k1 computes .* wrongly"):
        tune_triton.best_tile(scratch, GPU, lambda call: pytest.fail("a wrong tile was timed"))


def test_without_a_gpu_it_says_why(capsys, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(sys, "argv", ["tune_triton.py"])
    assert tune_triton.main() == 2
    assert f"nothing to tune here: {backend.unavailable()}" in capsys.readouterr().err


def test_every_layer_of_a_network_is_tuned_once():
    pytest.importorskip("diffusers", reason="the layer tables are read off diffusers networks")
    layers = tune_triton.layers_of(["cifar10_small16", "cifar10_small16"])
    assert layers
    assert len(layers) == len(set(layers))
