"""Measured cuts: which one a call gets, and that it reaches the library."""

import json

import pytest
import torch

from benchmarks.shapes import Layer
from benchmarks.tile_tuning import Scratch, shortlist
from modiff_kernels.backends.cuda import cuts, library, products
from modiff_kernels.backends.cuda.cuts import Cut, Shape
from modiff_kernels.tuned import Store
from tools.tune_cuda import CudaProducts

CONV = ((3, 3), (2, 2), (1, 1), (1, 1), 1)
GPU = torch.device("cuda", 0)


def shape_of_call(shape, c_out, conv):
    return cuts.shape_of(products.geometry_of(torch.empty(shape, dtype=torch.int8), c_out, conv), 8, 8)


def test_shapes():
    assert shape_of_call((2, 64, 9, 8), 32, CONV) == Shape(2 * 5 * 4, 32, 64, 9, 8, 8)
    assert shape_of_call((2, 77, 64), 32, None) == Shape(154, 32, 64, 1, 8, 8)
    packed = products.geometry_of(torch.empty((2, 32), dtype=torch.uint8), 8, None)
    assert cuts.shape_of(packed, 4, 4) == Shape(2, 8, 64, 1, 4, 4)


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """A GPU with one measured shape."""
    store = Store(tmp_path, Shape, Cut)
    store.save({Shape(1024, 64, 64, 9, 8, 8): Cut(90, 128, 64, 3)}, "NVIDIA H200", {})
    monkeypatch.setattr(cuts, "STORE", store)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    _forget()
    yield store
    _forget()


def _forget():
    cuts._tuned_gpu.cache_clear()
    cuts._measured.cache_clear()


def geometry(samples, c_out=64):
    return [samples, 32, 32, 64, c_out, 3, 3, 2, 2, 1, 1, 1, 1, 1]  # 256 pixels of each sample


def test_a_measured_shape_and_near_ones_get_their_cut(tuned):
    for samples in (2, 4, 8):
        assert cuts.choose(geometry(samples), 8, 8, GPU) == Cut(90, 128, 64, 3)
    for other in ((geometry(1), 8), (geometry(16), 8), (geometry(4, 128), 8), (geometry(4), 4)):
        assert cuts.choose(*other, 8, GPU) == (), "the kernels choose"


def test_gpus_without_measurements_and_other_devices_have_none(tuned, monkeypatch):
    assert cuts.choose(geometry(4), 8, 8, torch.device("cpu")) == ()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    _forget()
    assert cuts.choose(geometry(4), 8, 8, GPU) == ()


@pytest.mark.parametrize(
    ("given", "expected"), [(None, (90, 128, 64, 3)), ((80, 64, 64, 2), (80, 64, 64, 2)), ((), ())]
)
def test_the_cut_reaches_the_library(monkeypatch, given, expected):
    calls = []
    monkeypatch.setattr(library, "product_op", lambda: lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(products, "choose", lambda *arguments: (90, 128, 64, 3))
    codes = torch.zeros(4, 16, dtype=torch.int8)
    operands = (codes, torch.ones(1), None, torch.zeros(8, 16, dtype=torch.int8), torch.ones(8))
    products.integer_product(*operands, None, products.OUTPUT, None, None, True, torch.float16, 8, None, given)
    assert tuple(calls[0][-1]) == expected


def test_candidates_come_from_the_library():
    """Checked in test_hopper_maps.py; here that the op gives them, without a GPU."""
    if (reason := library.why_not_loaded()) is not None:
        pytest.skip(reason)
    found = cuts.candidates([2, 16, 16, 640, 1280, 3, 3, 1, 1, 1, 1, 1, 1, 1], 8, 8, (9, 0), 132)
    assert {cut.architecture for cut in found} == {90, 80}
    assert found[0].architecture == 90
    assert str(Cut(90, 256, 160, 2)) == "sm90-256x160-k2"
    with pytest.raises(RuntimeError, match="14 geometry values expected, got 2"):
        library.cuts_op()([1, 2], 8, 8, 90, 132)


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("layer", [Layer("conv", 32, 72, 5, 4, 3, 2, 1), Layer("linear", 320, 40, 16, 1, 1)], ids=str)
def test_what_the_tuner_measures_is_exact(monkeypatch, product_emulator, layer, weight_bits):
    """The tuner's own way to the kernels of sm_80, emulated; test_hopper_products.py has the tiles of sm_90."""
    if (reason := library.why_not_loaded()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(library, "product_op", lambda: product_emulator.product)
    tunable, scratch = CudaProducts((8, 0), 4), Scratch(layer, 2, weight_bits, torch.device("cpu"))
    found = shortlist(tunable.candidates(scratch), tunable.cut)
    assert {cut[:3] for cut in found} == {(80, 128, 128), (80, 128, 64), (80, 64, 64)}
    assert all(scratch.is_exact(tunable.update(scratch, cut)) for cut in found)
    scratch.y_hat[-1].fill_(torch.nan)
    assert not scratch.is_exact(lambda: scratch.y_hat[-1].add_(1))


def test_sizes_that_the_kernels_do_not_take_have_no_candidates():
    tunable = CudaProducts((9, 0), 132)
    for layer, bits in ((Layer("conv", 24, 32, 4, 4, 3, 1, 1), 8), (Layer("linear", 48, 32, 4, 1, 1), 4)):
        assert tunable.candidates(Scratch(layer, 1, bits, torch.device("cpu"))) == []


def test_shipped_cuts_are_readable():
    for path in cuts.TILES.glob("*.json"):
        name = json.loads(path.read_text())["gpu"]
        assert cuts.STORE.path(name) == path
        assert all(cut.architecture in (80, 90) and cut.splits >= 1 for cut in cuts.STORE.load(name).values())
