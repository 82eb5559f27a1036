"""The backend triton: what it refuses, what it needs, and, interpreted, what the contract cannot ask for: tiles, splits
of K, the update in one launch.
"""

import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends import triton as backend
from modiff_kernels.backends.triton import quantize_plan
from modiff_kernels.ops.problem import Problem
from modiff_kernels.quant.operands import IDENTITY, Window
from modiff_kernels.quant.packing import KPACK_V1
from tests.contract.cases import GRANULARITIES, Case, activation, conv, weight_of
from tests.contract.test_product import check_sums

OP, PLACES = "product", ("triton-interpreted", "triton-gpu")

CONV = Problem("product", "cuda", (9, 0), torch.float16, torch.float16, m=4096, n=320, k=9 * 320,
               window=Window((3, 3), padding=(1, 1)), weight_bits=4, granularity="per_sample", layout=KPACK_V1)  # fmt: skip
LINEAR = replace(CONV, window=None, k=1280)
QUANTIZE = Problem("quantize", "cuda", (9, 0), m=4, k=quantize_plan.MAX_ROW + 1, granularity="per_token")


@pytest.mark.parametrize("problem", [CONV, LINEAR], ids=["conv", "linear"])
def test_it_solves_the_layers_of_a_unet(problem):
    for bits, capability in ((8, (8, 0)), (4, (9, 0)), (3, (8, 9)), (8, (10, 0)), (4, (12, 0))):
        assert backend.why_not(replace(problem, weight_bits=bits, capability=capability)) is None
    assert backend.why_not(replace(problem, group_size=64)) is None
    assert backend.why_not(replace(problem, m=0)) is None, "the number of rows may not be known yet"


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (replace(CONV, capability=(7, 5)), "compute capability 7.5: the kernels need 8.0 or newer"),
        (replace(CONV, layout="vnni_v1"), "reads weights in layout 'kpack_v1', not 'vnni_v1'"),
        (replace(LINEAR, k=65537), "k=65537 products can overflow int32; at most 65536 are summed"),
        (replace(LINEAR, m=1 << 31), "rows; they are counted in int32"),
        (replace(CONV, granularity="per_token"), "per_token scales do not factor out"),
        (replace(CONV, k=9 * 20), "4-bit weights with 20 input channels per tap.*use weight_bits=8"),
        (replace(LINEAR, group_size=48), "group_size=48 .* must be divisible by 32"),
        (replace(CONV, k=9 * 48, group_size=32), "group_size=32 with 48 input channels.* must be divisible by 32"),
        (replace(QUANTIZE, capability=(7, 0)), "compute capability 7.0"),
        (QUANTIZE, f"{quantize_plan.MAX_ROW + 1} channels: rows are held in registers"),
        (replace(QUANTIZE, granularity="per_tensor", prologue="layer_norm"), "rows are held in registers"),
        (replace(QUANTIZE, granularity="per_sample"), None),
        (replace(QUANTIZE, k=quantize_plan.MAX_ROW), None),
        (replace(CONV, op="modulate", prologue="identity"), "one launch is for Linears"),
        (replace(LINEAR, op="modulate", prologue="geglu"), "no prologue"),
        (replace(LINEAR, op="modulate", prologue="identity"), "a dynamic scale per_sample needs all rows"),
    ],
)
def test_reasons(problem, words):
    reason = backend.why_not(problem)
    assert reason is None if words is None else re.search(words, reason)


def test_unavailable(monkeypatch):
    ask = backend.unavailable.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ask() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (6, 1))[index])
    assert ask() == "compute capability 7.5, 6.1: the kernels need 8.0 (A100) or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (9, 0))[index])
    assert ask() is None
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'modiff-kernels[triton]'" in ask()


def test_the_package_needs_triton_only_for_its_kernels():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from modiff_kernels.backends import triton as backend\n"
        "from modiff_kernels.ops import dispatch\n"
        "assert isinstance(dispatch.why_unavailable('triton'), str)\n"
        "assert 'modiff_kernels.backends.triton.launch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestPlan:
    """How quantisation is tiled."""

    def test_no_lane_of_an_image_is_masked(self):
        for channels in (128, 192, 256, 320, 384, 512, 640, 960, 1280, 1920, 2560):
            for rows in (64 * 64, 32 * 32, 16 * 16, 8 * 8):
                plan = quantize_plan.plan(2, rows, channels, "per_sample", 8, "group_norm", 2)
                assert (channels % plan.block_c, rows % plan.block_r) == (0, 0)

    def test_tiles_cover_everything_in_powers_of_two(self):
        sizes = itertools.product((1, 3), (1, 63, 64, 65, 4096), (1, 33, 320, 5120))
        kinds = itertools.product((*GRANULARITIES, "per_block"), ("identity", "group_norm", "layer_norm", "geglu"))
        for (samples, rows, channels), (granularity, prologue) in itertools.product(sizes, list(kinds)):
            p = quantize_plan.plan(samples, rows, channels, granularity, 4, prologue, 2)
            assert p.samples * p.rows * p.channels == samples * rows * channels
            assert all(size & (size - 1) == 0 for size in (p.block_r, p.block_c, p.num_warps))
            assert p.grid[0] * p.block_r * p.block_c >= samples * rows * channels
            assert not (granularity == "per_token" or prologue == "layer_norm") or p.block_c >= channels

    def test_one_image_of_the_first_level_fills_the_gpu(self):
        for rows, channels in ((64 * 64, 320), (32 * 32, 640), (16 * 16, 1280)):
            assert quantize_plan.plan(1, rows, channels, "per_sample", 8, "identity", 2).grid[0] >= 132


def test_every_tile_gives_the_same_sums(place, monkeypatch):
    """Tiles, orders of tiles (5 x 4 in bands of 3 leave a rest), splits of K."""
    from modiff_kernels.backends.triton import product_launch
    from modiff_kernels.backends.triton.tiles import TileConfig

    matrix, image, tall = Case((130, 200), 130), conv((2, 40, 9, 8), 65), Case((260, 32), 200)
    deep, taps = Case((5, 320), 33), conv((1, 32, 4, 4), 65)
    for case, bits, tile in [
        (matrix, 8, TileConfig(128, 128, 128, 8, 3)),
        (image, 8, TileConfig(128, 64, 64, 4, 3)),
        (image, 4, TileConfig(64, 64, 128, 4, 2)),
        (tall, 8, TileConfig(64, 64, 32, 4, 2, group_m=3)),
        (tall, 3, TileConfig(64, 64, 32, 4, 2, group_m=1)),
        *((case, bits, TileConfig(64, 64, 32, 4, 2, split_k=splits))
          for case, bits, splits in [(deep, 8, 2), (deep, 4, 3), (taps, 8, 16), (taps, 4, 2)]),
    ]:  # fmt: skip
        monkeypatch.setattr(product_launch, "choose", lambda *arguments, tile=tile: tile)
        for zero_point in (False, True):
            assert check_sums(place, case, bits, "per_sample", zero_point)


@pytest.mark.parametrize(("granularity", "source"), [("per_token", None), ("per_token", "one"), ("per_token", "all"),
                                                     ("per_sample", "all"), ("per_tensor", "one")])  # fmt: skip
def test_one_launch_is_quantize_and_product(place, granularity, source):
    for case, weight_bits, group_size in [(Case((1, 1), 1), 8, -1), (Case((2, 3, 63), 65), 8, -1), (Case((65, 64), 64), 3, -1),
                                          (Case((2, 33, 128), 70), 4, 64)]:  # fmt: skip
        weight = weight_of(place, case, weight_bits, group_size).packed
        x, skip = activation(case.x_shape, torch.float16), activation(case.y_shape, torch.float16)
        before = activation(case.x_shape, torch.float16), activation(case.y_shape, torch.float16)
        count = 1 if source == "one" else case.scales(granularity)
        scale = None if source is None else torch.rand(count) * 0.1 + 0.01
        here = [t.clone().to(place.device) for t in before]
        moved = [None if t is None else t.to(place.device) for t in (x, scale, skip)]
        there = weight._replace(packed=weight.packed.to(place.device), scale=weight.scale.to(place.device))
        arguments = (moved[0], IDENTITY, here[0], moved[1], there, here[1], moved[2], None, torch.float16)
        found = [t.cpu() for t in (*backend.modulate(*arguments, 4, granularity, 0.9, True), *here)]
        x_hat, y_hat = (t.clone() for t in before)
        codes, *wanted = reference.quantize(x, IDENTITY, x_hat, scale, 4, granularity, 0.9, True)
        out = reference.product(codes, wanted[0], None, weight, y_hat, None, skip, None, torch.float16, True)
        assert torch.equal(found[1], wanted[0])
        assert torch.equal(found[2], wanted[1])
        for got, expected in zip((found[0], *found[3:]), (out, x_hat, y_hat)):
            # The order of an addition, in the coarser dtype of state and output.
            torch.testing.assert_close(got, expected, rtol=4 * 2**-10, atol=4 * 2**-10)


def test_one_launch_without_out_and_with_nan(place):
    case = Case((65, 64), 64)
    weight, x = weight_of(place, case, 8).packed, activation(case.x_shape)
    x[3, 5] = torch.nan
    there = weight._replace(packed=weight.packed.to(place.device), scale=weight.scale.to(place.device))
    states = [activation(shape).to(place.device) for shape in (case.x_shape, case.y_shape)]
    arguments = (x.to(place.device), IDENTITY, states[0], None, there, states[1], None, None, torch.float32)
    out, used, absmax = backend.modulate(*arguments, 8, "per_token", 1.0, False)
    assert out.shape == (0,)
    for seen in (used, absmax):
        assert seen.isnan().nonzero().flatten().tolist() == [3]
