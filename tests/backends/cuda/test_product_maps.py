"""The maps of csrc/cuda/sm80, on all of their arguments where there are few: banks of shared memory, order of tiles,
and the choice of a tile."""

import itertools

import pytest

CHUNK, K_BLOCK = 16, 64


@pytest.fixture(scope="module")
def maps(host_module):
    return host_module("maps")


class TestSwizzle:
    def test_no_phase_of_ldmatrix_meets_a_bank_twice(self, maps):
        """A phase reads one chunk of eight rows; 128 bytes are all 32 banks once."""
        for first, chunk in itertools.product(range(0, 128, 8), range(4)):
            groups = {maps.swizzled(row, chunk) % 128 // CHUNK for row in range(first, first + 8)}
            assert len(groups) == 8

    def test_no_phase_of_copies_meets_a_bank_twice(self, maps):
        """Eight threads write the chunks of two rows (operands.h), or unpack the halves of four."""
        for row in range(0, 128, 4):
            copied = [(row + thread // 4, thread % 4) for thread in range(8)]
            for half in range(2):
                unpacked = [(row + thread // 2, thread % 2 * 2 + half) for thread in range(8)]
                for written in (copied, unpacked):
                    assert len({maps.swizzled(*place) % 128 // CHUNK for place in written}) == 8


@pytest.mark.parametrize("tiles_m", [1, 7, 8, 9, 16, 19])
@pytest.mark.parametrize("tiles_n", [1, 2, 5])
def test_tiles_are_a_permutation_in_bands(maps, tiles_m, tiles_n):
    places = [maps.tile_place(tile, tiles_m, tiles_n) for tile in range(tiles_m * tiles_n)]
    expected = [
        (m, n) for band in range(0, tiles_m, 8) for n in range(tiles_n) for m in range(band, min(band + 8, tiles_m))
    ]
    assert places == expected


class TestChoice:
    TILES = ((128, 256), (128, 128), (128, 64), (64, 64))

    def test_many_rows_get_a_large_tile_whole(self, maps):
        """640 channels at 32x32, batch 8, in 320 large tiles; 1280 in 320 wide ones; no splits."""
        for channels, tile in ((640, 1), (1280, 0)):
            assert maps.choose(8 * 1024, channels, 9 * channels, weight_bits=8, multiprocessors=108) == (tile, 1)

    def test_few_rows_are_split(self, maps):
        """1280 channels at 8x8, batch 1: one row of tiles, for 108 multiprocessors."""
        tile, splits = maps.choose(64, 1280, 9 * 1280, weight_bits=8, multiprocessors=108)
        blocks = -(-64 // self.TILES[tile][0]) * -(-1280 // self.TILES[tile][1]) * splits
        assert splits > 1
        assert blocks >= 100

    @pytest.mark.parametrize("weight_bits", [8, 4, 3])
    @pytest.mark.parametrize("multiprocessors", [1, 84, 108, 132])
    @pytest.mark.parametrize("sizes", [(1, 1, 16), (64, 320, 2880), (4096, 320, 320), (77, 1280, 768)], ids=str)
    def test_it_is_the_least_estimate_and_every_split_has_work(self, maps, sizes, multiprocessors, weight_bits):
        tile, splits = maps.choose(*sizes, weight_bits, multiprocessors)
        k_blocks = -(-sizes[2] // K_BLOCK)
        share = -(-k_blocks // splits)
        assert (splits - 1) * share < k_blocks
        assert splits == 1 or share >= 4
        tiles = range(0 if weight_bits == 8 else 1, 4)  # the wide one does not unpack
        assert tile in tiles
        whole = [maps.cycles(other, 1, *sizes, weight_bits, multiprocessors) for other in tiles]
        assert maps.cycles(tile, splits, *sizes, weight_bits, multiprocessors) <= min(whole)
