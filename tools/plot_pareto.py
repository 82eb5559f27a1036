"""Draw docs/schedules_pareto.png from benchmarks/results/pareto.json, or check that it is up to date.

python tools/plot_pareto.py            draw it (needs matplotlib, which the extra dev brings)
python tools/plot_pareto.py --check    exit code 1 if it was drawn from other rows, by what the picture holds"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.studies.schedules import KARRAS, LU, PLAIN, SAMPLERS, curve  # noqa: E402 (the path is set first)

# Methods, what their line is called, and how it is drawn; the fitted schedules last, over all others.
LINES = (
    ("every call", "every call, fewer steps", {"color": "black", "marker": "."}),
    ("hold", "hold the last output", {"color": "tab:orange", "marker": "v"}),
    ("DeepCache", "DeepCache N=2, 3, 5", {"color": "tab:red", "marker": "s"}),
    ("TaylorSeer 1/TaylorSeer 2", "TaylorSeer, order 1 or 2", {"color": "tab:purple", "marker": "<"}),
    ("HiCache", "HiCache", {"color": "tab:brown", "marker": ">"}),
    ("Spectrum", "Spectrum, ridge 1e-4", {"color": "tab:cyan", "marker": "^"}),
    ("polynomial", "polynomial", {"color": "tab:blue", "marker": "o"}),
    ("fitted sampler", "fitted sampler, every call", {"color": "grey", "marker": "x", "linestyle": "--"}),
    ("fit, converged", "fitted schedule (ours)", {"color": "tab:green", "marker": "D", "linewidth": 2.4}),
)
SHOWN = (PLAIN, KARRAS, LU)
SHOWS = "Description"  # the text chunk of the picture that holds its points


def panels(report: dict[str, Any]) -> dict[str, list[Any]]:
    """By sampler, label, style and points of every line."""
    return {
        of: [(label, style, [*curve(report, of, by.split("/")).items()]) for by, label, style in LINES] for of in SHOWN
    }


def draw(found: dict[str, list[Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(11, 4.6), sharey=True, squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, (of, lines) in zip(axes.flat, found.items()):
        for label, style, points in lines:
            (handles[label],) = axis.plot(*np.reshape(points, (-1, 2)).T, **{"markersize": 5, **style})
        axis.axhline(lines[0][2][-1][1], color="black", linestyle=":", linewidth=1)
        axis.set_title(f"{of}, {SAMPLERS[of][1]} steps", fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("evaluations of the network", fontsize=9)
    axes[0, 0].set_ylabel("dB to the converged picture", fontsize=9)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    figure.savefig(path, dpi=88, metadata={SHOWS: json.dumps(found), "Software": None})


def main(argv: list[str]) -> str | None:
    path = ROOT / "docs" / "schedules_pareto.png"
    found = panels(json.loads((ROOT / "benchmarks" / "results" / "pareto.json").read_text()))
    if "--check" not in argv:
        draw(found, path)
    with Image.open(path) as picture:
        if picture.info.get(SHOWS) != json.dumps(found):
            return f"{path.name} is out of date; run python tools/plot_pareto.py"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
