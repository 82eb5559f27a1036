"""The least time of a UNet step by its arithmetic and traffic (planning/cost.py), to hold measured times against."""

import torch

import modiff_kernels as mk
from benchmarks.shapes import Layer, layer_table
from modiff_kernels.config.plan import Mode
from modiff_kernels.integrations.plans import measured_machine
from modiff_kernels.planning.cost import LayerShape, Machine, Sizes, seconds

PEAKS = {
    "H200": Machine(989e12, 1979e12, 4.8e12),
    "H100 80GB HBM3": Machine(989e12, 1979e12, 3.35e12),
    "A100-SXM4-80GB": Machine(312e12, 624e12, 2.039e12),
    "A100-SXM4-40GB": Machine(312e12, 624e12, 1.555e12),
}
"""By part of a GPU's name: data sheets, dense 16-bit and int8."""


def peaks_of(gpu_name: str) -> Machine | None:
    return next((peaks for part, peaks in PEAKS.items() if part in gpu_name), None)


def machine(device: torch.device) -> tuple[Machine, str]:
    """The rates of `device`, and where they are from: a data sheet, or products and a copy run here."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = peaks_of(name)
    if peaks is not None:
        return peaks, f"data sheet of {name}"
    return measured_machine(device, mk.ModiffConfig()), "measured on a large product, convolution and copy"


def measured(device: torch.device) -> dict[str, tuple[str, float]]:
    """By name, unit and rate of products in floating point and int8, and of a copy, in plain torch."""
    found = measured_machine(device, mk.ModiffConfig())
    tops = {"float": ("TOPS", found.float_ops / 1e12), "int8": ("TOPS", found.int8_ops / 1e12)}
    return {**tops, "copy": ("GB/s", found.bandwidth / 1e9)}


def bound_ms(network: str, batch: int, mode: str, machine: Machine, float_bytes: int, state_bytes: int) -> float:
    """Bound of one step with 8-bit weights in `mode`: "float", "weight_only" (the same), "quantized" or "modulated"."""
    layer_mode = Mode("float") if mode in ("float", "weight_only") else Mode(mode, 8)
    sizes, table = Sizes(float_bytes, state_bytes, 8), layer_table(network).items()
    return 1e3 * sum(n * seconds(_shape(layer, batch), layer_mode, sizes, machine, True) for layer, n in table)


def _shape(layer: Layer, batch: int) -> LayerShape:
    outputs = batch * layer.c_out * layer.h_out * layer.w_out
    summed = layer.c_in * layer.kernel**2
    inputs = batch * layer.c_in * layer.h * layer.w
    return LayerShape(inputs, outputs, layer.c_out * summed, outputs * summed)
