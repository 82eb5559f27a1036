"""Options of every sub-command. Nothing heavy is imported here, so that --help and bad options answer at once."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
from pathlib import Path

from modiff_kernels import __version__
from modiff_kernels.planning.schedule import StepSchedule

__all__ = ["SCHEDULERS", "UserError", "build_parser", "command_line", "writable"]

BITS = (3, 4, 8)
GRANULARITIES = ("per_tensor", "per_sample", "per_token", "per_block")
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
MODES = ("modulated", "quantized", "weight_only", "float")

SCHEDULE_HELP = """\
auto, none, a file of `modiff calibrate`, a rule such as "forecast every=3", or a pattern such as "U3F2UF2U", see
docs/schedules.md"""

COMPARE_HELP = """\
Sample the same images from the same noise in several configurations and print how close they come to full precision,
and how fast. Each configuration samples in turn (A B C A B C ...). A run is one whole sampling of a batch, all steps
and the scheduler included; a warm-up of two steps, in which torch.compile compiles, is not counted."""

CALIBRATE_HELP = """\
--method calibrates weight codes and, with --scale-mode static, activation scales, on the trajectories of the
full-precision sampler: use them with `modiff sample --calibration DIR` or accelerate(pipe, calibration=DIR).

--schedule searches for the calls of the UNet that can be forecast instead of computed, for one sampler and number of
steps: the fewest computed calls within --budget-db (PSNR against the same network computed at every call), or the best
pictures at --speedup (from times measured first). The result is verified on other seeds.

Either one, when interrupted, goes on where it stopped."""

METHODS = ("minmax", "mse", "percentile", "ndtc", "distill", "qdiffusion")

COMPARE_NOTES = """\
columns:
  PSNR, SSIM  mean over the images against full precision (eager, contiguous); images are floats in 0..1
  s/image     median time of a run, divided by the batch size
  speed-up    against the fastest of the full-precision rows
  state MB    memory of x_hat and y_hat, 1 MB = 10^6 bytes
  avg bits    bits of the activations, averaged over the quantised layers (each counts the same) and the calls of the
              UNet in a run; a layer in full precision counts 32, and so does the first call of a modulated layer,
              unless that call is quantised too; one that a schedule skips counts 0

rows: float-contiguous, float-channels_last, float-compile; weight-only-w8 (quantised weights, float activations: the
  most that any treatment of activations can reach); plain-w8a8 ...; modulated-w8a4 ...; scheduled-w8a8 (modulated, and
  most calls of the UNet forecast from the last ones instead of computed). --rows takes names or their beginnings:
  "--rows float,modulated-w8a4"."""


class UserError(Exception):
    """Bad input: reported as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def speedup(text: str) -> float:
    value = float(text)
    if not 1 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be above 1, got {text}")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must lie in 0..2^63-1, got {value}")
    return value


def bits(text: str) -> int:
    if text not in map(str, BITS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a supported number of bits; allowed: 3, 4, 8")
    return int(text)


def bits_list(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(bits(item.strip()) for item in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def schedule(text: str) -> str | None:
    """--schedule in its one spelling; "none" is no schedule."""
    if text in ("auto", "none"):
        return text if text == "auto" else None
    if text.endswith(".json"):
        try:
            text = json.loads(Path(text).read_text())["schedule"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise argparse.ArgumentTypeError(
                f"cannot read {text} as `modiff calibrate` writes it ({error!r})"
            ) from error
    try:
        return str(StepSchedule.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}; or auto, or none") from error


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default=None,
        metavar="MODEL",
        help="UNet folder or pipeline folder of diffusers, or a hub id (default: the model shipped with the package)",
    )
    add("--prompt", default=None, help="text for a text-to-image pipeline")
    add("--steps", type=positive, default=50, help="sampling steps (%(default)s)")
    add("--batch", type=positive, default=8, help="images sampled at once (%(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="sampler (%(default)s)")
    add("--seed", type=seed, default=0, help="the noise of image i has seed SEED + i (%(default)s)")
    add("--threads", type=positive, default=None, help="CPU threads (default: torch decides)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample (%(default)s)")
    add("--backend", default="auto", help="backend of the quantised layers, see `modiff doctor` (%(default)s)")
    add(
        "--granularity",
        choices=GRANULARITIES,
        default=None,
        help="one activation scale for what (default: per_block for residuals of 3 and 4 bits, else per_sample)",
    )
    add("--quiet", action="store_true", help="no progress bars, no notes")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="modiff", description="Faster sampling of diffusion UNets with low-bit modulated layers.")
    parser.add_argument("--version", action="version", version=f"modiff_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    compare = commands.add_parser(
        "compare",
        help="fidelity and time of full precision, plain and modulated layers",
        description=COMPARE_HELP,
        epilog=COMPARE_NOTES,
        formatter_class=raw,
    )
    add_sampling_options(compare)
    add = compare.add_argument
    add(
        "--schedule",
        type=schedule,
        default="auto",
        metavar="TEXT",
        help=f"of the scheduled rows: {SCHEDULE_HELP} (auto)",
    )
    add("--images", type=positive, default=16, metavar="N", help="images to judge, N / BATCH runs (%(default)s)")
    add("--rows", type=names, default=(), metavar="A,B", help="configurations to show (default: all)")
    add("--weight-bits", type=bits_list, default=(8,), metavar="A,B", help="of 3, 4, 8 (8)")
    add("--act-bits", type=bits_list, default=None, metavar="A,B", help="of 3, 4, 8 (plain: 8,4; modulated: 8,4,3)")
    add("--repeats", type=positive, default=2, help="how often every run is timed (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--grid", type=Path, metavar="FILE", help="write the first images of every row as PNG")
    add("--out", type=Path, metavar="DIR", help="write compare.json, compare.md and compare_grid.png")

    sample = commands.add_parser("sample", help="sample images in one configuration")
    add_sampling_options(sample)
    add = sample.add_argument
    add("--schedule", type=schedule, default=None, metavar="TEXT", help=f"calls to skip: {SCHEDULE_HELP} (none)")
    add("--images", type=positive, default=8, metavar="N", help="images to sample (%(default)s)")
    add("--mode", choices=MODES, default="modulated", help="how layers are computed (%(default)s)")
    add("--weight-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float")
    add("--act-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float, weight_only")
    add("--calibration", type=Path, metavar="DIR", help="folder of `modiff calibrate --method`; has mode and bits")
    add(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="PATH",
        help="a PNG of all images, or a folder for one PNG each (%(default)s)",
    )

    calibrate = commands.add_parser(
        "calibrate",
        help="calibrate weights and activation scales, or find the step schedule of a model",
        description=CALIBRATE_HELP,
        formatter_class=raw,
    )
    add_sampling_options(calibrate)
    add = calibrate.add_argument
    what = calibrate.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=METHODS, help="calibrate layers in this way, see docs/calibration.md")
    what.add_argument("--schedule", action="store_true", help="search for a step schedule")
    add("--samples", type=positive, default=64, metavar="N", help="--method: trajectories to learn from (%(default)s)")
    add(
        "--scale-mode",
        choices=("dynamic", "static"),
        default="dynamic",
        help="--method: activation scales (%(default)s)",
    )
    add("--group-size", type=positive, metavar="N", help="--method: weights that share a scale (a whole channel)")
    add("--weights", type=Path, metavar="DIR", help="--method: keep the codes of this calibration, find scales only")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="--method: an option of the method")
    goal = calibrate.add_mutually_exclusive_group()
    goal.add_argument("--budget-db", type=positive_number, metavar="DB", help="least fidelity, with the fewest calls")
    goal.add_argument("--speedup", type=speedup, metavar="X", help="speed-up over computing every call")
    add(
        "--images",
        type=positive,
        default=16,
        metavar="N",
        help="--schedule: images searched on, and N others to verify (%(default)s)",
    )
    add("--mode", choices=MODES, default="modulated", help="how layers are computed (%(default)s)")
    add("--weight-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float")
    add("--act-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float, weight_only")
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="--method: a folder (calibration); --schedule: JSON for --schedule of the other commands "
        "(modiff_schedule.json in the folder of --model, or here)",
    )

    commands.add_parser("doctor", help="what runs on this machine, what does not, and why")
    return parser


def writable(path: Path) -> Path:
    """`path`, after its folder was made and a file could be opened there; UserError otherwise."""
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another path") from error
    return path


def command_line(argv: list[str]) -> str:
    """The command that `argv` was given in, for reports; without the places of output files."""
    kept, skip = [], False
    for item in argv:
        if not skip and not re.match(r"--(json|grid|out)(=|$)", item):
            kept.append(item)
        skip = not skip and item in ("--json", "--grid", "--out")
    return shlex.join(["modiff", *kept])
