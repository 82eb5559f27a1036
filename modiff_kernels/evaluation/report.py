"""Tables, image grids and JSON out of result rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["image_grid", "markdown_table", "text_table", "to_json"]


def _check_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {list(row)} has {len(row)} cells, the header {list(header)} has {len(header)}")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Table in plain text: the first column to the left, the others to the right. Cells are strings."""
    _check_table(header, rows)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    _check_table(header, rows)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(header), rule, *rows])


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
            pixels = (np.nan_to_num(image).clip(0, 1) * 255).round().astype(np.uint8)
            tile = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGB")
            tile = tile.resize((width * factor, height * factor), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + column * column_width, top))
    canvas.save(path, format="PNG", optimize=True)


def _plain(value):
    """`value` as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(report: Mapping) -> str:
    """`report` as standard JSON text; inf and NaN, which JSON lacks, become null."""
    return json.dumps(_plain(report), indent=1, allow_nan=False) + "\n"
