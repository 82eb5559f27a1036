"""A whole Stable Diffusion 1.5 pipeline of random weights on the CPU, one guided picture of 512x512: seconds of its
text encoder, UNet and VAE, and the peak memory of the process.

    python -m benchmarks pipeline --steps 25 --threads 2 --json benchmarks/results/pipeline.json

Each configuration has a process of its own, which does what a user would: makes the pipeline, draws a picture in two
steps, which compiles and allocates, and then the one that is timed. --rounds repeats all of them, in turns. PSNR is
that of the picture to the first row's; with random weights it says little about quality."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modiff_kernels as mk
from benchmarks import record
from benchmarks.shapes import CONFIGS, VAE_DECODER, build_unet
from benchmarks.tables import caption, loaded
from modiff_kernels.evaluation import markdown_table, psnr, to_json

ROWS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32 compiled": {"compile": True},
    "W8A8": {"config": {}},
    "W8A8, VAE": {"config": {}, "vae": True},
    "W8A8, VAE, schedule auto": {"config": {"schedule": "auto"}, "vae": True},
}
"""By name what is done to the pipeline; ours have their state in float16, and keep no float weights."""


def build() -> Any:
    """Stable Diffusion 1.5 without tokenizer, safety checker and trained weights; DPM-Solver++."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, config = build_unet("sd15"), CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    torch.manual_seed(1)
    vae = AutoencoderKL(**{"block_out_channels": (128, 256, 512, 512), **CONFIGS[VAE_DECODER]["unet"]}).eval()
    text = CLIPTextModel(config).eval()
    scheduler = DPMSolverMultistepScheduler(**CONFIGS["sd15"]["scheduler"])
    pipe = StableDiffusionPipeline(vae, text, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(name: str, steps: int, guidance: float, picture: str) -> dict[str, float]:
    """Seconds of the parts of one picture, which goes to a file, and the peak memory of this process in bytes."""
    pipe, row, seconds = build(), ROWS[name], defaultdict(float)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    if "config" in row:
        config = mk.ModiffConfig(weight_bits=8, act_bits=8, state_dtype="float16", **row["config"])
        mk.accelerate(pipe, config, keep_original=False, vae=row.get("vae", False))
    if row.get("compile"):
        pipe.unet.forward = torch.compile(pipe.unet.forward)
        pipe.vae.decoder.forward = torch.compile(pipe.vae.decoder.forward)

    def timed(part: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            seconds[part] += time.perf_counter() - started
            return result

        return run

    encode = timed("text encoder", pipe.text_encoder)
    pipe.unet.forward, pipe.vae.decode = timed("UNet", pipe.unet.forward), timed("VAE", pipe.vae.decode)
    tokens = torch.arange(77)[None]
    for count in (2, steps):
        seconds.clear()
        started = time.perf_counter()
        texts = {f"{sign}prompt_embeds": encode(tokens + i)[0] for i, sign in enumerate(("", "negative_"))}
        generator = torch.Generator().manual_seed(0)
        options = {"guidance_scale": guidance, "generator": generator, "output_type": "np"}
        image = pipe(**texts, num_inference_steps=count, **options).images
        seconds["all"] = time.perf_counter() - started
    np.save(picture, image)
    return {**seconds, "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def table(results: Path, *files: str) -> str | None:
    """The median round of each row of the reports, which are those of different numbers of steps."""
    reports = [loaded(results / f"{file}.json") for file in files]
    if None in reports:
        return None
    parts, cells = ("text encoder", "UNet", "VAE", "all"), []
    for report in reports:
        best = min(median(report["rows"][name], "all") for name in report["rows"] if "float" in name)
        for name, rounds in report["rows"].items():
            seconds = [median(rounds, part) for part in parts]
            quality = "reference" if rounds[0]["psnr"] is None else f"{median(rounds, 'psnr'):.1f}"
            more = [f"{best / seconds[-1]:.2f}x", f"{median(rounds, 'peak') / 2**30:.1f}", quality]
            cells.append([name, str(report["steps"]), *(f"{s:.1f}" for s in seconds), *more])
    header = ["pipeline", "steps", *(f"{part} s" for part in parts), "vs best float32", "peak GiB", "PSNR dB"]
    return f"{markdown_table(header, cells)}\n\n{caption(reports)}"


def median(rounds: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=25, help="of the sampler (%(default)s)")
    parser.add_argument("--guidance", type=float, default=7.5, help="1: none, one sample a call (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], help="default: all")
    parser.add_argument("--rounds", type=int, default=1, help="of all configurations (%(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--one", choices=ROWS, help="measure this one here, and print what it took")
    parser.add_argument("--picture", default="picture.npy", help="of --one")


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, args.steps, args.guidance, args.picture)))
        return 0
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)
    shared = [sys.executable, "-m", "benchmarks", "pipeline", "--steps", args.steps, "--guidance", args.guidance]
    shared += ["--threads", args.threads]
    with tempfile.TemporaryDirectory() as folder:
        pictures = {name: Path(folder) / f"{i}.npy" for i, name in enumerate(args.rows)}
        for name in args.rows * args.rounds:
            command = [*map(str, shared), "--one", name, "--picture", str(pictures[name])]
            rows[name].append(
                json.loads(subprocess.run(command, check=True, capture_output=True).stdout.split(b"\n")[-2])
            )
            first, own = np.load(pictures[args.rows[0]]), np.load(pictures[name])
            rows[name][-1]["psnr"] = float(psnr(own, first).mean())
            print(name, {key: round(value, 2) for key, value in rows[name][-1].items()}, flush=True)
    if args.json:
        about = record.environment()
        args.json.write_text(to_json({**about, "steps": args.steps, "rows": rows}))
    return 0
