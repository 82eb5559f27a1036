"""Which tile a product gets: candidates with their reasons, and a model that ranks them."""

from functools import cache, lru_cache
from typing import NamedTuple

import torch


class TileConfig(NamedTuple):
    """Output tile, k-block, and how a program runs; split_k > 1 shares out K between programs."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k}-w{self.num_warps}-s{self.num_stages}-k{self.split_k}"


class Shape(NamedTuple):
    """What the choice depends on. channels: summed per tap; taps: kernel_h * kernel_w; n: all groups together."""

    m: int
    n: int
    channels: int
    taps: int = 1
    groups: int = 1
    weight_bits: int = 8
    group_size: int = -1

    def __str__(self) -> str:
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


class Gpu(NamedTuple):
    """What the choice depends on of a device."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int


INTERPRETED_GPU = Gpu("interpreter", (9, 0), 4)  # what Triton's interpreter, which runs on the CPU, stands for


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED_GPU
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


WGMMA = (9, 0)
# Warp-group products (sm_90) are 64 rows per four warps and read both operands from shared memory, so deep K steps are
# free in registers. The accumulator is int32: 128x128 over 8 warps is 64 registers a thread; over 4 warps, or as
# 128x256 over 8, it is 128 and the epilogue spills.
_WGMMA_TILES = (
    TileConfig(128, 128, 128, 8, 4),  # 128 KiB: highest reuse that does not spill; K divisible by 128
    TileConfig(128, 128, 64, 8, 4),  # the same for channels that are odd multiples of 64 (320, 960)
    TileConfig(128, 64, 128, 4, 4),  # 320 columns are 5 tiles of 64 and 3 of 128; one warp group per 64 rows
    TileConfig(128, 64, 64, 4, 4),
    TileConfig(64, 128, 128, 8, 4),  # few rows (8x8 level): twice the programs; two warp groups share the columns
    TileConfig(64, 64, 128, 4, 4),  # fewest products per program that one warp group can do
    TileConfig(64, 64, 64, 4, 4),
    TileConfig(64, 64, 32, 4, 4),  # weight groups of 32, and channels that pad 64 badly
)
# mma.sync (sm_80, 86, 89, and newer GPUs; sm_100 makes tcgen05 of the same tiles) holds both operands in registers as
# well: a K step of 64 bounds them. Four stages of 128x64 are 48 KiB: two programs fit the 99 KiB of sm_86 and sm_89.
_MMA_TILES = (
    TileConfig(128, 128, 64, 8, 3),
    TileConfig(128, 64, 64, 4, 4),
    TileConfig(64, 64, 64, 4, 4),
    TileConfig(64, 64, 32, 4, 4),
)
_MOST_GROUPED_SUMS = 128 * 64
# What a program may use; the candidates are checked against it, compiled ones too (tools/aot_triton.py).
SHARED_MEMORY_BYTES = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 7): 163 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}


def candidates(capability: tuple[int, int]) -> tuple[TileConfig, ...]:
    """Tiles without split that a device of this compute capability may get."""
    return _WGMMA_TILES if capability == WGMMA else _MMA_TILES


def fits(config: TileConfig, shape: Shape) -> bool:
    """Whether `config` computes `shape`: a K step must stay inside one group of weight scales, and a tile must hold the
    sums of a group beside those of all, which 128x128 cannot without spilling."""
    if shape.group_size == -1:
        return True
    if config.block_m * config.block_n > _MOST_GROUPED_SUMS:
        return False
    whole_steps = shape.taps == 1 or shape.channels % config.block_k == 0
    return shape.group_size % config.block_k == 0 and whole_steps


def resident(config: TileConfig, capability: tuple[int, int]) -> int:
    """Programs that a multiprocessor holds at once: by shared memory, and by the registers of compiled forms, which are
    two for every sum of a thread and 32 more (tools/aot_triton.py), of 65536."""
    threads = 32 * config.num_warps
    registers = 65536 // (threads * min(32 + 2 * config.block_m * config.block_n // threads, 255))
    staged = (config.block_m + config.block_n) * config.block_k * config.num_stages
    return max(min(registers, SHARED_MEMORY_BYTES.get(capability, 99 << 10) // staged, 2048 // threads), 1)


# Cycles of one multiprocessor, from published peaks: products per cycle, bytes per cycle from the L2 cache, and per
# K step its instructions, and with wgmma the wait until its products are done: no int8 dot of Triton is asynchronous,
# and only other programs fill that gap. They rank tiles; they are no measurement.
_PRODUCTS_PER_CYCLE = {True: 4096, False: 2048}
_L2_BYTES_PER_CYCLE = 48
_STEP_CYCLES = 40
_WAIT_CYCLES = {True: 110, False: 0}
_PROGRAM_CYCLES = 1500
_STATE_BYTES = 6  # y_hat read and written, out written, 2 bytes each
_LAUNCH_CYCLES = 4000  # of a second kernel, about 2 us
_MEMORY_BYTES_PER_CYCLE = 1500  # of the whole device
_LEAST_STEPS = 4  # per split: the pipeline has to fill


def estimated_cycles(config: TileConfig, shape: Shape, gpu: Gpu) -> float:
    """Time of a product on an empty device: the longest chain of one program after the other, or the busiest unit."""
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    tiles = -(-shape.m // block_m) * -(-(shape.n // shape.groups) // block_n) * shape.groups
    steps = -(-shape.taps * -(-shape.channels // block_k) // config.split_k)
    products = block_m * block_n * block_k / _PRODUCTS_PER_CYCLE[gpu.capability == WGMMA]
    loads = (block_m * block_k + block_n * block_k * shape.weight_bits / 8) / _L2_BYTES_PER_CYCLE
    if shape.group_size != -1:  # conversion and multiplication of every sum, on the general cores
        products += block_m * block_n / 40
    epilogue = block_m * block_n * _STATE_BYTES / _L2_BYTES_PER_CYCLE
    step = max(products + _WAIT_CYCLES[gpu.capability == WGMMA], loads) + _STEP_CYCLES
    program = _PROGRAM_CYCLES + steps * step + epilogue
    programs = -(-tiles * config.split_k // gpu.multiprocessors)  # of the busiest multiprocessor, some at once
    waves = -(-programs // resident(config, gpu.capability))
    cycles = max(waves * program, programs * max(steps * (products + _STEP_CYCLES), steps * loads + epilogue))
    if config.split_k > 1:
        cycles += _LAUNCH_CYCLES + 8 * config.split_k * shape.m * shape.n / _MEMORY_BYTES_PER_CYCLE
    return cycles


@lru_cache(maxsize=4096)
def choose(shape: Shape, gpu: Gpu) -> TileConfig:
    """The tile for `shape` with the best estimate, and its split. ValueError if none fits."""
    found = []
    for config in candidates(gpu.capability):
        if fits(config, shape):
            most = shape.taps * -(-shape.channels // config.block_k) // _LEAST_STEPS
            found += [config._replace(split_k=splits) for splits in (1, 2, 4, 8, 16) if splits <= max(most, 1)]
    if not found:
        text = "group_size must be a multiple of 32, and divide channels in a conv"
        raise ValueError(f"no tile computes {shape}: {text}")
    return min(found, key=lambda config: estimated_cycles(config, shape, gpu))
