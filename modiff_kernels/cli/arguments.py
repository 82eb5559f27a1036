"""Options of every sub-command. Nothing heavy is imported here, so that --help and bad options answer at once."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from modiff_kernels import __version__
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.config.schedule import StepSchedule
from modiff_kernels.evaluation import SCHEDULERS, UserError

__all__ = ["UserError", "build_parser", "writable"]

BITS = (3, 4, 8)
GRANULARITIES = ("per_tensor", "per_sample", "per_token", "per_block")
MODES = ("modulated", "quantized", "weight_only", "float")

SCHEDULE_HELP = """\
auto, none, a file of `modiff calibrate`, a rule such as "forecast every=3", or a pattern such as "U3F2UF2U", see
docs/schedules.md"""

COMPARE_HELP = """\
Sample the same images from the same noise in several configurations and print how close they come to full precision,
and how fast. Each configuration samples in turn (A B C A B C ...). A run is one whole sampling of a batch, all steps
and the scheduler included; a warm-up of two steps, in which torch.compile compiles, is not counted."""

SAMPLE_HELP = """\
Sample images. An image depends on its seed, the model and these options, --batch included, and not on how many
images or processes there are. In a folder, images that are there already are checked and kept, so an interrupted run
goes on where it stopped. Several processes or machines share the images of a folder:

    torchrun --nproc-per-node 4 -m modiff_kernels sample --images 50000 --out DIR

A model that was saved in low bits (handle.save_pretrained) is sampled as it was saved."""
PLAN_HELP = "auto, none, or a file of `modiff calibrate --plan`, see docs/layer_plan.md"

CALIBRATE_HELP = """\
--method calibrates weight codes and, with --scale-mode static, activation scales, on the trajectories of the
full-precision sampler: use them with `modiff sample --calibration DIR` or accelerate(pipe, calibration=DIR). An
interrupted calibration goes on where it stopped.

--schedule searches for the calls of the UNet that can be forecast instead of computed, for one sampler and number of
steps: the fewest computed calls within --budget-db (PSNR against the same network computed at every call), or the best
pictures at --speedup (from times measured first). The result is verified on other seeds. An interrupted search goes on
where it stopped.

--plan chooses a mode for every layer or block: float, quantized in 8 bits, or as --mode and --act-bits say. Times are
those within whole calls of the UNet on this device with --batch pictures, and fidelity is measured along their
trajectory. The plan is timed and its pictures are judged before it is written; where nothing is faster than float, it
is all float. It is also stored for plan="auto"."""

METHODS = ("minmax", "mse", "percentile", "ndtc", "distill", "qdiffusion", "accuquant", "sampling_aware")

EXPLAIN_HELP = """\
Print what becomes of every layer of a model: mode, bits, backend and reason, and with a plan the time of every mode,
speed-up, SQNR and state of its units, as far as they were measured."""

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
  most calls of the UNet forecast from the last ones instead of computed); planned-w8 (a mode for every layer, with
  --plan). --rows takes names or their beginnings: "--rows float,modulated-w8a4"."""


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


def plan(text: str) -> str | None:
    """--plan: "auto", None for "none", or the path of a file that holds a layer plan."""
    if text in ("auto", "none"):
        return text if text == "auto" else None
    try:
        LayerPlan.from_json(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text} as a layer plan: {error}; or auto, or none") from error
    return text


def state_bytes(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {value}")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--model",
        default=None,
        metavar="MODEL",
        help="UNet folder or pipeline folder of diffusers, or a hub id (default: the model shipped with the package)",
    )
    add("--prompt", default=None, help="text for a text-to-image pipeline")
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


def add_bits_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--mode", choices=MODES, default="modulated", help="how layers are computed (%(default)s)")
    add("--weight-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float")
    add("--act-bits", type=bits, default=8, help="3, 4 or 8 (%(default)s); unused with --mode float, weight_only")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("--steps", type=positive, default=50, help="sampling steps (%(default)s)")
    add("--batch", type=positive, default=8, help="images sampled at once (%(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="sampler (%(default)s)")
    add("--seed", type=seed, default=0, help="the noise of image i has seed SEED + i (%(default)s)")


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
    add("--plan", type=plan, default=None, metavar="FILE", help=f"adds a row with this layer plan: {PLAN_HELP} (none)")
    add("--rows", type=names, default=(), metavar="A,B", help="configurations to show (default: all)")
    add("--weight-bits", type=bits_list, default=(8,), metavar="A,B", help="of 3, 4, 8 (8)")
    add("--act-bits", type=bits_list, default=None, metavar="A,B", help="of 3, 4, 8 (plain: 8,4; modulated: 8,4,3)")
    add("--repeats", type=positive, default=2, help="how often every run is timed (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--grid", type=Path, metavar="FILE", help="write the first images of every row as PNG")
    add("--out", type=Path, metavar="DIR", help="write compare.json, compare.md and compare_grid.png")

    sample = commands.add_parser(
        "sample",
        help="sample images in one configuration",
        description=SAMPLE_HELP,
        formatter_class=raw,
    )
    add_sampling_options(sample)
    add = sample.add_argument
    add("--schedule", type=schedule, default=None, metavar="TEXT", help=f"calls to skip: {SCHEDULE_HELP} (none)")
    add("--plan", type=plan, default=None, metavar="FILE", help=f"modes of the layers: {PLAN_HELP} (none)")
    add("--images", type=positive, default=8, metavar="N", help="images to sample (%(default)s)")
    add("--mode", choices=MODES, default=None, help="how layers are computed (modulated)")
    add("--weight-bits", type=bits, default=None, help="3, 4 or 8 (8); unused with --mode float")
    add("--act-bits", type=bits, default=None, help="3, 4 or 8 (8); unused with --mode float, weight_only")
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
        help="calibrate weights and activation scales, or find the step schedule or the layer plan of a model",
        description=CALIBRATE_HELP,
        formatter_class=raw,
    )
    add_sampling_options(calibrate)
    add = calibrate.add_argument
    wanted = calibrate.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--method", choices=METHODS, help="calibrate layers in this way, see docs/calibration.md")
    wanted.add_argument("--schedule", action="store_true", help="search for a step schedule")
    wanted.add_argument("--plan", action="store_true", help="measure a layer plan")
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
    add(
        "--max-loss-db",
        type=positive_number,
        default=0.5,
        metavar="DB",
        help="--plan: PSNR it may lose against the best single mode (%(default)s)",
    )
    add(
        "--max-state-bytes",
        type=state_bytes,
        default=None,
        metavar="N",
        help="--plan: bytes of x_hat and y_hat it may take (any number)",
    )
    add("--rounds", type=positive, default=5, help="--plan: how often every call is timed (%(default)s)")
    add_bits_options(calibrate)
    add(
        "--out",
        type=Path,
        metavar="PATH",
        help="--method: a folder (calibration); otherwise JSON for --schedule or --plan of the other commands "
        "(modiff_schedule.json or modiff_plan.json in the folder of --model, where --schedule auto finds the first, "
        "or here)",
    )

    explain = commands.add_parser(
        "explain",
        help="what becomes of every layer, and why",
        description=EXPLAIN_HELP,
        formatter_class=raw,
    )
    add_model_options(explain)
    add = explain.add_argument
    add("--plan", type=plan, default="auto", metavar="FILE", help=f"{PLAN_HELP} (%(default)s)")
    add("--max-state-bytes", type=state_bytes, default=None, metavar="N", help="bytes of state that a plan may take")
    add_bits_options(explain)
    add("--json", type=Path, metavar="FILE", help="write the same as JSON")

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
