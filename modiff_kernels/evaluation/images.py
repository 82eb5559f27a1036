"""PNG files of images: single ones, known again by what they were sampled with, and grids."""

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from modiff_kernels.calibration.result import replace_file
from modiff_kernels.evaluation import UserError

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
    replace_file(path, lambda new: _picture(image).save(new, format="PNG", pnginfo=info))


def write_grid(path: Path, images: Sequence[np.ndarray]) -> None:
    columns = math.ceil(math.sqrt(len(images)))
    cells = [*images, *[np.ones_like(images[0])] * (-len(images) % columns)]
    rows = [np.concatenate(cells[first : first + columns], axis=1) for first in range(0, len(cells), columns)]
    picture = _picture(np.concatenate(rows))
    replace_file(path, lambda new: picture.save(new, format="PNG"))


def image_grid(rows: Mapping[str, np.ndarray], path: str | Path, cell: int = 64, columns: int = 8) -> None:
    """Write a PNG with one labelled row of images per entry of `rows`.

    rows: label -> float array [N, H, W, C], values in 0..1, C = 1 or 3. The first `columns` images of each row are
    shown, small ones enlarged to at least `cell` pixels by a whole factor (nearest neighbour), others as they are."""
    font = ImageFont.load_default(size=14)
    pad, label_width = 4, 8 + math.ceil(max(font.getlength(label) for label in rows))
    height, width = next(iter(rows.values())).shape[1:3]
    factor = max(1, math.ceil(cell / max(height, width)))
    row_height, column_width = height * factor + pad, width * factor + pad
    count = min(columns, max(map(len, rows.values())))
    canvas = Image.new("RGB", (label_width + count * column_width, len(rows) * row_height + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (label, images) in enumerate(rows.items()):
        top = pad + index * row_height
        draw.text((4, top + row_height / 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images[:columns]):
            tile = _picture(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + column * column_width, top))
    replace_file(Path(path), lambda new: canvas.save(new, format="PNG", optimize=True))


def _picture(image: np.ndarray) -> Image.Image:
    pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy())
