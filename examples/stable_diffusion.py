"""Sample Stable Diffusion 1.5 with low-bit layers; examples/sdxl.py is the same for Stable Diffusion XL.

    python examples/stable_diffusion.py --prompt "a lighthouse in a storm" --out lighthouse.png
    python examples/stable_diffusion.py --prompt "a lighthouse in a storm" --compare --out both.png

With plain diffusers this is the same program without three lines, which are marked in `run`:

    import modiff_kernels as mk                                                      # 1
    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    handle = mk.accelerate(pipe, mk.ModiffConfig(weight_bits=8, act_bits=8))         # 2
    image = pipe("a lighthouse in a storm").images[0]
    print(handle.explain())                                                          # 3, if you want to know

`--compare` samples in full precision first, from the same seed, and shows both pictures side by side, with time and
PSNR. The full precision of a CPU is float32, that of a GPU float16."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import modiff_kernels as mk  # 1 of 3
from modiff_kernels.evaluation import psnr, text_table

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WARM_UP_STEPS = 5  # of which the first allocates state and two more warm a CUDA graph up


class UserError(Exception):
    """Bad input: reported as one line, exit code 2."""


def positive(text: str) -> int:
    """A number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def size(text: str) -> int:
    """Pixels; the VAE makes 8 of each pixel of its latents."""
    value = positive(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"must be a multiple of 8, such as {max(8, value // 8 * 8)}, got {value}")
    return value


def png(text: str) -> Path:
    """A PNG file in a folder that exists."""
    path = Path(text)
    if path.suffix != ".png" or not path.parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a .png file in a folder that exists, got {text}")
    return path


def parse_args(argv: list[str] | None, model: str) -> argparse.Namespace:
    """Parse and check the command line; `model` is the default of --model."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            self.exit(2, f"{self.prog}: error: {message}\n")

    parser = Parser(description="Sample a picture with low-bit layers.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=model, help="folder of the pipeline, or hub id (%(default)s)")
    add("--prompt", default="a photo of a lighthouse in a storm", help="what to draw (%(default)s)")
    add("--steps", type=positive, default=30, help="denoising steps (%(default)s)")
    add("--seed", type=int, default=0, help="of the noise that the picture begins with (%(default)s)")
    add("--size", type=size, help="width and height in pixels (default: that of the model)")
    add("--weight-bits", type=int, choices=(3, 4, 8), default=8, help="of the weights (%(default)s)")
    add("--act-bits", type=int, choices=(3, 4, 7, 8), default=8, help="of the change of activations (%(default)s)")
    add("--schedule", help='calls of the UNet to forecast: auto, "forecast every=3", ... (docs/schedules.md)')
    add("--compile", action="store_true", help="compile the UNet with torch.compile; with --compare, both")
    graphs = argparse.BooleanOptionalAction
    add("--cuda-graphs", action=graphs, help="run the calls of the UNet as CUDA graphs (default: on a GPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to sample (%(default)s)")
    add("--compare", action="store_true", help="sample in full precision too: a table, and both pictures in one PNG")
    add("--explain", action="store_true", help="print what became of every layer, and why")
    add("--out", type=png, default=Path("picture.png"), metavar="PNG", help="file of the picture (%(default)s)")
    args = parser.parse_args(argv)
    if not args.prompt.strip():
        parser.error("--prompt: is empty; say what to draw")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; give --device cpu")
    if args.cuda_graphs and args.device == "cpu":
        parser.error("--cuda-graphs: needs a GPU, but the device is cpu; leave it out")
    return args


def make_config(args: argparse.Namespace) -> mk.ModiffConfig:
    """The options as a ModiffConfig."""
    try:
        return mk.ModiffConfig(
            weight_bits=args.weight_bits,
            act_bits=args.act_bits,
            schedule=args.schedule,
            cuda_graphs=args.cuda_graphs,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def load(args: argparse.Namespace, kind: str) -> DiffusionPipeline:
    """The pipeline of --model on --device, if it is a `kind`."""
    if not Path(args.model).is_dir() and not HUB_ID.fullmatch(args.model):
        raise UserError(f"--model {args.model}: no such folder; give a folder of diffusers or a hub id (owner/name)")
    if Path(args.model).is_dir() and not (Path(args.model) / "model_index.json").is_file():
        raise UserError(f"--model {args.model}: no model_index.json in this folder; give the folder of a pipeline")
    dtype = torch.float16 if args.device == "cuda" else torch.float32
    try:
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype)
    except Exception as error:  # diffusers, the hub and safetensors raise what they like
        raise UserError(f"--model {args.model}: cannot be loaded: {first_line(error)}") from error
    if type(pipe).__name__ != kind:
        raise UserError(f"--model {args.model}: is a {type(pipe).__name__}, this example samples a {kind}")
    return pipe.to(args.device)


def sample(pipe: DiffusionPipeline, args: argparse.Namespace, steps: int | None = None) -> tuple[np.ndarray, float]:
    """One picture [H, W, 3] in 0..1 and the seconds it took, text encoder and VAE included."""
    noise = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    result = pipe(
        prompt=args.prompt,
        num_inference_steps=steps or args.steps,
        height=args.size,
        width=args.size,
        generator=noise,
        output_type="np",
    )
    return result.images[0], time.perf_counter() - start


def sample_twice(pipe: DiffusionPipeline, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """`sample` after a run that compiles, captures and chooses kernels, if the time matters."""
    if args.compare:  # a short one, unless a schedule makes calls of other kinds
        sample(pipe, args, steps=args.steps if args.schedule else min(args.steps, WARM_UP_STEPS))
    return sample(pipe, args)


def sample_in_full_precision(pipe: DiffusionPipeline, args: argparse.Namespace) -> tuple[np.ndarray, float]:
    """The reference, as fast as torch makes it."""
    unet = pipe.unet.to(memory_format=torch.channels_last)
    if args.compile:
        pipe.unet = torch.compile(unet)
    try:
        return sample_twice(pipe, args)
    finally:
        pipe.unet = unet


def run(args: argparse.Namespace, kind: str) -> None:
    """Sample and write what the options say."""
    config = make_config(args)
    pipe = load(args, kind)
    pipe.set_progress_bar_config(desc="sampling", leave=False)
    reference = sample_in_full_precision(pipe, args) if args.compare else None

    try:
        handle = mk.accelerate(pipe, config)  # 2 of 3
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error
    if args.compile:
        handle.compile()
    picture, seconds = sample_twice(pipe, args)
    if args.explain:
        print(handle.explain())  # 3 of 3

    pictures = [picture] if reference is None else [reference[0], picture]
    write(pictures, args.out)
    state_mb = handle.state.nbytes() / 1e6
    if reference is None:
        print(f"{args.out}: {args.steps} steps in {seconds:.1f} s, {state_mb:.1f} MB of state")
        return
    print(comparison(args, reference, (picture, seconds), state_mb))
    print(f"{args.out}: full precision on the left, low bits on the right")


def comparison(
    args: argparse.Namespace, reference: tuple[np.ndarray, float], ours: tuple[np.ndarray, float], state_mb: float
) -> str:
    """The table of --compare."""
    made = ", compiled" if args.compile else ""
    full = f"{'float16' if args.device == 'cuda' else 'float32'} channels_last{made}"
    name = f"modulated W{args.weight_bits}A{args.act_bits}{made}"
    name += ", CUDA graphs" * bool(args.cuda_graphs) + f", {args.schedule}" * bool(args.schedule)
    psnr_db = psnr(ours[0][None], reference[0][None])[0]
    return text_table(
        ("configuration", "s/image", "speed-up", "PSNR dB", "state MB"),
        [
            (full, f"{reference[1]:.2f}", "1.00x", "reference", "-"),
            (name, f"{ours[1]:.2f}", f"{reference[1] / ours[1]:.2f}x", f"{psnr_db:.1f}", f"{state_mb:.1f}"),
        ],
    )


def write(pictures: Iterable[np.ndarray], path: Path) -> None:
    """The pictures [H, W, 3] in 0..1 side by side as one PNG."""
    pixels = (np.concatenate([*pictures], axis=1).clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(pixels).save(path)


def first_line(error: Exception) -> str:
    """What the error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def main(
    argv: list[str] | None = None,
    kind: str = "StableDiffusionPipeline",
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
) -> int:
    """Command-line entry point for a pipeline of class `kind`; `model` is the default of --model."""
    args = parse_args(argv, model)
    try:
        run(args, kind)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
