"""Single layers in every form, each verified before it is timed.

    python -m benchmarks layers --network ddpm_cifar10 --record
    python -m benchmarks layers --network sd15 sdxl --batch 8 --device cuda --backend cuda --most 12 --record
    python -m benchmarks layers --case machine --record

--case products (benchmarks/layers/products.py), or machine: the rates of plain torch. On a GPU one process should have
one of our backends: a kernel that loses the CUDA context takes with it what the process would have timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import bounds, record
from benchmarks.baselines.cutlass_int8.build import FOLDER as CUTLASS_FOLDER
from benchmarks.baselines.cutlass_int8.kernels import Cutlass
from benchmarks.layers import products
from benchmarks.layers.products import ProductCase
from benchmarks.runner import Measure, Session, add_options, attempt
from benchmarks.shapes import NETWORKS

CASES = ("products", "machine")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", nargs="+", default=["products"], choices=CASES, help="default: %(default)s")
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="whose layers (%(default)s)")
    add("--batch", type=int, nargs="+", default=[8], help="images, one or several (%(default)s)")
    add("--weight-bits", type=int, default=8, choices=(3, 4, 8), help="default: %(default)s")
    add(
        "--most", type=int, help="products: those with the largest share of a step (default: all); passes: of each kind"
    )
    add("--cutlass", type=Path, default=CUTLASS_FOLDER, help="folder of CUTLASS's built kernels (%(default)s)")
    add_options(parser, rounds=25)


def main(args: argparse.Namespace) -> int:
    session = Session(args)
    torch.backends.cudnn.benchmark = True
    run = {"products": _products, "machine": _machine}
    with torch.inference_mode():
        for case in args.case:
            run[case](session)
    return session.exit_code


def _products(session: Session) -> None:
    args, on_cuda = session.args, session.device.type == "cuda"
    backends = products.backends_here(args.backend, on_cuda)
    cutlass = Cutlass(args.cutlass) if on_cuda else None
    rates = bounds.peaks_of(session.device_name) or bounds.PEAKS["H200"]
    for problem in products.problems_by_share(args.network, args.batch, rates)[: args.most]:
        forms = products.forms_of(problem.layer, problem.batch, args.weight_bits, backends, on_cuda, bool(cutlass))
        names = [products.problem_name(problem, form.op, args.weight_bits) for form in forms]
        measures = [
            (form, Measure(form.op, name, "time", 1e-6, form.backend)) for form, name in zip(forms, names, strict=True)
        ]
        new = session.run(
            problem.name(args.weight_bits),
            lambda p=problem: ProductCase(
                p, args.weight_bits, session.device, session.device_name, args.rounds, cutlass
            ),
            measures,
            1 if on_cuda else args.rounds,
        )
        for row in new:
            if row["metric"] == "time":
                print(f"{row['problem']}  {row['op']}  {row['backend']}  {row['p50']:.1f} us", flush=True)


def _machine(session: Session) -> None:
    """The rates that this machine reaches in torch: ceilings beside the data sheet."""
    rates = attempt("machine", lambda: bounds.measured(session.device), session.budget)
    session.failed += rates is None
    for name, rate in rates.items() if rates else ():
        metric, unit, scale = ("bandwidth", "GB/s", 1e-9) if name == "copy" else ("rate", "TOPS", 1e-12)
        session.keep([record.row("machine", name, "torch", metric, unit, [rate * scale])])
        print(f"{name}  {rate * scale:.4g} {unit}", flush=True)
