"""The network whose features the Fréchet distances of the study of quality are taken on: a CIFAR-10 classifier.

A ResNet of three stages (He et al., 2016; two blocks each, global average pooling); its features are the means over
pixels that the last, linear layer reads. `benchmarks/features/cifar10_resnet_SIZE.safetensors` has the weights in fp16
with batch norm folded in, `.json` the accuracy on the test images, of these very weights, and the command that trained
it, a script of commit 051b914. InceptionV3, the network of the FID, is for images of 299 pixels and has 2048 features,
more than a thousand images can place; distances here are not FIDs."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "features"
SCALE = 4.0  # pixels in 0..1 are shifted to a mean of about 0 and scaled to a deviation of about 1
PARTS = 500  # images at once


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
    """3x3 convolution, with the batch norm that followed it folded in."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1), nn.Identity())


class FeatureNetwork(nn.Module):
    """Of images [N, 3, H, W] with values in 0..1; the features are what the last layer reads, which is not computed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = convolution(3, width, 1)
        blocks: list[nn.Module] = []
        c_in = width
        for c_out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            blocks += [ResidualBlock(c_in, c_out, stride), ResidualBlock(c_out, c_out, 1)]
            c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.scores = nn.Linear(c_in, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 4 width], non-negative."""
        return self.blocks(F.relu(self.stem((images - 0.5) * SCALE))).mean((2, 3))


class Features:
    """A stored network as a function of images: float [N, H, W, C] in 0..1 to float32 features [N, F].

    size: side of the images. name: of reports, with the accuracy of the classifier."""

    def __init__(self, size: int, folder: Path = FOLDER, device: torch.device | str = "cpu") -> None:
        stem = folder / f"cifar10_resnet_{size}"
        if not stem.with_suffix(".safetensors").is_file():
            raise FileNotFoundError(f"no feature network for {size}x{size} images in {folder}")
        record = json.loads(stem.with_suffix(".json").read_text())
        self.size, self.device = size, torch.device(device)
        self.name = f"{stem.name}, {record['features']} features, {100 * record['test_accuracy']:.1f} % test accuracy"
        self.network = FeatureNetwork(record["width"]).eval().requires_grad_(False)
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


def frechet_distance(features, reference) -> float:
    """Fréchet distance between two sets of feature vectors, each taken as a normal distribution (Heusel et al., 2017)::

        |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

    features, reference: float arrays [N, F] and [M, F], N and M at least 2. With features of InceptionV3 and many
    images it is the FID; numbers of other networks, or of few images, are not comparable with it. In float64; equal
    sets have 0 up to rounding. ValueError on other shapes."""
    a, b = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features {a.shape} and reference {b.shape} must be [N, F] and [M, F] with N, M >= 2")
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2)
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))
