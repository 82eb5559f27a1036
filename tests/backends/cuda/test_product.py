"""The insides of `product` of the backend cuda on csrc/cuda/sm80, emulated: every tile and split, the order of threads,
windows, nibbles, and what lies beside the tensors."""

import pytest
import torch

from modiff_kernels.backends import MAX_K
from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda.product_launch import product
from modiff_kernels.quant.operands import Window
from tests.backends.cuda.emulation import pack_channels
from tests.backends.exact_product import DOWN, THREE, ExactProduct, check_largest_sum

pytestmark = pytest.mark.usefixtures("poisoned_empty")
WIDE, LARGE, NARROW, SMALL = range(4)  # csrc/cuda/sm80/tile_config.h kTiles


@pytest.fixture
def emulator(emulators, monkeypatch):
    product_emulator = emulators("product")
    monkeypatch.setattr(library, "product_op", lambda: product_emulator.product)
    product_emulator.tile, product_emulator.splits = SMALL, 1
    yield product_emulator
    product_emulator.tile, product_emulator.splits, product_emulator.seed = product_emulator.CHOOSE, 4, None


TILED = [
    ExactProduct((130, 320), 130),
    ExactProduct((2, 48, 9, 8), 65, THREE),
    ExactProduct((130, 320), 130, bits=4),
    ExactProduct((1, 32, 12, 12), 136, THREE, bits=3),
    ExactProduct((2, 32, 9, 8), 24, Window((5, 4), (2, 3), (3, 1), (2, 1))),
    ExactProduct((3, 16, 4, 9), 24, Window((1, 3), (2, 1), (0, 2), (1, 2))),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", range(len(TILED)))
def test_tiles_and_orders_of_threads(emulator, case, seed):
    """Odd seeds: copies arrive when they are issued; even ones: when they are waited for."""
    emulator.tile, emulator.seed = (LARGE, NARROW, SMALL)[(case + seed) % 3], seed
    TILED[case].check(product)


@pytest.mark.parametrize(("case", "seed"), [(TILED[0], 1), (ExactProduct((2, 48, 9, 8), 265, THREE), 0)], ids=str)
def test_the_wide_tile(emulator, case, seed):
    """It has weights of 8 bits and nibbles alone."""
    emulator.tile, emulator.seed = WIDE, seed
    case.check(product)


SPLIT = [ExactProduct((5, 320), 33), ExactProduct((5, 320), 33, bits=4), ExactProduct((1, 32, 4, 4), 65, THREE)]


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_splits_of_k(emulator, case, splits):
    """320 codes are five k-blocks, so that three splits have two, two and one; 288 are four and a half."""
    emulator.splits = splits
    case.check(product)


NIBBLES = [
    ExactProduct((65, 160), 72, bits=4, code_bits=4),
    ExactProduct((2, 32, 5, 7), 24, THREE, bits=4, code_bits=4),
    ExactProduct((1, 96, 6, 5), 66, DOWN, bits=4, code_bits=4),
]


@pytest.mark.parametrize("case", NIBBLES, ids=str)
def test_packed_codes_are_multiplied_as_they_are(emulator, case):
    for tile, splits in ((SMALL, 2), ((NARROW, LARGE, WIDE)[NIBBLES.index(case)], 1)):
        emulator.tile, emulator.splits, emulator.seed = tile, splits, splits - 1
        case.check(product, packed_codes=lambda codes: pack_channels(codes, 4))


def test_the_largest_sums_do_not_leave_int32(emulator):
    check_largest_sum(product, MAX_K)


def test_tensors_on_addresses_that_are_not_aligned(emulator):
    """Views into larger tensors: codes and weights are copied, everything else is read as it is."""
    codes, weight = ExactProduct((7, 64), 24).draw()
    shifted = torch.cat((torch.zeros(1, dtype=torch.int8), codes.flatten()))[1:].view(codes.shape)
    packed = torch.cat((torch.zeros(3, dtype=torch.int8), weight.packed.flatten()))[3:].view(24, 64)
    assert shifted.data_ptr() % 16 != 0
    assert packed.data_ptr() % 16 != 0
    y_hat = torch.full((7 * 24 + 1,), 2.0)[1:].view(7, 24)
    ones = torch.ones(1)
    out = product(shifted, ones, None, weight._replace(packed=packed), y_hat, None, None, None, torch.float32, True)
    assert torch.equal(out.double(), codes.double() @ weight.packed.double().T + 2)
