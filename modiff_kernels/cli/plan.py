"""`modiff calibrate --plan`: a mode for every layer of a model, measured on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import modiff_kernels as mk
from modiff_kernels.cli import models
from modiff_kernels.cli.arguments import UserError
from modiff_kernels.cli.quantised import config_of_row
from modiff_kernels.cli.rows import Row
from modiff_kernels.evaluation import text_table
from modiff_kernels.integrations import plan_cache
from modiff_kernels.planning.layer_plan import LayerPlan

__all__ = ["measure_plan", "plan_text"]


def measure_plan(args: argparse.Namespace, out: Path) -> int:
    """Measure, print, and write to `out` and to the cache."""
    models.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = models.load_model(args.model, args.prompt, models.choose_device(args.device))
    models.check_steps(model, args.scheduler, args.steps)
    unet = model.unet.to(memory_format=torch.channels_last)
    seeds = range(args.seed, args.seed + args.batch)
    act_bits = 32 if args.mode == "weight_only" else args.act_bits
    limited = None if args.max_state_bytes is None else "auto"  # a limit stands beside a plan
    row = Row("plan", args.mode, args.mode, args.weight_bits, act_bits, plan=limited)
    try:
        plan = mk.make_plan(
            unet,
            config_of_row(row, args.backend, args.granularity, args.max_state_bytes),
            sample=lambda candidate: models.sample_images(model, candidate, args.scheduler, args.steps, seeds),
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


def plan_text(plan: LayerPlan) -> str:
    """Decision, whole plans and table of units."""
    header, rows = plan.table()
    candidates = [f"  {candidate}" for candidate in plan.candidates]
    return "\n".join([f"plan ({plan.source}): {plan.summary or 'as given'}", *candidates, text_table(header, rows)])
