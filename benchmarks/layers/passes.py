"""Every fused quantising pass of a network against the same pass left to inductor.

Ours is the op with its prologue. `inductor-*` is the compiled graph itself, without the guards and wrappers around a
call, because a compiled network pays for them once per call of the network; it is written in two ways, the faster one
counts. `torch.compile` is the second way as a function of its own, guards included. All update an x_hat of their own in
place; everything is verified against the backend reference first. With --cache warm a call is repeated on the same
tensors; "cold" has x_hat in memory and the rest in the caches, as in a network whose last product has just written h:
before each timed call a buffer larger than the caches is written, and the form is called on a second state.

A pass is read off the network (`pass_table`). Its plain form (`plain_pass`) takes what inductor likes best: tensors as
rows, [N, L, C], or [N, L / 16, 16, C] where a scale covers blocks of 16 rows, which are views of channels_last images
and of tokens. Two ways of writing it, because which one inductor makes faster code of depends on the pass:

obvious   torch's own norms, ranges by one reduction
tuned     norms as sums of values and of squares, which a loop over NHWC vectorises and torch.nn.functional.group_norm
          does not; ranges by row first, so that the residual is made and measured in one loop; what is small, and read
          by all values, stored instead of computed again for each
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modiff_kernels as mk
from benchmarks import record
from benchmarks.runner import Entrant, Row
from benchmarks.shapes import SMALL_NETWORKS, build_unet, conditions
from benchmarks.timing import CallTimer
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.quant.affine import MIN_SCALE
from modiff_kernels.quant.spec import BLOCK_ROWS, block_count, quant_max, quant_min

WAYS = ("obvious", "tuned")
EPS = 1e-6
OURS, EAGER, CALL = "ours", "torch", "torch.compile"
MOST_MOVED = 0.01
"""Part of the codes that float rounding may move: a norm's last bits move a value that lies between two codes."""
FLUSH_BYTES = 1 << 26  # above the last cache of a CPU's core complex and of a GPU
LARGEST_BYTES = 400 << 20  # a pass that moves more is left out


@dataclass(frozen=True)
class Pass:
    """What stands between two products: x = prologue(h), `rows` by `channels` an image, is quantised.

    prologue: "identity", "group_norm", "layer_norm" or "geglu". height, width: of an image, (0, 0) for tokens.
    """

    prologue: str
    channels: int
    rows: int
    height: int = 0
    width: int = 0
    groups: int = 1
    silu: bool = False
    shift: bool = False

    @property
    def kind(self) -> str:
        """The pass without its size."""
        what = "residual" if self.prologue == "identity" else self.prologue
        return "+".join([what, *(name for name in ("silu", "shift") if getattr(self, name))])

    @property
    def read_channels(self) -> int:
        """Channels of h."""
        return self.channels * (2 if self.prologue == "geglu" else 1)

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}" if self.height else f"{self.rows}"
        return f"{self.kind}-{self.channels}@{size}"


def pass_table(network: str) -> dict[Pass, int]:
    """Every quantising pass of one update of the fused network -> how often it occurs.

    Those of layers outside fused blocks, and of conv_in and conv_out, which stay in floating point, are not in it.
    """
    unet = build_unet(network, "cpu" if network in SMALL_NETWORKS else "meta")
    table: Counter[Pass] = Counter()

    def count(module: torch.nn.Module, prologue: str = "identity", **how: bool) -> None:
        def see(module: torch.nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            x = out if prologue == "geglu" else inputs[0]
            groups = getattr(module, "num_groups", 1)
            if x.ndim == 4:
                size = (x.shape[1], x.shape[2] * x.shape[3], *x.shape[2:])
            elif prologue == "group_norm":  # diffusers hands tokens over as [N, C, L]
                size = (x.shape[1], x.shape[2])
            else:
                size = (x.shape[-1], x.numel() // x.shape[-1])
            table[Pass(prologue, *size, groups=groups, **how)] += 1

        module.register_forward_hook(see)

    for module in unet.modules():
        kind = type(module).__name__
        if kind == "ResnetBlock2D":
            count(module.norm1, "group_norm", silu=True)
            count(module.norm2, "group_norm", silu=True, shift=True)
            if module.conv_shortcut is not None:
                count(module.conv_shortcut)
        elif kind == "Attention":
            if module.group_norm is not None:
                count(module.group_norm, "group_norm")
            count(module.to_out[0])
        elif kind == "Transformer2DModel":
            count(module.norm, "group_norm")
            count(module.proj_out)
        elif kind == "BasicTransformerBlock":
            for norm in (module.norm1, module.norm2, module.norm3):
                count(norm, "layer_norm")
            count(module.ff.net[0], "geglu")
        elif kind in ("Upsample2D", "Downsample2D"):
            count(module)  # the block quantises what it gets, before pixels are repeated or padded
    channels, size = unet.config.in_channels, unet.config.sample_size
    inputs = (torch.empty(1, channels, size, size, device=unet.device), torch.zeros(1, device=unet.device))
    with torch.inference_mode():
        unet(*inputs, **conditions(unet, 1))
    return dict(table)


def as_rows(x: Tensor, blocks: bool) -> Tensor:
    """A view of a channels_last image or of tokens as [N, L, C], with `blocks` as [N, L / 16, 16, C]."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2) if x.ndim == 4 else x
    return rows.unflatten(1, (-1, BLOCK_ROWS)) if blocks else rows


def _stored(x: Tensor) -> Tensor:
    """x, which inductor writes to memory here instead of computing it again for every reader."""
    return x.as_strided(x.shape, x.stride())


def _normalised(item: Pass, h: Tensor, shift: Tensor | None, gamma: Tensor, beta: Tensor, eps: float, way: str):
    """The norm of `item` over rows h."""
    if item.prologue == "layer_norm":
        if way == "obvious":
            return F.layer_norm(h, h.shape[-1:], gamma, beta, eps)
        mean = h.mean(-1, keepdim=True)
        scale = torch.rsqrt((h * h).mean(-1, keepdim=True) - mean * mean + eps)
        return (h - mean) * scale * gamma + beta
    if shift is not None:
        h = h + shift.view(shift.shape[0], *[1] * (h.ndim - 2), -1)
    if way == "obvious":
        # As a channels_last image: of three dimensions group_norm would make a contiguous copy, channels first.
        image = h.view(h.shape[0], *((item.height, item.width) if item.height else (item.rows // 4, 4)), -1)
        x = F.group_norm(image.permute(0, 3, 1, 2), item.groups, gamma, beta, eps)
        return x.permute(0, 2, 3, 1).reshape(h.shape)
    rows = tuple(range(1, h.ndim - 1))
    count = item.rows * (item.channels // item.groups)
    total, squares = (t.sum(rows).unflatten(1, (item.groups, -1)).sum(-1, keepdim=True) for t in (h, h * h))
    mean = total / count
    a = torch.rsqrt(squares / count - mean * mean + eps) * gamma.unflatten(0, (item.groups, -1))
    b = beta.unflatten(0, (item.groups, -1)) - mean * a
    shape = (h.shape[0], *[1] * len(rows), item.channels)
    # Both are [N, groups, C / groups]; as a view the consumer would divide every index by C / groups.
    a, b = (t.as_strided(shape, (item.channels, *[item.channels] * len(rows), 1)) for t in (a, b))
    return h * a + b


def prologue(item: Pass, way: str, h: Tensor, shift, gamma, beta, eps: float) -> Tensor:
    """x, in float32."""
    h = h.float()
    if item.prologue == "identity":
        return h
    if item.prologue == "geglu":
        value, gate = h.chunk(2, dim=-1)
        return value * F.gelu(gate)
    x = _normalised(item, h, shift, gamma, beta, eps, way)
    if not item.silu:
        return x
    return F.silu(x) if way == "obvious" else x / (1 + torch.exp(-x))


def _over_sample(x: Tensor, reduce: Callable[..., Tensor], way: str) -> Tensor:
    """The largest or smallest value of every sample, with its dimensions kept."""
    dims = tuple(range(1, x.ndim))
    if way == "obvious":
        return reduce(x, dims, keepdim=True)
    return reduce(reduce(x, -1, keepdim=True), dims[:-1], keepdim=True)


def _quantised(x: Tensor, scale: Tensor, bits: int, zero_point: Tensor | None = None) -> Tensor:
    codes = torch.round(x * (1.0 / scale))
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(quant_min(bits), quant_max(bits))


def plain_pass(item: Pass, bits: int, form: str, way: str, eps: float) -> Callable[..., tuple[Tensor, ...]]:
    """The pass as a function (h, x_hat, shift, gamma, beta) -> (codes, scale, absmax or zero_point).

    form: "residual", with a scale per sample or, for h of four dimensions, multipliers per block; x_hat is updated in
    place. "activation": affine, a scale and a zero point per sample; x_hat is not used.
    """

    def residual(h: Tensor, x_hat: Tensor, shift, gamma, beta) -> tuple[Tensor, ...]:
        old = x_hat.float()
        change = prologue(item, way, h, shift, gamma, beta, eps) - old
        if change.ndim == 3:
            absmax = _over_sample(change.abs(), torch.amax, way)
            scale = torch.clamp_min(absmax / (2 ** (bits - 1) - 0.5), MIN_SCALE)
            sent = _quantised(change, scale, bits)
        else:
            reach, most = 2 ** (bits - 1) - 13 / 16, 2 ** (8 - bits)
            largest = change.abs().amax(2, keepdim=True)
            absmax = largest.amax((1, 2, 3), keepdim=True)
            scale = torch.clamp_min(absmax / (reach * most), MIN_SCALE)
            multiplier = torch.ceil(largest / (scale * reach)).clamp(1, most)
            inverse = 1.0 / (scale * multiplier)
            if way == "tuned":
                multiplier, inverse = _stored(multiplier), _stored(inverse)
            sent = torch.round(change * inverse).clamp(quant_min(bits), quant_max(bits)) * multiplier
        x_hat.copy_(old + scale * sent)
        return sent.to(torch.int8), scale.flatten(), absmax.flatten()

    def activation(h: Tensor, x_hat: Tensor | None, shift, gamma, beta) -> tuple[Tensor, ...]:
        x = prologue(item, way, h, shift, gamma, beta, eps)
        low = _over_sample(x, torch.amin, way).clamp_max(0.0)
        high = _over_sample(x, torch.amax, way).clamp_min(0.0)
        scale = torch.clamp_min((high - low) / (2**bits - 1), MIN_SCALE)
        zero_point = torch.round(-low * (1.0 / scale)) + quant_min(bits)
        zero_point = zero_point.clamp(quant_min(bits), quant_max(bits))
        codes = _quantised(x, scale, bits, zero_point).to(torch.int8)
        return codes, scale.flatten(), zero_point.to(torch.int32).flatten()

    return {"residual": residual, "activation": activation}[form]


@dataclass(frozen=True)
class Form:
    """What is made of x: codes of its residual, or plain codes of itself, in so many bits."""

    name: str
    bits: int

    def __str__(self) -> str:
        return f"{self.name}-a{self.bits}"

    @property
    def granularity(self) -> str:
        """What `accelerate` uses by default."""
        mode = "modulated" if self.name == "residual" else "quantized"
        return mk.ModiffConfig(act_bits=self.bits, mode=mode).layer_granularity


FORMS = (Form("residual", 8), Form("residual", 4), Form("activation", 8))


@dataclass(frozen=True)
class Way:
    """Who makes the codes."""

    key: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """The same."""
        return self.key


PASS_WAYS = (Way(OURS), *(Way(f"inductor-{way}", True) for way in WAYS), Way(CALL, True), Way(EAGER))


class Tensors:
    """Those of a pass. Every way has an x_hat of its own, all the same to begin with."""

    def __init__(self, item: Pass, batch: int, form: Form, device: torch.device) -> None:
        self.item, self.form = item, form
        dtype = torch.float16 if device.type == "cuda" else torch.float32
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        rows = random(batch, item.rows, item.read_channels).to(device, dtype)
        self.gamma, self.beta = (1 + 0.2 * random(item.channels)).to(device), (0.2 * random(item.channels)).to(device)
        self.shift = random(batch, item.channels).to(device, dtype) if item.shift else None
        x = prologue(item, "obvious", rows, self.shift, self.gamma, self.beta, EPS)
        self.state = self._shaped((x + 0.05 * random(*x.shape).to(device)).to(dtype).contiguous())
        self.h = self._shaped(rows)
        self.blocks = form.granularity == "per_block" and block_count(item.rows, form.bits) > 0

    def _shaped(self, rows: Tensor) -> Tensor:
        """Rows as the image or tokens that they are."""
        if not self.item.height:
            return rows
        return rows.unflatten(1, (self.item.height, self.item.width)).permute(0, 3, 1, 2)

    def ours(self, x_hat: Tensor, backend: str) -> Callable[[], tuple[Tensor, ...]]:
        """Our op."""
        item, norm = self.item, (self.gamma, self.beta)
        before = {
            "group_norm": lambda: ops.Prologue("group_norm", *norm, self.shift, item.groups, EPS, item.silu),
            "layer_norm": lambda: ops.Prologue("layer_norm", *norm, eps=EPS),
        }.get(item.prologue, lambda: ops.Prologue(item.prologue))()
        state = x_hat if self.form.name == "residual" else None
        bits, granularity = self.form.bits, self.form.granularity
        return lambda: ops.quantize(self.h, before, state, None, bits, granularity, backend=backend)

    def plain(self, way: str) -> Callable[..., tuple[Tensor, ...]]:
        """The pass in plain torch, a function of `plain_arguments`."""
        return plain_pass(self.item, self.form.bits, self.form.name, way, EPS)

    def plain_arguments(self, x_hat: Tensor) -> tuple[Any, ...]:
        """Views of the same tensors, as rows."""
        return as_rows(self.h, self.blocks), as_rows(x_hat, self.blocks), self.shift, self.gamma, self.beta

    def result(self, call: Callable[[], tuple[Tensor, ...]], x_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and x_hat, codes and x_hat as rows, after one call into memory that held something else."""
        torch.full(self.state.shape, 0x55, dtype=torch.int8, device=self.state.device)  # what codes get next
        codes, scale, _ = call()
        codes = as_rows(codes, False) if codes.shape == self.state.shape else codes.flatten(1, -2)
        return codes, scale, as_rows(x_hat, False)

    def moved_bytes(self) -> int:
        """What the pass has to read and write at least: h, x_hat twice, codes."""
        state = 2 * self.state.nbytes if self.form.name == "residual" else 0
        return self.h.nbytes + state + self.state.numel()


class Compiled:
    """Inductor's graph of function(*arguments). The arguments keep their values, though compiling runs the function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        cuda = arguments[0].device.type == "cuda"
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") if cuda else {}

        def inner(gm: torch.fx.GraphModule, inputs: Any, **keywords: Any) -> Callable[..., Any]:
            self._graph = compile_fx_inner(gm, inputs, **keywords)

            def call(tensors: list[Any]) -> Any:
                self._inputs = list(tensors)
                return self._graph(tensors)

            call._boxed_call = True
            return call

        def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            return compile_fx(gm, inputs, inner_compile=inner, config_patches={"size_asserts": False, **options})

        saved = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
        self.function = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        with torch._functorch.config.patch(enable_autograd_cache=False):  # a hit there would not call `inner`
            self.function(*arguments)
        for tensor, before in zip(arguments, saved):
            if isinstance(tensor, Tensor):
                tensor.copy_(before)

    def bound(self, *swapped: tuple[Tensor, Tensor]) -> Callable[[], Any]:
        """The graph alone on the tensors it was compiled with, or on the second of a pair in the place of the first."""
        others = {old.data_ptr(): new for old, new in swapped}
        inputs = [others.get(t.data_ptr(), t) if isinstance(t, Tensor) else t for t in self._inputs]
        call = self._graph.current_callable
        return lambda: call(list(inputs))


class PassCase:
    """A pass in all ways, for benchmarks/runner.py. bandwidth: of the machine, bytes a second."""

    baselines = {"over_ours": (OURS,)}  # noqa: RUF012 (a constant)

    def __init__(
        self, problem: str, tensors: Tensors, cold: bool, backend: str, bandwidth: float
    ) -> None:  # fmt: skip
        self.problem, self.tensors, self.cold, self.backend, self.bandwidth = problem, tensors, cold, backend, bandwidth
        self.device = tensors.state.device
        self.timer = CallTimer()
        self.flush = torch.zeros(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        torch._dynamo.reset()  # functions of all cases have one code, and only a few compilations of it are kept
        x_hat = tensors.state.clone()
        self.expected = tensors.result(tensors.ours(x_hat, "reference"), x_hat)

    def make(self, way: Way) -> tuple[Tensor, Callable[[], Any], Callable[[], Any]]:
        """A state, the call on it, and the call on another one."""
        tensors, states = self.tensors, [self.tensors.state.clone() for _ in range(2)]
        arguments = [tensors.plain_arguments(x_hat) for x_hat in states]
        if way.key == OURS:
            return states[0], *(tensors.ours(x_hat, self.backend) for x_hat in states)
        if way.key == EAGER:
            return states[0], *(partial(tensors.plain("obvious"), *own) for own in arguments)
        graph = Compiled(tensors.plain(way.key.partition("-")[2] or "tuned"), *arguments[0])
        if way.key == CALL:
            return states[0], *(partial(graph.function, *own) for own in arguments)
        return states[0], graph.bound(), graph.bound((arguments[0][1], arguments[1][1]))

    def verify(self, entrant: Entrant) -> float | str:
        x_hat, call, _ = entrant.subject
        return compared(self.tensors, self.tensors.result(call, x_hat), self.expected)

    def timed(self, entrant: Entrant) -> list[float]:
        _, call, other = entrant.subject
        if self.cold:
            self.flush.add_(1)
            other()
        if self.device.type == "cpu":
            return self.timer(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end)]

    def rows(self, entrant: Entrant) -> list[Row]:
        rows = [self._row(entrant, "time", "us", [1e6 * s for s in entrant.times])]
        if entrant.config.key == OURS:
            bound_s = self.tensors.moved_bytes() / self.bandwidth
            rows.append(self._row(entrant, "of_bound", "%", [100 * bound_s / s for s in entrant.times]))
        return rows

    def ratio_rows(self, entrant: Entrant, metric: str, faster: list[float]) -> list[Row]:
        """How many times longer it takes than ours."""
        return [] if entrant.config.key == OURS else [self._row(entrant, metric, "x", [1 / f for f in faster])]

    def _row(self, entrant: Entrant, metric: str, unit: str, values: list[float]) -> Row:
        timer = "perf_counter" if self.device.type == "cpu" else "cuda_event"
        row = {"op": "fused_pass", "problem": self.problem, "backend": entrant.config.key, "metric": metric}
        row |= {"unit": unit, "cache": "cold" if self.cold else "warm", "timer": timer, "sqnr_db": entrant.sqnr_db}
        return row | record.percentiles(values)


def compared(tensors: Tensors, found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | str:
    """SQNR in dB of what the codes stand for, x_hat, or codes * scale; or what is wrong: a code that is further off
    than rounding can move it, too many that are, another scale or x_hat.
    """
    distance = (found[0].int() - expected[0].int()).abs()
    # Two multipliers on both sides of a rounded one stand for codes that are up to a step of the larger one apart.
    largest = 2 ** (8 - tensors.form.bits) + 1 if tensors.blocks else 1
    moved = float((distance > 0).float().mean())
    if distance.max() > largest or moved > MOST_MOVED:
        return f"{100 * moved:.2f} % of the codes differ, by up to {int(distance.max())}"
    if not torch.allclose(found[1], expected[1], rtol=1e-3, atol=0):
        return "the scales differ"
    if tensors.form.name == "activation":
        return sqnr(*[codes.float() * scale.view(-1, 1, 1) for codes, scale, _ in (found, expected)])
    off = (found[2].float() - expected[2].float()).abs()
    steps = float((off / expected[1].view(-1, 1, 1)).amax())
    part = float(off[distance == 0].max() / expected[2].float().abs().max())
    if steps > largest + 0.1 or part > 2e-4:
        return f"x_hat is {steps:.2f} steps off, and {part:.1e} of its range where codes are equal"
    return sqnr(found[2].float(), expected[2].float())


def problems(network: str, batches: Sequence[int], most: int) -> list[tuple[str, Pass, int, Form]]:
    """(name, pass, batch, form): of each kind of pass the `most` that move most bytes in a call."""
    kinds: dict[tuple[str, bool], list[tuple[int, Pass]]] = defaultdict(list)
    for item, count in pass_table(network).items():
        kinds[item.kind, bool(item.height)].append((count * item.rows * (item.channels + item.read_channels), item))
    items = [item for found in kinds.values() for _, item in sorted(found, key=lambda pair: -pair[0])[:most]]
    return [
        (f"{network}-{item}-b{batch}-{form}", item, batch, form)
        for batch in batches
        for item in items
        for form in FORMS
        if 13 * batch * item.rows * item.read_channels <= LARGEST_BYTES
    ]


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory of any size. As it is, it hands blocks of 32 MiB and more back to the system, and
    the temporaries of inductor's large passes cost a page fault per page in every call, which is up to five times the
    pass itself and no property of it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
