"""`modiff explain`: what becomes of every layer of a model, and why."""

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path

import modiff_kernels as mk
from modiff_kernels.calibration.result import replace_file
from modiff_kernels.config.plan import FLOAT_MODE
from modiff_kernels.evaluation import UserError, command_line, networks, to_json
from modiff_kernels.evaluation.configurations import Quantised, row_of
from modiff_kernels.evaluation.table import SHORT, strip
from modiff_kernels.integrations.plans import state_bytes_of, traced_shapes
from modiff_kernels.planning.cost import LayerShape

NOTES = """\
times are microseconds of a call after the first, SQNR is of the unit's output against float, state is x_hat and y_hat
in kB = 10^3 bytes, moved what a call of an estimated plan reads and writes; speed-up is against the unit in float;
"-": not measured"""


def run(args: argparse.Namespace) -> int:
    if args.schedule is None:
        del args.steps  # which the scheduler of the model then need not be able to do
    model = networks.open_model(args)
    shapes = None
    with contextlib.suppress(ValueError):  # of a UNet whose inputs cannot be made up
        samples, shapes = traced_shapes(model.unet, args.batch)
    row = row_of(args, model.name, plan=None if shapes is None and args.plan == "auto" else args.plan)
    handle = Quantised(model.unet, row, args.backend, args.granularity, args.max_state_bytes).handle
    size, state_bytes = "not known before a run", None
    if shapes is not None:
        state_bytes = state_bytes_of(handle.layers, handle.replaced, shapes)
        size = f"{state_bytes / 2**20:.1f} MiB in a run with samples {'x'.join(map(str, samples))}"
    print(handle.explain(size))
    if handle.plan is not None and not args.quiet:
        print(f"\n{NOTES}")
    actions = "" if args.schedule is None else networks.actions_of(model, args.scheduler, args.steps, args.schedule)
    if actions and len(actions) <= SHORT:
        print(f"\n{actions.count('U')} of {len(actions)} calls are computed (#): {strip(actions)}")
    if args.plot:
        if shapes is None:
            raise UserError("--plot: the inputs of this UNet cannot be made up, so its state is not known")
        _draw(args.plot, f"{model.name}: state {size}", handle, shapes, actions)
    if args.json:
        layers = [dataclasses.asdict(layer) for layer in handle.rows()]
        plan = None if handle.plan is None else json.loads(handle.plan.to_json())
        report = {"model": model.name, "layers": layers, "plan": plan, "config": handle.config.to_dict()}
        report |= {"batch": args.batch, "state_bytes": state_bytes, "command": command_line(args.argv)}
        replace_file(args.json, lambda new: new.write_text(to_json(report)))
    return 0


def _draw(path: Path, title: str, handle: mk.Handle, shapes: dict[str, LayerShape], actions: str) -> None:
    from modiff_kernels.evaluation import report  # which imports matplotlib

    state = {unit: state_bytes_of(held, handle.replaced, shapes) for unit, held in handle.replaced.units().items()}
    times: dict[str, tuple[str, float | None, float | None]] = {}
    if (plan := handle.plan) is not None and plan.key is not None:
        title += f"; {plan.source} time with {'x'.join(map(str, plan.key.shape))}"
        for unit in plan.units:
            plain, chosen = (cost.time_us if cost else None for cost in map(unit.cost, (FLOAT_MODE, unit.mode)))
            times[unit.path] = str(unit.mode), plain, chosen
    report.save(report.layers(title, {**dict.fromkeys(times, 0), **state}, times, actions), path)
