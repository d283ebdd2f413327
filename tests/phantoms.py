"""Phantoms with known fields: what accuracy is tuned on and, apart from that, reported on.

Simulated scans of the heads of `anatomies`, with draws of field, noise, contrast, mask and lesions. Those with an even
seed may be tuned on, but for the head ``t1w``, on which nothing is; the others are reported on, and drawn anew with
every change of a setting, so that no setting can have been chosen by them. Beside the heads, an object as of a
light-sheet microscope.
"""

import functools
import zlib
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
import SimpleITK as sitk

from n4flow.core.phantom import T1_LIKE, inu_field
from n4flow.parameters import PRESETS, N4Parameters
from n4flow.steps.mask import otsu_threshold
from tests.anatomies import anatomy

CONTRASTS = {
    "T1": {**T1_LIKE, "muscle": 550.0},
    "T2": {"gm": 700.0, "wm": 520.0, "csf": 1000.0, "skull": 100.0, "muscle": 250.0, "scalp": 450.0},
    "PD": {"gm": 1000.0, "wm": 850.0, "csf": 1050.0, "skull": 150.0, "muscle": 800.0, "scalp": 900.0},
}
FIELDS = ("legendre", "linear", "coil", "surface")
#: One coil beside the head; in percent of INU not over the brain, as all others, but over the head.
NEAR_COIL = "surface, over the head"
NOISE = (0, 1, 3, 5, 9)
STRENGTHS = (0, 20, 40, 100)
ANATOMIES = ("mni", "individual", "t1w")
#: Anatomies of which cases may be tuned on.
TUNED_ON = ("mni", "individual")
MASKS = ("brain", "head", "eroded", "dilated", "leaking", "half", "small")


@dataclass(frozen=True)
class Case:
    """One simulated scan."""

    maps: str  # of `anatomies.anatomy`
    contrast: str
    field: str  # of `FIELDS`, or `NEAR_COIL`
    inu_percent: float
    noise_percent: int
    mask: str  # of `MASKS`
    lesions: bool
    seed: int
    scale: float = 1.0  # 0.1: a mouse, a head whose voxels are said to be a tenth of what they are

    @property
    def anatomy(self):
        """Whose head it is."""
        return self.maps.partition("_")[0]

    @property
    def tuned_on(self):
        """Whether defaults may be chosen by it; tables report on the others alone."""
        return self.seed % 2 == 0 and self.anatomy in TUNED_ON


@dataclass(frozen=True, eq=False)
class Scan:
    """A case as arrays, all on one grid."""

    image: np.ndarray  # float32
    mask: np.ndarray  # bool: what the correction is given
    brain: np.ndarray  # bool: where the error is measured: in the brain, as far as a partial mask goes
    gm: np.ndarray  # bool: nothing but grey matter
    wm: np.ndarray  # bool: nothing but white matter
    log_bias: np.ndarray  # the truth, mean 0 in the brain
    voxel_size_mm: tuple[float, ...]


def family(anatomies=ANATOMIES, strengths=STRENGTHS, seeds=range(10), masks=None, **same):
    """Cases of every anatomy, strength of the field and seed.

    Contrast, field and noise go through all their values in turn, each at its own pace, so that ten seeds have every
    noise in either half. Mask and lesions, and the voxel size of the average head, are drawn by lot.

    Parameters
    ----------
    anatomies, strengths, seeds
        Of `ANATOMIES`; in percent of INU; even ones for tuning, odd ones for reporting.
    masks : sequence of str, optional
        Of `MASKS`, each in turn with every other case. By default drawn by lot, every second one the brain's, of those
        that hold all of it.
    **same
        What all cases have in common, such as ``noise_percent=3`` or ``lesions=False``.
    """
    cases = []
    for name, inu_percent, seed, mask in product(anatomies, strengths, seeds, masks or (None,)):
        lot = np.random.default_rng(zlib.crc32(repr((name, inu_percent, seed)).encode()))
        turn = seed // 2 + 2 * (seed % 2) + zlib.crc32(repr((name, inu_percent)).encode()) % 60
        drawn = {
            "maps": name,
            "contrast": list(CONTRASTS)[turn % len(CONTRASTS)],
            "field": FIELDS[turn % len(FIELDS)],
            "noise_percent": NOISE[turn % len(NOISE)],
            "mask": mask or str(lot.choice(("brain",) * 3 + ("head", "eroded", "dilated", "leaking"))),
            "lesions": bool(lot.integers(5) == 0),
        }
        if name == "mni":  # on every 4th voxel of 2 mm, a small mask would hold too few
            drawn["maps"] = "mni_1mm" if mask == "small" or lot.integers(4) == 0 else "mni_2mm"
        cases.append(Case(**(drawn | {"inu_percent": inu_percent, "seed": seed} | same)))
    return cases


def make_scan(case):
    """Simulate a case: the same for tuning, anew with every change of a setting for reporting."""
    rng = _lot(astuple(case), case.tuned_on)
    head, intensity = anatomy(case.maps), CONTRASTS[case.contrast]
    truth = sum(np.float32(intensity[name]) * share for name, share in head.shares.items())
    if case.lesions:
        _add_lesions(truth, head.shares["wm"], 0.85 * intensity["gm"], head.voxel_size_mm, rng)
    inside = sum(head.shares.values()) > 0.5 if case.field == NEAR_COIL else head.brain
    log_bias = log_bias_field(case.field, case.inu_percent, inside, rng)
    log_bias -= log_bias[head.brain].mean()
    image = _with_noise(truth * np.exp(log_bias), case.noise_percent / 100 * max(intensity["gm"], intensity["wm"]), rng)
    brain = head.brain
    mask = _mask(case, image, head, rng)
    if case.mask in ("half", "small"):
        brain = brain & mask
        log_bias -= log_bias[brain].mean()
    pure = (head.shares[name] > 0.9 for name in ("gm", "wm"))
    return Scan(image, mask, brain, *pure, log_bias, (head.voxel_size_mm * case.scale,) * 3)


def light_sheet(contrast, field_sd, seed, *, levels=None, noise_percent=3):
    """A cleared sample of 10 mm at 0.04 mm: blobs of three intensities, blurred, which fill it throughout.

    Parameters
    ----------
    contrast : float
        Power that the intensities, 1, 0.7 and 0.45, are taken to: 1, or less where the stain is faint.
    field_sd : float
        Of the log field in the object; 0 for none.
    seed : int
        Odd ones are for reporting, as of `Case`.
    levels : int, optional
        Grey levels that the image is rounded to.
    noise_percent : float
        Of the brightest intensity.

    Returns
    -------
    Scan
        Its mask Otsu's, its brain the object, without tissues.
    """
    rng = _lot((contrast, field_sd, seed, levels), seed % 2 == 0)
    shape = (250, 200, 150)
    x, y, z = (np.linspace(-1.05, 1.05, n) for n in shape)
    inside = (x**2)[:, None, None] + (y**2)[:, None] + z**2 < 1
    texture = _blurred(rng.standard_normal(shape, dtype=np.float32), 6)
    low, high = np.percentile(texture[inside], (40, 75))
    intensity = np.select([texture < low, texture < high], [0.7**contrast, 0.45**contrast], 1.0).astype(np.float32)
    log_bias = log_bias_field("legendre", 40, inside, rng)
    log_bias *= field_sd / log_bias[inside].std()
    image = 1000 * _blurred(inside * intensity, 0.7) * np.exp(log_bias)
    image = _with_noise(image, 10 * noise_percent, rng)
    if levels:
        top = np.percentile(image, 99.9)
        image = np.rint(np.minimum(image / top, 1) * (levels - 1)).astype(np.float32)
    nothing = np.zeros(shape, dtype=bool)
    return Scan(image, image > otsu_threshold(image.ravel()), inside, nothing, nothing, log_bias, (0.04,) * 3)


def serial_sections(seed, *, axis=2, sections=8, gain_sd=0.25, attenuation=0.6, field_sd=0.15, what="light-sheet"):
    """An object that was cut into sections, each with a gain and an attenuation with depth of its own.

    Parameters
    ----------
    seed : int
        Odd ones are for reporting, as of `Case`.
    axis : int
        Along which it was cut.
    sections : int, optional
        Of equal thickness; by default each plane is one, without attenuation.
    gain_sd : float
        Of the log gain, from section to section.
    attenuation : float
        Mean fall of the log intensity from a section's first face to its last; from half of it to one and a half.
    field_sd : float
        Of the smooth log field in the object.
    what : {"light-sheet", "head", "brain"}
        The object of `light_sheet`, or that of the average head, whose tissues change along any axis.

    Returns
    -------
    Scan
        Its truth, `log_bias`, is the gains and the field together.
    """
    rng = _lot((axis, sections, gain_sd, attenuation, field_sd, what, seed), seed % 2 == 0)
    truth, inside, size_mm = _object(what)
    planes = np.flatnonzero(inside.any(axis=tuple(n for n in range(3) if n != axis)))
    count = len(planes) if sections is None else sections
    place = np.arange(len(planes)) * count / len(planes)
    section = place.astype(int)
    falls = attenuation * rng.uniform(0.5, 1.5, count) * (sections is not None)
    log_gains = np.zeros(inside.shape[axis])
    log_gains[planes] = rng.normal(0, gain_sd, count)[section] - falls[section] * (place - section - 0.5)
    log_gains[: planes[0]], log_gains[planes[-1] :] = log_gains[planes[0]], log_gains[planes[-1]]
    log_bias = log_bias_field("legendre", 40, inside, rng)
    log_bias *= field_sd / log_bias[inside].std()
    log_bias = log_bias + np.moveaxis(log_gains[:, None, None], 0, axis)
    image = _with_noise(truth * np.exp(log_bias), 30, rng)
    nothing = np.zeros(inside.shape, dtype=bool)
    return Scan(image, image > otsu_threshold(image.ravel()), inside, nothing, nothing, log_bias, (size_mm,) * 3)


@functools.cache
def _object(what):
    """Intensities without noise or field, where the object is, and the size of a voxel in mm."""
    if what == "light-sheet":
        scan = light_sheet(1, 1e-9, 0, noise_percent=0)
        truth, inside = (
            values[:249, :198].reshape(83, 3, 66, 3, 50, 3).mean(axis=(1, 3, 5)) for values in (scan.image, scan.brain)
        )
        return truth, inside > 0.5, 0.12
    head = anatomy("mni_2mm")
    truth = sum(np.float32(CONTRASTS["T1"][name]) * share for name, share in head.shares.items())
    return (truth * head.brain if what == "brain" else truth), head.brain, 2.0


def sparse_stain(scan, ground, seed):
    """A stain of cells in a tenth of a light-sheet object, on the faint ground of the rest; the same field and noise.

    Parameters
    ----------
    scan : Scan
        As `light_sheet` made it.
    ground : float
        Intensity of what is no cell, of a cell's 1.
    seed : int
    """
    rng = np.random.default_rng(seed)
    centres = rng.random(scan.image.shape) < 0.003
    cells = _blurred(centres * rng.uniform(0.5, 1, centres.shape).astype(np.float32), 1.5) * 53
    image = 1000 * scan.brain * (ground + np.minimum(cells, 1)) * np.exp(scan.log_bias)
    return _with_noise(image.astype(np.float32), 30, rng)


def with_added_field(scan, field, inu_percent, seed):
    """A real scan times a known field, float32, and the log of that field, of mean 0 in the mask.

    Parameters
    ----------
    scan : anatomies.RealScan
    field, inu_percent, seed
        As of `Case`.
    """
    log_added = log_bias_field(field, inu_percent, scan.mask, _lot((field, inu_percent, seed), seed % 2 == 0))
    return (scan.image * np.exp(log_added)).astype(np.float32), log_added


def log_bias_field(kind, inu_percent, inside, rng):
    """A log bias field of these kinds, scaled as `inu_field` scales: by its range inside, its mean 0 there."""
    if kind == "legendre":
        return np.log(inu_field(inside.shape, inside, inu_percent, rng))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in inside.shape), indexing="ij", sparse=True)
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    if kind == "linear":
        shape = direction[0] * x + direction[1] * y + direction[2] * z
    elif kind in ("surface", NEAR_COIL):  # one coil at one side, sensitivity falling with the square of the distance
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


def _lot(what, tuned_on):
    """Random numbers for a case: the same ones while settings are tuned on it, else new ones with new settings."""
    settings = "" if tuned_on else repr((N4Parameters(), PRESETS))
    return np.random.default_rng(zlib.crc32((repr(what) + settings).encode()))


def _with_noise(image, sigma, rng):
    """Magnitude of a signal with Gaussian noise of this standard deviation in both channels, float32."""
    real, imaginary = (rng.standard_normal(image.shape, dtype=np.float32) for _ in range(2))
    return np.hypot(image.astype(np.float32) + np.float32(sigma) * real, np.float32(sigma) * imaginary)


def _blurred(image, sigma):
    return sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(sitk.GetImageFromArray(image), sigma))


def _add_lesions(truth, wm, intensity, voxel_size_mm, rng):
    """Replace 25 balls of 2 to 8 mm radius in the white matter."""
    places = np.argwhere(wm > 0.95)
    for centre in places[rng.integers(len(places), size=25)]:
        radius = rng.uniform(2, 8) / voxel_size_mm
        box = tuple(slice(max(0, int(c - radius)), int(c + radius) + 1) for c in centre)
        grid = np.ogrid[box]
        ball = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
        truth[box] = np.where(ball, intensity, truth[box])


def _mask(case, image, head, rng):
    if case.mask == "brain":
        return head.shares["gm"] + head.shares["wm"] > 0.1
    if case.mask == "head":
        return image > otsu_threshold(image.ravel())
    if case.mask in ("eroded", "dilated"):
        return head.from_brain_mm <= (-4 if case.mask == "eroded" else 6)
    middle = np.argwhere(head.brain).mean(axis=0)
    if case.mask == "leaking":
        mask = head.from_brain_mm <= 2
        half = slice(round(middle[0]))
        mask[half] |= head.from_brain_mm[half] <= 14
        return mask
    mask = head.brain.copy()
    if case.mask == "half":
        mask[round(middle[0]) :] = False
        return mask
    # a cube of 60 mm, somewhere around the middle
    corner = middle + (rng.uniform(-15, 15, 3) - 30) / head.voxel_size_mm
    box = tuple(slice(round(c), round(c + 60 / head.voxel_size_mm)) for c in corner)
    small = np.zeros_like(mask)
    small[box] = mask[box]
    return small
