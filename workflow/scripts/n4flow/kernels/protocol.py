"""The passes over the voxels, behind one protocol.

An iteration needs three light passes over the log intensities of the samples: histogram; look-up,
residual and contraction onto the lattice; subtraction of the update with its statistics. `plain` is
array code for NumPy and CuPy and the readable truth; every other set must agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Statistics(NamedTuple):
    """What a pass over the corrected log intensities ``u - B`` finds inside the mask."""

    low: float  # smallest
    high: float  # largest
    cv: float  # coefficient of variation of exp(-update), as N4 measures convergence


class Kernels(Protocol):
    """Holds ``u - B`` on the sample grid, on its device, and works on it in passes."""

    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        """Take the per-axis basis matrices (n_axis, m_axis) of a level; compute ``omega`` once."""

    def subtract(self, update: np.ndarray) -> Statistics:
        """Subtract the spline with the control points `update` (m0, m1, m2) from ``u - B``."""

    def histogram(self, low: float, high: float, bins: int) -> np.ndarray:
        """Histogram of ``u - B`` as `sharpening.linear_histogram` defines it, on the host."""

    def fit(self, table: np.ndarray, low: float, high: float) -> np.ndarray:
        """Control points (m0, m1, m2) that approximate ``(u - B) - E(u - B)``.

        E is the look-up `table` (bins,), whose entries run from `low` to `high`; see
        `sharpening.look_up` and `bspline.bspline_fit`. On the host.
        """
