"""What benchmarks/bench_passes.py times: passes and pieces in all their forms, each checked against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import modiff_kernels as mk
from benchmarks.passes import WAYS, Pass, as_rows, plain_pass, prologue
from modiff_kernels import ops
from modiff_kernels.evaluation import sqnr
from modiff_kernels.ops import dispatch
from modiff_kernels.ops.problem import check
from modiff_kernels.quant.spec import block_count

EPS = 1e-6
OURS, EAGER, CALL = "ours", "torch", "torch.compile"
MOST_MOVED = 0.01
"""Part of the codes that float rounding may move: a norm's last bits move a value that lies between two codes."""
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
