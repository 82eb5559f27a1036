"""Single layers: our ops on every backend that is named, beside torch's own products and the strongest int8 peers.

On a GPU the baselines are bf16 and fp16 (cuDNN in channels_last with cudnn.benchmark, cuBLAS), torch._int_mm with both
operands along K, and the fastest of CUTLASS's int8 kernels that benchmarks/baselines/cutlass_int8/build.py has built;
on a CPU float32. Forms of ours:

    product        y_hat += A(codes), and the output           modulate       both
    product_plain  the output, without state                   quantize       the residual's codes, x_hat += ...

    python -m benchmarks layers --network ddpm_cifar10 --record
    python -m benchmarks layers --network sd15 sdxl --batch 8 --device cuda --backend cuda --most 12 --record

On a GPU one process should have one of our backends: a kernel that loses the CUDA context takes with it what the
process would have timed. --machine records the rates of plain torch instead. Every problem is timed once, however many
networks have it, those with the largest share of a network's step first. The first and the last sample are verified
against the backend reference, sums in float64, before a form is timed."""

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bounds, record
from benchmarks.runner import Case, Entrant, LeftOut, Measure, Row, Session, add_options, attempt
from benchmarks.shapes import NETWORKS, Layer, layer_table
from benchmarks.timing import timer_of
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.ops.problem import capability
from modiff_kernels.planning.cost import Machine
from modiff_kernels.quant.affine import dequantize_weight, quantize_weight

ACT_BITS = 8
OUR_FORMS = ("product", "modulate", "product_plain", "quantize")
PEER_FORM = "cutlass_int8"
GPU_FORMS = ("bf16", "product", "modulate", "product_plain", PEER_FORM, "int_mm", "fp16", "quantize")
CPU_FORMS = ("float32", *OUR_FORMS)
"""In the order in which they are timed: a budget that ends inside a problem leaves the last ones."""
LEAST_SQNR_DB = {"bf16": 30.0, "fp16": 45.0, "float32": 100.0}
"""Of other forms 50, for 16-bit outputs against the same op in float32 out of the same codes. bf16 and fp16 have their
own rounding of inputs and weights, and are compared to the float operator."""
LEAST_CHANNELS = 16
"""Of layers that are timed: conv_in and conv_out stay in floating point."""


@dataclass(frozen=True)
class Form:
    """What is timed: an op in the rows' words, by whom."""

    op: str
    backend: str
    compiled: bool = False

    @property
    def key(self) -> str:
        """For --rows: "product" takes all backends, "product.cuda" one."""
        return f"{self.op}.{self.backend}"

    name = key


@dataclass(frozen=True)
class Problem:
    layer: Layer
    batch: int

    def name(self, weight_bits: int, form: str = "product") -> str:
        """In the column `problem` of rows of `form`; the bits are those of floats where it multiplies them."""
        bits = {"bf16": 16, "fp16": 16, "float32": 32}.get(form, weight_bits)
        return f"{self.layer}-b{self.batch}-w{bits}"


def problems_by_share(networks: Sequence[str], batches: Sequence[int], machine: Machine) -> list[Problem]:
    """Every problem of `networks` once, in an order in which the first ones, however many, cover about the same part of
    a step of each network at each batch: a problem's place is the share of the larger ones of the step it leads in."""
    places: dict[Problem, float] = {}
    shares: dict[Problem, float] = {}
    for network, batch in itertools.product(networks, batches):
        least = {layer: n * bound_us("bf16", layer, batch, 8, machine) for layer, n in low_bit_layers(network).items()}
        step, larger = sum(least.values()), 0.0
        for layer, bound in sorted(least.items(), key=lambda item: -item[1]):
            problem = Problem(layer, batch)
            places[problem] = min(places.get(problem, 1.0), larger)
            shares[problem] = max(shares.get(problem, 0.0), bound / step)
            larger += bound / step
    return sorted(shares, key=lambda problem: (places[problem], -shares[problem]))


@cache
def low_bit_layers(network: str) -> dict[Layer, int]:
    """Layers that are quantised at all -> how often they occur. Not to be changed."""
    return {layer: n for layer, n in layer_table(network).items() if min(layer.c_in, layer.c_out) >= LEAST_CHANNELS}


def is_matrix(layer: Layer) -> bool:
    """Whether the product is one of two matrices: a Linear, or a convolution without a window."""
    return (layer.kernel, layer.stride, layer.padding) == (1, 1, 0)


def outputs_of(layer: Layer, batch: int) -> int:
    return batch * layer.h_out * layer.w_out * layer.c_out


def operations(layer: Layer, batch: int) -> int:
    return 2 * outputs_of(layer, batch) * layer.c_in * layer.kernel**2


def bytes_moved(form: str, layer: Layer, batch: int, weight_bits: int, float_bytes: int = 2) -> float:
    """What `form` has to read and write at least: every tensor once, activations and state of `float_bytes`."""
    inputs = batch * layer.h * layer.w * layer.c_in
    outputs = outputs_of(layer, batch)
    weights = layer.c_out * layer.c_in * layer.kernel**2
    size, packed = float_bytes, weights * weight_bits / 8
    quantize = inputs * (3 * size + 1)  # x, x_hat read; x_hat, codes written
    product = inputs + packed + 3 * size * outputs  # y_hat read and written, out written
    return {
        "int_mm": inputs + weights + 4 * outputs,
        PEER_FORM: inputs + weights + 2 * outputs,
        "product_plain": inputs + packed + size * outputs,
        "product": product,
        "quantize": quantize,
        "modulate": quantize + product,
    }.get(form, size * (inputs + weights + outputs))


def bound_us(
    form: str, layer: Layer, batch: int, weight_bits: int, machine: Machine, float_bytes: int = 2
) -> float:  # fmt: skip
    """The least time of `form` on `machine`: its bytes or its operations, whichever takes longer; for "modulate" the
    sum over its two passes."""
    if form == "modulate":
        return sum(bound_us(part, layer, batch, weight_bits, machine, float_bytes) for part in ("quantize", "product"))
    memory = bytes_moved(form, layer, batch, weight_bits, float_bytes) / machine.bandwidth
    if form == "quantize":
        return 1e6 * memory
    rate = machine.float_ops if form in ("bf16", "fp16", "float32") else machine.int8_ops
    return 1e6 * max(memory, operations(layer, batch) / rate)


def forms_of(
    layer: Layer, batch: int, weight_bits: int, backends: Sequence[str], on_cuda: bool, has_cutlass: bool
) -> list[Form]:  # fmt: skip
    """The forms that `layer` has: torch._int_mm multiplies int8 matrices, of more than 16 rows and in multiples of 8;
    CUTLASS int8 weights, in multiples of 16; ours once for each of `backends`."""
    rows = outputs_of(layer, batch) // layer.c_out
    int_mm = is_matrix(layer) and weight_bits == 8 and rows > 16 and layer.c_in % 8 == layer.c_out % 8 == 0
    cutlass = has_cutlass and weight_bits == 8 and layer.c_in % 16 == 0 and layer.c_out % 8 == 0
    found = []
    for form in GPU_FORMS if on_cuda else CPU_FORMS:
        if form in OUR_FORMS:
            found += [Form(form, backend) for backend in backends]
        elif {"int_mm": int_mm, PEER_FORM: cutlass}.get(form, True):
            found.append(Form(form, "cutlass" if form == PEER_FORM else "torch"))
    return found


def backends_here(names: Sequence[str], on_cuda: bool) -> list[str]:
    """`names`, with all that run on this device in the place of "auto"."""
    if list(names) != ["auto"]:
        return list(names)
    candidates = ("cuda", "triton") if on_cuda else ("cpu",)
    return [name for name in candidates if ops.dispatch.why_unavailable(name) is None]


class Tensors:
    """Those of one problem on `device`; `run` calls a form, which may change x_hat and y_hat, as it does in use.

    Codes are rounded Gaussians, as residuals have them: the power that a multiplication draws depends on its operands.
    """

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        self.layer, self.linear = layer, layer.kind == "linear"
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        shape = (layer.c_out, layer.c_in) if self.linear else (layer.c_out, layer.c_in, layer.kernel, layer.kernel)
        dense = torch.randn(shape, generator=draw, device=device) / (layer.c_in * layer.kernel**2) ** 0.5
        self.weight_q, self.weight_scale = quantize_weight(dense, weight_bits)
        self.packed = ops.PackedWeight(ops.pack_weight(self.weight_q, weight_bits), self.weight_scale, weight_bits)
        self.memory_format = torch.contiguous_format if self.linear else torch.channels_last
        self.dequantised = dequantize_weight(self.weight_q, self.weight_scale, -1, shape)
        side = (layer.kernel, layer.kernel)
        self.window = None if self.linear else ops.Window(side, (layer.stride,) * 2, (layer.padding,) * 2)
        x_shape = (batch, layer.h, layer.c_in) if self.linear else (batch, layer.c_in, layer.h, layer.w)

        def drawn(deviation: float, dtype: torch.dtype) -> Tensor:
            values = torch.empty(x_shape, dtype=self.dtype, device=device, memory_format=self.memory_format)
            values.normal_(0.0, deviation, generator=draw)
            return values.round_().clamp_(-128, 127).to(dtype) if dtype == torch.int8 else values

        x = drawn(1.0, self.dtype)
        self.inputs = (x, x + drawn(0.05, self.dtype))
        self.x_hat, self.turn = self.inputs[1].clone(), 0
        self.codes = drawn(28.0, torch.int8)  # 127 is 4.5 deviations
        self.scale = torch.linspace(1e-3, 2e-3, batch, device=device)
        self.zero_point = torch.randint(-16, 16, (batch,), generator=draw, device=device, dtype=torch.int32)
        self.y_hat = self.float_operator(self.x_hat, self.weight_as(self.dtype))
        self._prepared: dict[str, Any] = {}

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        return self.dequantised.to(dtype).contiguous(memory_format=self.memory_format)

    def float_operator(self, x: Tensor, weight: Tensor) -> Tensor:
        stride, padding = self.layer.stride, self.layer.padding
        return F.linear(x, weight) if self.linear else F.conv2d(x, weight, None, stride, padding)

    def weight_for(self, backend: str) -> Any:
        """The weight in the layout that `backend` prefers, made once."""
        if backend not in self._prepared:
            self._prepared[backend] = prepared(self.packed, self.weight_q.shape[1], self.window, backend)
        return self._prepared[backend]

    def some(self, samples: list[int]) -> "Tensors":
        """Tensors of these samples alone, with a state of their own."""
        part = copy.copy(self)

        def chosen(tensor: Tensor) -> Tensor:
            values = tensor[samples]
            return values.contiguous(memory_format=self.memory_format) if values.ndim > 1 else values

        part.inputs = tuple(chosen(x) for x in self.inputs)
        for name in ("x_hat", "codes", "scale", "zero_point", "y_hat"):
            setattr(part, name, chosen(getattr(self, name)))
        return part

    def next_x(self) -> Tensor:
        """Two inputs take turns, so that there is a residual in every call."""
        self.turn = 1 - self.turn
        return self.inputs[1 - self.turn]

    def code_rows(self) -> Tensor:
        """The codes as a matrix, one row per output pixel of a product without a window."""
        return (self.codes if self.linear else self.codes.permute(0, 2, 3, 1)).flatten(0, -2)

    def call(self, form: str, backend: str) -> Callable[[], Tensor]:
        """A call of `form`; what it needs besides is made now."""
        window, dtype = self.window, self.dtype
        if form == "int_mm":  # both operands along K, the order in which cuBLAS has tensor cores for int8
            rows = self.code_rows()
            return lambda: torch._int_mm(rows, self.weight_q.t())
        if form not in OUR_FORMS:
            own = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(form, torch.float32)
            x, dense = self.inputs[0].to(own), self.weight_as(own)
            return lambda: self.float_operator(x, dense)
        weight = self.weight_for(backend)
        state = (weight, self.y_hat, None, None, window, dtype)
        plain = {"window": window, "out_dtype": dtype, "backend": backend}
        modulated = (weight, self.y_hat, None, window, dtype, ACT_BITS)
        calls: dict[str, Callable[[], Tensor]] = {
            "product": lambda: ops.product(self.codes, self.scale, None, *state, backend=backend),
            "product_plain": lambda: ops.product(self.codes, self.scale, self.zero_point, weight, **plain),
            "quantize": lambda: ops.quantize(self.next_x(), x_hat=self.x_hat, bits=ACT_BITS, backend=backend)[0],
            "modulate": lambda: ops.modulate(
                self.next_x(), ops.IDENTITY, self.x_hat, None, *modulated, backend=backend
            )[0],
        }
        return calls[form]

    def expected(self, form: str) -> Tensor:
        """What `form` should give, by the backend reference in float64 sums; it changes the state as the form does."""
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # once in float64 is enough
        try:
            if form in ("bf16", "fp16", "float32"):
                return self.float_operator(self.inputs[0].float(), self.dequantised)
            if form == "int_mm":
                return (self.code_rows().double() @ self.weight_q.t().double()).to(torch.int32)
            self._prepared = {}
            if form == PEER_FORM:  # symmetric codes; a convolution with a window has one scale
                scale = self.scale if is_matrix(self.layer) else self.scale[:1]
                operands = (self.codes, scale, None, self.packed)
                return ops.product(*operands, window=self.window, out_dtype=torch.float16, backend="reference")
            return self.call(form, "reference")()
        finally:
            torch.backends.cudnn.benchmark = benchmark


def prepared(weight: ops.PackedWeight, k: int, window: ops.Window | None, backend: str) -> ops.PackedWeight:
    """`weight` [n, k] in the layout that products of `backend` on its device like best."""
    place = {"device_type": weight.packed.device.type, "capability": capability(weight.packed.device)}
    form = {"weight_bits": weight.bits, "group_size": weight.group_size, "granularity": "per_sample"}
    problem = ops.Problem("product", m=1, n=weight.n, k=k, window=window, **place, **form)
    return ops.prepare_weight(weight, k, window, ops.preferred_layout(problem, backend), backend)


class Check:
    """What the next call of `form` has to give for the first and the last sample, which lie at both ends of all
    tensors, by the backend reference."""

    def __init__(self, form: str, tensors: Tensors) -> None:
        self._form, self._tensors = form, tensors
        self._samples = sorted({0, tensors.codes.shape[0] - 1})
        self._part = tensors.some(self._samples)
        self._expected = self._part.expected(form)

    def sqnr_db(self, call: Callable[[], Tensor]) -> float:
        """SQNR in dB of `call`. AssertionError where it is too low, where a value of any sample is not finite, where
        integers differ, and where the state is not that of the reference."""
        form, samples = self._form, self._samples
        whole = call()
        by_sample = whole.unflatten(0, (self._tensors.codes.shape[0], -1)) if form == "int_mm" else whole
        found = by_sample[samples].reshape(self._expected.shape)
        if form in ("quantize", "int_mm"):
            assert torch.equal(found, self._expected), f"{form}: integers differ from the reference"
        assert torch.isfinite(whole).all(), f"{form}: not all values are finite"
        for name in ("x_hat", "y_hat"):
            changed, wanted = getattr(self._tensors, name)[samples].float(), getattr(self._part, name).float()
            assert sqnr(changed, wanted) >= 50.0, f"{form}: {name} is not that of the reference"
        sqnr_db = sqnr(found.float(), self._expected.float())
        least = LEAST_SQNR_DB.get(form, 50.0)
        assert sqnr_db >= least, f"{form}: {sqnr_db:.1f} dB to the reference, at least {least:g} expected"
        return sqnr_db


class ProductCase(Case):
    """The forms of one problem, which tables compare. cutlass: its kernels (baselines/cutlass_int8), or None."""

    def __init__(
        self, problem: Problem, weight_bits: int, device: torch.device, device_name: str, rounds: int, cutlass: Any
    ) -> None:
        self.problem, self.weight_bits, self.cutlass = problem, weight_bits, cutlass
        self.tensors = Tensors(problem.layer, problem.batch, weight_bits, device)
        self.peaks = bounds.peaks_of(device_name)
        self.timer = timer_of(device, rounds)

    def make(self, form: Form) -> Callable[[], Tensor]:
        if form.op == PEER_FORM:
            return self.cutlass.fastest(self.tensors, self.timer)
        try:
            call = self.tensors.call(form.op, form.backend)
            if form.op in OUR_FORMS:
                call()  # where a backend that does not solve it says so
            return call
        except ops.BackendUnavailable as error:
            raise LeftOut(str(error)) from None

    def verify(self, entrant: Entrant) -> float | str:
        form = entrant.config
        entrant.more["backend"] = getattr(entrant.subject, "kernel", form.backend)
        try:
            return Check(form.op, self.tensors).sqnr_db(entrant.subject)
        except AssertionError as error:
            return str(error)

    def rows(self, entrant: Entrant) -> list[Row]:
        layer, batch, form = self.problem.layer, self.problem.batch, entrant.config.op
        size = 4 if self.tensors.dtype == torch.float32 else 2
        rates = {"bandwidth": ("GB/s", bytes_moved(form, layer, batch, self.weight_bits, size) / 1e9)}
        if form != "quantize":
            rates["rate"] = ("TOPS", operations(layer, batch) / 1e12)
        if self.peaks is not None:
            rates["of_bound"] = ("%", bound_us(form, layer, batch, self.weight_bits, self.peaks, size) / 1e4)
        times = {"time": ("us", [1e6 * s for s in entrant.times])}
        times |= {metric: (unit, [amount / s for s in entrant.times]) for metric, (unit, amount) in rates.items()}
        more = {**self.timer.columns, "sqnr_db": entrant.sqnr_db}
        name, backend = self.problem.name(self.weight_bits, form), entrant.more["backend"]
        return [record.row(form, name, backend, m, unit, values, **more) for m, (unit, values) in times.items()]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="whose layers (%(default)s)")
    add("--batch", type=int, nargs="+", default=[8], help="images, one or several (%(default)s)")
    add("--weight-bits", type=int, default=8, choices=(3, 4, 8), help="default: %(default)s")
    add("--most", type=int, help="only so many, those with the largest share of a step")
    add("--machine", action="store_true", help="instead: rates of products and a copy in plain torch")
    add_options(parser, rounds=25)


def main(args: argparse.Namespace) -> int:
    from benchmarks.baselines.cutlass_int8.kernels import Cutlass

    session, bits = Session(args), args.weight_bits
    on_cuda, name = session.device.type == "cuda", session.device_name
    torch.backends.cudnn.benchmark = True
    if args.machine:
        rates = attempt("machine", lambda: bounds.measured(session.device), session.budget)
        session.failed += rates is None
        for what, (unit, rate) in rates.items() if rates else ():
            session.keep([record.row("machine", what, "torch", "rate", unit, [rate])])
            print(f"{what}  {rate:.4g} {unit}", flush=True)
        return session.exit_code
    backends, cutlass = backends_here(args.backend, on_cuda), Cutlass() if on_cuda else None
    found = problems_by_share(args.network, args.batch, bounds.peaks_of(name) or bounds.PEAKS["H200"])
    for problem in found[: args.most]:
        forms = forms_of(problem.layer, problem.batch, bits, backends, on_cuda, bool(cutlass))
        named = [(form, problem.name(bits, form.op)) for form in forms]
        measures = [(form, Measure(form.op, own, "time", 1e-6, form.backend)) for form, own in named]
        make = lambda p=problem: ProductCase(p, bits, session.device, name, args.rounds, cutlass)  # noqa: E731
        with torch.inference_mode():
            new = session.run(problem.name(bits), make, measures, 1 if on_cuda else args.rounds)
        for row in new:
            if row["metric"] == "time":
                print(f"{row['problem']}  {row['op']}  {row['backend']}  {row['p50']:.1f} us", flush=True)
    return session.exit_code
