"""How the kernels of csrc/cuda/sm90 tile and walk a call: compiled by the host compiler, against definitions."""

import itertools
import random

import numpy as np
import pytest
import torch

ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel size, stride, padding, dilation
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))
DOWN = ((3, 3), (2, 2), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def maps(host_module):
    return host_module("hopper_maps")


def sizes(samples, h, w, c_in, c_out, window=ONE, groups=1):
    return (samples, h, w, c_in, c_out, *(side for pair in window for side in pair), groups)


@pytest.mark.parametrize(
    ("row_tiles", "column_tiles", "splits", "k_blocks"),
    [*itertools.product((1, 7, 8, 9, 20), (1, 2, 5), (1, 3), (7,)), (3, 2, 16, 90), (64, 64, 1, 1)],
)
def test_every_k_block_of_every_tile_once(maps, row_tiles, column_tiles, splits, k_blocks):
    works = maps.works(row_tiles, column_tiles, splits, k_blocks)
    assert len(works) == row_tiles * column_tiles * splits
    done = [(row, column, i) for row, column, _, first, end in works for i in range(first, end)]
    assert sorted(done) == list(itertools.product(range(row_tiles), range(column_tiles), range(k_blocks)))
    assert all(tile == row * column_tiles + column and end > first for row, column, tile, first, end in works)
    if splits == 1 and column_tiles % 2 == 0:  # the two of a cluster share their codes
        assert all(left[0] == right[0] and left[3:] == right[3:] for left, right in zip(works[::2], works[1::2]))


class TestWalks:
    @pytest.mark.parametrize("again", [1, 7, 1000])
    @pytest.mark.parametrize("window", [ONE, THREE, ((2, 3), (1, 1), (0, 1), (3, 2))], ids=["1x1", "3x3", "2x3"])
    @pytest.mark.parametrize("channels", [16, 64, 80, 128, 192, 320, 640, 960])
    def test_every_code_of_the_weight_once(self, maps, channels, window, again):
        """Codes of boxes inside the channels are all of K, in order; behind the channels TMA fills zeros."""
        (r, s), _, _, (dilation_h, dilation_w) = window
        last_half, boxes = maps.boxes(sizes(1, 16, 16, channels, 64, window), again)
        codes = []
        for channel, offset_h, offset_w, code in boxes:
            inside = range(min(128, channels - channel))
            tap = (offset_h // dilation_h) * s + offset_w // dilation_w
            assert all(code + i == tap * channels + channel + i for i in inside)
            codes += [code + i for i in inside]
        assert codes == list(range(r * s * channels))
        assert last_half == ((channels - 1) % 128 < 64)

    @pytest.mark.parametrize("window", [ONE, THREE, DOWN, ((3, 2), (1, 3), (0, 2), (2, 1))])
    def test_windows_begin_where_unfold_has_them(self, maps, window):
        n, h, w = 3, 9, 7
        kernel, stride, padding, dilation = window
        place = torch.arange(n * h * w, dtype=torch.float64).view(n, 1, h, w) + 1
        first = torch.nn.functional.unfold(place, kernel, dilation, padding, stride)[:, 0].flatten()
        corners = maps.corners(sizes(n, h, w, 16, 16, window))
        got = [n_ * h * w + y * w + x + 1 if 0 <= x < w and 0 <= y < h else 0 for x, y, n_ in corners]
        assert got == first.int().tolist()


class TestSharedMemory:
    @pytest.mark.parametrize("swizzle", [64, 128])
    def test_eight_rows_of_a_chunk_meet_every_bank_once(self, maps, swizzle):
        """A wgmma reads 16 bytes of eight rows at a time: 128 bytes, the width of the 32 banks."""
        at = maps.swizzled(np.arange(4096), swizzle)
        for group, chunk in itertools.product(range(0, 4096, 8 * swizzle), range(0, swizzle, 16)):
            assert len({at[group + row * swizzle + chunk] // 16 % 8 for row in range(8)}) == 8


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_tilings_of_any_call_are_whole(maps, bits):
    random.seed(bits)
    for _ in range(300):
        side, window = random.randint(1, 64), random.choice((ONE, THREE, DOWN))
        samples, c_in, c_out = random.randint(1, 16), 16 * random.randint(1, 160), random.randint(1, 3000)
        call = sizes(samples, side, side, c_in, c_out, window)
        found = maps.tiling(call, bits, random.choice((78, 114, 132)))
        rows, columns, splits = found["rows"], found["columns"], found["splits"]
        tiles = found["row_tiles"] * found["column_tiles"]
        out_side = side if window is not DOWN else (side - 1) // 2 + 1
        assert tiles == -(-call[0] * out_side * out_side // rows) * -(-call[4] // columns)
        assert 1 <= splits <= max(1, found["k_blocks"] // 4)
        assert (bits == 8) or (rows, columns) in ((256, 160), (128, 64))
        assert found["scratch"] == (0 if splits <= 2 else 4 * (-(-tiles // 4) * 4 + tiles * rows * columns))


def test_tilings_that_a_caller_may_not_ask_for_are_refused_with_a_reason(maps):
    """csrc/cuda/tiles.h."""
    call = sizes(2, 16, 16, 640, 1280, THREE)
    for tiling, bits, capability, words in (
        ((90, 256, 160, 1), 8, 90, None),
        ((80, 128, 64, 2), 8, 90, None),
        ((0, 0, 0, 0), 8, 80, None),
        ((90, 256, 160, 1), 8, 80, "capability 9.0 alone"),
        ((90, 128, 256, 1), 4, 90, "no such tile"),
        ((90, 128, 64, 46), 8, 90, "more splits than k-blocks"),
        ((90, 128, 64, 0), 8, 90, "less than one split"),
        ((80, 256, 160, 1), 8, 90, "no such tile"),
        ((80, 64, 64, 89), 8, 90, "no k-blocks"),
        ((75, 64, 64, 1), 8, 80, "sm_90 and sm_80"),
    ):
        reason = maps.why_not_tiling(call, bits, 8, tiling, capability)
        assert reason is None if words is None else words in reason


def test_a_limit_says_why(maps):
    for call, bits, offsets, words in (
        (sizes(1, 8, 8, 64, 64, THREE, groups=2), 8, (0, 0), "groups"),
        (sizes(1, 8, 8, 24, 64), 8, (0, 0), "multiple of 16"),
        (sizes(1, 8, 8, 16, 64), 4, (0, 0), "multiple of 32 codes"),
        (sizes(1, 8, 8, 320, 64, THREE), 3, (0, 0), "multiple of 128 codes"),
        (sizes(1, 8, 8, 64, 64), 8, (8, 0), "codes are not aligned"),
        (sizes(1, 8, 8, 64, 64), 8, (0, 4), "weight is not aligned"),
        (sizes(1 << 20, 64, 64, 16, 64), 8, (0, 0), "2^30"),
        (sizes(1, 64, 64, 16, 64, ((1, 1), (9, 1), (0, 0), (1, 1))), 8, (0, 0), "stride"),
        (sizes(1, 64, 64, 16, 64, ((1, 1), (1, 1), (0, 128), (1, 1))), 8, (0, 0), "padding"),
        (sizes(1, 400, 400, 16, 64, ((3, 1), (1, 1), (0, 0), (65, 1))), 8, (0, 0), "inwards"),
    ):
        assert words in maps.limit(call, bits, *offsets)


def test_what_has_no_limit_has_maps_that_tma_takes(maps):
    random.seed(0)
    pick = random.choice
    taken = 0
    for _ in range(4000):
        window = tuple(
            (pick(options), pick(options))
            for options in ((1, 2, 3, 7), (1, 2, 8, 9), (0, 1, 127, 128), (1, 2, 65, 128))
        )
        channels = 8 * random.randint(1, 40)
        call = sizes(random.randint(1, 3), 600, 600, channels, random.randint(1, 400), window, pick((1, 1, 1, 2)))
        bits = pick((8, 4, 3))
        if maps.limit(call, bits) is None:
            taken += 1
            assert maps.problem_of_maps(call, bits) is None
    assert taken > 100
