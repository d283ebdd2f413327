"""Histogram sharpening: where each intensity would lie if the field had not blurred the histogram.

The work is on a few hundred bins, in float64, on the host: single precision is what broke ITK here
(ANTs issue 424).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from n4flow.device import array_module, to_host

#: Shares of a voxel between two bins are counted in units of 2**-24. Sums of whole numbers below
#: 2**53 are exact in float64, so a histogram is the same in whatever order its voxels come.
SHARE_UNIT = 2**24

#: Bins that the Gaussian is wide at least, unless all is to be as ITK has it.
NARROWEST_BINS = 2.0

#: Where the blurred histogram has less than this share of its largest entry, there is nothing to go by.
NEXT_TO_NOTHING = 1e-9

#: How often the expected value is twiced: what once leaves of the pull between tissues is still most of the error of a
#: weak field.
TWICINGS = 2

#: A step is taken to see so much of a field at least.
SMALLEST_GAIN = 0.02


def linear_histogram(values: Any, low: float, high: float, bins: int) -> np.ndarray:
    """Histogram whose bin CENTRES run from `low` to `high`, each value shared by its two nearest.

    Parameters
    ----------
    values : 1-D array
        Log intensities inside the mask.
    low, high : float
        Smallest and largest of all values (not only of these).
    bins : int

    Returns
    -------
    (bins,) float64 array
        Whole multiples of ``1 / SHARE_UNIT``, so that histograms of parts add up exactly.

    References
    ----------
    As ITK's N4BiasFieldCorrectionImageFilter::SharpenImage, which shares in single precision.
    """
    xp = array_module(values)
    position = (values - low) * ((bins - 1) / (high - low))
    index = xp.clip(position.astype(np.int32), 0, bins - 2)
    upper = xp.rint((position - index) * SHARE_UNIT)
    count = xp.bincount(index, minlength=bins)
    upper_share = xp.bincount(index, weights=upper, minlength=bins)
    total = count * float(SHARE_UNIT) - upper_share
    total[1:] += upper_share[:-1]
    return total / SHARE_UNIT


def expected_log_values(
    histogram: np.ndarray,
    low: float,
    high: float,
    *,
    fwhm: float,
    wiener_noise: float,
    twicing: float = 0.0,
    as_itk: bool = True,
) -> np.ndarray:
    """Expected sharp log intensity at each bin centre.

    The histogram V is taken as the sharp histogram U blurred by a Gaussian F: a Wiener filter
    gives U, and ``E(u | v) = F * (x U) / F * U``. Where classes overlap, E pulls each towards its neighbours:
    a sharp value x, blurred and looked up, comes back as ``F * E``. Twicing (Tukey) takes the expected value of what
    it lacks, ``x - F * E``, and adds it to E.

    Parameters
    ----------
    histogram : (bins,) array
    low, high : float
        Log intensity of the first and the last bin centre.
    fwhm : float
        Full width at half maximum of F in log intensity.
    wiener_noise : float
    twicing : float
        How much of what E lacks is added to it, from 0 to 1, each of `TWICINGS` times.
    as_itk : bool
        ITK lets F be narrower than its bins, and E be 0 where U leaves exactly nothing. Otherwise F is at least
        `NARROWEST_BINS` wide, and E is the value itself where there is next to nothing. Not with twicing.

    Returns
    -------
    (bins,) float64 array

    References
    ----------
    Sled et al. 1998, doi:10.1109/42.668698, section II-C; padding, normalisation and clipping as in
    ITK's N4BiasFieldCorrectionImageFilter::SharpenImage; Tukey, Exploratory Data Analysis, 1977.
    """
    bins = len(histogram)
    slope = (high - low) / (bins - 1)
    padded, offset, places, _ = _padding(bins)
    spectrum, transfer = _spectra(histogram, fwhm / slope if as_itk else max(fwhm / slope, NARROWEST_BINS))
    wiener = transfer.real / (transfer.real**2 + transfer.imag**2 + wiener_noise)
    sharp = np.maximum(np.fft.irfft(spectrum * wiener, padded), 0)

    def blur(values: Any) -> np.ndarray:
        return np.fft.irfft(transfer * np.fft.rfft(values), padded)

    # in bins from the first one; that of the value is added after the division
    numerator, density = blur([places * sharp, sharp])
    there = density != 0 if as_itk else density > NEXT_TO_NOTHING * density.max()
    divisor = np.where(there, density, 1)
    expected = numerator / divisor
    for _ in range(TWICINGS if twicing else 0):
        # F is cut off at the ends, and not of sum 1: the value itself has to come back as itself
        lacking = places - blur(np.where(there, expected, places)) / transfer[0].real
        expected += twicing * blur(lacking * sharp) / divisor
    values = np.where(there, low + slope * expected, 0 if as_itk else low + slope * places)
    return np.asarray(values[offset : offset + bins])


def sharpening_gain(histogram: np.ndarray, table: np.ndarray, low: float, high: float) -> float:
    """The share of a small field that one step sees: the mean of ``1 - dE/dv`` over the voxels.

    Where the histogram is sharp, E is nearly a staircase, and a step sees all; where it is broad, E is nearly the value
    itself, and the residual next to nothing.

    Parameters
    ----------
    histogram : (bins,) array
    table : (bins,) array
        From `expected_log_values`.
    low, high : float
        Log intensity of the first and the last bin centre.

    Returns
    -------
    float
        At least `SMALLEST_GAIN`.
    """
    between = histogram[1:] + histogram[:-1]
    slope = (high - low) / (len(table) - 1)
    return max(1 - float(between @ np.diff(table)) / (slope * float(between.sum())), SMALLEST_GAIN)


def blurred_entropy(histogram: np.ndarray, low: float, high: float, fwhm: float) -> float:
    """Differential entropy of the log intensities, blurred: the less, the sharper the histogram.

    Parameters
    ----------
    histogram : (bins,) array
    low, high : float
        Log intensity of the first and the last bin centre.
    fwhm : float
        Of the Gaussian that blurs it, in log intensity; at least `NARROWEST_BINS`.

    Returns
    -------
    float
        In nats: it does not depend on the bins, if they are narrow.
    """
    slope = (high - low) / (len(histogram) - 1)
    spectrum, transfer = _spectra(histogram, max(fwhm / slope, NARROWEST_BINS))
    density = np.maximum(np.fft.irfft(transfer * spectrum), 0)
    share = density[density > 0] / density.sum()
    return float(np.log(slope) - share @ np.log(share))


def _spectra(histogram: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Fourier transforms of a padded histogram, and of a Gaussian whose FWHM is so many bins."""
    bins = len(histogram)
    padded, offset, _, exponents = _padding(bins)
    blurred = np.zeros(padded)
    blurred[offset : offset + bins] = histogram
    gaussian = 2 * np.sqrt(np.log(2) / np.pi) / width * np.exp(exponents / width**2)
    return np.fft.rfft(blurred), np.fft.rfft(gaussian)


@lru_cache
def _padding(bins: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """What depends on the number of bins alone.

    Returns
    -------
    padded : int
        Bins of the padded histogram: a power of two, at least twice as many.
    offset : int
        Index of the first bin there.
    places : (padded,) array
        Bins from the first one.
    exponents : (padded,) array
        Exponents of a Gaussian around 0, periodic, of FWHM 1 in bins.
    """
    padded = 2 ** (int(np.ceil(np.log2(bins))) + 1)
    offset = (padded - bins) // 2
    index = np.arange(padded)
    return padded, offset, index - float(offset), -4 * np.log(2) * np.minimum(index, padded - index) ** 2.0


def look_up(values: Any, table: Any, low: float, high: float) -> Any:
    """Linear interpolation of a table whose entries run from `low` to `high`.

    Parameters
    ----------
    values : array
        Log intensities between `low` and `high`.
    table : (bins,) array on the same device
        From `expected_log_values`.
    low, high : float
        Log intensity of its first and its last entry.

    Returns
    -------
    array of the shape of `values`
    """
    xp = array_module(values)
    position = (values - low) * ((len(table) - 1) / (high - low))
    index = xp.clip(position.astype(np.int32), 0, len(table) - 2)
    base = table[index]
    return base + (position - index) * (table[index + 1] - base)


def sharpen_residual(log_values: Any, *, bins: int = 200, fwhm: float = 0.15, wiener_noise: float = 0.01) -> Any:
    """Difference between log intensities and their expected sharp values: what the field may explain.

    Parameters
    ----------
    log_values : array, any shape, NumPy or CuPy
        Finite log intensities of the voxels that take part (nothing else).
    bins, fwhm, wiener_noise
        As in `parameters.N4Parameters`.

    Returns
    -------
    array of the same shape and module, float64
        All 0 if the values are all the same.

    Raises
    ------
    ValueError
        A value is not finite.

    References
    ----------
    As `expected_log_values`.
    """
    xp = array_module(log_values)
    values = log_values.astype(np.float64).ravel()
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("log_values must be finite: take the logarithm of positive voxels only")
    if low == high:
        return xp.zeros(log_values.shape)
    histogram = linear_histogram(values, low, high, bins)
    host = to_host(histogram)
    table = expected_log_values(host, low, high, fwhm=fwhm, wiener_noise=wiener_noise)
    return (values - look_up(values, xp.asarray(table), low, high)).reshape(log_values.shape)
