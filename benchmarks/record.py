"""One row format for all results: benchmarks/results/<device>.csv, one row per measurement, appended only.

A row says what was measured, on what, with which versions and commit, and by which command. Only verified results are
written: `append` refuses a row whose `verified` is not true."""

import csv
import datetime
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = (
    *("op", "problem", "backend", "metric", "unit"),
    *("p50", "p20", "p80", "n"),  # n: samples behind the percentiles
    *("cache", "timer"),
    *("sqnr_db", "verified"),  # of the result, against what it was verified with
    *("device", "threads", "load"),  # load: average of the machine over the last minute before the measurement
    *("python", "torch", "diffusers", "modiff_kernels", "git_commit", "dirty", "utc", "repro"),
)


def device_name() -> str:
    """Model of the CPU, with its number of cores."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)", "", line.split(":", 1)[1])).strip()
            return f"{name}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def name_of(device: torch.device) -> str:
    """What rows that were measured on `device` have in their column `device`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device_name()


def file_stem(device: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-")


def results_file(folder: Path = RESULTS, device: str | None = None) -> Path:
    """The file of `device`, by default of this machine's CPU."""
    return folder / f"{file_stem(device or device_name())}.csv"


@cache
def _git(folder: Path, *arguments: str) -> str:
    """Asked for once in a process: code that was loaded does not change with the checkout. Empty without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def commit() -> tuple[str, bool | str]:
    """Commit of the sources and whether they differ from it; without .git what MODIFF_COMMIT says, or ("", "")."""
    found = _git(ROOT, "rev-parse", "--short=12", "HEAD")
    if found:
        return found, bool(_git(ROOT, "status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"))
    given = os.environ.get("MODIFF_COMMIT", "")
    return given, False if given else ""


def environment() -> dict[str, Any]:
    """The columns that are the same for all rows of a process."""
    from modiff_kernels import __version__

    git_commit, dirty = commit()
    script = Path(sys.argv[0])
    is_package = script.name == "__main__.py"  # python -m PACKAGE
    own = script.relative_to(ROOT) if script.is_absolute() and script.is_relative_to(ROOT) else script
    shown = ["-m", script.parent.name] if is_package else [str(own)]
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load": Path("/proc/loadavg").read_text().split()[0] if Path("/proc/loadavg").exists() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers") if find_spec("diffusers") else "",
        "modiff_kernels": __version__,
        "git_commit": git_commit,
        "dirty": dirty,
        "utc": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "repro": shlex.join(["python", *shown, *sys.argv[1:]]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) == 1:
        return {"p50": values[0], "p20": values[0], "p80": values[0], "n": 1}
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return {"p50": tenths[4], "p20": tenths[1], "p80": tenths[7], "n": len(values)}


def row(op: str, problem: str, backend: str, metric: str, unit: str, values: Sequence[float], **more: Any) -> dict:
    """A row out of `values`; by default of warm calls that the clock has timed."""
    named = {"op": op, "problem": problem, "backend": backend, "metric": metric, "unit": unit}
    return {**named, "cache": "warm", "timer": "perf_counter", **percentiles(values), **more}


def append(rows: Sequence[dict[str, Any]], path: Path | None = None) -> Path:
    """Append `rows`, completed by `environment()`, to `path` (default: the file of this device)."""
    path = path or results_file()
    common = environment()
    complete = []
    for row in rows:
        unknown = set(row) - set(COLUMNS)
        if unknown:
            raise ValueError(f"row has unknown columns {sorted(unknown)}; allowed: {', '.join(COLUMNS)}")
        if row.get("verified") is not True:
            raise ValueError(f"row {row} is not verified; only verified results are recorded")
        values = {name: ({**common, **row}).get(name, "") for name in COLUMNS}
        complete.append({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file), ()))
        if header != COLUMNS:
            raise ValueError(f"{path} has other columns ({', '.join(header)}); move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(complete)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
