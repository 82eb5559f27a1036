"""Write the tables of README.md and docs/ from results, or check that they are up to date.

    python tools/readme_tables.py            rewrite the tables
    python tools/readme_tables.py --check    exit code 1 if a table is out of date

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. NAME is

    compare [FILE]           benchmarks/results/compare.json, or FILE.json there, as `modiff compare --json` writes it
    unet_step NETWORK BATCH  the newest rows of that network and batch in benchmarks/results/*.csv
    unet_step_profile NETWORK BATCH  likewise, with --profile
    integer_conv             the newest rows of benchmarks/bench_integer_conv.py, likewise
    pareto NETWORK           benchmarks/results/pareto.json, as benchmarks/pareto.py writes it
    calibration SAMPLER      its rows in benchmarks/results/calibration.json, as benchmarks/calibration.py writes it
    paper_claims SAMPLER ... what papers report, beside rows of that file
    attention                the newest rows of `pytest benchmarks/bench_ops.py -k attention --record`, likewise
    passes NETWORK           the newest rows of benchmarks/bench_passes.py of that network, passes alone, likewise
    quality NAME SAMPLER, quality_reference NAME, quality_papers NAME    quality_tables.py, from NAME.json
    pieces                   the same, passes with the product after them, of all networks
    products NETWORK         the newest rows of benchmarks/bench_products.py of that network, likewise
    worst_products MOST      the MOST of them furthest from their bound, over all networks
    tiles MOST               the newest rows of tools/tune_*.py, where tuning gained most
    whole_steps NETWORK, whole_runs NETWORK SAMPLER, step_others NETWORK, layer_plans NETWORK    performance_tables.py

A table shows one device, the one that was measured last; those of performance_tables.py show all.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks import pareto_report, products_report, step_profile
from benchmarks.calibration import BITS
from benchmarks.configurations import step_rows
from benchmarks.record import ROOT, read
from modiff_kernels.calibration import METHODS
from modiff_kernels.evaluation import markdown_table
from modiff_kernels.evaluation.table import HEADER, table_cells
from tools import performance_tables, quality_tables

MARKED = re.compile(r"(<!-- table: ([\w+ -]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NOTHING = "*No results recorded yet.*"
UNET_STEP_HEADER = (
    "configuration",
    "ms per call",
    "20-80 %",
    "vs best eager",
    "vs torch.compile",
    "over plain W8A8",
    "SQNR dB",
    "state MB",
)
INTEGER_CONV_HEADER = ("convolution", "kernel us", "oneDNN us", "float32 us", "oneDNN/kernel", "float32/kernel")
PAGES = (
    "README.md",
    "docs/calibration.md",
    "docs/cpu_kernels.md",
    "docs/fused_blocks.md",
    "docs/performance.md",
    "docs/quality.md",
    "docs/schedules.md",
)
PASSES_HEADER = (
    "pass, batch, codes",
    "ours us",
    "of bound",
    "inductor us",
    "inductor/ours, state in memory",
    "in caches",
    "torch.compile/ours",
    "torch/ours",
)
PIECES_HEADER = (
    "pass and product, batch, codes",
    "ours us",
    "graph/ours, state in memory",
    "in caches",
    "skip in our product",
    "both our ops in a graph",
    "q, k, v by three products",
)
CALIBRATION_HEADER = (
    "bits, method",
    "PSNR dB: float activations",
    "plain",
    "modulated",
    "SSIM: plain",
    "modulated",
    "Fréchet: plain",
    "modulated",
    "CPU s",
    "peak MiB",
)
PAPER_CLAIMS = (
    (
        "PTQ4DM, ImageNet-64, DDIM-250, W8A8",
        "FID 26.19 with uniform time steps, 24.26 with NDTC",
        ("W8A8", "plain", "mse", "ndtc"),
    ),
    (
        "Q-Diffusion, CIFAR-10, DDIM-100, W4A8 (as in MoDiff)",
        "FID 4.24 in full precision, 4.93",
        ("W4A8", "plain", "mse", "qdiffusion"),
    ),
    (
        "AccuQuant, LDM-4, 20 steps, W4A8",
        "PSNR 23.7 dB with Q-Diffusion, 24.4",
        ("W4A8", "plain", "qdiffusion", "accuquant"),
    ),
    (
        "AccuQuant, LDM-4, 20 steps, W3A8",
        "PSNR 18.5 dB with Q-Diffusion, 19.9",
        ("W3A8", "plain", "qdiffusion", "accuquant"),
    ),
    ("MOTA, LDM-4, 20 steps", "FID 4.1 lower than BRECQ", ("W8A8", "plain", "qdiffusion", "sampling_aware")),
    (
        "MoDiff, CIFAR-10, DDIM-100, W4A4",
        "FID 325.8 with Q-Diffusion, 13.6",
        ("W4A4", None, "qdiffusion", "qdiffusion"),
    ),
)
"""What papers report on their models, and the rows that show the same step here: bits, way (None: plain against
modulated), method before and after. Their numbers are not comparable with those here; the direction is."""
PARETO_HEADER = (
    "sampler, steps",
    "evaluations",
    "hold",
    "DeepCache",
    "forecast",
    "searched",
    "same sampler, fewer steps",
    "any sampler, fewer steps",
    "every call",
)


def compare_table(results: Path, name: str = "compare") -> str:
    path = results / f"{name}.json"
    if not path.exists():
        return f"{NOTHING}\n"
    report = json.loads(path.read_text())
    table = markdown_table(HEADER, [table_cells(row) for row in report["rows"]])
    notes = " ".join(note for note in report["notes"] if not note.startswith("Warm-up"))
    return f"{table}\n\n`{report['command']}`: {notes}\n"


def unet_step_table(results: Path, network: str, batch: str) -> str:
    """Of each configuration and metric the last row of the file counts."""
    tables = []
    for path in sorted(results.glob("*.csv")):
        newest: dict[str, dict[str, dict[str, str]]] = {}
        for row in read(path):
            match = re.fullmatch(rf"{network}-b{batch}-(.+)", row["problem"])
            if row["op"] == "unet_step" and match:
                newest.setdefault(match[1], {})[row["metric"]] = row
        device = next((metrics["update_time"]["device"] for metrics in newest.values()), "")
        names = performance_tables.names_of(step_rows, device)
        cells = [_step_cells(names[key], newest[key]) for key in names if key in newest]
        if cells:
            last = next(reversed(newest.values()))["update_time"]
            commit = last["git_commit"] + (" with local changes" if last["dirty"] == "True" else "")
            text = (
                f"{markdown_table(UNET_STEP_HEADER, cells)}\n\n`{last['repro']}`: {network}, batch {batch}; "
                f"{last['device']}; torch {last['torch']}; commit {commit}, {last['utc'][:10]}.\n"
            )
            tables.append((last["utc"], text))
    return _newest(tables)


def unet_step_profile_table(results: Path, network: str, batch: str) -> str:
    """Kinds of work by configuration."""
    tables = []
    for path in sorted(results.glob("*.csv")):
        newest: dict[str, dict[str, dict[str, str]]] = {}
        for row in read(path):
            match = re.fullmatch(rf"{network}-b{batch}-(.+)", row["problem"])
            if row["op"] == "unet_step_profile" and match:
                newest.setdefault(match[1], {})[row["metric"]] = row
        if not newest:
            continue
        columns = [[float(parts[kind]["p50"]) for kind in step_profile.PARTS] for parts in newest.values()]
        cells = [[kind, *[f"{ms:.2f}" for ms in line]] for kind, *line in zip(step_profile.PARTS, *columns)]
        cells.append(["sum", *[f"{sum(column):.2f}" for column in columns]])
        last = next(iter(newest[next(reversed(newest))].values()))
        names = performance_tables.names_of(step_rows, last["device"])
        header = ("ms of a call", *[names[key] for key in newest])
        text = (
            f"{markdown_table(header, cells)}\n\n`{last['repro']}`: {network}, batch {batch}; {last['device']}; torch "
            f"{last['torch']}; commit {last['git_commit']}, {last['utc'][:10]}.\n"
        )
        tables.append((last["utc"], text))
    return _newest(tables)


def _newest(tables: Sequence[tuple[str, str]]) -> str:
    """The text with the latest time."""
    return max(tables)[1] if tables else f"{NOTHING}\n"


def _step_cells(name: str, metrics: dict[str, dict[str, str]]) -> Sequence[str]:
    update = metrics["update_time"]

    def shown(metric: str, form: str, scale: float = 1.0) -> str:
        return form.format(float(metrics[metric]["p50"]) * scale) if metric in metrics else "-"

    sqnr_db = float(update["sqnr_db"])
    return (
        name,
        f"{float(update['p50']):.1f}",
        f"{float(update['p20']):.1f}-{float(update['p80']):.1f}",
        shown("speedup_vs_best_eager", "{:.2f}x"),
        shown("speedup_vs_compile", "{:.2f}x"),
        shown("overhead_vs_plain", "{:+.0f} %"),
        "reference" if sqnr_db == float("inf") else f"{sqnr_db:.1f}",
        shown("state", "{:.1f}", 1e-6),
    )


def integer_conv_table(results: Path) -> str:
    """The package's kernel, oneDNN's int8 and float32 convolution of every layer."""
    tables = []
    for path in sorted(results.glob("*.csv")):
        newest: dict[str, dict[str, dict[str, str]]] = {}
        for row in read(path):
            if row["op"] == "integer_conv":
                newest.setdefault(row["problem"], {})[row["backend"]] = row
        cells = []
        for problem, forms in newest.items():
            time = {name: float(form["p50"]) for name, form in forms.items()}
            ratios = [f"{time[name] / time['kernel']:.2f}x" for name in ("onednn", "float32")]
            cells.append([problem, *[f"{time[name]:.0f}" for name in ("kernel", "onednn", "float32")], *ratios])
        if cells:
            last = forms["kernel"]
            commit = last["git_commit"] + (" with local changes" if last["dirty"] == "True" else "")
            text = (
                f"{markdown_table(INTEGER_CONV_HEADER, cells)}\n\n`{last['repro']}`: {last['device']}; torch "
                f"{last['torch']}; commit {commit}, {last['utc'][:10]}.\n"
            )
            tables.append((last["utc"], text))
    return _newest(tables)


def attention_table(results: Path) -> str:
    """The package's attention and torch's, by layer."""
    tables = []
    for path in sorted(results.glob("*.csv")):
        newest: dict[str, dict[str, dict[str, str]]] = {}
        for row in read(path):
            if row["op"] == "attention":
                newest.setdefault(row["problem"], {})[row["backend"]] = row
        cells = []
        for problem, forms in newest.items():
            kernel, torch_us = float(forms["cpu"]["p50"]), float(forms["torch"]["p50"])
            cells.append([problem, f"{kernel:.0f}", f"{torch_us:.0f}", f"{torch_us / kernel:.2f}x"])
        if cells:
            last = forms["cpu"]
            text = (
                f"{markdown_table(('layer', 'kernel us', 'torch us', 'torch/kernel'), cells)}\n\n`{last['repro']}`: "
                f"{last['device']}; torch {last['torch']}; commit {last['git_commit']}, {last['utc'][:10]}.\n"
            )
            tables.append((last["utc"], text))
    return _newest(tables)


def _newest_passes(path: Path, op: str, network: str) -> dict[str, dict[tuple[str, str, str], dict[str, str]]]:
    """Problem -> (cache, backend, metric) -> the last row, of the last run that has the problem."""
    newest: dict[str, dict[tuple[str, str, str], dict[str, str]]] = {}
    for row in read(path):
        if row["op"] == op and row["problem"].startswith(network):
            found = newest.setdefault(row["problem"], {})
            if any(old["utc"] != row["utc"] for old in found.values()):
                found.clear()  # rows of two runs do not mix: another form may have been the best
            found[row["cache"], row["backend"], row["metric"]] = row
    return newest


def _passes_caption(rows: Sequence[dict[str, str]]) -> tuple[str, str]:
    """When the last of `rows` was measured, and with what all were."""
    last = max(rows, key=lambda row: row["utc"])
    commit = last["git_commit"] + (" with local changes" if last["dirty"] == "True" else "")
    commands = dict.fromkeys(row["repro"] for row in sorted(rows, key=lambda row: row["utc"]))
    return last["utc"], (
        f"{', '.join(f'`{command}`' for command in commands)}: {last['device']}, load {last['load']}; torch "
        f"{last['torch']}; commit {commit}, {last['utc'][:10]}."
    )


def _passes_table(results: Path, op: str, network: str, header: Sequence[str], cells_of: Any) -> str:
    tables = []
    for path in sorted(results.glob("*.csv")):
        newest = _newest_passes(path, op, network)
        if newest:
            cells = [cells_of(problem, found) for problem, found in newest.items()]
            utc, caption = _passes_caption([row for found in newest.values() for row in found.values()])
            tables.append((utc, f"{markdown_table(header, cells)}\n\n{caption}\n"))
    return _newest(tables)


def _ratio(found: dict[tuple[str, str, str], dict[str, str]], cache: str, backend: str) -> str:
    """How much slower than ours, with its 20-80 % range; "-" where it was not timed."""
    row = found.get((cache, backend, "over_ours"))
    return "-" if row is None else f"{float(row['p50']):.2f} ({float(row['p20']):.2f}-{float(row['p80']):.2f})"


def _ours_and_best(found: dict[tuple[str, str, str], dict[str, str]], cache: str, kind: str) -> tuple[str, str]:
    """The name of our backend and of the faster way of inductor, in rows of `cache`."""
    times = {
        name: float(row["p50"]) for (where, name, metric), row in found.items() if (where, metric) == (cache, "time")
    }
    rivals = [f"{kind}-{way}" for way in ("obvious", "tuned")]
    others = (*rivals, "graph-epilogue", "graph-three", "graph-ours", "torch", "torch.compile")
    return next(name for name in times if name not in others), min(rivals, key=times.__getitem__)


def passes_table(results: Path, network: str) -> str:
    """Each fused pass against inductor's."""

    def cells(problem: str, found: dict[tuple[str, str, str], dict[str, str]]) -> list[str]:
        ours, best = _ours_and_best(found, "cold", "inductor")
        ratios = [_ratio(found, cache, _ours_and_best(found, cache, "inductor")[1]) for cache in ("cold", "warm")]
        time = {name: float(found["cold", name, "time"]["p50"]) for name in (ours, best, "torch.compile", "torch")}
        rest = [f"{time[name] / time[ours]:.2f}" for name in ("torch.compile", "torch")]
        bound = f"{float(found['cold', ours, 'of_bound']['p50']):.0f} %"
        name = problem.removeprefix(f"{network}-")
        return [name, f"{time[ours]:.0f}", bound, f"{time[best]:.0f}", *ratios, *rest]

    return _passes_table(results, "fused_pass", f"{network}-", PASSES_HEADER, cells)


def pieces_table(results: Path) -> str:
    """Each fused pass with its product against compiled graphs around the product."""

    def cells(problem: str, found: dict[tuple[str, str, str], dict[str, str]]) -> list[str]:
        ours, _ = _ours_and_best(found, "cold", "graph")
        ratios = [_ratio(found, cache, _ours_and_best(found, cache, "graph")[1]) for cache in ("cold", "warm")]
        others = [_ratio(found, "cold", f"graph-{name}") for name in ("epilogue", "ours", "three")]
        return [problem, f"{float(found['cold', ours, 'time']['p50']):.0f}", *ratios, *others]

    return _passes_table(results, "fused_piece", "", PIECES_HEADER, cells)


def pareto_table(results: Path, network: str) -> str:
    """What every method reaches at the costs of the uniform forecasts, and how often the searched schedules win."""
    if not (results / "pareto.json").exists():
        return f"{NOTHING}\n"
    report = json.loads((results / "pareto.json").read_text())
    found = pareto_report.lines(report, network)
    cells = [_pareto_cells(line) for line in found]
    has_deepcache = any(line.deepcache_db is not None for line in found)
    dropped = None if has_deepcache else PARETO_HEADER.index("DeepCache")
    header, *cells = ([cell for i, cell in enumerate(row) if i != dropped] for row in (PARETO_HEADER, *cells))
    rivals = {
        "hold": lambda line: line.schedules.get("hold"),
        "DeepCache": lambda line: line.deepcache_db,
        "the uniform forecasts": lambda line: line.schedules[pareto_report.FORECAST],
        "fewer steps of the same sampler": lambda line: line.fewer_steps_db,
        "the best of all samplers": lambda line: line.any_sampler_db,
    }
    wins = {
        name: pareto_report.wins((line.schedules.get("searched"), rival(line)) for line in found)
        for name, rival in rivals.items()
    }
    counts = ", ".join(f"{name} in {won} of {of}" for name, (won, of) in wins.items() if of)
    notes = " ".join([f"The searched schedules are above {counts} lines." if counts else "", *report["notes"]]).strip()
    caption = f"`{report['command']}`: {report['model']}, {network}, {report['images']} images. {notes}".rstrip()
    return f"{markdown_table(header, cells)}\n\n{caption}\n"


def _pareto_cells(line: pareto_report.Line) -> list[str]:
    """The row of one sampler, number of steps and cost, the highest of what costs so little in bold."""
    values = [
        line.schedules.get("hold"),
        line.deepcache_db,
        line.schedules.get(pareto_report.FORECAST),
        line.schedules.get("searched"),
        line.fewer_steps_db,
        line.any_sampler_db,
    ]
    shown = ["-" if value is None else f"{value:.1f}" for value in values]
    highest = max(float(text) for text in shown if text != "-")
    shown = [f"**{text}**" if text != "-" and float(text) == highest else text for text in shown]
    panel = line.panel
    return [f"{panel.sampler}, {panel.steps}", f"{line.evaluations:g}", *shown, f"{panel.every_call_db:.1f}"]


def calibration_table(results: Path, sampler: str) -> str:
    """A row per bits and method with `sampler`: float activations with these codes, plain, modulated."""
    if not (results / "calibration.json").exists():
        return f"{NOTHING}\n"
    report = json.loads((results / "calibration.json").read_text())
    rows = {(row["bits"], row["method"], row["way"]): row for row in report["rows"] if row["sampler"] == sampler}
    cells = []
    for bits in BITS:
        for method in METHODS:
            keys = [(bits.partition("A")[0], method, "float"), (bits, method, "plain"), (bits, method, "modulated")]
            if not all(key in rows for key in keys):
                continue
            shown = [rows[key] for key in keys]
            cells.append(
                [
                    f"{bits}, {method}",
                    *[f"{row['psnr_db']:.1f}" for row in shown],
                    *[f"{row['ssim']:.3f}" for row in shown[1:]],
                    *[f"{row['frechet']:.2g}" for row in shown[1:]],
                    f"{shown[1]['calibration_cpu_s']:.0f}",
                    f"{shown[1]['peak_mib']:.0f}",
                ]
            )
    features = sorted({row["features"] for row in rows.values()})
    commands = "; ".join(f"`{command}`" for command in report["commands"] if f"--samplers {sampler}" in command)
    return (
        f"{markdown_table(CALIBRATION_HEADER, cells)}\n\n{sampler}, {report['images']} images, calibrated on "
        f"{report['samples']} trajectories; Fréchet distance on {', '.join(features)}; torch {report['torch']}. "
        f"{commands}\n"
    )


def paper_claims_table(results: Path, *samplers: str) -> str:
    """What papers claim, and what the same step gives here with each of `samplers`, in dB."""
    if not (results / "calibration.json").exists():
        return f"{NOTHING}\n"
    rows = json.loads((results / "calibration.json").read_text())["rows"]
    psnr = {(row["sampler"], row["method"], row["bits"], row["way"]): row["psnr_db"] for row in rows}
    cells = []
    for setting, claim, (bits, way, before, after) in PAPER_CLAIMS:
        label = f"{bits} {before}" if before == after else f"{bits} {before}, {after}"
        cells.append([setting, claim, f"{label}, plain" if way else f"{label}, plain and modulated"])
        for sampler in samplers:
            pair = [
                psnr.get((sampler, before, bits, way or "plain")),
                psnr.get((sampler, after, bits, way or "modulated")),
            ]
            cells[-1].append("-" if None in pair else f"{pair[0]:.1f}, {pair[1]:.1f}")
    header = ("paper, its model and bits", "it reports", "the same step here", *[f"{name}, dB" for name in samplers])
    return f"{markdown_table(header, cells)}\n"


def gpu_table(text_of: Callable[..., tuple[str, str] | None], results: Path, *options: str) -> str:
    """A table of benchmarks/products_report.py."""
    return products_report.newest_text(results, text_of, *options) or f"{NOTHING}\n"


def filled(text: str, results: Path) -> str:
    """`text` with every table made anew."""

    def table(match: re.Match[str]) -> str:
        kind, *options = match[2].split()
        makers = {
            "compare": compare_table,
            "unet_step": unet_step_table,
            "unet_step_profile": unet_step_profile_table,
            "integer_conv": integer_conv_table,
            "attention": attention_table,
            "calibration": calibration_table,
            "paper_claims": paper_claims_table,
            "pareto": pareto_table,
            "passes": passes_table,
            "pieces": pieces_table,
            "products": partial(gpu_table, products_report.products_text),
            "tiles": partial(gpu_table, products_report.tiles_text),
            "worst_products": partial(gpu_table, products_report.worst_text),
            **performance_tables.TABLES,
            **quality_tables.TABLES,
        }
        if kind not in makers:
            raise ValueError(f"table {kind!r} is unknown; allowed: {', '.join(makers)}")
        return f"{match[1]}\n{makers[kind](results, *options)}\n{match[4]}"

    return MARKED.sub(table, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, exit code 1 if a table is out of date")
    args = parser.parse_args(argv)
    outdated = False
    for page in PAGES:
        text = (ROOT / page).read_text()
        new = filled(text, ROOT / "benchmarks" / "results")
        if new == text:
            continue
        outdated = True
        if args.check:
            print(f"{page}: tables are out of date; run python tools/readme_tables.py", file=sys.stderr)
        else:
            (ROOT / page).write_text(new)
    return int(args.check and outdated)


if __name__ == "__main__":
    sys.exit(main())
