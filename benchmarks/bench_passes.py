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
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bounds, record
from benchmarks.pass_cases import CALL, FORMS, OURS, Case, Checked, Form, Piece, verified_pass, verified_piece
from benchmarks.passes import WAYS, Pass, pass_table
from benchmarks.shapes import NETWORKS
from modiff_kernels.evaluation import text_table
from modiff_kernels.evaluation.networks import choose_device

DEFAULT_NETWORKS = ("cifar10_small16", "ddpm_cifar10", "sd15")
KINDS = {"sd15": ("layer_norm", "geglu"), "sdxl": ("layer_norm", "geglu")}
"""Of which prologues passes are taken by default: those of residual blocks are in the small networks too."""
FLUSH_BYTES = 1 << 26  # above the last cache of a CPU's core complex and of a GPU
WARM_UP, LEAST_ROUNDS = 3, 7


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
