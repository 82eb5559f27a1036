"""Tables and JSON out of the rows of a report."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

HEADER = ("configuration", "PSNR dB", "SSIM", "s/image", "speed-up", "state MB", "avg bits", "backend")
SHORT = 100  # calls of a run that fit into a line
MARKS = str.maketrans("UFH", "#.=")
OUTPUTS = ("--json", "--grid", "--html", "--plot", "--out")


def table_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Cells of one row, as HEADER names them. PSNR null or inf: the reference, or images equal to it."""
    psnr_db = row["psnr_db"]
    idle = row.get("schedule") is not None and row.get("calls") == row["calls_computed"]
    shown = "equal" if psnr_db is None or math.isinf(psnr_db) else f"{psnr_db:.1f}"
    return (
        row["name"] + (" (no call left out)" if idle else ""),
        *(("reference", "1") if row["is_reference"] else (shown, f"{row['ssim']:.4f}")),
        f"{row['s_per_image']:.4f}",
        "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
        "-" if row["mode"] == "float" else f"{row['state_bytes'] / 1e6:.1f}",
        f"{row['average_bits']:.1f}",
        row["backend"],
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
    return "\n".join([lines[0], f"| --- |{' ---: |' * (len(header) - 1)}", *lines[1:]])


def strip(actions: str) -> str:
    """The calls of a run, given as letters of a schedule, as a line: # computed, . forecast, = held."""
    return actions.translate(MARKS)


def to_json(report: Mapping) -> str:
    """`report` as standard JSON text; inf and NaN, which JSON lacks, become null."""
    plain = json.loads(json.dumps(report, default=np.generic.item), parse_constant=lambda name: None)
    return json.dumps(plain, indent=1) + "\n"


def command_line(argv: Sequence[str]) -> str:
    """The command that `argv` was given in, for reports; without the places of output files."""
    words = iter(argv)
    kept = []
    for word in words:
        name, given, _ = word.partition("=")
        if name not in OUTPUTS:
            kept.append(word)
        elif not given:
            next(words, None)
    return shlex.join(["modiff", *kept])
