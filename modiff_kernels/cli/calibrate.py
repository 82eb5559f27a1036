"""`modiff calibrate`: the step schedule of a model, within a budget of fidelity or time, or its layer plan.

Weights and activation scales (`--method`) are in `calibrate_layers`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff_kernels.cli import calibrate_layers
from modiff_kernels.cli.arguments import writable
from modiff_kernels.cli.plan import measure_plan
from modiff_kernels.config.schedule import StepSchedule
from modiff_kernels.evaluation import UserError, command_line, networks, psnr
from modiff_kernels.evaluation.configurations import Quantised, Row
from modiff_kernels.planning.clock import host_timesteps
from modiff_kernels.planning.search import Found, computed_for_speedup, search
from modiff_kernels.planning.stored import FILE_NAME, run_of

__all__ = ["run"]

TIMED_RUNS = 3


def run(args: argparse.Namespace) -> int:
    if args.method is not None:
        return calibrate_layers.run(args)
    folder = Path(args.model) if args.model and Path(args.model).is_dir() else Path()
    if args.plan:
        if args.budget_db is not None or args.speedup is not None:
            raise UserError("--plan: --budget-db and --speedup are for a schedule; give --max-loss-db")
        return measure_plan(args, writable(args.out or folder / "modiff_plan.json"))
    if args.budget_db is None and args.speedup is None:
        raise UserError("with --schedule, one of the arguments --budget-db --speedup is required")
    out = writable(args.out or folder / FILE_NAME)
    networks.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = networks.load_model(args.model, args.prompt, networks.choose_device(args.device))
    calls = networks.check_steps(model, args.scheduler, args.steps)
    network = _Network(args, model)
    known = _Known(out.with_suffix(".partial.json"), args)
    computed, times = None, None
    if args.speedup is not None:
        times = network.seconds_per_call(calls)
        try:
            computed = computed_for_speedup(calls, args.speedup, *times)
        except ValueError as error:
            raise UserError(f"--speedup {args.speedup:g}: {error}") from error
    with tqdm(desc="search", unit="schedule", disable=args.quiet, leave=False, initial=len(known.values)) as bar:

        def on_evaluation(size: int) -> None:
            bar.set_postfix_str(f"{size} of {calls} calls")
            bar.update()
            known.save()

        try:
            found = search(
                network.fidelity_of(range(args.images)),
                calls,
                budget_db=args.budget_db,
                computed=computed,
                known=known.values,
                on_evaluation=on_evaluation,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    held_out_db = network.fidelity_of(range(args.images, 2 * args.images))(found.schedule)
    out.write_text(json.dumps(_report(args, model, calls, found, held_out_db, times), indent=1) + "\n")
    known.path.unlink(missing_ok=True)
    print(f"--schedule {str(found.schedule)!r}")
    print(
        f"{found.computed} of {calls} calls are computed; {found.fidelity_db:.1f} dB to the same network computed at "
        f"every call on the seeds of the search, {held_out_db:.1f} dB on others; written to {out}"
    )
    return 0


class _Network:
    """The accelerated model: pictures with and without a schedule, and times."""

    def __init__(self, args: argparse.Namespace, model: networks.Model) -> None:
        self.args = args
        self.model = model
        self.unet = model.unet.to(memory_format=torch.channels_last)
        act_bits = 32 if args.mode == "weight_only" else args.act_bits
        row = Row("calibrate", args.mode, args.mode, args.weight_bits, act_bits, schedule="forecast every=2")
        self.quantised = Quantised(self.unet, row, args.backend, args.granularity)

    def pictures(self, schedule: StepSchedule | None, indices: range) -> np.ndarray:
        self.quantised.handle.set_schedule(schedule)
        batches = [indices[start : start + self.args.batch] for start in range(0, len(indices), self.args.batch)]
        return np.concatenate([self._sample(batch) for batch in batches])

    def _sample(self, indices: range) -> np.ndarray:
        seeds = [self.args.seed + index for index in indices]
        args = (self.model, self.unet, self.args.scheduler, self.args.steps, seeds)
        return networks.sample_images(*args, run=self.quantised.sampling_run)

    def fidelity_of(self, indices: range):
        """Mean PSNR in dB of a schedule's pictures against those of the same network computed at every call."""
        dense = self.pictures(None, indices)
        return lambda schedule: float(psnr(self.pictures(schedule, indices), dense).mean())

    def seconds_per_call(self, calls: int) -> tuple[float, float]:
        """Of a computed and of a skipped call, the sampler's work included: medians of whole runs."""
        sparse = StepSchedule(f"U2H{calls - 2}")

        def timed(schedule: StepSchedule | None) -> float:
            started = time.perf_counter()
            self.pictures(schedule, range(self.args.batch))
            return time.perf_counter() - started

        timed(None)
        pairs = [(timed(None), timed(sparse)) for _ in range(TIMED_RUNS)]
        dense_s, sparse_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        update_s = dense_s / calls
        return update_s, max(sparse_s - 2 * update_s, 0.0) / (calls - 2)


class _Known:
    """Fidelities that an interrupted search of the same request has measured, by schedule."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        options = {
            key: str(value) for key, value in vars(args).items() if key not in ("argv", "quiet", "out", "threads")
        }
        self.request = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
        self.path = path
        self.values: dict[str, float] = {}
        if path.is_file():
            stored = json.loads(path.read_text())
            if stored["request"] == self.request:
                self.values = stored["fidelity_db"]

    def save(self) -> None:
        """Write through a second file, so that an interruption leaves a whole one."""
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"request": self.request, "fidelity_db": self.values}))
        new.replace(self.path)


def _report(
    args: argparse.Namespace,
    model: networks.Model,
    calls: int,
    found: Found,
    held_out_db: float,
    times: tuple[float, float] | None,
) -> dict[str, Any]:
    scheduler = networks.make_scheduler(model, args.scheduler)
    scheduler.set_timesteps(args.steps)
    return {
        "schedule": str(found.schedule),
        "model": model.name,
        "scheduler": args.scheduler,
        "steps": args.steps,
        "calls": calls,
        "calls_computed": found.computed,
        "fidelity_db": found.fidelity_db,
        "held_out_db": held_out_db,
        "images": args.images,
        "update_s": times and times[0],
        "skip_s": times and times[1],
        "command": command_line(args.argv),
        **run_of(scheduler, host_timesteps(scheduler)),
    }
