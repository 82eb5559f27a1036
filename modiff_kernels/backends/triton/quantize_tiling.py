"""How a tensor is shared out among the programs of the quantising kernels (quantize_kernel.py). Plain Python."""

from functools import lru_cache
from typing import Any, NamedTuple

from ...quant.spec import BLOCK_ROWS, block_count

MAX_ROW = 8192  # 16 float32 values per thread of 16 warps, of two inputs (GEGLU) and x_hat at the same time
_TILE_BYTES = 8192  # of h or x_hat, the wider: four 16-byte loads per thread of 4 warps in flight, below 150 registers
_LEAST_TILE = 1024  # elements: 8 per thread, which is one 16-byte load of a 2-byte tensor
_SECTOR_BYTES = 32  # read and written as one
_MOST_IN_REGISTERS, _MOST_READERS = 1 << 13, 4  # values, 32 in a thread of 8 warps; programs that share rows of a group
_ENOUGH_PROGRAMS = 264  # two per SM of an H100


def why_not(problem: Any) -> str | None:
    if problem.k <= MAX_ROW or not (problem.granularity == "per_token" or problem.prologue == "layer_norm"):
        return None
    return f"{problem.k} channels: rows are held in registers, of at most {MAX_ROW} channels"


class Tiling(NamedTuple):
    """Samples, rows, channels and granularity as the kernels see them, and the tile [block_r, block_c] of a program."""

    samples: int
    rows: int
    channels: int
    granularity: str
    granules: int
    block_r: int
    block_c: int
    num_warps: int
    width: int = 0  # of whole groups of channels in a tile, or 0
    groups: int = 0

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (self.samples * -(-self.rows // self.block_r) * -(-self.channels // self.columns),)

    @property
    def columns(self) -> int:
        """Channels of a tile."""
        return self.width * self.groups or self.block_c


@lru_cache(maxsize=4096)
def tiling(
    samples: int, rows: int, channels: int, granularity: str, bits: int, prologue: str, bytes_read: int
) -> Tiling:  # fmt: skip
    """The tiling of [samples, rows, channels]. Where nothing depends on samples, one with all rows tiles better."""
    if granularity == "per_block" and block_count(rows, bits) == 0:
        granularity = "per_sample"  # without multipliers
    if granularity == "per_sample" and rows == 1 and channels <= MAX_ROW:
        granularity = "per_token"
    granules = {"per_tensor": 1, "per_token": samples * rows}.get(granularity, samples)
    if granularity in ("per_tensor", "per_token") and prologue != "group_norm":
        samples, rows = 1, samples * rows
    whole_rows = granularity == "per_token" or prologue == "layer_norm"
    blocks = tile(samples, rows, channels, whole_rows, bytes_read, granularity == "per_block")
    return Tiling(samples, rows, channels, granularity, granules, *blocks)


@lru_cache(maxsize=4096)
def tiling_by_groups(tiling: Tiling, num_groups: int, bytes_read: int) -> Tiling:
    """That of a group norm whose programs find the statistics of their groups themselves; `tiling` where these are too
    large. Enough groups for a sector of 32 bytes; four programs at most share the rows of a group, for each reads them
    all, from the L2 cache."""
    width = tiling.channels // num_groups
    groups = 1
    while groups * width * bytes_read < _SECTOR_BYTES and num_groups % (2 * groups) == 0:
        groups *= 2
    block_c = groups * next_power_of_2(width)
    block_r = min(next_power_of_2(tiling.rows), _MOST_IN_REGISTERS // block_c)
    if block_r * _MOST_READERS < tiling.rows or groups * width * bytes_read < _SECTOR_BYTES:
        return tiling
    num_warps = max(4, block_r * block_c // 1024)
    return tiling._replace(block_r=block_r, block_c=block_c, num_warps=num_warps, width=width, groups=groups)


@lru_cache(maxsize=4096)
def tile(
    samples: int, rows: int, channels: int, whole_rows: bool, bytes_read: int, per_block: bool = False
) -> tuple[int, int, int]:
    """BLOCK_R, BLOCK_C, num_warps: _TILE_BYTES at `bytes_read` per element, less where that leaves SMs idle. per_block:
    the rows of one block (a part where rows are whole, which fills more registers), else with as many warps as leave 16
    elements to a thread."""
    most = _TILE_BYTES // bytes_read
    block_c = _channel_block(channels, whole_rows)
    if per_block and not whole_rows:
        block_c = min(block_c, most // BLOCK_ROWS)
        return BLOCK_ROWS, block_c, max(1, BLOCK_ROWS * block_c // 512)
    block_r = max(1, min(most // block_c, BLOCK_ROWS if per_block else next_power_of_2(rows)))
    columns, enough = samples * -(-channels // block_c), 0 if per_block else _ENOUGH_PROGRAMS
    while block_r > 1 and block_r * block_c > _LEAST_TILE and columns * -(-rows // block_r) < enough:
        block_r //= 2
    return block_r, block_c, min(16, max(4, 4 * block_r * block_c // most))


def _channel_block(channels: int, whole_rows: bool) -> int:
    """Without a remainder where a power of two from 32 on divides channels: no lane is masked, and segments of rows are
    whole sectors of 32 bytes, also in the codes."""
    if whole_rows:
        return next_power_of_2(channels)
    divisor = channels & -channels
    return min(divisor, 256) if divisor >= 32 else min(next_power_of_2(channels), 128)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()
