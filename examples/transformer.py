"""Sample a diffusion transformer (DiT) with low-bit layers.

    python examples/transformer.py --classes 207 360 --out dogs.png

PixArt, Stable Diffusion 3 and Flux are accelerated by the same call; only the arguments of `pipe(...)` differ. In
transformers, layers of 8 bits are plain by default, and those of 4 and 3 bits modulated (docs/models.md)."""

import argparse

import torch
from diffusers import DiTPipeline
from PIL import Image

import modiff_kernels as mk


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample a DiT with low-bit layers.")
    parser.add_argument(
        "--model", default="facebook/DiT-XL-2-256", help="folder or hub id of the pipeline (%(default)s)"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[207, 360], help="of ImageNet, one picture each")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (%(default)s)")
    parser.add_argument("--act-bits", type=int, choices=(3, 4, 7, 8), default=8, help="of activations (%(default)s)")
    parser.add_argument("--out", default="transformer.png", help="file of the pictures, side by side (%(default)s)")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = DiTPipeline.from_pretrained(args.model, torch_dtype=torch.float16 if device == "cuda" else torch.float32)
    pipe.to(device)
    handle = mk.accelerate(pipe, mk.ModiffConfig(weight_bits=8, act_bits=args.act_bits))
    print(handle.explain())

    noise = torch.Generator().manual_seed(0)
    pictures = pipe(args.classes, num_inference_steps=args.steps, generator=noise).images
    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for place, picture in enumerate(pictures):
        row.paste(picture, (place * width, 0))
    row.save(args.out)


if __name__ == "__main__":
    main()
