"""Tables of docs/performance.md about whole steps and whole runs, out of the rows of benchmarks.

Each takes the folder of results and what stands behind its name in the page, and shows every device that has rows, one
below the other. The newest row of a problem and metric counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.configurations import run_rows, step_rows
from benchmarks.pipelines import SAMPLERS
from modiff_kernels.config.plan import LayerPlan
from modiff_kernels.evaluation import markdown_table

NOTHING = "*No results recorded yet.*\n"
Metrics = dict[str, dict[str, str]]
Found = dict[tuple[str, ...], Metrics]

STEP_HEADER = (
    *("configuration, batch", "ms per call", "20-80 %", "bound ms", "vs best eager", "vs torch.compile"),
    *("over plain W8A8", "SQNR dB", "state MB", "peak MB"),
)
RUN_HEADER = (
    *("configuration, images", "images/s", "s a run", "vs full precision", "vs DeepCache N=3", "vs DeepCache N=5"),
    *("PSNR dB", "SQNR dB", "full calls", "state MB", "peak MB", "host ms a step", "device idle", "outside UNet ms"),
)
OTHERS_HEADER = ("what is not ours", "configuration, batch", "ms", "of the call")
PLAN_HEADER = ("batch", "units by mode", "ms per call", "best float ms", "speed-up", "PSNR dB", "state MB")


def whole_steps_table(results: Path, network: str) -> str:
    """Configurations of `network` at every batch."""

    def table(device: str, found: Found) -> str:
        names = names_of(step_rows, device)
        cells = []
        for batch in sorted({batch for batch, _ in found}, key=int):
            cells += [
                _step_cells(f"{names[key]}, {batch}", found[batch, key]) for key in names if (batch, key) in found
            ]
        return markdown_table(*_without_empty(STEP_HEADER, cells))

    return _by_device(results, "unet_step", rf"{re.escape(network)}-b(\d+)-(.+)", table, "update_time")


def whole_runs_table(results: Path, network: str, sampler: str) -> str:
    """Configurations of `network` with `sampler`, for every number of images."""

    def table(device: str, found: Found) -> str:
        names = names_of(run_rows, device)
        cells = []
        for images in sorted({images for images, _ in found}, key=int):
            cells += [
                _run_cells(f"{names[key]}, {images}", found[images, key]) for key in names if (images, key) in found
            ]
        return f"{network}, {SAMPLERS[sampler].label}:\n\n{markdown_table(*_without_empty(RUN_HEADER, cells))}"

    return _by_device(results, "sampling", rf"{re.escape(network)}-{sampler}-n(\d+)-(.+)", table, "run_time")


def step_others_table(results: Path, network: str) -> str:
    """What takes 2 % of a call of ours and is no op or kernel of the package."""

    def table(device: str, found: Found) -> str:
        names = names_of(step_rows, device)
        cells = []
        for (batch, key), metrics in sorted(found.items(), key=lambda item: (int(item[0][0]), item[0][1])):
            if not key.startswith(("modulated", "planned")):
                continue
            whole = float(metrics["whole"]["p50"])
            times = {name: float(row["p50"]) for name, row in metrics.items() if name != "whole"}
            for name, ms in sorted(times.items(), key=lambda item: -item[1]):
                cells.append([f"`{name}`", f"{names[key]}, {batch}", f"{ms:.3f}", f"{100 * ms / whole:.0f} %"])
        return markdown_table(OTHERS_HEADER, cells) if cells else "Nothing.\n"

    return _by_device(results, "unet_step_others", rf"{re.escape(network)}-b(\d+)-(.+)", table, "whole")


def layer_plans_table(results: Path, network: str) -> str:
    """What benchmarks/make_plans.py has measured of `network`, by device and batch."""
    texts = []
    for folder in sorted((results / "plans").glob("*")):
        plans = {
            int(match[1]): LayerPlan.from_json(path.read_text())
            for path in folder.glob("*.json")
            if (match := re.fullmatch(rf"{re.escape(network)}-b(\d+)", path.stem))
        }
        if plans:
            cells = [_plan_cells(batch, plan) for batch, plan in sorted(plans.items())]
            key = next(iter(plans.values())).key
            texts.append(f"**{key.device}**\n\n{markdown_table(PLAN_HEADER, cells)}\n\n{key.versions}.\n")
    return "\n".join(texts) or NOTHING


def _plan_cells(batch: int, plan: LayerPlan) -> list[str]:
    """Of the candidate that was chosen: the only one that is no float form if all units have one mode."""
    counts = Counter(str(unit.mode) for unit in plan.units)
    floats = [c for c in plan.candidates if c.name.startswith("float")]
    best = min(floats, key=lambda candidate: candidate.step_us)
    chosen = best if plan.is_float else next(c for c in plan.candidates if plan.summary.startswith(f"{c.name}: "))
    return [
        str(batch),
        ", ".join(f"{count} {mode}" for mode, count in counts.most_common()),
        f"{chosen.step_us / 1e3:.2f}",
        f"{best.step_us / 1e3:.2f}",
        f"{best.step_us / chosen.step_us:.2f}x",
        "equal" if chosen.psnr_db is None else f"{chosen.psnr_db:.1f}",
        f"{chosen.state_bytes / 1e6:.1f}",
    ]


def names_of(rows_of: Callable[..., list], device: str) -> dict[str, str]:
    """By key, the names of the configurations on `device`, in the order of tables."""
    on_cpu = device.endswith("threads")
    where = (torch.device("cpu"), torch.float32) if on_cpu else (torch.device("cuda"), torch.bfloat16)
    return {row.key: row.name for row in rows_of(*where, compiled=True, plan=Path("of this device"))}


def _by_device(results: Path, op: str, pattern: str, table: Callable[[str, Found], str], needed: str) -> str:
    """`table` of the newest rows of each device, whose problems match `pattern`, with what they were measured by."""
    texts = []
    for path in sorted(results.glob("*.csv")):
        found: Found = {}
        for row in record.read(path):
            match = re.fullmatch(pattern, row["problem"])
            if row["op"] == op and match:
                found.setdefault(match.groups(), {})[row["metric"]] = row
        found = {key: metrics for key, metrics in found.items() if needed in metrics}
        if found:
            rows = [row for metrics in found.values() for row in metrics.values()]
            device = rows[0]["device"]
            texts.append(f"**{device}**\n\n{table(device, found)}\n\n{_caption(rows)}\n")
    return "\n".join(texts) or NOTHING


def _caption(rows: Sequence[Mapping[str, str]]) -> str:
    def all_of(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in sorted(rows, key=lambda row: row["utc"])))

    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(row["repro"] for row in rows))
    dirty = " with local changes" if any(row["dirty"] == "True" for row in rows) else ""
    last = max(row["utc"] for row in rows)[:10]
    return f"{commands}: torch {all_of('torch')}; commit {all_of('git_commit')}{dirty}, {last}."


def _step_cells(name: str, metrics: Metrics) -> list[str]:
    time = metrics["update_time"]
    return [
        name,
        f"{float(time['p50']):.2f}",
        f"{float(time['p20']):.2f}-{float(time['p80']):.2f}",
        _shown(metrics, "bound", "{:.2f}"),
        _shown(metrics, "speedup_vs_best_eager", "{:.2f}x"),
        _shown(metrics, "speedup_vs_compile", "{:.2f}x"),
        _shown(metrics, "overhead_vs_plain", "{:+.0f} %"),
        _decibels(time["sqnr_db"]),
        _shown(metrics, "state", "{:.1f}", 1e-6),
        _shown(metrics, "peak_memory", "{:.0f}", 1e-6),
    ]


def _run_cells(name: str, metrics: Metrics) -> list[str]:
    return [
        name,
        _shown(metrics, "images_per_s", "{:.3g}"),
        _shown(metrics, "run_time", "{:.3f}"),
        _shown(metrics, "speedup_vs_float", "{:.2f}x"),
        *(_shown(metrics, f"speedup_vs_deepcache{n}", "{:.2f}x") for n in (3, 5)),
        _decibels(metrics["psnr"]["p50"]) if "psnr" in metrics else "-",
        _decibels(metrics["run_time"]["sqnr_db"]),
        _shown(metrics, "full_calls", "{:.0f}"),
        _shown(metrics, "state", "{:.1f}", 1e-6),
        _shown(metrics, "peak_memory", "{:.0f}", 1e-6),
        _shown(metrics, "host_time", "{:.2f}"),
        _shown(metrics, "device_idle", "{:.0f} %"),
        _shown(metrics, "outside_unet", "{:.2f}"),
    ]


def _shown(metrics: Metrics, metric: str, form: str, scale: float = 1.0) -> str:
    return form.format(float(metrics[metric]["p50"]) * scale) if metric in metrics else "-"


def _decibels(text: str) -> str:
    return "reference" if float(text) == float("inf") else f"{float(text):.1f}"


def _without_empty(header: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[list]:
    """Header and rows without the columns in which no row has anything."""
    kept = [i for i in range(len(header)) if any(row[i] != "-" for row in cells)]
    yield [header[i] for i in kept]
    yield [[row[i] for i in kept] for row in cells]


TABLES: dict[str, Callable[..., str]] = {
    "whole_steps": whole_steps_table,
    "whole_runs": whole_runs_table,
    "step_others": step_others_table,
    "layer_plans": layer_plans_table,
}
