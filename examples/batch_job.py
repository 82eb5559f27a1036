"""Sample many pictures with several processes, one for each GPU or for a part of the CPU's cores.

    torchrun --standalone --nproc-per-node 2 examples/batch_job.py --images 64 --out pictures

Every process accelerates a pipeline of its own and takes its share of the seeds. Pictures that are there already are
left out, so an interrupted job goes on where it stopped. `modiff sample` does the same, and checks what is there."""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

import modiff_kernels as mk


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Sample pictures of the shipped model with several processes.")
    parser.add_argument("--images", type=int, default=64, help="pictures in all (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder of the pictures (%(default)s)")
    args = parser.parse_args(argv)

    dist.init_process_group("gloo")  # only counts are sent: gloo will do on GPUs, too
    rank, count = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))

    pipe = mk.load_shipped().to(device)  # or DDPMPipeline.from_pretrained(...)
    pipe.set_progress_bar_config(disable=True)
    mk.accelerate(pipe, mk.ModiffConfig(act_bits=4))

    args.out.mkdir(parents=True, exist_ok=True)
    mine = [seed for seed in range(rank, args.images, count) if not (args.out / f"{seed:05}.png").exists()]
    for first in range(0, len(mine), args.batch):
        seeds = mine[first : first + args.batch]
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        pictures = pipe(len(seeds), generator=noise, num_inference_steps=args.steps).images
        for seed, picture in zip(seeds, pictures):
            picture.save(args.out / f"{seed:05}.png")

    made = torch.tensor(len(mine))
    dist.all_reduce(made)  # waits for the slowest, too
    if rank == 0:
        print(f"{made} pictures by {count} processes in {args.out}, {args.images - made} were there already")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
