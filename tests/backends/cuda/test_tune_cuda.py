"""The tuner's way to the CUDA kernels of sm_80, emulated; test_product_sm90.py has the tiles of sm_90."""

import pytest
import torch

from benchmarks.shapes import Layer
from benchmarks.tile_tuning import Scratch, shortlist
from modiff_kernels.backends.cuda import library
from tools.tune_cuda import CudaProducts


@pytest.mark.parametrize("weight_bits", [8, 4])
@pytest.mark.parametrize("layer", [Layer("conv", 32, 72, 5, 4, 3, 2, 1), Layer("linear", 320, 40, 16, 1, 1)], ids=str)
def test_what_the_tuner_measures_is_exact(monkeypatch, product_emulator, layer, weight_bits):
    """The tuner's own way to the kernels of sm_80, emulated; test_product_sm90.py has the tiles of sm_90."""
    if (reason := library.why_not_loaded()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(library, "product_op", lambda: product_emulator.product)
    tunable, scratch = CudaProducts((8, 0), 4), Scratch(layer, 2, weight_bits, torch.device("cpu"))
    found = shortlist(tunable.candidates(scratch), tunable.tile)
    assert {tile[:3] for tile in found} == {(80, 128, 128), (80, 128, 64), (80, 64, 64)}
    assert all(scratch.is_exact(tunable.update(scratch, tile)) for tile in found)
    scratch.y_hat[-1].fill_(torch.nan)
    assert not scratch.is_exact(lambda: scratch.y_hat[-1].add_(1))


def test_sizes_that_the_kernels_do_not_take_have_no_candidates():
    tunable = CudaProducts((9, 0), 132)
    for layer, bits in ((Layer("conv", 24, 32, 4, 4, 3, 1, 1), 8), (Layer("linear", 48, 32, 4, 1, 1), 4)):
        assert tunable.candidates(Scratch(layer, 1, bits, torch.device("cpu"))) == []
