"""`modiff sample`: images in one configuration."""

from __future__ import annotations

import argparse
import contextlib
import math
import time

import numpy as np
import torch
from tqdm import tqdm

from modiff_kernels.cli import models
from modiff_kernels.cli.arguments import UserError, writable
from modiff_kernels.cli.quantised import Quantised
from modiff_kernels.cli.rows import Row

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    as_grid = args.out.suffix.lower() == ".png"
    paths = [args.out] if as_grid else [args.out / f"image_{args.seed + i:04}.png" for i in range(args.images)]
    writable(paths[0])
    models.quiet_libraries()
    if args.threads:
        torch.set_num_threads(args.threads)
    model = models.load_model(args.model, args.prompt, models.choose_device(args.device))
    calls = models.check_steps(model, args.scheduler, args.steps)
    unet = model.unet.to(memory_format=torch.channels_last)
    quantised = None
    if args.mode != "float" or args.schedule is not None:
        act_bits = 32 if args.mode == "weight_only" else args.act_bits
        row = Row("sample", args.mode, args.mode, args.weight_bits, act_bits, schedule=args.schedule)
        quantised = Quantised(unet, row, args.backend, args.granularity, args.calibration)
    images = []
    started = time.perf_counter()
    batches = math.ceil(args.images / args.batch)
    unit, total = ("step", batches * calls) if model.pipe is None else ("run", batches)
    with tqdm(total=total, desc="sample", unit=unit, disable=args.quiet, leave=False) as bar:
        for first in range(0, args.images, args.batch):
            seeds = range(args.seed + first, args.seed + min(first + args.batch, args.images))
            around = quantised.sampling_run if quantised else contextlib.nullcontext
            images.append(
                models.sample_images(
                    model,
                    unet,
                    args.scheduler,
                    args.steps,
                    seeds,
                    run=around,
                    on_step=bar.update if model.pipe is None else lambda: None,
                )
            )
            if model.pipe is not None:
                bar.update()
    seconds = time.perf_counter() - started
    pictures = np.concatenate(images)
    if not np.isfinite(pictures).all():
        raise UserError("the images hold NaN; try another --scheduler or more --steps")
    _write(pictures, paths, as_grid)
    if not args.quiet:
        state = f", state {quantised.state_bytes / 1e6:.1f} MB, backend {quantised.backend}" if quantised else ""
        print(f"{len(pictures)} images in {seconds:.1f} s ({args.mode}{state}): {args.out}")
    return 0


def _write(pictures: np.ndarray, paths, as_grid: bool) -> None:
    from PIL import Image

    pixels = (pictures.clip(0, 1) * 255).round().astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if as_grid:
        columns = math.ceil(math.sqrt(len(pixels)))
        empty = np.full_like(pixels[:1], 255).repeat(-len(pixels) % columns, axis=0)
        _, height, width, _ = pixels.shape
        cells = np.concatenate([pixels, empty]).reshape(-1, columns, height, width, 3)
        pixels = cells.swapaxes(1, 2).reshape(1, -1, columns * width, 3)
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
