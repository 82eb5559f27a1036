"""The products of csrc/cuda/sm90: whole kernels on a model of TMA, barriers and wgmma, under sanitizers, bit for bit
with the backend reference, for every tile, cut, epilogue and order of threads.
"""

from dataclasses import replace

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.quant import packing
from modiff_kernels.quant.spec import quant_max, quant_min
from tests.backends.cuda.conftest import running
from tests.backends.cuda.hopper_emulation import Cut, HopperEmulator

ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel size, stride, padding, dilation
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))
DOWN = ((3, 3), (2, 2), (1, 1), (1, 1))
TILES = {8: (0, 1, 2, 3), 4: (0, 3), 3: (0, 3)}  # csrc/cuda/sm90/plan.h
ALL_TILES = [(bits, tile) for bits, tiles in TILES.items() for tile in tiles]


@pytest.fixture(scope="module")
def hopper(tmp_path_factory, compiler):
    yield from running(HopperEmulator, "hopper", tmp_path_factory, compiler)


def image(nhwc):
    return nhwc.permute(0, 3, 1, 2)


class Case:
    """A product of random codes, and its results by the reference. Images are channels_last."""

    def __init__(
        self, n, h, w, c_in, c_out, window=ONE, bits=8, *, seed=0, granules=None, state=torch.float16,
        out=torch.float16, skip=True, bias=None, zero_point=False,
    ):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        (r, s), stride, padding, dilation = self.window = window
        self.bits = bits
        self.codes = image(torch.randint(-128, 128, (n, h, w, c_in), dtype=torch.int8, generator=draw))
        weight_q = torch.randint(
            quant_min(bits), quant_max(bits) + 1, (c_out, r * s * c_in), dtype=torch.int8, generator=draw
        )
        self.weight_packed = packing.pack(weight_q, bits)
        self.weight_scale = torch.rand(c_out, generator=draw) * 0.01 + 0.001
        self.scale = torch.rand(granules or n, generator=draw) * 0.01 + 0.001
        self.zero_point = None
        if zero_point:
            self.zero_point = torch.randint(-128, 128, (n,), dtype=torch.int32, generator=draw)
        sides = [
            (side + 2 * padding[i] - dilation[i] * (window[0][i] - 1) - 1) // stride[i] + 1
            for i, side in enumerate((h, w))
        ]
        shape = (n, *sides, c_out)
        self.y_hat = image(torch.randn(shape, generator=draw).to(state))
        self.skip = image(torch.randn(shape, generator=draw).to(out)) if skip else None
        self.out_dtype = out
        self.bias = None if bias is None else torch.randn(c_out, generator=draw).to(bias)

    def product(self):
        """scale * weight_scale * sums, of the reference."""
        return reference._product(
            self.codes, self.scale, self.zero_point, self.weight_packed, self.weight_scale, self.bits, -1,
            (*self.window, 1),
        )  # fmt: skip

    def check(self, hopper, cut, epilogue="accumulate", write_out=True):
        value = self.product()
        if epilogue == "accumulate":
            value = self.y_hat.float() + value
        elif self.bias is not None:
            value = value + self.bias.float()[:, None, None]
        state = None if epilogue == "output" else value.to(self.y_hat.dtype)
        wanted = value if state is None else state.float()
        wanted = (wanted if self.skip is None else wanted + self.skip.float()).to(self.out_dtype)

        y_hat = None
        if epilogue != "output":
            y_hat = self.y_hat.clone() if epilogue == "accumulate" else torch.full_like(self.y_hat, torch.nan)
        out = torch.full_like(self.y_hat, torch.nan, dtype=self.out_dtype) if write_out else None
        prefetched = hopper.product(
            self.codes, self.scale, self.zero_point, self.weight_packed, self.weight_scale, self.bits, self.window,
            epilogue, self.bias, y_hat, self.skip, out, cut,
        )  # fmt: skip
        if state is not None:
            assert torch.equal(y_hat, state)
        if write_out:
            assert torch.equal(out, wanted)
        return prefetched


class TestTiles:
    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_matrix(self, hopper, bits, tile):
        """Rows and columns one past a tile, K with a tail; a scale per row."""
        rows, columns = ((256, 160), (128, 256), (128, 128), (128, 64))[tile]
        k = 384 if bits == 3 else 160
        Case(1, rows + 1, 1, k, columns + 8, bits=bits, granules=rows + 1).check(hopper, Cut(tile))

    @pytest.mark.parametrize("window", [THREE, DOWN], ids=["stride 1", "stride 2"])
    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_convolution(self, hopper, bits, tile, window):
        """Boxes of pixels that cross lines and images; two boxes of 64 codes to a step except with 3 bits."""
        case = Case(3, 13, 11, 128 if bits == 3 else 64, 72, window, bits)
        case.check(hopper, Cut(tile, multiprocessors=2, seed=window[1][0]))

    @pytest.mark.parametrize(("bits", "tile"), ALL_TILES)
    def test_parts_along_k(self, hopper, bits, tile):
        """More units than blocks: a block takes parts of several tiles, and is sometimes the last to a tile."""
        case = Case(2, 9, 9, 128, 72, THREE, bits)
        case.check(hopper, Cut(tile, splits=3, multiprocessors=2))

    @pytest.mark.parametrize("rows", [1, 127, 128, 129])
    @pytest.mark.parametrize("columns", [8, 64, 65])
    def test_edges(self, hopper, rows, columns):
        Case(1, rows, 1, 64, columns).check(hopper, Cut(3))

    @pytest.mark.parametrize("k", [16, 32, 112, 128, 144])
    def test_depths(self, hopper, k):
        Case(2, 5, 3, k, 24).check(hopper, Cut(3))

    def test_as_planned(self, hopper):
        """A layer of a UNet in its own cut: the 8 x 8 level with its channels divided by ten."""
        Case(2, 8, 8, 128, 128, THREE, 4).check(hopper, Cut(-1, multiprocessors=132))


class TestWindows:
    @pytest.mark.parametrize(
        "window",
        [
            ((1, 1), (2, 2), (0, 0), (1, 1)),
            ((3, 3), (1, 1), (0, 0), (1, 1)),
            ((3, 3), (1, 1), (2, 2), (2, 2)),
            ((2, 3), (3, 1), (0, 2), (1, 3)),
            ((1, 1), (1, 1), (1, 0), (1, 1)),
            ((5, 5), (1, 1), (2, 2), (1, 1)),
        ],
        ids=["1x1 stride 2", "no padding", "dilation", "uneven", "1x1 padding", "5x5"],
    )
    def test_window(self, hopper, window):
        Case(2, 8, 9, 48, 40, window).check(hopper, Cut(3))

    @pytest.mark.parametrize("channels", [16, 80, 128, 192])
    def test_channels(self, hopper, channels):
        """Boxes that reach past a tap's channels, and steps that reach past the last tap."""
        Case(1, 6, 7, channels, 40, THREE).check(hopper, Cut(3))


class TestOrders:
    """The model's freedom: which thread goes on, when a load is there. Results do not depend on it."""

    @pytest.mark.parametrize("seed", range(6))
    @pytest.mark.parametrize("bits", [8, 4])
    def test_seeds(self, hopper, bits, seed):
        """15 steps in parts of 7 and 8, through 7 and 8 stages, by a block that stays for four units."""
        case = Case(2, 9, 8, 192, 72, THREE, bits, seed=seed)
        case.check(hopper, Cut(3, splits=2, multiprocessors=1 + seed % 2, seed=seed))

    @pytest.mark.parametrize("seed", [6, 7])
    def test_stages_are_used_again_and_again(self, hopper, seed):
        """Four stages, 21 steps; operands are read late and early."""
        Case(1, 20, 1, 21 * 128, 16).check(hopper, Cut(0, seed=seed))


class TestEpilogues:
    @pytest.mark.parametrize("out", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("state", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_dtypes(self, hopper, state, out):
        Case(2, 6, 5, 32, 40, state=state, out=out).check(hopper, Cut(3))

    @pytest.mark.parametrize("columns", [40, 37])
    @pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("epilogue", ["initialize", "output"])
    def test_without_a_state_before(self, hopper, epilogue, bias, columns):
        case = Case(2, 6, 5, 32, columns, bias=bias)
        case.check(hopper, Cut(3), epilogue)

    def test_without_skip_and_out(self, hopper):
        Case(2, 6, 5, 32, 40, skip=False).check(hopper, Cut(3), write_out=False)

    @pytest.mark.parametrize("splits", [1, 2])
    @pytest.mark.parametrize("window", [ONE, THREE], ids=["1x1", "3x3"])
    def test_zero_points(self, hopper, window, splits):
        """Padding stands for x = 0, which has the code zero_point and not 0."""
        case = Case(3, 5, 6, 192, 40, window, zero_point=True, bias=torch.float16)
        case.check(hopper, Cut(3, splits=splits), "output")

    def test_one_scale_for_all(self, hopper):
        Case(3, 5, 6, 32, 40, THREE, granules=1).check(hopper, Cut(3))

    @pytest.mark.parametrize(("splits", "all_of_it"), [(1, True), (2, False)])
    @pytest.mark.parametrize("tile", [0, 3])
    @pytest.mark.parametrize("skip", [False, True])
    def test_what_the_epilogue_reads_is_asked_for_once_and_whole(self, hopper, tile, splits, all_of_it, skip):
        case = Case(3, 11, 10, 256, 168, state=torch.float32, skip=skip)
        asked = case.check(hopper, Cut(tile, splits=splits))
        assert asked == (case.y_hat.numel() * (6 if skip else 4) if all_of_it else 0)


def test_results_do_not_depend_on_the_cut(hopper):
    case = Case(2, 9, 9, 128, 96, THREE)
    cut = Cut(2)
    for other in (cut, replace(cut, splits=4), replace(cut, tile=1), replace(cut, multiprocessors=7)):
        case.check(hopper, other)
