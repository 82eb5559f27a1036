"""The product of csrc/cuda/sm90 beyond the contract: every tile, splits of K, orders of threads and loads, and what its
epilogue asks for ahead; on a model of TMA, barriers and wgmma, under sanitizers.
"""

import itertools

import pytest
import torch

from tests.contract.cases import Case, activation, conv, weight_of
from tests.contract.test_product import check_sums

OP, PLACES = "product", ("sm90-emulated",)

# Rows and columns of csrc/cuda/sm90/plan.h, by index; 3- and 4-bit weights have the first and the last.
TILES = {0: (256, 160), 1: (128, 256), 2: (128, 128), 3: (128, 64)}
ALL_TILES = [(bits, tile) for bits, tiles in {8: (0, 1, 2, 3), 4: (0, 3), 3: (0, 3)}.items() for tile in tiles]


@pytest.fixture
def sm90(place, emulator, monkeypatch):
    """The emulator, whose choices a test may change."""
    program = emulator("hopper")
    for name in ("tile", "splits", "multiprocessors", "seed"):
        monkeypatch.setattr(program, name, getattr(program, name))
    return program


@pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
def test_tiles(place, sm90, bits, tile):
    """One row and eight columns more than a tile, K with a tail; boxes of pixels that cross lines and images; more
    units than blocks, so that a block takes splits of several tiles and is sometimes the last to one.
    """
    sm90.tile = tile
    rows, columns = TILES[tile]
    assert check_sums(place, Case((rows + 1, 384 if bits == 3 else 160), columns + 8), bits, "per_token", False)
    channels = 128 if bits == 3 else 64
    sm90.multiprocessors, sm90.seed = 2, tile
    assert check_sums(place, conv((3, channels, 13, 11), 72, stride=1 + tile % 2), bits, "per_sample", False)
    sm90.splits = 3
    assert check_sums(place, conv((2, 128, 9, 9), 72), bits, "per_tensor", bits != 8)


def test_sides_and_depths(place, sm90):
    sm90.tile = 3
    for rows, columns in itertools.product((1, 127, 128, 129), (8, 65)):
        assert check_sums(place, Case((rows, 64), columns), 8, "per_token", False)
    for k in (16, 32, 112, 128, 144):
        assert check_sums(place, Case((15, k), 24), 8, "per_tensor", True)


def test_windows_and_channels(place, sm90):
    """Boxes that reach past a tap's channels, and steps that reach past the last tap."""
    sm90.tile = 3
    for window in [(1, 2, 0), (3, 1, 0), (3, 1, 2, 2), ((2, 3), (3, 1), (0, 2), (1, 3)), (1, 1, (1, 0)), (5, 1, 2)]:
        assert check_sums(place, conv((2, 48, 8, 9), 40, *window), 8, "per_sample", True)
    for channels in (16, 80, 128, 192):
        assert check_sums(place, conv((1, channels, 6, 7), 40), 8, "per_sample", False)


def test_orders(place, sm90):
    """The model's freedom, which thread goes on and when a load is there, shows in no result: 15 steps in splits of 7
    and 8, by a block that stays for four units; four stages, 21 steps.
    """
    for sm90.seed, bits in itertools.product(range(4), (8, 4)):
        sm90.tile, sm90.splits, sm90.multiprocessors = 3, 2, 1 + sm90.seed % 2
        assert check_sums(place, conv((2, 192, 9, 8), 72), bits, "per_sample", False)
    sm90.tile, sm90.splits, sm90.seed = 0, 1, 6
    assert check_sums(place, Case((20, 21 * 128), 16), 8, "per_tensor", False)


def test_as_planned(place, sm90):
    """A layer of a UNet in its own tiling: the 8 x 8 level with its channels divided by ten."""
    sm90.multiprocessors = 132
    assert check_sums(place, conv((2, 128, 8, 8), 128), 4, "per_sample", False)


def test_what_the_epilogue_reads_is_asked_for_once_and_whole(place, sm90):
    case = Case((330, 256), 168)
    weight, codes = weight_of(place, case, 8), torch.zeros(case.x_shape, dtype=torch.int8)
    for sm90.tile, sm90.splits, with_skip in itertools.product((0, 3), (1, 2), (False, True)):
        y_hat, skip = activation(case.y_shape), activation(case.y_shape, torch.float16) if with_skip else None
        place.product(codes, torch.ones(1), None, weight.packed, y_hat, None, skip, None, torch.float16)
        assert sm90.prefetched == (y_hat.numel() * (6 if with_skip else 4) if sm90.splits == 1 else 0)
