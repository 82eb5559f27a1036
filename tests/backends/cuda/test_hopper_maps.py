"""How the kernels of csrc/cuda/sm90 cut and walk a call: compiled by the host compiler, against definitions."""

import itertools
import random

import numpy as np
import pytest
import torch

MULTIPROCESSORS = 132
ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel size, stride, padding, dilation
THREE = ((3, 3), (1, 1), (1, 1), (1, 1))
DOWN = ((3, 3), (2, 2), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def maps(host_module):
    return host_module("hopper_maps")


def sizes(samples, h, w, c_in, c_out, window=ONE, groups=1):
    return (samples, h, w, c_in, c_out, *(side for pair in window for side in pair), groups)


class TestUnits:
    @pytest.mark.parametrize(
        ("row_tiles", "column_tiles", "splits", "steps"),
        [*itertools.product((1, 7, 8, 9, 20), (1, 2, 5), (1, 3), (7,)), (3, 2, 16, 90), (64, 64, 1, 1)],
    )
    def test_every_step_of_every_tile_once(self, maps, row_tiles, column_tiles, splits, steps):
        units = maps.units(row_tiles, column_tiles, splits, steps)
        assert len(units) == row_tiles * column_tiles * splits
        done = [(u.row_tile, u.column_tile, step) for u in units for step in range(u.first_step, u.end_step)]
        assert sorted(done) == list(itertools.product(range(row_tiles), range(column_tiles), range(steps)))
        assert all(u.tile == u.row_tile * column_tiles + u.column_tile for u in units)
        assert all(u.end_step > u.first_step for u in units)

    def test_a_wave_shares_rows_and_columns(self, maps):
        """The first 132 of 32 x 32 tiles: 8 tiles of rows and 17 of columns, not 132 of one."""
        units = maps.units(32, 32, 1, 4)[:MULTIPROCESSORS]
        assert len({u.row_tile for u in units}) == 8
        assert len({u.column_tile for u in units}) == 17


class TestWalks:
    @pytest.mark.parametrize("bits", [8, 4, 3])
    @pytest.mark.parametrize("window", [ONE, THREE, ((2, 3), (1, 1), (0, 1), (3, 2))], ids=["1x1", "3x3", "2x3"])
    @pytest.mark.parametrize("channels", [16, 64, 80, 128, 192, 320, 640, 960])
    def test_every_code_of_the_weight_once(self, maps, channels, window, bits):
        """Codes of boxes inside the channels are all of K, in order; the rest of a box is past the channels, where TMA
        fills zeros.
        """
        (r, s), _, _, (dilation_h, dilation_w) = window
        span, boxes = maps.boxes(sizes(1, 16, 16, channels, 64, window), bits)
        codes = []
        for box in boxes:
            inside = range(min(span, max(0, channels - box.channel)))
            tap = (box.offset_h // dilation_h) * s + box.offset_w // dilation_w
            assert all(box.code + i == tap * channels + box.channel + i for i in inside)
            codes += [box.code + i for i in inside]
        assert codes == list(range(r * s * channels))
        assert len(boxes) * span % 128 == 0
        assert len(boxes) * span - 128 < -(-channels // span) * span * r * s  # no step of zeros alone

    def test_the_320_channels_of_a_unet_cost_half_a_step_of_zeros(self, maps):
        span, boxes = maps.boxes(sizes(2, 64, 64, 320, 320, THREE), 8)
        assert span == 64
        assert len(boxes) * 64 == 9 * 320 + 64

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
    @pytest.mark.parametrize("span", [64, 128])
    def test_swizzles_permute_chunks_within_their_span(self, maps, span):
        at = maps.swizzled(np.arange(4096), span)
        assert sorted(at) == list(range(4096))
        assert all(at[i] // span == i // span and at[i] % 16 == i % 16 for i in range(4096))

    @pytest.mark.parametrize("span", [64, 128])
    def test_eight_rows_of_a_chunk_meet_every_bank_once(self, maps, span):
        """A wgmma reads 16 bytes of eight rows at a time: 128 bytes, the width of the 32 banks."""
        at = maps.swizzled(np.arange(4096), span)
        for group, chunk in itertools.product(range(0, 4096, 8 * span), range(0, span, 16)):
            assert len({at[group + row * span + chunk] // 16 % 8 for row in range(8)}) == 8

    @pytest.mark.parametrize("columns", [64, 128, 160, 256])
    def test_a_warpgroup_holds_every_sum_once(self, maps, columns):
        assert sorted(maps.fragment(columns)) == list(itertools.product(range(64), range(columns)))

    def test_kernels_fit_a_multiprocessor(self, maps):
        """227 KiB of shared memory, 65536 registers, 255 a thread; sums leave a consumer 64 registers at least."""
        kernels = maps.kernels()
        assert len(kernels) == 8
        for kernel in kernels:
            assert kernel["shared"] <= 227 * 1024
            assert kernel["stages"] >= 3
            assert kernel["rows"] == 2 * 64 * kernel["blocks"]
            producer, unpacker, consumer = (kernel[role] for role in ("producer", "unpacker", "consumer"))
            others = [producer] + [unpacker] * (kernel["bits"] != 8)
            assert kernel["threads"] == 128 * (2 + len(others))
            assert 128 * (2 * consumer + sum(others)) <= 65536
            assert consumer <= 255
            assert consumer - kernel["blocks"] * kernel["columns"] // 2 >= 64
            assert all(registers % 8 == 0 for registers in (producer, unpacker, consumer))


class TestPlan:
    def plan(self, maps, call, bits=8, multiprocessors=MULTIPROCESSORS):
        """Tile, number of tiles, splits, steps and bytes of scratch."""
        plan = maps.plan(call, bits, multiprocessors)
        tiles = plan["row_tiles"] * plan["column_tiles"]
        return (plan["rows"], plan["columns"]), tiles, plan["splits"], plan["steps"], plan["scratch"]

    @pytest.mark.parametrize(
        ("samples", "side", "channels"), [(8, 64, 320), (16, 64, 320), (8, 32, 640), (16, 32, 640), (16, 16, 1280)]
    )
    def test_large_convolutions_waste_no_column(self, maps, samples, side, channels):
        """256 x 160, whole along K, and three quarters of all multiprocessors busy at least."""
        tile, tiles, splits, _, scratch = self.plan(maps, sizes(samples, side, side, channels, channels, THREE))
        assert (tile, splits, scratch) == ((256, 160), 1, 0)
        assert tiles / (-(-tiles // MULTIPROCESSORS) * MULTIPROCESSORS) >= 0.75

    @pytest.mark.parametrize("bits", [8, 4, 3])
    @pytest.mark.parametrize(("samples", "side"), [(1, 8), (2, 8), (1, 16)])
    def test_few_rows_are_split_along_k(self, maps, samples, side, bits):
        """One tile of rows: without parts 20 multiprocessors at most would read a weight of 14.7 million codes."""
        _, tiles, splits, steps, scratch = self.plan(maps, sizes(samples, side, side, 1280, 1280, THREE), bits)
        assert steps == 90
        assert splits > 1
        assert 0.6 * MULTIPROCESSORS <= tiles * splits <= MULTIPROCESSORS
        assert scratch > 0

    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_plans_of_any_call_are_whole(self, maps, bits):
        random.seed(bits)
        for _ in range(300):
            side, window = random.randint(1, 64), random.choice((ONE, THREE, DOWN))
            call = sizes(
                random.randint(1, 16), side, side, 16 * random.randint(1, 160), random.randint(1, 3000), window
            )
            (rows, columns), tiles, splits, steps, scratch = self.plan(maps, call, bits, random.choice((78, 114, 132)))
            out_side = side if window is not DOWN else (side - 1) // 2 + 1
            assert tiles == -(-call[0] * out_side * out_side // rows) * -(-call[4] // columns)
            assert 1 <= splits <= max(1, steps // 4)
            assert (bits == 8) or (rows, columns) in ((256, 160), (128, 64))
            assert scratch == (0 if splits == 1 else 4 * (-(-tiles // 4) * 4 + tiles * rows * columns))


class TestCuts:
    """csrc/cuda/cuts.h: what a caller may ask for."""

    CALL = (2, 16, 16, 640, 1280, 3, 3, 1, 1, 1, 1, 1, 1, 1)

    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_the_first_one_is_what_the_kernels_choose(self, maps, bits):
        random.seed(bits)
        for _ in range(100):
            side, window = random.randint(1, 64), random.choice((ONE, THREE, DOWN))
            channels = (128 if bits == 3 else 32) * random.randint(1, 20)
            call = sizes(random.randint(1, 16), side, side, channels, random.randint(1, 3000), window)
            multiprocessors = random.choice((78, 114, 132))
            plan = maps.plan(call, bits, multiprocessors)
            found = maps.cuts(call, bits, 8, 90, multiprocessors)
            assert found[0] == (90, plan["rows"], plan["columns"], plan["splits"])
            assert len(set(found)) == len(found)
            assert [cut[0] for cut in found] == sorted((cut[0] for cut in found), reverse=True)
            assert all(maps.why_not_cut(call, bits, 8, cut, 90) is None for cut in found)
            assert all(maps.told_plan(call, bits, cut) == cut[1:] for cut in found if cut[0] == 90)

    def test_older_gpus_have_the_kernels_of_sm80_alone(self, maps):
        found = maps.cuts(self.CALL, 8, 8, 86, 84)
        assert {cut[0] for cut in found} == {80}
        assert found[0] == (80, *maps.choice_of_sm80(512, 1280, 9 * 640, 8, 84))
        assert {cut[1:3] for cut in found} == {(128, 128), (128, 64), (64, 64)}

    def test_packed_codes_have_tensor_cores_on_older_gpus_alone(self, maps):
        assert maps.cuts(self.CALL, 4, 4, 90, 132) == []
        assert {cut[0] for cut in maps.cuts(self.CALL, 4, 4, 80, 108)} == {80}

    @pytest.mark.parametrize(
        ("cut", "bits", "capability", "words"),
        [
            ((90, 256, 160, 1), 8, 90, None),
            ((80, 128, 64, 2), 8, 90, None),
            ((0, 0, 0, 0), 8, 80, None),
            ((90, 256, 160, 1), 8, 80, "capability 9.0 alone"),
            ((90, 128, 256, 1), 4, 90, "no such tile"),
            ((90, 64, 64, 1), 8, 90, "no such tile"),
            ((90, 128, 64, 46), 8, 90, "more parts than steps"),
            ((90, 128, 64, 0), 8, 90, "less than one part"),
            ((80, 256, 160, 1), 8, 90, "no such tile"),
            ((80, 64, 64, 89), 8, 90, "no steps along K"),
            ((75, 64, 64, 1), 8, 80, "sm_90 and sm_80"),
        ],
    )
    def test_others_are_refused_with_a_reason(self, maps, cut, bits, capability, words):
        reason = maps.why_not_cut(self.CALL, bits, 8, cut, capability)
        assert reason is None if words is None else words in reason


class TestLimits:
    @pytest.mark.parametrize(
        ("call", "bits", "offsets", "words"),
        [
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
        ],
    )
    def test_a_limit_says_why(self, maps, call, bits, offsets, words):
        assert words in maps.limit(call, bits, *offsets)

    def test_layers_of_unets_have_none(self, maps):
        for channels, window in itertools.product((64, 128, 320, 640, 960, 1280, 1920, 2560), (ONE, THREE, DOWN)):
            for bits in (8, 4):
                assert maps.limit(sizes(2, 16, 16, channels, 320, window), bits) is None
            if channels % 128 == 0:
                assert maps.limit(sizes(2, 16, 16, channels, 320, window), 3) is None

    def test_what_has_no_limit_has_maps_that_tma_takes(self, maps):
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
