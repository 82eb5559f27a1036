"""The maps of csrc/cuda/sm80, on all of their arguments where there are few: fragments, places in shared memory, order
of tiles, im2col, and the choice of a tile."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from modiff_kernels.quant.operands import Window

CHUNK, K_BLOCK = 16, 64


@pytest.fixture(scope="module")
def maps(host_module):
    return host_module("maps")


def codes_of_words(words, bits):
    """int64 codes of uint32 words, the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    codes = (words.long().unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_fragments_are_those_of_the_ptx_isa(maps, bits):
    """Rows and columns as the PTX ISA gives them for the i-th code of a thread, for mma.m16n8k32 (8 bits) and m16n8k64
    (4 bits); the product of the matrices is the oracle."""
    k, per_word = 256 // bits, 32 // bits
    words_a, words_b = (torch.randint(1 << 32, (32, count)).to(torch.uint32) for count in (4, 2))
    a, b = torch.zeros(16, k).long(), torch.zeros(k, 8).long()
    codes_a, codes_b = (codes_of_words(words, bits).flatten(1) for words in (words_a, words_b))
    for lane in range(32):
        group, member = lane // 4, lane % 4
        for i in range(4 * per_word):
            row = group if i < per_word or 2 * per_word <= i < 3 * per_word else group + 8
            column = member * per_word + i % per_word + (k // 2 if i >= 2 * per_word else 0)
            a[row, column] = codes_a[lane, i]
        for i in range(2 * per_word):
            b[member * per_word + i % per_word + (k // 2 if i >= per_word else 0), group] = codes_b[lane, i]
    sums = maps.multiply(words_a, words_b, nibbles=bits == 4)
    expected = a @ b
    for lane, i in itertools.product(range(32), range(4)):
        row, column = lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2
        assert sums[lane, i] == expected[row, column]


def test_matrices_are_loaded_as_the_ptx_isa_says(maps):
    """Thread t gets elements 2 * (t % 4) and the next of row t / 4 of four 8x8 matrices of 16 bits; thread 8 * i + j
    gives the address of row j of matrix i."""
    rows = torch.randint(256, (32, 16)).to(torch.uint8)
    words = torch.from_numpy(maps.load_matrices(rows))
    for thread, matrix in itertools.product(range(32), range(4)):
        wanted = rows[8 * matrix + thread // 4][thread % 4 * 4 : thread % 4 * 4 + 4]
        assert torch.equal(words[thread].view(torch.uint8)[4 * matrix : 4 * matrix + 4], wanted)


class TestSwizzle:
    def test_every_chunk_has_its_own_place_in_its_row(self, maps):
        for row in range(128):
            places = [maps.swizzled(row, chunk) for chunk in range(4)]
            assert sorted(places) == [row * K_BLOCK + chunk * CHUNK for chunk in range(4)]

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


def test_chunks_come_from_where_the_window_meets_them(maps):
    """Against F.unfold of an image of the numbers of its own chunks, from 1 on, as 0 stands for padding."""
    for x_shape, window in (
        ((2, 16, 5, 7), Window((3, 3), padding=(1, 1))),
        ((2, 48, 7, 5), Window((3, 3), (2, 2), (1, 1))),
        ((1, 80, 6, 6), Window((3, 3))),
        ((3, 16, 4, 9), Window((1, 3), (2, 1), (0, 2), (1, 2))),
        ((1, 32, 9, 8), Window((5, 4), (2, 3), (3, 1), (2, 1))),
        ((2, 32, 3, 3), Window((1, 1), padding=(1, 1))),
    ):
        samples, channels, h, w = x_shape
        chunks = channels // CHUNK
        image = torch.arange(1.0, samples * h * w * chunks + 1).view(samples, h, w, chunks).permute(0, 3, 1, 2)
        columns = F.unfold(image.double(), window.kernel_size, window.dilation, window.padding, window.stride)
        taps = window.kernel_size[0] * window.kernel_size[1]
        rows = columns.view(samples, chunks, taps, -1).permute(0, 3, 2, 1).reshape(-1, taps * chunks)
        k_blocks = -(-taps * channels // K_BLOCK) + 1  # one more: past the end of K
        wanted = torch.zeros(-(-len(rows) // 64) * 64, k_blocks * 4)
        wanted[: len(rows), : rows.shape[1]] = rows
        geometry = (samples, h, w, channels, 1, *window.to_ints())
        for first in range(0, len(wanted), 64):
            sources = torch.from_numpy(maps.gather(geometry, first, k_blocks))
            found = sources.transpose(0, 1).reshape(64, k_blocks * 4)
            assert torch.equal(torch.where(found < 0, found + 1, found // CHUNK + 1), wanted[first : first + 64].long())
            assert ((found % CHUNK == 0) | (found == -1)).all()


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
