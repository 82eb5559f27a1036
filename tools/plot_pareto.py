"""Draw docs/schedules_pareto.png from benchmarks/results/pareto.json, or check that it is up to date.

    python tools/plot_pareto.py            draw it (needs matplotlib, which the extra dev brings)
    python tools/plot_pareto.py --check    exit code 1 if it was drawn from other rows

A panel per sampler: evaluations of the network against dB to the converged trajectory, a line per way to spend fewer.
The picture carries a digest of what it shows.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.studies.schedules import Panel, panels  # noqa: E402 (the path is set first)

NETWORK, COLUMNS = "float32", 3
SHOWN = {
    "DDIM": (20, 50),
    **dict.fromkeys((f"DPM-Solver++{kind}" for kind in ("", " Karras", " Lu")), (25,)),
    "UniPC": (25,),
}
# What every line is called, and how it is drawn; the searched schedules are drawn last, over all others.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "any_sampler": ("any sampler, every call", {"color": "black", "linestyle": "--", "drawstyle": "steps-post"}),
    "fewer_steps": ("same sampler, fewer steps", {"color": "grey", "marker": "."}),
    "DeepCache": ("DeepCache N=2, 3, 5", {"color": "tab:red", "marker": "s"}),
    "hold": ("hold", {"color": "tab:orange", "marker": "v"}),
    "forecast deep": ("forecast, deep levels", {"color": "tab:cyan", "marker": "^"}),
    "forecast": ("forecast", {"color": "tab:blue", "marker": "o"}),
    "searched": ("forecast, searched", {"color": "tab:green", "marker": "D", "linewidth": 2.2}),
}
DIGEST = "Description"  # the text chunk of the picture that holds it


def shown_panels(report: dict[str, Any]) -> list[Panel]:
    """The panels of the picture, as far as the report has them."""
    return [panel for panel in panels(report, NETWORK) if panel.steps in SHOWN.get(panel.sampler, ())]


def curves(panel: Panel) -> list[tuple[str, dict[str, Any], list[tuple[float, float]]]]:
    """Label, style and points of every line of a panel."""
    points = {"any_sampler": panel.any_sampler, "fewer_steps": panel.fewer_steps, **panel.schedules}
    return [(label, style, points[name]) for name, (label, style) in LINES.items() if name in points]


def digest(found: list[Panel]) -> str:
    """Names the points that a picture shows."""
    shown = [(panel.sampler, panel.steps, curves(panel)) for panel in found]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def draw(found: list[Panel], path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = -(-len(found) // COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(11, 3.3 * rows + 0.6), squeeze=False, layout="constrained")
    lines: dict[str, Any] = {}
    for axis, panel in zip(axes.flat, found):
        for label, style, points in curves(panel):
            (lines[label],) = axis.plot(*zip(*points), label=label, **{"markersize": 5, "linewidth": 1.3, **style})
        axis.axhline(panel.every_call_db, color="grey", linestyle=":", linewidth=1)
        axis.set_title(f"{panel.sampler}, {panel.steps} steps", fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("evaluations of the network", fontsize=9)
        axis.set_ylabel("dB to converged", fontsize=9)
        axis.tick_params(labelsize=8)
    order = [label for label, _ in LINES.values() if label in lines]
    place = {"loc": "outside lower center", "ncols": 4, "fontsize": 9, "frameon": False}
    figure.legend([lines[label] for label in order], order, **place)
    figure.savefig(path, dpi=88, metadata={DIGEST: digest(found), "Software": None})


def main(argv: list[str]) -> int:
    from PIL import Image

    path = ROOT / "docs" / "schedules_pareto.png"
    found = shown_panels(json.loads((ROOT / "benchmarks" / "results" / "pareto.json").read_text()))
    if "--check" not in argv:
        draw(found, path)
    with Image.open(path) as picture:
        if picture.info.get(DIGEST) != digest(found):
            print(f"{path.name} is out of date; run python tools/plot_pareto.py", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
