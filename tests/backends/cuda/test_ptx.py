"""Calls of the backend cuda from Python to compiled PTX: the binding, the launchers and what they tell CUDA and its
driver, and the kernels with the order of operands in their asm, executed by ptx.py on tensors of the CPU. Small cases
of every family: what else there is to the kernels is asked of their emulation, which is faster and unkind."""

import ctypes
import itertools
import random
import re
import struct
from functools import partial

import pytest
import torch

from modiff_kernels.backends import reference
from modiff_kernels.backends.cuda import library
from modiff_kernels.backends.cuda.product_launch import Tile, product
from modiff_kernels.backends.cuda.quantize_launch import quantize
from modiff_kernels.quant.operands import IDENTITY, PackedWeight, Window
from tests.backends.cuda.emulation import compile_launches, pack_channels
from tests.backends.cuda.ptx import Launch
from tests.backends.cuda.test_product_sm90 import Case
from tests.backends.cuda.test_product_sm90 import Launch as Emulated
from tests.backends.exact_product import DOWN, THREE, ExactProduct
from tests.contract import cases, test_product
from tests.contract.test_quantize import check_plain, check_prologue, check_residual
from tests.places import Place

HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32
SM90, SMALL_SM90, SM80 = range(3)  # devices of emulator/stubs.cpp, the second one of two multiprocessors


class Device:
    """Behind the stubs of CUDA. `told`: what the driver is told of maps, and of launches how the arguments begin, and
    whether they may begin before the end of the kernel before."""

    def __init__(self, path):
        torch.ops.load_library(str(path))
        stubs = ctypes.CDLL(str(path))
        parts = path.read_bytes().split(b".visible .entry ")[1:]
        self.entries = {re.match(rb"\w+", part)[0].decode(): part.split(b"\0")[0].decode() for part in parts}
        self.maps, self.number = [], ctypes.c_int.in_dll(stubs, "modiff_device")
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64))(self.tell)
        ctypes.c_void_p.in_dll(stubs, "told").value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def tell(self, name, values):
        try:
            if name in (b"tiled", b"im2col"):
                self.maps.append(values[:23])
                self.told.append(values[:23])
                return len(self.maps) - 1
            self.told.append((*struct.unpack("48q", ctypes.string_at(values[4], 384)), values[5]))
            if self.executes:
                Launch(self.mutated(self.entries[name.decode()]), *values[:5], self.maps).run()
        except BaseException as error:  # nothing that is raised here comes through the library
            self.error = error
            return 1
        return 0

    def op(self, name, *arguments):
        try:
            return getattr(torch.ops.modiff_stubs, name).default(*arguments)
        except RuntimeError as error:
            raise self.error or error from None


@pytest.fixture(scope="module")
def loaded(compiled, compiler):
    if not (path := compiled / "launches.so").exists():
        compile_launches(compiler, path)
    return Device(path)


@pytest.fixture
def device(loaded, poisoned_empty):
    loaded.told, loaded.error, loaded.executes, loaded.mutated = [], None, True, lambda entry: entry
    loaded.number.value = SM90
    ops = {(library, f"{name}_op"): lambda name=name: partial(loaded.op, name) for name in ("quantize", "product")}
    with Place("ptx", "cuda", stand_in="ptx", raises=False, few=True).entered(lambda _: ops) as loaded.place:
        yield loaded


def identity(device):
    x, x_hat = cases.activation((2, 33, 64), HALF), cases.activation((2, 33, 64), BFLOAT)
    for granularity in ("per_tensor", "per_token", "per_block"):
        check_residual(device.place, x, x_hat, None, 4, granularity, 0.7)
    check_residual(device.place, x, x_hat, torch.full((1,), 0.3), 8)
    check_plain(device.place, cases.activation((1, 5, 63), HALF) + 1, 8, "per_sample", True)
    for bits, shape in itertools.product((4, 3), ((2, 35, 64), (2, 9, 33), (2, 40, 5, 7))):
        h, given = cases.activation(shape, HALF), (None, bits, "per_sample", 1.0, True)
        states = [torch.zeros_like(h, dtype=BFLOAT) for _ in range(2)]
        plain, packed = (quantize(h, IDENTITY, of, *given, packed=of is states[1]) for of in states)
        assert torch.equal(packed[0], pack_channels(plain[0], bits))
        assert torch.equal(*states)
    last = torch.rand(66).repeat(2, 1)
    found = device.place.quantize(x, IDENTITY, x_hat.clone(), None, 8, "per_token", last_absmax=last[0])
    wanted = reference.quantize(x, IDENTITY, x_hat, None, 8, "per_token", 1.0, True, last[1])
    assert all(map(torch.equal, found, wanted))


def prologue(make, state, device):
    given = make()
    x_hat = (given.x + 0.2 * torch.randn_like(given.x)).to(state)
    x_hat = x_hat.contiguous(memory_format=cases.memory_format(x_hat.shape))
    for granularity in ("per_sample", "per_token"):
        check_prologue(device.place, given, x_hat.clone(), None, 4, granularity, 0.8)


def sm80(bits, code_bits, device):
    device.number.value = SM80
    pack = (lambda codes: pack_channels(codes, 4)) if code_bits == 4 else None
    for x, n, window, *tile in (((5, 320), 33, None, 64, 64, 2), ((2, 32, 9, 7), 72, DOWN, 128, 64, 1)):
        ExactProduct(x, n, window, bits, code_bits).check(product, pack, tile=Tile(80, *tile))


def epilogues(device):
    """Scales, states, skips, biases, zero points and dtypes, as the binding and common/epilogue.h have them."""
    device.number.value = SM80
    test_product.test_geglu_of_pairs_of_columns(device.place)
    for case in test_product.SMALL * 3:
        test_product.check_floats(device.place, case, random.choice)


def sm90(bits, device):
    """Boxes of matrices and of pixels, for one block or a cluster, half k-blocks, persistent blocks; sums of a cluster
    and in memory."""
    device.number.value = SMALL_SM90
    for splits in (2, 3):
        ExactProduct((2, 128, 9, 7), 72, THREE, bits).check(product, tile=Tile(90, 128, 64, splits))
    for case, splits in (
        (Case(1, 129, 1, 128, 72, bits=bits, granules=129), 1),
        (Case(2, 9, 7, 128 if bits == 3 else 64, 104, DOWN, bits, out=BFLOAT, bias=FLOAT, zero_point=True), 1),
        (Case(1, 9, 7, 256, 72, bits=bits, state=BFLOAT, out=BFLOAT), 2),
    ):
        close = partial(torch.allclose, rtol=2**-7, atol=1e-5)  # the compiler fuses multiplications and additions
        case.check(device, Emulated(), with_state=case.zero_point is None, same=close, tile=Tile(90, 128, 64, splits))


# What is run, and of which instruction two names are exchanged to see that it fails, counted from the result on.
FAMILIES = {
    "identity": (identity, "sub.rn.f32", 1, 2),
    "layer norm": (partial(prologue, lambda: cases.layer_norm((3, 5, 64), BFLOAT), FLOAT), "sub.rn.f32", 1, 2),
    "group norm": (partial(prologue, lambda: cases.group_norm((2, 96, 5, 7), 8, HALF), HALF), "fma.rn.f32", 1, 3),
    "GEGLU": (partial(prologue, lambda: cases.geglu((3, 5, 63)), HALF), "fma.rn.f32", 1, 3),
    "sm_80 bytes": (partial(sm80, 8, 8), "mma.sync", 4, 5),
    "sm_80 unpacked": (partial(sm80, 3, 8), "ldmatrix", 0, 1),
    "sm_80 nibbles": (partial(sm80, 4, 4), "mma.sync", 8, 9),
    "sm_80 epilogues": (epilogues, "fma.rn.f32", 1, 3),
    "sm_90 bytes": (partial(sm90, 8), "wgmma.mma_async", 32, 33),
    "sm_90 4 bits": (partial(sm90, 4), "stmatrix", 1, 2),
    "sm_90 3 bits": (partial(sm90, 3), "cp.async.bulk.tensor.4d", 6, 7),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_kernels(device, family):
    def exchange(found):
        parts = re.split(r"(%?\w+)", found[2])
        parts[first], parts[second] = parts[second], parts[first]
        return found[1] + "".join(parts)

    run, instruction, *names = FAMILIES[family]
    run(device)
    first, second = (2 * name + 1 for name in names)
    device.mutated = lambda entry: re.sub(rf"(\b{re.escape(instruction)}\S* )([^;]*)", exchange, entry)
    with pytest.raises((AssertionError, RuntimeError)):
        run(device)


def test_an_unknown_instruction_is_named(device):
    device.mutated = lambda entry: re.sub("ret;", "nanosleep.u32 7;\nret;", entry)
    with pytest.raises(NotImplementedError, match=r"nanosleep\.u32 7"):
        FAMILIES["sm_80 bytes"][0](device)


def test_tiles_that_are_not_there(device):
    with pytest.raises(RuntimeError, match="no tiles of 100 x 100 outputs and 1 splits of K by the kernels of sm_80"):
        ExactProduct((6, 64), 48).check(product, tile=Tile(80, 100, 100, 1))


def test_a_map_is_encoded_once_for_its_tensor_and_shape(device):
    """All arguments of the driver's functions, as it documents them: extents and strides from the innermost on, w
    before h, corners -padding and padding - (kernel - 1) * dilation. Small maps lose the bit that drivers up to 13.1
    set (ptx.py)."""
    device.executes = False
    codes, window = torch.zeros(2, 96, 8, 256, dtype=torch.int8), Window((3, 3), (2, 1), (1, 2), (1, 2))
    weight = PackedWeight(torch.zeros(160, 2304, dtype=torch.uint8), torch.ones(160), 8)

    def run(nhwc):
        device.told.clear()
        given = nhwc.permute(0, 3, 1, 2), torch.ones(1), None, weight, None, None, None, window, FLOAT, True
        product(*given, Tile(90, 128, 64, 2))
        return [list(told) for told in device.told]

    pixels, matrix, launched = run(codes)
    extents, corners = [256, 8, 96, 2, 256, 256 * 8, 256 * 8 * 96], [-2, -1, -2, -1]
    assert pixels == [0, 4, codes.data_ptr(), *extents, 128, 128, *corners, 1, 1, 2, 1, 0, 3, 0]
    extents = [2304, 160, 0, 0, 2304, 0, 0]
    assert matrix == [0, 2, weight.packed.data_ptr(), *extents, 128, 64, 0, 0, 0, 0, 1, 1, 1, 1, 0, 3, 0]
    assert launched[1] == launched[17] == 1 << 21
    assert [told[:-1] for told in run(codes)] == [launched[:-1]]
    _, other = run(codes.clone())
    assert (other[0], other[16]) == (launched[0] + 2, launched[16])


def test_a_product_begins_before_the_end_of_the_quantiser(device):
    """Where its weight has rested since a call before, and no memset stands between."""
    device.executes = False

    def early(rows, splits=1):
        codes, weight = torch.zeros(4, 1280, dtype=torch.int8), PackedWeight(rows, torch.ones(64), 8)
        product(codes, torch.ones(1), None, weight, None, None, None, None, HALF, True, Tile(90, 128, 64, splits))
        return device.told[-1][-1]

    rows, moved = torch.zeros(64, 1280, dtype=torch.uint8), torch.zeros(64 * 1280 + 1, dtype=torch.uint8)[1:]
    assert [early(rows), early(rows), early(rows), early(rows, 2), early(rows, 3)] == [0, 1, 1, 1, 0]
    assert [early(moved.view(64, 1280)) for _ in range(3)] == [0, 0, 0]  # a copy is made at each call
