import base64
import csv
import io
import json
import math
import re
import zlib
from html.parser import HTMLParser
from itertools import permutations, product
from pathlib import Path
from urllib.parse import unquote

import nibabel as nib
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from threadpoolctl import threadpool_info, threadpool_limits

from n4flow.core.field import BiasField, Mesh
from n4flow.errors import InputError
from n4flow.images.fields import load_field
from n4flow.images.nifti import Volume
from n4flow.qc import figures, measuring, mosaics, panels, plots, viewer
from n4flow.qc.dataset import make_index
from n4flow.qc.definitions import COLUMNS, DEFINITIONS, FLOOR_SHARES, FLOORS
from n4flow.qc.pages import PAGE_BYTES, make_subject
from n4flow.study.failures import Failure
from n4flow.study.series import open_scan

#: What a reference's sidecar says of the check of our arithmetic.
AGREEMENT = {"r": 1.0, "rms": 2.4e-6, "max": 2.8e-5}

WINDOW = math.log(1.5)
HOSTILE = "sub-<script>alert(1)</script>&\"'"


# ---------------------------------------------------------------- panels


def oriented_affine(order, signs, size_mm, tilt=0.0):
    """Voxel axis a runs along world axis order[a], in the direction signs[a]; then everything is turned about x."""
    linear = np.zeros((3, 3))
    for axis in range(3):
        linear[order[axis], axis] = signs[axis] * size_mm[axis]
    turn = np.array([[1, 0, 0], [0, math.cos(tilt), -math.sin(tilt)], [0, math.sin(tilt), math.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ linear
    affine[:3, 3] = (3, -7, 11)
    return affine


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", list(product((1, -1), repeat=3)))
@pytest.mark.parametrize("tilt", [0.0, 0.4])
def test_planes_stand_upright_for_any_axis_order(order, signs, tilt):
    shape, size_mm = (6, 7, 8), (1.0, 2.0, 3.0)
    affine = oriented_affine(order, signs, size_mm, tilt)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    world = grid @ affine[:3, :3].T + affine[:3, 3]
    planes = panels.upright_planes(affine, shape, size_mm)
    assert [plane.name for plane in planes] == ["axial", "coronal", "sagittal"]
    axes = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}
    for plane, row in zip(planes, panels.choose_slices(np.ones(shape, bool), planes), strict=True):
        right, up = axes[plane.name]
        assert (np.diff(row[0].cut(world[..., right]), axis=1) > 0).all()
        assert (np.diff(row[0].cut(world[..., up]), axis=0) > 0).all()
        letters = "LRPAIS"
        assert "".join(plane.labels) == letters[2 * right : 2 * right + 2] + letters[2 * up : 2 * up + 2]
        assert plane.size_mm == (size_mm[order.index(right)], size_mm[order.index(up)])


@pytest.mark.parametrize("sign", [1, -1])
def test_slices_run_from_inferior_to_superior(sign):
    shape = (8, 8, 30)
    affine = oriented_affine((0, 1, 2), (1, 1, sign), (1, 1, 1))
    planes = panels.upright_planes(affine, shape, (1, 1, 1))
    indices = np.array([s.index for s in panels.choose_slices(np.ones(shape, bool), planes)[0]])
    assert (np.diff(sign * indices) > 0).all()


def test_oblique_angle():
    assert panels.oblique_degrees(oriented_affine((0, 1, 2), (1, 1, 1), (3, 3, 6))) == pytest.approx(0, abs=1e-5)
    tilted = oriented_affine((1, 0, 2), (1, -1, 1), (3, 3, 6), math.radians(20))
    assert panels.oblique_degrees(tilted) == pytest.approx(20)


def test_a_2d_image_has_one_plane():
    (plane,) = panels.upright_planes(np.eye(4), (20, 30, 1), (1, 1, 1))
    assert (plane.name, plane.normal) == ("axial", 2)


def test_slices_lie_in_the_mask_and_are_cropped_to_it():
    mask = np.zeros((40, 40, 40), dtype=bool)
    mask[10:20, 12:24, 25:36] = True
    planes = panels.upright_planes(np.eye(4), mask.shape, (1, 1, 1))
    for row in panels.choose_slices(mask, planes):
        assert len(row) == len(panels.SLICE_QUANTILES)
        for chosen in row:
            assert chosen.cut(mask).mean() > 0.8


def test_what_a_mask_leaves_out_is_shown_all_the_same():
    """Half of an object is in the mask, the whole of it in the picture, with slices through either half; no noise."""
    shape = (60, 60, 60)
    rng = np.random.default_rng(0)
    x, y, z = np.indices(shape) - 30
    inside = x**2 + y**2 + z**2 < 20**2
    image = np.hypot(rng.normal(0, 2, shape), rng.normal(0, 2, shape)) + 100 * inside
    mask = inside & (z < 0)
    planes = panels.upright_planes(np.eye(4), shape, (1, 1, 1))
    rows = panels.choose_slices(mask, planes, panels.foreground(image, mask))
    for slices in rows:
        for part in slices[0].box:
            assert (part.start <= 11, part.stop >= 49) == (True, True)
            assert part.stop - part.start <= 46
    axial = [s.index for s in rows[0]]
    assert min(axial) < 30 < max(axial)


@pytest.mark.parametrize("air", [0.0, math.nan])
def test_without_noise_around_it_all_that_is_not_0_is_foreground(air):
    image = np.full((20, 20, 20), air)
    image[5:15, 5:15, 5:15] = 3
    mask = np.zeros(image.shape, bool)
    mask[6:9, 6:9, 6:9] = True
    assert (panels.foreground(image, mask) == (image == 3)).all()


def test_the_silhouette_is_one_ring_without_holes_or_specks():
    y, x = np.mgrid[:80, :100]
    radius = np.hypot(x - 50, y - 40)
    mask = (radius < 30) & ~((radius > 10) & (radius < 20))  # a disc with a ring cut out
    mask[2, 2] = True
    (ring,) = panels.silhouette(mask, (1.0, 1.0))
    distance = np.hypot(ring[:, 0] * 100 - 50.5, ring[:, 1] * 80 - 40.5)
    assert distance == pytest.approx(30, abs=1.2)


def test_the_silhouette_closes_gaps():
    mask = np.zeros((100, 100), dtype=bool)
    mask[20:80, 20:49] = mask[20:80, 51:80] = True
    assert len(panels.silhouette(mask, (1.0, 1.0))) == 1


def test_an_empty_plane_has_no_silhouette():
    assert panels.silhouette(np.zeros((9, 9), dtype=bool), (1.0, 1.0)) == []


@pytest.mark.parametrize("window", [0.003, 0.02, 0.1, 0.4, 1.0, 3.0])
def test_ratio_ticks_are_symmetric_inside_the_window(window):
    ticks = mosaics.ratio_ticks(window)
    values = [v for v, _ in ticks]
    assert len(ticks) >= 3
    assert values == pytest.approx([-v for v in reversed(values)])
    assert max(values) == window  # the ends are named
    for value, text in ticks:
        assert float(text.removeprefix("×")) == pytest.approx(math.exp(value), rel=0.01)


def test_ratio_ticks_of_a_usual_window():
    assert [text for _, text in mosaics.ratio_ticks(math.log(1.5))] == ["×0.67", "×0.8", "×1", "×1.25", "×1.5"]


def draw(values, *, size_mm=(1.0, 1.0, 1.0), width=400, bar_mm=False, mask=None, scale=None, **options):
    mask = np.ones(values.shape, dtype=bool) if mask is None else mask
    planes = panels.upright_planes(np.diag([*size_mm, 1]), values.shape, size_mm)[:1]
    rows = [row[1:2] for row in panels.choose_slices(np.ones(values.shape, dtype=bool), planes)]
    cuts = [[s.cut(values) for s in row] for row in rows]
    return mosaics.mosaic(
        [mosaics.Layer("", "a title", cuts, scale or mosaics.field_scale(0.5))],
        rows,
        width=width,
        outlines=[[panels.silhouette(s.cut(mask), s.plane.size_mm) for s in row] for row in rows],
        isolines=cuts,
        bar_mm=bar_mm,
        **options,
    )


def pixels_of(drawn):
    (picture,) = drawn.pictures.values()
    return np.asarray(picture.convert("RGB")).astype(int)


def words_of(drawn):
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawn.drawing)


def test_a_mosaic_has_voxels_in_proportion():
    square = draw(np.zeros((20, 20, 9), np.float32))
    flat = draw(np.zeros((20, 10, 9), np.float32), size_mm=(1, 1, 4))
    tall = draw(np.zeros((20, 10, 9), np.float32), size_mm=(1, 2, 4))
    heights = [pixels_of(drawn).shape[0] for drawn in (square, flat, tall)]
    assert heights[2] == pytest.approx(heights[0], abs=3)
    assert heights[1] < heights[0] - 100 * mosaics.SMOOTH_DENSITY


def test_sign_and_orientation_of_a_field_are_seen():
    values = np.broadcast_to(np.linspace(-0.5, 0.5, 40)[:, None, None], (40, 40, 9))  # rises from L to R
    pixels = pixels_of(draw(values))
    row = pixels[pixels.shape[0] // 2]
    left, right = row[30], row[-30]
    assert left[2] > left[0]  # blue below ×1
    assert right[0] > right[2]  # red above


def test_a_field_beyond_its_window_has_colours_of_its_own():
    values = np.broadcast_to(np.linspace(-1, 1, 40)[:, None, None], (40, 40, 9))
    row = pixels_of(draw(values))[100]
    under, over = (np.array([int(c[n : n + 2], 16) for n in (1, 3, 5)]) for c in mosaics.field_scale(0.5).beyond)
    middle = len(row) // 2
    assert np.abs(row[20] - under).max() < 10
    assert np.abs(row[-20] - over).max() < 10
    assert np.abs(row[middle - 20 : middle + 20] - over).max(axis=1).min() > 60


@pytest.mark.filterwarnings("error")
def test_infinite_voxels_have_the_colour_of_the_brightest():
    scale = mosaics.intensity_scale(1.0)
    values = np.array([[np.finfo(np.float32).max, 2, 1], [-np.finfo(np.float32).max, -5, 0]], np.float32)
    colours = scale.colours(values)
    assert (colours[0] == colours[0, 2]).all()
    assert (colours[1] == colours[1, 2]).all()
    assert (scale.colours(np.float32([[np.nan]])) == colours[1, 2]).all()


def test_isolines_lie_where_the_field_has_their_ratio():
    values = np.broadcast_to(np.linspace(-0.1, 0.3, 40)[:, None, None], (40, 40, 9))
    drawn = draw(values, cover="hide")
    ratios = (1 / 1.2, 1 / 1.1, 1 / 1.05, 1 / 1.02, 1, 1.02, 1.05, 1.1, 1.2)
    assert mosaics.iso_levels(0.3) == pytest.approx(np.log(ratios))
    (path,) = re.findall(r'<path class="line[^>]* d="([^"]*)"', drawn.drawing)
    columns = sorted(int(x) / 10 for x in re.findall(r"M(-?\d+)", path))
    left, width = mosaics.SIDE, 400 - 2 * mosaics.SIDE

    def column(level):
        return left + width * ((level + 0.1) / 0.4 * 39 + 0.5) / 40

    # straight from bottom to top; 1 / 1.2 is below the smallest value
    levels = [level for level in mosaics.iso_levels(0.3) if level > -0.1]
    assert columns == pytest.approx([column(level) for level in levels], abs=0.2)
    assert {"×1.02", "×1.1", "×1.2", "×1"} <= set(words_of(drawn))


def test_a_flat_field_has_no_isolines():
    assert mosaics.iso_levels(0.001) == []
    drawn = draw(np.zeros((20, 20, 9), np.float32))
    assert re.search(r'<path class="line[^>]* d=""', drawn.drawing)


def test_no_word_lies_over_a_picture():
    """But for the names of isolines."""
    shape = (40, 50, 30)
    planes = panels.upright_planes(np.eye(4), shape, (1, 1, 1))
    rows = panels.choose_slices(np.ones(shape, bool), planes)
    cuts = [[s.cut(np.ones(shape, np.float32)) for s in row] for row in rows]
    for width in (mosaics.WIDE, mosaics.NARROW):
        drawn = mosaics.mosaic(
            [mosaics.Layer("", "title", cuts, mosaics.intensity_scale(2.0))], rows, width=width, bar_mm=width < 500
        )
        grey = pixels_of(drawn)[..., 0] > 64
        density = grey.shape[1] / width
        grey[round(-mosaics.BAR * density) :] = False
        words = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', drawn.drawing)
        assert {"L", "R", "P", "A", "I", "S", "title", "2", "intensity"} <= {text for *_, text in words}
        for x, y, text in words:
            # 12 px letters above their base line
            rows_, columns = (
                slice(round(density * (float(v) - a)), round(density * (float(v) + b)))
                for v, a, b in ((y, 9, 1), (x, 3, 3))
            )
            assert not grey[rows_, columns].any(), text


@pytest.mark.parametrize("bar_mm", [False, True])
@pytest.mark.parametrize("kind", ["steep", "rings"])
def test_no_word_lies_over_another(bar_mm, kind):
    """Of fields whose isolines lie close together, or along the edge."""
    shape = (40, 50, 30)
    planes = panels.upright_planes(np.eye(4), shape, (1, 1, 1), anatomical=not bar_mm)
    rows = [row[panels.FIELD_SLICES] for row in panels.choose_slices(np.ones(shape, bool), planes)]
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    field = {"steep": 1.5 * x + 0.8 * y**2 - 0.6 * z, "rings": 0.04 * (x**2 + y**2 + z**2) - 0.03}[kind]
    cuts = [[s.cut(field) for s in row] for row in rows]
    outlines = [[panels.silhouette(s.cut(np.ones(shape, bool)), s.plane.size_mm) for s in row] for row in rows]
    layer = mosaics.Layer("", "bias field", cuts, mosaics.field_scale(0.4))
    drawn = mosaics.mosaic(
        [layer], rows, width=mosaics.NARROW, outlines=outlines, cover="hide", isolines=cuts, bar_mm=bar_mm
    )
    words = []
    for x_, y_, attributes, text in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)"([^>]*)>([^<]*)<', drawn.drawing):
        width = 6.4 * len(text)
        left = float(x_) - width * (0.5 if '"middle"' in attributes else 1 if '"end"' in attributes else 0)
        words.append((text, left, left + width, float(y_) - 8, float(y_)))
    assert len(words) > 20
    for n, (text, left, right, top, bottom) in enumerate(words):
        for other, left_, right_, top_, bottom_ in words[:n]:
            assert right <= left_ or right_ <= left or bottom <= top_ or bottom_ <= top, (text, other)


def test_a_mask_is_shown_voxel_by_voxel():
    mask = np.zeros((40, 40, 9), bool)
    mask[::2, ::2] = mask[20:] = True
    planes = panels.upright_planes(np.eye(4), mask.shape, (1, 1, 1))[:1]
    rows = panels.choose_slices(np.ones(mask.shape, bool), planes)
    cuts = [[s.cut(mask) for s in row] for row in rows]
    alpha = np.asarray(mosaics.mask_picture(cuts, rows, 400))[..., 3] > 0
    drawn = mosaics.mosaic([mosaics.Layer("", "", cuts, mosaics.intensity_scale(1.0))], rows, width=400)
    shown = pixels_of(drawn)[..., 0]
    assert alpha.shape == shown.shape  # or it would lie beside it
    bar = round(mosaics.BAR * shown.shape[1] / 400)
    assert np.corrcoef(alpha[:-bar].ravel(), shown[:-bar].ravel())[0, 1] > 0.8


@pytest.mark.parametrize(
    ("most", "length", "text"),
    [
        (75.0, 50.0, "50 mm"),
        (2.9, 2.0, "2 mm"),
        (0.01, 0.01, "10 µm"),
        (0.00061, 0.0005, "500 nm"),
        (4300.0, 2000.0, "2 m"),
    ],
)
def test_scale_bars_have_round_lengths(most, length, text):
    assert mosaics.round_length(most) == pytest.approx(length)
    assert mosaics.length_text(length) == text


def test_a_scale_bar_is_as_long_as_it_says():
    drawn = draw(np.zeros((100, 80, 9), np.float32), size_mm=(0.01, 0.01, 0.01), bar_mm=True)
    (length,) = re.findall(r'class="scale" d="M[\d.]+ [\d.]+h([\d.]+)"', drawn.drawing)
    assert "200 µm" in words_of(drawn)
    assert float(length) == pytest.approx(0.2 / 1.0 * (400 - 2 * mosaics.SIDE), abs=0.1)


@pytest.mark.parametrize(
    ("order", "signs"), [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 2, 0), (-1, -1, 1))]
)
def test_pictures_stand_upright_in_mosaic_and_grid(order, signs):
    """One bright corner, at right, anterior, superior, is at the upper right of each picture."""
    shape = tuple((30, 40, 50)[axis] for axis in order)
    affine = oriented_affine(order, signs, (1, 1, 1))
    world = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) @ affine[:3, :3].T
    corner = (world > world.mean(axis=(0, 1, 2))).all(axis=-1).astype(np.float32)
    slices = [
        row[-1:] for row in panels.choose_slices(np.ones(shape, bool), panels.upright_planes(affine, shape, [1] * 3))
    ]
    cuts, scale = [[s.cut(corner) for s in row] for row in slices], mosaics.intensity_scale(1.0)
    side = mosaics.THUMBNAIL_PIXELS
    small = mosaics.thumbnail(cuts, slices, scale, [[[]] for _ in slices])[..., 0]
    drawn = [
        mosaics.mosaic([mosaics.Layer("", "", [c], scale)], [s], width=300) for c, s in zip(cuts, slices, strict=True)
    ]
    shown = [pixels_of(each)[mosaics.TOP : -mosaics.BAR - mosaics.BELOW, :, 0] for each in drawn]
    for picture in [*(small[:, n * side : (n + 1) * side] for n in range(3)), *shown]:
        rows, columns = (np.array_split(np.arange(n), 2) for n in picture.shape)
        means = [[picture[np.ix_(r, c)].mean() for c in columns] for r in rows]
        assert means[0][1] > 4 * max(means[0][0], means[1][0], means[1][1])


# ---------------------------------------------------------------- a subject's page


def make_files(folder, *, shape=(24, 28, 20), size_mm=(4.0, 4.0, 4.0), frames=1, strength=0.3, affine=None):
    """A head of three tissues, a linear field, and everything the page is made from."""
    affine = np.diag([*size_mm, 1.0]) if affine is None else affine
    axes = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    radius = np.sqrt(x**2 + y**2 + z**2)
    mask = radius < 0.9
    tissue = np.select([radius < 0.45, radius < 0.7, mask], [100.0, 65.0, 30.0], 0)
    tissue += np.random.default_rng(0).normal(0, 2, shape) * mask
    mesh = Mesh.of_grid(shape, (1, 1, 1))
    # control points one span apart: from -strength at the first voxel to strength at the last
    lattice = np.zeros(mesh.lattice_shape) + strength * np.array([-3.0, -1, 1, 3])[:, None, None]
    field = BiasField(lattice, mesh, shape, affine)
    image = tissue * field.ratio_tile((slice(None),) * 3)

    def save(name, values, copies=1):
        values = values.astype(np.float32)
        values = np.stack([values] * copies, axis=-1) if copies > 1 else values
        nib.save(nib.Nifti1Image(values[..., 0] if shape[2] == 1 and copies == 1 else values, affine), folder / name)
        return folder / name

    history = [{"Stage": 1, "Iteration": n, "CV": 0.1 / n**3} for n in range(1, 6)]
    sidecar = {
        "Sources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"],
        "SkullStripped": False,
        "N4": {
            "Parameters": {"iterations": [50], "convergence_threshold": 1e-3, "mesh": "fixed"},
            "History": history,
            "Converged": [True],
            "Dropped": {"not finite": 0, "zero": 3, "negative": 0},
            "SelfCheck": 1e-7,
            "Device": "CPU",
        },
        "Provenance": {"n4flow": "0.1.0", "Command": "snakemake --config x='<b>'"},
    }
    (folder / "sidecar.json").write_text(json.dumps(sidecar))
    (folder / "field.json").write_text(json.dumps(field.to_mapping()))
    reference = BiasField(0.9 * lattice + 0.2, mesh, shape, affine)
    (folder / "reference.json").write_text(json.dumps(reference.to_mapping()))
    (folder / "reference_sidecar.json").write_text(json.dumps({"N4": {"Agreement": AGREEMENT}}))
    return {
        "image": save("image.nii.gz", image, frames),
        "mask": save("mask.nii.gz", mask),
        "corrected": save("corrected.nii.gz", tissue, frames),
        "field": folder / "field.json",
        "sidecar": folder / "sidecar.json",
        "reference_field": folder / "reference.json",
        "reference_sidecar": folder / "reference_sidecar.json",
        "field_window_log": WINDOW,
        "page": folder / "sub-01.html",
        "metrics": folder / "sub-01.json",
        "pictures": folder / "sub-01.webp",
    }


class Elements(HTMLParser):
    """All start tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def pictures(path):
    """Those on show, or a key away, with their alt texts; of a map the one in the window of the dataset."""
    images = [i for i in Elements(path).all("img") if "src" in i and not i.get("class", "").endswith(("own", "mask"))]
    return [(i["alt"], opened(i)) for i in images]


def opened(image):
    return Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1])))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    files = make_files(tmp_path_factory.mktemp("subject"))
    make_subject(name="sub-01", **files)
    return files


def test_a_page_needs_nothing_else_and_fits(subject):
    text = subject["page"].read_text(encoding="utf-8")
    assert len(text.encode()) <= PAGE_BYTES
    assert not re.search(
        r"https?://|@import|\burl\((?!#)|\bfetch\(|XMLHttpRequest", re.sub(r"data:image[^\"]*", "", text)
    )
    page = Elements(subject["page"])
    assert all(i.get("src", "data:").startswith("data:") for i in page.all("img") + page.all("script"))
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert [a["href"] for a in page.all("a")] == ["index.html#sub-01", "index.html", "guide.html"]


def test_every_panel_is_there_with_numbers_in_its_alt_text(subject):
    shown = pictures(subject["page"])
    titles = [re.split(r"[:;]| with", alt)[0] for alt, _ in shown]
    assert titles == [
        "Original image", "Corrected image", "Bias field on the same slices", "Bias field", "Reference field",
        "Difference", "Histogram in the mask", "Profile along the field", "Convergence", "Ours against the reference",
    ]  # fmt: skip
    assert all(re.search(r"\d", alt) and picture.format == "WEBP" for alt, picture in shown)
    # or the swap would jump
    assert [p.width / p.height for _, p in shown[:3]] == pytest.approx(
        3 * [shown[0][1].width / shown[0][1].height], rel=5e-3
    )


def test_metrics_are_plain_json_and_right(subject):
    metrics = json.loads(subject["metrics"].read_text(), parse_constant=pytest.fail)
    # but for what methods.md names, all is a column
    assert [key for key, value in metrics.items() if isinstance(value, dict)] == ["parameters", "versions"]
    assert (metrics["name"], metrics["page"], metrics["shape"]) == ("sub-01", "sub-01.html", [24, 28, 20])
    mask = nib.load(subject["mask"]).get_fdata() > 0
    ratio = load_field(subject["field"]).ratio_tile((slice(None),) * 3)[mask]
    assert metrics["mask_volume_ml"] == pytest.approx(mask.sum() * 0.064)
    assert metrics["field_max"] == pytest.approx(ratio.max(), rel=1e-6)
    assert metrics["inu_med"] == pytest.approx(np.median(ratio), rel=1e-6)
    assert metrics["cjv_after"] < metrics["cjv_before"]
    assert metrics["reference_r"] == pytest.approx(1)
    assert metrics["reference_slope"] == pytest.approx(1 / 0.9, rel=1e-5)
    assert [metrics[f"agreement_{name}"] for name in ("r", "rms_log", "max_log")] == list(AGREEMENT.values())
    assert (metrics["iterations_used"], metrics["iterations_max"], metrics["dropped_voxels"]) == (5, 50, 3)
    assert metrics["field_beyond_window_fraction"] == 0
    # twice the strength of 0.3, from the first to the last of 24 voxels of 4 mm; a cube as large as the mask
    assert metrics["field_steepness"] == pytest.approx(0.6 / (23 * 4) * (mask.sum() * 64) ** (1 / 3), rel=1e-6)


def test_the_same_input_gives_the_same_page(subject, tmp_path):
    made = ("page", "metrics", "pictures")
    again = subject | {role: tmp_path / subject[role].name for role in made}
    make_subject(name="sub-01", **again)
    for role in made:
        assert again[role].read_bytes() == subject[role].read_bytes()


def test_a_page_is_measured_with_one_thread_of_blas(tmp_path, monkeypatch):
    """Last bits may hang on their number; and threads that wait for each other take CPU time of the other jobs."""
    limits = []
    measure = measuring.correction_metrics

    def noted(*given, **how):
        limits.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return measure(*given, **how)

    monkeypatch.setattr(measuring, "correction_metrics", noted)
    with threadpool_limits(2, "blas"):
        make_subject(name="sub-01", **make_files(tmp_path))
    assert set(limits) == {1}


def test_each_file_of_a_scan_is_opened_once(tmp_path, monkeypatch):
    files = make_files(tmp_path) | {"viewer": tmp_path / "v.js", "viewer_mb": 1}
    opened = []
    monkeypatch.setattr(measuring, "Volume", lambda path: opened.append(Path(path)) or Volume(path))
    monkeypatch.setattr(measuring, "open_scan", lambda path: opened.append(Path(path)) or open_scan(path))
    monkeypatch.setattr(nib, "load", pytest.fail)
    make_subject(name="sub-01", **files)
    assert sorted(opened) == sorted(files[role] for role in ("image", "mask", "corrected"))


def test_check_of_the_arithmetic_is_shown_and_flagged_where_it_fails(subject, tmp_path):
    text = " ".join(Elements(subject["page"]).text.split())
    assert "check of our arithmetic: r, rms1.0000, 2.4e-06" in text
    assert "agreement rms" not in text
    files = make_files(tmp_path)
    files["reference_sidecar"].write_text(json.dumps({"N4": {"Agreement": {"r": None, "rms": 3e-3, "max": 0.02}}}))
    make_subject(name="sub-01", **files)
    assert [f.partition(":")[0] for f in json.loads(files["metrics"].read_text())["flags"]] == ["agreement_rms"]
    assert "n/a, 0.0030" in Elements(files["page"]).text


def test_without_a_reference_its_panels_are_absent(tmp_path):
    files = make_files(tmp_path) | {"reference_field": None, "reference_sidecar": None}
    make_subject(name="sub-01", **files)
    page = Elements(files["page"])
    assert len(pictures(files["page"])) == 7
    assert "reference" not in page.text.lower()
    metrics = json.loads(files["metrics"].read_text())
    assert not [key for key in metrics if key.startswith("reference_r")]
    assert [metrics[f"agreement_{name}"] for name in ("r", "rms_log", "max_log")] == [None] * 3


def test_a_flat_field_beside_a_reference_has_a_slope_of_0_and_no_r(tmp_path, monkeypatch):
    files = make_files(tmp_path)
    field = load_field(files["field"])
    flat = BiasField(0 * field.lattice, field.mesh, field.image_shape, field.affine)
    files["field"].write_text(json.dumps(flat.to_mapping()))
    written, draw_plot = [], plots.agreement_plot
    monkeypatch.setattr(plots, "agreement_plot", lambda *given: written.append(given[2:]) or draw_plot(*given))
    make_subject(name="sub-01", **files)
    assert written == [("r n/a\nslope 0.00",)]
    assert "r n/a, slope 0.000" in Elements(files["page"]).text


def test_a_hostile_name_and_sidecar_are_harmless(tmp_path):
    files = make_files(tmp_path)
    make_subject(name=HOSTILE, **files)
    page = Elements(files["page"])
    assert len(page.all("script")) == 1  # the page's own
    assert not page.all("b") or all(not attributes for attributes in page.all("b"))
    assert HOSTILE in page.text
    assert "x='<b>'" in page.text


@pytest.mark.parametrize(("threshold", "converged"), [(1e-3, False), (0.0, None)])
def test_a_threshold_of_0_is_not_one_to_come_to(tmp_path, threshold, converged):
    files = make_files(tmp_path)
    sidecar = json.loads(files["sidecar"].read_text())
    sidecar["N4"]["Converged"] = [False]
    sidecar["N4"]["Parameters"]["convergence_threshold"] = threshold
    files["sidecar"].write_text(json.dumps(sidecar))
    make_subject(name="sub-01", **files)
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["converged"] is converged
    assert [flag.partition(":")[0] for flag in metrics["flags"]] == ["iterations_exhausted"] * (converged is False)


def test_an_empty_sidecar_will_do(tmp_path):
    files = make_files(tmp_path)
    files["sidecar"].write_text("{}")
    make_subject(name="sub-01", **files)
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["converged"] is None
    assert metrics["flags"] == []
    assert "Convergence" not in Elements(files["page"]).text


def test_field_of_another_scan_is_named_in_place_of_the_history(tmp_path):
    files = make_files(tmp_path) | {"reference_field": None, "reference_sidecar": None}
    source = "bids::sub-01/ses-a/anat/sub-01_ses-a_echo-1_desc-N4MEGRE_biasfield.json"
    run = {"FieldFrom": source, "ShareOutside": 0.75, "SelfCheck": 1e-7, "WallTimeSeconds": 0.5}
    files["sidecar"].write_text(json.dumps({"N4": run}))
    make_subject(name="sub-01", **files)
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["field_from"] == "sub-01_ses-a_echo-1_MEGRE"
    (flag,) = metrics["flags"]
    assert flag.startswith("field_outside: 75 % of the image")
    page = files["page"].read_text(encoding="utf-8")
    assert "<dt>field from</dt><dd>sub-01_ses-a_echo-1_MEGRE</dd>" in page
    assert "iterations" not in page
    assert "Convergence" not in page


def page_with_reference(folder, log_offset):
    """Alt texts and pixels (without the title) of the field panels, where the reference is ours plus a constant."""
    files = make_files(folder)
    field = load_field(files["field"]).shifted(0.1)  # so that no mean is 0
    files["field"].write_text(json.dumps(field.to_mapping()))
    files["reference_field"].write_text(json.dumps(field.shifted(log_offset).to_mapping()))
    make_subject(name="sub-01", **files)
    titles = ("Bias field", "Reference field", "Difference")
    found = {alt.split(":")[0]: (alt, np.asarray(picture).astype(int)[40:]) for alt, picture in pictures(files["page"])}
    return [found[title] for title in titles]


def coloured(pixels):
    """Share of the pixels above the colour bar that are not grey."""
    return float((np.ptp(pixels[:-60], axis=2) > 40).mean())


def test_the_reference_is_shown_in_the_window_of_the_field(tmp_path):
    (ours_alt, ours), (reference_alt, reference), _ = page_with_reference(tmp_path, 0.0)
    assert "window ×0.67 to ×1.50" in ours_alt
    assert reference_alt == ours_alt.replace("Bias field", "Reference field")
    assert coloured(ours) > 0.1
    # the same field looks the same, and so do the ticks of its colour bar; WebP may move a pixel by little
    assert np.abs(reference - ours).max() < 40


@pytest.mark.parametrize("log_offset", [0.3, -0.3])
def test_a_constant_between_ours_and_the_reference_is_no_difference(tmp_path, log_offset):
    (_, ours), (_, reference), (alt, difference) = page_with_reference(tmp_path, log_offset)
    assert np.abs(reference - ours).max() > 100
    assert "×1.0000 to ×1.0000 in the mask; window ×0.90 to ×1.11; nothing exceeds it" in alt
    assert coloured(difference) == 0


def test_a_field_beyond_the_window_is_said(tmp_path):
    files = make_files(tmp_path) | {"field_window_log": 0.1}
    make_subject(name="sub-01", **files)
    share = json.loads(files["metrics"].read_text())["field_beyond_window_fraction"]
    assert share > 0.2
    assert f"{100 * share:.2g} % of the mask exceeds it" in Elements(files["page"]).text


@pytest.mark.parametrize(
    "kind",
    [
        {"shape": (60, 50, 1), "size_mm": (1.0, 1.0, 1.0)},
        {"frames": 3},
        {"shape": (30, 30, 12), "size_mm": (3.0, 3.0, 6.0)},
        {"shape": (20, 24, 28), "affine": oriented_affine((2, 0, 1), (-1, 1, -1), (3.0, 3.0, 3.0), 0.3)},
        {"shape": (40, 40, 3)},
    ],
    ids=["2-D", "4-D", "anisotropic", "oblique", "three planes"],
)
def test_every_kind_of_image_gets_its_page(tmp_path, kind):
    files = make_files(tmp_path, **kind)
    make_subject(name="sub-01", **files)
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["frames"] == kind.get("frames", 1)
    assert metrics["reference_r"] == pytest.approx(1)
    text = Elements(files["page"]).text
    assert ("Mean of 3 frames" in text) == ("frames" in kind)
    assert ("17° off" in text) == ("affine" in kind)


def test_a_bad_correction_is_flagged_on_the_page(tmp_path):
    files = make_files(tmp_path)
    files["corrected"], files["image"] = files["image"], files["corrected"]
    make_subject(name="sub-01", **files)
    flags = json.loads(files["metrics"].read_text())["flags"]
    assert {"cjv_worse", "entropy_worse"} <= {flag.split(":")[0] for flag in flags}
    text = Elements(files["page"]).text
    assert "cjv worse" in text
    assert f"▲ {len(flags)} flag" in text


def test_another_grid_is_refused_and_nothing_is_written(tmp_path):
    files = make_files(tmp_path)
    image = nib.load(files["corrected"])
    nib.save(nib.Nifti1Image(image.get_fdata()[:-1].astype(np.float32), image.affine), files["corrected"])
    with pytest.raises(InputError, match="corrected"):
        make_subject(name="sub-01", **files)
    assert not files["page"].exists()
    assert not files["metrics"].exists()


def test_an_empty_mask_is_refused(tmp_path):
    files = make_files(tmp_path)
    image = nib.load(files["mask"])
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), files["mask"])
    with pytest.raises(InputError, match="empty"):
        make_subject(name="sub-01", **files)


def make_microscopy_files(folder):
    """A mosaic of four tiles that differ by 8 and 10 %, brighter from section to section, 300 voxels saturated."""
    files = make_files(folder, shape=(30, 40, 20), size_mm=(0.01, 0.01, 0.01))
    affine = nib.load(files["mask"]).affine
    mask = np.zeros((30, 40, 20), dtype=bool)
    mask[2:-2, 2:-2] = True
    truth = 1000 + 20.0 * (np.indices(mask.shape)[:2].sum(axis=0) % 2)
    truth[:, 25:] *= 1.1
    truth[15:] *= 1.08
    image = truth * np.linspace(0.8, 1.2, 20)
    image[10:20, 10:20, 5:8] = 65535
    for role, values in (("image", image.round().astype(np.uint16)), ("corrected", truth.astype(np.float32))):
        nib.save(nib.Nifti1Image(values, affine), files[role])
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), files["mask"])
    return files, mask


@pytest.fixture(scope="module")
def mosaic(tmp_path_factory):
    files, mask = make_microscopy_files(tmp_path_factory.mktemp("mosaic"))
    make_subject(name="sub-01_sample-a_SPIM", **files)
    return files, mask


def test_microscopy_has_its_own_metrics(mosaic):
    files, mask = mosaic
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["datatype"] == "micr"
    assert not [key for key in metrics if key.startswith(("cjv", "cv_bright", "class_"))]
    assert metrics["saturated_fraction"] == pytest.approx(300 / mask.sum())
    assert metrics["seam_place_after"] == "j 24 to 25"
    # a step of the checkered ground is 2 % up beside two of 2 % down
    assert metrics["seam_ratio_after"] == pytest.approx(math.log(1.1) / (2 * math.log(1.02)), rel=1e-3)
    assert metrics["seam_both_after"] == pytest.approx(math.log(1.08) / (2 * math.log(1.02)), rel=1e-3)
    assert metrics["section_spread_after"] == pytest.approx(0, abs=1e-6)
    assert metrics["section_spread_before"] > 0.4
    assert metrics["foreground_cv_after"] < metrics["foreground_cv_before"]
    assert {"saturation", "seams"} <= {flag.split(":")[0] for flag in metrics["flags"]}


def test_the_saturation_of_scaled_integers_is_found(tmp_path):
    files, mask = make_microscopy_files(tmp_path)
    image = nib.load(files["image"])
    scaled = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    scaled.header.set_slope_inter(0.013, 5)
    nib.save(scaled, files["image"])
    make_subject(name="sub-01_SPIM", **files)
    assert json.loads(files["metrics"].read_text())["saturated_fraction"] == pytest.approx(300 / mask.sum())


def test_the_page_of_microscopy_shows_no_classes(mosaic):
    files, _ = mosaic
    text = Elements(files["page"]).text
    assert "CJV" not in text
    assert "class" not in text.replace("intensity classes", "") or "CJV" not in text
    for words in (
        "foreground CV",
        "spread of the section means",
        "tile-seam ratio",
        "along both axes",
        "j 24 to 25",
        "saturated voxels",
    ):
        assert words in text
    alts = [alt for alt, _ in pictures(files["page"])]
    assert "Foreground CV" in alts[0]
    (profile,) = [alt for alt in alts if alt.startswith("Profile")]
    assert profile.startswith("Profile along the field: mean of the foreground by plane, along i")


def test_a_2d_microscopy_image_gets_its_page(tmp_path):
    files = make_files(tmp_path, shape=(160, 150, 1), size_mm=(0.001, 0.001, 0.001))
    make_subject(name="sub-01_BF", **files)
    metrics = json.loads(files["metrics"].read_text())
    assert metrics["section_spread_after"] is None
    assert metrics["seam_ratio_after"] > 1
    assert len([alt for alt, _ in pictures(files["page"]) if alt.startswith("Profile")]) == 1
    assert "n/a" in Elements(files["page"]).text


def test_microscopy_and_mri_share_a_table(subject, mosaic, tmp_path):
    make_index([subject["metrics"], mosaic[0]["metrics"]], tmp_path / "index.html", tmp_path / "metrics.tsv")
    with open(tmp_path / "metrics.tsv", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    mri, microscopy = rows["sub-01"], rows["sub-01_sample-a_SPIM"]
    assert (mri["foreground_cv_after"], mri["seam_ratio_after"], microscopy["cjv_after"]) == ("n/a", "n/a", "n/a")
    assert float(mri["cjv_after"]) > 0
    assert float(microscopy["seam_ratio_after"]) > 2
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    table = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    column = 7 + [column["heading"] for column in table["columns"]].index("mask (ml)")
    shown = {row[0]: row[column] for row in table["rows"]}
    assert shown["sub-01_sample-a_SPIM"] == pytest.approx(26 * 36 * 20 * 1e-9, rel=0.05)  # not rounded to 0


# ---------------------------------------------------------------- what the other pages take of a scan


def test_the_grid_has_a_row_of_planes_for_each_panel(subject):
    metrics = json.loads(subject["metrics"].read_text())
    assert metrics["panels"] == ["original", "corrected", "bias field", "reference field", "difference"]
    sheet = np.asarray(Image.open(subject["pictures"]).convert("RGB")).astype(int)
    side = mosaics.THUMBNAIL_PIXELS
    assert sheet.shape == (5 * side, 3 * side, 3)
    field = sheet[2 * side : 3 * side, :side]  # the field rises from L to R
    assert field[side // 2, side // 4, 2] > field[side // 2, side // 4, 0] + 20
    assert field[side // 2, 3 * side // 4, 0] > field[side // 2, 3 * side // 4, 2] + 20
    original, corrected = sheet[:side], sheet[side : 2 * side]
    for picture, apart in ((original, True), (corrected, False)):
        left, right = (picture[side // 2 - 5 : side // 2 + 5, x - 5 : x + 5].mean() for x in (60, 100))
        assert (right - left > 20) == apart


def test_the_hash_follows_the_correction_alone(subject, tmp_path):
    first = json.loads(subject["metrics"].read_text())["report_hash"]
    assert re.fullmatch("[0-9a-f]{12}", first)

    def hash_with(folder, **changes):
        folder.mkdir()
        files = make_files(folder) | changes
        make_subject(name="sub-01", **files)
        return json.loads(files["metrics"].read_text())["report_hash"]

    assert hash_with(tmp_path / "window", field_window_log=0.1, reference_field=None, reference_sidecar=None) == first
    values = nib.load(subject["corrected"])
    changed = values.get_fdata()
    changed[12, 14, 10] += 1
    nib.save(nib.Nifti1Image(changed.astype(np.float32), values.affine), tmp_path / "changed.nii.gz")
    assert hash_with(tmp_path / "value", corrected=tmp_path / "changed.nii.gz") != first


def viewer_content(path):
    text = path.read_text(encoding="ascii")
    assert text.startswith("showVolumes(")
    assert text.endswith(");\n")
    content = json.loads(text[len("showVolumes(") : -3])
    content["mask"] = np.frombuffer(zlib.decompress(base64.b64decode(content["mask"])), np.uint8)
    n0, n1, n2 = content["shape"]
    slices = []
    for sheet in content["sheets"]:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))).convert("L"))
        rows = pixels.reshape(pixels.shape[0] // n1, n1, -1, n0)  # row of slices, second axis, slice, first axis
        slices += list(rows.transpose(0, 2, 3, 1).reshape(-1, n0, n1))
    content["volume"] = np.stack(slices[:n2], axis=-1)
    return content


def test_the_viewer_gets_the_corrected_image_and_the_field_that_makes_the_original_of_it(tmp_path):
    files = make_files(tmp_path) | {"viewer": tmp_path / "sub-01.js", "viewer_mb": 1}
    make_subject(name="sub-01", **files)
    content = viewer_content(files["viewer"])
    assert (content["shape"], content["steps"], content["sizeMm"]) == ([24, 28, 20], [1, 1, 1], [4.0, 4.0, 4.0])
    most = json.loads(files["metrics"].read_text())["display_max"]
    assert content["top"] == pytest.approx(viewer.HEADROOM * most)
    values = nib.load(files["corrected"]).get_fdata().clip(0, content["top"])
    error = content["volume"] / 255 * content["top"] - values
    assert np.sqrt(np.mean(error**2)) < 0.02 * most  # of noise, which compresses worst
    assert abs(error.mean()) < 0.005 * most
    mask = np.unpackbits(content["mask"])[: 24 * 28 * 20]
    assert (mask == (nib.load(files["mask"]).get_fdata().ravel(order="F") > 0)).all()
    assert [field["title"] for field in content["fields"]] == ["bias field", "reference field"]
    assert content["fields"][0]["lattice"] == pytest.approx(load_field(files["field"]).lattice.ravel())
    assert "data-viewer" in files["page"].read_text()


def viewer_text(grid, volume, fields, limit_mb=1.0):
    return viewer.viewer_script(
        grid, volume, volume > 128, fields, display_max=255.0, steep_from=0.5, field_window_log=0.4, anatomical=True,
        limit_bytes=1e6 * limit_mb,
    )  # fmt: skip


@pytest.mark.parametrize(("limit_mb", "spans"), [(0.03, 1), (0.09, 8), (1.0, 1), (1.0, 8)])
def test_the_viewer_keeps_to_its_cap(tmp_path, limit_mb, spans):
    rng = np.random.default_rng(1)
    shape = (41, 33, 27)
    noise = rng.integers(0, 256, shape).astype(np.uint8)  # does not compress
    nib.save(nib.Nifti1Image(noise, np.diag([1.0, 1, 2, 1])), tmp_path / "noise.nii")
    mesh = Mesh.of_grid(shape, (spans, spans, spans))
    field = BiasField(-1e-3 * rng.random(mesh.lattice_shape), mesh, shape, np.eye(4))
    text = viewer_text(Volume(tmp_path / "noise.nii"), noise, {"bias field": field, "reference field": field}, limit_mb)
    assert len(text) <= 1e6 * limit_mb
    steps = json.loads(text[len("showVolumes(") : -3])["steps"]
    assert (steps == [1, 1, 1]) == (limit_mb == 1)
    assert steps[2] <= steps[0]  # the thickest axis is coarsened last


def test_slices_that_do_not_fit_a_picture_go_on_in_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "SHEET_SIDE", 64)
    monkeypatch.setattr(viewer, "SHEET_PIXELS", 64 * 64)
    shape = (20, 30, 17)  # 3 slices in a row, 2 rows
    volume = np.indices(shape)[2].astype(np.float32) * 10
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii")
    mesh = Mesh.of_grid(shape, (1, 1, 1))
    field = BiasField(np.zeros((4, 4, 4)), mesh, shape, np.eye(4))
    (tmp_path / "v.js").write_text(viewer_text(Volume(tmp_path / "v.nii"), volume, {"bias field": field}))
    content = viewer_content(tmp_path / "v.js")
    assert (len(content["sheets"]), content["columns"]) == (3, 3)
    found = content["volume"].mean(axis=(0, 1)) / 255 * content["top"]
    assert found == pytest.approx(10.0 * np.arange(17), abs=3)


@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 4)] * 3))
def test_shrinking_takes_means_over_blocks(shape, steps):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    small = viewer.shrink(values, steps)
    for index in np.ndindex(small.shape):
        block = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, steps, strict=True))
        assert small[index] == pytest.approx(values[block].mean(), abs=1e-5)


def test_without_the_viewer_its_button_is_absent(subject):
    assert not [b for b in Elements(subject["page"]).all("button") if b.get("data-key") == "v"]


# ---------------------------------------------------------------- the dataset


def test_stored_ratings_reach_the_index(tmp_path):
    paths = write_metrics(tmp_path, [{"name": "sub-01_ses-a_run-1_T1w", "report_hash": "0" * 12}])
    table = tmp_path / "ratings.tsv"
    header = "participant_id\tsession\tmodality\trater\trating\tcomment\n"
    table.write_text(header + "sub-01\tses-a\trun-1_T1w\tann\tfail\t</script><b>\n")
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv", ratings=table)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    (rating,) = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])["ratings"]
    assert (rating["scan"], rating["rater"], rating["rating"]) == ("sub-01_ses-a_run-1_T1w", "ann", "fail")
    assert rating["comment"] == "</script><b>"


def write_metrics(folder, subjects):
    """Metrics files in data/, whose pages lie one folder up."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    paths = []
    for number, values in enumerate(subjects):
        path = folder / "data" / f"{number}.json"
        path.write_text(json.dumps({"page": f"../{number}.html", "flags": [], **values}))
        paths.append(path)
    return paths


def index_data(path):
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def index_rows(path):
    return index_data(path)["rows"]


def index_headings(path):
    return [column["heading"] for column in index_data(path)["columns"] if column["shown"]]


def test_links_lead_to_the_pages(tmp_path):
    files = make_files(tmp_path)
    places = {"page": "a b#%.html", "metrics": "data/sub-01.json", "pictures": "data/a?b.webp"}
    for role, place in places.items():
        files[role] = tmp_path / "qc" / place
        files[role].parent.mkdir(parents=True, exist_ok=True)
    make_subject(name="sub-01", **files)
    make_index([files["metrics"]], tmp_path / "qc" / "index.html", tmp_path / "qc" / "metrics.tsv")
    ((_, link, _, _, _, picture, *_),) = index_rows(tmp_path / "qc" / "index.html")
    assert (tmp_path / "qc" / unquote(link)).samefile(files["page"])
    assert (tmp_path / "qc" / unquote(picture)).samefile(files["pictures"])


def test_the_worst_by_robust_z_comes_first(tmp_path):
    cjv = [0.50, 0.52, 0.9, 0.51, 0.49, 0.53, 0.1]
    paths = write_metrics(tmp_path, [{"name": f"sub-{n}_T1w", "cjv_after": value} for n, value in enumerate(cjv)])
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv")
    rows = index_rows(tmp_path / "index.html")
    assert rows[0][0] == "sub-2_T1w"
    (flag,) = rows[0][2]
    assert flag == (
        "outlier: CJV after 0.900 (median 0.510, robust z 13.2); limit 3.5, look at it beside other T1w scans"
    )
    assert rows[0][3] == pytest.approx(0.6745 * 0.39 / 0.02, abs=0.01)
    # a low CJV is no fault
    assert [row[2] for row in rows[1:]] == [[]] * 6


def test_an_outlier_says_every_metric_beyond_the_limit_the_worst_first(tmp_path):
    subjects = [{"name": f"sub-{n}_T1w", "cjv_after": 0.5 + n / 100, "field_min": 0.8 + n / 100} for n in range(6)]
    subjects.append({"name": "sub-odd_T1w", "cjv_after": 0.9, "field_min": 0.1})
    paths = write_metrics(tmp_path, subjects)
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv", outlier_z=5)
    (flag,) = index_rows(tmp_path / "index.html")[0][2]
    assert re.search(r"field min \(ratio\) 0.100 .*, CJV after 0.900 .*limit 5", flag)
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv", outlier_z=100)
    assert index_rows(tmp_path / "index.html")[0][2] == []


def test_a_scan_is_an_outlier_among_those_of_its_suffix_alone(tmp_path):
    usual = [0.50, 0.52, 0.51, 0.49, 0.53]
    cjv = {f"sub-{n}_T1w": value for n, value in enumerate(usual * 3)}
    cjv |= {f"sub-{n}_task-rest_bold": 3 * value for n, value in enumerate(usual)} | {"sub-odd_bold": 0.9 * 3}
    cjv |= {"sub-0_FLAIR": 9.0, "sub-1_FLAIR": 9.5}
    flags = {"sub-1_FLAIR": ["cjv_worse: rose"]}
    paths = write_metrics(tmp_path, [{"name": n, "cjv_after": c, "flags": flags.get(n, [])} for n, c in cjv.items()])
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv")
    rows = index_rows(tmp_path / "index.html")
    # two of a suffix cannot be ranked, so their flags bring them to the top
    assert [row[0] for row in rows[:2]] == ["sub-1_FLAIR", "sub-odd_bold"]
    assert [row[3] for row in rows if row[0].endswith("FLAIR")] == [None, None]
    assert [row[0] for row in rows if row[2]] == ["sub-1_FLAIR", "sub-odd_bold"]
    assert "look at it beside other bold scans" in rows[1][2][0]


def test_an_outlier_has_a_size_that_matters(tmp_path):
    """0.03 % of saturated voxels beside nearly none had z = 316."""
    tiny = [{"name": f"sub-{n}_T1w", "saturated_fraction": 1e-6 * n, "mask_volume_ml": 1500 + n} for n in range(8)]
    tiny += [{"name": "sub-x_T1w", "saturated_fraction": 3e-4, "mask_volume_ml": 1600}]
    make_index(write_metrics(tmp_path, tiny), tmp_path / "index.html", tmp_path / "metrics.tsv")
    assert [row[2] for row in index_rows(tmp_path / "index.html")] == [[]] * 9
    tiny[-1] |= {"saturated_fraction": 6e-3}
    tiny[0] |= {"mask_volume_ml": 900}
    tiny[1] |= {"mask_volume_ml": 2100}  # either side is odd
    make_index(write_metrics(tmp_path, tiny), tmp_path / "index.html", tmp_path / "metrics.tsv")
    flagged = {row[0]: row[2][0] for row in index_rows(tmp_path / "index.html") if row[2]}
    assert {name: flag.partition(" (median")[0] for name, flag in flagged.items()} == {
        "sub-0_T1w": "outlier: mask (ml) 900",
        "sub-1_T1w": "outlier: mask (ml) 2,100",
        "sub-x_T1w": "outlier: saturated 0.0060",
    }


def test_whatever_can_be_an_outlier_has_a_size_that_matters():
    ranked = {key for key, _, _, worse in COLUMNS if worse}
    assert ranked <= {*FLOORS, *FLOOR_SHARES}
    assert all(floor > 0 for floor in (FLOORS | FLOOR_SHARES).values())


def test_scans_are_grouped_by_sheet_and_name(tmp_path):
    names = ["sub-1_ses-a_acq-fast_T1w", "sub-1_ses-b_T1w", "sub-2_ses-a_FLAIR"]
    paths = write_metrics(tmp_path, [{"name": name} for name in names])
    sheet = {names[0]: {"site": "B", "scanner": "x"}, names[2]: {"site": "A", "scanner": "x", "session": "late"}}
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv", groups=sheet)
    data = index_data(tmp_path / "index.html")
    order = [row[0] for row in data["rows"]]
    found = {g["name"]: dict(zip(order, (g["values"][n] for n in g["of"]), strict=True)) for g in data["groups"]}
    assert found == {
        "suffix": dict(zip(names, ("T1w", "T1w", "FLAIR"), strict=True)),
        "session": dict(zip(names, ("a", "b", "late"), strict=True)),  # the sheet's word counts
        "acquisition": dict(zip(names, ("fast", "", ""), strict=True)),
        "site": dict(zip(names, ("B", "", "A"), strict=True)),
        "scanner": dict(zip(names, ("x", "", "x"), strict=True)),
    }


def test_flags_with_a_limit_come_before_outliers(tmp_path):
    cjv = [0.50, 0.52, 0.9, 0.51, 0.49, 0.53, 0.6]
    scans = [{"name": f"sub-{n}_T1w", "cjv_after": value} for n, value in enumerate(cjv)]
    scans[4]["flags"] = ["cjv_worse: rose"]
    scans[0]["flags"] = ["field_flat: little"]
    make_index(write_metrics(tmp_path, scans), tmp_path / "index.html", tmp_path / "metrics.tsv")
    rows = index_rows(tmp_path / "index.html")
    assert [row[0] for row in rows[:4]] == ["sub-0_T1w", "sub-4_T1w", "sub-2_T1w", "sub-6_T1w"]
    text = (tmp_path / "outliers.js").read_text(encoding="utf-8")
    found = json.loads(text.removeprefix("showOutliers(").removesuffix(");\n"))
    assert found == {"sub-2_T1w": rows[2][2][0]}


def test_every_metric_of_the_table_is_defined_once():
    assert sorted(key for definition in DEFINITIONS for key in definition.keys) == sorted(key for key, *_ in COLUMNS)


def test_multiqc_gets_the_same_numbers_under_a_header_that_yaml_reads(tmp_path):
    subjects = [
        {"name": "tab\t<here>", "cjv_after": 0.5, "inu_range": 0.2, "flags": ["x: y", "z: w"]},
        {"name": "sub-02_T1w", "cjv_after": None, "inu_range": 0.1},
    ]
    make_index(write_metrics(tmp_path, subjects), tmp_path / "index.html", tmp_path / "metrics.tsv")
    lines = (tmp_path / "metrics_mqc.tsv").read_text(encoding="utf-8").splitlines()
    header = yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines if line.startswith("#")))
    rows = list(csv.DictReader((n for n in lines if not n.startswith("#")), delimiter="\t", quoting=csv.QUOTE_NONE))
    assert (header["plot_type"], list(header["headers"])) == ("table", list(rows[0])[1:])
    assert [row["Sample"] for row in rows] == ["tab &lt;here&gt;", "sub-02_T1w"]
    cells = [[row[key] for key in ("cjv_after", "n_flags", "flags")] for row in rows]
    assert cells == [["0.5", "2", "x z"], ["", "0", ""]]
    assert "P95(b)" in header["headers"]["inu_range"]["description"]


def test_what_is_the_same_in_all_scans_is_said_once(tmp_path):
    same = {"saturated_fraction": 0.0, "inu_range": 0.1, "field_from": "sub-01_T1w"}
    subjects = [same | {"name": f"sub-{n}", "cjv_after": 0.5 + n / 10} for n in range(3)]
    subjects[1]["inu_range"] = 0.1004  # reads 0.100, too
    subjects[2]["reference_r"] = 0.99  # the others have none
    paths = write_metrics(tmp_path, subjects)
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv")
    assert index_headings(tmp_path / "index.html") == ["CJV after", "r to reference"]
    said = "The same in all scans: saturated 0.0000, inu_range 0.100, field from sub-01_T1w."
    assert said in Elements(tmp_path / "index.html").text
    assert "saturated_fraction" in (tmp_path / "metrics.tsv").read_text()
    make_index(paths[:1], tmp_path / "index.html", tmp_path / "metrics.tsv")  # nothing to be the same as
    assert "saturated" in index_headings(tmp_path / "index.html")


def test_flags_come_first_among_few_subjects(tmp_path):
    subjects = [{"name": "a"}, {"name": "b", "flags": ["cjv_worse: rose"]}, {"name": "c", "cjv_after": 99.0}]
    make_index(write_metrics(tmp_path, subjects), tmp_path / "index.html", tmp_path / "metrics.tsv")
    assert [row[0] for row in index_rows(tmp_path / "index.html")] == ["b", "a", "c"]


def test_the_table_has_one_row_per_subject(tmp_path):
    subjects = [
        {"name": "tab\there", "cjv_after": 0.5, "flags": ["x: y", "z: w"]},
        {"name": 'quote"', "cjv_after": None},
    ]
    make_index(write_metrics(tmp_path, subjects), tmp_path / "index.html", tmp_path / "metrics.tsv")
    with open(tmp_path / "metrics.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert [row["name"] for row in rows] == ["tab here", 'quote"']
    assert [row["cjv_after"] for row in rows] == ["0.5", "n/a"]
    assert [row["flags"] for row in rows] == ["x: y; z: w", "n/a"]


def test_failed_and_hostile_subjects_are_listed_harmlessly(tmp_path):
    paths = write_metrics(tmp_path, [{"name": HOSTILE}])
    failed = [Failure(HOSTILE + "2", "mask", "image.nii: <b>broken</b>; copy it again", "", again=True)]
    make_index(paths, tmp_path / "index.html", tmp_path / "metrics.tsv", failed)
    page = Elements(tmp_path / "index.html")
    assert len(page.all("script")) == 2  # the data and the code
    assert not page.all("b")
    assert HOSTILE + "2" in page.text
    assert "<b>broken</b>; copy it again" in page.text
    assert index_rows(tmp_path / "index.html")[0][0] == HOSTILE


def test_no_subject_at_all_still_makes_an_index(tmp_path):
    failed = [Failure("sub-01", "mask", "broken", "", again=True)]
    make_index([], tmp_path / "index.html", tmp_path / "metrics.tsv", failed)
    assert "1 failed" in Elements(tmp_path / "index.html").text
    assert (tmp_path / "metrics.tsv").read_text().startswith("name\t")


def test_failed_scans_stand_in_page_and_table_with_a_copy_of_their_log(tmp_path):
    log = tmp_path / "logs" / "sub-02.log"
    log.parent.mkdir()
    log.write_text("n4flow: broken\n")
    log.with_name("killed.log").touch()
    failed = [
        Failure("sub-02", "n4", "broken", str(log), again=True),
        Failure("sub-01", "reference", "itk", "gone.log", again=True),
        Failure("sub-03", "n4", "killed", str(log.with_name("killed.log")), again=False),
    ]
    page, table = tmp_path / "qc" / "index.html", tmp_path / "qc" / "metrics.tsv"
    paths = write_metrics(tmp_path, [{"name": "sub-01"}])
    make_index(paths, page, table, failed)
    links = [a["href"] for a in Elements(page).all("a") if a["href"].endswith(".log")]
    copies = [(page.parent / link).read_text() for link in links]
    assert copies == ["n4flow: broken\n", "n4flow: itk\n", "n4flow: killed\n"]
    with open(table, encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    assert set(rows["sub-02"].values()) == {"sub-02", "n/a", "n4 failed: broken; log: data/sub-02.log"}
    assert rows["sub-01"]["flags"] == "n/a", "it is done but for its reference"
    make_index(paths, page, table)
    assert list(page.parent.rglob("*.log")) == [], "of those that fail no longer"


def test_a_large_dataset_stays_lean(tmp_path):
    rng = np.random.default_rng(0)
    subjects = [
        {"name": f"sub-{n:04d}", "cjv_before": c, "cjv_after": c - 0.1, "inu_range": 0.1, "reference_r": 0.9871234567}
        for n, c in enumerate(rng.normal(0.6, 0.05, 1000))
    ]
    make_index(write_metrics(tmp_path, subjects), tmp_path / "index.html", tmp_path / "metrics.tsv")
    assert (tmp_path / "index.html").stat().st_size < 200_000


def test_figures_over_all_scans(subject, tmp_path):
    values = json.loads(subject["metrics"].read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.webp").write_bytes(subject["pictures"].read_bytes())
    scans = [
        values | {"name": f"sub-{n}", "cjv_after": 0.5, "pictures": "a.webp", "field_from": "sub-0"} for n in range(15)
    ]
    del scans[3]["pictures"], scans[3]["cjv_after"]
    paths = write_metrics(tmp_path, scans)
    figures.make_figures(paths, tmp_path / "d.png", tmp_path / "w.png")
    with Image.open(tmp_path / "w.png") as picture:
        sheet = np.asarray(picture.convert("L"))
    rows = sheet[figures.HEAD :].reshape(figures.WORST, -1, sheet.shape[1])
    assert rows.shape[1:] == (mosaics.THUMBNAIL_PIXELS + 22, 9 * mosaics.THUMBNAIL_PIXELS)
    assert (rows[:, 30:].min(axis=(1, 2)) == 255).sum() <= 1  # one has no pictures
    with Image.open(tmp_path / "d.png") as distributions:
        assert distributions.width == 1200
    failed = [Failure(f"sub-{n}", "mask", "broken", "", again=True) for n in range(40)]
    with Image.open(tmp_path / "d.png") as before:
        without = np.asarray(before.convert("L")).copy()
    figures.make_figures(paths, tmp_path / "d.png", tmp_path / "w.png", failed)
    with Image.open(tmp_path / "w.png") as picture:
        below = np.asarray(picture.convert("L"))[len(sheet) :]
    assert len(below) >= 22
    assert below.min() < 100, "names stand there"
    with Image.open(tmp_path / "d.png") as distributions:
        assert not np.array_equal(np.asarray(distributions.convert("L")), without)
    figures.make_figures([], tmp_path / "d.png", tmp_path / "w.png", failed)


def test_a_scan_takes_half_a_megabyte_without_the_viewer(subject):
    assert sum(subject[role].stat().st_size for role in ("page", "metrics", "pictures")) <= 500_000
