"""Measures layer plans of the named networks on this device, and keeps them beside the results.

    python benchmarks/make_plans.py --network cifar10_small16 ddpm_cifar10 --batch 8
    python benchmarks/make_plans.py --network sd15 sdxl --batch 2 16 --device cuda --budget 500

A plan is what `make_plan` finds, at `--batch` samples of the UNet, along `--steps` steps of DDIM; with guidance that is
twice the number of images. It is written to `<results>/plans/<device>/<network>-b<batch>.json` as soon as it is
measured, where benchmarks/bench_unet_step.py and bench_sampling.py find it, and from where `ModiffConfig(plan=PATH)`
takes it. It holds for this device and these shapes (docs/layer_plan.md). With random weights (all networks but the
shipped one) times are right and losses are not those of a trained network, so `--max-loss-db` says little there.

The smallest network and batch come first. One that fails, does not fit into memory or into the rest of the budget is
left out, which is told, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modiff_kernels as mk
from benchmarks import record
from benchmarks.budget import Budget, attempt, free_memory
from benchmarks.configurations import default_dtype, plan_file
from benchmarks.pipelines import GUIDED, SAMPLERS, Workload
from benchmarks.shapes import NETWORKS, build_unet
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.evaluation.networks import choose_device, quiet_libraries
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
        mk.ModiffConfig(act_bits=args.act_bits, backend=args.backend),
        sample=pictures,
        max_loss_db=args.max_loss_db,
        rounds=args.rounds,
        use_cache=False,
        progress=not args.quiet,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--network", nargs="+", default=["cifar10_small16"], choices=NETWORKS, help="default: the shipped model")
    add(
        "--batch", type=int, nargs="+", default=[8], help="samples of a UNet call, one or several numbers (%(default)s)"
    )
    add("--act-bits", type=int, default=8, choices=(3, 4, 8), help="of modulated units (%(default)s)")
    add("--steps", type=int, default=STEPS, help="of the trajectory, at least 3 (%(default)s)")
    add("--rounds", type=int, default=3, help="how often it is timed (%(default)s)")
    add("--max-loss-db", type=float, default=0.5, help="to the best single mode (%(default)s)")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    add("--dtype", default=None, choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on cuda")
    add("--backend", default="auto")
    add("--budget", type=float, default=None, metavar="SECONDS", help="end after this time, with what is measured")
    add("--skip-existing", action="store_true", help="leave out plans whose files are there")
    add("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="plans are below (%(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args(argv)
    if min(*args.batch, args.rounds, args.threads) < 1 or not 3 <= args.steps <= 50 or not args.max_loss_db > 0:
        parser.error("--batch, --rounds, --threads must be at least 1, --steps 3 to 50, --max-loss-db above 0")
    budget = Budget(args.budget)
    torch.set_num_threads(args.threads)
    quiet_libraries()
    device = choose_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    complete = True
    for network in sorted(args.network, key=NETWORKS.index):
        unet = None
        for batch in sorted(args.batch):
            path = plan_file(device, network, batch, args.results / "plans")
            if args.skip_existing and path.exists():
                continue
            if unet is None:
                unet = build_unet(network, device).to(dtype, memory_format=torch.channels_last)
            plan = attempt(
                f"{network}, batch {batch}", lambda n=network, u=unet, b=batch: measured(n, u, b, args), budget
            )
            free_memory()
            complete &= plan is not None
            if plan is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(plan.to_json() + "\n")
                print(f"{path}\n{plan_text(plan)}\n", flush=True)
    return int(not complete)


if __name__ == "__main__":
    sys.exit(main())
