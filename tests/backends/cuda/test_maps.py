"""How the products of csrc/cuda share out a call, compiled by the host compiler: work items, order of tiles, banks of
shared memory, choice of tiles, and what the kernels or TMA do not take."""

import itertools
import random

import numpy as np
import pytest

ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel size, stride, padding, dilation
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))
DOWN = ((3, 3), (2, 2), (1, 1), (1, 1))
CHUNK = 16


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


def test_tiles_of_sm_80_are_a_permutation_in_bands(maps):
    for tiles_m, tiles_n in itertools.product((1, 7, 8, 9, 16, 19), (1, 2, 5)):
        bands = [range(band, min(band + 8, tiles_m)) for band in range(0, tiles_m, 8)]
        places = [maps.tile_place(tile, tiles_m, tiles_n) for tile in range(tiles_m * tiles_n)]
        assert places == [(m, n) for band in bands for n in range(tiles_n) for m in band]


class TestBanks:
    """128 bytes are all 32 banks once."""

    @pytest.mark.parametrize("swizzle", [64, 128])
    def test_eight_rows_of_a_wgmma(self, maps, swizzle):
        at = maps.swizzled_sm90(np.arange(4096), swizzle)
        for group, chunk in itertools.product(range(0, 4096, 8 * swizzle), range(0, swizzle, CHUNK)):
            assert len({at[group + row * swizzle + chunk] // CHUNK % 8 for row in range(8)}) == 8

    def test_phases_of_ldmatrix_and_of_copies(self, maps):
        """A phase reads one chunk of eight rows; eight threads write the chunks of two rows (operands.h), or unpack the
        halves of four."""
        phases = [[(row + i, chunk) for i in range(8)] for row in range(0, 128, 8) for chunk in range(4)]
        for row in range(0, 128, 4):
            phases.append([(row + thread // 4, thread % 4) for thread in range(8)])
            phases += [[(row + thread // 2, thread % 2 * 2 + half) for thread in range(8)] for half in range(2)]
        for places in phases:
            assert len({maps.swizzled_sm80(*place) % 128 // CHUNK for place in places}) == 8


def test_many_rows_get_a_large_tile_of_sm_80_and_few_are_split(maps):
    """For 108 multiprocessors: 640 channels at 32x32, batch 8, and 1280 there; 1280 at 8x8, batch 1, is one row."""
    assert [maps.choose(8 * 1024, channels, 9 * channels, 8, 108) for channels in (640, 1280)] == [(1, 1), (0, 1)]
    tile, splits = maps.choose(64, 1280, 9 * 1280, 8, 108)
    assert splits > 1
    assert 1280 // (256, 128, 64, 64)[tile] * splits >= 100
    rows = (1, 1, 16), (64, 320, 2880), (4096, 320, 320), (77, 1280, 768)
    for call, multiprocessors, bits in itertools.product(rows, (1, 84, 108, 132), (8, 4, 3)):
        tile, splits = maps.choose(*call, bits, multiprocessors)
        k_blocks = -(-call[2] // 64)
        assert (splits - 1) * -(-k_blocks // splits) < k_blocks, "every split has work"
        assert tile in range(0 if bits == 8 else 1, 4), "the wide one does not unpack"


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
