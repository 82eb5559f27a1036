"""Sample Stable Diffusion with a LoRA and low-bit layers (needs the package peft).

    python examples/lora.py --lora style.safetensors --prompt "a lighthouse in a storm" --out styled.png

The LoRA is fused into the weights first, and costs nothing afterwards. `--beside` keeps it in float beside the low-bit
layers: slower, but `pipe.set_adapters` may then change its strength from picture to picture (docs/diffusers.md)."""

import argparse

import torch
from diffusers import DiffusionPipeline

import modiff_kernels as mk


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample Stable Diffusion with a LoRA and low-bit layers.")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="folder or hub id")
    parser.add_argument("--lora", required=True, help="file, folder or hub id of the LoRA")
    parser.add_argument("--scale", type=float, default=1.0, help="strength of the LoRA (%(default)s)")
    parser.add_argument("--beside", action="store_true", help="do not fuse it into the weights")
    parser.add_argument("--prompt", default="a photo of a lighthouse in a storm", help="what to draw (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="denoising steps (%(default)s)")
    parser.add_argument("--out", default="lora.png", help="file of the picture (%(default)s)")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=dtype).to(device)
    pipe.load_lora_weights(args.lora, adapter_name="style")
    if args.beside:
        pipe.set_adapters("style", args.scale)
    else:
        pipe.fuse_lora(lora_scale=args.scale)
        pipe.unload_lora_weights()  # of what is fused already
    handle = mk.accelerate(pipe, mk.ModiffConfig(weight_bits=8, act_bits=8))
    print(handle.explain().splitlines()[0])

    noise = torch.Generator().manual_seed(0)
    pipe(args.prompt, num_inference_steps=args.steps, generator=noise).images[0].save(args.out)


if __name__ == "__main__":
    main()
