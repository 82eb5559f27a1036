"""How close images or tensors are to those of full precision."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["psnr", "sqnr", "ssim"]


def _check_shapes(x, reference) -> None:
    if x.shape != reference.shape:
        raise ValueError(f"{tuple(x.shape)} and the reference {tuple(reference.shape)} differ in shape")


def _image_pairs(images, reference) -> list[tuple[np.ndarray, np.ndarray]]:
    images, reference = np.asarray(images), np.asarray(reference)
    _check_shapes(images, reference)
    if images.ndim != 4 or not images.size:
        raise ValueError(f"images have shape {images.shape}; they must be [N, H, W, C] with N >= 1 and values in 0..1")
    return list(zip(images.astype(np.float64), reference.astype(np.float64), strict=True))


def psnr(images, reference) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB: 10 log10(1 / mean squared error).

    images, reference: float arrays [N, H, W, C] with values in 0..1, else ValueError. float64 [N]; inf where equal."""
    from skimage.metrics import peak_signal_noise_ratio

    with np.errstate(divide="ignore"):
        return np.array([peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in _image_pairs(images, reference)])


def ssim(images, reference) -> np.ndarray:
    """Structural similarity of each image, 1 where two images are equal.

    images, reference: float arrays [N, H, W, C] with values in 0..1, H and W at least 3, else ValueError. float64 [N].
    The window is 7 pixels wide, or the largest odd number that fits a smaller image."""
    from skimage.metrics import structural_similarity

    pairs = _image_pairs(images, reference)
    side = min(pairs[0][0].shape[:2])
    if side < 3:
        raise ValueError(f"images are {side} pixels high or wide; structural similarity needs at least 3")
    window = min(7, side - (side + 1) % 2)
    return np.array([structural_similarity(b, a, data_range=1.0, channel_axis=-1, win_size=window) for a, b in pairs])


def sqnr(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Signal-to-quantisation-noise ratio in dB: 10 log10(sum(reference^2) / sum((x - reference)^2)), in float64.

    x, reference: tensors of one shape (else ValueError), any dtype. inf where both are equal."""
    _check_shapes(x, reference)
    reference = reference.detach().double()
    noise = (x.detach().double() - reference).square().sum()
    return math.inf if noise == 0 else 10 * (reference.square().sum() / noise).log10().item()
