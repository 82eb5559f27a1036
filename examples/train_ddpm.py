r"""Train a small denoiser on CIFAR-10, a DDPM UNet or a diffusion transformer, and save it as a diffusers folder.

    python examples/train_ddpm.py --data DATA --out my_model --preset small16 --steps 4000

The data folder holds CIFAR-10 as ``examples/cifar10.py`` reads it, such as the public binary version.
The folder written by ``--out`` loads with ``UNet2DModel.from_pretrained(out)`` (EMA weights, fp16, in files of up to
14 MB) and ``DDIMScheduler.from_pretrained(out, subfolder="scheduler")``.  Give the same command with ``--resume`` to go
on from the last checkpoint.  Every schedule counts steps, so a run may be paused or restarted at any time.
``--network dit`` trains a DiT, a ``DiTTransformer2DModel`` that knows the classes of CIFAR-10.

On a GPU, where the data stay on the device and bf16 and ``torch.compile`` are used, a limit in minutes fits better:

    python examples/train_ddpm.py --data DATA --out my_model --preset ddpm_cifar10 --minutes 8 --batch-size 256 \
        --lr 4e-4 --ema 0.9995 --checkpoint-dir checkpoints

``--minutes`` ends training, counted from the start of the program and over resumed runs; the learning rate reaches zero
with it.  The last checkpoint, the test loss and the samples come after it and take some seconds on a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import CLASSES, load_cifar10
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from tqdm import tqdm

CHECKPOINT = "checkpoint.pt"
CHECKPOINT_S = 120  # between checkpoints; that of 36 M parameters has 570 MB
SHARD = "14MB"
STEPS = 4000
UNLIMITED_STEPS = 10**9
CLOCK_STEPS = 20  # after so many steps the clock waits for the device

PRESETS: dict[str, dict] = {
    # About 1.8 M parameters, for 16x16 images; trains in about an hour on two CPU cores.
    "small16": {
        "size": 16,
        "layers_per_block": 1,
        "block_out_channels": (64, 96),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
        "norm_num_groups": 32,
    },
    # About 9 M parameters, for 32x32 images, attention at 16x16.
    "base32": {
        "size": 32,
        "layers_per_block": 1,
        "block_out_channels": (64, 128, 128, 192),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 64,
        "norm_num_groups": 32,
    },
    # 35.7 M parameters: the configuration of google/ddpm-cifar10-32.
    "ddpm_cifar10": {
        "size": 32,
        "layers_per_block": 2,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
    },
    # A DiT of 4.5 M parameters (2.7 M of them in its layers per token), 64 tokens of 2x2 pixels.
    "dit": {
        "size": 16,
        "num_layers": 6,
        "num_attention_heads": 3,
        "attention_head_dim": 64,
        "patch_size": 2,
        "num_embeds_ada_norm": len(CLASSES),
    },
}


class UserError(Exception):
    """Bad input from the command line: reported as one line, exit code 2."""


def positive(kind):
    """Return an argparse type that accepts positive numbers of `kind` only."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str):
            self.exit(2, f"{self.prog}: error: {message}\n")

    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    flag = argparse.BooleanOptionalAction
    add("--data", type=Path, required=True, help="folder of CIFAR-10")
    add("--out", type=Path, required=True, help="folder to write the model to")
    add("--size", type=int, choices=(16, 32), help="image size (default: that of the preset)")
    add("--preset", "--network", choices=tuple(PRESETS), default="small16", help="network and its size (%(default)s)")
    add("--steps", type=positive(int), help=f"optimiser steps ({STEPS}, with --minutes without limit)")
    add("--minutes", type=positive(float), help="end training after this time, resumed runs included")
    add("--batch-size", type=positive(int), default=128, help="images per step (%(default)s)")
    add("--lr", type=positive(float), default=1e-3, help="peak learning rate (%(default)s)")
    add("--ema", type=positive(float), default=0.999, help="largest EMA decay, below 1 (%(default)s)")
    add("--seed", type=int, default=0, help="seed of weights, data order and noise (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train (%(default)s)")
    add("--bf16", action=flag, default=None, help="bfloat16 autocast (default: on CUDA only)")
    add("--compile", action=flag, default=None, help="torch.compile the network (default: on CUDA only)")
    add("--checkpoint-dir", type=Path, help="folder of the checkpoint (default: --out)")
    add("--checkpoint-every", type=positive(int), metavar="STEPS", help="between checkpoints (default: two minutes)")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--export-at", type=positive(int), metavar="STEP", help="also write the model to --out after this step")
    add("--quiet", action="store_true", help="no progress bar and no messages")
    add("--sample-grid", action=flag, default=True, help="write sample_grid.png, 64 samples of DDIM-50")
    args = parser.parse_args(argv)
    if not args.ema < 1:
        parser.error(f"argument --ema: must be below 1, got {args.ema}")
    args.steps = args.steps or (UNLIMITED_STEPS if args.minutes else STEPS)
    args.size = args.size or PRESETS[args.preset]["size"]
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda asked for, but torch sees no CUDA device")
    args.compile = args.device == "cuda" if args.compile is None else args.compile
    args.bf16 = args.device == "cuda" if args.bf16 is None else args.bf16
    args.checkpoint_dir = args.checkpoint_dir or args.out
    return args


def load_data(args: argparse.Namespace, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (n, 3, size, size) and int64 labels (n) of "train" or "test"."""
    try:
        return load_cifar10(args.data, split, args.size, args.quiet)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--data: {error}") from error


def build_network(preset: str, size: int) -> UNet2DModel | DiTTransformer2DModel:
    """Build the network of a preset with fresh weights."""
    config = {key: value for key, value in PRESETS[preset].items() if key != "size"}
    if "num_embeds_ada_norm" not in config:
        return UNet2DModel(sample_size=size, in_channels=3, out_channels=3, **config)
    network = DiTTransformer2DModel(sample_size=size, in_channels=3, out_channels=3, **config)
    # As in DiT: a block begins as the identity, and the output as zero.
    blocks = network.transformer_blocks
    for layer in (network.proj_out_1, network.proj_out_2, *(block.norm1.linear for block in blocks)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    for block in blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0  # no guidance: the label is always given
    return network


def conditions(network: torch.nn.Module, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a network takes beside the noisy images and their times."""
    return {} if isinstance(network, UNet2DModel) else {"class_labels": labels}


def lr_factor(step: int, steps: int, elapsed: float = 0.0, begun: float = 0.0) -> float:
    """Linear warm-up over the first 5 % of the steps (500 at most), then cosine decay to zero.

    elapsed: the part of a time limit that is over; where it is ahead of the steps, the decay follows it, and the
    warm-up what has passed since `begun`, the part that was over at the first step."""
    warmup = max(1, min(500, steps // 20))
    warm = max((step + 1) / warmup, 20 * (elapsed - begun))
    if step < warmup and warm < 1:
        return warm
    progress = max((step - warmup) / max(1, steps - warmup), elapsed)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Trainer:
    """Network, EMA copy, optimiser and random state of one training run."""

    COUNTERS = ("step", "seconds", "cpu_seconds", "losses", "loss_sum", "loss_from", "plan")

    def __init__(self, args: argparse.Namespace, train: torch.Tensor, labels: torch.Tensor):
        torch.manual_seed(args.seed)
        torch.backends.cudnn.benchmark = True
        self.args, self.device = args, torch.device(args.device)
        self.train_set, self.labels = train.to(self.device), labels.to(self.device)
        self.model = build_network(args.preset, args.size).to(self.device, memory_format=torch.channels_last)
        self.ema = build_network(args.preset, args.size).to(self.device, memory_format=torch.channels_last)
        self.ema.load_state_dict(self.model.state_dict())
        self.ema.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
        self.forward: torch.nn.Module = self.model
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
        self.generator = torch.Generator(self.device).manual_seed(args.seed)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0  # so far, resumed runs included
        self.begun = 0.0  # `elapsed` at the first step of this run, after data were read and the network compiled
        self.loss_sum, self.loss_from = torch.zeros((), device=self.device), 0
        self.losses: list[tuple[int, float]] = []  # (step, mean training loss since the point before)
        self.log_every = max(1, min(args.steps // 50, 200))
        self.plan = [(0, args.steps)]  # (from this step on, --steps); longer where a resumed run changed --steps

    @property
    def elapsed(self) -> float:
        """The part of --minutes that is over."""
        return self.seconds / (60 * self.args.minutes) if self.args.minutes else 0.0

    @property
    def finished(self) -> bool:
        return self.step >= self.args.steps or self.elapsed >= 1

    def compile(self) -> None:
        """Compile the network, forward and backward; where that fails, say why and go on without."""
        compiled = torch.compile(self.model)
        images = self.train_set[: self.args.batch_size]
        images = images.repeat(-(-self.args.batch_size // len(images)), 1, 1, 1)[: self.args.batch_size]
        labels = self.labels[:1].repeat(len(images))
        try:
            self.loss(compiled, images, labels, torch.Generator(self.device)).backward()
            self.forward = compiled
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            print(f"train_ddpm.py: torch.compile failed, going on without it: {reason}", file=sys.stderr)
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, model, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the predicted noise on uint8 `images` of classes `labels`, at random times."""
        images = images.to(self.device).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(images.shape, generator=generator, device=self.device)
        times = torch.randint(0, 1000, (len(images),), generator=generator, device=self.device)
        noisy = self.schedule.add_noise(images, noise, times).contiguous(memory_format=torch.channels_last)
        with self.autocast():
            predicted = model(noisy, times, return_dict=False, **conditions(self.model, labels))[0]
        return F.mse_loss(predicted.float(), noise)

    def autocast(self):
        """bfloat16 with --bf16, else nothing."""
        if self.args.bf16:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def train_step(self) -> torch.Tensor:
        """One optimiser step and one EMA update; returns the loss."""
        args, generator = self.args, self.generator
        shape = (args.batch_size,)
        index = torch.randint(0, len(self.train_set), shape, generator=generator, device=self.device)
        flip = torch.randint(0, 2, shape, generator=generator, device=self.device).bool()
        images = self.train_set[index]
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(self.step, args.steps, self.elapsed, self.begun)
        loss = self.loss(self.forward, images, self.labels[index], generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        self.loss_sum += loss.detach()
        if self.step % self.log_every == 0:
            self.losses.append((self.step, round(self.loss_sum.item() / (self.step - self.loss_from), 5)))
            self.loss_sum.zero_()
            self.loss_from = self.step
        return loss.detach()

    @property
    def identity(self) -> dict:
        """The options that a resumed run has to share with the run before (all that matter but --steps)."""
        keys = ("preset", "size", "batch_size", "lr", "ema", "seed")
        return {key: getattr(self.args, key) for key in keys}

    def save_checkpoint(self) -> None:
        """Write the checkpoint under a temporary name, then move it into place."""
        path = self.args.checkpoint_dir / CHECKPOINT
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        state |= {name: getattr(self, name) for name in self.COUNTERS}
        state |= {"identity": self.identity, "rng": self.generator.get_state()}
        temporary = path.with_name(f"{path.name}.tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def load_checkpoint(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = self.args.checkpoint_dir / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise UserError(f"cannot read checkpoint {path}: {str(error).splitlines()[0]}") from error
        differ = [
            f"{key} {state['identity'].get(key)}"
            for key, value in self.identity.items()
            if state["identity"].get(key) != value
        ]
        if differ:
            raise UserError(f"checkpoint {path} is of a run with other options: {', '.join(differ)}")
        for name in ("model", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        if self.plan[-1][1] != self.args.steps:
            self.plan.append((self.step, self.args.steps))
        self.generator.set_state(state["rng"].cpu())

    @torch.no_grad()
    def test_loss(self, test: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Loss of the EMA weights on the test set, with fixed noise and times."""
        generator = torch.Generator(self.device).manual_seed(1234)
        batches = zip(*(tensor.to(self.device).split(250) for tensor in test))
        total = sum(self.loss(self.ema, *batch, generator).item() * len(batch[0]) for batch in batches)
        return total / len(test[0])

    @torch.no_grad()
    def sample(self, count: int = 64, steps: int = 50) -> np.ndarray:
        """Draw `count` images with the EMA weights and DDIM; uint8, (count, size, size, 3)."""
        scheduler = self.ddim()
        scheduler.set_timesteps(steps)
        size = self.args.size
        x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)
        more = conditions(self.ema, torch.arange(count, device=self.device) % len(CLASSES))
        for t in scheduler.timesteps:
            with self.autocast():
                noisy, times = x.contiguous(memory_format=torch.channels_last), t.to(self.device).expand(count)
                noise = self.ema(noisy, times, return_dict=False, **more)[0]
            x = scheduler.step(noise.float(), t, x).prev_sample
        return x.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()

    def ddim(self) -> DDIMScheduler:
        """The DDIM scheduler of the same noise schedule."""
        return DDIMScheduler.from_config(self.schedule.config, clip_sample=True, set_alpha_to_one=True)

    def command(self) -> str:
        """The command that gives this result, with every option that matters spelt out."""
        args = self.args
        limits = {"steps": None if args.steps == UNLIMITED_STEPS else args.steps, "minutes": args.minutes}
        limits = {name: value for name, value in limits.items() if value is not None}
        options = {"data": "DATA", "out": args.out.name, **self.identity, **limits, "device": args.device}
        pairs = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items()]
        pairs.append(tuple(f"--{'' if getattr(args, key) else 'no-'}{key}" for key in ("bf16", "compile")))
        return shlex.join(["python", "examples/train_ddpm.py", *(word for pair in pairs for word in pair)])

    def export(self, test: tuple[torch.Tensor, torch.Tensor], sample_grid: bool) -> dict:
        """Write the EMA model, the scheduler, the training record and the sample grid to --out."""
        args, out = self.args, self.args.out
        out.mkdir(parents=True, exist_ok=True)
        half = build_network(args.preset, args.size).half()
        half.load_state_dict(self.ema.state_dict())
        half.save_pretrained(out, max_shard_size=SHARD)
        self.ddim().save_pretrained(out / "scheduler")
        record = {
            "command": self.command(),
            "duration_seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "steps": self.step,
            "steps_planned": self.plan,
            "images_seen": self.step * args.batch_size,
            "train_images": len(self.train_set),
            "parameters": sum(p.numel() for p in self.ema.parameters()),
            "test_images": len(test[0]),
            "test_loss_ema": round(self.test_loss(test), 5),
            "train_loss_curve": self.losses,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else f"cpu ({platform.machine()})",
            "threads": torch.get_num_threads(),
            "compiled": self.forward is not self.model,
        }
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        if sample_grid:
            save_grid(self.sample(), out / "sample_grid.png")
        return record


def save_grid(images: np.ndarray, path: Path, columns: int = 8, zoom: int = 4) -> None:
    """Save the images as one PNG, `columns` side by side, enlarged by nearest neighbour."""
    n, h, w, c = images.shape
    grid = images.reshape(n // columns, columns, h, w, c).transpose(0, 2, 1, 3, 4).reshape(-1, columns * w, c)
    Image.fromarray(grid).resize((grid.shape[1] * zoom, grid.shape[0] * zoom), Image.Resampling.NEAREST).save(path)


def train_until_finished(trainer: Trainer, test: tuple, before: float, before_cpu: float) -> None:
    """The training loop, with checkpoints. before, before_cpu: what the clocks are behind the times of the run."""
    args = trainer.args
    total = None if args.steps == UNLIMITED_STEPS else args.steps
    bar = tqdm(total=total, initial=trainer.step, desc=args.preset, disable=args.quiet, mininterval=1)
    saved = time.perf_counter()
    trainer.seconds = before + saved
    trainer.begun = trainer.elapsed
    while not trainer.finished:
        loss = trainer.train_step()
        bar.update()
        if trainer.step % CLOCK_STEPS == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        trainer.seconds = before + time.perf_counter()
        trainer.cpu_seconds = before_cpu + time.process_time()
        due = time.perf_counter() - saved > CHECKPOINT_S
        if args.checkpoint_every:
            due = trainer.step % args.checkpoint_every == 0
        if due or trainer.finished:
            trainer.save_checkpoint()
            saved = time.perf_counter()
        if trainer.step == args.export_at and not trainer.finished:
            trainer.export(test, sample_grid=False)
    bar.close()


def run(args: argparse.Namespace) -> None:
    """Train from the options given, and write the result."""
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out is not a folder: {args.out}")
    started, started_cpu = time.perf_counter(), time.process_time()
    train, test = (load_data(args, split) for split in ("train", "test"))
    trainer = Trainer(args, *train)
    if args.resume:
        trainer.load_checkpoint()
    if args.compile and not trainer.finished:
        trainer.compile()
    train_until_finished(trainer, test, trainer.seconds - started, trainer.cpu_seconds - started_cpu)
    record = trainer.export(test, args.sample_grid)
    if not args.quiet:
        print(f"wrote {args.out}: {record['steps']} steps, test loss {record['test_loss_ema']:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Command-line entry point."""
    args = parse_args(argv)
    try:
        run(args)
    except UserError as error:
        print(f"train_ddpm.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
