"""`modiff compare`: the same images in several configurations; how close to full precision, and how fast."""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff_kernels import __version__
from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import UserError, command_line, markdown_table, networks, psnr, ssim, text_table, to_json
from modiff_kernels.evaluation.configurations import Quantised, Row, build_rows, select_rows
from modiff_kernels.evaluation.images import image_grid
from modiff_kernels.evaluation.table import HEADER, table_cells
from modiff_kernels.integrations.plan_cache import device_name

__all__ = ["run"]

WARM_UP_STEPS = 2


@dataclass
class Configuration:
    """A row that is being measured: its UNet, the images so far and the times of its runs."""

    row: Row
    unet: Any
    quantised: Quantised | None = None
    images: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, scheduler: Any) -> contextlib.AbstractContextManager[Any]:
        """One sampling run."""
        return self.quantised.sampling_run(scheduler) if self.quantised else contextlib.nullcontext()

    def shown(self, images: int) -> np.ndarray:
        """The first `images` images."""
        return np.concatenate(self.images)[:images]


def run(args: argparse.Namespace) -> int:
    outputs = _outputs(args)
    rows = select_rows(build_rows(args.weight_bits, args.act_bits, args.compile, args.schedule, args.plan), args.rows)
    model = networks.open_model(args)
    calls = networks.check_steps(model, args.scheduler, args.steps)
    configurations, notes = _warm_up(args, model, _configurations(args, model, rows))
    reference = next((c for c in configurations if c.row.mode == "float"), None)
    extra = reference is None  # no row of full precision was asked for
    reference = reference or Configuration(build_rows((), (), False)[0], model.unet)
    _measure(args, model, configurations, reference if extra else None)
    report = _report(args, model, calls, reference, configurations, notes)
    cells = [table_cells(row) for row in report["rows"]]
    print(text_table(HEADER, cells))
    if not args.quiet:
        print("\n" + "\n".join(report["notes"]))
    shown = {"full precision": reference.shown(args.images)} if extra else {}
    shown |= {c.row.name: c.shown(args.images) for c in configurations}
    for kind, path in outputs:
        if kind == "json":
            path.write_text(to_json(report))
        elif kind == "grid":
            image_grid(shown, path)
        else:
            notes_text = "\n".join(f"- {note}" for note in report["notes"])
            path.write_text(f"{markdown_table(HEADER, cells)}\n\n{notes_text}\n\n    {report['command']}\n")
    return 0


def _outputs(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(kind, path) of every file to write, checked before the long work."""
    outputs = [("json", args.json), ("grid", args.grid)]
    if args.out:
        names = {"json": "compare.json", "markdown": "compare.md", "grid": "compare_grid.png"}
        outputs += [(kind, args.out / name) for kind, name in names.items()]
    return [(kind, writable(path)) for kind, path in outputs if path]


def _configurations(args: argparse.Namespace, model: networks.Model, rows: Sequence[Row]) -> list[Configuration]:
    """One UNet per row. All share the weights of one channels_last copy, the contiguous row keeps the original ones."""
    channels_last = copy.deepcopy(model.unet).to(memory_format=torch.channels_last)
    configurations = []
    for row in rows:
        unet = networks.share_copy(channels_last) if row.channels_last else model.unet
        if row.compiled:
            unet.compile()
        quantised = None if row.mode == "float" else Quantised(unet, row, args.backend, args.granularity)
        configurations.append(Configuration(row, unet, quantised))
    return configurations


def _warm_up(
    args: argparse.Namespace, model: networks.Model, configurations: Sequence[Configuration]
) -> tuple[list[Configuration], list[str]]:
    """Two steps of every configuration. Returns those whose torch.compile did not fail, and notes."""
    kept, notes = [], []
    started = time.perf_counter()
    steps = min(WARM_UP_STEPS, args.steps)
    for configuration in tqdm(configurations, desc="warm-up", unit="row", disable=args.quiet, leave=False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _sample(args, model, configuration, 0, steps)
        except Exception as error:
            if not configuration.row.compiled:
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            notes.append(f"{configuration.row.name} is left out, torch.compile failed: {reason}")
            continue
        kept.append(configuration)
    seconds = time.perf_counter() - started
    taken = f"compilation included, took {seconds:.0f} s in all and is not counted."
    return kept, [*notes, f"Warm-up of {steps} steps a row, {taken}"]


def _sample(
    args: argparse.Namespace, model: networks.Model, configuration: Configuration, first: int, steps: int
) -> tuple[np.ndarray, float]:
    """The batch whose first image has index `first`, and the seconds that it took."""
    started = time.perf_counter()
    seeds = range(args.seed + first, args.seed + first + args.batch)
    channels_last, run = configuration.row.channels_last, configuration.run
    images = networks.sample_images(model, configuration.unet, args.scheduler, steps, seeds, channels_last, run)
    return images, time.perf_counter() - started


def _measure(
    args: argparse.Namespace,
    model: networks.Model,
    configurations: Sequence[Configuration],
    extra: Configuration | None,
) -> None:
    """Sample every batch `repeats` times, the configurations in turn; the images are those of the first time.

    extra: a reference that is not timed.
    """
    starts = range(0, args.images, args.batch)
    if extra is not None:
        extra.images = [_sample(args, model, extra, start, args.steps)[0] for start in starts]
    turns = [(repeat, start, c) for repeat in range(args.repeats) for start in starts for c in configurations]
    for repeat, start, configuration in (bar := tqdm(turns, "sample", unit="run", disable=args.quiet, leave=False)):
        bar.set_postfix_str(configuration.row.key)
        images, seconds = _sample(args, model, configuration, start, args.steps)
        configuration.seconds.append(seconds)
        if not np.isfinite(images).all():
            name = configuration.row.name
            raise UserError(f"{name}: the images hold NaN; try another --scheduler or --steps")
        if repeat == 0:
            configuration.images.append(images)


def _report(
    args: argparse.Namespace,
    model: networks.Model,
    calls: int,
    reference: Configuration,
    configurations: Sequence[Configuration],
    notes: Sequence[str],
) -> dict[str, Any]:
    target = reference.shown(args.images)
    floats = {c.row.name: statistics.median(c.seconds) for c in configurations if c.row.mode == "float"}
    best = min(floats, key=lambda name: floats[name], default=None)

    def measured(c: Configuration) -> dict[str, Any]:
        time_s, is_reference = statistics.median(c.seconds), c is reference

        def mean(metric: Callable[[Any, Any], np.ndarray]) -> float:
            return float(metric(c.shown(args.images), target).mean())

        return {
            "name": c.row.name,
            "weight_bits": c.row.weight_bits,
            "act_bits": c.row.act_bits,
            "mode": c.row.mode,
            "psnr_db": None if is_reference else mean(psnr),
            "ssim": 1.0 if is_reference else mean(ssim),
            "time_s": time_s,
            "speedup": floats[best] / time_s if best else None,
            "state_bytes": c.quantised.state_bytes if c.quantised else 0,
            "backend": c.quantised.backend if c.quantised else "torch",
            "s_per_image": time_s / args.batch,
            "time_min_s": min(c.seconds),
            "time_max_s": max(c.seconds),
            "average_bits": c.quantised.average_bits(calls) if c.quantised else 32.0,
            "is_reference": is_reference,
            "schedule": c.row.schedule,
            "plan": c.row.plan,
            "calls_computed": c.quantised.calls_computed(calls) if c.quantised else calls,
        }

    device = device_name(next(model.unet.parameters()).device)
    threads, runs = torch.get_num_threads(), len(configurations[0].seconds)
    fastest = f"against {best}, the fastest full-precision row" if best else "none, for there is no full-precision row"
    of_rows = []
    for c in configurations:
        if c.row.schedule is not None and c.quantised:
            of_rows.append(f"{c.row.name}: {c.quantised.handle.explain_schedule().splitlines()[0]}")
        if c.row.plan is not None and c.quantised and (plan := c.quantised.handle.plan):
            of_rows.append(f"{c.row.name} ({plan.source}): {plan.summary or 'as given'}")
    return {
        "model": model.name,
        "device": device,
        "steps": args.steps,
        "batch": args.batch,
        "scheduler": args.scheduler,
        "threads": threads,
        "rows": [measured(c) for c in configurations],
        "command": command_line(args.argv),
        "versions": _versions(),
        "images": args.images,
        "seed": args.seed,
        "unet_calls": calls,
        "runs_timed": runs,
        "speedup_against": best,
        "notes": [
            f"{model.name}, {args.scheduler}, {args.steps} steps ({calls} calls of the UNet), batch {args.batch}, "
            f"{args.images} images from seed {args.seed} on; {device}, {threads} threads.",
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
