"""Two figures over all scans for Snakemake's report and for papers, from the metrics and the small pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

from n4flow.images.files import atomic_bytes
from n4flow.qc.dataset import OUTLIER_Z, load_ranked
from n4flow.qc.definitions import COLUMNS
from n4flow.qc.mosaics import THUMBNAIL_PIXELS, ColourScale, field_scale
from n4flow.qc.plots import AFTER, BEFORE, FAINT, INK
from n4flow.study.failures import Failure

#: Scans in the figure of the worst, and panels of each.
WORST, PANELS = 12, ("original", "corrected", "bias field")

#: Matplotlib's own, which knows ×; Pillow's does not.
FONT = findfont("DejaVu Sans")

#: Height of the heads of the columns, in pixels, and the windows that differ from scan to scan.
HEAD = 62
SHARED = {"original": "window of the corrected image", "corrected": "0 to its 99.5th percentile in the mask"}


def make_figures(
    metrics_files: Iterable[str | Path],
    distributions: str | Path,
    worst: str | Path,
    failed: Sequence[Failure] = (),
    outlier_z: float = OUTLIER_Z,
) -> None:
    """Write the distributions of the metrics, and the pictures of the worst scans, as PNG.

    Parameters
    ----------
    metrics_files : paths
        As `pages.make_subject` wrote them.
    distributions, worst : path-like
    failed : sequence of Failure
        Named in both.
    outlier_z : float
        Robust z beyond which a scan is flagged as an outlier.
    """
    scans = load_ranked(metrics_files, outlier_z)
    with atomic_bytes(distributions) as file:
        _distributions(scans, failed).savefig(file, format="png")
    with atomic_bytes(worst) as file:
        _worst(scans[:WORST], failed).save(file, "PNG")


def _distributions(scans: list[dict[str, Any]], failed: Sequence[Failure]) -> Figure:
    """A row of dots for each metric that can be bad; flagged scans are triangles."""
    flagged = np.array([bool(scan["flags"]) for scan in scans], dtype=bool)
    rows = []
    for key, heading, _, worse in COLUMNS:
        values = np.array([math.nan if not worse or scan.get(key) is None else float(scan[key]) for scan in scans])
        if len(set(values[np.isfinite(values)].tolist())) > (len(scans) > 1):  # one value of many scans says nothing
            rows.append((heading, values))
    count = max(1, len(rows))
    figure = Figure(figsize=(8, 0.4 + 0.62 * count), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    if failed:
        figure.suptitle(textwrap.fill(_named(failed), 110), fontsize=8, color=BEFORE)
    every = np.atleast_1d(figure.subplots(count))
    for axes, (heading, values) in zip(every, rows, strict=False):
        # neighbours in rank lie on different heights, the same on every run
        heights = np.empty(len(values))
        heights[np.argsort(values)] = np.arange(len(values)) % 7 / 6 if len(values) > 3 else 0.5
        for part, marker, colour in ((~flagged, "o", AFTER), (flagged, "^", BEFORE)):
            axes.scatter(values[part], heights[part], s=9 if marker == "o" else 18, marker=marker, color=colour)
        axes.axvline(np.nanmedian(values), color=INK, linewidth=0.8)
        axes.set(ylim=(-0.4, 1.4), yticks=[])
        axes.set_ylabel(heading, rotation=0, ha="right", va="center", fontsize=8)
        axes.tick_params(labelsize=7, length=2)
        axes.ticklabel_format(useOffset=False, style="plain")
        axes.locator_params(axis="x", nbins=6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
    return figure


def _named(failed: Sequence[Failure]) -> str:
    """The failed scans in a sentence."""
    names = [failure.scan for failure in failed[:WORST]] + [f"{len(failed) - WORST} more"] * (len(failed) > WORST)
    return f"{len(failed)} failed: {', '.join(names)}"


def _worst(scans: list[dict[str, Any]], failed: Sequence[Failure]) -> Image.Image:
    """A row of panels for each scan, under its name and flags; above them, what each column is, below, what failed."""
    side, line = THUMBNAIL_PIXELS, 22
    width = 3 * side
    height = HEAD + max(1, len(scans)) * (side + line)
    lines = textwrap.wrap(_named(failed), len(PANELS) * width // 8) if failed else []
    sheet = Image.new("RGB", (len(PANELS) * width, height + line * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(FONT, 14)
    for number, text in enumerate(lines):
        pen.text((6, height + number * line + 2), text, fill="black", font=font)
    windows = {scan["field_window_log"] for scan in scans if scan.get("field_window_log")}
    for column, panel in enumerate(PANELS):
        middle = column * width + width // 2
        pen.text((middle, 14), panel, fill="black", font=ImageFont.truetype(FONT, 17), anchor="mm")
        if panel != "bias field":
            pen.text((middle, 38), f"{SHARED[panel]}, dimmed outside of the mask", fill="black", font=font, anchor="mm")
        elif len(windows) == 1:
            _draw_bar(sheet, field_scale(windows.pop()), column * width + 60, width - 120)
    for number, scan in enumerate(scans):
        top = HEAD + number * (side + line)
        words = "; ".join(flag.partition("; look")[0] for flag in scan["flags"]).replace("_", " ") or "no flag"
        said = f"{scan.get('name')}: {words}"
        while font.getlength(said) > sheet.width - 12:
            said = said[:-2].rstrip(" …") + "…"
        pen.text((6, top + 2), said, fill="black", font=font)
        if not scan.get("pictures"):
            continue
        with Image.open(scan["folder"] / scan["pictures"]) as pictures:
            for column, panel in enumerate(PANELS):
                place = list(scan["panels"]).index(panel)
                crop = pictures.crop((0, place * side, 3 * side, (place + 1) * side))
                sheet.paste(crop, (column * 3 * side, top + line))
    return sheet


def _draw_bar(sheet: Image.Image, scale: ColourScale, left: int, width: int) -> None:
    """The colours of a scale, with its ticks, under the head of a column."""
    colours = scale.colours(np.linspace(scale.low, scale.high, width)[None])
    sheet.paste(Image.fromarray(np.repeat(colours, 12, axis=0)), (left, 26))
    pen, font = ImageDraw.Draw(sheet), ImageFont.truetype(FONT, 14)
    for value, text in scale.ticks:
        x = left + (value - scale.low) / (scale.high - scale.low) * width
        pen.line([(x, 38), (x, 42)], fill="black")
        pen.text((x, 50), text, fill="black", font=font, anchor="mm")
