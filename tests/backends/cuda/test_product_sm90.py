"""The product of csrc/cuda/sm90: whole kernels on a model of TMA, barriers and wgmma, under sanitizers, bit for bit
with the backend reference, for every tile, split, epilogue and order of threads."""

from functools import partial
from typing import NamedTuple

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda.product_launch import product
from tests.backends.exact_product import DOWN, POINT, THREE, ExactProduct

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
TILES = {8: (0, 1, 2, 3), 4: (0, 3), 3: (0, 3)}  # csrc/cuda/sm90/tiling.h
ALL_TILES = [(bits, tile) for bits, tiles in TILES.items() for tile in tiles]


class Launch(NamedTuple):
    """How a call is launched: the tile's index in csrc/cuda/sm90/tiling.h, -1 for the tiling's own; splits of K."""

    tile: int = -1
    splits: int = 1
    multiprocessors: int = 3
    seed: int = 0


@pytest.fixture
def hopper(emulators, monkeypatch):
    emulator = emulators("hopper")
    monkeypatch.setattr(library, "product_op", lambda: emulator.product)
    yield emulator
    emulator.tile, emulator.splits, emulator.multiprocessors, emulator.seed = -1, 1, 3, None  # others use it too


class Case:
    """A product of random codes, and its results by the reference. Images are channels_last."""

    def __init__(
        self, n, h, w, c_in, c_out, window=POINT, bits=8, *, seed=0, granules=None, state=HALF, out=HALF, skip=True,
        bias=None, zero_point=False,
    ):  # fmt: skip
        torch.manual_seed(seed)
        self.window, self.out_dtype = window, out
        self.codes, weight = ExactProduct((n, c_in, h, w), c_out, window, bits).draw()
        weight_scale, self.scale = (torch.rand(count) * 0.01 + 0.001 for count in (c_out, granules or n))
        self.weight = weight._replace(scale=weight_scale)
        self.zero_point = torch.randint(-128, 128, (n,), dtype=torch.int32) if zero_point else None
        like = torch.empty(window.output_shape(self.codes.shape, c_out)).to(memory_format=torch.channels_last)
        self.y_hat, self.skip = (torch.randn_like(like).to(dtype) for dtype in (state, out))
        self.skip = self.skip if skip else None
        self.bias = None if bias is None else torch.randn(c_out).to(bias)

    def check(self, hopper, launch, with_state=True, write_out=True, same=torch.equal, **more):
        hopper.tile, hopper.splits, hopper.multiprocessors, hopper.seed = launch
        states = [self.y_hat.clone() if with_state else None for _ in range(2)]
        outs = [
            function(
                self.codes, self.scale, self.zero_point, self.weight, state, self.bias, self.skip, self.window,
                self.out_dtype, write_out,
            )
            for function, state in zip((partial(product, **more), reference.product), states)
        ]  # fmt: skip
        assert same(*outs)
        if with_state:
            assert same(*states)


class TestTiles:
    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_matrix(self, hopper, bits, tile):
        """Rows and columns one past a tile, K with a tail; a scale per row."""
        rows, columns = ((256, 160), (128, 256), (128, 128), (128, 64))[tile]
        k = 384 if bits == 3 else 160
        Case(1, rows + 1, 1, k, columns + 8, bits=bits, granules=rows + 1).check(hopper, Launch(tile))

    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_convolution(self, hopper, bits, tile):
        """Boxes of pixels that cross lines and images; a k-block of half a box except with 3 bits."""
        window = (DOWN, THREE)[(bits + tile) % 2]
        case = Case(3, 13, 11, 128 if bits == 3 else 64, 72, window, bits)
        case.check(hopper, Launch(tile, multiprocessors=2, seed=window.stride[0]))

    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_splits_of_k(self, hopper, bits, tile):
        """More work items than blocks: a block takes splits of several tiles. Of three splits it is sometimes the last
        to a tile; two are a cluster's, whose blocks have 4 and 5 k-blocks of each tile."""
        case = Case(2, 9, 9, 128, 72, THREE, bits)
        for splits in (2, 3) if tile in (0, 3) else (2 + tile % 2,):
            case.check(hopper, Launch(tile, splits=splits, multiprocessors=2, seed=tile))

    @pytest.mark.parametrize(("bits", "seed"), [(8, 0), (8, 1), (4, 2), (4, 3)])
    def test_two_blocks_share_codes(self, hopper, bits, seed):
        """Two column tiles of 429 rows, so that of the last codes a half is past the end; by one cluster or by two."""
        case = Case(3, 13, 11, 64, 168, THREE, bits, seed=seed)
        case.check(hopper, Launch(0, multiprocessors=(2, 5)[seed // 2], seed=seed))


class TestOrders:
    """The model's freedom: which thread goes on, when a load is there. Results do not depend on it."""

    @pytest.mark.parametrize(("bits", "seed"), [(8, 0), (8, 1), (8, 2), (4, 3), (4, 0)])
    def test_seeds(self, hopper, bits, seed):
        """18 k-blocks of which every other one is half, in two and in three splits, through 8 and 9 stages, by a block
        that stays for four work items."""
        case = Case(2, 9, 8, 192, 72, THREE, bits, seed=seed)
        case.check(hopper, Launch(3, splits=2 + seed // 2, multiprocessors=1 + seed % 2, seed=seed))

    @pytest.mark.parametrize("seed", [6, 7])
    def test_stages_are_used_again_and_again(self, hopper, seed):
        """Four stages, 21 k-blocks; operands are read late and early."""
        Case(1, 20, 1, 21 * 128, 16).check(hopper, Launch(0, seed=seed))


class TestEpilogues:
    """Those that are known at compile time (csrc/cuda/sm90/finish_slices.h), and their neighbours that are not."""

    FORMS = (
        (HALF, HALF, None), (BFLOAT, BFLOAT, None), (BFLOAT, HALF, None), (FLOAT, HALF, None), (HALF, FLOAT, None),
        (None, HALF, None), (None, HALF, HALF), (None, BFLOAT, FLOAT), (None, BFLOAT, BFLOAT),
    )  # fmt: skip

    @pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
    @pytest.mark.parametrize("form", range(len(FORMS)))
    def test_dtypes(self, hopper, form, skip):
        """Of state, output and bias. Rows and columns that end within a tile, scales that change within a warp's rows;
        two tiles to a block. Zero points where there is a bias."""
        (state, out, bias), tile = self.FORMS[form], 3 * ((form + skip) % 2)
        case = Case(5, 11, 10, 64, 168, state=state or HALF, out=out, bias=bias, skip=skip, zero_point=bias is not None)
        case.check(hopper, Launch(tile, multiprocessors=2, seed=tile), with_state=state is not None)

    @pytest.mark.parametrize(("bits", "splits"), [(8, 1), (4, 2), (8, 3)])
    def test_state_alone(self, hopper, bits, splits):
        """Nothing but y_hat is written; with splits all blocks give back its slices, and one or two finish them."""
        case = Case(2, 9, 9, 512, 72, bits=bits, skip=False)
        case.check(hopper, Launch(0, splits=splits, multiprocessors=2), write_out=False)
