"""Whole calls of the backend cuda from Python to compiled PTX: the binding, the launchers and what they tell CUDA and
its driver, and the kernels with the order of operands in their asm, executed by ptx.py on tensors of the CPU. One small
case per family; everything else about the kernels is asked of their emulation, which is fast and unkind."""

import ctypes
import random
import re
import struct

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
SM90, TWO, SM80 = range(3)  # devices of emulator/stubs.cpp; TWO: sm_90 with two multiprocessors


class Device:
    """What the stubs of CUDA stand for. `calls`: what the driver was told of maps, and the first words of arguments."""

    def __init__(self, path):
        torch.ops.load_library(str(path))
        self.stubs, self.ops = ctypes.CDLL(str(path)), torch.ops.modiff_stubs
        parts = path.read_bytes().split(b".visible .entry ")[1:]
        texts = [part.split(b"\0")[0].decode() for part in parts]
        self.entries = {re.match(r"\w+", text)[0]: text for text in texts}
        told = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64))
        self.told = told(self.tell)
        ctypes.c_void_p.in_dll(self.stubs, "told").value = ctypes.cast(self.told, ctypes.c_void_p).value
        self.maps, self.number = [], ctypes.c_int.in_dll(self.stubs, "modiff_device")
        self.reset()

    def reset(self):
        self.calls, self.number.value, self.mutated = [], SM90, lambda entry: entry
        self.error, self.executes = None, True

    def tell(self, name, values):
        try:
            return self.answer(name.decode(), values)
        except BaseException as error:
            self.error = error
            return 1

    def answer(self, name, values):
        if name in ("tiled", "im2col"):
            self.maps.append(values[:23])
            self.calls.append(self.maps[-1])
            return len(self.maps) - 1
        if name in self.entries:
            *shape, argument, others = values[:6]
            assert others == 1, "a grid or blocks of more dimensions"
            self.calls.append(struct.unpack("48q", ctypes.string_at(argument, 384)))
            if self.executes:
                Launch(self.mutated(self.entries[name]), *shape, argument, self.maps).run()
        return 0

    def op(self, name):
        def call(*arguments):
            try:
                return getattr(self.ops, name).default(*arguments)
            except RuntimeError as error:
                raise self.error or error from None

        return call


@pytest.fixture(scope="module")
def loaded(compiled, compiler):
    path = compiled / "launches.so"
    if not path.exists():
        compile_launches(compiler, path)
    return Device(path)


@pytest.fixture
def device(loaded, monkeypatch, poisoned_empty):
    loaded.reset()
    for name in ("quantize", "product"):
        monkeypatch.setattr(library, f"{name}_op", lambda name=name: loaded.op(name))
    return loaded


def entered():
    return Place("ptx", "cuda", stand_in="ptx", raises=False, few=True).entered(lambda _: {})


def quantizing(check):
    """`check` of a place, where ops/check.py and the dispatcher take part."""

    def run(device):
        with entered() as place:
            check(place)

    return run


def identity(place):
    x, x_hat = cases.activation((2, 33, 64), HALF), cases.activation((2, 33, 64), BFLOAT)
    for granularity in ("per_tensor", "per_sample", "per_token", "per_block"):
        check_residual(place, x, x_hat, None, 4, granularity, 0.7)
    check_residual(place, x, x_hat, torch.full((1,), 0.3), 8)
    check_plain(place, cases.activation((1, 5, 63), HALF) + 1, 8, "per_sample", True)
    for bits in (4, 3):
        plain, packed = (quantize(x, IDENTITY, x_hat.clone(), None, bits, "per_sample", 1.0, True, packed=packed)[0]
                         for packed in (False, True))  # fmt: skip
        assert torch.equal(packed, pack_channels(plain, bits))
    last = torch.rand(66).repeat(2, 1)
    found = place.quantize(x, IDENTITY, x_hat.clone(), None, 8, "per_token", last_absmax=last[0])
    assert all(
        map(torch.equal, found, reference.quantize(x, IDENTITY, x_hat, None, 8, "per_token", 1.0, True, last[1]))
    )


def prologue(make, state):
    def check(place):
        given = make()
        x_hat = (given.x + 0.2 * torch.randn_like(given.x)).to(state)
        x_hat = x_hat.contiguous(memory_format=cases.memory_format(x_hat.shape))
        for granularity in ("per_sample", "per_token"):
            check_prologue(place, given, x_hat.clone(), None, 4, granularity, 0.8)

    return quantizing(check)


def sm80(bits, code_bits=8):
    """Matrices in splits of K, convolutions; beyond the smallest tile one other."""

    def run(device):
        device.number.value = SM80
        pack = (lambda codes: pack_channels(codes, 4)) if code_bits == 4 else None
        for x, n, window, *tile in (((5, 320), 33, None, 64, 64, 2), ((2, 32, 9, 7), 72, DOWN, 128, 64, 1)):
            ExactProduct(x, n, window, bits, code_bits).check(product, pack, tile=Tile(80, *tile))

    return run


def epilogues(device):
    """Scales, states, skips, biases, zero points and dtypes of the binding and of common/epilogue.h, by chance."""
    device.number.value = SM80
    with entered() as place:
        test_product.test_geglu_of_pairs_of_columns(place)
        draw = random.Random(0).choice
        for case in test_product.SMALL * 3:
            test_product.check_floats(place, case, draw)


def close(found, wanted):
    """The compiler fuses multiplications and additions of floats."""
    return torch.allclose(found.float(), wanted.float(), torch.finfo(found.dtype).eps, 1e-5)


def sm90(bits):
    """Boxes of matrices and of pixels, half k-blocks, persistent blocks; sums of a cluster and in memory."""

    def run(device):
        device.number.value = TWO
        for splits in (2, 3):
            ExactProduct((2, 128, 9, 7), 72, THREE, bits).check(product, tile=Tile(90, 128, 64, splits))
        for case, splits in (
            (Case(1, 129, 1, 128, 72, bits=bits, granules=129), 1),
            (Case(2, 9, 7, 128 if bits == 3 else 64, 136, DOWN, bits, out=BFLOAT, bias=FLOAT, zero_point=True), 1),
            (Case(1, 9, 7, 256, 72, bits=bits, state=BFLOAT, out=BFLOAT), 2),
        ):
            plain = case.zero_point is not None
            case.check(device, Emulated(), not plain, same=close, tile=Tile(90, 128, 64, splits))

    return run


FAMILIES = {
    "identity": quantizing(identity),
    "layer norm": prologue(lambda: cases.layer_norm((3, 5, 64), BFLOAT), FLOAT),
    "group norm": prologue(lambda: cases.group_norm((2, 96, 5, 7), 8, HALF), HALF),
    "GEGLU": prologue(lambda: cases.geglu((3, 5, 63)), HALF),
    "sm_80 bytes": sm80(8),
    "sm_80 unpacked": sm80(3),
    "sm_80 nibbles": sm80(4, 4),
    "epilogues": epilogues,
    "sm_90 bytes": sm90(8),
    "sm_90 4 bits": sm90(4),
    "sm_90 3 bits": sm90(3),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_kernels(device, family):
    FAMILIES[family](device)


# Family, instruction, and which two of its names are exchanged, the result being 0.
EXCHANGED = [
    *((family, "sub.rn.f32", 1, 2) for family in ("identity", "layer norm", "group norm", "GEGLU")),
    ("sm_80 bytes", "mma.sync", 4, 5),
    ("sm_80 nibbles", "mma.sync", 8, 9),
    ("sm_80 unpacked", "ldmatrix", 0, 1),
    ("epilogues", "fma.rn.f32", 1, 3),
    ("sm_90 bytes", "wgmma.mma_async", 32, 33),
    ("sm_90 bytes", "cp.async.bulk.tensor.2d.shared", 2, 3),
    ("sm_90 bytes", "cp.async.bulk.tensor.4d", 6, 7),
    ("sm_90 bytes", "cp.async.bulk.tensor.2d.global", 1, 2),
    ("sm_90 bytes", "st.async", 1, 2),
    ("sm_90 4 bits", "stmatrix", 1, 2),
    ("sm_90 3 bits", "prmt.b32", 1, 2),
]


@pytest.mark.parametrize(("family", "instruction", "first", "second"), EXCHANGED)
def test_exchanged_operands_are_found(device, family, instruction, first, second):
    def exchange(found):
        parts = re.split(r"(%?\w+)", found[2])
        parts[2 * first + 1], parts[2 * second + 1] = parts[2 * second + 1], parts[2 * first + 1]
        return found[1] + "".join(parts)

    device.mutated = lambda entry: re.sub(rf"(\b{re.escape(instruction)}\S* )([^;]*)", exchange, entry)
    with pytest.raises((AssertionError, RuntimeError, IndexError, KeyError)):
        FAMILIES[family](device)


def test_an_unknown_instruction_is_named(device):
    device.mutated = lambda entry: re.sub("ret;", "nanosleep.u32 7;\nret;", entry)
    with pytest.raises(NotImplementedError, match=r"nanosleep\.u32 7"):
        FAMILIES["sm_80 bytes"](device)


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
        device.calls.clear()
        given = nhwc.permute(0, 3, 1, 2), torch.ones(1), None, weight, None, None, None, window, FLOAT, True
        product(*given, Tile(90, 128, 64, 2))
        return [list(call) for call in device.calls]

    pixels, matrix, launched = run(codes)
    extents, corners = [256, 8, 96, 2, 256, 256 * 8, 256 * 8 * 96], [-2, -1, -2, -1]
    assert pixels == [0, 4, codes.data_ptr(), *extents, 128, 128, *corners, 1, 1, 2, 1, 0, 3, 0]
    extents = [2304, 160, 0, 0, 2304, 0, 0]
    assert matrix == [0, 2, weight.packed.data_ptr(), *extents, 128, 64, 0, 0, 0, 0, 1, 1, 1, 1, 0, 3, 0]
    assert launched[1] == launched[17] == 1 << 21
    assert run(codes) == [launched]
    _, other = run(codes.clone())
    assert (other[0], other[16]) == (launched[0] + 2, launched[16])
