"""`modiff sample`: images in one configuration.

Batches have a fixed composition, `--batch` consecutive seeds, and are dealt out to processes as a whole: a network may
round otherwise for another batch size (its kernels are chosen by shape), and scales per tensor see the whole batch."""

import argparse
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modiff_kernels.evaluation import UserError, images, networks
from modiff_kernels.evaluation.configurations import Quantised, row_of
from modiff_kernels.quant.checkpoint import encoded_layer

PLACE = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # what launchers set, and what no launcher means
OF_LAYERS = ("mode", "weight_bits", "act_bits", "granularity")


@dataclass(frozen=True)
class Process:
    """The place of this process among those of a launcher. local: its number on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def launched(cls) -> "Process":
        """As torchrun, and launchers built on it, say it in RANK, WORLD_SIZE and LOCAL_RANK; alone without them."""
        given = {name: os.environ.get(name) for name in PLACE}
        try:
            process = cls(*(alone if given[name] is None else int(given[name] or "") for name, alone in PLACE.items()))
        except ValueError:
            process = cls(-1)
        if not 0 <= process.rank < process.count or process.local < 0:
            shown = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UserError(f"{shown}: no launcher sets them so; start with torchrun, or unset them")
        return process


def run(args: argparse.Namespace) -> int:
    process = Process.launched()
    as_grid = args.out.suffix.lower() == ".png"
    if as_grid and process.count > 1:
        raise UserError(f"--out {args.out}: {process.count} processes cannot write one file; give a folder")
    if not as_grid and args.scale is not None:
        raise UserError(f"--scale {args.scale}: pictures in a folder keep their size; give a PNG file as --out")
    model = networks.open_model(args, low_bit=True, local=process.local if process.count > 1 else None)
    sampler = _Sampler(args, model)
    batch = min(args.batch, args.images)
    mine = range(process.rank, math.ceil(args.images / batch), process.count)
    batches = [range(args.seed + i * batch, args.seed + (i + 1) * batch) for i in mine]
    end = args.seed + args.images
    options = {} if as_grid else sampler.options()
    kept = {
        seed
        for seeds in ([] if as_grid else batches)
        for seed in seeds[: max(end - seeds.start, 0)]
        if images.is_kept(_path(args.out, seed), _options_of(seed, seeds, options))
    }
    batches = [seeds for seeds in batches if not kept.issuperset(seeds[: end - seeds.start])]
    started = time.perf_counter()
    grid: list[np.ndarray] = []
    count = 0
    name = f"sample {process.rank + 1}/{process.count}" if process.count > 1 else "sample"
    unit, length = ("step", model.calls) if networks.tells_steps(model) else ("run", 1)
    with tqdm(total=len(batches) * length, desc=name, unit=unit, disable=args.quiet, leave=False) as bar:
        for seeds in batches:
            # The last batch is a whole one too: its images beyond --images are dropped.
            for seed, image in zip(seeds, sampler.sample(seeds, bar.update)):
                if seed >= end or seed in kept:
                    continue
                count += 1
                if as_grid:
                    grid.append(image)
                else:
                    images.write_image(_path(args.out, seed), image, _options_of(seed, seeds, options))
    if as_grid:
        images.write_grid(args.out, grid, args.scale)
    if not args.quiet:
        place = f", process {process.rank + 1} of {process.count}" if process.count > 1 else ""
        already = f", {len(kept)} were there already" if kept else ""
        took = f"{time.perf_counter() - started:.1f} s"
        print(f"{count} images in {took} ({sampler.description()}{place}{already}): {args.out}")
    return 0


class _Sampler:
    def __init__(self, args: argparse.Namespace, model: networks.Model) -> None:
        self.args, self.model, self.unet = args, model, model.unet
        self.quantised: Quantised | None = None
        if model.handle is not None:
            reason = "the model was saved in low bits and is sampled with the configuration in its config.json"
            _refuse(args, (*OF_LAYERS, "backend", "schedule", "plan", "calibration"), reason)
            self.quantised, args.mode = Quantised.loaded(model.handle), "saved low-bit model"
            return
        if args.calibration is not None:
            _refuse(args, OF_LAYERS, f"the calibration {args.calibration} has modes and bits of the layers")
        args.mode, args.weight_bits, args.act_bits = args.mode or "modulated", args.weight_bits or 8, args.act_bits or 8
        if args.mode != "float" or args.schedule is not None or args.plan is not None:
            row = row_of(args, args.mode, schedule=args.schedule, plan=args.plan)
            self.quantised = Quantised(self.unet, row, args.backend, args.granularity, calibration=args.calibration)

    def options(self) -> dict[str, Any]:
        tensors = dict(self.unet.state_dict())
        for path, layer in self.quantised.handle.layers.items() if self.quantised else ():
            if layer.weight_bits is not None:
                tensors.update(encoded_layer(path, layer.stored()))
        options = {
            "model": self.model.name,
            "weights": images.tensors_crc32(tensors),
            "config": None if self.quantised is None else self.quantised.handle.config.to_dict(),
            "prompt": self.model.prompt,
            "scheduler": self.args.scheduler,
            "scheduler_config": {k: v for k, v in self.model.scheduler_config.items() if not k.startswith("_")},
            "steps": self.args.steps,
        }
        return json.loads(json.dumps(options, default=str))

    def sample(self, seeds: range, on_step: Callable[[], Any]) -> np.ndarray:
        run = self.quantised.sampling_run if self.quantised else contextlib.nullcontext
        of_run = (self.model, self.unet, self.args.scheduler, self.args.steps, seeds)
        pictures = networks.sample_images(*of_run, run=run, on_step=on_step)
        if not networks.tells_steps(self.model):
            on_step()
        if not np.isfinite(pictures).all():
            raise UserError("the images hold NaN; try another --scheduler or more --steps")
        return pictures

    def description(self) -> str:
        if self.quantised is None:
            return self.args.mode
        return f"{self.args.mode}, state {self.quantised.state_bytes / 1e6:.1f} MB, backend {self.quantised.backend}"


def _refuse(args: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    given = [name for name in names if getattr(args, name) != ("auto" if name == "backend" else None)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')}: {reason}; leave the option out")


def _options_of(seed: int, seeds: range, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "seed": seed, "batch": len(seeds), "batch_start": seeds.start}


def _path(folder: Path, seed: int) -> Path:
    return folder / f"image_{seed:04}.png"
