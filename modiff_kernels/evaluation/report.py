"""Pictures of a report: images of rows with what they cost, speed against quality, layers, and a page of all this."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from modiff_kernels.calibration.result import replace_file
from modiff_kernels.config.schedule import FORECAST, HOLD, UPDATE
from modiff_kernels.evaluation.images import enlarged, picture_of
from modiff_kernels.evaluation.table import HEADER, table_cells

Row = Mapping[str, Any]

AMPLIFIED = 10  # times, of the differences from full precision
CELL, THUMBNAIL = 96, 256  # pixels: small images are enlarged to the first, large ones are at most the second on a page
COLUMNS = 6, 8  # images of a row, in a picture and on a page
MANY_ROWS = 4  # of more than these, one of each family is drawn
FAMILIES = {"plain": "#c0392b", "modulated": "#1f6fb4", "scheduled": "#1e8449", "plain-scheduled": "#e08e0b"}
FAMILIES |= {"weight-only": "#7f8c8d", "planned": "#8e44ad", "float": "black"}
WORDS = {UPDATE: "computed", FORECAST: "forecast", HOLD: "held"}
COLOURS = {UPDATE: "#1f6fb4", FORECAST: "#dfe6ec", HOLD: "#f3d9a4"}


def family(row: Row) -> str:
    return "float" if row["mode"] == "float" else str(row["key"]).rpartition("-")[0]


def drawn(rows: Sequence[Row]) -> list[Row]:
    """The low-bit rows whose images are drawn: all where there are few, else the one of plain, modulated and scheduled
    layers that is nearest to W8A4."""
    low_bit = [row for row in rows if row["mode"] != "float"]
    if len(low_bit) <= MANY_ROWS:
        return low_bit

    def distance(row: Row) -> tuple[int, int]:
        return abs(row["act_bits"] - 4), -row["weight_bits"]

    groups = [[row for row in low_bit if family(row) == name] for name in ("plain", "modulated", "scheduled")]
    return [min(group, key=distance) for group in groups if group] or low_bit[:MANY_ROWS]


def caption(row: Row) -> list[str]:
    """What a row reaches and costs, in a few words each."""
    cells = dict(zip(HEADER, table_cells(row)))
    psnr, speed = cells["PSNR dB"], cells["speed-up"]
    quality = {"reference": "the reference", "equal": "equal to it"}.get(psnr, f"{psnr} dB")
    fast = f"{row['s_per_image']:.3g} s an image" if speed == "-" else f"{speed} as fast"
    return [quality, fast, f"{cells['avg bits']} bits"]


def difference(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return AMPLIFIED * np.abs(images - reference)


def sheet(path: Path, reference: Row, rows: Sequence[Row], images: Mapping[str, np.ndarray]) -> None:
    """Write a PNG: a line of `images` (row name -> [N, H, W, C] in 0..1) for the reference and every row, with what it
    costs beside it, and below those of low bits their difference from the reference, amplified."""
    bold, font = (ImageFont.load_default(size=size) for size in (16, 14))
    lines: list[tuple[list[str], np.ndarray]] = []
    exact = images[reference["name"]]
    for row in (reference, *rows):
        lines.append(([row["name"], *caption(row)], images[row["name"]]))
        if row is not reference:
            lines.append((["", f"its difference, x{AMPLIFIED}"], difference(images[row["name"]], exact)))
    tiles = [[enlarged(picture_of(image), CELL) for image in own[: COLUMNS[0]]] for _, own in lines]
    (width, height), pad = tiles[0][0].size, 4
    left = 16 + round(max(bold.getlength(text) for texts, _ in lines for text in texts))
    canvas = Image.new("RGB", (left + len(tiles[0]) * (width + pad), len(lines) * (height + pad) + pad), "white")
    draw = ImageDraw.Draw(canvas)
    for index, ((texts, _), own) in enumerate(zip(lines, tiles)):
        top = pad + index * (height + pad)
        for line, text in enumerate(texts):
            draw.text((8, top + 14 + 21 * line), text, "#444" if line else "black", font if line else bold, "lm")
        for column, tile in enumerate(own):
            canvas.paste(tile, (left + column * (width + pad), top))
    replace_file(path, lambda new: canvas.save(new, format="PNG", optimize=True))


def scatter(rows: Sequence[Row]) -> Figure:
    """Speed against quality: images per second, and dB to full precision."""
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    axis = figure.subplots()
    for name, colour in FAMILIES.items():
        own = [row for row in rows if family(row) == name]
        if name == "float" and own:
            axis.axvline(
                1 / min(row["s_per_image"] for row in own), color=colour, linestyle=":", label="full precision"
            )
        own = [row for row in own if name != "float" and row["psnr_db"] is not None and np.isfinite(row["psnr_db"])]
        speeds, qualities = [1 / row["s_per_image"] for row in own], [row["psnr_db"] for row in own]
        if own:
            axis.plot(speeds, qualities, color=colour, marker="o", linewidth=1, label=name.replace("-", " "))
        for row, place in zip(own, zip(speeds, qualities)):
            bits = f"W{row['weight_bits']}" + (f"A{row['act_bits']}" if row["act_bits"] < 32 else "")
            beside = (-6, -11) if name == "plain" else (6, -11 if name.startswith("plain") else 3)
            side = "right" if name == "plain" else "left"  # modulated rows are as fast, a little above
            axis.annotate(bits, place, beside, textcoords="offset points", fontsize=9, color=colour, ha=side)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="images per second", ylabel="dB to full precision")
    axis.margins(x=0.2, y=0.12)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9)
    return figure


def layers(
    title: str,
    state: Mapping[str, int],
    times: Mapping[str, tuple[str, float | None, float | None]],
    actions: str = "",
) -> Figure:
    """State (bytes) of every unit, with `times` its mode and the microseconds of a call in float and in that mode, and
    above them the calls of a run."""
    heights = [0.7] * bool(actions) + [0.9 + 0.2 * len(state)]
    figure = Figure(figsize=(10, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.add_gridspec(len(heights), 2 if times else 1, height_ratios=heights)
    if actions:
        axis = figure.add_subplot(grid[0, :])
        axis.bar(range(len(actions)), 1, width=0.9, color=[COLOURS[letter] for letter in actions])
        computed = f"{actions.count(UPDATE)} of {len(actions)} calls are computed (dark)"
        axis.set(yticks=[], xlim=(-0.6, len(actions) - 0.4), title=computed)
    axis = figure.add_subplot(grid[-1, 0])
    places = range(len(state))
    axis.barh(places, [size / 1e6 for size in state.values()], color=FAMILIES["modulated"])
    axis.set_yticks(places, list(state), fontsize=8)
    axis.set(ylim=(len(state) - 0.4, -0.6), xlabel="state, MB")
    if times:
        axis = figure.add_subplot(grid[-1, 1])
        for shift, part, colour, label in (
            (-0.2, 1, "#b0b7bd", "float"),
            (0.2, 2, FAMILIES["modulated"], "as planned"),
        ):
            values = [times[path][part] or 0 if path in times else 0 for path in state]
            axis.barh([place + shift for place in places], values, 0.38, color=colour, label=label)
        axis.set_yticks(places, [times[path][0] if path in times else "" for path in state], fontsize=8)
        axis.set(ylim=(len(state) - 0.4, -0.6), xlabel="time of a call, microseconds")
        axis.legend(fontsize=8)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG, or in the format that the ending says."""
    kind = path.suffix.lower().lstrip(".") or "png"
    replace_file(path, lambda new: figure.savefig(new, format=kind, dpi=110))


def page(path: Path, report: Row, reference: Row, images: Mapping[str, np.ndarray]) -> None:
    """Write `report` of `modiff compare` as one HTML file that needs no other. images: as of `sheet`."""
    exact = images[reference["name"]][: COLUMNS[1]]
    pictures = []
    for row in (reference, *drawn(report["rows"])):
        own = images[row["name"]][: COLUMNS[1]]
        apart = [] if row is reference else [_png(image) for image in difference(own, exact)]
        pictures.append((row["name"], ", ".join(caption(row)), [_png(image) for image in own], apart))
    with matplotlib.rc_context({"svg.hashsalt": "modiff"}):
        drawing = io.BytesIO()
        scatter(report["rows"]).savefig(drawing, format="svg", metadata={"Date": None})
    schedules = [(row["name"], row["actions"], row["calls_computed"]) for row in report["rows"] if row["actions"]]
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_suffix(".html").read_text()
    )
    text = template.render(
        report=report,
        header=HEADER,
        table=[table_cells(row) for row in report["rows"]],
        pictures=pictures,
        amplified=AMPLIFIED,
        scatter=_uri("image/svg+xml", drawing.getvalue()),
        schedules=schedules,
        actions={letter: (WORDS[letter], colour) for letter, colour in COLOURS.items()},
    )
    replace_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def _png(image: np.ndarray) -> str:
    """A picture as data URI, in its own size if that is small."""
    picture, data = picture_of(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(data, format="PNG", optimize=True)
    return _uri("image/png", data.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
