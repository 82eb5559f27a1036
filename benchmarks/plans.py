"""Measures layer plans of the named networks on this device, and keeps them beside the results.

    python -m benchmarks plans --network cifar10_small16 ddpm_cifar10 --batch 8
    python -m benchmarks plans --network sd15 sdxl --batch 2 16 --device cuda --budget 500

A plan is what `make_plan` finds, at `--batch` samples of the UNet, along `--steps` steps of DDIM; with guidance that is
twice the number of images. It is written to `<results>/plans/<device>/<network>-b<batch>.json` as soon as it is
measured, where `steps` and `runs` find it, and from where `ModiffConfig(plan=PATH)`
takes it. It holds for this device and these shapes (docs/layer_plan.md). With random weights (all networks but the
shipped one) times are right and losses are not those of a trained network, so `--max-loss-db` says little there.

The smallest network and batch come first. One that fails, does not fit into memory or into the rest of the budget is
left out, which is told, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import modiff_kernels as mk
from benchmarks.configurations import plan_file
from benchmarks.pipelines import GUIDED, SAMPLERS, Workload
from benchmarks.runner import Session, add_options, attempt, free_memory
from benchmarks.shapes import NETWORKS, build_unet
from benchmarks.shared import quiet_libraries
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.integrations.plans import plan_text

STEPS = 8


def measured(network: str, unet: torch.nn.Module, batch: int, args: argparse.Namespace) -> LayerPlan:
    """The plan of `make_plan` for `batch` samples of `unet`, which is not changed."""
    guided = network in GUIDED and batch % 2 == 0
    workload = Workload(network, unet, SAMPLERS["ddim50"], batch // 2 if guided else batch, args.steps, guided)

    def pictures(candidate: torch.nn.Module) -> Any:
        """Latents are shown as if they were pixels: a measure of their error, no more."""
        found = workload.sample(workload.pipe(candidate)).float().cpu()
        found = found if workload.in_pixels else found / 2 + 0.5
        return found.clamp(0, 1).permute(0, 2, 3, 1).numpy()

    return mk.make_plan(
        unet,
        mk.ModiffConfig(act_bits=args.act_bits, backend=args.backend[0]),
        sample=pictures,
        max_loss_db=args.max_loss_db,
        rounds=args.rounds,
        use_cache=False,
        progress=not args.quiet,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="default: the shipped model")
    add("--batch", type=int, nargs="+", default=[8], help="samples of a UNet call, one or several (%(default)s)")
    add("--act-bits", type=int, default=8, choices=(3, 4, 8), help="of modulated units (%(default)s)")
    add("--steps", type=int, default=STEPS, help="of the trajectory, at least 3 (%(default)s)")
    add("--max-loss-db", type=float, default=0.5, help="to the best single mode (%(default)s)")
    add("--skip-existing", action="store_true", help="leave out plans whose files are there")
    add_options(parser, rounds=3)


def main(args: argparse.Namespace) -> int:
    if min(*args.batch, args.rounds, args.threads) < 1 or not 3 <= args.steps <= 50 or not args.max_loss_db > 0:
        raise SystemExit("plans: --batch, --rounds, --threads at least 1, --steps 3 to 50, --max-loss-db above 0")
    session = Session(args)
    quiet_libraries()
    for network in sorted(args.network, key=NETWORKS.index):
        unet = None
        for batch in sorted(args.batch):
            path = plan_file(session.device, network, batch, args.results / "plans")
            if args.skip_existing and path.exists():
                continue
            if unet is None:
                unet = build_unet(network, session.device).to(session.dtype, memory_format=torch.channels_last)
            make = lambda n=network, u=unet, b=batch: measured(n, u, b, args)  # noqa: E731
            plan = attempt(f"{network}, batch {batch}", make, session.budget)
            free_memory()
            if plan is None:
                session.failed += not session.budget.is_over
                session.left += session.budget.is_over
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(plan.to_json() + "\n")
            print(f"{path}\n{plan_text(plan)}\n", flush=True)
    return session.exit_code
