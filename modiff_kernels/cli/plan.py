"""`modiff calibrate --plan`: a mode for every layer of a model, measured on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import modiff_kernels as mk
from modiff_kernels.evaluation import UserError, networks
from modiff_kernels.evaluation.configurations import Row, config_of_row
from modiff_kernels.integrations import plan_cache
from modiff_kernels.integrations.plans import plan_text

__all__ = ["measure_plan"]


def measure_plan(args: argparse.Namespace, out: Path) -> int:
    """Measure, print, and write to `out` and to the cache."""
    networks.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = networks.load_model(args.model, args.prompt, networks.choose_device(args.device))
    networks.check_steps(model, args.scheduler, args.steps)
    unet = model.unet.to(memory_format=torch.channels_last)
    seeds = range(args.seed, args.seed + args.batch)
    act_bits = 32 if args.mode == "weight_only" else args.act_bits
    limited = None if args.max_state_bytes is None else "auto"  # a limit stands beside a plan
    row = Row("plan", args.mode, args.mode, args.weight_bits, act_bits, plan=limited)
    try:
        plan = mk.make_plan(
            unet,
            config_of_row(row, args.backend, args.granularity, args.max_state_bytes),
            sample=lambda candidate: networks.sample_images(model, candidate, args.scheduler, args.steps, seeds),
            max_loss_db=args.max_loss_db,
            rounds=args.rounds,
            use_cache=False,
            progress=not args.quiet,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    out.write_text(plan.to_json() + "\n")
    try:
        plan_cache.store(plan)
    except OSError as error:
        raise UserError(f"written to {out}, but not to the cache {plan_cache.folder()}: {error}") from error
    print(plan_text(plan))
    if not args.quiet:
        print(f"\n--plan {out}, and plan='auto' for samples {'x'.join(map(str, plan.key.shape))} on {plan.key.device}")
    return 0
