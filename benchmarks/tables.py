"""Write the tables of README.md and docs/ from results, or check that they are up to date.

    python -m benchmarks tables            rewrite the tables
    python -m benchmarks tables --check    exit code 1 if a table is out of date, or has no rows

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is a maker of `MAKERS` below and its options:

    steps NETWORK, runs NETWORK SAMPLER              op unet_step and sampling, every device
    products                                         single layers
    compare [FILE [ROW ...]]                         FILE.json, as `modiff compare --json` writes it; ROW: keys, all
    schedules own|converged|fits|distances [NETWORK], calibration SAMPLER      pareto.json and calibration.json
    quality FILE SAMPLER                             FILE.json, of the study `quality`
    pipeline FILE ...                                FILE.json, of the study `pipeline`
    traffic                                          traffic.json

All but the reports of studies are one pivot: rows whose op and problem match become lines, of each metric the newest.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from modiff_kernels.evaluation import markdown_table, text_table

MARKED = re.compile(r"(<!-- table: ([\w+ -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DOCS = ("calibration", "layer_plan", "triton_kernels", "performance", "quality", "schedules")
PAGES = ("README.md", *(f"docs/{name}.md" for name in DOCS))

Row = Mapping[str, str]
Cells = dict[tuple[str, ...], Row]
Cell = Callable[[Cells], str]


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def decibels(value: float) -> str:
    """A ratio to the reference, which has an infinite one to itself."""
    return "reference" if value == float("inf") else f"{value:.1f}"


def value(*key: str, form: str = "{:.2f}", scale: float = 1.0) -> Cell:
    """A column: the median of a cell."""
    return lambda cells: form.format(float(cells[key]["p50"]) * scale) if key in cells else "-"


def spread(*key: str, form: str = "{p20:.2f}-{p80:.2f}") -> Cell:
    """A column: median and percentiles of a cell."""
    return lambda cells: (
        form.format(**{p: float(cells[key][p]) for p in ("p50", "p20", "p80")}) if key in cells else "-"
    )


def ratio(of: tuple[str, ...], to: tuple[str, ...], form: str = "{:.2f}x") -> Cell:
    """A column: one cell's median over another's."""
    return lambda cells: (
        form.format(float(cells[of]["p50"]) / float(cells[to]["p50"])) if {of, to} <= set(cells) else "-"
    )


@dataclass(frozen=True)
class Pivot:
    """A table out of rows. problem: a pattern with {options} and groups, which name lines; key: the columns of a row
    that tell cells of a line apart. needed: cells without which there is no line.

    configurations: module:function that gives the configurations of a device; their key is the last group. every: all
    devices, not only the one that was measured last."""

    op: str
    problem: str
    first: str
    columns: Mapping[str, Cell]
    key: tuple[str, ...] = ("metric",)
    needed: tuple[str, ...] | None = None
    configurations: str | None = None
    every: bool = False
    label: str = "{0}"
    title: Callable[..., str] | None = None

    def __call__(self, results: Path, *options: str) -> str | None:
        """The table, None where there are no rows."""
        pattern = self.problem.format(*map(re.escape, options)) if options else self.problem.replace("{0}-", "")
        texts = [text for path in sorted(results.glob("*.csv")) if (text := self._of_device(path, pattern, options))]
        if not texts:
            return None
        return "\n\n".join(text for _, text in texts) if self.every else max(texts)[1]

    def lines(self, rows: Iterable[Row], pattern: str) -> dict[tuple[str, ...], Cells]:
        """By the groups of the problem, the newest row of each cell."""
        found: dict[tuple[str, ...], Cells] = {}
        for row in rows:
            if not re.fullmatch(self.op, row["op"]) or not (match := re.fullmatch(pattern, row["problem"])):
                continue
            cells = found.setdefault(match.groups(), {})
            cells[tuple(row[column].split("-")[0] if column == "family" else row[column] for column in self.key)] = row
        return {line: cells for line, cells in found.items() if self.needed is None or self.needed in cells}

    def _of_device(self, path: Path, pattern: str, options: Sequence[str]) -> tuple[str, str] | None:
        lines = self.lines(({**row, "family": row["backend"].split("-")[0]} for row in record.read(path)), pattern)
        if not lines:
            return None
        rows = [row for cells in lines.values() for row in cells.values()]
        named = dict(self._named(lines, rows[0]["device"]))
        body = [[name, *(cell(lines[line]) for cell in self.columns.values())] for line, name in named.items()]
        kept = [i for i in range(len(self.columns) + 1) if any(cells[i] != "-" for cells in body)]
        header = [self.first, *self.columns]
        table = markdown_table([header[i] for i in kept], [[cells[i] for i in kept] for cells in body])
        title = f"{self.title(*options)}\n\n" if self.title else ""
        head = f"**{rows[0]['device']}**\n\n" if self.every else ""
        return max(row["utc"] for row in rows), f"{head}{title}{table}\n\n{caption(rows)}"

    def _named(self, lines: Iterable[tuple[str, ...]], device: str) -> list[tuple[tuple[str, ...], str]]:
        """Lines with their names; those of configurations by batch, in the order of the configurations."""
        if self.configurations is None:
            return [(line, self.label.format(*line)) for line in lines]
        names = configuration_names(self.configurations, device)
        order = list(names)
        known = [line for line in lines if line[-1].partition(".")[0] in names]
        known.sort(key=lambda line: (*map(int, line[:-1]), order.index(line[-1].partition(".")[0]), line[-1]))
        return [(line, self.label.format(*line[:-1], name=named(line[-1], names))) for line in known]


def named(key: str, names: Mapping[str, str]) -> str:
    """The name of a configuration, with the backend that it asks for."""
    base, _, backend = key.partition(".")
    return f"{names[base]}, {backend}" if backend else names[base]


def configuration_names(kind: str, device: str) -> dict[str, str]:
    """By key, the names of the configurations on `device`, in the order of tables. kind: "step_rows" or "run_rows"."""
    from benchmarks import configurations

    on_cpu = device.endswith("threads")
    where = (torch.device("cpu"), torch.float32) if on_cpu else (torch.device("cuda"), torch.bfloat16)
    rows = getattr(configurations, kind)(*where, compiled=True, plan="of this device")
    return {row.key: row.name for row in rows}


def caption(rows: Sequence[Row]) -> str:
    """What rows were measured by, on and with."""
    rows = sorted(rows, key=lambda row: row["utc"])
    commands = ", ".join(dict.fromkeys(f"`{row['repro']}`" for row in rows))
    commits = ", ".join(dict.fromkeys(row["git_commit"] for row in rows))
    dirty = " with local changes" if any(row["dirty"] == "True" for row in rows) else ""
    versions = ", ".join(dict.fromkeys(row["torch"] for row in rows))
    device, last = rows[-1]["device"], rows[-1]["utc"][:10]
    return f"{commands}: {device}; torch {versions}; commit {commits}{dirty}, {last}."


def show(rows: Sequence[Mapping[str, Any]], needed: str, by: Sequence[str] = ("problem",)) -> str:
    """New rows for the terminal: a line for each of `by` that has the metric `needed`, medians of all metrics."""
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        line = table.setdefault(tuple(row[name] for name in by), {"SQNR dB": row["sqnr_db"]})
        line[f"{row['metric']}, {row['unit']}"] = row["p50"]
    table = {key: line for key, line in table.items() if any(name.startswith(f"{needed},") for name in line)}
    metrics = sorted({name for line in table.values() for name in line}, key=lambda name: not name.startswith(needed))
    numbers = {key: [shown(line.get(name), "{:.4g}") for name in metrics] for key, line in table.items()}
    cells = [["  ".join(map(str, key)), *own] for key, own in numbers.items()]
    return text_table((" ".join(by), *metrics), cells) if cells else "nothing new"


STEP_COLUMNS = {
    "ms per call": value("update_time"),
    "20-80 %": spread("update_time"),
    "bound ms": value("bound"),
    "vs best eager": value("speedup_vs_best_eager", form="{:.2f}x"),
    "vs torch.compile": value("speedup_vs_compile", form="{:.2f}x"),
    "over plain W8A8": value("overhead_vs_plain", form="{:+.0f} %"),
    "SQNR dB": lambda cells: decibels(float(cells[("update_time",)]["sqnr_db"])),
    "state MB": value("state", form="{:.1f}", scale=1e-6),
    "peak MB": value("peak_memory", form="{:.0f}", scale=1e-6),
}
RUN_COLUMNS = {
    "images/s": value("images_per_s", form="{:.3g}"),
    "s a run": value("run_time", form="{:.3f}"),
    "vs full precision": value("speedup_vs_float", form="{:.2f}x"),
    **{f"vs DeepCache N={n}": value(f"speedup_vs_deepcache{n}", form="{:.2f}x") for n in (3, 5)},
    "PSNR dB": lambda cells: decibels(float(cells[("psnr",)]["p50"])) if ("psnr",) in cells else "-",
    "SQNR dB": lambda cells: decibels(float(cells[("run_time",)]["sqnr_db"])),
    "full calls": value("full_calls", form="{:.0f}"),
    "state MB": value("state", form="{:.1f}", scale=1e-6),
    "peak MB": value("peak_memory", form="{:.0f}", scale=1e-6),
    "outside UNet ms": value("outside_unet"),
}


def runs_title(network: str, sampler: str) -> str:
    from benchmarks.pipelines import SAMPLERS

    return f"{network}, {SAMPLERS[sampler].label}:"


PEERS = (("bf16", "torch"), ("cutlass_int8", "cutlass"), ("int_mm", "torch"))
FORMS = (*PEERS, ("product", "cuda"), ("product", "triton"))
PRODUCT_COLUMNS: dict[str, Cell] = {
    **{f"{form}, {backend} us": value(form, backend, "time", form="{:.1f}") for form, backend in FORMS},
    **{f"{name}, of bound": value("product", name, "of_bound", form="{:.0f} %") for name in ("cuda", "triton")},
    **{f"bf16/{name}": ratio(("bf16", "torch", "time"), ("product", name, "time")) for name in ("cuda", "triton")},
}


def loaded(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def compare_table(results: Path, name: str = "compare", *keys: str) -> str | None:
    from benchmarks.shared import COMPARE_HEADER, compare_cells

    report = loaded(results / f"{name}.json")
    if report is None:
        return None
    rows = [row for row in report["rows"] if not keys or row["key"] in keys]
    unsaid = ("Warm-up", *(f"{row['name']}:" for row in report["rows"] if row not in rows))
    notes = "; ".join(note.removesuffix(".") for note in report["notes"] if not note.startswith(unsaid))
    table = markdown_table(COMPARE_HEADER, [compare_cells(row) for row in rows])
    return f"{table}\n\n`{report['command']}`: {notes}"


def study(module: str) -> Callable[..., str | None]:
    """A table of a study, which knows its report best."""
    return lambda *arguments: import_module(f"benchmarks.studies.{module}").table(*arguments)


def triton_table(results: Path) -> str | None:
    """Tiles of Triton's product on sm_90 as they compile (tools/aot_triton.py)."""
    reports = loaded(results / "triton_products.json")
    if reports is None:
        return None
    header = ["tile, k-block", "warps", "registers", "shared KiB", "blocks an SM", "wgmma", "left under way by a wait"]
    cells = []
    for row in reports:
        threads, sizes = 32 * row["warps"], [row["constants"][f"BLOCK_{axis}"] for axis in "MNK"]
        blocks = min(65536 // (row["registers"] * threads), (227 << 10) // row["shared_bytes"], 2048 // threads)
        line = [" x ".join(sizes[:2]) + f", {sizes[2]}", row["warps"], row["registers"], row["shared_bytes"] >> 10]
        cells.append([*map(str, line), str(blocks), str(row["counts"]["IGMMA"]), ", ".join(map(str, row["pendings"]))])
    return markdown_table(header, cells)


MAKERS: dict[str, Callable[..., str | None]] = {
    "steps": Pivot("unet_step", r"{0}-b(\d+)-(.+)", "configuration, batch", STEP_COLUMNS, every=True,
                   needed=("update_time",), configurations="step_rows", label="{name}, {0}"),
    "runs": Pivot("sampling", r"{0}-{1}-n(\d+)-(.+)", "configuration, images", RUN_COLUMNS, every=True,
                  needed=("run_time",), configurations="run_rows", label="{name}, {0}", title=runs_title),
    "products": Pivot("(bf16|fp16|int_mm|cutlass_int8|product|modulate|quantize)", r"(.+-b\d+)-w\d+", "layer, batch",
                      PRODUCT_COLUMNS, ("op", "family", "metric")),
    "compare": compare_table,
    "schedules": study("schedules"),
    "calibration": study("calibration"),
    "quality": study("quality"),
    "pipeline": study("pipeline"),
    "traffic": study("traffic"),
    "triton": triton_table,
}  # fmt: skip


def filled(text: str, results: Path) -> str:
    """`text` with every table made anew. ValueError for one that is unknown or has no rows."""

    def table(match: re.Match[str]) -> str:
        kind, *options = match[2].split()
        if kind not in MAKERS:
            raise ValueError(f"table {kind!r} is unknown; allowed: {', '.join(MAKERS)}")
        made = MAKERS[kind](results, *options)
        if made is None:
            raise ValueError(f"table {match[2]!r} has no rows in {results}; take it out of the page")
        return f"{match[1]}\n{made}\n\n{match[4]}"

    return MARKED.sub(table, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing, exit code 1 if a table is out of date")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="default: %(default)s")


def main(args: argparse.Namespace, root: Path = record.ROOT, pages: Sequence[str] = PAGES) -> int:
    outdated = False
    for page in pages:
        text = (root / page).read_text()
        try:
            new = filled(text, args.results)
        except ValueError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        outdated |= new != text
        if new != text and args.check:
            print(f"{page}: tables are out of date; run python -m benchmarks tables", file=sys.stderr)
        elif new != text:
            (root / page).write_text(new)
    return int(args.check and outdated)
