"""The network whose features the Fréchet distances of the study of quality are taken on: a CIFAR-10 classifier.

    python -m benchmarks features --data DATA --size 16       train it and store it in benchmarks/features/

A ResNet of three stages (He et al., 2016; two blocks each, batch norm, global average pooling); its features are the
means over pixels that the last, linear layer reads. `--size` is the side of the images that it is for. Training: SGD
with Nesterov momentum, a one-cycle learning rate, shifts by up to an eighth of the side, flips, label smoothing; bf16
autocast, data on the device.
`cifar10_resnet_SIZE.safetensors` has the weights in fp16 with batch norm folded in, `.json` the accuracy on the test
images, of these very weights, and the command. InceptionV3, the network of the FID, is for images of 299 pixels and has
2048 features, more than a thousand images can place; distances here are not FIDs.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from modiff_kernels.evaluation.cifar10 import CLASSES, load_cifar10

FOLDER = Path(__file__).resolve().parent.parent / "features"
SCALE = 4.0  # pixels in 0..1 are shifted to a mean of about 0 and scaled to a deviation of about 1
PARTS = 500  # images at once where no gradient is needed


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))), a 1x1 convolution on the shortcut where shapes differ."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(c_in, c_out, stride)
        self.conv2 = convolution(c_out, c_out, 1)
        self.shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


def convolution(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """3x3 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out))


class FeatureNetwork(nn.Module):
    """Class scores of images [N, 3, H, W] with values in 0..1; `features` are the inputs of the last layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = convolution(3, width, 1)
        blocks: list[nn.Module] = []
        c_in = width
        for c_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            blocks += [ResidualBlock(c_in, c_out, stride), ResidualBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.scores = nn.Linear(c_in, len(CLASSES))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 4 width], non-negative."""
        return self.blocks(F.relu(self.stem((images - 0.5) * SCALE))).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scores(self.features(images))

    def fuse(self) -> FeatureNetwork:
        """Fold the running statistics of batch norm into the convolutions; in place, for evaluation only."""
        self.eval()
        for module in list(self.modules()):
            if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
                module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()
        return self


class Features:
    """A stored network as a function of images: float [N, H, W, C] in 0..1 to float32 features [N, F].

    size: side of the images. name: of reports, with the accuracy of the classifier. FileNotFoundError with the command
    that trains it where there is none of this size.
    """

    def __init__(self, size: int, folder: Path = FOLDER, device: torch.device | str = "cpu") -> None:
        stem = folder / f"cifar10_resnet_{size}"
        if not stem.with_suffix(".safetensors").is_file():
            raise FileNotFoundError(
                f"no feature network for {size}x{size} images in {folder}; train it: "
                f"python -m benchmarks features --data DATA --size {size}"
            )
        record = json.loads(stem.with_suffix(".json").read_text())
        self.size, self.device = size, torch.device(device)
        self.name = f"{stem.name}, {record['features']} features, {100 * record['test_accuracy']:.1f} % test accuracy"
        self.network = FeatureNetwork(record["width"]).fuse().requires_grad_(False)
        self.network.load_state_dict({k: v.float() for k, v in load_file(stem.with_suffix(".safetensors")).items()})
        self.network.to(self.device, memory_format=torch.channels_last)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.shape[1:] != (self.size, self.size, 3):
            raise ValueError(f"images are {images.shape}, the network is for [N, {self.size}, {self.size}, 3]")
        parts = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).permute(0, 3, 1, 2).split(PARTS)
        with torch.inference_mode():
            return torch.cat([self.network.features(part.to(self.device)).cpu() for part in parts]).numpy()


def cifar10_resnet(images: np.ndarray) -> np.ndarray:
    """Features of images float [N, H, W, C] in 0..1 by the stored network of their size."""
    return Features(images.shape[1])(images)


def accuracy(network: FeatureNetwork, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of uint8 `images` that the network, in float32, gives the class of `labels`."""
    with torch.inference_mode():
        right = [
            (network(part.float() / 255).argmax(1) == wanted).sum().item()
            for part, wanted in zip(images.split(PARTS), labels.split(PARTS))
        ]
    return sum(right) / len(labels)


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 images [N, 3, S, S], each shifted by up to S / 8 pixels and flipped at random, as float in 0..1."""
    count, _, side, _ = images.shape
    reach = side // 8
    device = images.device

    def whole(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (count, 1), generator=generator, device=device)

    line = torch.arange(side, device=device)[None]
    columns = torch.where(whole(0, 2) == 1, line.flip(1), line) + whole(0, 2 * reach + 1)
    rows = line + whole(0, 2 * reach + 1)
    padded = F.pad(images, (reach,) * 4)
    index = torch.arange(count, device=device)[:, None, None]
    picked = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).float().div(255)


def learning_rate(progress: float, peak: float) -> float:
    """One cycle: up to `peak` over the first fifth of training, down to 0 over the rest, both along a line."""
    return peak * min(progress / 0.2, (1 - progress) / 0.8)


def train(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor) -> FeatureNetwork:
    """The trained network."""
    torch.manual_seed(args.seed)
    device = images.device
    generator = torch.Generator(device).manual_seed(args.seed)
    network = FeatureNetwork(args.width).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    batch = min(args.batch_size, len(images))
    steps = args.epochs * (len(images) // batch)
    order = torch.empty(0, dtype=torch.int64, device=device)
    for done in tqdm(range(steps), desc="train", disable=args.quiet, leave=False):
        if len(order) < batch:
            order = torch.randperm(len(images), generator=generator, device=device)
        picked, order = order[:batch], order[batch:]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(done / steps, args.lr)
        inputs = augmented(images[picked], generator).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            scores = network(inputs)
        loss = F.cross_entropy(scores.float(), labels[picked], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network


def command(args: argparse.Namespace) -> str:
    """The command that gives this network, with every option that matters spelt out."""
    names = ("size", "width", "epochs", "batch_size", "lr", "seed", "device")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return shlex.join(["python", "-m", "benchmarks", "features", "--data", "DATA", *words])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10 (modiff_kernels.evaluation)")
    parser.add_argument("--size", type=int, default=16, help="side of the images (%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage, a quarter of the features")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.2, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def main(args: argparse.Namespace) -> int:
    try:
        data = [load_cifar10(args.data, split, args.size, args.quiet) for split in ("train", "test")]
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"features: --data: {error}") from error
    (images, labels), (test_images, test_labels) = (tuple(part.to(args.device) for part in pair) for pair in data)
    network = train(args, images, labels)
    network.fuse().half().float()  # the values that are stored are those that are judged
    record = {
        "command": command(args),
        "size": args.size,
        "width": args.width,
        "features": 4 * args.width,
        "test_accuracy": accuracy(network, test_images, test_labels),
        "test_images": len(test_labels),
        "train_images": len(labels),
        "torch": torch.__version__,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"cifar10_resnet_{args.size}"
    weights = {key: value.contiguous() for key, value in network.half().cpu().state_dict().items()}
    save_file(weights, stem.with_suffix(".new"))
    stem.with_suffix(".new").replace(stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{100 * record['test_accuracy']:.2f} % of the test images: {args.out}")
    return 0
