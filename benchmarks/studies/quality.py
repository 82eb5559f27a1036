"""What low bits, modulation and step schedules do to the pictures of a CIFAR-10 model: fidelity and distribution.

    python -m benchmarks quality --data DATA --json benchmarks/results/quality.json --keep kept --resume

Every row samples the same noise with one sampler (DDIM-50, DDIM-100, DPM-Solver++-20), in one of these ways:

    float        full precision (float32; on a GPU without TF32), the reference of its sampler
    16-bit       the network in --dtype, where that is not float32; with --compile compiled
    weights      low-bit weights, float activations: the most that these weights allow
    plain        quantised layers, activation scales from the activations at hand
    modulated    the default of accelerate()

Weights of 8 bits are rounded to the nearest; codes of fewer bits come from --codes: a method of `modiff calibrate`, run
once per model with DDIM-50, or the folder of its result. Rows with `scheduled` have `schedule="auto"`.

PSNR and SSIM: means over the images, against the float images of the same noise. Fréchet distances on features of the
classifier that `python -m benchmarks features` trains: to all test images, and to the float images of the same noise
(FID2FP32 of AccuQuant's paper). The estimate is too high by an amount that falls with the number of images; all rows
and the yardsticks of the report (as many training images, as many test images) have the same number. None is a FID.

The first --reference-images of a row are sampled on the backend `reference` too: PSNR between both backends, and ops of
three calls computed on both from the same inputs (benchmarks/studies/agreement.py). --times: images per second, too, of
whole sampling runs of a batch after the first, without metrics; on a machine with other work they mean nothing.

The report is written after every row, those that tell most first. `--resume` keeps the rows that it has, `--keep DIR`
the float images and the codes; `--budget SECONDS` ends the study in time. A row that fails is named in the report.
Exit code 1: rows failed; 3: the budget ended the study before all rows were there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import modiff_kernels as mk
from benchmarks import shared as models
from benchmarks.record import environment
from benchmarks.runner import FAILED, NOT_FINISHED
from benchmarks.shared import Quantised, Row, config_of_row, tensors_crc32
from benchmarks.studies.agreement import Replay
from benchmarks.studies.features import FOLDER, Features
from benchmarks.studies.report import Report
from modiff_kernels.evaluation import frechet_distance, psnr, ssim
from modiff_kernels.evaluation.cifar10 import load_cifar10
from modiff_kernels.integrations.plan_cache import device_name

SAMPLERS = {"DDIM-50": ("ddim", 50), "DDIM-100": ("ddim", 100), "DPM-Solver++-20": ("dpmsolver++", 20)}
CODES_SAMPLER = "DDIM-50"
BITS = {"W8A8": (8, 8), "W8A4": (8, 4), "W4A4": (4, 4), "W4A8": (4, 8), "W8A3": (8, 3)}
FIRST_BITS = 3  # of BITS: those that tell most
MODES = {"weights": "weight_only", "plain": "quantized", "modulated": "modulated"}
EVALUATION_SEED = 100_000  # calibration sees the noise of seeds from 0 on
KEY = ("sampler", "bits", "way", "scheduled")
"""What tells a row of the report from all others."""


@dataclass(frozen=True)
class Spec:
    """A row that is wanted. bits: "W8A4"; "W8" of way weights; "" of float and 16-bit."""

    sampler: str
    bits: str
    way: str
    scheduled: bool = False

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.way, self.bits, "scheduled" if self.scheduled else "")))


def all_specs(samplers: list[str], bits: list[str], dtype: str) -> list[Spec]:
    """The rows of the study, those that tell most first."""
    first = [name for name in bits if name in list(BITS)[:FIRST_BITS]]
    rest = [name for name in bits if name not in first]
    weights = sorted({name.partition("A")[0] for name in bits}, reverse=True)

    def grid(names: list[str], scheduled: bool) -> list[Spec]:
        return [
            Spec(sampler, name, way, scheduled)
            for sampler in samplers
            for name in names
            for way in ("modulated", "plain")
        ]

    specs = [Spec(sampler, "", "float") for sampler in samplers[:1]]
    specs += [spec for spec in grid(first, False) if spec.sampler == samplers[0]]
    sixteen = [Spec(sampler, "", "16-bit") for sampler in samplers if dtype != "float32"]
    specs += sixteen[:1]
    specs += [Spec(sampler, "", "float") for sampler in samplers[1:]]
    specs += [spec for spec in grid(first, False) if spec.sampler != samplers[0]]
    specs += grid(first, True) + grid(rest, False) + grid(rest, True)
    return specs + sixteen[1:] + [Spec(sampler, name, "weights") for sampler in samplers for name in weights]


class InDtype(nn.Module):
    """A UNet of 16 bits for a sampler in float32."""

    def __init__(self, unet: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.unet, self.dtype, self.config = unet, dtype, unet.config

    def forward(self, x: torch.Tensor, t: Any, **options: Any) -> tuple[torch.Tensor]:
        return (self.unet(x.to(self.dtype), t, **options)[0].float(),)


class OutOfTime(Exception):
    """--budget is used up."""


class Study:
    """Samples and judges. keep: folder of float images and codes. deadline: of time.monotonic()."""

    def __init__(self, args: argparse.Namespace, model: models.Model, features: Features, deadline: float) -> None:
        self.args, self.model, self.features, self.deadline = args, model, features, deadline
        self.device = next(model.unet.parameters()).device
        self.dtype = getattr(torch, args.dtype)
        self.unet = model.unet.to(memory_format=torch.channels_last)
        self.low = self.unet if args.dtype == "float32" else copy.deepcopy(self.unet).to(self.dtype)
        self.weights = tensors_crc32(dict(self.unet.state_dict()))
        self.graphs = args.cuda_graphs
        self.full: dict[str, np.ndarray] = {}
        self.test: np.ndarray | None = None

    def yardsticks(self) -> dict[str, Any]:
        """Fréchet distances between real images, as many as a row has: what a perfect model would have."""
        size, count = self.features.size, self.args.images
        sets = {
            split: load_cifar10(self.args.data, split, size)[0].permute(0, 2, 3, 1).float().div(255).numpy()
            for split in ("train", "test")
        }
        self.test = self.features(sets["test"])
        half = min(count, len(self.test) // 2)
        return {
            "train_to_test": frechet_distance(self.features(sets["train"][:count]), self.test),
            "test_to_test": frechet_distance(self.test[:half], self.test[half : 2 * half]),
            "test_to_test_images": half,
            "test_images": len(self.test),
        }

    def row(self, spec: Spec) -> dict[str, Any]:
        """One row of the report. OutOfTime where the budget ends before its images are there."""
        full = self._full_precision(spec.sampler)
        images, seconds, quantised = full, list[float](), None
        if spec.way != "float":
            images, seconds, quantised = self._sampled(spec)
        row = {**asdict(spec), "images": len(images), **self._scores(images, full), **self._costs(spec, quantised)}
        if self.args.times and len(seconds) > 1:
            row |= {"images_per_s": self.args.batch / statistics.median(seconds[1:]), "batches_timed": len(seconds) - 1}
        if spec.way in ("plain", "modulated") and self.args.reference_images and row["backend"] != "reference":
            row["reference"] = self._against_reference(spec, full)
        return row

    def _sampled(self, spec: Spec) -> tuple[np.ndarray, list[float], Quantised | None]:
        """Images, seconds and network of a row; without graphs from the first row on that fails with them."""
        try:
            unet, quantised = self._network(spec, self.args.backend, self.graphs)
            return *self._images(spec.sampler, unet, quantised), quantised
        except OutOfTime:
            raise
        except Exception as error:
            if not self.graphs:
                raise
            print(f"{spec.sampler} {spec.name}: going on without CUDA graphs: {error}", file=sys.stderr)
            self.graphs = False
        return self._sampled(spec)

    def _scores(self, images: np.ndarray, full: np.ndarray) -> dict[str, float]:
        features = self.features(images)
        scores = {"frechet_test": frechet_distance(features, self.test)}
        if images is full:
            return scores
        ratios = psnr(images, full)
        return {
            **scores,
            "frechet_full": frechet_distance(features, self.features(full)),
            "psnr_db": float(ratios.mean()),
            "psnr_p5_db": float(np.percentile(ratios, 5)),
            "ssim": float(ssim(images, full).mean()),
        }

    def _costs(self, spec: Spec, quantised: Quantised | None) -> dict[str, Any]:
        calls = models.check_steps(self.model, *SAMPLERS[spec.sampler])
        if quantised is None:
            return {"calls": calls, "calls_computed": calls, "state_bytes": 0, "backend": "torch"}
        costs = {
            "calls": calls,
            "calls_computed": quantised.calls_computed(calls),
            "average_bits": quantised.average_bits(calls),
            "state_bytes": quantised.state_bytes,
            "state_bytes_per_image": quantised.state_bytes / min(self.args.batch, self.args.images),
            "backend": quantised.backend,
            "cuda_graphs": self.graphs,
        }
        if spec.scheduled:
            costs["schedule"] = quantised.handle.explain_schedule().splitlines()[0]
        return costs

    def _network(self, spec: Spec, backend: str, graphs: bool) -> tuple[nn.Module, Quantised | None]:
        """The network of a row, in the dtype of the sampler from outside."""
        unet = models.share_copy(self.low)
        quantised = None
        if spec.way == "16-bit":
            if self.args.compile:
                unet.compile(mode="reduce-overhead" if self.device.type == "cuda" else None)
        else:
            weight_bits, act_bits = BITS[spec.bits] if spec.way != "weights" else (int(spec.bits[1:]), 32)
            schedule = "auto" if spec.scheduled else None
            mode = MODES[spec.way]
            row = Row("quality", spec.name, mode, weight_bits, act_bits, schedule=schedule, cuda_graphs=graphs)
            handle = mk.accelerate(unet, config_of_row(row, backend), calibration=self._codes(weight_bits))
            quantised = Quantised.loaded(handle)
        return (unet if self.dtype == torch.float32 else InDtype(unet, self.dtype)), quantised

    def _codes(self, weight_bits: int) -> mk.CalibrationResult | None:
        """None for 8 bits, which are rounded; else the result of --codes, made where it is not there yet."""
        if weight_bits == 8:
            return None
        folder = Path(self.args.codes)
        if not folder.is_dir():
            folder = self.args.keep / f"codes-{self.args.codes}-w{weight_bits}-{self.weights}"
        if not (folder / "calibration.json").exists():
            name, steps = SAMPLERS[CODES_SAMPLER]
            mk.calibrate(
                self.unet,
                self.args.codes,
                mk.ModiffConfig(weight_bits),
                steps=steps,
                samples=self.args.samples,
                folder=folder,
                quiet=self.args.quiet,
                scheduler=models.make_scheduler(self.model, name),
                sample=lambda seeds: models.sample_images(self.model, self.unet, name, steps, seeds),
            )
        return mk.CalibrationResult.load(folder)

    def _full_precision(self, sampler: str) -> np.ndarray:
        """The float images of a sampler, sampled once and kept."""
        if sampler not in self.full:
            request = f"{self.weights}-{self.args.images}-{self.args.batch}-{self.device.type}"
            path = self.args.keep / f"float-{sampler}-{request}.npy"
            if path.exists():
                self.full[sampler] = np.load(path)
            else:
                self.full[sampler], _ = self._images(sampler, self.unet, None)
                new = path.with_suffix(".new.npy")
                np.save(new, self.full[sampler])
                new.replace(path)
        return self.full[sampler]

    def _images(self, sampler: str, unet: nn.Module, quantised: Quantised | None) -> tuple[np.ndarray, list[float]]:
        """The images of a row, and the seconds that each whole batch took."""
        batches, seconds = [], []
        run = contextlib.nullcontext if quantised is None else quantised.sampling_run
        for start in range(0, self.args.images, self.args.batch):
            if time.monotonic() > self.deadline:
                raise OutOfTime
            started = time.perf_counter()
            batches.append(self._sample(sampler, unet, range(start, start + self.args.batch), run))
            seconds.append(time.perf_counter() - started)
        return np.concatenate(batches)[: self.args.images], seconds

    def _sample(self, sampler: str, unet: nn.Module, indices: range, run: Any, on_step: Any = lambda: None):
        seeds = [EVALUATION_SEED + index for index in indices]
        images = models.sample_images(self.model, unet, *SAMPLERS[sampler], seeds, run=run, on_step=on_step)
        if not np.isfinite(images).all():
            raise ValueError("the images hold NaN")
        return images

    def _against_reference(self, spec: Spec, full: np.ndarray) -> dict[str, Any]:
        """The first images of a row on both backends, and the ops of three of their calls."""
        count = min(self.args.reference_images, self.args.images)
        unet, quantised = self._network(spec, self.args.backend, False)
        slow_unet, slow = self._network(spec, "reference", False)
        assert quantised is not None
        assert slow is not None
        calls = models.check_steps(self.model, *SAMPLERS[spec.sampler])
        replayed = {1, calls // 2, calls - 1}
        made = itertools.count(1)
        replay = Replay()
        replay.active = False

        def after_call() -> None:
            replay.active = next(made) in replayed

        with replay:
            images = self._sample(spec.sampler, unet, range(count), quantised.sampling_run, after_call)
        expected = self._sample(spec.sampler, slow_unet, range(count), slow.sampling_run)
        both = [float(psnr(pictures, full[:count]).mean()) for pictures in (images, expected)]
        return {
            "images": count,
            "psnr_between_db": float(psnr(images, expected).mean()),
            "psnr_db": both[0],
            "reference_psnr_db": both[1],
            **replay.agreement.to_dict(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a folder or hub id of an unconditional CIFAR-10 UNet (default: the shipped model)")
    add("--data", type=Path, required=True, help="folder of CIFAR-10 (modiff_kernels.evaluation.cifar10)")
    add("--images", type=int, default=1024, help="of a row (%(default)s)")
    add("--batch", type=int, default=64, help="images at once; scales per tensor see all of them (%(default)s)")
    add("--samplers", default=",".join(SAMPLERS), help="of %(default)s")
    add("--bits", default=",".join(BITS), help="of %(default)s")
    add("--codes", default="distill", help="method for weights below 8 bits, or folder of a result (%(default)s)")
    add("--samples", type=int, default=64, help="trajectories to calibrate codes on (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the low-bit networks")
    add("--backend", default="auto", help="of the low-bit layers (%(default)s)")
    add("--cuda-graphs", action="store_true", help="rows as CUDA graphs")
    add("--compile", action="store_true", help="torch.compile the 16-bit rows")
    add("--times", action="store_true", help="images per second, too")
    add("--reference-images", type=int, default=16, help="of a row on the backend reference too, 0: none (%(default)s)")
    add("--features", type=Path, default=FOLDER, help="folder of the feature network")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--keep", type=Path, required=True, metavar="DIR", help="folder for float images and codes")
    add("--budget", type=float, metavar="SECONDS", help="end after this time, with the rows that are done")
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--quiet", action="store_true", help="no progress bars")
    add("--json", type=Path, required=True, help="the report")


def codes_label(args: argparse.Namespace) -> str:
    """Method, sampler and trajectories of the codes of fewer than 8 bits."""
    if not Path(args.codes).is_dir():
        return f"{args.codes}, {CODES_SAMPLER}, {args.samples} trajectories"
    result = mk.CalibrationResult.load(args.codes)
    made = result.metadata
    return f"{result.method}, {made['scheduler']} with {made['steps']} steps, {made['samples']} trajectories"


def main(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + (args.budget or float("inf"))
    for name, known in (("samplers", SAMPLERS), ("bits", BITS)):
        names = getattr(args, name).split(",")
        if not set(names) <= set(known):
            raise SystemExit(f"quality: --{name} {getattr(args, name)}: allowed are {','.join(known)}")
        setattr(args, name, names)
    if min(args.images, args.batch, args.samples) < 1:
        raise SystemExit("quality: --images, --batch and --samples must be at least 1")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # the float images are those of full precision
    models.quiet_libraries()
    args.keep.mkdir(parents=True, exist_ok=True)
    model = models.load_model(args.model, None, torch.device(args.device))
    features = Features(model.unet.config.sample_size, args.features, args.device)
    same = {"model": model.name, "images": args.images, "batch": args.batch, "dtype": args.dtype}
    same |= {"device": device_name(torch.device(args.device)), "backend": args.backend, "codes": codes_label(args)}
    more = {"parameters": sum(p.numel() for p in model.unet.parameters()), "environments": []}
    report = Report(args.json, args.resume, {**same, "features": features.name}, more, KEY)
    where = {**environment(), "device": same["device"]}
    report.content["environments"].append({key: value for key, value in where.items() if key != "repro"})
    failures = report.content["failures"] = {}
    study = Study(args, model, features, deadline)
    report.content["yardsticks"] = study.yardsticks()
    report.write()
    specs = all_specs(args.samplers, args.bits, args.dtype)
    wanted = [spec for spec in specs if report.key_of(asdict(spec)) not in report.known]
    done = 0
    for spec in tqdm(wanted, desc="rows", disable=args.quiet):
        try:
            before = time.monotonic()
            row = study.row(spec)
        except OutOfTime:
            break
        except Exception as error:  # a row that fails, on a backend that does not do it, leaves the others standing
            reason = str(error).strip().split("\n")[0]
            failures[f"{spec.sampler} {spec.name}"] = f"{type(error).__name__}: {reason}"
            report.write()
        else:
            report.add({**row, "row_s": round(time.monotonic() - before, 1)})
            done += 1
    print(f"{done} of {len(wanted)} rows, {len(failures)} failed: {args.json}")
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return FAILED if failures else 0 if done == len(wanted) else NOT_FINISHED
