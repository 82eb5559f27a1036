"""The table of `modiff compare`, out of the rows of its JSON report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["HEADER", "table_cells"]

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
