"""The small models shipped inside the package."""

import pathlib

__all__ = ["SHIPPED", "shipped_model_path"]

SHIPPED = "cifar10_small16"
"""Name of the shipped model: a DDPM UNet for CIFAR-10 at 16x16."""


def shipped_model_path() -> pathlib.Path:
    """Folder of the shipped model, for `UNet2DModel.from_pretrained`; it also holds the noise schedule, for
    `DDIMScheduler.from_pretrained(path, subfolder="scheduler")`."""
    return pathlib.Path(__file__).resolve().parent / SHIPPED
