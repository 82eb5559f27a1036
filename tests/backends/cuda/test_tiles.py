"""Measured tiles: which one a call gets, and that it reaches the library."""

import pytest
import torch

from modiff_kernels.backends.cuda import library, product_launch, tiles
from modiff_kernels.backends.cuda.tiles import Shape, Tile
from modiff_kernels.quant.operands import PackedWeight, Window
from modiff_kernels.tuned import Store

DOWN = Window((3, 3), (2, 2), (1, 1))
GPU = torch.device("cuda", 0)


def shape_of_call(shape, c_out, window):
    return tiles.shape_of(product_launch.geometry_of(torch.empty(shape, dtype=torch.int8), c_out, window), 8, 8)


def test_shapes():
    assert shape_of_call((2, 64, 9, 8), 32, DOWN) == Shape(2 * 5 * 4, 32, 64, 9, 8, 8)
    assert shape_of_call((2, 77, 64), 32, None) == Shape(154, 32, 64, 1, 8, 8)
    packed = product_launch.geometry_of(torch.empty((2, 32), dtype=torch.uint8), 8, None)
    assert tiles.shape_of(packed, 4, 4) == Shape(2, 8, 64, 1, 4, 4)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A GPU with one measured shape."""
    store = Store(tmp_path, Shape, Tile)
    store.save({Shape(1024, 64, 64, 9, 8, 8): Tile(90, 128, 64, 3)}, "NVIDIA H200", {})
    monkeypatch.setattr(tiles, "STORE", store)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    tiles._tuned_gpu.cache_clear()
    yield store
    tiles._tuned_gpu.cache_clear()


def geometry(samples, c_out=64):
    return [samples, 32, 32, 64, c_out, 3, 3, 2, 2, 1, 1, 1, 1, 1]  # 256 pixels of each sample


def test_a_measured_shape_and_near_ones_get_their_tile(tuned):
    for samples in (2, 4, 8):
        assert tiles.choose(geometry(samples), 8, 8, GPU) == Tile(90, 128, 64, 3)
    for other in ((geometry(1), 8), (geometry(16), 8), (geometry(4, 128), 8), (geometry(4), 4)):
        assert tiles.choose(*other, 8, GPU) is None, "the kernels choose"


def test_gpus_without_measurements_and_other_devices_have_none(tuned, monkeypatch):
    assert tiles.choose(geometry(4), 8, 8, torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    tiles._tuned_gpu.cache_clear()
    assert tiles.choose(geometry(4), 8, 8, GPU) is None


def test_the_tile_reaches_the_library(monkeypatch):
    measured, named, reached = Tile(90, 128, 64, 3), Tile(80, 64, 64, 2), []
    monkeypatch.setattr(library, "product_op", lambda: lambda *arguments: reached.append(arguments[-1]))
    codes, weight = torch.zeros(4, 16, dtype=torch.int8), PackedWeight(torch.zeros(8, 16).char(), torch.ones(8), 8)
    for given, found in ((None, measured), (named, None), (None, None)):
        monkeypatch.setattr(product_launch, "choose", lambda *arguments, found=found: found)
        product_launch.product(codes, torch.ones(1), None, weight, None, None, None, None, torch.float16, True, given)
    assert reached == [measured, named, ()]


def test_candidates_come_from_the_library():
    """Checked in test_hopper_maps.py; here that the op gives them, without a GPU."""
    if (reason := library.why_not_loaded()) is not None:
        pytest.skip(reason)
    found = tiles.candidates([2, 16, 16, 640, 1280, 3, 3, 1, 1, 1, 1, 1, 1, 1], 8, 8, (9, 0), 132)
    assert {tile.architecture for tile in found} == {90, 80}
    assert found[0].architecture == 90
    assert str(Tile(90, 256, 160, 2)) == "sm90-256x160-k2"
    with pytest.raises(RuntimeError, match="14 geometry values expected, got 2"):
        library.tiles_op()([1, 2], 8, 8, 90, 132)
