"""The plots of a subject, as pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image

from n4flow.qc.pictures import picture_of

# Okabe & Ito's colour-blind safe pair, told apart by line style too
BEFORE, AFTER, INK, FAINT = "#B4500A", "#0060A0", "#222222", "#8a8a8a"

DPI = 170

#: Points, of a plot of 3.2 inches that is shown 290 px wide: 11 px.
TEXT = 9

#: A profile is shown over this much to either side of its mean at least.
LEAST_SPREAD = 0.05


def _plot() -> tuple[Figure, Any]:
    # fixed margins: a layout engine takes 0.1 s a plot
    figure = Figure(figsize=(3.2, 2.4), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.22, 0.2, 0.75, 0.77))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=TEXT, length=2)
    axes.xaxis.label.set_fontsize(TEXT)
    axes.yaxis.label.set_fontsize(TEXT)
    return figure, axes


def histogram_plot(original: np.ndarray, corrected: np.ndarray, high: float, limits: Sequence[float]) -> Image.Image:
    """In-mask histograms before and after, with the limits of the intensity classes.

    Parameters
    ----------
    original, corrected : (n,) arrays
    high : float
        Right end: the top of the display window.
    limits : floats
        Drawn as thin lines where they are finite.
    """
    figure, axes = _plot()
    width = 1.05 * high / 120
    whole = original[:10_000]
    if (whole == np.rint(whole)).all():  # bins of whole numbers: others would catch one integer more or less, a comb
        width = float(max(1, math.ceil(width)))
    edges = np.arange(0, 1.05 * high + width, width)
    for values, colour, line, label in ((original, BEFORE, "--", "original"), (corrected, AFTER, "-", "corrected")):
        counts, _ = np.histogram(values, bins=edges)
        axes.stairs(100 * counts / max(1, values.size), edges, color=colour, linestyle=line, linewidth=1.2, label=label)
    for limit in limits:
        if math.isfinite(limit):
            axes.axvline(limit, color=FAINT, linewidth=0.7, linestyle=":")
    axes.set(xlabel="intensity", ylabel="% of the mask", xlim=(0, 1.05 * high), ylim=(0, None))
    axes.legend(fontsize=TEXT, frameon=False)
    return picture_of(figure)


class Profile(NamedTuple):
    """Mean intensity of some voxels, plane by plane along one axis, over its mean; NaN in gaps."""

    position_mm: np.ndarray
    original: np.ndarray
    corrected: np.ndarray
    field: np.ndarray
    way: str  # along which axis, and which way


def profile_plot(profile: Profile) -> Image.Image:
    """How the bright class or the foreground runs along an axis, before and after."""
    figure, axes = _plot()
    x = profile.position_mm
    axes.axhline(1, color=FAINT, linewidth=0.7)
    axes.plot(x, profile.field, color=INK, linewidth=1, linestyle=":", label="field")
    axes.plot(x, profile.original, color=BEFORE, linewidth=1.2, linestyle="--", label="original")
    axes.plot(x, profile.corrected, color=AFTER, linewidth=1.4, label="corrected")
    curves = np.array([profile.field, profile.original, profile.corrected])
    # no axis fills itself with what is next to nothing
    low, high = min(np.nanmin(curves), 1 - LEAST_SPREAD), max(np.nanmax(curves), 1 + LEAST_SPREAD)
    axes.set(
        xlabel=f"mm {profile.way}",
        ylabel="over its mean",
        xlim=(0, np.nanmax(x)),
        ylim=(low - 0.02 * (high - low), high + 0.25 * (high - low)),  # the legend lies above
    )
    axes.legend(fontsize=TEXT, frameon=False)
    return picture_of(figure)


def gains_plot(gains: np.ndarray, axis: str) -> Image.Image:
    """Gains plane by plane, on a scale of logs.

    Parameters
    ----------
    gains : (n,) array
    axis : str
        That of the file along which the planes lie.
    """
    figure, axes = _plot()
    axes.axhline(1, color=FAINT, linewidth=0.7)
    axes.stairs(gains, np.arange(len(gains) + 1) - 0.5, baseline=None, color=AFTER, linewidth=1.2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(_PlainNumbers())
    axes.yaxis.set_minor_formatter(_PlainNumbers())
    axes.set_position((0.26, 0.2, 0.71, 0.77))  # its tick labels are wide
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"plane along {axis}", ylabel="gain", xlim=(-0.5, len(gains) - 0.5))
    return picture_of(figure)


class _PlainNumbers(LogFormatter):
    """0.002 for 2 x 10^-3: the grammar of mathematical text takes 0.2 s to build."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def convergence_plot(history: Sequence[dict[str, Any]], threshold: float | None) -> Image.Image:
    """Coefficient of variation (CV) of each update, a line per stage; that of the second half-sample is dashed."""
    figure, axes = _plot()
    last = 1
    for half in sorted({i.get("Half", 1) for i in history}):
        steps = list(enumerate((i for i in history if i.get("Half", 1) == half), start=1))
        last = max(last, len(steps))
        for stage in sorted({i["Stage"] for _, i in steps}):
            points = [(n, i["CV"]) for n, i in steps if i["Stage"] == stage]
            style = {"linestyle": "-" if half == 1 else "--", "marker": "o" if half == 1 else "s"}
            axes.plot(*zip(*points, strict=True), color=AFTER, linewidth=1.2, markersize=2.5, **style)
    if threshold:
        axes.axhline(threshold, color=INK, linewidth=0.9, linestyle="--", label=f"threshold {threshold:g}")
        axes.legend(fontsize=TEXT, edgecolor="none", framealpha=0.8)
    if any(i["CV"] > 0 for i in history):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PlainNumbers())
        axes.yaxis.set_minor_formatter(_PlainNumbers())
    axes.set_position((0.26, 0.2, 0.71, 0.77))  # its tick labels are wide
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="iteration", ylabel="CV", xlim=(0.5, last + 0.5))
    return picture_of(figure)


def agreement_plot(log_field: np.ndarray, log_reference: np.ndarray, note: str) -> Image.Image:
    """Our field against the reference, both demeaned, density of voxels; with a note in the corner."""
    figure, axes = _plot()
    step = max(1, log_field.size // 100_000)
    ours, reference = (v[::step] - v.mean(dtype=np.float64) for v in (log_field, log_reference))
    edge = max(1e-6, float(np.abs([ours.min(), ours.max(), reference.min(), reference.max()]).max()))
    axes.hexbin(
        reference, ours, gridsize=60, extent=(-edge, edge, -edge, edge), mincnt=1, norm=LogNorm(),
        cmap=colormaps["cividis"], linewidths=0.3,
    )  # fmt: skip
    axes.plot([-edge, edge], [-edge, edge], color=INK, linewidth=0.8, linestyle="--")
    axes.set(xlabel="log reference", ylabel="log ours", xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
    axes.text(0.04, 0.96, note, transform=axes.transAxes, va="top", fontsize=TEXT)
    return picture_of(figure)
