"""The least time that a UNet step can take by its arithmetic and its traffic, to hold measured times against.

    time of a layer = bytes around it / bandwidth + max(operations / rate, bytes of the product / bandwidth)

Around a product stand only what modulation or quantisation adds to a network that is fused as far as it can be: int8
codes written, x_hat read and written. Launches, tiles, caches, norms and attention count nothing, so this is a lower
bound, not a prediction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shapes import Layer, layer_table
from modiff_kernels import ops

PEAKS = {"H200": (989e12, 1979e12, 4.8e12), "H100": (989e12, 1979e12, 3.35e12), "A100": (312e12, 624e12, 2.0e12)}
"""By name of GPU: dense 16-bit and int8 operations and bytes per second (data sheets; SXM, A100 with 80 GB)."""


@dataclass(frozen=True)
class Machine:
    """Operations per second in the float dtype and in int8 (a multiply-add is two), bytes per second, where from."""

    float_ops: float
    int8_ops: float
    bandwidth: float
    source: str


def machine(device: torch.device) -> Machine | None:
    """A GPU of the table, or a CPU, whose rates are those of a large product and a large copy; None for others."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peaks for key, peaks in PEAKS.items() if key in name]
        return Machine(*known[0], source="data sheet") if known else None
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    codes = torch.randint(-128, 128, (1024, 1024), dtype=torch.int8)
    layout = ops.preferred_layout("quantized_linear", "cpu", n=1024, k=1024, weight_bits=8)
    weight = ops.prepare_weight(ops.pack_weight(codes, 8), 8, 1024, 1024, layout_to=layout)
    scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    source = torch.empty(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)

    def integer_product() -> None:
        ops.quantized_linear(
            codes, scale, zero_point, weight, torch.ones(1024), None, None, 8, -1, layout, torch.float32
        )

    operations = 2 * 1024**3
    return Machine(
        operations / _least_seconds(lambda: a @ b),
        operations / _least_seconds(integer_product),
        2 * source.nbytes / _least_seconds(lambda: target.copy_(source)),
        source="measured on a product of 1024^3 and a copy of 64 MB",
    )


def bound_ms(network: str, batch: int, mode: str, machine: Machine, float_bytes: int, state_bytes: int) -> float:
    """Bound of one step in `mode`: "float" (and "weight_only", which computes the same), "quantized" or "modulated"."""
    layers = layer_table(network)
    seconds = (_seconds(layer, batch, mode, machine, float_bytes, state_bytes) * n for layer, n in layers.items())
    return 1e3 * sum(seconds)


def _seconds(layer: Layer, batch: int, mode: str, machine: Machine, float_bytes: int, state_bytes: int) -> float:
    inputs = batch * layer.c_in * layer.h * layer.w
    outputs = batch * layer.c_out * layer.h_out * layer.w_out
    weights = layer.c_out * layer.c_in * layer.kernel**2
    operations = 2 * weights * outputs / layer.c_out
    if mode in ("float", "weight_only"):
        moved = float_bytes * (inputs + weights + outputs)
        return max(operations / machine.float_ops, moved / machine.bandwidth)
    around, moved = inputs, inputs + weights + float_bytes * outputs
    if mode == "modulated":
        copied = 0 if state_bytes == float_bytes else float_bytes  # of y_hat, where the next layer cannot read itself
        around += 2 * state_bytes * inputs
        moved = inputs + weights + (2 * state_bytes + copied) * outputs
    return around / machine.bandwidth + max(operations / machine.int8_ops, moved / machine.bandwidth)


def _least_seconds(call: Callable[[], object], repeats: int = 10) -> float:
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
