"""What calibration methods give and cost: the same noise in full precision and quantised.

    python -m benchmarks calibration --json benchmarks/results/calibration.json

Every method is calibrated for every sampler; its CPU seconds are those of the row (where codes are used again for other
activation bits, both calibrations count). Rows:

    plain        static activation scales of the method
    modulated    dynamic residual scales, as accelerate() has by default; only the codes are the method's
    float        float activations: the most that these weights allow

PSNR and SSIM are means over the images, against full precision from the same noise. The Fréchet distance is between
the images of both (FID2FP32 of AccuQuant's paper), on the features of --features: "pool4" (4x4 average pooling, every
pixel and channel a feature), or module:function, which takes images float [N, H, W, C] in 0..1 and gives [N, F].

The report is written after every row. `--resume` keeps the rows that it has, `--keep DIR` the calibrations, for rows of
other activation bits with the same codes."""

import argparse
import dataclasses
import hashlib
import importlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import modiff_kernels as mk
from benchmarks import shared as models
from benchmarks.shared import METHODS
from benchmarks.studies.pictures import Pictures
from benchmarks.studies.report import Report
from benchmarks.tables import loaded
from modiff_kernels.evaluation import markdown_table

SAMPLERS = {"DDIM-100": ("ddim", 100), "DDIM-20": ("ddim", 20), "DPM-Solver++-20": ("dpmsolver++", 20)}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W4A3": (4, 3), "W3A8": (3, 8)}
WAYS = ("float", "plain", "modulated")


def pool4(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] averaged to 4x4 pixels: [N, 16 C]."""
    return torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2), 4).flatten(1).numpy()


def features_of(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The feature network `name`: pool4, or module:function."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function) if function else pool4


class Study(Pictures):
    """Calibrates and samples. folder: where calibrations are kept while the study runs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        model = models.load_model(args.model, None, torch.device("cpu"))
        super().__init__(model, args.images, args.batch, SAMPLERS, features_of(args.features))
        self.args, self.folder = args, folder
        self.unet = self.model.unet.to(memory_format=torch.channels_last)

    def row(self, sampler: str, method: str, bits: str, way: str) -> dict[str, Any]:
        weight_bits, act_bits = BITS[bits]
        result = self._calibrated(sampler, method, weight_bits, act_bits if way == "plain" else 8)
        config = {"modulated": mk.ModiffConfig(weight_bits, act_bits), "float": mk.ModiffConfig(weight_bits, None)}
        handle = mk.accelerate(self.unet, config.get(way, result.config), calibration=result)
        images = self.sampled(sampler, self.unet, lambda scheduler: handle.sampling_run(scheduler=scheduler))
        handle.remove()
        scores = self.scores(images, self.full_precision(sampler))
        row = {"sampler": sampler, "method": method, "bits": f"W{weight_bits}" if way == "float" else bits, "way": way}
        row |= {"psnr_db": scores["psnr_db"], "ssim": scores["ssim"], "frechet": scores["frechet_full"]}
        row |= {"features": self.args.features, "options": result.metadata["options"]}
        return row | {"calibration_cpu_s": result.metadata["cpu_s"]}

    def _calibrated(self, sampler: str, method: str, weight_bits: int, act_bits: int) -> mk.CalibrationResult:
        """The calibration with static scales; codes are learnt with 8-bit activations and kept for others."""
        name, steps = SAMPLERS[sampler]
        own, *settings = method.split(":")
        options = {key: _value(text) for key, _, text in (setting.partition("=") for setting in settings)}
        kind = hashlib.sha256(repr((method, self.args.model, self.args.samples)).encode()).hexdigest()[:8]
        folder = self.folder / f"{name}-{steps}-{own}-w{weight_bits}a{act_bits}-{kind}"
        if (folder / "calibration.json").exists():
            return mk.CalibrationResult.load(folder)
        before = self._calibrated(sampler, method, weight_bits, 8) if act_bits != 8 else None
        config = mk.ModiffConfig(weight_bits, act_bits)
        if "plain" in self.args.ways.split(","):
            config = dataclasses.replace(config, mode="quantized", scale_mode="static")
        started = time.process_time()
        result = mk.calibrate(
            self.unet, own, config, steps=steps, samples=self.args.samples, weights=before, quiet=True, **options,
            scheduler=models.make_scheduler(self.model, name),
            sample=lambda seeds: models.sample_images(self.model, self.unet, name, steps, seeds),
        )  # fmt: skip
        result.metadata["cpu_s"] = time.process_time() - started + (before.metadata["cpu_s"] if before else 0.0)
        result.save(folder)
        return result


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


KEY = ("sampler", "method", "bits", "way")
"""What tells a row of the report from all others."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default=None, help="a UNet folder (default: the shipped model)")
    add("--images", type=int, default=64, help="pictures of a row (%(default)s)")
    add("--batch", type=int, default=16, help="pictures at once (%(default)s)")
    add("--samples", type=int, default=64, help="trajectories to calibrate on (%(default)s)")
    add("--methods", nargs="+", default=[*METHODS], help="NAME[:OPTION=VALUE...] (default: all)")
    add("--samplers", default=",".join(SAMPLERS), help="of %(default)s")
    add("--bits", default=",".join(BITS), help="of %(default)s")
    add("--ways", default=",".join(WAYS), help="of %(default)s; without plain, activation scales are not calibrated")
    add("--features", default="pool4", help="of the Fréchet distance (%(default)s)")
    add("--threads", type=int, default=2)
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--keep", type=Path, default=None, metavar="DIR", help="keep the calibrations, and use them again")
    add("--json", type=Path, required=True, help="the report")


def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    same = {name: getattr(args, name) for name in ("images", "samples", "threads")} | {"torch": torch.__version__}
    report = Report(args.json, args.resume, same, {}, KEY)
    samplers, bits, ways = (names.split(",") for names in (args.samplers, args.bits, args.ways))
    wanted = list(itertools.product(samplers, args.methods, bits, ways))
    with tempfile.TemporaryDirectory() as folder:
        study = Study(args, args.keep or Path(folder))
        for sampler, method, bit, way in tqdm(wanted, desc="rows"):
            own = bit.partition("A")[0] if way == "float" else bit
            if (sampler, method, own, way) not in report.known:
                report.add(study.row(sampler, method, bit, way))
    return 0


HEADER = (
    *("bits, method", "PSNR dB: float activations", "plain", "modulated", "SSIM: plain", "modulated"),
    *("Fréchet: plain", "modulated", "CPU s"),
)


def table(results: Path, sampler: str) -> str | None:
    """A row per bits and method with `sampler`: float activations with these codes, plain, modulated."""
    report = loaded(results / "calibration.json")
    if report is None:
        return None
    rows = {(row["bits"], row["method"], row["way"]): row for row in report["rows"] if row["sampler"] == sampler}
    cells = []
    for bits, method in itertools.product(BITS, METHODS):
        keys = [(bits.partition("A")[0], method, "float"), (bits, method, "plain"), (bits, method, "modulated")]
        if not all(key in rows for key in keys):
            continue
        full, plain, modulated = (rows[key] for key in keys)
        line = [f"{bits}, {method}", *(f"{row['psnr_db']:.1f}" for row in (full, plain, modulated))]
        line += [f"{row['ssim']:.3f}" for row in (plain, modulated)]
        line += [f"{row['frechet']:.2g}" for row in (plain, modulated)]
        cells.append([*line, f"{plain['calibration_cpu_s']:.0f}"])
    features = sorted({row["features"] for row in rows.values()})
    commands = "; ".join(f"`{command}`" for command in report["commands"] if f"--samplers {sampler}" in command)
    return (
        f"{markdown_table(HEADER, cells)}\n\n{sampler}, {report['images']} images, calibrated on "
        f"{report['samples']} trajectories; Fréchet distance on {', '.join(features)}; torch {report['torch']}. "
        f"{commands}"
    )
