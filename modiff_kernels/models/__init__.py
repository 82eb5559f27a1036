"""The small models shipped inside the package."""

import pathlib
from typing import Any

__all__ = ["SHIPPED", "load_shipped", "shipped_model_path"]

SHIPPED = "cifar10_small16"
"""Name of the shipped model: a DDPM UNet for CIFAR-10 at 16x16."""


def shipped_model_path() -> pathlib.Path:
    """Folder of the shipped model, for `UNet2DModel.from_pretrained`; it also holds the noise schedule, for
    `DDIMScheduler.from_pretrained(path, subfolder="scheduler")`."""
    return pathlib.Path(__file__).resolve().parent / SHIPPED


def load_shipped(**kwargs: Any) -> Any:
    """The shipped model as a `DDIMPipeline` of diffusers; kwargs: those of `UNet2DModel.from_pretrained`."""
    try:
        from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
    except ImportError as error:
        raise ImportError(f"{error}; the shipped model needs it: pip install 'modiff-kernels[diffusers]'") from error
    path = shipped_model_path()
    scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    return DDIMPipeline(UNet2DModel.from_pretrained(path, **kwargs), scheduler)
