"""What the formats allow: bit widths, code ranges, granularities and their number of scales.

A *granule* is the set of elements that share one scale, in memory order (row major for the input of a Linear, NHWC for
an image) one consecutive block: with per_tensor the whole tensor, batch included; with per_sample everything at one
index of dimension 0; with per_token one row of a Linear input, or one pixel. per_block is per_sample with an integer
multiplier on top for every block of 16 consecutive rows of one channel of one sample: a code of few bits times its
multiplier still fits int8, so an integer product takes it without knowing (`affine.block_multipliers`)."""

from collections.abc import Sequence
from math import prod

BITS = (3, 4, 8)  # of weights
ACT_BITS = (3, 4, 7, 8)
GRANULARITIES = ("per_tensor", "per_sample", "per_token", "per_block")
GRANULARITY_VALUE = {name: value for value, name in enumerate(GRANULARITIES)}  # csrc/common/problem.h
BLOCK_ROWS = 16  # rows (pixels) of a per_block block; the last one of a sample takes the rest, up to 31


def quant_min(bits: int) -> int:
    """Smallest code of a signed `bits`-bit integer: -2^(bits-1)."""
    return -(1 << (bits - 1))


def quant_max(bits: int) -> int:
    """Largest code of a signed `bits`-bit integer: 2^(bits-1) - 1."""
    return (1 << (bits - 1)) - 1


def check_bits(where: str, name: str, bits: int, allowed: Sequence[int] = BITS) -> None:
    if bits not in allowed or isinstance(bits, bool):
        raise ValueError(f"{where}: {name}={bits!r} is not supported; choose one of {', '.join(map(str, allowed))}")


def check_group_size(where: str, group_size: int) -> None:
    """Raise ValueError unless `group_size` is -1 (one scale per output channel) or a positive number."""
    is_integer = hasattr(group_size, "__index__") and not isinstance(group_size, bool)  # symbolic while compiling
    if not is_integer or (group_size != -1 and group_size < 1):
        allowed = "-1 (one scale per output channel) or a positive number of elements along K"
        raise ValueError(f"{where}: group_size={group_size!r} is not allowed; give {allowed}")


def group_count(k: int, group_size: int) -> int:
    """Number of weight scales per output channel: 1 for group_size -1, else ceil(k / group_size)."""
    return 1 if group_size == -1 else -(-k // group_size)


def row_count(shape: Sequence[int], image: bool) -> int:
    """Rows of a Linear input [..., K] or pixels of an image [N, C, H, W]."""
    return shape[0] * shape[2] * shape[3] if image else prod(shape[:-1])


def block_count(rows: int, bits: int) -> int:
    """Blocks of a sample of `rows` rows at per_block; 0 (8-bit codes leave no room, or too few rows): per_sample."""
    return 0 if bits == 8 else rows // BLOCK_ROWS


def granule_count(shape: Sequence[int], granularity: str, image: bool) -> int:
    """Number of scales of a tensor of `shape` at `granularity` (see the top of this module)."""
    if granularity == "per_token":
        return row_count(shape, image)
    return 1 if granularity == "per_tensor" else shape[0]
