"""The passes over the voxels, behind one protocol.

An iteration needs three light passes over the log intensities of the samples: histogram; look-up,
residual and contraction onto the lattice; subtraction of the update with its statistics. `plain` is
the readable truth in NumPy; every other set must agree with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from n4flow.parameters import N4Parameters
from n4flow.sharpening import expected_log_values


class Kernels(Protocol):
    """Holds ``u - B`` on the sample grid, on its device, and works on it in passes.

    Tables and updates stay where they are made: they go from one pass to the next, and only
    `end_level` hands numbers to the host.
    """

    def start_level(self, lattice: np.ndarray, bases: Sequence[np.ndarray]) -> None:
        """Take the control points of B on the mesh of a level, and its basis matrices (n_axis, m_axis)."""

    def sharpen(self) -> Any:
        """Expected sharp log intensity over the histogram of ``u - B``, as a look-up table."""

    def fit(self, table: Any) -> Any:
        """Control points that approximate the residual ``(u - B) - E(u - B)``, with E the table."""

    def subtract(self, update: Any) -> None:
        """Add the spline with these control points to B, and note how much that changed."""

    def converged(self) -> bool:
        """Whether the level may end; may be late by a few iterations, which then do nothing."""

    def end_level(self) -> tuple[np.ndarray, list[float]]:
        """Control points of B, and the coefficient of variation of ``exp(-update)`` at each iteration.

        Where already the first update is below the threshold there is nothing to find on this mesh,
        and the update is taken back.
        """


class Oriented(NamedTuple):
    """Samples with their longest axis last, along which kernels in float32 keep their voxels in rows."""

    axes: tuple[int, ...]  # of the samples, in this order
    log_image: np.ndarray
    weights: np.ndarray
    inside: np.ndarray  # bool: where the weight is above 0
    low: float  # smallest log intensity inside
    high: float  # largest

    @classmethod
    def of(cls, log_image: np.ndarray, weights: np.ndarray) -> Oriented:
        axes = tuple(np.argsort(log_image.shape, kind="stable"))
        inside = weights > 0
        in_memory = np.argsort(log_image.strides)[::-1]  # an index in another order than the array's is slow
        used = log_image.transpose(in_memory)[inside.transpose(in_memory)]
        log_image, weights, inside = log_image.transpose(axes), weights.transpose(axes), inside.transpose(axes)
        return cls(axes, log_image, weights, inside, float(used.min()), float(used.max()))

    @property
    def centre(self) -> float:
        """What voxels are stored relative to: around 0, float32 has digits to spare."""
        return (self.low + self.high) / 2


class Statistics(NamedTuple):
    """What subtracting an update finds inside the mask."""

    low: float  # smallest of u - B
    high: float  # largest
    cv: float  # coefficient of variation of exp(-update), as N4 measures convergence


class HostKernels(ABC):
    """`Kernels` whose small arrays are NumPy's: what is left to do is the three passes.

    Parameters
    ----------
    parameters : N4Parameters
    low, high : float
        Smallest and largest log intensity inside the mask.
    """

    def __init__(self, parameters: N4Parameters, low: float, high: float) -> None:
        self.parameters = parameters
        self.low, self.high = low, high
        self.cvs: list[float] = []  # of all levels

    def start_level(self, lattice: np.ndarray, bases: Sequence[np.ndarray]) -> None:
        self.lattice = self.start = lattice
        self.first = len(self.cvs)
        self.set_mesh(bases)

    def sharpen(self) -> np.ndarray:
        given = self.parameters
        histogram = self.histogram()
        return expected_log_values(histogram, self.low, self.high, fwhm=given.fwhm, wiener_noise=given.wiener_noise)

    def subtract(self, update: np.ndarray) -> None:
        self.low, self.high, cv = self.subtract_update(update)
        self.lattice, self.update = self.lattice + update, update
        self.cvs.append(cv)

    def converged(self) -> bool:
        if self.low == self.high:
            return True
        return len(self.cvs) > self.first and self.cvs[-1] <= self.parameters.threshold_after(self.cvs)

    def end_level(self) -> tuple[np.ndarray, list[float]]:
        cvs = self.cvs[self.first :]
        if len(cvs) == 1 and cvs[0] <= self.parameters.threshold_after(self.cvs):
            self.low, self.high, _ = self.subtract_update(-self.update)
            self.lattice = self.start
        return self.lattice, cvs

    @abstractmethod
    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        """Take the basis matrices of a level; compute ``omega`` once."""

    @abstractmethod
    def histogram(self) -> np.ndarray:
        """Histogram of ``u - B`` as `sharpening.linear_histogram` defines it."""

    @abstractmethod
    def fit(self, table: np.ndarray) -> np.ndarray:
        """As `Kernels.fit`."""

    @abstractmethod
    def subtract_update(self, update: np.ndarray) -> Statistics:
        """Subtract a spline from ``u - B``."""
