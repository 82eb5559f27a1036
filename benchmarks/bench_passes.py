"""Every hand-fused quantising pass against the same pass left to inductor, and both around the product that follows.

    python benchmarks/bench_passes.py --network ddpm_cifar10 --batch 1 8 --record
    python benchmarks/bench_passes.py --network sd15 --device cuda --batch 1 8

Ours is the backend's kernel as layers call it in a run: planned once, without checks. `inductor-*` is the compiled
graph itself, without the guards and wrappers around a call, because a compiled network pays for them once per call of
the network; it is written in two ways (benchmarks/passes.py), the faster one counts. `torch.compile` is the second way
as a function of its own, guards included: what a block that is not compiled would have. All update an x_hat of their
own in place; ours looks for NaN besides. Everything is verified against the backend reference first, then the forms
take turns, another one first in each round.

Cache "warm" repeats a call on the same tensors. "cold" has x_hat and y_hat in memory and everything else in the caches,
as in a network whose state is larger than they are and whose last product has just written h: before each timed call a
buffer larger than the caches is written, and the same form is called on a second state.

*Pieces* are a pass with the product that reads it. Ours: both kernels, skip connection in the product's epilogue.
`graph-obvious`, `graph-tuned`: one compiled graph of the plain pass, our product as an opaque op, and the addition of
the skip connection in plain torch; `graph-epilogue`: the same with the skip connection in our product; `graph-ours`:
both our ops in a compiled graph. q, k and v have no skip connection, but `graph-three`: a product for each of them on
the same codes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modiff_kernels as mk
from benchmarks import bounds, record
from benchmarks.passes import WAYS, Pass, as_rows, pass_table, plain_pass, prologue
from benchmarks.shapes import NETWORKS
from modiff_kernels import ops
from modiff_kernels.cli.models import choose_device
from modiff_kernels.evaluation import sqnr, text_table
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import check
from modiff_kernels.quant.spec import block_count

EPS = 1e-6
OURS, EAGER, CALL = "ours", "torch", "torch.compile"
DEFAULT_NETWORKS = ("cifar10_small16", "ddpm_cifar10", "sd15")
KINDS = {"sd15": ("layer_norm", "geglu"), "sdxl": ("layer_norm", "geglu")}
"""Of which prologues passes are taken by default: those of residual blocks are in the small networks too."""
MOST_MOVED = 0.01
"""Part of the codes that float rounding may move: a norm's last bits move a value that lies between two codes."""
FLUSH_BYTES = 1 << 26  # above the last cache of a CPU's core complex and of a GPU
WARM_UP, LEAST_ROUNDS = 3, 7
LEAST_SQNR_DB = 50.0
"""Of the output of a piece: a code that is one off changes its neighbourhood by a step of the residual."""


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


class Case:
    """Tensors of a pass and its calls. Every form has an x_hat of its own, all the same to begin with."""

    def __init__(self, item: Pass, batch: int, form: Form, device: torch.device, backend: str = "auto") -> None:
        self.item, self.form, self.backend = item, form, backend
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
        name = {"identity": "quantize", "group_norm": "group_norm_silu_quantize"}.get(
            item.prologue, f"{item.prologue}_quantize"
        )
        self.op_name = f"{name}_{form.name}"
        self.op = getattr(ops, self.op_name)

    def _shaped(self, rows: Tensor) -> Tensor:
        """Rows as the image or tokens that they are."""
        if not self.item.height:
            return rows
        return rows.unflatten(1, (self.item.height, self.item.width)).permute(0, 3, 1, 2)

    def arguments(self, x_hat: Tensor, backend: str) -> tuple[Any, ...]:
        """Of our op, all by position."""
        item, form = self.item, self.form
        before: tuple[Any, ...] = {
            "group_norm": (self.shift, self.gamma, self.beta, item.groups, EPS, item.silu),
            "layer_norm": (self.gamma, self.beta, EPS),
        }.get(item.prologue, ())
        if form.name == "activation":
            return (self.h, *before, form.bits, form.granularity, True, backend)
        packed = (False,) if item.prologue == "identity" else ()
        return (self.h, *before, x_hat, None, form.bits, form.granularity, 1.0, *packed, backend)

    def chosen_backend(self) -> str:
        """Whose kernel `ours` is."""
        arguments = dict(zip(self.argument_names(), self.arguments(self.state, self.backend)))
        return dispatch.select(check(self.op_name, arguments), self.backend).backend

    def argument_names(self) -> list[str]:
        """Of our op, without backend."""
        op = getattr(torch.ops.modiff, self.op_name).default
        return [argument.name for argument in op._schema.arguments][:-1]

    def ours(self, x_hat: Tensor, backend: str | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """The kernel on its arguments."""
        arguments = self.arguments(x_hat, backend or self.backend)
        kernel, arguments = self.op.plan(*arguments), arguments[:-1]
        return lambda: kernel(*arguments)

    def plain_arguments(self, x_hat: Tensor) -> tuple[Any, ...]:
        """Of the pass in plain torch: views of the same tensors, as rows."""
        return as_rows(self.h, self.blocks), as_rows(x_hat, self.blocks), self.shift, self.gamma, self.beta

    def plain(self, way: str) -> Callable[..., tuple[Tensor, ...]]:
        """The pass in plain torch, a function of `plain_arguments`."""
        return plain_pass(self.item, self.form.bits, self.form.name, way, EPS)

    def result(self, call: Callable[[], tuple[Tensor, ...]], x_hat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and x_hat, codes and x_hat as rows, after one call into memory that held something else."""
        poison(self.state)
        codes, scale, _ = call()
        codes = as_rows(codes, False) if codes.shape == self.state.shape else codes.flatten(1, -2)
        return codes, scale, as_rows(x_hat, False)

    def moved_bytes(self) -> int:
        """What the pass has to read and write at least: h, x_hat twice, codes."""
        state = 2 * self.state.nbytes if self.form.name == "residual" else 0
        return self.h.nbytes + state + self.state.numel()


def poison(like: Tensor) -> None:
    """Leave something in the memory that the allocator hands out next for codes of `like`."""
    torch.full(like.shape, 0x55, dtype=torch.int8, device=like.device)


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


@dataclass
class Checked:
    """Calls that take turns, the same on a second state, and what each was found to be."""

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]]
    sqnr_db: dict[str, float]
    moved: dict[str, float]


def verified_pass(case: Case) -> Checked:
    """All forms of a pass, checked against the reference. AssertionError on a wrong one."""
    torch._dynamo.reset()  # functions of all cases have one code, and only a few compilations of it are kept
    names = (OURS, *(f"inductor-{way}" for way in WAYS), CALL, EAGER)
    states = {name: (case.state.clone(), case.state.clone()) for name in names}
    arguments = {name: tuple(case.plain_arguments(x_hat) for x_hat in states[name]) for name in names}
    graphs = {way: Compiled(case.plain(way), *arguments[f"inductor-{way}"][0]) for way in WAYS}
    calls = {
        OURS: (case.ours(states[OURS][0]), case.ours(states[OURS][1])),
        CALL: tuple(partial(graphs["tuned"].function, *own) for own in arguments[CALL]),
        EAGER: tuple(partial(case.plain("obvious"), *own) for own in arguments[EAGER]),
    }
    for way, graph in graphs.items():
        one, two = arguments[f"inductor-{way}"]
        calls[f"inductor-{way}"] = graph.bound(), graph.bound((one[1], two[1]))
    x_hat = case.state.clone()
    expected = case.result(case.ours(x_hat, "reference"), x_hat)
    checked = Checked(calls, {}, {})
    for name, (call, _) in calls.items():
        found = case.result(call, states[name][0])
        checked.moved[name], checked.sqnr_db[name] = agreement(name, case, found, expected)
    return checked


def agreement(
    name: str, case: Case, found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]
) -> tuple[float, float]:
    """Part of the codes that differ, and SQNR in dB of what the codes stand for: x_hat, or codes * scale.

    AssertionError if a code is further off than rounding can move it, too many are, or scale or x_hat differ.
    """
    where = f"{name}, {case.item} {case.form}"
    distance = (found[0].int() - expected[0].int()).abs()
    # Two multipliers on both sides of a rounded one stand for codes that are up to a step of the larger one apart.
    largest = 2 ** (8 - case.form.bits) + 1 if case.blocks else 1
    assert distance.max() <= largest, f"{where}: codes are {int(distance.max())} off, at most {largest} expected"
    moved = float((distance > 0).float().mean())
    assert moved <= MOST_MOVED, f"{where}: {100 * moved:.2f} % of the codes differ, at most {100 * MOST_MOVED:g} %"
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0, msg=lambda text: f"{where}, scale: {text}")
    if case.form.name == "activation":
        values = [codes.float() * scale.view(-1, 1, 1) for codes, scale, _ in (found, expected)]
        return moved, sqnr(*values)
    step = expected[1].view(-1, 1, 1)
    off = ((found[2].float() - expected[2].float()).abs() / step).amax()
    assert off <= largest + 0.1, f"{where}: x_hat is {off:.2f} steps off, at most {largest} expected"
    same = distance == 0
    off = ((found[2].float() - expected[2].float()).abs()[same] / expected[2].float().abs().max()).max()
    assert off <= 2e-4, f"{where}: x_hat is {off:.1e} of its range off where codes are equal"
    return moved, sqnr(found[2].float(), expected[2].float())


def measure(checked: Checked, seconds: float, cold: bool, device: torch.device) -> dict[str, list[float]]:
    """Microseconds of every call, in turns, another one first in each round, for about `seconds`."""
    cuda = device.type == "cuda"
    flush = torch.zeros(FLUSH_BYTES, dtype=torch.int8, device=device)
    times: dict[str, list[Any]] = {name: [] for name in checked.calls}
    names = list(checked.calls)
    started, index = time.perf_counter(), 0
    while index < WARM_UP + LEAST_ROUNDS or time.perf_counter() - started < seconds:
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            call, other = checked.calls[name]
            if cold:
                flush.add_(1)
                other()
            elapsed = _event_pair(call) if cuda else _elapsed_us(call)
            if index >= WARM_UP:
                times[name].append(elapsed)
        index += 1
    if cuda:
        torch.cuda.synchronize()
        return {name: [1e3 * a.elapsed_time(b) for a, b in pairs] for name, pairs in times.items()}
    return times


def _elapsed_us(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def _event_pair(call: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    return begin, end


class Piece:
    """A pass and the product that reads it: the second convolution of a residual block with its skip connection, or
    the stacked projection of q, k and v.
    """

    def __init__(self, item: Pass, batch: int, form: Form, device: torch.device, backend: str = "auto") -> None:
        self.case = case = Case(item, batch, form, device, backend)
        self.backend, self.conv = backend, bool(item.height)
        generator = torch.Generator().manual_seed(1)
        k, n = item.channels * (9 if self.conv else 1), item.channels * (1 if self.conv else 3)
        weight_q = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator).to(device)
        self.weight_scale = torch.full((n,), 1 / (127 * k**0.5), device=device)
        self.side = (3, 3) if self.conv else (1, 1)
        self.geometry = (self.side, (1, 1), (1, 1), (1, 1), 1) if self.conv else ()
        suffix = "conv2d" if self.conv else "linear"
        shape = {"kernel_size": self.side, "stride": (1, 1), "padding": (1, 1)} if self.conv else {}
        self.layout = ops.preferred_layout(
            f"accumulate_{suffix}", device, n=n, k=k, weight_bits=8, backend=backend, **shape
        )
        self.op = getattr(ops, f"accumulate_{suffix}")
        self.portable = ops.pack_weight(weight_q, 8)
        self.stacked = [self._prepared(weight_q)]
        self.parts = [self._prepared(part) for part in weight_q.split(item.channels)]
        y_hat, skip = torch.randn(2, batch, item.rows, n, generator=generator).to(device, case.state.dtype)
        self.y_hat = case._shaped(y_hat)
        self.skip = case._shaped(skip) if self.conv else None

    def _prepared(self, weight_q: Tensor) -> Tensor:
        packed = ops.pack_weight(weight_q.contiguous(), 8)
        return ops.prepare_weight(
            packed, 8, *weight_q.shape, layout_to=self.layout, kernel_size=self.side, backend=self.backend
        )

    def __str__(self) -> str:
        return f"{self.case.item}+{'conv3x3' if self.conv else 'qkv'}"

    def pair(self, x_hat: Tensor, y_hat: Tensor, reference: bool = False) -> Callable[[], Tensor]:
        """Pass and product, planned as layers do. The product adds the skip, or leaves y_hat to its reader."""
        backend = "reference" if reference else self.backend
        packed, layout = (self.portable, "kpack_v1") if reference else (self.stacked[0], self.layout)
        first = self.case.ours(x_hat, backend)
        codes, scale, _ = self.case.ours(x_hat.clone(), backend)()
        rest = (packed, self.weight_scale, y_hat, self.skip, 8, -1, layout, *self.geometry, y_hat.dtype, self.conv)
        kernel = self.op.plan(codes, scale, *rest, backend)

        def call() -> Tensor:
            codes, scale, _ = first()
            out = kernel(codes, scale, *rest)
            return out if self.conv else y_hat

        return call

    def graph(self, way: str | None, epilogue: bool, split: bool) -> Callable[..., list[Tensor]]:
        """A function (h, x_hat, *y_hats) to compile. way None: the pass is our op, and h and x_hat are no rows.
        epilogue: the product adds the skip. split: three products for q, k and v.
        """
        case, item = self.case, self.case.item
        plain = case.plain(way) if way else None
        weights = self.parts if split else self.stacked
        scales = self.weight_scale.split(len(self.weight_scale) // len(weights))
        inside = self.skip if epilogue else None

        def run(h: Tensor, x_hat: Tensor, *y_hats: Tensor) -> list[Tensor]:
            if plain is None:
                codes, scale, _ = case.op(*case.arguments(x_hat, self.backend))
            else:
                codes, scale, _ = plain(h, x_hat, case.shift, case.gamma, case.beta)
                codes = case._shaped(codes.reshape(codes.shape[0], item.rows, item.channels))
            outs = []
            for y_hat, packed, part in zip(y_hats, weights, scales):
                weight = (packed, part, y_hat, inside, 8, -1, self.layout)
                write_out = inside is not None
                out = self.op(codes, scale, *weight, *self.geometry, y_hat.dtype, write_out, self.backend)
                outs.append(out if write_out else y_hat + self.skip if self.conv else y_hat.view(y_hat.shape))
            return outs

        return run


def verified_piece(piece: Piece) -> Checked:
    """All forms of a piece, their outputs checked against the reference. AssertionError on a wrong one."""
    case = piece.case

    def fresh() -> tuple[Tensor, Tensor]:
        return case.state.clone(), piece.y_hat.clone()

    expected = piece.pair(*fresh(), reference=True)()
    torch._dynamo.reset()
    checked = Checked({OURS: (piece.pair(*fresh()), piece.pair(*fresh()))}, {}, {})
    readers: dict[str, Callable[[Any], Tensor]] = {OURS: lambda out: out}
    graphs: dict[str, tuple[str | None, bool, bool]] = {
        **{f"graph-{way}": (way, False, False) for way in WAYS},
        **({"graph-epilogue": ("tuned", True, False)} if piece.conv else {"graph-three": ("tuned", False, True)}),
        "graph-ours": (None, True, False),
    }
    for name, (way, epilogue, split) in graphs.items():
        states = []
        for x_hat, y_hat in (fresh(), fresh()):
            y_hats = [part.contiguous() for part in y_hat.split(case.item.channels, -1)] if split else [y_hat]
            states.append([x_hat if way is None else as_rows(x_hat, case.blocks), *y_hats])
        h = case.h if way is None else as_rows(case.h, case.blocks)
        graph = Compiled(piece.graph(way, epilogue, split), h, *states[0])
        checked.calls[name] = graph.bound(), graph.bound(*zip(*states))
        y_hats = states[0][1:]
        readers[name] = (lambda out: out[-1]) if piece.conv else (lambda out, y_hats=y_hats: torch.cat(y_hats, -1))
    for name, (call, _) in checked.calls.items():
        poison(case.state)
        checked.sqnr_db[name] = found = sqnr(readers[name](call()).float(), expected.float())
        assert found >= LEAST_SQNR_DB, f"{name}, {piece}: {found:.1f} dB to the reference, at least {LEAST_SQNR_DB:g}"
    return checked


def selected(network: str, kinds: tuple[str, ...] | None, most: int) -> list[Pass]:
    """Passes of the network: of each kind the `most` that move most bytes in a call."""
    by_kind: dict[tuple[str, bool], list[tuple[int, Pass]]] = defaultdict(list)
    for item, count in pass_table(network).items():
        if kinds is None or item.prologue in kinds:
            size = count * item.rows * (item.channels + item.read_channels)
            by_kind[item.kind, bool(item.height)].append((size, item))
    return [
        item for found in by_kind.values() for _, item in sorted(found, key=lambda pair: pair[0], reverse=True)[:most]
    ]


def is_rival(form: str) -> bool:
    """Whether this is a form of inductor's that our pass would be given up for."""
    return form in {f"{kind}-{way}" for kind in ("inductor", "graph") for way in WAYS}


def result_rows(
    op: str,
    problem: str,
    checked: Checked,
    times: dict[str, list[float]],
    cold: bool,
    kernel: str,
    bound_us: float | None,
    timer: str,
) -> list[dict[str, Any]]:
    """Rows for record.append: the time of every form, inductor's over ours call by call, our share of the bound, and
    how many codes the best form of inductor's rounds otherwise than the reference.
    """
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min((name for name in times if is_rival(name)), key=medians.__getitem__)
    rows = []

    def add(name: str, metric: str, unit: str, values: list[float]) -> None:
        rows.append(
            {
                "op": op,
                "problem": problem,
                "backend": kernel if name == OURS else name,
                "metric": metric,
                "unit": unit,
                "cache": "cold" if cold else "warm",
                "timer": timer,
                "sqnr_db": checked.sqnr_db[name],
                "verified": True,
                **record.percentiles(values),
            }
        )

    for name, values in times.items():
        add(name, "time", "us", values)
        if name in (best, CALL) or name.startswith("graph-"):
            add(name, "over_ours", "x", [a / b for a, b in zip(values, times[OURS], strict=True)])
    if bound_us is not None:
        add(OURS, "of_bound", "%", [100 * bound_us / value for value in times[OURS]])
        add(best, "moved_codes", "%", [100 * checked.moved[best]])
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """A line per problem and cache."""
    table: dict[tuple[str, str], dict[tuple[str, str], dict]] = defaultdict(dict)
    for row in rows:
        table[row["problem"], row["cache"]][row["backend"], row["metric"]] = row
    lines = []
    for (problem, cache), found in table.items():
        times = [f"{backend} {row['p50']:.1f}" for (backend, metric), row in found.items() if metric == "time"]
        ratios = {backend: row for (backend, metric), row in found.items() if metric == "over_ours"}
        best = min((name for name in ratios if is_rival(name)), key=lambda name: found[name, "time"]["p50"])
        ratio = ratios[best]
        spread = f"{ratio['p50']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
        rest = [
            next((f"{row['p50']:.{digits}f}" for (_, name), row in found.items() if name == metric), "-")
            for metric, digits in (("of_bound", 0), ("moved_codes", 3))
        ]
        lines.append((problem, cache, spread, *rest, ", ".join(times)))
    return text_table(("problem", "cache", "best inductor/ours", "ours: % of bound", "% of codes moved", "us"), lines)


def problems(args: argparse.Namespace, network: str) -> list[tuple[Pass, int, Form, bool]]:
    """(pass, batch, form, whether with the product after it) to time."""
    most = args.most or (3 if network in KINDS else 1)
    items = selected(network, KINDS.get(network), most)
    found = []
    for batch in args.batch:
        for item in items:
            for form in FORMS:
                if 13 * batch * item.rows * item.read_channels <= args.largest_mib << 20:
                    found.append((item, batch, form, False))
            if item.prologue == "group_norm" and (item.shift or not item.height):
                found += [(item, batch, form, True) for form in FORMS if form.name == "residual"]
    return [problem for problem in found if args.part in ("both", "pieces" if problem[3] else "passes")]


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory of any size. As it is, it hands blocks of 32 MiB and more back to the system, and
    the temporaries of inductor's large passes cost a page fault per page in every call, which is up to five times the
    pass itself and no property of it.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", action="append", choices=NETWORKS, help=f"may be given twice (default: {DEFAULT_NETWORKS})")
    add("--batch", type=int, nargs="+", default=[1, 8], help="images (%(default)s)")
    add("--most", type=int, help="passes of each kind, those that move most (default: 1, of large networks 3)")
    add("--largest-mib", type=int, default=400, help="leave out what moves more (%(default)s)")
    add("--part", choices=("both", "passes", "pieces"), default="both")
    add("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    add("--seconds", type=float, default=0.25, help="time for the calls of a problem and cache (%(default)s)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    add("--backend", default="auto", help="of our ops")
    add("--record", action="store_true", help="append the rows to benchmarks/results")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if min(*args.batch, args.threads) < 1:
        parser.error("--batch and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    keep_freed_memory()
    bandwidth = bounds.machine(device)[0].bandwidth
    networks = args.network or DEFAULT_NETWORKS
    todo = [(network, *problem) for network in networks for problem in problems(args, network)]
    rows: list[dict[str, Any]] = []
    failed = False
    with torch.no_grad():
        for network, item, batch, form, with_product in tqdm(todo, unit="problem", disable=args.quiet, leave=False):
            try:
                rows += timed(network, item, batch, form, with_product, device, bandwidth, args)
            except AssertionError as error:
                print(f"not timed: {error}", file=sys.stderr)
                failed = True
    print(show(rows))
    if args.record:
        path = record.results_file(device=torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        print(f"recorded in {record.append(rows, path)}")
    return int(failed)


def timed(
    network: str, item: Pass, batch: int, form: Form, with_product: bool, device: torch.device, bandwidth: float,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one problem. AssertionError if a form is wrong."""
    if with_product:
        piece = Piece(item, batch, form, device, args.backend)
        case, checked, name, bound_us = piece.case, verified_piece(piece), f"{piece}", None
    else:
        case = Case(item, batch, form, device, args.backend)
        checked, name = verified_pass(case), f"{item}"
        bound_us = 1e6 * case.moved_bytes() / bandwidth
    rows, timer = [], "cuda_event" if device.type == "cuda" else "perf_counter"
    for cache in args.cache:
        times = measure(checked, args.seconds, cache == "cold", device)
        op, problem = ("fused_piece" if with_product else "fused_pass"), f"{network}-{name}-b{batch}-{form}"
        rows += result_rows(op, problem, checked, times, cache == "cold", case.chosen_backend(), bound_us, timer)
    return rows


if __name__ == "__main__":
    sys.exit(main())
