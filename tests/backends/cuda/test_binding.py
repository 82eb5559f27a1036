"""The binding csrc/cuda/ops.cpp and the host's part of csrc/cuda/sm90 on stubs of kernels, CUDA and driver
(emulator/stubs.cpp): what Python passes arrives where it belongs, and the driver is told of a tensor once."""

from pathlib import Path

import pytest
import torch

from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda.product_launch import Tile, product
from modiff_kernels.backends.cuda.quantize_launch import quantize
from modiff_kernels.quant.operands import GEGLU, IDENTITY, PackedWeight, Prologue, Window
from tests.backends.cuda.emulation import DTYPES, EMULATOR, compile_source, cuda_includes

# The values of the lines of `calls`.
QUANTIZE = """samples rows channels input input_dtype gamma gamma_dtype beta norm_stride shift shift_stride groups eps
    silu x_hat x_hat_dtype affine bits granularity clip given given_count delayed packed codes scale absmax
    zero_point"""
NAMES = dict.fromkeys(("identity", "group_norm", "layer_norm", "geglu"), QUANTIZE)
NAMES["product"] = """samples h w c_in c_out out_h out_w codes scale zero_point sums weight weight_scale bias bias_dtype
    y_hat y_hat_dtype skip skip_dtype out out_dtype weight_bits code_bits geglu rows_per_scale scratch"""
NAMES["launch"] = (
    "bits splits codes codes_bit codes_map weight weight_bit weight_map high_plane sums blocks cluster early"
)
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
WINDOW = Window((3, 3), (2, 1), (1, 2), (1, 2))  # output 5 x 7 of 9 x 7


@pytest.fixture(scope="module")
def stubs(compiler, tmp_path_factory):
    folder, built = Path(torch.__file__).parent, tmp_path_factory.mktemp("stubs") / "stubs.so"
    flags = ["-shared", "-fPIC", "-Wno-unused-variable", f"-isystem{folder / 'include'}", *cuda_includes()]
    flags += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        "-Wl,--no-as-needed",
        f"-L{folder / 'lib'}",
        "-ltorch_cpu",
    ]
    flags += ["-DMODIFF_SM90=1", '-DMODIFF_SOURCES=""', '-DMODIFF_COMPILER=""']
    compile_source(compiler, EMULATOR / "stubs.cpp", built, *flags)
    torch.ops.load_library(str(built))
    return torch.ops.modiff_stubs


@pytest.fixture
def calls(stubs, monkeypatch):
    """What was called since the last time: names and values, by name where they have names."""
    monkeypatch.setattr(library, "product_op", lambda: stubs.product.default)
    monkeypatch.setattr(library, "quantize_op", lambda: stubs.quantize.default)

    def read():
        for name, *texts in map(str.split, stubs.calls().splitlines()):
            values = [*map(int, texts)]
            yield name, dict(zip(NAMES[name].split(), values, strict=True)) if name in NAMES else values

    assert [*read()] == []
    return read


def image(n, c, h, w, dtype):
    return torch.zeros(n, h, w, c, dtype=dtype).permute(0, 3, 1, 2)


def weight_of(n, k, bits, geglu=False):
    return PackedWeight(torch.zeros(n, k * bits // 8, dtype=torch.uint8), torch.ones(n), bits, geglu=geglu)


def arrived(call, **wanted):
    """A tensor as its address, None as 0."""
    values = {key: t.data_ptr() if isinstance(t, torch.Tensor) else int(t or 0) for key, t in wanted.items()}
    assert {key: call[1][key] for key in values} == values


@pytest.mark.parametrize("state", [HALF, BFLOAT, FLOAT], ids=str)
def test_products_arrive(calls, state):
    """At sm_80, which is given the call as it is: an update of a convolution, one of packed codes, a plain GEGLU."""
    codes, weight, scale = image(2, 64, 9, 7, torch.int8), weight_of(72, 576, 3), torch.ones(2)
    y_hat, skip = image(2, 72, 5, 7, state), image(2, 72, 5, 7, HALF)
    out = product(codes, scale, None, weight, y_hat, None, skip, WINDOW, BFLOAT, True, Tile(80, 64, 64, 2))
    assert (out.shape, out.dtype, out.stride()) == (y_hat.shape, BFLOAT, y_hat.stride())
    (call,) = calls()
    arrived(call, samples=2, h=9, w=7, c_in=64, c_out=72, out_h=5, out_w=7, weight_bits=3, code_bits=8, geglu=0)
    arrived(call, codes=codes, scale=scale, zero_point=None, sums=None, weight=weight.packed, bias=None, scratch=1)
    arrived(call, weight_scale=weight.scale, y_hat=y_hat, skip=skip, out=out, rows_per_scale=35)
    arrived(call, y_hat_dtype=DTYPES[state], skip_dtype=1, out_dtype=2)

    codes, weight, y_hat = torch.zeros(3, 5, 32, dtype=torch.uint8), weight_of(24, 64, 4), torch.zeros(3, 5, 24)
    assert product(codes, scale[:1], None, weight, y_hat, None, None, None, state, False).numel() == 0
    (call,) = calls()
    arrived(call, codes=codes, out=None, h=15, c_in=64, weight_bits=4, code_bits=4, rows_per_scale=15)

    codes, weight = torch.zeros(6, 64, dtype=torch.int8), weight_of(48, 64, 8, geglu=True)
    bias, zero_point = torch.ones(48, dtype=state), torch.zeros(6, dtype=torch.int32)
    given = (codes, torch.ones(6), zero_point, weight, None, bias, None, None, state, True)
    out = product(*given, Tile(80, 128, 128, 1))
    assert (out.shape, out.dtype) == ((6, 24), state)
    (call,) = calls()
    arrived(call, zero_point=zero_point, bias=bias, bias_dtype=DTYPES[state], out=out, y_hat=None, geglu=1)
    assert call[1]["sums"] not in (0, weight.packed.data_ptr())
    with pytest.raises(RuntimeError, match="no tiles of 100 x 100 outputs and 1 splits of K by the kernels of sm_80"):
        product(*given, Tile(80, 100, 100, 1))


def test_quantisations_arrive(calls):
    h, x_hat = image(2, 64, 9, 7, HALF), image(2, 64, 9, 7, BFLOAT)
    gamma, beta, shift = torch.ones(2, 64), torch.ones(2, 64), torch.ones(1, 64, dtype=HALF).expand(2, 64)
    norm = Prologue("group_norm", gamma, beta, shift, 8, 3e-6, True)
    codes, scale, absmax = quantize(h, norm, x_hat, None, 4, "per_sample", 0.9, True, packed=True)
    assert (codes.shape, codes.dtype, codes.stride()) == ((2, 32, 9, 7), torch.uint8, (2016, 1, 224, 32))
    assert (scale.shape, absmax.shape, absmax.dtype) == ((2,), (2,), FLOAT)
    (call,) = calls()
    arrived(call, samples=2, rows=63, channels=64, input=h, input_dtype=1, gamma=gamma, gamma_dtype=0, beta=beta)

    arrived(call, shift=shift, shift_stride=0, groups=8, eps=3, silu=1, x_hat=x_hat, x_hat_dtype=2, affine=0, bits=4)
    arrived(
        call, norm_stride=64, granularity=1, clip=900, given=None, packed=1, codes=codes, scale=scale, absmax=absmax
    )

    h, given, last = torch.zeros(3, 5, 128), torch.ones(1), torch.ones(15)
    codes, scale, zero_point = quantize(h, GEGLU, None, given, 8, "per_tensor", 1.0, True)
    assert (codes.shape, codes.dtype, zero_point.dtype) == ((3, 5, 64), torch.int8, torch.int32)
    quantize(h, IDENTITY, None, None, 8, "per_token", 1.0, False)
    quantize(h, Prologue("layer_norm", eps=1e-5), h, None, 8, "per_token", 1.0, True, last)
    geglu, identity, normed = calls()
    assert [name for name, _ in (call, geglu, identity, normed)] == ["group_norm", "geglu", "identity", "layer_norm"]
    arrived(
        geglu, samples=3, rows=5, channels=64, affine=1, given=given, given_count=1, zero_point=zero_point, absmax=0
    )
    arrived(normed, given=last, given_count=15, delayed=1, x_hat=h, gamma=None, shift=None, granularity=2, eps=10)


def test_a_map_is_encoded_once_for_its_tensor_and_shape(calls):
    """All arguments of the driver's functions, as it documents them: extents and strides from the innermost on, w
    before h, corners -padding and padding - (kernel - 1) * dilation. Small maps lose the bit that drivers up to 13.1
    set."""
    codes, weight = image(2, 256, 96, 8, torch.int8), weight_of(160, 2304, 8)

    def run(codes, weight=weight, window=WINDOW):
        product(codes, torch.ones(1), None, weight, None, None, None, window, FLOAT, True)
        return [*calls()]

    pixels, matrix, clear, launched = run(codes)
    rows, columns = pixels[1][15], matrix[1][7]  # of the tile
    extents = [256, 8, 96, 2, 256, 256 * 8, 256 * 8 * 96]
    assert pixels == ("im2col", [0, 4, codes.data_ptr(), *extents, -2, -1, -2, -1, 128, rows, 1, 1, 2, 1, 3, 0])
    assert matrix == ("tiled", [0, 2, weight.packed.data_ptr(), 2304, 160, 2304, 128, columns, 1, 1, 3, 0])
    arrived(launched, codes=codes, weight=weight.packed, bits=8, codes_bit=1, weight_bit=1, high_plane=0)
    assert launched[1]["splits"] > 1  # their sums are cleared
    assert run(codes) == [clear, launched]
    (name, _), _, other = run(codes.clone())
    assert name == "im2col"
    arrived(other, weight_map=launched[1]["weight_map"], codes_map=3)

    codes, weight = torch.zeros(4, 128, dtype=torch.int8), weight_of(64, 128, 3)  # both planes of three bits have a map
    _, *maps, launched = run(codes, weight, None)
    low = weight.packed.data_ptr()
    assert [(name, v[2:4], v[5]) for name, v in maps] == [("tiled", [low, 32], 48), ("tiled", [low + 32, 16], 48)]
    arrived(launched, codes=codes, weight=low, bits=3, codes_bit=0, weight_bit=0, high_plane=low + 32)

    # State and output of 2 bytes: read by tiles, written by warps.
    y_hat, weight = torch.zeros(4, 64, dtype=HALF), weight_of(64, 128, 8)
    out = product(codes, torch.ones(1), None, weight, y_hat, None, None, None, HALF, True)
    state, result = y_hat.data_ptr(), out.data_ptr()
    maps = [(v[2], *v[3:8], v[10]) for name, v in calls() if name == "tiled" and v[2] in (state, result)]
    assert maps == [(t, 128, 4, 128, 64, rows, 2) for t, rows in ((state, 128), (state, 16), (result, 16))]


def test_a_product_begins_before_the_end_of_the_quantiser(calls):
    """Where its weight has rested since a call before and no memset stands between; in clusters, too."""

    def early(rows, k, n, weight):
        codes, y_hat = torch.zeros(rows, k, dtype=torch.int8), torch.zeros(rows, n)
        product(codes, torch.ones(1), None, weight, y_hat, None, None, None, HALF, False)
        names, launched = zip(*calls())
        return [names.count("clear"), *(launched[-1][key] for key in ("splits", "blocks", "cluster", "early"))]

    weight = weight_of(1280, 1280, 8)
    assert early(4096, 1280, 1280, weight) == [0, 1, 128, 2, 0]  # its first call
    assert early(4096, 1280, 1280, weight) == early(4096, 1280, 1280, weight) == [0, 1, 128, 2, 1]
    moved = weight._replace(packed=torch.zeros(1280 * 1280 + 1, dtype=torch.uint8)[1:].view(1280, 1280))
    assert [early(4096, 1280, 1280, moved)[-1] for _ in range(3)] == [0, 0, 0]  # a copy is made at each call
    wide, tall = weight_of(1280, 11520, 8), weight_of(64, 11520, 8)
    assert [early(2048, 11520, 1280, wide)[1:] for _ in range(2)] == [[2, 128, 2, 0], [2, 128, 2, 1]]
    assert [early(64, 11520, 64, tall)[::4] for _ in range(2)] == [[1, 0], [1, 0]]
