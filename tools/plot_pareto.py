"""Draw docs/schedules_pareto.png from benchmarks/results/pareto.json, or check that it is up to date.

    python tools/plot_pareto.py            draw it (needs matplotlib, which the extra dev brings)
    python tools/plot_pareto.py --check    exit code 1 if it was drawn from other rows

A panel per sampler: evaluations of the network against dB to the converged trajectory, a line per way to spend fewer.
The picture carries a digest of what it shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.studies.schedules import Panel, panels  # noqa: E402 (the path is set first)

NETWORK = "float32"
SHOWN = {"DDIM": (20, 50), **dict.fromkeys(("DPM-Solver++", "DPM-Solver++ Karras", "DPM-Solver++ Lu", "UniPC"), (25,))}
COLUMNS = 3
# What every line is called, and how it is drawn; the searched schedules are drawn last, over all others.
PLAIN = {
    "any_sampler": ("any sampler, every call", {"color": "black", "linestyle": "--", "drawstyle": "steps-post"}),
    "fewer_steps": ("same sampler, fewer steps", {"color": "grey", "marker": "."}),
}
METHODS = {
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
    plain = [(label, style, getattr(panel, name)) for name, (label, style) in PLAIN.items()]
    return plain + [
        (label, style, panel.schedules[method])
        for method, (label, style) in METHODS.items()
        if method in panel.schedules
    ]


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
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, found):
        for label, style, points in curves(panel):
            axis.plot(*zip(*points), label=label, **{"markersize": 5, "linewidth": 1.3, **style})
        axis.axhline(panel.every_call_db, color="grey", linestyle=":", linewidth=1)
        axis.set_title(f"{panel.sampler}, {panel.steps} steps", fontsize=10)
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("evaluations of the network", fontsize=9)
        axis.set_ylabel("dB to converged", fontsize=9)
        axis.tick_params(labelsize=8)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_legend_handles_labels()[0]}
    order = [label for label, _ in (*PLAIN.values(), *METHODS.values()) if label in lines]
    figure.legend(
        [lines[label] for label in order], order, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=88, metadata={DIGEST: digest(found), "Software": None})
    pyplot.close(figure)


def drawn_digest(path: Path) -> str | None:
    """The digest in the picture at `path`, None where there is none."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get(DIGEST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="draw nothing, exit code 1 if the picture is out of date")
    args = parser.parse_args(argv)
    path = ROOT / "docs" / "schedules_pareto.png"
    found = shown_panels(json.loads((ROOT / "benchmarks" / "results" / "pareto.json").read_text()))
    if not args.check:
        draw(found, path)
    elif drawn_digest(path) != digest(found):
        print(f"{path.name} is out of date; run python tools/plot_pareto.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
