"""What calibration methods give and cost: the same noise in full precision and quantised.

    python benchmarks/calibration.py --json benchmarks/results/calibration.json

Every method is calibrated for every sampler by `modiff calibrate` in a process of its own, whose seconds, CPU seconds
and peak memory are those of the row (where codes are used again for other activation bits, both processes count). Rows:

    plain        static activation scales of the method
    modulated    dynamic residual scales, as accelerate() has by default; only the codes are the method's
    float        float activations: the most that these weights allow

PSNR and SSIM are means over the images, against full precision from the same noise. The Fréchet distance is between
the images of both (FID2FP32 of AccuQuant's paper), on the features of --features: "pool4" (4x4 average pooling, every
pixel and channel a feature), or module:function, which takes images float [N, H, W, C] in 0..1 and gives [N, F].

The report is written after every row. `--resume` keeps the rows that it has, `--keep DIR` the calibrations, for rows of
other activation bits with the same codes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modiff_kernels as mk
from modiff_kernels.calibration import METHODS
from modiff_kernels.evaluation import command_line, frechet_distance, psnr, ssim, to_json
from modiff_kernels.evaluation import networks as models

SAMPLERS = {"DDIM-100": ("ddim", 100), "DDIM-20": ("ddim", 20), "DPM-Solver++-20": ("dpmsolver++", 20)}
BITS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4), "W4A3": (4, 3), "W3A8": (3, 8)}
WAYS = ("float", "plain", "modulated")
EVALUATION_SEED = 100_000  # calibration sees the noise of seeds from 0 on


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of a calibration: seconds, CPU seconds of all its threads, peak memory in MiB."""

    seconds: float
    cpu_s: float
    peak_mib: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.cpu_s + other.cpu_s, max(self.peak_mib, other.peak_mib))


def pool4(images: np.ndarray) -> np.ndarray:
    """Images [N, H, W, C] averaged to 4x4 pixels: [N, 16 C]."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.nn.functional.adaptive_avg_pool2d(channels_first, 4).flatten(1).numpy()


def features_of(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The feature network `name`: pool4, or module:function."""
    if name == "pool4":
        return pool4
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class Study:
    """Calibrates and samples. folder: where calibrations are kept while the study runs."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.model = models.load_model(args.model, None, torch.device("cpu"))
        self.unet = self.model.unet.to(memory_format=torch.channels_last)
        self.features = features_of(args.features)
        self.references: dict[str, np.ndarray] = {}
        self.costs: dict[Path, Cost] = {}

    def row(self, sampler: str, method: str, bits: str, way: str) -> dict[str, Any]:
        """One row of the report."""
        weight_bits, act_bits = BITS[bits]
        folder = self._calibrated(sampler, method, weight_bits, 8)
        if way == "plain":
            folder = self._calibrated(sampler, method, weight_bits, act_bits)
        result = mk.CalibrationResult.load(folder)
        config = {
            "plain": result.config,
            "modulated": mk.ModiffConfig(weight_bits, act_bits),
            "float": mk.ModiffConfig(weight_bits, None),
        }[way]
        images = self._images(sampler, result, config)
        if sampler not in self.references:
            self.references[sampler] = self._images(sampler, None, None)
        reference = self.references[sampler]
        cost = self.costs[folder]
        return {
            "sampler": sampler,
            "method": method,
            "bits": f"W{weight_bits}" if way == "float" else bits,
            "way": way,
            "psnr_db": float(psnr(images, reference).mean()),
            "ssim": float(ssim(images, reference).mean()),
            "frechet": frechet_distance(self.features(images), self.features(reference)),
            "features": self.args.features,
            "calibration_s": cost.seconds,
            "calibration_cpu_s": cost.cpu_s,
            "peak_mib": cost.peak_mib,
            "options": result.metadata["options"],
        }

    def _images(self, sampler: str, result: Any, config: mk.ModiffConfig | None) -> np.ndarray:
        name, steps = SAMPLERS[sampler]
        handle = None if config is None else mk.accelerate(self.unet, config, calibration=result)
        run = {} if handle is None else {"run": lambda scheduler: handle.sampling_run(scheduler=scheduler)}
        batches = []
        for start in range(0, self.args.images, self.args.batch):
            stop = min(start + self.args.batch, self.args.images)
            seeds = range(EVALUATION_SEED + start, EVALUATION_SEED + stop)
            batches.append(models.sample_images(self.model, self.unet, name, steps, seeds, **run))
        if handle is not None:
            handle.remove()
        return np.concatenate(batches)

    def _calibrated(self, sampler: str, method: str, weight_bits: int, act_bits: int) -> Path:
        """Folder of the calibration with static scales; codes are learnt with 8-bit activations and kept for others."""
        name, steps = SAMPLERS[sampler]
        options = ["--method", method, "--scheduler", name, "--steps", str(steps), "--samples", str(self.args.samples)]
        options += ["--mode", "quantized", "--scale-mode", "static", "--quiet", "--threads", str(self.args.threads)]
        options += ["--weight-bits", str(weight_bits), "--act-bits", str(act_bits)]
        options += [] if self.args.model is None else ["--model", self.args.model]
        for item in self.args.set:
            scope, _, setting = item.rpartition(":")
            options += ["--set", setting] if scope in ("", method) else []
        kind = hashlib.sha256("\0".join(options).encode()).hexdigest()[:8]
        folder = self.folder / f"{sampler}-{method}-w{weight_bits}a{act_bits}-{kind}"
        known = folder.with_suffix(".cost.json")
        if folder not in self.costs and known.exists():
            self.costs[folder] = Cost(**json.loads(known.read_text()))
        if folder in self.costs:
            return folder
        options += ["--out", str(folder)]
        before = Cost(0, 0, 0)
        if act_bits != 8:
            weights = self._calibrated(sampler, method, weight_bits, 8)
            before = self.costs[weights]
            options += ["--weights", str(weights)]
        self.costs[folder] = before + _measured([sys.executable, "-m", "modiff_kernels", "calibrate", *options])
        known.write_text(json.dumps(dataclasses.asdict(self.costs[folder])))
        return folder


def _measured(command: list[str]) -> Cost:
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=Path(__file__).resolve().parent.parent)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"calibration failed (exit code {process.returncode}): {' '.join(command)}")
    return Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _without(arguments: list[str], flag: str, option: str) -> list[str]:
    """The command line without a flag, and without an option and its value: what does not change the rows."""
    kept = [item for item in arguments if item != flag and not item.startswith(f"{option}=")]
    return [item for i, item in enumerate(kept) if option not in (item, kept[i - 1] if i else "")]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row of the report from all others."""
    return tuple(row[name] for name in ("sampler", "method", "bits", "way"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a UNet folder (default: the shipped model)")
    parser.add_argument("--images", type=int, default=64, help="pictures of a row (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures at once (%(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="trajectories to calibrate on (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="of %(default)s")
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="of %(default)s")
    parser.add_argument("--bits", default=",".join(BITS), help="of %(default)s")
    parser.add_argument("--set", action="append", default=[], metavar="[METHOD:]NAME=VALUE", help="option of a method")
    parser.add_argument("--features", default="pool4", help="of the Fréchet distance (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what the report has and add what is missing")
    parser.add_argument(
        "--keep", type=Path, default=None, metavar="DIR", help="keep the calibrations, and use them again"
    )
    parser.add_argument("--json", type=Path, required=True, help="the report")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models.quiet_libraries()
    report: dict[str, Any] = {
        "images": args.images,
        "samples": args.samples,
        "threads": args.threads,
        "torch": torch.__version__,
        "commands": [],
        "rows": [],
    }
    if args.resume and args.json.exists():
        kept = json.loads(args.json.read_text())
        for name in ("images", "samples", "threads", "torch"):
            if kept[name] != report[name]:
                raise SystemExit(
                    f"--resume: {args.json} has {name} {kept[name]!r}, this run {report[name]!r}; repeat its command, "
                    "or leave --resume out to measure everything anew"
                )
        report |= {"commands": kept["commands"], "rows": kept["rows"]}
    command = command_line(_without(sys.argv[1:], "--resume", "--keep"))
    command = command.replace("modiff", "python benchmarks/calibration.py", 1)
    if command not in report["commands"]:
        report["commands"].append(command)
    known = {key(row) for row in report["rows"]}
    wanted = [
        (sampler, method, bits, way)
        for sampler in args.samplers.split(",")
        for method in args.methods.split(",")
        for bits in args.bits.split(",")
        for way in WAYS
    ]
    with tempfile.TemporaryDirectory() as folder:
        study = Study(args, args.keep or Path(folder))
        for sampler, method, bits, way in tqdm(wanted, desc="rows"):
            name = bits.partition("A")[0] if way == "float" else bits
            if (sampler, method, name, way) in known:
                continue
            known.add((sampler, method, name, way))
            report["rows"].append(study.row(sampler, method, bits, way))
            new = args.json.with_suffix(".new")
            new.write_text(to_json(report))
            new.replace(args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
