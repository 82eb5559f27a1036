"""What low bits, modulation and step schedules do to the pictures of a CIFAR-10 model: fidelity and distribution.

    python -m benchmarks quality --data DATA --json benchmarks/results/quality.json --keep kept --resume

Every row samples the same noise with one sampler (DDIM-50, DDIM-100, DPM-Solver++-20), in one of these ways:

    float        full precision (float32; on a GPU without TF32), the reference of its sampler
    weights      low-bit weights, float activations: the most that these weights allow
    plain        quantised layers, activation scales from the activations at hand
    modulated    the default of accelerate()

Weights of 8 bits are rounded to the nearest; codes of fewer bits come from --codes: a method of `modiff calibrate`, run
once per model with DDIM-50, or the folder of its result. Rows with `scheduled` have `schedule="auto"`.

PSNR and SSIM: means over the images, against the float images of the same noise. Fréchet distances on features of the
classifier of benchmarks/studies/features.py: to all test images, and to the float images of the same noise
(FID2FP32 of AccuQuant's paper). The estimate is too high by an amount that falls with the number of images; all rows
and the yardsticks of the report (as many training images, as many test images) have the same number. None is a FID.

The report is written after every row, those that tell most first. `--resume` keeps the rows that it has, `--keep DIR`
the float images and the codes; `--budget SECONDS` ends the study in time. A row that fails is named in the report."""

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import modiff_kernels as mk
from benchmarks import record
from benchmarks import shared as models
from benchmarks.runner import FAILED, NOT_FINISHED
from benchmarks.studies.features import FOLDER, Features, frechet_distance
from benchmarks.studies.pictures import OutOfTime, Pictures
from benchmarks.studies.report import Report
from benchmarks.tables import loaded, shown
from examples.cifar10 import load_cifar10
from modiff_kernels.evaluation import markdown_table

SAMPLERS = {"DDIM-50": ("ddim", 50), "DDIM-100": ("ddim", 100), "DPM-Solver++-20": ("dpmsolver++", 20)}
CODES_SAMPLER = "DDIM-50"
BITS = {"W8A8": (8, 8), "W8A4": (8, 4), "W4A4": (4, 4), "W4A8": (4, 8), "W8A3": (8, 3)}
FIRST_BITS = 3  # of BITS: those that tell most
MODES = {"weights": "weight_only", "plain": "quantized", "modulated": "modulated"}
KEY = ("sampler", "bits", "way", "scheduled")
"""What tells a row of the report from all others."""


@dataclass(frozen=True)
class Spec:
    """A row that is wanted. bits: "W8A4"; "W8" of way weights; "" of float."""

    sampler: str
    bits: str
    way: str
    scheduled: bool = False


def all_specs(samplers: list[str], bits: list[str]) -> list[Spec]:
    """The rows of the study, those that tell most first."""
    first = [name for name in bits if name in list(BITS)[:FIRST_BITS]]
    rest = [name for name in bits if name not in first]
    weights = sorted({name.partition("A")[0] for name in bits}, reverse=True)

    def grid(names: list[str], scheduled: bool, of: list[str]) -> list[Spec]:
        return [Spec(s, name, way, scheduled) for s in of for name in names for way in ("modulated", "plain")]

    specs = [Spec(samplers[0], "", "float"), *grid(first, False, samplers[:1])]
    specs += [*(Spec(sampler, "", "float") for sampler in samplers[1:]), *grid(first, False, samplers[1:])]
    specs += grid(first, True, samplers) + grid(rest, False, samplers) + grid(rest, True, samplers)
    return specs + [Spec(sampler, name, "weights") for sampler in samplers for name in weights]


class Study(Pictures):
    def __init__(self, args: argparse.Namespace, model: models.Model, features: Features, deadline: float) -> None:
        super().__init__(model, args.images, args.batch, SAMPLERS, features, deadline)
        self.args = args
        self.unet = model.unet.to(memory_format=torch.channels_last)
        self.weights = models.tensors_crc32(dict(self.unet.state_dict()))
        size, count = features.size, args.images
        real = {
            split: features(load_cifar10(args.data, split, size)[0].permute(0, 2, 3, 1).float().div(255).numpy())
            for split in ("train", "test")
        }
        self.test, half = real["test"], min(count, len(real["test"]) // 2)
        self.yardsticks = {  # between real images, as many as a row has: what a perfect model would have
            "train_to_test": frechet_distance(real["train"][:count], self.test),
            "test_to_test": frechet_distance(self.test[:half], self.test[half : 2 * half]),
            "test_to_test_images": half,
            "test_images": len(self.test),
        }

    def row(self, spec: Spec) -> dict[str, Any]:
        """One row of the report. OutOfTime where the budget ends before its images are there."""
        kept = f"float-{spec.sampler}-{self.weights}-{self.images}-{self.batch}-{self.args.device}.npy"
        images = full = self.full_precision(spec.sampler, self.args.keep / kept)
        calls = models.check_steps(self.model, *SAMPLERS[spec.sampler])
        row = {**asdict(spec), "images": len(full), "calls": calls, "calls_computed": calls, "state_bytes": 0}
        if spec.way != "float":
            weight_bits, act_bits = BITS[spec.bits] if spec.way != "weights" else (int(spec.bits[1:]), 32)
            schedule = "auto" if spec.scheduled else None
            config = models.Row("quality", spec.way, MODES[spec.way], weight_bits, act_bits, schedule=schedule)
            unet = models.share_copy(self.unet)
            config = models.config_of_row(config, self.args.backend)
            own = models.Quantised.loaded(mk.accelerate(unet, config, calibration=self._codes(weight_bits)))
            images = self.sampled(spec.sampler, unet, own.sampling_run)
            row |= self.scores(images, full)
            row |= {"calls_computed": own.calls_computed(calls), "average_bits": own.average_bits(calls)}
            row |= {"state_bytes": own.state_bytes, "backend": own.backend}
            row["state_bytes_per_image"] = own.state_bytes / min(self.batch, self.images)
            if spec.scheduled:
                row["schedule"] = own.handle.explain_schedule().splitlines()[0]
        return row | {"frechet_test": frechet_distance(self.features(images), self.test)}

    def _codes(self, weight_bits: int) -> mk.CalibrationResult | None:
        """None for 8 bits, which are rounded; else the result of --codes, made where it is not there yet."""
        if weight_bits == 8:
            return None
        folder, (name, steps) = Path(self.args.codes), SAMPLERS[CODES_SAMPLER]
        if not folder.is_dir():
            folder = self.args.keep / f"codes-{self.args.codes}-w{weight_bits}-{self.weights}"
        if not (folder / "calibration.json").exists():
            sampler = {
                "scheduler": models.make_scheduler(self.model, name),
                "sample": lambda seeds: models.sample_images(self.model, self.unet, name, steps, seeds),
            }
            options = {"steps": steps, "samples": self.args.samples, "folder": folder, "quiet": self.args.quiet}
            mk.calibrate(self.unet, self.args.codes, mk.ModiffConfig(weight_bits), **sampler, **options)
        return mk.CalibrationResult.load(folder)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a folder or hub id of an unconditional CIFAR-10 UNet (default: the shipped model)")
    add("--data", type=Path, required=True, help="folder of CIFAR-10 (examples/cifar10.py)")
    add("--images", type=int, default=1024, help="of a row (%(default)s)")
    add("--batch", type=int, default=64, help="images at once; scales per tensor see all of them (%(default)s)")
    add("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, help="default: all")
    add("--bits", nargs="+", default=list(BITS), choices=BITS, help="default: all")
    add("--codes", default="distill", help="method for weights below 8 bits, or folder of a result (%(default)s)")
    add("--samples", type=int, default=64, help="trajectories to calibrate codes on (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--backend", default="auto", help="of the low-bit layers (%(default)s)")
    add("--features", type=Path, default=FOLDER, help="folder of the feature network")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--keep", type=Path, required=True, metavar="DIR", help="folder for float images and codes")
    add("--budget", type=float, metavar="SECONDS", help="end after this time, with the rows that are done")
    add("--resume", action="store_true", help="keep what the report has and add what is missing")
    add("--quiet", action="store_true", help="no progress bars")
    add("--json", type=Path, required=True, help="the report")


def main(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + (args.budget or float("inf"))
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # the float images are those of full precision
    models.quiet_libraries()
    args.keep.mkdir(parents=True, exist_ok=True)
    model = models.load_model(args.model, None, torch.device(args.device))
    features = Features(model.unet.config.sample_size, args.features, args.device)
    same = {"model": model.name, "images": args.images, "batch": args.batch, "dtype": "float32"}
    same |= {"device": record.name_of(torch.device(args.device)), "backend": args.backend}
    same["codes"] = f"{args.codes}, {CODES_SAMPLER}, {args.samples} trajectories"
    more = {"parameters": sum(p.numel() for p in model.unet.parameters()), "environments": []}
    report = Report(args.json, args.resume, {**same, "features": features.name}, more, KEY)
    where = {**record.environment(), "device": same["device"]}
    report.content["environments"].append({key: value for key, value in where.items() if key != "repro"})
    failures = report.content["failures"] = {}
    study = Study(args, model, features, deadline)
    report.content["yardsticks"] = study.yardsticks
    report.write()
    wanted = [spec for spec in all_specs(args.samplers, args.bits) if report.key_of(asdict(spec)) not in report.known]
    done = 0
    for spec in tqdm(wanted, desc="rows", disable=args.quiet):
        try:
            report.add(study.row(spec))
            done += 1
        except OutOfTime:
            break
        except Exception as error:  # a row that fails, on a backend that does not do it, leaves the others standing
            reason = str(error).strip().split("\n")[0]
            failures[" ".join(map(str, asdict(spec).values()))] = f"{type(error).__name__}: {reason}"
            report.write()
    print(f"{done} of {len(wanted)} rows, {len(failures)} failed: {args.json}")
    for name, reason in failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    return FAILED if failures else 0 if done == len(wanted) else NOT_FINISHED


COLUMNS = {
    "PSNR dB": ("psnr_db", "{:.1f}"),
    "lowest 5 %": ("psnr_p5_db", "{:.1f}"),
    "SSIM": ("ssim", "{:.4f}"),
    "Fréchet to full precision": ("frechet_full", "{:.2g}"),
    "Fréchet to test images": ("frechet_test", "{:.3f}"),
}


def _label(row: dict[str, Any]) -> str:
    if row["way"] == "float":
        return "full precision"
    label = f"{row['bits']} float activations" if row["way"] == "weights" else f"{row['way']} {row['bits']}"
    return f"{label} scheduled" if row["scheduled"] else label


def _in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bits of the weights, then ways; the float row first."""
    names = ["", *(name for w in ("W8", "W4") for name in (w, *(bits for bits in BITS if bits.startswith(w))))]
    ways = ["float", "weights", "plain", "modulated"]
    return sorted(rows, key=lambda row: (names.index(row["bits"]), row["scheduled"], ways.index(row["way"])))


def table(results: Path, name: str, sampler: str) -> str | None:
    """The rows of one sampler in the report NAME.json."""
    report = loaded(results / f"{name}.json")
    rows = _in_order(row for row in report["rows"] if row["sampler"] == sampler) if report else []
    if report is None or not rows:
        return None
    cells = []
    for row in rows:
        state = f"{row['state_bytes_per_image'] / 1e3:.0f}" if "state_bytes_per_image" in row else "-"
        more = [f"{row['calls_computed']} of {row['calls']}", shown(row.get("average_bits"), "{:.1f}"), state]
        cells.append([_label(row), *(shown(row.get(name), form) for name, form in COLUMNS.values()), *more])
        cells[-1][1] = "reference" if row["way"] == "float" else cells[-1][1]
    header = ("configuration", *COLUMNS, "calls computed", "avg bits", "state kB/image")
    schedules = {row["schedule"] for row in rows if row.get("schedule")}
    note = f" Scheduled: {'; '.join(sorted(schedules))}." if schedules else ""
    return f"{markdown_table(header, cells)}\n\n{sampler}, {_caption(report)}{note}"


def _caption(report: dict[str, Any]) -> str:
    real, last = report["yardsticks"], report["environments"][-1]
    count, half = report["images"], real["test_to_test_images"]
    return (
        f"{count} images in batches of {report['batch']}; 4-bit codes: {report['codes']}. Fréchet distances on "
        f"{report['features']}; {count} training images are {real['train_to_test']:.3f} from the {real['test_images']} "
        f"test images, two sets of {half} test images {real['test_to_test']:.3f} from each other. {report['model']}, "
        f"{report['parameters'] / 1e6:.1f} M parameters, {report['dtype']}; {report['device']}; torch "
        f"{last['torch']}; commit {last['git_commit']}, {last['utc'][:10]}. "
        f"{'; '.join(f'`{command}`' for command in report['commands'])}"
    )
