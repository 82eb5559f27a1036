"""`modiff calibrate`: weight codes and activation scales of a model, its step schedule, or its layer plan."""

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import modiff_kernels as mk
from modiff_kernels.calibration import METHODS
from modiff_kernels.calibration.result import replace_file
from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import UserError, command_line, networks, psnr, user_errors
from modiff_kernels.evaluation.configurations import Quantised, config_of_row, row_of
from modiff_kernels.integrations import plan_cache
from modiff_kernels.planning import stored
from modiff_kernels.planning.clock import host_timesteps
from modiff_kernels.planning.search import computed_for_speedup, search

TIMED_RUNS = 3


def run(args: argparse.Namespace) -> int:
    folder = Path(args.model) if args.model and Path(args.model).is_dir() else Path()
    if args.method is not None:
        return _calibrate_layers(args, args.out or Path("calibration"))
    if args.plan:
        return _measure_plan(args, writable(args.out or folder / "modiff_plan.json"))
    return _search_schedule(args, writable(args.out or folder / stored.FILE_NAME))


def _calibrate_layers(args: argparse.Namespace, folder: Path) -> int:
    options = _options(args.method, args.set)
    model = networks.open_model(args)
    with user_errors():
        config = config_of_row(row_of(args, "calibrate"), args.backend, args.granularity)
        if args.mode == "weight_only":
            config = dataclasses.replace(config, mode="modulated")
        config = dataclasses.replace(config, scale_mode=args.scale_mode, group_size=args.group_size)
        result = mk.calibrate(
            model.unet,
            args.method,
            config,
            folder=folder,
            **{name: getattr(args, name) for name in ("steps", "samples", "batch", "seed", "weights", "quiet")},
            scheduler=networks.make_scheduler(model, args.scheduler),
            sample=lambda seeds: networks.sample_images(model, model.unet, args.scheduler, args.steps, seeds),
            **options,
        )
    if not args.quiet:
        seconds = result.metadata["seconds"]
        print(f"{len(result.layers)} layers of {model.name} calibrated by {args.method} in {seconds} s: {folder}")
    return 0


def _options(method: str, items: list[str]) -> dict[str, Any]:
    types: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(METHODS[method].options)}
    options: dict[str, Any] = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in types:
            raise UserError(f"--set {item}: give NAME=VALUE, with one of the names {', '.join(types)}")
        try:
            options[name] = {"true": True, "false": False}[text] if types[name] is bool else types[name](text)
        except (ValueError, KeyError) as error:
            raise UserError(f"--set {item}: {name} is a {types[name].__name__}") from error
    return options


def _measure_plan(args: argparse.Namespace, out: Path) -> int:
    model = networks.open_model(args)
    seeds = range(args.seed, args.seed + args.batch)
    limited = None if args.max_state_bytes is None else "auto"  # a limit stands beside a plan
    with user_errors():
        plan = mk.make_plan(
            model.unet,
            config_of_row(row_of(args, "plan", plan=limited), args.backend, args.granularity, args.max_state_bytes),
            sample=lambda candidate: networks.sample_images(model, candidate, args.scheduler, args.steps, seeds),
            max_loss_db=args.max_loss_db,
            rounds=args.rounds,
            use_cache=False,
            progress=not args.quiet,
        )
    print(plan.describe())
    replace_file(out, lambda new: new.write_text(plan.to_json() + "\n"))
    try:
        plan_cache.store(plan)
    except OSError as error:
        raise UserError(f"written to {out}, but not to the cache {plan_cache.folder()}: {error}") from error
    if not args.quiet and plan.key is not None:
        shape = "x".join(map(str, plan.key.shape))
        print(f"\n--plan {out}, and plan='auto' for samples {shape} on {plan.key.device}")
    return 0


def _search_schedule(args: argparse.Namespace, out: Path) -> int:
    model = networks.open_model(args)
    calls, row = model.calls, row_of(args, args.mode, schedule="forecast every=2")
    quantised = Quantised(model.unet, row, args.backend, args.granularity)

    def pictures(schedule: mk.StepSchedule | None, first: int, count: int) -> np.ndarray:
        quantised.handle.set_schedule(schedule)
        seeds = range(args.seed + first, args.seed + first + count)
        batches = [seeds[start : start + args.batch] for start in range(0, count, args.batch)]
        run = (model, model.unet, args.scheduler, args.steps)
        return np.concatenate([networks.sample_images(*run, batch, run=quantised.sampling_run) for batch in batches])

    def fidelity_from(first: int) -> Callable[[mk.StepSchedule], float]:
        dense = pictures(None, first, args.images)
        return lambda schedule: float(psnr(pictures(schedule, first, args.images), dense).mean())

    known = _Known(out.with_suffix(".partial.json"), args)
    computed, times = None, None
    if args.speedup is not None:
        times = _seconds_per_call(lambda schedule: pictures(schedule, 0, args.batch), calls)
        with user_errors(f"--speedup {args.speedup:g}: "):
            computed = computed_for_speedup(calls, args.speedup, *times)
    with tqdm(desc="search", unit="schedule", disable=args.quiet, leave=False, initial=len(known.values)) as bar:

        def on_evaluation(size: int) -> None:
            bar.set_postfix_str(f"{size} of {calls} calls")
            bar.update()
            known.save()

        evaluate = fidelity_from(0)
        with user_errors():
            goal = {"budget_db": args.budget_db, "computed": computed}
            found = search(evaluate, calls, **goal, known=known.values, on_evaluation=on_evaluation)
    held_out_db = fidelity_from(args.images)(found.schedule)
    scheduler = networks.make_scheduler(model, args.scheduler)
    scheduler.set_timesteps(args.steps)
    report = {
        "schedule": str(found.schedule),
        "model": model.name,
        **{name: getattr(args, name) for name in ("scheduler", "steps", "images")},
        "calls": calls,
        "calls_computed": found.computed,
        "fidelity_db": found.fidelity_db,
        "held_out_db": held_out_db,
        **dict(zip(("update_s", "skip_s"), times or (None, None))),
        "command": command_line(args.argv),
        **stored.run_of(scheduler, host_timesteps(scheduler)),
    }
    replace_file(out, lambda new: new.write_text(json.dumps(report, indent=1) + "\n"))
    known.path.unlink(missing_ok=True)
    print(f"--schedule {str(found.schedule)!r}")
    print(
        f"{found.computed} of {calls} calls are computed; {found.fidelity_db:.1f} dB to the same network computed at "
        f"every call on the seeds of the search, {held_out_db:.1f} dB on others; written to {out}"
    )
    return 0


def _seconds_per_call(run: Callable[[mk.StepSchedule | None], Any], calls: int) -> tuple[float, float]:
    """Of a computed and of a skipped call, the sampler's work included: medians of whole runs."""
    sparse = mk.StepSchedule(f"U2H{calls - 2}")

    def timed(schedule: mk.StepSchedule | None) -> float:
        started = time.perf_counter()
        run(schedule)
        return time.perf_counter() - started

    timed(None)
    pairs = [(timed(None), timed(sparse)) for _ in range(TIMED_RUNS)]
    dense_s, sparse_s = map(statistics.median, zip(*pairs))
    update_s = dense_s / calls
    return update_s, max(sparse_s - 2 * update_s, 0.0) / (calls - 2)


class _Known:
    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        unimportant = ("argv", "quiet", "out", "threads")
        options = {key: str(value) for key, value in vars(args).items() if key not in unimportant}
        self.request = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        self.path = path
        self.values: dict[str, float] = {}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["request"] == self.request:
                self.values = found["fidelity_db"]

    def save(self) -> None:
        text = json.dumps({"request": self.request, "fidelity_db": self.values})
        replace_file(self.path, lambda new: new.write_text(text))
