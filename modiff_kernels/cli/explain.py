"""`modiff explain`: what becomes of every layer of a model, and why."""

import argparse
import contextlib
import dataclasses
import json

from modiff_kernels.calibration.result import replace_file
from modiff_kernels.evaluation import command_line, networks, to_json
from modiff_kernels.evaluation.configurations import Quantised, row_of
from modiff_kernels.integrations.plans import state_bytes_of, traced_shapes

NOTES = """\
times are microseconds of a call after the first, SQNR is of the unit's output against float, state is x_hat and y_hat
in kB = 10^3 bytes, moved what a call of an estimated plan reads and writes; speed-up is against the unit in float;
"-": not measured"""


def run(args: argparse.Namespace) -> int:
    model = networks.open_model(args)
    row = row_of(args, model.name, plan=args.plan)
    shapes = None
    with contextlib.suppress(ValueError):  # of a UNet whose inputs cannot be made up
        samples, shapes = traced_shapes(model.unet, args.batch)
    handle = Quantised(model.unet, row, args.backend, args.granularity, args.max_state_bytes).handle
    size, state_bytes = "not known before a run", None
    if shapes is not None:
        state_bytes = state_bytes_of(handle.layers, handle.replaced, shapes)
        size = f"{state_bytes / 2**20:.1f} MiB in a run with samples {'x'.join(map(str, samples))}"
    print(handle.explain(size))
    if handle.plan is not None and not args.quiet:
        print(f"\n{NOTES}")
    if args.json:
        layers = [dataclasses.asdict(layer) for layer in handle.rows()]
        plan = None if handle.plan is None else json.loads(handle.plan.to_json())
        report = {"model": model.name, "layers": layers, "plan": plan, "config": handle.config.to_dict()}
        report |= {"batch": args.batch, "state_bytes": state_bytes, "command": command_line(args.argv)}
        replace_file(args.json, lambda new: new.write_text(to_json(report)))
    return 0
