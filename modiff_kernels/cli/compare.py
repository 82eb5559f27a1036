"""`modiff compare`: the same images in several configurations; how close to full precision, and how fast."""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import statistics
import time
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from modiff_kernels import __version__
from modiff_kernels.cli.arguments import writable
from modiff_kernels.evaluation import (
    UserError,
    command_line,
    images,
    markdown_table,
    networks,
    psnr,
    ssim,
    text_table,
    to_json,
)
from modiff_kernels.evaluation.configurations import Quantised, Row, build_rows, select_rows
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

    def run(self, scheduler: Any):
        return self.quantised.sampling_run(scheduler) if self.quantised else contextlib.nullcontext()


def run(args: argparse.Namespace) -> int:
    outputs = _outputs(args)
    rows = select_rows(build_rows(args.weight_bits, args.act_bits, args.compile, args.schedule, args.plan), args.rows)
    networks.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = networks.choose_device(args.device)
    model = networks.load_model(args.model, args.prompt, device)
    calls = networks.check_steps(model, args.scheduler, args.steps)
    notes: list[str] = []
    configurations = _configurations(model, rows, args.backend, args.granularity)
    reference, configurations = _warm_up(args, model, configurations, notes)
    _measure(args, model, reference, configurations)
    report = _report(args, model, device, calls, reference, configurations, notes)
    cells = [table_cells(row) for row in report["rows"]]
    print(text_table(HEADER, cells))
    if not args.quiet:
        print("\n" + "\n".join(report["notes"]))
    shown = {c.row.name: np.concatenate(c.images)[: args.images] for c in configurations}
    if reference not in configurations:
        shown = {"full precision": np.concatenate(reference.images)[: args.images], **shown}
    for kind, path in outputs:
        if kind == "json":
            path.write_text(to_json(report))
        elif kind == "grid":
            images.image_grid(shown, path)
        else:
            notes_text = "\n".join(f"- {note}" for note in report["notes"])
            path.write_text(f"{markdown_table(HEADER, cells)}\n\n{notes_text}\n\n    {report['command']}\n")
    return 0


def _outputs(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """(kind, path) of every file to write, checked before the long work."""
    outputs = [("json", args.json), ("grid", args.grid)]
    if args.out:
        outputs += [
            ("json", args.out / "compare.json"),
            ("markdown", args.out / "compare.md"),
            ("grid", args.out / "compare_grid.png"),
        ]
    return [(kind, writable(path)) for kind, path in outputs if path]


def _configurations(
    model: networks.Model, rows: list[Row], backend: str, granularity: str | None
) -> list[Configuration]:
    """One UNet per row. All share the weights of one channels_last copy, the contiguous row keeps the original ones."""
    channels_last = copy.deepcopy(model.unet).to(memory_format=torch.channels_last)
    configurations = []
    for row in rows:
        if not row.channels_last:
            configurations.append(Configuration(row, model.unet))
            continue
        unet = networks.share_copy(channels_last)
        if row.compiled:
            unet.compile()
        quantised = None if row.mode == "float" else Quantised(unet, row, backend, granularity)
        configurations.append(Configuration(row, unet, quantised))
    return configurations


def _warm_up(
    args: argparse.Namespace, model: networks.Model, configurations: list[Configuration], notes: list[str]
) -> tuple[Configuration, list[Configuration]]:
    """Two steps of every configuration; leaves out a torch.compile that fails. Returns the reference and the rest."""
    kept = []
    started = time.perf_counter()
    for configuration in tqdm(configurations, desc="warm-up", unit="row", disable=args.quiet, leave=False):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _sample(args, model, configuration, range(args.batch), min(WARM_UP_STEPS, args.steps))
        except Exception as error:
            if not configuration.row.compiled:
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            notes.append(f"{configuration.row.name} is left out, torch.compile failed: {reason}")
            continue
        kept.append(configuration)
    notes.append(
        f"Warm-up of {min(WARM_UP_STEPS, args.steps)} steps a row, compilation included, took "
        f"{time.perf_counter() - started:.0f} s in all and is not counted."
    )
    reference = next((c for c in kept if c.row.mode == "float"), None)
    if reference is None:
        reference = Configuration(build_rows((), (), False)[0], model.unet)
    return reference, kept


def _sample(
    args: argparse.Namespace, model: networks.Model, configuration: Configuration, indices, steps: int, bar=None
):
    started = time.perf_counter()
    images = networks.sample_images(
        model,
        configuration.unet,
        args.scheduler,
        steps,
        [args.seed + index for index in indices],
        configuration.row.channels_last,
        configuration.run,
        bar.update if bar is not None else lambda: None,
    )
    return images, time.perf_counter() - started


def _measure(
    args: argparse.Namespace, model: networks.Model, reference: Configuration, configurations: list[Configuration]
) -> None:
    """Sample every batch `repeats` times, the configurations in turn; the images are those of the first time."""
    starts = range(0, args.images, args.batch)
    if reference not in configurations:
        for start in starts:
            images, _ = _sample(args, model, reference, range(start, start + args.batch), args.steps)
            reference.images.append(images)
    total = len(configurations) * len(starts) * args.repeats
    with tqdm(total=total, desc="sample", unit="run", disable=args.quiet, leave=False) as bar:
        for repeat in range(args.repeats):
            for start in starts:
                for configuration in configurations:
                    bar.set_postfix_str(configuration.row.key)
                    images, seconds = _sample(args, model, configuration, range(start, start + args.batch), args.steps)
                    configuration.seconds.append(seconds)
                    if repeat == 0:
                        if not np.isfinite(images).all():
                            raise UserError(
                                f"{configuration.row.name}: the images hold NaN; try another --scheduler or --steps"
                            )
                        configuration.images.append(images)
                    bar.update()


def _report(args, model, device, calls, reference, configurations, notes) -> dict[str, Any]:
    target = np.concatenate(reference.images)[: args.images]
    floats = {c.row.name: statistics.median(c.seconds) for c in configurations if c.row.mode == "float"}
    best = min(floats, key=floats.__getitem__) if floats else None
    rows = []
    for c in configurations:
        images = np.concatenate(c.images)[: args.images]
        time_s = statistics.median(c.seconds)
        is_reference = c is reference
        rows.append(
            {
                "name": c.row.name,
                "weight_bits": c.row.weight_bits,
                "act_bits": c.row.act_bits,
                "mode": c.row.mode,
                "psnr_db": None if is_reference else float(psnr(images, target).mean()),
                "ssim": 1.0 if is_reference else float(ssim(images, target).mean()),
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
        )
    runs = len(configurations[0].seconds)
    sampled = f"{model.name}, {args.scheduler}, {args.steps} steps ({calls} calls of the UNet), batch {args.batch}, "
    sampled += (
        f"{args.images} images from seed {args.seed} on; {device_name(device)}, {torch.get_num_threads()} threads."
    )
    timed = f"Times: median of {runs} whole sampling runs of a batch, the rows in turn. "
    timed += (
        f"Speed-up: against {best}, the fastest full-precision row." if best else "No full-precision row: no speed-up."
    )
    for c in configurations:
        if c.row.schedule is not None and c.quantised:
            first, *_ = c.quantised.handle.explain_schedule().splitlines()
            notes.append(f"{c.row.name}: {first}")
        if c.row.plan is not None and c.quantised:
            plan = c.quantised.handle.plan
            notes.append(f"{c.row.name} ({plan.source}): {plan.summary or 'as given'}")
    judged = f"PSNR and SSIM: mean over the images, against {reference.row.name}, same noise."
    return {
        "model": model.name,
        "device": device_name(device),
        "steps": args.steps,
        "batch": args.batch,
        "scheduler": args.scheduler,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "command": command_line(args.argv),
        "versions": _versions(),
        "images": args.images,
        "seed": args.seed,
        "unet_calls": calls,
        "runs_timed": runs,
        "speedup_against": best,
        "notes": [sampled, timed, judged, *notes],
    }


def _versions() -> dict[str, str]:
    versions = {"modiff_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "numpy", "scikit-image"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
