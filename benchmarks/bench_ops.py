"""Time of one layer of a network in each form: float32, plain quantised, modulated; and of attention against torch's.
Everything is checked first, then timed.

python -m pytest benchmarks/bench_ops.py --network ddpm_cifar10 --record
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import record
from benchmarks.shapes import Layer
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.ops import dispatch

ACT_BITS = 8
LEAST_SQNR_DB = 60.0
"""Of an update on float rounding alone: every backend has the same codes."""

FORMS = ("float32", "plain", "quantize_residual", "modulated")
BACKENDS = ("cpu", "reference")


class Case:
    """Tensors of one layer, and its forms as functions without arguments that return the output."""

    def __init__(self, layer: Layer, batch: int, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.backend = backend
        linear = layer.kind == "linear"
        k = layer.c_in * layer.kernel**2
        weight_q = torch.randint(-127, 128, (layer.c_out, k), dtype=torch.int8, generator=generator)
        self.weight_scale = torch.full((layer.c_out,), 1 / (127 * k**0.5))
        if linear:
            x = torch.randn(batch, layer.h, layer.c_in, generator=generator)
            self.conv, self.suffix, shape = (), "linear", {}
            self.weight = weight_q.float() * self.weight_scale[:, None]
        else:
            x = torch.randn(batch, layer.c_in, layer.h, layer.w, generator=generator)
            x = x.to(memory_format=torch.channels_last)
            side = (layer.kernel, layer.kernel)
            self.conv = (side, (layer.stride,) * 2, (layer.padding,) * 2, (1, 1), 1)
            self.suffix = "conv2d"
            shape = {"kernel_size": side, "stride": self.conv[1], "padding": self.conv[2]}
            weight = (weight_q.float() * self.weight_scale[:, None]).view(layer.c_out, *side, layer.c_in)
            self.weight = weight.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        self.bias = torch.randn(layer.c_out, generator=generator)
        self.x = x
        self.step = 0.05 * torch.randn(x.shape, generator=generator)
        self.layout = ops.preferred_layout(
            f"modulated_{self.suffix}", "cpu", n=layer.c_out, k=k, weight_bits=8, backend=backend, **shape
        )
        self.packed = ops.prepare_weight(
            ops.pack_weight(weight_q, 8), 8, layer.c_out, k, layout_to=self.layout,
            kernel_size=self.conv[0] if self.conv else (1, 1), backend=backend,
        )  # fmt: skip
        self.x_hat = torch.empty_like(x)
        self.y_hat = torch.empty_like(self.float32())
        self.initialize()

    @property
    def format(self) -> tuple:
        return (8, -1, self.layout, *self.conv)

    def initialize(self) -> None:
        function = getattr(ops, f"initialize_{self.suffix}")
        weights = (self.packed, self.weight_scale, self.bias)
        function(self.x, self.x_hat, self.y_hat, *weights, None, *self.format, backend=self.backend)
        self.x = self.x + self.step

    def float32(self) -> torch.Tensor:
        if self.conv:
            return F.conv2d(self.x, self.weight, self.bias, self.conv[1], self.conv[2])
        return F.linear(self.x, self.weight, self.bias)

    def plain(self) -> torch.Tensor:
        codes = ops.quantize_activation(self.x, ACT_BITS, "per_sample", backend=self.backend)
        function = getattr(ops, f"quantized_{self.suffix}")
        weights = (self.packed, self.weight_scale, self.bias, None)
        return function(*codes, *weights, *self.format, torch.float32, backend=self.backend)

    def quantize_residual(self) -> torch.Tensor:
        return ops.quantize_residual(self.x, self.x_hat, None, ACT_BITS, "per_sample", backend=self.backend)[0]

    def modulated(self) -> torch.Tensor:
        function = getattr(ops, f"modulated_{self.suffix}")
        weights = (self.packed, self.weight_scale, self.y_hat, None)
        activations = (ACT_BITS, "per_sample", 1.0)
        return function(self.x, self.x_hat, None, *weights, *activations, *self.format, backend=self.backend)[0]


def verified(form: str, case: Case, reference: Case) -> float:
    """SQNR of one call against the same call on the reference; fails on a wrong result."""
    found, expected = getattr(case, form)(), getattr(reference, form)()
    if form == "quantize_residual":
        assert torch.equal(found, expected), "codes differ from the reference"
        return float("inf")
    sqnr_db = sqnr(found, expected)
    assert sqnr_db >= LEAST_SQNR_DB, f"{sqnr_db:.1f} dB to the reference, at least {LEAST_SQNR_DB} expected"
    return sqnr_db


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer(benchmark, request, layer, backend, form):
    if form == "float32" and backend != BACKENDS[0]:
        pytest.skip("float32 does not depend on the backend")
    module = dispatch.load(backend)
    reason = module if isinstance(module, str) else module.unavailable()
    if reason and form != "float32":
        pytest.skip(f"{backend}: {reason}")
    used = "reference" if reason else backend
    batch = request.config.getoption("--batch")
    case = Case(layer, batch, used)
    sqnr_db = verified(form, case, Case(layer, batch, "reference"))
    benchmark.group = f"{layer} batch {batch}"
    benchmark.pedantic(getattr(case, form), rounds=20 if backend == "cpu" else 5, warmup_rounds=3)
    keep(request, benchmark, form, f"{layer}-b{batch}", "torch" if form == "float32" else backend, sqnr_db)


def keep(request, benchmark, op: str, problem: str, backend: str, sqnr_db: float) -> None:
    """A result row, with --record."""
    if request.config.getoption("--record"):
        row = {
            "op": op,
            "problem": problem,
            "backend": backend,
            "metric": "time",
            "unit": "us",
            "cache": "warm",
            "timer": "perf_counter",
            "sqnr_db": sqnr_db,
            "verified": True,
            **record.percentiles([1e6 * seconds for seconds in benchmark.stats.stats.data]),
        }
        record.append([row])


ATTENTIONS = {"cifar10_small16": (64, 3, 32), "ddpm_cifar10": (256, 1, 256), "sd15_level3": (256, 8, 160)}
"""tokens, heads and width of a head of self-attention layers."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(benchmark, request, name, backend):
    """Backend reference is torch's scaled_dot_product_attention."""
    reason = dispatch.why_unavailable(backend)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    tokens, heads, width = ATTENTIONS[name]
    batch = request.config.getoption("--batch")
    q, k, v = torch.randn(3, batch, tokens, heads * width)
    expected = ops.attention(q, k, v, heads, width**-0.5, "reference")
    found = ops.attention(q, k, v, heads, width**-0.5, backend)
    sqnr_db = sqnr(found, expected)
    assert sqnr_db >= 100, f"{sqnr_db:.1f} dB to torch, at least 100 expected"
    benchmark.group = f"attention {name} batch {batch}"
    benchmark.pedantic(ops.attention, (q, k, v, heads, width**-0.5, backend), rounds=50, warmup_rounds=5)
    problem = f"attention-{name}-n{tokens}-h{heads}x{width}-b{batch}"
    keep(request, benchmark, "attention", problem, "torch" if backend == "reference" else backend, sqnr_db)
