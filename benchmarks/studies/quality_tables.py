"""The tables of docs/quality.md, from the reports of the study of quality."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.studies.quality import BITS, SAMPLERS
from benchmarks.studies.report import claims
from benchmarks.tables import loaded
from modiff_kernels.evaluation import markdown_table

CLAIMS = claims("quality")
COLUMNS = {
    "PSNR dB": ("psnr_db", "{:.1f}"),
    "lowest 5 %": ("psnr_p5_db", "{:.1f}"),
    "SSIM": ("ssim", "{:.4f}"),
    "Fréchet to full precision": ("frechet_full", "{:.2g}"),
    "Fréchet to test images": ("frechet_test", "{:.3f}"),
}
MORE = ("calls computed", "avg bits", "state kB/image")


def _shown(row: dict[str, Any], name: str, form: str) -> str:
    return form.format(row[name]) if row.get(name) is not None else "-"


def _label(row: dict[str, Any]) -> str:
    if row["way"] == "float":
        return "full precision"
    label = f"{row['bits']} float activations" if row["way"] == "weights" else f"{row['way']} {row['bits']}"
    return f"{label} scheduled" if row["scheduled"] else label


def _in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By bits of the weights, then ways; the float row first."""
    names = ["", "W8", *(name for name in BITS if name.startswith("W8"))]
    names += ["W4", *(name for name in BITS if name.startswith("W4"))]
    ways = ["float", "weights", "plain", "modulated"]
    return sorted(rows, key=lambda row: (names.index(row["bits"]), row["scheduled"], ways.index(row["way"])))


def quality(results: Path, name: str, sampler: str) -> str | None:
    """The rows of one sampler in the report NAME.json."""
    report = loaded(results / f"{name}.json")
    rows = _in_order(row for row in report["rows"] if row["sampler"] == sampler) if report else []
    if report is None or not rows:
        return None
    cells = []
    for row in rows:
        state = f"{row['state_bytes_per_image'] / 1e3:.0f}" if "state_bytes_per_image" in row else "-"
        more = [f"{row['calls_computed']} of {row['calls']}", _shown(row, "average_bits", "{:.1f}"), state]
        cells.append([_label(row), *(_shown(row, *column) for column in COLUMNS.values()), *more])
        cells[-1][1] = "reference" if row["way"] == "float" else cells[-1][1]
    header = ("configuration", *COLUMNS, *MORE)
    schedules = {row["schedule"] for row in rows if row.get("schedule")}
    note = f" Scheduled: {'; '.join(sorted(schedules))}." if schedules else ""
    return f"{markdown_table(header, cells)}\n\n{sampler}, {_caption(report)}{note}"


def _caption(report: dict[str, Any]) -> str:
    real, last = report["yardsticks"], report["environments"][-1]
    count, half = report["images"], real["test_to_test_images"]
    return (
        f"{count} images in batches of {report['batch']}; 4-bit codes: {report['codes']}. Fréchet distances on "
        f"{report['features']}; {count} training images are {real['train_to_test']:.3f} from the {real['test_images']} "
        f"test images, two sets of {half} test images {real['test_to_test']:.3f} from each other. {report['model']}, "
        f"{report['parameters'] / 1e6:.1f} M parameters, {report['dtype']}; {report['device']}; torch "
        f"{last['torch']}; commit {last['git_commit']}, {last['utc'][:10]}. "
        f"{'; '.join(f'`{command}`' for command in report['commands'])}"
    )


def quality_papers(results: Path, name: str, sampler: str = "DDIM-100") -> str | None:
    """Plain and modulated layers: what MoDiff's paper and the closest peer report, and the rows of `sampler` here."""
    if sampler not in SAMPLERS:
        raise ValueError(f"quality_papers: sampler {sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}")
    report = loaded(results / f"{name}.json")
    if report is None:
        return None
    found = {
        (row["bits"], row["way"]): row for row in report["rows"] if row["sampler"] == sampler and not row["scheduled"]
    }

    def pair(bits: str, key: str, form: str) -> str:
        rows = [found.get((bits, way)) for way in ("plain", "modulated")]
        return ", ".join("-" if row is None else _shown(row, key, form) for row in rows)

    cells = [
        [bits, *claims, pair(bits, "frechet_test", "{:.2f}"), pair(bits, "frechet_full", "{:.2g}")]
        for bits, claims in CLAIMS["rows"].items()
    ]
    full = found.get(("", "float"))
    own = "-" if full is None else _shown(full, "frechet_test", "{:.2f}")
    cells.insert(0, ["full precision", "4.24 (W8)", "4.24 (W8)", "4.24 (W8)", "7.80", own, "0"])
    header = [text.replace("DDIM-100: Fréchet", f"{sampler}: Fréchet") for text in CLAIMS["header"]]
    return markdown_table(header, cells)
