"""What the studies of pictures share: sampling the same noise in several ways, and judging it by full precision."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.shared import Model, sample_images
from benchmarks.studies.features import frechet_distance
from modiff_kernels.evaluation import psnr, ssim

EVALUATION_SEED = 100_000  # calibration sees the noise of seeds from 0 on


class OutOfTime(Exception):
    """The time of a study is used up."""


class Pictures:
    """Samples `images` pictures in batches. samplers: name and steps by label. deadline: of time.monotonic()."""

    def __init__(
        self,
        model: Model,
        images: int,
        batch: int,
        samplers: dict[str, tuple[str, int]],
        features: Callable[[np.ndarray], np.ndarray],
        deadline: float = float("inf"),
    ) -> None:
        self.model, self.images, self.batch, self.samplers = model, images, batch, samplers
        self.features, self.deadline = features, deadline
        self.unet = model.unet
        self.full: dict[str, np.ndarray] = {}

    def sampled(self, sampler: str, unet: nn.Module, run: Any = contextlib.nullcontext) -> np.ndarray:
        """The pictures of a network; `run(scheduler)` is entered for every batch."""
        batches = []
        for start in range(0, self.images, self.batch):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            seeds = range(EVALUATION_SEED + start, EVALUATION_SEED + min(start + self.batch, self.images))
            batches.append(sample_images(self.model, unet, *self.samplers[sampler], seeds, run=run))
            if not np.isfinite(batches[-1]).all():
                raise ValueError("the images hold NaN")
        return np.concatenate(batches)

    def full_precision(self, sampler: str, path: Path | None = None) -> np.ndarray:
        """The float images of a sampler, sampled once, and kept at `path`."""
        if sampler not in self.full and path is not None and path.exists():
            self.full[sampler] = np.load(path)
        if sampler not in self.full:
            self.full[sampler] = self.sampled(sampler, self.unet)
            if path is not None:
                new = path.with_suffix(".new.npy")
                np.save(new, self.full[sampler])
                new.replace(path)
        return self.full[sampler]

    def scores(self, images: np.ndarray, full: np.ndarray) -> dict[str, float]:
        """How close `images` are to the float images of the same noise."""
        ratios = psnr(images, full)
        return {
            "psnr_db": float(ratios.mean()),
            "psnr_p5_db": float(np.percentile(ratios, 5)),
            "ssim": float(ssim(images, full).mean()),
            "frechet_full": frechet_distance(self.features(images), self.features(full)),
        }
