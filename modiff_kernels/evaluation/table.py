"""Tables and JSON out of the rows of a report."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["HEADER", "command_line", "markdown_table", "table_cells", "text_table", "to_json"]

HEADER = ("configuration", "PSNR dB", "SSIM", "s/image", "speed-up", "state MB", "avg bits", "backend")


def table_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of one row, as HEADER names them. PSNR null or inf: the reference, or images equal to it."""
    if row["is_reference"]:
        fidelity = ("reference", "1")
    else:
        psnr_db = row["psnr_db"]
        fidelity = ("equal" if psnr_db is None or math.isinf(psnr_db) else f"{psnr_db:.1f}", f"{row['ssim']:.4f}")
    return (
        row["name"],
        *fidelity,
        f"{row['s_per_image']:.4f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        f"{row['state_bytes'] / 1e6:.1f}" if row["mode"] != "float" else "-",
        f"{row['average_bits']:.1f}",
        row["backend"],
    )


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


def command_line(argv: list[str]) -> str:
    """The command that `argv` was given in, for reports; without the places of output files."""
    kept, skip = [], False
    for item in argv:
        if not skip and not re.match(r"--(json|grid|out)(=|$)", item):
            kept.append(item)
        skip = not skip and item in ("--json", "--grid", "--out")
    return shlex.join(["modiff", *kept])
