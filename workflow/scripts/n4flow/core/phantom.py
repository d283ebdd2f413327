"""A head with a known bias field."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from numpy.polynomial import legendre

#: T1-like intensities of grey matter, white matter, fluid, skull and scalp (fat, as bright as white matter).
T1_LIKE = {"gm": 720.0, "wm": 1000.0, "csf": 280.0, "skull": 120.0, "scalp": 1000.0}


class Phantom(NamedTuple):
    """A simulated scan and its truth, all on one grid."""

    image: np.ndarray  # (n0, n1, n2) float32: truth * bias with Rician noise
    truth: np.ndarray  # float32: noise-free, without bias
    bias: np.ndarray  # float64: multiplicative field, mean log 0 in the brain
    brain: np.ndarray  # bool
    gm: np.ndarray  # bool: grey matter, probability above 0.9
    wm: np.ndarray  # bool: white matter, likewise


def head_tissues(tissues: np.ndarray, voxel_size_mm: float) -> dict[str, np.ndarray]:
    """Put a skull and a scalp around a brain.

    Parameters
    ----------
    tissues : (n0, n1, n2, 3) array
        Grey matter, white matter and fluid, 0 to 255.
    voxel_size_mm : float

    Returns
    -------
    dict of (n0, n1, n2) float32 arrays
        Share of each tissue of `T1_LIKE` per voxel, 0 to 1: 3 mm of fluid, 6 mm of skull and 7 mm of
        scalp around what is brain.
    """
    shares = {name: tissues[..., i].astype(np.float32) / 255 for i, name in enumerate(("gm", "wm", "csf"))}
    around = sum(shares.values())
    brain = around > 0.5
    # extended downwards, so that the neck is no skull
    below = np.pad(brain, ((0, 0), (0, 0), (20, 0)), mode="edge")
    distance = sitk.GetArrayFromImage(
        sitk.SignedMaurerDistanceMap(
            sitk.GetImageFromArray(below.astype(np.uint8)), squaredDistance=False, useImageSpacing=False
        )
    )[:, :, 20:]
    millimetres = distance * voxel_size_mm
    shell = np.where(brain, 0, 1 - around)
    shares["csf"] = shares["csf"] + shell * (millimetres <= 3)
    shares["skull"] = shell * ((millimetres > 3) & (millimetres <= 9))
    shares["scalp"] = shell * ((millimetres > 9) & (millimetres <= 16))
    return shares


def inu_field(shape: tuple[int, ...], inside: np.ndarray, percent: float, rng: np.random.Generator) -> np.ndarray:
    """A smooth multiplicative field: a random mixture of low-order Legendre polynomials.

    Parameters
    ----------
    shape : tuple of int
    inside : bool array
        Where largest and smallest value are as ``1 + percent / 200`` to ``1 - percent / 200`` (the
        meaning of "40 % INU" in BrainWeb) and the mean log is 0.
    percent : float
        0 to below 200.
    rng : numpy random generator

    Returns
    -------
    float64 array
        Of that shape.

    References
    ----------
    BrainWeb: Collins et al. 1998, doi:10.1109/42.712135 (the meaning of the percentage; its own fields are others).
    """
    order = 3
    weights = rng.standard_normal([order + 1] * 3)
    i, j, k = np.indices(weights.shape)
    weights *= (i + j + k <= order) / (1.0 + i + j + k)
    x, y, z = (np.linspace(-1, 1, n) for n in shape)
    mixture = np.asarray(legendre.leggrid3d(x, y, z, weights))
    low, high = mixture[inside].min(), mixture[inside].max()
    log_range = np.log((1 + percent / 200) / (1 - percent / 200))
    log_field = log_range * (mixture - low) / (high - low)
    return np.exp(log_field - log_field[inside].mean())


def make_phantom(
    tissues: np.ndarray, voxel_size_mm: float, *, inu_percent: float, noise_percent: float, seed: int
) -> Phantom:
    """Simulate a T1-weighted head scan.

    Parameters
    ----------
    tissues : (n0, n1, n2, 3) array
        Grey matter, white matter and fluid, 0 to 255.
    voxel_size_mm : float
    inu_percent : float
        Strength of the field, see `inu_field`.
    noise_percent : float
        Standard deviation of the Gaussian noise of each channel, of the white-matter intensity.
        The magnitude is then Rician (Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618).
    seed : int

    Returns
    -------
    Phantom
    """
    rng = np.random.default_rng(seed)
    shares = head_tissues(tissues, voxel_size_mm)
    truth = np.zeros(tissues.shape[:3])
    for name, share in shares.items():
        truth += T1_LIKE[name] * share
    brain = shares["gm"] + shares["wm"] > 0.5
    bias = inu_field(brain.shape, brain, inu_percent, rng)
    sigma = noise_percent / 100 * T1_LIKE["wm"]
    real, imaginary = sigma * rng.standard_normal((2, *brain.shape))
    image = np.hypot(truth * bias + real, imaginary)
    return Phantom(
        image.astype(np.float32),
        truth.astype(np.float32),
        bias,
        brain,
        shares["gm"] > 0.9,
        shares["wm"] > 0.9,
    )
