"""The tables of docs/quality.md, from the reports of the study of quality."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
REFERENCE_HEADER = (
    *("layers", "rows", "ops", "codes", "differ", "behind a norm, differ", "floats, worst dB", "PSNR dB: backend"),
    *("reference", "between both"),
)


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


def quality_reference(results: Path, name: str) -> str | None:
    """What both backends compute, summed over samplers and schedules."""
    report = loaded(results / f"{name}.json")
    cells = []
    for bits in BITS:
        for way in ("plain", "modulated"):
            rows = [
                row
                for row in (report["rows"] if report else [])
                if (row["bits"], row["way"]) == (bits, way) and "reference" in row
            ]
            if rows:
                cells.append([f"{way} {bits}", str(len(rows)), *_reference_cells([row["reference"] for row in rows])])
    if report is None or not cells:
        return None
    backends = sorted({row["backend"] for row in report["rows"] if "reference" in row})
    count = max(row["reference"]["images"] for row in report["rows"] if "reference" in row)
    return (
        f"{markdown_table(REFERENCE_HEADER, cells)}\n\n{report['model']} on {report['device']}, backend "
        f"{', '.join(backends)}; ops of up to three calls of a row and pictures of whole runs, {count} images."
    )


def _reference_cells(found: Sequence[dict[str, Any]]) -> list[str]:
    def total(key: str) -> int:
        return sum(row[key] for row in found)

    def mean(key: str) -> str:
        values = [row[key] for row in found if row[key] is not None]
        return f"{sum(values) / len(values):.1f}" if values else "equal"

    floats = [row["sqnr_db"] for row in found if row["sqnr_db"] is not None]
    behind_norm = total("codes") - total("exact_codes")
    differing = total("differing") - total("exact_differing")
    return [
        str(total("ops")),
        f"{total('codes') / 1e6:.1f} M",
        f"{total('exact_differing')} of {total('exact_codes') / 1e6:.1f} M",
        f"{differing / behind_norm * 1e6:.1f} ppm" if behind_norm else "-",
        f"{min(floats):.0f}" if floats else "equal",
        mean("psnr_db"),
        mean("reference_psnr_db"),
        mean("psnr_between_db"),
    ]


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
