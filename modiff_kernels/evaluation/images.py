"""PNG files of images: single ones, known again by what they were sampled with, and grids."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modiff_kernels.evaluation import UserError

__all__ = ["image_grid", "is_kept", "tensors_crc32", "write_grid", "write_image"]

TEXT = "modiff"  # keyword of the PNG text that holds the options


def tensors_crc32(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of all tensors and their names, as 8 hexadecimal digits."""
    total = 0
    for key, tensor in sorted(tensors.items()):
        total = zlib.crc32(key.encode(), total)
        total = zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data, total)
    return f"{total:08x}"


def is_kept(path: Path, options: Mapping[str, Any]) -> bool:
    """Whether `path` holds a whole image that was sampled with `options`; False if there is none, or half of one.

    UserError for a whole image that was sampled otherwise, and for one that `write_image` did not write.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            text = image.info.get(TEXT)
            image.verify()
    except (OSError, SyntaxError):  # what PIL raises on damaged files
        return False
    try:
        found = json.loads(text) if text else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} was not written by `modiff sample`; give another --out")
    for name in sorted({*found, *options}):
        if found.get(name) != options.get(name):
            raise UserError(
                f"{path} was sampled with {name} {found.get(name)!r}, but this run has {options.get(name)!r}; give "
                "another --out, or remove the images there"
            )
    return True


def write_image(path: Path, image: np.ndarray, options: Mapping[str, Any]) -> None:
    """`image` [H, W, C] in 0..1 as PNG, with `options` for `is_kept`. A file at `path` is whole at any time."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(TEXT, json.dumps(options, sort_keys=True))
    new = path.with_suffix(".png.new")
    Image.fromarray(_pixels(image[None])[0]).save(new, format="PNG", pnginfo=info)
    new.replace(path)


def write_grid(path: Path, images: Sequence[np.ndarray]) -> None:
    """`images` [H, W, C] in 0..1 as one PNG, about as many columns as rows."""
    from PIL import Image

    pixels = _pixels(np.stack(images))
    columns = math.ceil(math.sqrt(len(pixels)))
    empty = np.full_like(pixels[:1], 255).repeat(-len(pixels) % columns, axis=0)
    _, height, width, _ = pixels.shape
    cells = np.concatenate([pixels, empty]).reshape(-1, columns, height, width, 3)
    Image.fromarray(cells.swapaxes(1, 2).reshape(-1, columns * width, 3)).save(path)


def image_grid(rows: Mapping[str, np.ndarray], path: str | Path, cell: int = 64, columns: int = 8) -> None:
    """Write a PNG with one labelled row of images per entry of `rows`.

    rows: label -> float array [N, H, W, C], values in 0..1, C = 1 or 3. The first `columns` images of each row are
    shown, small ones enlarged to at least `cell` pixels by a whole factor (nearest neighbour), others as they are.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not rows:
        raise ValueError("no rows to draw; give at least one label with its images")
    font = ImageFont.load_default(size=14)
    pad, label_width = 4, 8 + math.ceil(max(font.getlength(label) for label in rows))
    arrays = {label: np.asarray(images)[:columns] for label, images in rows.items()}
    height, width = next(iter(arrays.values())).shape[1:3]
    factor = max(1, math.ceil(cell / max(height, width)))
    row_height, column_width = height * factor + pad, width * factor + pad
    count = max(len(images) for images in arrays.values())
    canvas = Image.new("RGB", (label_width + count * column_width, len(arrays) * row_height + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (label, images) in enumerate(arrays.items()):
        top = pad + index * row_height
        draw.text((4, top + row_height / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            tile = Image.fromarray(_pixels(image[None])[0])
            tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + column * column_width, top))
    canvas.save(path, format="PNG", optimize=True)


def _pixels(images: np.ndarray) -> np.ndarray:
    """uint8 RGB [N, H, W, 3] of `images` [N, H, W, C], C 1 or 3, in 0..1; NaN is black."""
    pixels = (np.nan_to_num(images).clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
