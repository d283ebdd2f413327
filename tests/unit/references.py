"""What our fields are compared with: SimpleITK and ANTs on arrays, with the grids they lay, and a direct estimate."""

import hashlib
import os
import pickle
import warnings
from functools import reduce, wraps
from itertools import product
from math import comb, factorial

import numpy as np
import pytest
import SimpleITK as sitk

from n4flow.core.bspline import one_blas_thread
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


def spline_basis(coordinates, spans, order=0):
    """Cubic B-splines on a mesh, or a derivative of them, from the recursion over the degree: (n, spans + 3)."""

    def cardinal(x, degree):
        if degree == 0:
            return ((x >= 0) & (x < 1)).astype(float)
        return (x * cardinal(x, degree - 1) + (degree + 1 - x) * cardinal(x - 1, degree - 1)) / degree

    places = np.asarray(coordinates, dtype=float)[:, None] + 3 - np.arange(spans + 3)
    places = np.where(
        coordinates == spans, np.nextafter(places.T, -1), places.T
    ).T  # the last knot belongs to the last span
    return sum((-1) ** k * comb(order, k) * cardinal(places - k, 3 - order) for k in range(order + 1))


def dense_penalty(spans, span_lengths):
    """Mean of the squared third derivatives over a mesh, from their values at Gauss nodes: (points, points)."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    axes = [
        [spline_basis(((nodes + 1) / 2 + np.arange(n)[:, None]).ravel(), n, order) / h**order for order in range(4)]
        for n, h in zip(spans, span_lengths, strict=True)
    ]
    shares = reduce(np.kron, [np.tile(weights / 2, n) / n for n in spans])
    total = 0
    for orders in product(range(4), repeat=3):
        if sum(orders) == 3:
            values = reduce(np.kron, [axis[order] for axis, order in zip(axes, orders, strict=True)])
            total = total + factorial(3) / np.prod([factorial(n) for n in orders]) * (values.T * shares) @ values
    return total


@one_blas_thread
def direct_expected(histogram, low, high, fwhm, wiener_noise, twicing):
    """The expected value at each bin centre, with every convolution as a product with a matrix."""
    bins = len(histogram)
    size = 2 ** (int(np.ceil(np.log2(bins))) + 1)
    first = (size - bins) // 2
    slope = (high - low) / (bins - 1)
    places = low + (np.arange(size) - first) * slope
    width = max(fwhm / slope, 2)
    distance = np.abs(np.arange(size)[:, None] - np.arange(size))
    distance = np.minimum(distance, size - distance)
    kernel = 2 * np.sqrt(np.log(2) / np.pi) / width * np.exp(-4 * np.log(2) * (distance / width) ** 2)
    blurred = np.zeros(size)
    blurred[first : first + bins] = histogram
    # of a symmetric kernel: the least squares that a Wiener filter solves
    sharp = np.maximum(np.linalg.solve(kernel @ kernel + wiener_noise * np.eye(size), kernel @ blurred), 0)
    density = kernel @ sharp
    there = density > 1e-9 * density.max()

    def mean(values):
        return np.divide(kernel @ (values * sharp), density, out=np.zeros(size), where=there)

    expected = np.where(there, mean(places), places)
    for _ in range(2):
        lacking = places - kernel @ expected / kernel.sum(axis=1)
        expected = expected + twicing * mean(lacking)
    return expected[first : first + bins]


@one_blas_thread
def direct_log_field(log_values, coordinates, spans, span_lengths, stages, weights=None):
    """The penalised estimate voxel by voxel, with dense matrices; the thresholds and constants are written out.

    Parameters
    ----------
    log_values : (n,) array
        Of the samples.
    coordinates : three (n,) arrays
        Where they lie on the mesh.
    spans, span_lengths : three numbers each
    stages : sequence of (FWHM, twicing)
    weights : (n,) array, optional

    Returns
    -------
    (n,) array, int
        The field at the samples, and the number of iterations.
    """
    weights = np.ones(len(log_values)) if weights is None else weights
    axes = [spline_basis(p, n) for p, n in zip(coordinates, spans, strict=True)]
    basis = np.einsum("na,nb,nc->nabc", *axes).reshape(len(log_values), -1)
    normal, penalty = (basis.T * weights) @ basis, dense_penalty(spans, span_lengths)
    count = weights.sum()
    lattice, iterations = np.zeros(basis.shape[1]), 0
    for fwhm, twicing in stages:
        for _ in range(40):
            iterations += 1
            values = log_values - basis @ lattice
            low, high = values.min(), values.max()
            centres = np.linspace(low, high, 200)
            shares = np.maximum(0, 1 - np.abs(values[:, None] - centres) / (centres[1] - centres[0]))
            histogram = shares.sum(axis=0)
            expected = direct_expected(histogram, low, high, fwhm, 0.01, twicing)
            between = histogram[1:] + histogram[:-1]
            gain = max(np.average(1 - np.diff(expected) / np.diff(centres), weights=between), 0.02)
            bent = lattice @ penalty @ lattice
            price = (
                2e-6
                * gain
                * (1 + 20000 * (weights**2).sum() / count**2)
                * max(1, fwhm / 0.1) ** 4
                / np.sqrt(1 + bent / 10)
                * count
            )
            residual = values - np.interp(values, centres, expected)
            step = np.clip(gain / 0.6, 0.1, 1)
            wanted = basis.T @ (weights * residual) - price * penalty @ lattice
            update = np.linalg.lstsq(step * normal + price * penalty, wanted)[0]
            lattice = lattice + update
            change = np.exp(-basis @ update)
            if np.std(change, ddof=1) / np.mean(change) <= 1e-3:
                break
    return basis @ lattice, iterations
