"""Tables out of the rows of benchmarks/bench_products.py and of the tuners (tile_tuning.py), one device at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.bounds import PEAKS, peaks_of
from benchmarks.product_cases import FORMS, OUR_FORMS, RIVAL_FORM, Problem, problems_by_share
from benchmarks.shapes import NETWORKS
from benchmarks.tile_tuning import OP, OVER_BEST
from modiff_kernels.evaluation import markdown_table

BATCHES = (1, 2, 8, 16, 64)
BACKENDS = ("cuda", "triton")
COVERED = 0.8
"""Of a step's bf16 bound, by the layers that a table shows; the others are in the file of results."""
LEAST_SHARE, LEAST_BOUND_US = 0.01, 5.0
"""Of the problems among which the worst are looked for: share of a step of some network, and bound. Below, launches
decide."""
PRODUCTS_HEADER = (
    "layer, batch", "share", "16 bits us", "CUTLASS us", "int_mm us", "cuda us", "TOPS", "GB/s", "of bound",
    "triton us", "TOPS", "GB/s", "of bound", "with codes us", "16 bits/best", "16 bits/with codes",
)  # fmt: skip
WORST_HEADER = ("op, backend", "layer, batch", "share", "us", "of bound", "TOPS", "GB/s")
TILES_HEADER = ("backend, layer, batch, weight", "chosen", "us", "next", "us", "next tile", "us", "estimate/chosen")

Row = Mapping[str, str]
Measured = dict[tuple[str, str, str], dict[str, Row]]


def newest(rows: Iterable[Row]) -> Measured:
    """(form, problem, backend) -> metric -> row, of the last measurement of each; a rival's kernels are one backend."""
    found: Measured = {}
    for row in rows:
        if row["op"] not in FORMS:
            continue
        key = row["op"], row["problem"], row["backend"].split("-")[0]
        if row["metric"] == "time":
            found[key] = {}
        found.setdefault(key, {})[row["metric"]] = row
    return found


def _value(measured: Measured, form: str, problem: str, backend: str, metric: str = "time") -> float | None:
    metrics = measured.get((form, problem, backend), {})
    return float(metrics[metric]["p50"]) if metric in metrics else None


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _shown(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def product_cells(measured: Measured, problem: Problem, weight_bits: int = 8) -> list[str] | None:
    """The row of one problem, None if nothing is measured of our product there."""
    floats, name = problem.name(16), problem.name(weight_bits)
    ours = [_value(measured, "accumulate", name, backend) for backend in BACKENDS]
    best = _least(ours)
    if best is None:
        return None
    rival = _least(_value(measured, form, floats, "torch") for form in ("bf16", "fp16"))
    with_codes = _least(_value(measured, "modulated", name, backend) for backend in BACKENDS)
    cells = [
        f"{problem.layer}, {problem.batch}", f"{100 * problem.share:.0f} %", _shown(rival),
        _shown(_value(measured, RIVAL_FORM, name, "cutlass")), _shown(_value(measured, "int_mm", name, "torch")),
    ]  # fmt: skip
    for backend, time in zip(BACKENDS, ours):
        cells.append(_shown(time))
        for metric, form in (("rate", "{:.0f}"), ("bandwidth", "{:.0f}"), ("of_bound", "{:.0f} %")):
            cells.append(_shown(_value(measured, "accumulate", name, backend, metric), form))
    cells.append(_shown(with_codes))
    for time in (best, with_codes):
        cells.append("-" if rival is None or time is None else f"{rival / time:.2f}x")
    return cells


def products_text(rows: Sequence[Row], network: str) -> tuple[str, str] | None:
    """(time of the last measurement, table) of a network on the device of `rows`, None if there is nothing to show."""
    measured = newest(rows)
    if not measured:
        return None
    cells, used = [], []
    for batch in BATCHES:
        covered = 0.0
        for problem in _problems([network], [batch], rows):
            if covered >= COVERED:
                break
            covered += problem.share
            line = product_cells(measured, problem)
            if line is not None:
                cells.append(line)
                used += [measured[key]["time"] for key in measured if key[1] in (problem.name(8), problem.name(16))]
    return (_last(used), f"{markdown_table(PRODUCTS_HEADER, cells)}\n\n{_caption(used)}\n") if cells else None


def worst(rows: Sequence[Row], most: int) -> list[tuple[Problem, dict[str, Row]]]:
    """The measurements of our ops furthest from their bound, of each op, backend and layer the worst one."""
    measured = newest(rows)
    problems = {problem.name(8): problem for problem in _problems(NETWORKS, BATCHES, rows)} if measured else {}
    ranked = []
    for (form, name, _), metrics in measured.items():
        problem = problems.get(name)
        if form not in OUR_FORMS or "of_bound" not in metrics or problem is None or problem.share < LEAST_SHARE:
            continue
        percent = float(metrics["of_bound"]["p50"])
        if percent / 100 * float(metrics["time"]["p50"]) >= LEAST_BOUND_US:
            ranked.append((percent, problem, metrics))
    kept, seen = [], set()
    for _, problem, metrics in sorted(ranked, key=lambda entry: entry[0]):
        kernel = metrics["time"]["op"], metrics["time"]["backend"], problem.layer
        if kernel not in seen:
            seen.add(kernel)
            kept.append((problem, metrics))
    return kept[:most]


def worst_text(rows: Sequence[Row], most: str) -> tuple[str, str] | None:
    """(time of the last measurement, table) of `worst`."""
    cells, used = [], []
    for problem, metrics in worst(rows, int(most)):
        row = metrics["time"]
        used.append(row)
        values = [_shown(float(metrics[m]["p50"]), "{:.0f}") if m in metrics else "-" for m in ("rate", "bandwidth")]
        cells.append(
            [
                f"{row['op']}, {row['backend']}", f"{problem.layer}, {problem.batch}", f"{100 * problem.share:.0f} %",
                f"{float(row['p50']):.1f}", f"{float(metrics['of_bound']['p50']):.0f} %", *values,
            ]
        )  # fmt: skip
    return (_last(used), f"{markdown_table(WORST_HEADER, cells)}\n\n{_caption(used)}\n") if cells else None


def tiles_text(rows: Sequence[Row], most: str) -> tuple[str, str] | None:
    """(time of the last measurement, table) of the problems in which tuning gained most over the estimate: the chosen
    tile, the next best candidate, and the best one in another tile.
    """
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    whole: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["op"] != OP:
            continue
        key = row["problem"], row["backend"].split("-")[0]
        runs[key].append(row)
        if row["metric"] == OVER_BEST:  # the last row of a problem's run
            whole[key] = runs.pop(key)
    lines = []
    for (problem, backend), run in whole.items():
        gained = float(run[-1]["p50"])
        times = sorted((float(row["p50"]), row["backend"].partition("-")[2]) for row in run[:-1])
        chosen = times[0][1]
        other = next((entry for entry in times if entry[1].rpartition("-k")[0] != chosen.rpartition("-k")[0]), None)
        cells = [f"{backend}, {problem}"]
        for entry in (times[0], times[1] if len(times) > 1 else None, other):
            cells += ["-", "-"] if entry is None else [entry[1], f"{entry[0]:.1f}"]
        lines.append((gained, [*cells, _shown(gained, "{:.2f}x")], run[-1]))
    lines.sort(key=lambda line: -line[0])
    del lines[int(most) :]
    used = [row for _, _, row in lines]
    table = markdown_table(TILES_HEADER, [cells for _, cells, _ in lines])
    return (_last(used), f"{table}\n\n{_caption(used)}\n") if lines else None


def newest_text(results: Path, text_of: Callable[..., tuple[str, str] | None], *options: str) -> str | None:
    """The text of the device that was measured last; None if there is none."""
    found = [text_of(record.read(path), *options) for path in sorted(results.glob("*.csv"))]
    return max((entry for entry in found if entry is not None), default=("", None))[1]


def _problems(networks: Sequence[str], batches: Sequence[int], rows: Sequence[Row]) -> list[Problem]:
    device = rows[-1]["device"] if rows else ""
    return problems_by_share(networks, batches, peaks_of(device) or PEAKS["H200"])


def _last(rows: Sequence[Row]) -> str:
    return max(row["utc"] for row in rows)


def _caption(rows: Sequence[Row]) -> str:
    last = max(rows, key=lambda row: row["utc"])
    commit = last["git_commit"] + (" with local changes" if last["dirty"] == "True" else "")
    commands = dict.fromkeys(row["repro"] for row in sorted(rows, key=lambda row: row["utc"]))
    shown = ", ".join(f"`{command}`" for command in commands)
    return f"{shown}: {last['device']}; torch {last['torch']}; commit {commit}, {last['utc'][:10]}."
