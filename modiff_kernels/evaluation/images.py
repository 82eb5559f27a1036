"""PNG files of images: single ones, known again by what they were sampled with, and grids of all."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modiff_kernels.calibration.result import replace_file
from modiff_kernels.evaluation import UserError

TEXT = "modiff"  # keyword of the PNG text that holds the options
ACROSS = 512  # pixels of a grid of small images


def tensors_crc32(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of all tensors and their names, as 8 hexadecimal digits."""
    total = 0
    for key, tensor in sorted(tensors.items()):
        total = zlib.crc32(key.encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data, total)
    return f"{total:08x}"


def is_kept(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether `path` holds a whole image that was sampled with `options`; False if there is none, or half of one.
    UserError for a whole image that was sampled otherwise, and for one that `write_image` did not write."""
    try:
        with Image.open(path) as image:
            text = image.info.get(TEXT, "null")
            image.verify()
    except (OSError, SyntaxError):  # what PIL raises on damaged files
        return False
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} was not written by `modiff sample`; give another --out")
    for name in sorted({*found, *options}):
        was, now = found.get(name), options.get(name)
        if was != now:
            advice = "give another --out, or remove the images there"
            raise UserError(f"{path} was sampled with {name} {was!r}, but this run has {now!r}; {advice}")
    return True


def write_image(path: Path, image: np.ndarray, options: Mapping[str, Any]) -> None:
    """`image` [H, W, C] in 0..1 as PNG, with `options` for `is_kept`. A file at `path` is whole at any time."""
    info = PngInfo()
    info.add_text(TEXT, json.dumps(options, sort_keys=True))
    replace_file(path, lambda new: picture_of(image).save(new, format="PNG", pnginfo=info))


def write_grid(path: Path, images: Sequence[np.ndarray], scale: int | None = None) -> None:
    """All images in rows as one PNG, each pixel `scale` times as large; None: to about 512 pixels across."""
    columns = math.ceil(math.sqrt(len(images)))
    cells = [*images, *[np.ones_like(images[0])] * (-len(images) % columns)]
    rows = [np.concatenate(cells[first : first + columns], axis=1) for first in range(0, len(cells), columns)]
    picture = enlarged(picture_of(np.concatenate(rows)), ACROSS, scale)
    replace_file(path, lambda new: picture.save(new, format="PNG"))


def enlarged(picture: Image.Image, across: int, scale: int | None = None) -> Image.Image:
    """`picture` with whole pixels, as often as brings it nearest to a width of `across`, or `scale` times as large."""
    scale = max(1, round(across / picture.width)) if scale is None else scale
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def picture_of(image: np.ndarray) -> Image.Image:
    pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
