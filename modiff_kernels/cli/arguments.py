"""Options of every sub-command. Nothing heavy is imported here, so that --help and bad options answer at once."""

import argparse
import functools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modiff_kernels import __version__
from modiff_kernels.config import BACKENDS, LayerPlan, StepSchedule
from modiff_kernels.config.schedule import AUTO
from modiff_kernels.evaluation import SCHEDULERS, UserError, user_errors
from modiff_kernels.evaluation.folders import look_into
from modiff_kernels.models import SHIPPED
from modiff_kernels.planning import stored
from modiff_kernels.quant.spec import ACT_BITS, BITS, GRANULARITIES

METHODS = ("minmax", "mse", "percentile", "ndtc", "distill", "qdiffusion", "accuquant", "sampling_aware")
MODES = ("modulated", "quantized", "weight_only", "float")

SCHEDULE_HELP = (
    'auto, "auto 8" (evaluations), none, a file of `modiff calibrate`, or as "forecast every=3" or "U3F2UF2U", see '
    "docs/schedules.md"
)
PLAN_HELP = "auto, none, or a file of `modiff calibrate --plan`, see docs/layer_plan.md"
LAYER_BITS = "(8); unused with --mode float"

COMPARE_HELP = """\
Sample the same images from the same noise in several configurations and print how close they come to full precision,
and how fast. Each configuration samples in turn (A B C A B C ...). A run is one whole sampling of a batch, all steps
and the scheduler included; a warm-up of two steps, in which torch.compile compiles, is not counted."""

COMPARE_NOTES = """\
columns:
  PSNR, SSIM  mean over the images against full precision (eager, contiguous); images are floats in 0..1
  s/image     median time of a run, divided by the batch size
  speed-up    against the fastest of the full-precision rows
  state MB    memory of x_hat and y_hat, 1 MB = 10^6 bytes
  avg bits    bits of the activations, averaged over the quantised layers (each counts the same) and the calls of the
              UNet in a run; a layer in full precision counts 32, the first call of a modulated layer, which makes two
              updates of 8 bits, 16, and a call that a schedule skips 0

rows: float-contiguous, float-channels_last, float-compile; weight-only-w8 (quantised weights, float activations: the
  most that any treatment of activations can reach); plain-w8a8 ...; modulated-w8a4 ...; scheduled-w8a8 (modulated, and
  most calls of the UNet forecast from the last ones instead of computed, or "no call left out"); plain-scheduled-w8a8;
  planned-w8 (a mode for every layer, with --plan). --rows takes names or their beginnings: "float,modulated-w8a4"."""

SAMPLE_HELP = """\
Sample images. An image depends on its seed, the model and these options, --batch included, and not on how many
images or processes there are. In a folder, images that are there already are checked and kept, so an interrupted run
goes on where it stopped. Several processes or machines share the images of a folder:

    torchrun --nproc-per-node 4 -m modiff_kernels sample --images 50000 --out DIR

A model that was saved in low bits (handle.save_pretrained) is sampled as it was saved."""

CALIBRATE_HELP = """\
--method calibrates weight codes and, with --scale-mode static, activation scales, on the trajectories of the
full-precision sampler: use them with `modiff sample --calibration DIR` or accelerate(pipe, calibration=DIR). With
--out MODEL/modiff_calibration they are used by themselves. An interrupted calibration goes on where it stopped.

--schedule fits which calls of the UNet are computed, and what every call returns, for one sampler and number of steps:
for a number of computed calls (--evaluations), the fewest of them within --budget-db (PSNR to the picture that
--towards names), or as many as --speedup allows (from times measured first, as --mode and the bits say). It is fitted
in full precision, which holds at any bits, and judged on other seeds. An interrupted fit goes on where it stopped.

--plan chooses a mode for every layer or block: float, quantized in 8 bits, or as --mode and --act-bits say. Times are
those within whole calls of the UNet on this device with --batch pictures, and fidelity is measured along their
trajectory. The plan is timed and its pictures are judged before it is written; where nothing is faster than float, it
is all float. It is also stored for plan="auto"."""

EXPLAIN_HELP = """\
Print what becomes of every layer of a model: mode, bits, backend and reason; the state of a run with --batch samples
(with guidance, pictures take two each); and with a plan the time of every mode, speed-up, SQNR and state of its units,
as far as they were measured."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, least: float, most: float = math.inf, above: bool = False) -> Callable[[str], Any]:
    """Reads a finite number from `least` (with `above`: greater than it) to `most`."""

    def read(text: str) -> Any:
        value = kind(text)
        if not (least < value if above else least <= value) or value > most or value == math.inf:
            end = "" if most == math.inf else f" and at most {most:.0f}"
            raise argparse.ArgumentTypeError(f"must be {'above' if above else 'at least'} {least}{end}, got {text}")
        return value

    read.__name__ = "number"  # as argparse calls it where `text` is none
    return read


positive, above_0 = number(int, 1), number(float, 0, above=True)


def bits(text: str, allowed: Sequence[int] = BITS) -> int:
    if text not in (known := [str(number) for number in allowed]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a supported number of bits; allowed: {', '.join(known)}")
    return int(text)


def bits_list(text: str, allowed: Sequence[int] = BITS) -> tuple[int, ...]:
    return tuple(dict.fromkeys(bits(item.strip(), allowed) for item in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def model(text: str) -> str:
    if text != SHIPPED and not Path(text).is_dir() and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        advice = f"give a diffusers folder, a hub id (owner/name) or {SHIPPED}"
        raise argparse.ArgumentTypeError(f"{text}: no such folder; {advice}")
    return text


def calibration(text: str) -> Path:
    """The folder of a calibration, whose files are there; what they hold is looked at later."""
    folder = Path(text)
    try:
        json.loads((folder / "calibration.json").read_text())["layers"]
        (folder / "calibration.safetensors").stat()
    except (OSError, ValueError, TypeError, KeyError) as error:
        advice = "give a folder of `modiff calibrate --method`"
        raise argparse.ArgumentTypeError(f"cannot read a calibration from {text} ({error}); {advice}") from error
    return folder


def png(text: str, or_folder: bool = False) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" and not (or_folder and (path.is_dir() or not path.suffix)):
        folder = ", or the name of a folder: one without an ending, or one that is there" if or_folder else ""
        raise argparse.ArgumentTypeError(f"{text}: pictures are written as PNG; give a name that ends in .png{folder}")
    return path


def auto_or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Of an option that takes "auto", "none" (which is None), or what `read` makes of the text."""

    def parsed(text: str) -> Any:
        if text in ("auto", "none"):
            return text if text == "auto" else None
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{error}; or auto, or none") from error

    return parsed


@auto_or_none
def schedule(text: str) -> list[stored.StoredSchedule] | str:
    if AUTO.fullmatch(text):
        return text
    return stored.read(Path(text)) if text.endswith(".json") else str(StepSchedule.parse(text))


@auto_or_none
def plan(text: str) -> str:
    try:
        LayerPlan.from_json(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {text} as a layer plan: {error}") from error
    return text


def add_model_options(add: Callable[..., Any], sampled: bool = True) -> None:
    """The model and how it runs; sampled: with a seed."""
    folder = "UNet or pipeline folder of diffusers, or a hub id (default: the model shipped with the package)"
    add("--model", type=model, help=folder)
    add("--prompt", help="text for a text-to-image pipeline")
    threads = number(int, 1, os.cpu_count() or 1)
    add("--threads", type=threads, help="CPU threads, as many as there are cores at most (default: torch decides)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample (%(default)s)")
    backend = "backend of the quantised layers, see `modiff doctor` (%(default)s)"
    add("--backend", choices=BACKENDS, default="auto", help=backend)
    scales = "one activation scale for what (default: per_block for residuals of 3 and 4 bits, else per_sample)"
    add("--granularity", choices=GRANULARITIES, help=scales)
    add("--quiet", action="store_true", help="no progress bars, notes and warnings")
    add("--batch", type=positive, default=8, help="images sampled at once (%(default)s)")
    add("--steps", type=positive, default=50, help="sampling steps (%(default)s)")
    add("--scheduler", choices=tuple(SCHEDULERS), default="ddim", help="sampler (%(default)s)")
    if sampled:
        seeds = number(int, 0, 2**63 - 1)
        add("--seed", type=seeds, default=0, help="the noise of image i has seed SEED + i (%(default)s)")


def add_layer_options(add: Callable[..., Any], mode: str | None = "modulated", bits_of_layers: int | None = 8) -> None:
    """The defaults are None where it counts whether an option was given."""
    add("--mode", choices=MODES, default=mode, help="how layers are computed (modulated)")
    add("--weight-bits", type=bits, default=bits_of_layers, help=f"3, 4 or 8 {LAYER_BITS}")
    of_codes = functools.partial(bits, allowed=ACT_BITS)
    add("--act-bits", type=of_codes, default=bits_of_layers, help=f"3, 4, 7 or 8 {LAYER_BITS}, weight_only")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="modiff", description="Faster sampling of diffusion models with low-bit modulated layers.")
    parser.add_argument("--version", action="version", version=f"modiff_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, text: str, notes: str | None = None) -> Parser:
        form = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(name, help=summary, description=text, epilog=notes, formatter_class=form)

    summary = "fidelity and time of full precision, plain and modulated layers"
    add = command("compare", summary, COMPARE_HELP, COMPARE_NOTES).add_argument
    add_model_options(add)
    add("--schedule", type=schedule, default="auto", help=f"of the scheduled rows: {SCHEDULE_HELP} (auto)")
    add("--plan", type=plan, metavar="FILE", help=f"adds a row with this layer plan: {PLAN_HELP} (none)")
    add("--images", type=positive, default=16, help="images to judge, IMAGES / BATCH runs (%(default)s)")
    add("--rows", type=names, default=(), metavar="A,B", help="configurations to show (default: all)")
    add("--weight-bits", type=bits_list, default=(8,), metavar="A,B", help="of 3, 4, 8 (8)")
    of_codes = functools.partial(bits_list, allowed=ACT_BITS)
    add("--act-bits", type=of_codes, metavar="A,B", help="of 3, 4, 7, 8 (plain: 8,4; modulated: 8,4,3)")
    add("--repeats", type=positive, default=2, help="how often every run is timed (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="with or without torch.compile")
    add("--json", type=Path, metavar="FILE", help="write the results as JSON")
    add("--grid", type=png, metavar="FILE", help="draw images of a few rows, and their differences, as PNG")
    add("--html", type=Path, metavar="FILE", help="write table, images and plots as one page for a browser")
    everything = "write compare.json, compare.md, compare_grid.png, compare.html and speed_quality.png"
    add("--out", type=Path, metavar="DIR", help=everything)

    add = command("sample", "sample images in one configuration", SAMPLE_HELP).add_argument
    add_model_options(add)
    add("--schedule", type=schedule, help=f"calls to skip: {SCHEDULE_HELP} (none)")
    add("--plan", type=plan, metavar="FILE", help=f"modes of the layers: {PLAN_HELP} (none)")
    add("--images", type=positive, default=8, help="images to sample (%(default)s)")
    add_layer_options(add, None, None)
    folder = "folder of `modiff calibrate --method`; has mode and bits"
    add("--calibration", type=calibration, metavar="DIR", help=folder)
    places = "a PNG of all images, or a folder for one PNG each (%(default)s)"
    pictures = functools.partial(png, or_folder=True)
    add("--out", type=pictures, default=Path("samples.png"), metavar="PATH", help=places)
    larger = "how many times as large a PNG of all images shows every pixel (default: to about 512 pixels across)"
    add("--scale", type=positive, metavar="N", help=larger)

    summary = "calibrate weights and activation scales, or find the step schedule or the layer plan of a model"
    calibrate = command("calibrate", summary, CALIBRATE_HELP)
    add = calibrate.add_argument
    add_model_options(add)
    add_layer_options(add)
    wanted = calibrate.add_mutually_exclusive_group(required=True).add_argument
    wanted("--method", choices=METHODS, help="calibrate layers in this way, see docs/calibration.md")
    wanted("--schedule", action="store_true", help="fit a step schedule")
    wanted("--plan", action="store_true", help="measure a layer plan")
    add("--samples", type=positive, default=64, help="--method: trajectories to learn from (%(default)s)")
    modes = ("dynamic", "static")
    add("--scale-mode", choices=modes, default="dynamic", help="--method: activation scales (%(default)s)")
    add("--group-size", type=positive, help="--method: weights that share a scale (a whole channel)")
    kept = "--method: keep the codes of this calibration, find scales only"
    add("--weights", type=calibration, metavar="DIR", help=kept)
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="--method: an option of the method")
    goal = calibrate.add_mutually_exclusive_group().add_argument
    goal("--evaluations", type=number(int, 2), help="--schedule: computed calls of a run")
    goal("--budget-db", type=above_0, help="--schedule: least fidelity, with the fewest computed calls")
    goal("--speedup", type=number(float, 1, above=True), help="--schedule: speed-up over computing every call")
    wanted_picture = "--schedule: the picture of the same sampler, or of one with many more calls (%(default)s)"
    add("--towards", choices=("own", "converged"), default="own", help=wanted_picture)
    fitted = "--schedule: images fitted on, all at once; 1.5 times as many others judge it (%(default)s)"
    add("--images", type=positive, default=16, help=fitted)
    loss = "--plan: PSNR it may lose against the best single mode (%(default)s)"
    add("--max-loss-db", type=above_0, default=0.5, help=loss)
    add("--max-state-bytes", type=number(int, 0), help="--plan: bytes of x_hat and y_hat it may take (any number)")
    add("--rounds", type=positive, default=5, help="--plan: how often every call is timed (%(default)s)")
    places = """\
--method: a folder (calibration); otherwise JSON for --schedule or --plan of the other commands (modiff_schedule.json or
modiff_plan.json in the folder of --model, where --schedule auto finds the first, or here)"""
    add("--out", type=Path, metavar="PATH", help=places)

    add = command("explain", "what becomes of every layer, and why", EXPLAIN_HELP).add_argument
    add_model_options(add, sampled=False)
    add_layer_options(add)
    add("--plan", type=plan, default="auto", metavar="FILE", help=f"{PLAN_HELP} (%(default)s)")
    add("--max-state-bytes", type=number(int, 0), help="bytes of state that a plan may take")
    add("--schedule", type=schedule, help=f"shows the calls that are computed: {SCHEDULE_HELP} (none)")
    add("--json", type=Path, metavar="FILE", help="write the same as JSON")
    drawing = "draw state, time as the plan has it, and computed calls as PNG, or as the ending says"
    add("--plot", type=Path, metavar="FILE", help=drawing)

    commands.add_parser("doctor", help="what runs on this machine, what does not, and why")
    return parser


def check(args: argparse.Namespace) -> None:
    """What can be said of the options together, and of folders; UserError for those that do not fit."""
    if isinstance(found := getattr(args, "schedule", None), list):
        args.stored, args.schedule = found, str(found[-1].schedule)  # which of them, is known with the model
    if args.command == "compare":
        from modiff_kernels.evaluation.configurations import build_rows, select_rows

        rows = build_rows(args.weight_bits, args.act_bits, args.compile, args.schedule, args.plan)
        args.rows = select_rows(rows, args.rows)
    elif args.command == "explain" and args.mode in ("float", "weight_only"):
        if args.plan not in (None, "auto"):
            raise UserError(f"--plan {args.plan}: --mode {args.mode} has no low bits to plan; give --mode modulated")
        args.plan = None
    elif args.command == "calibrate":
        goal_given = any(goal is not None for goal in (args.evaluations, args.budget_db, args.speedup))
        if args.plan and goal_given:
            raise UserError("--plan: --evaluations, --budget-db and --speedup are for a schedule; give --max-loss-db")
        if args.schedule and not goal_given:
            raise UserError("with --schedule, one of --evaluations, --budget-db and --speedup is required")
        if args.method and args.mode == "float":
            raise UserError("--mode float: there is nothing to calibrate; choose modulated, quantized or weight_only")
        if args.method and args.out is not None and args.out.exists() and not args.out.is_dir():
            raise UserError(f"--out {args.out}: a file of this name is there; give a folder")
    if (folder := getattr(args, "model", None)) is not None and Path(folder).is_dir():
        with user_errors(f"--model {folder}: "):
            look_into(Path(folder), low_bit=args.command == "sample")
    outputs, out = [getattr(args, name, None) for name in ("json", "grid", "html", "plot")], getattr(args, "out", None)
    if out is not None and getattr(args, "method", None) is None:
        is_folder = args.command == "compare" or (args.command == "sample" and out.suffix.lower() != ".png")
        outputs.append(out / f".modiff_{os.getpid()}" if is_folder else out)
    for path in filter(None, outputs):
        writable(path)


def writable(path: Path) -> Path:
    """`path`, after its folder was made and a file could be opened there; UserError otherwise."""
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if new:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another path") from error
    return path
