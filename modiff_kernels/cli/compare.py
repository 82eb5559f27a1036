"""`modiff compare`: the same images in several configurations; how close to full precision, and how fast."""

import argparse
import contextlib
import copy
import dataclasses
import platform
import statistics
import time
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff_kernels import __version__
from modiff_kernels.calibration.result import replace_file
from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import UserError, command_line, markdown_table, networks, psnr, ssim, text_table, to_json
from modiff_kernels.evaluation import report as pictures
from modiff_kernels.evaluation.configurations import Quantised, Row, build_rows
from modiff_kernels.evaluation.table import HEADER, SHORT, strip, table_cells
from modiff_kernels.integrations.plan_cache import device_name

WARM_UP_STEPS = 2
FILES = {"json": "compare.json", "markdown": "compare.md", "grid": "compare_grid.png", "html": "compare.html"}
FILES |= {"scatter": "speed_quality.png"}  # in the folder --out


class Configuration:
    def __init__(self, args: argparse.Namespace, model: networks.Model, row: Row, unet: Any) -> None:
        self.args, self.model, self.row, self.unet = args, model, row, unet
        self.quantised = None if row.mode == "float" else Quantised(unet, row, args.backend, args.granularity)
        self.images: list[np.ndarray] = []
        self.seconds: list[float] = []
        if row.compiled:
            unet.compile()

    def sample(self, first: int, steps: int) -> np.ndarray:
        run = self.quantised.sampling_run if self.quantised else contextlib.nullcontext
        seeds = range(self.args.seed + first, self.args.seed + first + self.args.batch)
        of_run = (self.args.scheduler, steps, seeds, self.row.channels_last, run)
        if self.quantised and self.row.schedule is not None:  # which is for whole runs
            handle = self.quantised.handle
            handle.set_schedule(handle.config.schedule if steps == self.args.steps else None)
        return networks.sample_images(self.model, self.unet, *of_run)

    def measure(self, first: int, keep: bool) -> None:
        started = time.perf_counter()
        images = self.sample(first, self.args.steps)
        self.seconds.append(time.perf_counter() - started)
        if not np.isfinite(images).all():
            raise UserError(f"{self.row.name}: the images hold NaN; try another --scheduler or --steps")
        if keep:
            self.images.append(images)

    def shown(self) -> np.ndarray:
        return np.concatenate(self.images)[: self.args.images]

    def results(self, reference: "Configuration", best_s: float | None) -> dict[str, Any]:
        """The row of the report. best_s: seconds of the fastest full precision."""
        own, calls, is_reference = self.quantised, self.model.calls, self is reference
        time_s = statistics.median(self.seconds)
        return {
            **dataclasses.asdict(self.row),
            "schedule": self.row.schedule and self.row.schedule.split(" weights=")[0],
            "psnr_db": None if is_reference else psnr(self.shown(), reference.shown()).mean(),
            "ssim": 1.0 if is_reference else ssim(self.shown(), reference.shown()).mean(),
            "time_s": time_s,
            "time_min_s": min(self.seconds),
            "time_max_s": max(self.seconds),
            "s_per_image": time_s / self.args.batch,
            "speedup": best_s / time_s if best_s else None,
            "state_bytes": own.state_bytes if own else 0,
            "backend": own.backend if own else "torch",
            "average_bits": own.average_bits(calls) if own else 32.0,
            "calls": calls,
            "actions": "".join(action[0].upper() for action in own.handle.actions()) if own else "",
            "calls_computed": own.calls_computed(calls) if own else calls,
            "is_reference": is_reference,
        }


def run(args: argparse.Namespace) -> int:
    outputs = {"json": args.json, "grid": args.grid, "html": args.html}
    paths = [(kind, path) for kind, path in outputs.items() if path]
    paths += [(kind, writable(args.out / name)) for kind, name in FILES.items() if args.out]  # before the long work
    model = networks.open_model(args, channels_last=False)
    # All share the weights of one channels_last copy, the contiguous row keeps the original ones.
    shared = copy.deepcopy(model.unet).to(memory_format=torch.channels_last)
    unets = [networks.share_copy(shared) if row.channels_last else model.unet for row in args.rows]
    made = [Configuration(args, model, row, unet) for row, unet in zip(args.rows, unets)]
    configurations, notes = _warm_up(args, made)
    starts = range(0, args.images, args.batch)
    reference = next((c for c in configurations if c.row.mode == "float"), None)
    if reference is None:  # no row of full precision was asked for
        reference = Configuration(args, model, build_rows((), (), False)[0], model.unet)
        for start in starts:
            reference.measure(start, keep=True)
    turns = [(repeat, start, c) for repeat in range(args.repeats) for start in starts for c in configurations]
    for repeat, start, configuration in (bar := tqdm(turns, "sample", unit="run", disable=args.quiet, leave=False)):
        bar.set_postfix_str(configuration.row.key)
        configuration.measure(start, keep=repeat == 0)
    report = _report(reference, configurations, notes)
    cells = [table_cells(row) for row in report["rows"]]
    print(text_table(HEADER, cells))
    if not args.quiet:
        print("\n" + "\n".join(report["notes"]))
        for row in (row for row in report["rows"] if 0 < len(row["actions"]) <= SHORT):
            print(f"{row['name']}, computed (#) and predicted calls: {strip(row['actions'])}")
    listed = "\n".join(f"- {note}" for note in report["notes"])
    markdown = f"{markdown_table(HEADER, cells)}\n\n{listed}\n\n    {report['command']}\n"
    images = {c.row.name: c.shown() for c in (reference, *configurations)}
    exact = next((row for row in report["rows"] if row["is_reference"]), None) or reference.results(reference, None)
    for kind, path in paths:
        if kind == "grid":
            pictures.sheet(path, exact, pictures.drawn(report["rows"]), images)
        elif kind == "html":
            pictures.page(path, report, exact, images)
        elif kind == "scatter":
            pictures.save(pictures.scatter(report["rows"]), path)
        else:
            text = to_json(report) if kind == "json" else markdown
            replace_file(path, partial(Path.write_text, data=text))
    return 0


def _warm_up(args: argparse.Namespace, made: Sequence[Configuration]) -> tuple[list[Configuration], list[str]]:
    """Two steps of every configuration. Returns those whose torch.compile did not fail, and notes."""
    kept, notes = [], []
    started, steps = time.perf_counter(), min(WARM_UP_STEPS, args.steps)
    for configuration in tqdm(made, desc="warm-up", unit="row", disable=args.quiet, leave=False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                configuration.sample(0, steps)
            kept.append(configuration)
        except Exception as error:
            if not configuration.row.compiled:
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            notes.append(f"{configuration.row.name} is left out, torch.compile failed: {reason}")
    taken = f"took {time.perf_counter() - started:.0f} s in all and is not counted."
    return kept, [*notes, f"Warm-up of {steps} steps a row, compilation included, {taken}"]


def _report(reference: Configuration, configurations: Sequence[Configuration], notes: Sequence[str]) -> dict[str, Any]:
    args, model = reference.args, reference.model
    floats = {c.row.name: statistics.median(c.seconds) for c in configurations if c.row.mode == "float"}
    best = min(floats, key=lambda name: floats[name], default=None)
    fastest = f"against {best}, the fastest full-precision row" if best else "none, for there is no full-precision row"
    device, threads = device_name(next(model.unet.parameters()).device), torch.get_num_threads()
    runs = len(configurations[0].seconds)
    of_rows = []
    for row, own in ((c.row, c.quantised) for c in configurations if c.quantised):
        if row.schedule is not None:
            of_rows.append(f"{row.name}: {own.handle.explain_schedule().splitlines()[0]}")
        if row.plan is not None and (plan := own.handle.plan):
            of_rows.append(f"{row.name} ({plan.source}): {plan.summary or 'as given'}")
    return {
        "model": model.name,
        "device": device,
        **{name: getattr(args, name) for name in ("steps", "batch", "scheduler", "images", "seed")},
        "threads": threads,
        "rows": [c.results(reference, floats[best] if best else None) for c in configurations],
        "command": command_line(args.argv),
        "versions": _versions(),
        "unet_calls": model.calls,
        "runs_timed": runs,
        "speedup_against": best,
        "notes": [
            f"{model.name}, {args.scheduler}, {args.steps} steps ({model.calls} calls of the UNet), "
            f"batch {args.batch}, {args.images} images from seed {args.seed} on; {device}, {threads} threads.",
            f"Times: median of {runs} whole sampling runs of a batch, the rows in turn. Speed-up: {fastest}.",
            f"PSNR and SSIM: mean over the images, against {reference.row.name}, same noise.",
            *notes,
            *of_rows,
        ],
    }


def _versions() -> dict[str, str]:
    versions = {"modiff_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "numpy", "scikit-image"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
