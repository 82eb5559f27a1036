"""`modiff explain`: what becomes of every layer of a model, and why."""

import argparse
import dataclasses
import json

from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import UserError, command_line, networks, to_json
from modiff_kernels.evaluation.configurations import Quantised, row_of

NOTES = """\
times are microseconds of a call after the first, SQNR is of the unit's output against float, state is x_hat and y_hat
in kB = 10^3 bytes; speed-up is against the unit in float; "-": not measured"""


def run(args: argparse.Namespace) -> int:
    if args.mode in ("float", "weight_only"):
        if args.plan not in (None, "auto"):
            raise UserError(f"--plan {args.plan}: --mode {args.mode} has no low bits to plan; give --mode modulated")
        args.plan = None
    out = writable(args.json) if args.json else None
    model = networks.open_model(args)
    row = row_of(args, model.name, plan=args.plan)
    handle = Quantised(model.unet, row, args.backend, args.granularity, args.max_state_bytes).handle
    print(handle.explain())
    if handle.plan is not None and not args.quiet:
        print(f"\n{NOTES}")
    if out is not None:
        layers = [dataclasses.asdict(layer) for layer in handle.rows()]
        plan = None if handle.plan is None else json.loads(handle.plan.to_json())
        report = {"model": model.name, "layers": layers, "plan": plan, "config": handle.config.to_dict()}
        out.write_text(to_json({**report, "command": command_line(args.argv)}))
    return 0
