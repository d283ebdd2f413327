"""A family of phantoms with known fields: what accuracy is tuned on and, apart from that, reported on.

One anatomy, the MNI152 tissue maps, with many draws of field, noise, mask and lesions: at 2 mm the maps that ship with
the workflow, at 1 mm those of the test data.
"""

import zlib
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from n4flow.mask import otsu_threshold
from n4flow.parameters import PRESETS, N4Parameters
from n4flow.phantom import T1_LIKE, head_tissues, inu_field, load_tissues

TISSUES_2MM = Path(__file__).parents[1] / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz.base64"

CONTRASTS = {
    "T1": T1_LIKE,
    "T2": {"gm": 700.0, "wm": 520.0, "csf": 1000.0, "skull": 100.0, "scalp": 450.0},
    "PD": {"gm": 1000.0, "wm": 850.0, "csf": 1050.0, "skull": 150.0, "scalp": 900.0},
}
FIELDS = ("legendre", "linear", "coil", "surface")
NOISE = (0, 3, 6, 9)
MASKS = ("brain", "head", "eroded", "dilated", "leaking")


@dataclass(frozen=True)
class Case:
    """One simulated scan."""

    number: int
    voxel_size_mm: int
    contrast: str
    field: str
    inu_percent: int
    noise_percent: int
    mask: str
    lesions: bool
    tuned_on: bool  # whether defaults may be chosen by it; the table reports on the others alone


@dataclass(frozen=True, eq=False)
class Scan:
    """A case as arrays, all on one grid."""

    image: np.ndarray  # float32
    mask: np.ndarray  # bool: what the correction is given
    brain: np.ndarray  # bool: where the error is measured
    gm: np.ndarray  # bool: nothing but grey matter
    wm: np.ndarray  # bool: nothing but white matter
    log_bias: np.ndarray  # the truth, mean 0 in the brain


def family(voxel_sizes_mm=(1, 2)):
    """All cases at these voxel sizes: every contrast, field, strength and noise with every other.

    Mask, voxel size, lesions, and which half a case belongs to, are drawn by lot, so that none of them goes with
    another. One case in four has voxels of 1 mm.
    """
    without_field = [(0, "legendre", noise, draw) for noise in NOISE for draw in range(2)]
    with_field = [(inu, field, noise, 0) for inu in (20, 40, 100) for field in FIELDS for noise in NOISE]
    cases = []
    for contrast in CONTRASTS:
        for inu_percent, field, noise_percent, draw in without_field + with_field:
            lot = np.random.default_rng(zlib.crc32(repr((contrast, inu_percent, field, noise_percent, draw)).encode()))
            mask, size, lesions, half = (
                lot.choice(MASKS),
                lot.choice((1, 2, 2, 2)),
                lot.integers(5) == 0,
                lot.integers(2),
            )
            details = (int(size), contrast, field, inu_percent, noise_percent, str(mask), bool(lesions), bool(half))
            cases.append(Case(len(cases), *details))
    return [case for case in cases if case.voxel_size_mm in voxel_sizes_mm]


def make_scan(case, mni152=None):
    """Simulate a case.

    Parameters
    ----------
    case : Case
    mni152 : Path, optional
        Folder of the 1 mm maps; needed for cases of 1 mm.
    """
    shares = _shares(case.voxel_size_mm, mni152)
    intensity = CONTRASTS[case.contrast]
    # what is reported on is drawn anew with every change of a setting, so that none was chosen by it
    settings = "" if case.tuned_on else repr((N4Parameters(), PRESETS))
    rng = np.random.default_rng(zlib.crc32((repr(astuple(case)) + settings).encode()))
    truth = sum(intensity[name] * share for name, share in shares.items())
    brain = shares["gm"] + shares["wm"] > 0.5
    if case.lesions:
        _add_lesions(truth, shares["wm"], 0.85 * intensity["gm"], case.voxel_size_mm, rng)
    log_bias = log_bias_field(case.field, case.inu_percent, brain, rng)
    sigma = case.noise_percent / 100 * max(intensity["gm"], intensity["wm"])
    real, imaginary = sigma * rng.standard_normal((2, *brain.shape))
    image = np.hypot(truth * np.exp(log_bias) + real, imaginary).astype(np.float32)
    pure = (shares[name] > 0.9 for name in ("gm", "wm"))
    return Scan(image, _mask(case, image, brain, shares), brain, *pure, log_bias)


def log_bias_field(kind, inu_percent, inside, rng):
    """A log bias field of one of `FIELDS`, scaled as `inu_field` scales: by its range inside, its mean 0 there."""
    if kind == "legendre":
        return np.log(inu_field(inside.shape, inside, inu_percent, rng))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in inside.shape), indexing="ij", sparse=True)
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    if kind == "linear":
        shape = direction[0] * x + direction[1] * y + direction[2] * z
    elif kind == "surface":  # one coil at one side, sensitivity falling with the square of the distance
        cx, cy, cz = 1.5 * direction
        shape = -np.log((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 + 0.2)
    else:  # an array around the head: root of the sum of squares of 1/r
        squares = 0
        for angle in np.arange(8) * np.pi / 4 + rng.uniform(0, 0.5, 8):
            cx, cy, cz = 1.6 * np.cos(angle), 1.6 * np.sin(angle), 1.6 * rng.uniform(-0.6, 0.6)
            squares = squares + rng.uniform(0.7, 1.3) / ((x - cx) ** 2 + (y - cy) ** 2 + (z - cz) ** 2 + 0.15)
        shape = np.log(squares) / 2
    span = np.log((1 + inu_percent / 200) / (1 - inu_percent / 200))
    log_bias = span * (shape - shape[inside].min()) / np.ptp(shape[inside])
    return log_bias - log_bias[inside].mean()


@cache
def _shares(voxel_size_mm, mni152):
    if voxel_size_mm == 2:
        return head_tissues(np.asarray(load_tissues(TISSUES_2MM).dataobj), 2.0)
    gm, wm, t1 = (np.asarray(nib.load(mni152 / f"{name}.nii.gz").dataobj).astype(float) for name in ("gm", "wm", "t1"))
    csf = np.clip(255 * (t1 > 0) - gm - wm, 0, 255)
    return head_tissues(np.stack([gm, wm, csf], axis=-1).astype(np.uint8), 1.0)


def _add_lesions(truth, wm, intensity, voxel_size_mm, rng):
    """Replace 25 balls of 2 to 8 mm radius in the white matter."""
    places = np.argwhere(wm > 0.95)
    for centre in places[rng.integers(len(places), size=25)]:
        radius = rng.uniform(2, 8) / voxel_size_mm
        box = tuple(slice(max(0, int(c - radius)), int(c + radius) + 1) for c in centre)
        grid = np.ogrid[box]
        ball = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
        truth[box] = np.where(ball, intensity, truth[box])


def _mask(case, image, brain, shares):
    def grown(millimetres):
        filter_ = sitk.BinaryDilate if millimetres > 0 else sitk.BinaryErode
        radius = [round(abs(millimetres) / case.voxel_size_mm)] * 3
        return sitk.GetArrayFromImage(filter_(sitk.GetImageFromArray(brain.astype(np.uint8)), radius)).astype(bool)

    if case.mask == "brain":
        return shares["gm"] + shares["wm"] > 0.1
    if case.mask == "head":
        return image > otsu_threshold(image.ravel())
    if case.mask in ("eroded", "dilated"):
        return grown(-4 if case.mask == "eroded" else 6)
    leaking, half = grown(2), brain.shape[0] // 2
    leaking[:half] |= grown(14)[:half]
    return leaking
