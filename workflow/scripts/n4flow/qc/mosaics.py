"""The pictures of a scan: slices side by side, with what stands over them as SVG, sharp at any size.

A mosaic is one picture or several on the same slices, which a page swaps in place, and one drawing over them: names of
the directions, the edge of the mask, isolines, the ticks of the colour bars. Text and lines are no pixels, so that they
can be read on a phone and on a screen of double density, and the pixels need no more than the voxels they show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from markupsafe import Markup, escape
from matplotlib import colormaps
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw

from n4flow.qc.panels import Slice

#: What lies around a field, and the ground of images.
OUTSIDE, GROUND = (185, 188, 192), (0, 0, 0)

#: Widths of a mosaic in CSS pixels of a window of 1280: of images, and of fields with half the slices.
WIDE, NARROW = 820, 403

#: Height of all rows together, in the same pixels, if they would be taller.
TALLEST = 800

#: Around the slices: for the title, for the names of the directions, between two slices, under a row, for the bar.
TOP, SIDE, GAP, BELOW, BAR = 24, 20, 5, 17, 54

#: Pixels of a picture per CSS pixel: so many for a voxel where these are finer (what is between them the browser makes
#: as well), but no more than this; fewer of a field, which is smooth.
PER_VOXEL, MOST_DENSITY, SMOOTH_DENSITY = 1.0, 2.0, 0.4

#: Side of a plane in the grid of all scans.
THUMBNAIL_PIXELS = 160

#: What is left of the grey outside of the mask in the grid of all scans; the pages have it in style.css.
DIMMED = 0.5

#: The window may be wider or higher than a drawing by less than this.
BEYOND = 3000

#: No point of a line moves by more CSS pixels where it is simplified.
SIMPLER = 0.5

#: Ratios at which isolines are drawn, and at most how many to either side of 1.
ISO_RATIOS = (1.005, 1.01, 1.02, 1.05, 1.1, 1.2, 1.35, 1.5, 2, 3, 5, 10, 20)
MOST_ISOLINES = 4

#: Isolines are found on about so many pixels a side, and named where so much of one is seen; a name takes so much.
ISO_PIXELS, ISO_LENGTH, ISO_NAME = 22, 50, (38, 14)


class ColourScale(NamedTuple):
    """What the colours of a mosaic mean."""

    cmap: str
    low: float
    high: float
    ticks: list[tuple[float, str]]
    label: str
    beyond: tuple[str, str] | None = None  # colours of what is lower and higher

    def colours(self, values: np.ndarray) -> np.ndarray:
        """The colours (n, m, 3) of values (n, m), uint8."""
        table = _colour_table(self.cmap, self.beyond)
        span = self.high - self.low
        # far beyond, no colour changes: infinite voxels would overflow
        place = np.rint((values.clip(self.low - span, self.high + span) - self.low) * (255 / span))
        found: np.ndarray = table[np.clip(np.nan_to_num(place) + 1, 0, 257).astype(np.int16)]
        return found


@cache
def _colour_table(cmap: str, beyond: tuple[str, str] | None) -> np.ndarray:
    """256 colours between those of what lies beyond."""
    map_ = colormaps[cmap]
    if beyond:
        map_ = map_.with_extremes(under=beyond[0], over=beyond[1])
    return (255 * map_(np.arange(-1, 257))[:, :3]).round().astype(np.uint8)


def intensity_scale(high: float) -> ColourScale:
    """Grey from 0 to `high`."""
    ticks = [(share * high, f"{share * high:.3g}") for share in (0.25, 0.5, 0.75)]
    return ColourScale("gray", 0, high, [(0, "0"), *ticks, (high, f"{high:.4g}")], "intensity")


def ratio_text(ratio: float) -> str:
    """A ratio with as many digits as tell it from 1."""
    away = abs(math.log(ratio)) if ratio > 0 else 0.0
    digits = 2 if away >= 0.045 else 3 if away >= 0.0045 or away == 0 else 4
    text = f"{ratio:.{digits}f}" if ratio < 10 else f"{ratio:.3g}"
    return "×" + (text.rstrip("0").rstrip(".") if "." in text else text)


def ratio_ticks(window_log: float) -> list[tuple[float, str]]:
    """Ticks of a log field: ×1, both ends, and plain ratios about halfway to them."""
    steps = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1, 1.25, 1.5, 2, 3, 5, 10)
    inner = [r for r in steps if 0.25 <= math.log(r) / window_log <= 0.6][-1:]
    halves = [window_log, *map(math.log, inner)]
    return sorted(
        (sign * value, ratio_text(math.exp(sign * value))) for value in {0.0, *halves} for sign in _signs(value)
    )


def _signs(value: float) -> tuple[int, ...]:
    return (1, -1) if value else (1,)


def field_scale(window_log: float) -> ColourScale:
    """Red where the field is above 1 (brighter than it should be), blue below; yellow and green beyond the window."""
    return ColourScale(
        "RdBu_r", -window_log, window_log, ratio_ticks(window_log), "field, log scale", ("#00a88f", "#f2c500")
    )


def difference_scale(window_log: float) -> ColourScale:
    """Purple where ours is above the reference, orange below; blue and red beyond the window."""
    return ColourScale(
        "PuOr", -window_log, window_log, ratio_ticks(window_log), "ours / reference", ("#c40045", "#1466ff")
    )


class Layer(NamedTuple):
    """A picture of a mosaic."""

    states: str  # classes of the page's states in which it shows
    title: str  # in the corner, so that a screenshot speaks for itself
    pictures: Sequence[Sequence[np.ndarray]]  # per plane, per slice, rows from bottom to top
    scale: ColourScale


class Mosaic(NamedTuple):
    """Pictures of one size, and what is drawn over them."""

    pictures: dict[str, Image.Image]  # by their states
    drawing: Markup


class _Place(NamedTuple):
    """A slice, and where it lies, in CSS pixels from the upper left."""

    where: Slice
    x: float
    y: float
    width: float
    height: float

    def points(self, shares: np.ndarray) -> np.ndarray:
        """Points given as shares of width and height, from the lower left."""
        return shares * (self.width, -self.height) + (self.x, self.y + self.height)

    def holds(self, spot: np.ndarray, size: Sequence[float]) -> bool:
        """Whether a word of this size, around this point, lies within the slice."""
        middle, room = (self.x + self.width / 2, self.y + self.height / 2), (self.width, self.height)
        return bool((np.abs(spot - middle) <= (np.array(room) - size) / 2).all())


def mosaic(
    layers: Sequence[Layer],
    slices: Sequence[Sequence[Slice]],
    *,
    width: int,
    outlines: Sequence[Sequence[list[np.ndarray]]] | None = None,
    cover: str = "",
    isolines: Sequence[Sequence[np.ndarray]] | None = None,
    iso_states: str = "",
    bar_mm: bool = False,
) -> Mosaic:
    """Rows of slices, one row per plane, with anatomical labels and a colour bar.

    Parameters
    ----------
    layers : sequence of Layer
    slices : per plane, per slice
    width : int
        In CSS pixels.
    outlines : per plane, per slice, rings of `panels.silhouette`, optional
    cover : {"", "dim", "dim bare", "hide"}
        What lies over the picture outside of the outlines, which are drawn unless it is bare.
    isolines : per plane, per slice, a log field as the layers' pictures, optional
        Lines of equal ratio inside of the outlines, with their names.
    iso_states : str
        States in which they are drawn; empty: all.
    bar_mm : bool
        A scale bar under each row.
    """
    places, height = _lay_out(slices, width)
    density = _density(places)
    hidden, bar = cover == "hide", _bar_box(width, height)
    rings = [
        [place.points(ring) for ring in around] for place, around in zip(places, _flat(outlines or ()), strict=False)
    ]
    drawn, names = [], ""
    if isolines is not None:
        lines, names = _isolines(places, list(_flat(isolines)), _flat(outlines or ()))
        drawn.append(f'<path class="line {iso_states}" transform="scale(.1)" d="{lines}"/>')
    if outlines:
        # one path for ground and edge: all but the bar, and so wide that its outer lines are not seen
        around = [_box(-BEYOND, -BEYOND, width + 2 * BEYOND, height + 2 * BEYOND), _box(*bar)]
        drawn.append(f'<path class="{cover}" transform="scale(.1)" d="{_path([*around, *_flat(rings)])}"/>')
    drawn.append(f'<g class="{iso_states}">{names}</g>')
    drawn += _labels(places, slices, bar_mm)
    for layer in layers:
        drawn.append(f'<g class="{layer.states}">{_text(10, 16, layer.title, "title")}{_ticks(layer.scale, bar)}</g>')
    ink = ("ink" if hidden else "light") + " broad" * (width > NARROW)
    head = f'<svg class="over {ink}" viewBox="0 0 {width} {height}" aria-hidden="true" focusable="false">'
    ground = OUTSIDE if hidden else GROUND
    pictures = {layer.states: _raster(layer, places, (width, height), density, ground, bar) for layer in layers}
    return Mosaic(pictures, Markup(head + "".join(drawn) + "</svg>"))


def mask_picture(masks: Sequence[Sequence[np.ndarray]], slices: Sequence[Sequence[Slice]], width: int) -> Image.Image:
    """The voxels of a mask as a colour that one sees the image through, of the size of a `mosaic`.

    Parameters
    ----------
    masks : per plane, per slice, a (rows, columns) bool array
    slices, width
        As of `mosaic`.
    """
    places, height = _lay_out(slices, width)
    density = _density(places)
    sheet = np.zeros((round(height * density), round(width * density)), dtype=np.uint8)
    for place, mask in zip(places, _flat(masks), strict=True):
        rows, columns = _pixels(place, density)
        size = (columns.stop - columns.start, rows.stop - rows.start)
        inside = Image.fromarray(mask[::-1].astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        sheet[rows, columns] = np.asarray(inside)
    colours = np.array([[0, 0, 0, 0], [255, 196, 0, 110]], dtype=np.uint8)
    return Image.fromarray(colours[sheet])


def thumbnail(
    pictures: Sequence[Sequence[np.ndarray]],
    slices: Sequence[Sequence[Slice]],
    scale: ColourScale,
    outlines: Sequence[Sequence[list[np.ndarray]]],
) -> np.ndarray:
    """The middle slice of each plane side by side, small, for the grid of all scans.

    Outside of the outlines images are dimmed, and fields not shown.

    Parameters
    ----------
    pictures, slices, scale, outlines
        As of `mosaic` and `Layer`.

    Returns
    -------
    (THUMBNAIL_PIXELS, 3 THUMBNAIL_PIXELS, 3) uint8 array
    """
    side, grey = THUMBNAIL_PIXELS, scale.cmap == "gray"
    ground = GROUND if grey else OUTSIDE
    sheet = Image.new("RGB", (3 * side, side), ground)
    left = (3 - len(slices)) * side // 2
    for number, row in enumerate(slices):
        middle = len(row) // 2
        across, up = row[middle].size_mm
        size = (max(1, round(side * min(1, across / up))), max(1, round(side * min(1, up / across))))
        image = Image.fromarray(scale.colours(_resized(pictures[number][middle], size)))
        shown = Image.new("L", size, round(255 * DIMMED) if grey else 0)
        for ring in outlines[number][middle]:
            corners = (ring * (1, -1) + (0, 1)) * size
            ImageDraw.Draw(shown).polygon([(float(x), float(y)) for x, y in corners], fill=255)
        sheet.paste(image, (left + (side - size[0]) // 2, (side - size[1]) // 2), shown)
        left += side
    return np.asarray(sheet)


def _flat(rows: Iterable[Iterable[Any]]) -> Iterable[Any]:
    return (each for row in rows for each in row)


def _lay_out(slices: Sequence[Sequence[Slice]], width: int) -> tuple[list[_Place], int]:
    """Where each slice lies, row by row, and the height of it all."""
    places, y = [], float(TOP)
    most = TALLEST / len(slices)
    for row in slices:
        aspects = [across / up for across, up in (s.size_mm for s in row)]
        room = width - 2 * SIDE - GAP * (len(row) - 1)
        height = min(room / sum(aspects), most)
        x = SIDE + (room - height * sum(aspects)) / 2
        for where, aspect in zip(row, aspects, strict=True):
            places.append(_Place(where, x, y, height * aspect, height))
            x += height * aspect + GAP
        y += height + BELOW
    return places, round(y + BAR)


def _density(places: Sequence[_Place]) -> float:
    """Pixels per CSS pixel."""
    finest = 0.0
    for place in places:
        plane, box = place.where.plane, place.where.box
        voxels = (box[axis].stop - box[axis].start for axis in (plane.across, plane.up))
        finest = max(finest, *(n / length for n, length in zip(voxels, place[3:], strict=True)))
    return min(MOST_DENSITY, max(1.0, PER_VOXEL * finest))


def _pixels(place: _Place, density: float) -> tuple[slice, slice]:
    """Rows and columns of a slice in the sheet; one that is thinner than a pixel has one."""
    rows, columns = (
        slice(round(start * density), max(round((start + length) * density), round(start * density) + 1))
        for start, length in ((place.y, place.height), (place.x, place.width))
    )
    return rows, columns


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture, rows from bottom to top, in so many pixels, rows from top to bottom."""
    image = Image.fromarray(np.ascontiguousarray(picture[::-1], dtype=np.float32))
    return np.asarray(image.resize(size, Image.Resampling.BILINEAR))


def _raster(
    layer: Layer,
    places: Sequence[_Place],
    size: tuple[int, int],
    density: float,
    ground: tuple[int, int, int],
    bar: tuple[float, float, float, float],
) -> Image.Image:
    if layer.scale.cmap != "gray":
        density = SMOOTH_DENSITY
    sheet = np.empty((round(size[1] * density), round(size[0] * density), 3), dtype=np.uint8)
    sheet[:] = ground
    for place, picture in zip(places, _flat(layer.pictures), strict=True):
        rows, columns = _pixels(place, density)
        sized = _resized(picture, (columns.stop - columns.start, rows.stop - rows.start))
        sheet[rows, columns] = layer.scale.colours(sized)
    x, y, width, height = (density * n for n in bar)
    rows, columns = slice(round(y), round(y + height)), slice(round(x), round(x + width))
    scale = layer.scale
    sheet[rows, columns] = scale.colours(np.linspace(scale.low, scale.high, columns.stop - columns.start)[None])
    return Image.fromarray(sheet)


def _bar_box(width: int, height: int) -> tuple[float, float, float, float]:
    return 0.11 * width, height - 38, 0.78 * width, 12


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    where = f' class="{kind}"' if kind else ""
    where += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{where}>{escape(text)}</text>'


def _ticks(scale: ColourScale, bar: tuple[float, float, float, float]) -> str:
    x, y, width, height = bar
    marks, words = "", ""
    if scale.beyond:
        for edge, way, fill in ((x, -height, scale.beyond[0]), (x + width, height, scale.beyond[1])):
            words += f'<path style="fill:{fill}" d="M{edge:.1f} {y}l{way} {height / 2}l{-way} {height / 2}z"/>'
    for value, text in scale.ticks:
        at = x + (value - scale.low) / (scale.high - scale.low) * width
        marks += f"M{at:.1f} {y + height}v4"
        words += _text(at, y + height + 16, text, "tick", "middle")
    return f'<path class="mark" d="M{x:.1f} {y}h{width:.1f}v{height}h{-width:.1f}z{marks}"/>{words}' + _text(
        x + width / 2, y - 4, scale.label, "tick", "middle"
    )


def _labels(places: Sequence[_Place], slices: Sequence[Sequence[Slice]], bar_mm: bool) -> Iterable[str]:
    """Beside each row the directions, under each slice its index; nothing lies over a picture."""
    first = 0
    for row in slices:
        start, end = places[first], places[first + len(row) - 1]
        left, right, bottom, top = row[0].plane.labels
        middle = start.y + start.height / 2 + 4
        if bar_mm:
            yield _scale_bar(start)
        if left:
            x, beyond = start.x - 11, end.x + end.width + 11
            yield _text(x, middle, left, "way", "middle") + _text(beyond, middle, right, "way", "middle")
            yield _text(x, start.y + 11, top, "way", "middle")
            yield _text(x, start.y + start.height - 2, bottom, "way", "middle")
        for place in places[first : first + len(row)]:
            name = f"{'ijk'[place.where.plane.normal]} {place.where.index}"
            x, anchor = (place.x + place.width, "end") if bar_mm else (place.x + place.width / 2, "middle")
            yield _text(x, place.y + place.height + 12, name, "tick", anchor)
        first += len(row)


def _scale_bar(place: _Place) -> str:
    """A bar of a round length, under the first slice of a row, and its length."""
    per_mm = place.width / place.where.size_mm[0]
    length_mm = round_length(0.25 * place.width / per_mm)
    y = place.y + place.height + 8
    line = f'<path class="scale" d="M{place.x:.1f} {y:.1f}h{length_mm * per_mm:.1f}"/>'
    return line + _text(place.x + length_mm * per_mm + 5, y + 4, length_text(length_mm), "tick")


def round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, … times a power of ten that is no more than this."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(step * power for step in (5, 2, 1) if step * power <= most * (1 + 1e-9))


def length_text(length_mm: float) -> str:
    """A length with a unit in which it is no fraction."""
    for unit, size in (("m", 1000.0), ("cm", 10.0), ("mm", 1.0), ("µm", 1e-3)):
        if length_mm >= size * (1 - 1e-9) and unit != "cm":
            return f"{length_mm / size:.4g} {unit}"
    return f"{length_mm * 1e6:.4g} nm"


def _box(x: float, y: float, width: float, height: float) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def _path(lines: Iterable[np.ndarray], closed: bool = True) -> str:
    """SVG's words for lines, in tenths, each point from the one before, without those a straight line goes through."""
    words = []
    for line in lines:
        points = line
        if len(line) > 4:
            outline = Outline(line)
            outline.simplify_threshold = SIMPLER
            points = np.asarray(outline.cleaned(simplify=True).vertices)[:-1]
        tenths = np.rint(10 * points).astype(int)
        steps = " ".join(f"{dx} {dy}" for dx, dy in np.diff(tenths, axis=0).tolist() if dx or dy)
        if steps:
            words.append(f"M{tenths[0, 0]} {tenths[0, 1]}l{steps}" + "z" * closed)
    return "".join(words).replace(" -", "-")


def iso_levels(log_most: float) -> list[float]:
    """Logs of the ratios at which isolines are drawn in a field that goes this far from 1, 0 among them."""
    logs = [math.log(ratio) for ratio in ISO_RATIOS if math.log(ratio) <= log_most][-MOST_ISOLINES:]
    return sorted({0.0, *logs, *(-log for log in logs)}) if logs else []


def _isolines(
    places: Sequence[_Place], fields: Sequence[np.ndarray], outlines: Iterable[Sequence[np.ndarray]]
) -> tuple[str, str]:
    """Lines of equal ratio that reach beyond the outlines by a little, and their names."""
    coarse = [_coarse(*each) for each in zip(places, fields, outlines, strict=True)]
    most = max((float(np.abs(values[inside]).max()) for values, _, inside in coarse if inside.any()), default=0.0)
    lines: list[np.ndarray] = []
    names: list[str] = []
    for place, (values, points, inside) in zip(places, coarse, strict=True):
        if min(values.shape) < 2 or not inside.any():
            continue
        # a pixel more, so that they reach the outlines
        near = inside.copy()
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            near |= np.roll(near, step, axis)
        generator: Any = contour_generator(
            x=points[..., 0], y=points[..., 1], z=np.ma.masked_array(values, ~near), corner_mask=False
        )
        taken: list[np.ndarray] = []
        for level in iso_levels(most):
            found = generator.lines(level)
            lines += found
            longest = max(found, key=len, default=np.empty((0, 2)))
            if len(longest) < 2 or np.linalg.norm(np.diff(longest, axis=0), axis=1).sum() < ISO_LENGTH:
                continue
            for share in (0.5, 0.3, 0.7):
                spot = longest[int(share * (len(longest) - 1))]
                nearest = np.unravel_index(np.argmin(((points - spot) ** 2).sum(axis=-1)), inside.shape)
                free = all((np.abs(spot - other) > ISO_NAME).any() for other in taken)
                if inside[nearest] and free and place.holds(spot, ISO_NAME):
                    taken.append(spot)
                    names.append(_text(spot[0], spot[1] + 4, ratio_text(math.exp(level)), "iso", "middle"))
                    break
    return _path(lines, closed=False), "".join(names)


def _coarse(
    place: _Place, field: np.ndarray, outlines: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A field on about `ISO_PIXELS` a side: its values, where they lie in the drawing, and whether in an outline."""
    rows, columns = (np.unique(np.linspace(0, n - 1, min(n, ISO_PIXELS)).round().astype(int)) for n in field.shape)
    values = field[np.ix_(rows, columns)]
    shares = np.meshgrid((columns + 0.5) / field.shape[1], (rows + 0.5) / field.shape[0])
    points = place.points(np.stack(shares, axis=-1))
    within = Image.new("1", (len(columns), len(rows)))
    for ring in outlines:
        corners = ring * (len(columns), len(rows)) - 0.5
        ImageDraw.Draw(within).polygon([(float(x), float(y)) for x, y in corners], fill=1)
    return values, points, np.asarray(within)
