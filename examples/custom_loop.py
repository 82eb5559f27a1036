"""Your own sampling loop around a UNet and a scheduler of diffusers, with low-bit layers.

    python examples/custom_loop.py --out loop.png

All calls of the network for one batch of pictures go inside `handle.sampling_run(...)`. There the layers begin anew,
and remember what they computed in the call before."""

import argparse

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import modiff_kernels as mk


def sample(unet: torch.nn.Module, scheduler, handle: mk.Handle, steps: int, batch: int, seed: int) -> torch.Tensor:
    """Pictures [batch, C, H, W] from noise, with values of about -1 to 1."""
    size = unet.config.sample_size
    x = torch.randn(batch, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(seed))
    x = x.to(unet.device)
    with torch.inference_mode(), handle.sampling_run(scheduler=scheduler):
        scheduler.set_timesteps(steps, device=unet.device)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            predicted = unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(predicted, t, x).prev_sample
    return x


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample the shipped model in a loop of your own.")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="pictures (%(default)s)")
    parser.add_argument("--schedule", help='calls that are predicted: auto, "auto 8", "forecast every=3", ...')
    parser.add_argument("--out", default="loop.png", help="file of the pictures, side by side (%(default)s)")
    args = parser.parse_args(argv)

    pipe = mk.load_shipped()  # or any pipeline that has a UNet: DDPMPipeline.from_pretrained(...)
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    handle = mk.accelerate(pipe.unet, mk.ModiffConfig(act_bits=4, schedule=args.schedule))
    x = sample(pipe.unet, scheduler, handle, args.steps, args.batch, seed=0)
    if args.schedule:
        print(handle.explain_schedule())

    pixels = (x / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    row = Image.fromarray(np.concatenate(pixels, axis=1))
    row.resize((row.width * 8, row.height * 8), Image.Resampling.NEAREST).save(args.out)


if __name__ == "__main__":
    main()
