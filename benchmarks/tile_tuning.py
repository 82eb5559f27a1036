"""What tools/tune_triton.py and tools/tune_cuda.py share: candidates of a product are a case of the runner, the fastest
one is kept per shape, and each has a row, the chosen one and its neighbours.
"""

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.bounds import PEAKS, peaks_of
from benchmarks.layers import Problem, problems_by_share
from benchmarks.runner import Case, Entrant, Measure, Row, Session, add_options
from benchmarks.shapes import NETWORKS, Layer
from benchmarks.timing import ColdTimer
from modiff_kernels import ops
from modiff_kernels.backends import reference
from modiff_kernels.quant.packing import pack
from modiff_kernels.tuned import Store

OP = "product_tile"
OVER_BEST = "estimate_over_best"
"""Metric: how much slower than the fastest candidate the one is that the estimate chooses."""
ROUNDS, SECONDS = 20, 0.02


class Scratch:
    """Tensors of one layer on `device`. operands: of a backend's product, which updates y_hat."""

    def __init__(self, layer: Layer, batch: int, weight_bits: int, device: torch.device) -> None:
        draw = torch.Generator(device).manual_seed(0)
        image = layer.kind == "conv"
        memory_format = torch.channels_last if image else torch.contiguous_format
        shape = (batch, layer.c_in, layer.h, layer.w) if image else (batch, layer.h, layer.c_in)
        values = torch.empty(shape, dtype=torch.float16, device=device, memory_format=memory_format)
        # Rounded Gaussians, as residuals are: the power that a multiplication draws depends on its operands.
        self.codes = values.normal_(0.0, 28.0, generator=draw).round_().clamp_(-128, 127).to(torch.int8)
        low = 1 << (weight_bits - 1)
        k = layer.c_in * layer.kernel**2
        rows = torch.randint(-low, low, (layer.c_out, k), dtype=torch.int8, generator=draw, device=device)
        self.weight = ops.PackedWeight(pack(rows, weight_bits), torch.ones(layer.c_out, device=device), weight_bits)
        sides = ((side,) * 2 for side in (layer.kernel, layer.stride, layer.padding))
        self.window = ops.Window(*sides) if image else None
        self.scale = torch.full((1,), 2.0**-12, device=device)  # keeps float16 finite; a power of two rounds nothing
        out_shape = (batch, layer.c_out, layer.h_out, layer.w_out) if image else (batch, layer.h, layer.c_out)
        self.y_hat = torch.empty(out_shape, dtype=torch.float16, device=device, memory_format=memory_format).zero_()
        state = (self.y_hat, None, None, self.window, torch.float16, False)
        self.operands = (self.codes, self.scale, None, self.weight, *state)
        self._ends = sorted({0, batch - 1})
        self._expected = self.y_hat[self._ends].clone()
        samples = (self.codes[self._ends], self.scale, None, self.weight, self._expected, *state[1:])
        reference.product(*samples)
        self._first: Tensor | None = None
        self.disputed = False

    def is_exact(self, update: Callable[[], object]) -> bool:
        """Whether `update` gives the reference's output for the first and the last sample, and for all samples what the
        first exact candidate gave; bit for bit, as all sums are integers times a power of two. Where candidates differ
        between the ends, `disputed` is set, as any of them may be wrong.
        """
        self.y_hat.zero_()
        update()
        if not torch.equal(self.y_hat[self._ends], self._expected):
            return False
        if self._first is None:
            self._first = self.y_hat.clone()
        same = torch.equal(self.y_hat, self._first)
        self.disputed |= not same
        return same


class Tunable(Protocol):
    """A backend's products, as the tuner sees them."""

    name: str
    store: Store[Any, Any]

    def shape(self, scratch: Scratch) -> Any:
        """The key of a problem."""

    def candidates(self, scratch: Scratch) -> Sequence[Any]:
        """All choices for a problem, the one that is estimated to be best first; empty if the backend has none."""

    def tile(self, candidate: Any) -> tuple[Any, int]:
        """The candidate's tile, and the number of its parts along K."""

    def update(self, scratch: Scratch, candidate: Any) -> Callable[[], object]:
        """One update of the scratch output by this candidate."""


def shortlist(candidates: Sequence[Any], tile_of: Callable[[Any], tuple[Any, int]]) -> list[Any]:
    """Of every tile the number of parts with the best estimate, half and twice as many, in the order of `candidates`:
    an estimate that is wrong about tiles is seldom wrong by more than that about parts.
    """
    best: dict[Any, int] = {}
    for candidate in candidates:
        tile, parts = tile_of(candidate)
        best.setdefault(tile, parts)

    def is_near(candidate: Any) -> bool:
        tile, parts = tile_of(candidate)
        return parts in (best[tile], best[tile] // 2, best[tile] * 2)

    return [candidate for candidate in candidates if is_near(candidate)]


class TileCase(Case):
    """The candidates of one problem. medians: microseconds of those that were timed."""

    def __init__(self, backend: Tunable, scratch: Scratch, problem: str) -> None:
        self.backend, self.scratch, self.problem = backend, scratch, problem
        self.timer = ColdTimer(ROUNDS, SECONDS)
        self.medians: dict[Any, float] = {}

    def make(self, candidate: Any) -> Callable[[], object]:
        return self.backend.update(self.scratch, candidate.choice)

    def verify(self, entrant: Entrant) -> float | str:
        return float("inf") if self.scratch.is_exact(entrant.subject) else "WRONG sums"

    def rows(self, entrant: Entrant) -> list[Row]:
        times = [1e6 * s for s in entrant.times]
        self.medians[entrant.config.choice] = statistics.median(times)
        return [self.row(entrant.config.key, "time", "us", times)]

    def row(self, backend: str, metric: str, unit: str, values: list[float]) -> Row:
        return record.row(OP, self.problem, backend, metric, unit, values, sqnr_db=float("inf"), **ColdTimer.columns)


def tune(session: Session, backend: Tunable, problem: Problem, weight_bits: int) -> tuple[Any, Any] | None:
    """(shape, fastest candidate) of a problem, or None where there is nothing to choose; stderr then says why."""
    layer, name = problem.layer, problem.name(weight_bits)
    if weight_bits != 8 and layer.kernel > 1 and layer.c_in % 8 != 0:
        return None  # a tap of a packed weight begins at a byte
    if session.known([(None, Measure(OP, name, OVER_BEST, 1.0, backend.name))]):
        return None
    scratch = Scratch(layer, problem.batch, weight_bits, session.device)
    ranked = backend.candidates(scratch)
    case = TileCase(backend, scratch, name)
    keys = {f"{backend.name}-{choice}": choice for choice in shortlist(ranked, backend.tile)}
    candidates = [SimpleNamespace(choice=own, key=key, name=key, compiled=False) for key, own in keys.items()]
    measures = [(candidate, Measure(OP, name, "time", 1e-6, candidate.key)) for candidate in candidates]
    session.run(name, lambda: case, measures, 1)
    if not case.medians or scratch.disputed or session.budget.is_over:
        reason = "its candidates differ" if scratch.disputed else "not all candidates were timed"
        print(f"{name}: {backend.name} has no choice for it, {reason}", file=sys.stderr)
        return None
    best = sorted(case.medians, key=case.medians.__getitem__)
    slower = case.medians.get(ranked[0], float("nan")) / case.medians[best[0]]
    session.keep([case.row(f"{backend.name}-{best[0]}", OVER_BEST, "x", [slower])])
    print(f"{name}  " + "  ".join(f"{choice} {case.medians[choice]:.1f} us" for choice in best[:3]), flush=True)
    return backend.shape(scratch), best[0]


def main(
    description: str,
    reason: str | None,
    backend_of: Callable[[torch.device], Tunable],
    about: Callable[[], dict[str, str]],
) -> int:
    """The command line of both tools. reason: why there is nothing to tune, or None; about: versions, for the file.
    Exit code 1: some candidates were wrong or failed; 2: nothing to tune; 3: the budget was spent first.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    tool = Path(sys.argv[0]).stem
    add("--network", nargs="+", default=["ddpm_cifar10"], choices=NETWORKS, help="whose layers (%(default)s)")
    add("--batch", type=int, nargs="+", default=[1, 2, 8], help="images (%(default)s)")
    add("--weight-bits", type=int, nargs="+", default=[8], choices=(3, 4, 8), help="default: %(default)s")
    add("--most", type=int, help="problems, those with the largest share of a step (default: all)")
    add("--dry-run", action="store_true", help="print the choices, write no file of choices")
    add_options(parser, rounds=1)
    parser.set_defaults(device="cuda")
    args = parser.parse_args()
    if reason is not None:
        print(f"{tool}: nothing to tune here: {reason}", file=sys.stderr)
        return 2
    session = Session(args)
    backend, name = backend_of(session.device), session.device_name
    choices = dict(backend.store.load(name))
    facts = {"torch": torch.__version__, "command": shlex.join(["python", f"tools/{tool}.py", *sys.argv[1:]])}
    with torch.inference_mode():
        for problem in problems_by_share(args.network, args.batch, peaks_of(name) or PEAKS["H200"])[: args.most]:
            for bits in args.weight_bits:
                if session.budget.is_over:
                    session.left += 1
                elif (found := tune(session, backend, problem, bits)) is not None:
                    choices[found[0]] = found[1]
                    if not args.dry_run:
                        backend.store.save(choices, name, {**about(), **facts})
    print(f"{len(choices)} choices; {session.failed} candidates wrong or failed, {session.left} left")
    return session.exit_code
