"""Heads that phantoms are made of, as shares of tissues, and real scans that known fields are put on.

Three people's worth of anatomy, since what holds for one head need not hold for another: an average of 152 heads, which
is blurred, and two single heads, which are sharp. The maps of the average ship with the workflow at 2 mm; all else lies
in the folder of test data.
"""

import os
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from n4flow.core.phantom import head_tissues
from n4flow.steps.demo import load_tissues
from n4flow.steps.mask import otsu_threshold

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("N4FLOW_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
TISSUES_2MM = REPOSITORY / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz.base64"
T1W = DATA / "bids" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A head without noise or field."""

    shares: dict[str, np.ndarray]  # float32, 0 to 1: of each tissue per voxel
    voxel_size_mm: float
    brain: np.ndarray  # bool: more grey and white matter than anything else
    from_brain_mm: np.ndarray  # float32: distance to the brain's outline, negative inside


@cache
def anatomy(maps):
    """One of ``mni_2mm``, ``mni_1mm``, ``individual`` and ``t1w``; kept once it is made."""
    shares, voxel_size_mm = {"mni_2mm": _mni_2mm, "mni_1mm": _mni_1mm, "individual": _individual, "t1w": _t1w}[maps]()
    brain = shares["gm"] + shares["wm"] > 0.5
    outline = _closed(brain, 5, voxel_size_mm)
    return Anatomy(shares, voxel_size_mm, brain, _distance(outline) * voxel_size_mm)


def _mni_2mm():
    return head_tissues(np.asarray(load_tissues(TISSUES_2MM).dataobj), 2.0), 2.0


def _mni_1mm():
    gm, wm, t1 = (_load(DATA / "mni152" / f"{name}.nii.gz") for name in ("gm", "wm", "t1"))
    csf = np.clip(255 * (t1 > 0) - gm - wm, 0, 255)
    return head_tissues(np.stack([gm, wm, csf], axis=-1).astype(np.uint8), 1.0), 1.0


def _individual():
    """One person's brain, segmented by FAST, in a skull and a scalp that are made up."""
    folder = DATA / "individual"
    head = largest_piece(_load(folder / "bet.nii.gz") > 0)  # two balls were added beside it
    gm, wm = (_load(folder / f"pve_{i}.nii.gz") * head for i in (1, 2))
    shares = 255 * np.stack([gm, wm, np.clip(head - gm - wm, 0, 1)], axis=-1)
    around = [(20, 20), (20, 20), (0, 20), (0, 0)]  # voxels for skull and scalp; below, the brain is cut off
    return head_tissues(np.pad(np.rint(shares).astype(np.uint8), around), 1.0), 1.0


def _t1w():
    """Another person's head out of a real T1w scan: brain, fluid, skull, muscle and fat where that has them."""
    scan = nib.load(T1W)
    voxel_size_mm = float(scan.header.get_zooms()[0])
    image = _without_field(np.asarray(scan.dataobj, dtype=np.float32))
    head = image > otsu_threshold(image[::2, ::2, ::2].ravel())
    # grey and white matter of a T1w head lie around its commonest intensity, that of white matter
    counts, edges = np.histogram(image[head], 100)
    solid = (image > 0.6 * edges[counts.argmax()]) & (image < 1.2 * edges[counts.argmax()])
    # what is left after 3 voxels are taken off is the brain without its bridges; it grows again within what is solid
    depth = -_distance(solid)
    core = _distance(largest_piece(depth > 3.2))
    brain = _closed((_distance(largest_piece((depth > 1.5) & (core < 14))) < 2.6) & solid, 5, voxel_size_mm)
    shell = _closed(largest_piece(head), 7, voxel_size_mm) & ~brain
    fluid = shell & (_distance(brain) < 4) & (image < 0.6 * edges[counts.argmax()])
    shares = dict(zip(("csf", "gm", "wm"), _shares_by_intensity(image, brain), strict=True))
    shares |= zip(("skull", "muscle", "scalp"), _shares_by_intensity(image, shell & ~fluid), strict=True)
    shares["csf"] = shares["csf"] + fluid
    return shares, voxel_size_mm


def _without_field(image):
    """An image that SimpleITK has taken the coarse field out of, so that a tissue has one intensity."""
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetNumberOfThreads(1)  # its result depends on the number
    n4.SetMaximumNumberOfIterations([50, 50, 50])
    whole = sitk.GetImageFromArray(image)
    small = sitk.Shrink(whole, [8] * 3)
    n4.Execute(small, sitk.Cast(small > otsu_threshold(image[::2, ::2, ::2].ravel()), sitk.sitkUInt8))
    between = sitk.ResampleImageFilter()
    between.SetReferenceImage(whole)
    between.SetUseNearestNeighborExtrapolator(True)
    return image / np.exp(sitk.GetArrayFromImage(between.Execute(n4.GetLogBiasFieldAsImage(small))))


def _shares_by_intensity(image, inside):
    """Shares of three tissues, from dark to bright: centres by k-means, mixed where an intensity lies between two."""
    values = np.sort(image[inside])
    centres = np.percentile(values, (10, 50, 90))
    for _ in range(50):
        borders = np.searchsorted(values, (centres[1:] + centres[:-1]) / 2)
        centres = np.array([part.mean() for part in np.split(values, borders)])
    # the inner half of the way from one centre to the next: what varies around a centre is one tissue
    ways = [np.clip(2 * (image - a) / (b - a) - 0.5, 0, 1) for a, b in pairwise(centres)]
    return [(share * inside).astype(np.float32) for share in (1 - ways[0], ways[0] - ways[1], ways[1])]


def _load(path):
    return np.asarray(nib.load(path).dataobj, dtype=np.float32)


def _distance(mask):
    """Voxels to a mask, negative inside."""
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=False))


def _closed(mask, radius_mm, voxel_size_mm):
    """A mask without its gaps and holes: an outline, which may be found on every second voxel."""
    step = 2 if voxel_size_mm < 1.5 else 1
    radius = radius_mm / voxel_size_mm / step
    margin = int(radius) + 2  # around the image, which is not the end of the head
    closed = _distance(_distance(np.pad(mask[::step, ::step, ::step], margin)) >= radius) > radius
    filled = sitk.GetArrayFromImage(sitk.BinaryFillhole(sitk.GetImageFromArray(closed.astype(np.uint8))))
    for axis in range(3):
        filled = filled.repeat(step, axis)
    return filled[tuple(slice(step * margin, step * margin + n) for n in mask.shape)].astype(bool)


def largest_piece(mask):
    """The largest connected component of a mask."""
    pieces = sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8)))
    return sitk.GetArrayFromImage(sitk.RelabelComponent(pieces)) == 1


@dataclass(frozen=True, eq=False)
class RealScan:
    """An image whose own field nobody knows."""

    image: np.ndarray  # float32
    mask: np.ndarray  # bool
    voxel_size_mm: tuple[float, ...]


#: Real scans by name. Those without a skull come with a mask of all that is there, the others with Otsu's.
REAL_SCANS = ("T1w head", "T1w brain", "brain of another", "MNI average", "ASL mean")


@cache
def real_scan(name):
    """One of `REAL_SCANS`."""
    path = {
        "T1w head": T1W,
        "T1w brain": T1W,
        "brain of another": DATA / "individual" / "bet.nii.gz",
        "MNI average": DATA / "mni152" / "t1.nii.gz",
        "ASL mean": DATA / "bids" / "sub-02" / "perf" / "sub-02_asl.nii.gz",
    }[name]
    image = _load(path)
    if image.ndim == 4:
        image = image.mean(axis=3)
    if name == "T1w brain":
        mask = anatomy("t1w").from_brain_mm < 1
    elif name in ("brain of another", "MNI average"):
        mask = largest_piece(image > 0)
    else:
        mask = image > otsu_threshold(image.ravel())
    return RealScan(image, mask, tuple(float(size) for size in nib.load(path).header.get_zooms()[:3]))
