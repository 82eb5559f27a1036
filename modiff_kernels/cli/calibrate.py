"""`modiff calibrate`: weight codes and activation scales of a model, its step schedule, or its layer plan."""

import argparse
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modiff_kernels as mk
from modiff_kernels.calibration import METHODS
from modiff_kernels.calibration.result import replace_file
from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import UserError, command_line, networks, user_errors
from modiff_kernels.evaluation.configurations import Quantised, config_of_row, row_of
from modiff_kernels.integrations import plan_cache
from modiff_kernels.planning import stored

TIMED_RUNS = 3


def run(args: argparse.Namespace) -> int:
    folder = Path(args.model) if args.model and Path(args.model).is_dir() else Path()
    if args.method is not None:
        return _calibrate_layers(args, args.out or Path("calibration"))
    if args.plan:
        return _measure_plan(args, writable(args.out or folder / "modiff_plan.json"))
    return _fit_schedule(args, writable(args.out or folder / stored.FILE_NAME))


def _calibrate_layers(args: argparse.Namespace, folder: Path) -> int:
    options = _options(args.method, args.set)
    model = networks.open_model(args)
    with user_errors():
        config = config_of_row(row_of(args, "calibrate"), args.backend, args.granularity)
        if args.mode == "weight_only":
            config = dataclasses.replace(config, mode="modulated")
        config = dataclasses.replace(config, scale_mode=args.scale_mode, group_size=args.group_size)
        sampler = {
            "scheduler": networks.make_scheduler(model, args.scheduler),
            "sample": lambda seeds: networks.sample_images(model, model.unet, args.scheduler, args.steps, seeds),
        }
        options |= {name: getattr(args, name) for name in ("steps", "samples", "batch", "seed", "weights", "quiet")}
        result = mk.calibrate(model.unet, args.method, config, folder=folder, **sampler, **options)
        result.metadata["command"] = command_line(args.argv)
        result.save(folder)
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

    def sample(unet: Any) -> Any:
        return networks.sample_images(model, unet, args.scheduler, args.steps, seeds)

    with user_errors():
        row = row_of(args, "plan", plan=limited)
        config = config_of_row(row, args.backend, args.granularity, args.max_state_bytes)
        options = {"max_loss_db": args.max_loss_db, "rounds": args.rounds, "progress": not args.quiet}
        plan = mk.make_plan(model.unet, config, sample=sample, use_cache=False, **options)
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


def _fit_schedule(args: argparse.Namespace, out: Path) -> int:
    model = networks.open_model(args)
    run = (model, model.unet, args.scheduler)

    def pictures(seeds: Sequence[int], steps: int) -> Any:
        return networks.sample_images(*run, steps, seeds, latent=True)

    known = _Known(out.with_suffix(".partial.json"), args)
    evaluations, times = args.evaluations, {}
    if args.speedup is not None:
        times = _seconds_per_call(model, args)
        with user_errors(f"--speedup {args.speedup:g}: "):
            evaluations = computed_for_speedup(model.calls, args.speedup, **times)
    with user_errors():
        options = {name: getattr(args, name) for name in ("budget_db", "steps", "towards", "images", "seed", "quiet")}
        options |= {"scheduler": networks.make_scheduler(model, args.scheduler), "sample": pictures}
        options |= {"known": known.values, "on_progress": known.save}
        found = mk.fit_schedule(model.unet, evaluations, **options)
        about = {"model": model.name, "scheduler": args.scheduler, "steps": args.steps, **times}
        notes = {**about, **found.notes, "command": command_line(args.argv)}
        text = stored.add(out, found._replace(notes=notes))
    replace_file(out, lambda new: new.write_text(text))
    known.path.unlink(missing_ok=True)
    wanted = "the converged one" if args.towards == "converged" else "that of the same sampler with every call computed"
    print(f"--schedule {out}: {found.schedule.without_weights()}")
    print(
        f"{notes['evaluations']} of {model.calls} calls are computed; {notes['held_out_db']:.1f} dB to {wanted} on "
        f"pictures that the fit never saw, the polynomial {notes['polynomial_db']:.1f} dB; {notes['seconds']:.0f} s"
    )
    return 0


def computed_for_speedup(calls: int, speedup: float, update_s: float, skip_s: float) -> int:
    """Most calls that may be computed for a run `speedup` times as fast as one that computes all of them. update_s,
    skip_s: seconds of a call that is computed and of one that is not, sampler included. ValueError if below two."""
    allowed = calls * update_s / speedup
    computed = int((allowed - calls * skip_s) / (update_s - skip_s)) if update_s > skip_s else 0
    if computed < 2:
        most = calls * update_s / (2 * update_s + (calls - 2) * skip_s)
        raise ValueError(f"speed-up {speedup:g} is out of reach: two computed calls of {calls} give {most:.1f}")
    return min(computed, calls - 1)


def _seconds_per_call(model: networks.Model, args: argparse.Namespace) -> dict[str, float]:
    """update_s and skip_s of the network as --mode and the bits say: medians of whole runs."""
    row = row_of(args, args.mode, schedule="forecast every=2")
    quantised = Quantised(networks.share_copy(model.unet), row, args.backend, args.granularity)
    seeds = range(args.seed, args.seed + args.batch)

    def timed(schedule: mk.StepSchedule | None) -> float:
        quantised.handle.set_schedule(schedule)
        started = time.perf_counter()
        unet, run = quantised.handle.unet, quantised.sampling_run
        networks.sample_images(model, unet, args.scheduler, args.steps, seeds, run=run)
        return time.perf_counter() - started

    calls, sparse = model.calls, mk.StepSchedule(f"U2H{model.calls - 2}")
    timed(None)
    pairs = [(timed(None), timed(sparse)) for _ in range(TIMED_RUNS)]
    dense_s, sparse_s = map(statistics.median, zip(*pairs))
    update_s = dense_s / calls
    return {"update_s": update_s, "skip_s": max(sparse_s - 2 * update_s, 0.0) / (calls - 2)}


class _Known:
    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        unimportant = ("argv", "quiet", "out", "threads")
        options = {key: str(value) for key, value in vars(args).items() if key not in unimportant}
        self.request = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        self.path = path
        self.values: dict[str, Any] = {}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["request"] == self.request:
                self.values = found["known"]

    def save(self) -> None:
        text = json.dumps({"request": self.request, "known": self.values})
        replace_file(self.path, lambda new: new.write_text(text))
