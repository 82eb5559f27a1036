"""The layers that benchmarks/bench_products.py times, as problems of one batch: their arithmetic and traffic, the order
in which they matter, their tensors, and the forms that a product has.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Layer, layer_table
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.planning.roofline import Machine
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

ACT_BITS = 8
TORCH_FORMS = ("bf16", "fp16", "int_mm")
OUR_FORMS = ("accumulate", "modulated", "quantized", "quantize_residual")
RIVAL_FORM = "cutlass_int8"
FORMS = ("bf16", "accumulate", "modulated", "quantized", RIVAL_FORM, "int_mm", "fp16", "quantize_residual")
"""In the order in which they are timed: a budget that ends inside a problem leaves the last ones."""
LEAST_SQNR_DB = {"bf16": 30.0, "fp16": 45.0}
"""Of other forms 50, for float16 outputs against the same op in float32 out of the same codes. bf16 and fp16 have their
own rounding of inputs and weights, and are compared to the float operator."""
LEAST_CHANNELS = 16
"""Of layers that are timed: conv_in and conv_out stay in floating point."""


@dataclass(frozen=True)
class Problem:
    """A layer at a batch, and the largest share that its bf16 bound has in a step of a network that is asked for."""

    layer: Layer
    batch: int
    share: float

    def name(self, weight_bits: int) -> str:
        """As rows of results call it; 16 bits where a form multiplies floats."""
        return f"{self.layer}-b{self.batch}-w{weight_bits}"


def problems_by_share(networks: Sequence[str], batches: Sequence[int], machine: Machine) -> list[Problem]:
    """Every problem of `networks` once, in an order in which the first ones, however many, cover about the same part of
    a step of each network at each batch: a problem's place is the share of the larger ones of the step it leads in.
    """
    places: dict[tuple[Layer, int], float] = {}
    shares: dict[tuple[Layer, int], float] = {}
    for network, batch in itertools.product(networks, batches):
        bounds = {layer: n * bound_us("bf16", layer, batch, 8, machine) for layer, n in low_bit_layers(network).items()}
        step, larger = sum(bounds.values()), 0.0
        for layer, bound in sorted(bounds.items(), key=lambda item: -item[1]):
            key = layer, batch
            places[key] = min(places.get(key, 1.0), larger)
            shares[key] = max(shares.get(key, 0.0), bound / step)
            larger += bound / step
    ordered = sorted(shares, key=lambda key: (places[key], -shares[key]))
    return [Problem(layer, batch, shares[layer, batch]) for layer, batch in ordered]


@cache
def low_bit_layers(network: str) -> dict[Layer, int]:
    """Layers that are quantised at all -> how often they occur. Not to be changed."""
    return {layer: n for layer, n in layer_table(network).items() if min(layer.c_in, layer.c_out) >= LEAST_CHANNELS}


def is_matrix(layer: Layer) -> bool:
    """Whether the product is one of two matrices: a Linear, or a convolution without a window."""
    return (layer.kernel, layer.stride, layer.padding) == (1, 1, 0)


def outputs_of(layer: Layer, batch: int) -> int:
    """Elements of the output."""
    pixels = layer.h if layer.kind == "linear" else layer.h_out * layer.w_out
    return batch * pixels * layer.c_out


def operations(layer: Layer, batch: int) -> int:
    """Multiplications and additions of the product."""
    return 2 * outputs_of(layer, batch) * layer.c_in * layer.kernel**2


def bytes_moved(form: str, layer: Layer, batch: int, weight_bits: int) -> float:
    """What `form` has to read and write at least: every tensor once, activations and state of 2 bytes, codes of 1."""
    inputs = batch * layer.h * layer.w * layer.c_in
    outputs = outputs_of(layer, batch)
    weights = layer.c_out * layer.c_in * layer.kernel**2
    quantise = inputs * (2 + 2 + 2 + 1)  # x, x_hat read; x_hat, codes written
    packed = weights * weight_bits / 8
    return {
        "bf16": 2 * inputs + 2 * weights + 2 * outputs,
        "fp16": 2 * inputs + 2 * weights + 2 * outputs,
        "int_mm": inputs + weights + 4 * outputs,
        RIVAL_FORM: inputs + weights + 2 * outputs,
        "quantized": inputs + packed + 2 * outputs,
        "accumulate": inputs + packed + 6 * outputs,  # y_hat read and written, out written
        "quantize_residual": quantise,
        "modulated": quantise + inputs + packed + 6 * outputs,
    }[form]


def bound_us(form: str, layer: Layer, batch: int, weight_bits: int, machine: Machine) -> float:
    """The least time of `form` on `machine`: its bytes or its operations, whichever takes longer; for "modulated" the
    sum over its two passes.
    """
    if form == "modulated":
        return sum(bound_us(part, layer, batch, weight_bits, machine) for part in ("quantize_residual", "accumulate"))
    memory = bytes_moved(form, layer, batch, weight_bits) / machine.bandwidth
    if form == "quantize_residual":
        return 1e6 * memory
    rate = machine.float_ops if form in ("bf16", "fp16") else machine.int8_ops
    return 1e6 * max(memory, operations(layer, batch) / rate)


def forms_of(layer: Layer, batch: int, weight_bits: int, wanted: Sequence[str]) -> list[str]:
    """The forms among `wanted` that `layer` has: torch._int_mm multiplies int8 matrices, of more than 16 rows and in
    multiples of 8; CUTLASS int8 weights, in multiples of 16.
    """
    rows = outputs_of(layer, batch) // layer.c_out
    int_mm = is_matrix(layer) and weight_bits == 8 and rows > 16 and layer.c_in % 8 == layer.c_out % 8 == 0
    rival = weight_bits == 8 and layer.c_in % 16 == 0 and layer.c_out % 8 == 0
    missing = {form for form, there in (("int_mm", int_mm), (RIVAL_FORM, rival)) if not there}
    return [form for form in wanted if form not in missing]


class Case:
    """Tensors of one problem on `device`; `run` calls a form, which may change x_hat and y_hat, as it does in use.

    Codes are rounded Gaussians, as residuals have them: the power that a multiplication draws depends on its operands.
    """

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.layer, self.linear = layer, layer.kind == "linear"
        shape = (layer.c_out, layer.c_in) if self.linear else (layer.c_out, layer.c_in, layer.kernel, layer.kernel)
        dense = torch.randn(shape, generator=draw, device=device) / (layer.c_in * layer.kernel**2) ** 0.5
        self.weight_q, self.weight_scale = quantize_weight(dense, weight_bits)
        self.packed = ops.pack_weight(self.weight_q, weight_bits)
        self.memory_format = torch.contiguous_format if self.linear else torch.channels_last
        dequantised = dequantize_weight(self.weight_q, self.weight_scale, -1, shape)
        self.weight_bf16, self.weight_fp16 = (
            dequantised.to(dtype).contiguous(memory_format=self.memory_format)
            for dtype in (torch.bfloat16, torch.float16)
        )
        side = (layer.kernel, layer.kernel)
        self.conv = () if self.linear else (side, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
        self.format = (weight_bits, -1, "kpack_v1", *self.conv)
        x_shape = (batch, layer.h, layer.c_in) if self.linear else (batch, layer.c_in, layer.h, layer.w)

        def drawn(deviation: float, dtype: torch.dtype) -> Tensor:
            values = torch.empty(x_shape, dtype=torch.float16, device=device, memory_format=self.memory_format)
            values.normal_(0.0, deviation, generator=draw)
            return values.round_().clamp_(-128, 127).to(dtype) if dtype == torch.int8 else values

        x = drawn(1.0, torch.float16)
        self.inputs = (x, x + drawn(0.05, torch.float16))
        self.x_hat, self.turn = self.inputs[1].clone(), 0
        self.x_bf16 = x.to(torch.bfloat16)
        self.codes = drawn(28.0, torch.int8)  # 127 is 4.5 deviations
        self.scale = torch.linspace(1e-3, 2e-3, batch, device=device)
        self.zero_point = torch.randint(-16, 16, (batch,), generator=draw, device=device, dtype=torch.int32)
        self.y_hat = self._float_operator(self.x_hat, self.weight_fp16)
        self.suffix = "linear" if self.linear else "conv2d"

    def _float_operator(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if self.linear else F.conv2d(x, weight, None, *self.conv[1:3])

    def some(self, samples: list[int]) -> Case:
        """A case of these samples alone, with a state of its own."""
        part = copy.copy(self)

        def chosen(tensor: Tensor) -> Tensor:
            values = tensor[samples]
            return values.contiguous(memory_format=self.memory_format) if values.ndim > 1 else values

        part.inputs = tuple(chosen(x) for x in self.inputs)
        for name in ("x_hat", "x_bf16", "codes", "scale", "zero_point", "y_hat"):
            setattr(part, name, chosen(getattr(self, name)))
        return part

    def next_x(self) -> Tensor:
        """Two inputs take turns, so that there is a residual in every call."""
        self.turn = 1 - self.turn
        return self.inputs[1 - self.turn]

    def code_rows(self) -> Tensor:
        """The codes as a matrix, one row per output pixel of a product without a window."""
        return (self.codes if self.linear else self.codes.permute(0, 2, 3, 1)).flatten(0, -2)

    def run(self, form: str, backend: str) -> Tensor:
        """The output of `form`, which is one of TORCH_FORMS (whatever the backend) or of OUR_FORMS."""
        return getattr(self, f"_{form}")(backend)

    def _bf16(self, _: str) -> Tensor:
        return self._float_operator(self.x_bf16, self.weight_bf16)

    def _fp16(self, _: str) -> Tensor:
        return self._float_operator(self.inputs[0], self.weight_fp16)

    def _int_mm(self, _: str) -> Tensor:
        """Both operands along K, the order in which cuBLAS has tensor cores for int8."""
        return torch._int_mm(self.code_rows(), self.weight_q.t())

    def _quantized(self, backend: str) -> Tensor:
        function = getattr(ops, f"quantized_{self.suffix}")
        operands = (self.codes, self.scale, self.zero_point, self.packed, self.weight_scale, None, None)
        return function(*operands, *self.format, torch.float16, backend=backend)

    def _accumulate(self, backend: str) -> Tensor:
        function = getattr(ops, f"accumulate_{self.suffix}")
        operands = (self.codes, self.scale, self.packed, self.weight_scale, self.y_hat, None)
        return function(*operands, *self.format, torch.float16, backend=backend)

    def _quantize_residual(self, backend: str) -> Tensor:
        return ops.quantize_residual(self.next_x(), self.x_hat, None, ACT_BITS, "per_sample", backend=backend)[0]

    def _modulated(self, backend: str) -> Tensor:
        function = getattr(ops, f"modulated_{self.suffix}")
        operands = (self.next_x(), self.x_hat, None, self.packed, self.weight_scale, self.y_hat, None)
        return function(*operands, ACT_BITS, "per_sample", 1.0, *self.format, backend=backend)[0]

    def expected(self, form: str) -> Tensor:
        """What `form` should give, by the backend reference in float64 sums; it changes the state as the form does."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # once in float64 is enough
        try:
            return self._expected(form)
        finally:
            torch.backends.cudnn.benchmark = benchmark

    def _expected(self, form: str) -> Tensor:
        if form in ("bf16", "fp16"):
            weight = dequantize_weight(self.weight_q, self.weight_scale, -1, self.weight_fp16.shape)
            return self._float_operator(self.inputs[0].float(), weight)
        if form == "int_mm":
            return (self.code_rows().double() @ self.weight_q.t().double()).to(torch.int32)
        if form == RIVAL_FORM:  # symmetric codes; a convolution with a window has one scale
            function = getattr(ops, f"quantized_{self.suffix}")
            scale = self.scale if is_matrix(self.layer) else self.scale[:1]
            symmetric = torch.zeros_like(scale, dtype=torch.int32)
            operands = (self.codes, scale, symmetric, self.packed, self.weight_scale, None, None)
            return function(*operands, *self.format, torch.float16, backend="reference")
        return self.run(form, "reference")


class Check:
    """What the next call of `form` has to give for the first and the last sample, which lie at both ends of all
    tensors, by the backend reference.
    """

    def __init__(self, form: str, case: Case) -> None:
        self._form, self._case = form, case
        self._samples = sorted({0, case.codes.shape[0] - 1})
        self._part = case.some(self._samples)
        self._expected = self._part.expected(form)

    def sqnr_db(self, call: Callable[[], Tensor]) -> float:
        """SQNR in dB of `call`. AssertionError where it is too low, where a value of any sample is not finite, where
        integers differ, and where the state is not that of the reference.
        """
        form, samples = self._form, self._samples
        whole = call()
        by_sample = whole.unflatten(0, (self._case.codes.shape[0], -1)) if form == "int_mm" else whole
        found = by_sample[samples].reshape(self._expected.shape)
        if form in ("quantize_residual", "int_mm"):
            assert torch.equal(found, self._expected), f"{form}: integers differ from the reference"
            return float("inf")
        assert torch.isfinite(whole).all(), f"{form}: not all values are finite"
        for name in ("x_hat", "y_hat"):
            changed, wanted = getattr(self._case, name)[samples].float(), getattr(self._part, name).float()
            assert sqnr(changed, wanted) >= 50.0, f"{form}: {name} is not that of the reference"
        sqnr_db = sqnr(found.float(), self._expected.float())
        least = LEAST_SQNR_DB.get(form, 50.0)
        assert sqnr_db >= least, f"{form}: {sqnr_db:.1f} dB to the reference, at least {least:g} expected"
        return sqnr_db
