"""The PTX that unpacks weights, which the interpreter cannot run: its instructions one by one on every byte."""

import re

import numpy as np
import pytest

from modiff_kernels.backends.triton import weight_tiles

OPERATIONS = {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor}
OPERATIONS |= {"shl.b32": np.left_shift, "shr.u32": np.right_shift, "sub.u32": np.subtract}
INSTRUCTION = re.compile(r"(\S+) \$(\d+), (\S+), (\S+)")


def execute(ptx, outputs, *inputs):
    """Registers $0 .. of `ptx` as bytes [outputs, ...]; `inputs` (uint8) stand in the registers after the outputs."""
    registers = {outputs + i: np.ascontiguousarray(values).view(np.uint32) for i, values in enumerate(inputs)}

    def value(text):
        return registers[int(text[1:])] if text.startswith("$") else np.uint32(int(text))

    for line in filter(None, (part.strip() for part in ptx.split(";"))):
        name, target, left, right = INSTRUCTION.fullmatch(line).groups()
        assert int(target) < outputs, "inputs are not written"
        registers[int(target)] = OPERATIONS[name](value(left), value(right))
    return np.stack([registers[i].view(np.uint8) for i in range(outputs)])


BYTES = np.arange(256, dtype=np.uint8)
NEIGHBOURS = [BYTES, BYTES[::-1], np.random.default_rng(0).permutation(BYTES)]  # what else is in the register


@pytest.mark.parametrize("packed", NEIGHBOURS)
def test_nibbles(packed):
    codes = execute(weight_tiles.NIBBLES_PTX.value, 2, packed).view(np.int8)
    for i, part in enumerate((packed & 15, packed >> 4)):
        signed = part.astype(np.int16)
        assert (codes[i] == np.where(signed > 7, signed - 16, signed)).all()


@pytest.mark.parametrize("packed", NEIGHBOURS)
@pytest.mark.parametrize(("ptx", "bits"), [(weight_tiles.PAIRS_PTX.value, 2), (weight_tiles.BITS_PTX.value, 1)])
def test_fields(ptx, bits, packed):
    fields = execute(ptx, 8 // bits, packed)
    for i in range(8 // bits):
        assert (fields[i] == (packed >> (i * bits)) % (1 << bits)).all()


def test_three_bits():
    low, high = (part.ravel() for part in np.meshgrid(np.arange(4, dtype=np.uint8), np.arange(2, dtype=np.uint8)))
    codes = execute(weight_tiles.THREE_BITS_PTX.value, 1, low, high).view(np.int8)
    assert (codes[0] == low.astype(int) + 4 * high.astype(int) - 4).all()
