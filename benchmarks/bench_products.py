"""Time of single layers on a GPU: the ops of the backends cuda and triton, side by side, against torch in bf16 (cuDNN,
cuBLAS), torch._int_mm and the roofline.

python -m benchmarks.bench_products [--network sd15] [--batch 1 2 8] [--weight-bits 8] [--backend cuda] [--record]

Every form is verified first, then timed with a cold L2 cache (a buffer larger than it is written before every call,
which also hides the launch from the device), by CUDA events. Needs a GPU that nothing else uses.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.shapes import NETWORKS, Layer, layer_table
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

ACT_BITS = 8
BACKENDS = ("cuda", "triton")
TORCH_FORMS = ("bf16", "int_mm")  # whatever the backend
FORMS = ("bf16", "int_mm", "quantized", "accumulate", "quantize_residual", "modulated")
LEAST_SQNR_DB = {"bf16": 30.0}
"""To the same op of the backend reference, in float32 out of the same codes: 50 for float16 outputs. bf16 has its own
rounding of inputs and weights, and is compared to the float operator."""
WARM_UP = 5
FLUSH_BYTES = 256 << 20  # five times the L2 cache of an H200


@dataclass(frozen=True)
class Peaks:
    """Published dense peaks of a device: tera-operations and terabytes per second."""

    int8_tops: float
    bf16_tops: float
    memory_tb: float


PEAKS = {
    "H200": Peaks(1979, 989, 4.8),
    "H100 80GB HBM3": Peaks(1979, 989, 3.35),
    "A100-SXM4-80GB": Peaks(624, 312, 2.039),
    "A100-SXM4-40GB": Peaks(624, 312, 1.555),
}
"""By part of the device's name."""


def peaks_of(device_name: str) -> Peaks | None:
    """Peaks of the device, None if they are not in the table."""
    return next((peaks for part, peaks in PEAKS.items() if part in device_name), None)


def output_size(layer: Layer) -> tuple[int, int]:
    """Height and width of the output of `layer`; a Linear has `h` rows."""
    if layer.kind == "linear":
        return layer.h, 1
    return tuple((size + 2 * layer.padding - layer.kernel) // layer.stride + 1 for size in (layer.h, layer.w))


def operations(layer: Layer, batch: int) -> int:
    """Multiplications and additions of the product."""
    rows, columns = output_size(layer)
    return 2 * batch * rows * columns * layer.c_out * layer.c_in * layer.kernel**2


def bytes_moved(form: str, layer: Layer, batch: int, weight_bits: int) -> float:
    """What `form` has to read and write at least: every tensor once, activations and state of 2 bytes, codes of 1."""
    rows, columns = output_size(layer)
    inputs = batch * layer.h * layer.w * layer.c_in
    outputs = batch * rows * columns * layer.c_out
    weights = layer.c_out * layer.c_in * layer.kernel**2
    quantise = inputs * (2 + 2 + 2 + 1)  # x, x_hat read; x_hat, codes written
    packed = weights * weight_bits / 8
    return {
        "bf16": 2 * inputs + 2 * weights + 2 * outputs,
        "int_mm": inputs + weights + 4 * outputs,
        "quantized": inputs + packed + 2 * outputs,
        "accumulate": inputs + packed + 6 * outputs,  # y_hat read and written, out written
        "quantize_residual": quantise,
        "modulated": quantise + inputs + packed + 6 * outputs,
    }[form]


def bound_us(form: str, layer: Layer, batch: int, weight_bits: int, peaks: Peaks) -> float:
    """The least time of `form` on a device with `peaks`: its bytes or its operations, whichever takes longer; for
    "modulated" the sum over its two passes.
    """
    if form == "modulated":
        return sum(bound_us(part, layer, batch, weight_bits, peaks) for part in ("quantize_residual", "accumulate"))
    memory = bytes_moved(form, layer, batch, weight_bits) / (peaks.memory_tb * 1e6)
    if form == "quantize_residual":
        return memory
    tops = peaks.bf16_tops if form == "bf16" else peaks.int8_tops
    return max(memory, operations(layer, batch) / (tops * 1e6))


class Case:
    """Tensors of one layer on `device`; its forms are methods without arguments that return their output."""

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.backend, self.linear = backend, layer.kind == "linear"
        shape = (layer.c_out, layer.c_in) if self.linear else (layer.c_out, layer.c_in, layer.kernel, layer.kernel)
        dense = torch.randn(shape, generator=generator) / (layer.c_in * layer.kernel**2) ** 0.5
        codes, scale = quantize_weight(dense, weight_bits)
        memory_format = torch.contiguous_format if self.linear else torch.channels_last
        dequantised = dequantize_weight(codes, scale, -1, shape)
        self.float_weight = dequantised.to(device, torch.bfloat16).contiguous(memory_format=memory_format)
        self.packed, self.weight_scale = ops.pack_weight(codes.to(device), weight_bits), scale.to(device)
        self.codes_kn = codes.t().contiguous().to(device) if self.linear else None
        side = (layer.kernel, layer.kernel)
        self.conv = () if self.linear else (side, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
        self.format = (weight_bits, -1, "kpack_v1", *self.conv)
        x_shape = (batch, layer.h, layer.c_in) if self.linear else (batch, layer.c_in, layer.h, layer.w)
        x = torch.randn(x_shape, generator=generator).to(memory_format=memory_format)
        self.x = x.to(device, torch.float16)
        self.x_hat = (x + 0.05 * torch.randn(x_shape, generator=generator)).to(device, torch.float16)
        self.x_bf16 = x.to(device, torch.bfloat16)
        self.codes = ops.quantize_residual(self.x, self.x_hat.clone(), None, ACT_BITS, "per_sample", backend=backend)
        self.plain_codes = ops.quantize_activation(self.x, ACT_BITS, "per_sample", backend=backend)
        self.y_hat = self.float_operator(self.x_hat, self.float_weight.half())
        self.suffix = "linear" if self.linear else "conv2d"

    def float_operator(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The operator in torch."""
        return F.linear(x, weight) if self.linear else F.conv2d(x, weight, None, *self.conv[1:3])

    def bf16(self) -> torch.Tensor:
        return self.float_operator(self.x_bf16, self.float_weight)

    def int_mm(self) -> torch.Tensor:
        return torch._int_mm(self.codes[0].flatten(0, -2), self.codes_kn)

    def quantized(self) -> torch.Tensor:
        function = getattr(ops, f"quantized_{self.suffix}")
        weights = (self.packed, self.weight_scale, None, None)
        return function(*self.plain_codes, *weights, *self.format, torch.float16, backend=self.backend)

    def accumulate(self) -> torch.Tensor:
        function = getattr(ops, f"accumulate_{self.suffix}")
        weights = (self.packed, self.weight_scale, self.y_hat, None)
        return function(*self.codes[:2], *weights, *self.format, torch.float16, backend=self.backend)

    def quantize_residual(self) -> torch.Tensor:
        return ops.quantize_residual(self.x, self.x_hat, None, ACT_BITS, "per_sample", backend=self.backend)[0]

    def modulated(self) -> torch.Tensor:
        function = getattr(ops, f"modulated_{self.suffix}")
        weights = (self.packed, self.weight_scale, self.y_hat, None)
        act = (ACT_BITS, "per_sample", 1.0)
        return function(self.x, self.x_hat, None, *weights, *act, *self.format, backend=self.backend)[0]


def forms_of(layer: Layer, batch: int, weight_bits: int, wanted: list[str]) -> list[str]:
    """The forms among `wanted` that `layer` has: torch._int_mm multiplies int8 matrices, of more than 16 rows."""
    has_int_mm = layer.kind == "linear" and weight_bits == 8 and batch * layer.h > 16 and layer.c_in % 8 == 0
    return [form for form in wanted if form != "int_mm" or has_int_mm]


def verified(form: str, case: Case, reference: Case) -> float:
    """SQNR in dB of one call, in the state that `case` was made with; fails on a wrong result."""
    found = getattr(case, form)().float()
    if form == "bf16":
        expected = reference.float_operator(reference.x.float(), reference.float_weight.float())
    elif form == "int_mm":
        expected = (reference.codes[0].flatten(0, -2).double() @ reference.codes_kn.double()).float()
    else:
        expected = getattr(reference, form)().float()
    if form in ("quantize_residual", "int_mm"):
        assert torch.equal(found, expected), f"{form}: integers differ from the reference"
        return float("inf")
    sqnr_db = sqnr(found, expected)
    least = LEAST_SQNR_DB.get(form, 50.0)
    assert sqnr_db >= least, f"{form}: {sqnr_db:.1f} dB to the reference, at least {least:g} expected"
    return sqnr_db


def time_us(call: Callable[[], object], rounds: int) -> list[float]:
    """Microseconds of `rounds` calls on the current CUDA device, each with a cold L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = []
    for index in range(WARM_UP + rounds):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        if index >= WARM_UP:
            events.append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in events]


def rows_of(
    form: str, backend: str, layer: Layer, batch: int, weight_bits: int, times: list[float], sqnr_db: float, device: str
) -> list:
    """Rows of one measurement: time, rates, and the share of the roofline's bound if the device's peaks are known."""
    common = {
        "op": form,
        "problem": f"{layer}-b{batch}-w{16 if form == 'bf16' else weight_bits}",
        "backend": backend,
        "cache": "cold",
        "timer": "cuda_event",
        "sqnr_db": sqnr_db,
        "verified": True,
        "device": device,
    }
    rates = {"bandwidth": ("GB/s", bytes_moved(form, layer, batch, weight_bits) / 1e3)}
    if form != "quantize_residual":
        rates["rate"] = ("TOPS", operations(layer, batch) / 1e6)
    peaks = peaks_of(device)
    if peaks is not None:
        rates["of_bound"] = ("%", 100 * bound_us(form, layer, batch, weight_bits, peaks))
    rows = [{**common, "metric": "time", "unit": "us", **record.percentiles(times)}]
    for metric, (unit, amount) in rates.items():
        rows.append({**common, "metric": metric, "unit": unit, **record.percentiles([amount / t for t in times])})
    return rows


def backends_of(form: str, backends: list[str]) -> list[str]:
    """Whom to time `form` with."""
    return ["torch"] if form in TORCH_FORMS else backends


def timed(
    form: str, backend: str, layer: Layer, batch: int, weight_bits: int, rounds: int
) -> tuple[list[float], float] | str:
    """Microseconds of the calls and the SQNR in dB of the first, or why `backend` does not solve this."""
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        case = Case(layer, batch, weight_bits, device, "reference" if backend == "torch" else backend)
        sqnr_db = verified(form, case, Case(layer, batch, weight_bits, device, "reference"))
    except ops.BackendUnavailable as error:
        return str(error)
    return time_us(getattr(case, form), rounds), sqnr_db


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="sd15", choices=NETWORKS, help="whose layers (%(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8], help="images (%(default)s)")
    parser.add_argument("--weight-bits", type=int, default=8, choices=(3, 4, 8), help="default: %(default)s")
    parser.add_argument("--backend", nargs="+", default=list(BACKENDS), choices=BACKENDS, help="default: all that run")
    parser.add_argument("--form", nargs="+", default=list(FORMS), choices=FORMS, help="default: all")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each form (%(default)s)")
    parser.add_argument("--record", action="store_true", help="append the results to benchmarks/results")
    args = parser.parse_args()
    reasons = {name: ops.dispatch.why_unavailable(name) for name in args.backend}
    for name, reason in reasons.items():
        if reason is not None:
            print(f"bench_products: {name} is not timed here: {reason}", file=sys.stderr)
    backends = [name for name, reason in reasons.items() if reason is None]
    if not backends:
        return 2
    device = torch.cuda.get_device_name()
    table, rows = [], []
    with torch.inference_mode():
        for layer in layer_table(args.network):
            if min(layer.c_in, layer.c_out) < 16:
                continue  # conv_in and conv_out stay in floating point
            for batch in args.batch:
                for form in forms_of(layer, batch, args.weight_bits, args.form):
                    for backend in backends_of(form, backends):
                        found = timed(form, backend, layer, batch, args.weight_bits, args.rounds)
                        label = [f"{layer}-b{batch}", form, backend]
                        if isinstance(found, str):
                            table.append([*label, "-", "-", "-", "-"])
                            print(f"bench_products: {found}", file=sys.stderr)
                            continue
                        new = rows_of(form, backend, layer, batch, args.weight_bits, *found, device)
                        rows += new
                        cells = {row["metric"]: f"{row['p50']:.1f}" for row in new}
                        columns = ("time", "rate", "bandwidth", "of_bound")
                        table.append([*label, *(cells.get(column, "-") for column in columns)])
    print(text_table(["layer", "form", "backend", "us", "TOPS", "GB/s", "% of bound"], table))
    if args.record:
        print(f"recorded in {record.append(rows, record.results_file(device=device))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
