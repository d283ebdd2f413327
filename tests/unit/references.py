"""SimpleITK and ANTs on arrays, and the grids they lay: what our fields are compared with."""

import hashlib
import os
import pickle
import warnings
from functools import wraps

import numpy as np
import pytest
import SimpleITK as sitk

from n4flow.parameters import N4Parameters

FIXED = N4Parameters.from_mapping({"preset": "fixed"})
DEFAULT_HISTOGRAM = {key: getattr(FIXED, key) for key in ("histogram_bins", "fwhm", "wiener_noise")}


def remembered(function):
    """Do not compute again what was computed of equal arguments: a reference is compared with several of ours."""
    found = {}

    @wraps(function)
    def once(*args, **kwargs):
        # the module ants, an argument of some, cannot be pickled
        given = [arg for arg in args if not hasattr(arg, "__path__")]
        key = hashlib.sha256(pickle.dumps((given, sorted(kwargs.items())))).digest()
        if key not in found:
            found[key] = function(*args, **kwargs)
        return found[key].copy()

    return once


def itk_image(array, dtype=np.float32):
    return sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype=dtype))


@remembered
def simpleitk_log_field(image, mask, iterations, spans, threshold=0.0, histogram=DEFAULT_HISTOGRAM, threads=1):
    """SimpleITK's own log field on an array."""
    # its result depends on the number of threads, and this global one is what it goes by
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(list(iterations))
    n4.SetConvergenceThreshold(threshold)
    n4.SetNumberOfControlPoints([s + 3 for s in spans])
    n4.SetNumberOfHistogramBins(histogram["histogram_bins"])
    n4.SetBiasFieldFullWidthAtHalfMaximum(histogram["fwhm"])
    n4.SetWienerFilterNoise(histogram["wiener_noise"])
    volume = itk_image(image)
    n4.Execute(volume, itk_image(mask, np.uint8))
    return sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(volume)).T.astype(np.float64)


def import_ants():
    """Return antspyx, with ITK held to one thread; skip where it is not installed."""
    # read by ITK once, when it first starts threads
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("ants", reason="antspyx is not here: see envs/requirements-test.in")


@remembered
def ants_log_field(ants, image, mask, iterations, bspline, **options):
    """Log of the field that the program N4BiasFieldCorrection of ANTs gives for an array.

    Parameters
    ----------
    ants : module
    image, mask : (n0, n1, n2) arrays
    iterations : sequence of int
        Per level; the convergence threshold is 0.
    bspline : sequence of int or float
        Spans per axis at the first level, or the spline distance in mm.
    weights : array, optional
    voxel_size_mm : tuple of float
    shrink_factor : int
    histogram : dict
    """
    spacing = options.get("voxel_size_mm", (1.0, 1.0, 1.0))
    weights, histogram = options.get("weights"), options.get("histogram", DEFAULT_HISTOGRAM)

    def volume(array):
        return ants.from_numpy(np.asarray(array, dtype=np.float32), spacing=spacing)

    corrected, field = volume(image), volume(image)
    outputs = ",".join(ants.internal.get_pointer_string(output) for output in (corrected, field))
    mesh = "x".join(map(str, bspline)) if np.iterable(bspline) else repr(float(bspline))
    sharpening = (histogram["fwhm"], histogram["wiener_noise"], histogram["histogram_bins"])
    # as ants.n4_bias_field_correction calls the program, but for -t, which it has no argument for,
    # and for a -b that it would round to whole millimetres
    arguments = {
        "d": 3,
        "i": volume(image),
        "x": volume(mask),
        "w": None if weights is None else volume(weights),
        "s": str(options.get("shrink_factor", 1)),
        "c": f"[{'x'.join(map(str, iterations))},0]",
        "b": f"[{mesh}]",
        "t": f"[{','.join(map(str, sharpening))}]",
        "r": 0,
        "o": f"[{outputs}]",
        "v": 0,
    }
    ants.internal.get_lib_fn("N4BiasFieldCorrection")(ants.internal.process_arguments(arguments))
    return np.log(field.numpy().astype(np.float64))


def itk_positions(count, steps):
    """Positions of `steps` voxels stretched over samples 0 to `count` - 1, as ITK places them.

    ITK moves the last voxel inside by a thousandth of a voxel, because its basis ends there. Ours does not end; where
    the mask reaches the last plane of a thin stack that thousandth is more than rounding.
    """
    positions = np.linspace(0, count - 1, steps)
    positions[-1] -= 1e-3 * (count - 1) / (steps - 1)
    return positions


def shrink_positions(shape, shrink_factor, before=(0, 0, 0)):
    """Voxels that itk::ShrinkImageFilter takes along each axis of an array padded with so many voxels before.

    It centres the samples, but numbers voxels from the first one that was not padded, and takes a negative difference
    between a sample's number times the factor and its voxel for rounding: such samples move up by the difference.
    """
    positions = []
    for n, start in zip(shape, (-b for b in before), strict=True):
        count = max(1, n // shrink_factor)
        first = start + int(np.floor(((n - 1) - shrink_factor * (count - 1)) / 2 + 0.5))
        base = -(-start // shrink_factor) * shrink_factor
        positions.append(base + max(0, first - base) - start + shrink_factor * np.arange(count))
    return positions


def ants_padding(shape, voxel_size_mm, spline_distance_mm):
    """Spans, and voxels padded before and after, per axis: what ``-b [D]`` does, in its single precision."""
    distance, half = np.float32(spline_distance_mm), np.float32(0.5)
    spans, padding = [], []
    for n, size in zip(shape, map(np.float32, voxel_size_mm), strict=True):
        domain = np.float32(n - 1) * size
        count = int(np.ceil(domain / distance))
        extra = int((np.float32(count) * distance - domain) / size + half)
        spans.append(count)
        padding.append((extra // 2, extra - extra // 2))
    return spans, padding
