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

from n4flow.core.fit import SplineFit
from n4flow.core.sharpening import expected_log_values, sharpening_gain
from n4flow.parameters import N4Parameters, Stage


class Kernels(Protocol):
    """Holds ``u - B`` on the sample grid, on its device, and works on it in passes.

    What is expected, and updates, stay where they are made: they go from one pass to the next, and only
    `end_stage` hands numbers to the host.
    """

    def start_stage(self, stage: Stage, fit: SplineFit, lattice: np.ndarray) -> None:
        """Take what a stage does, the fit on its mesh, and the control points of B there.

        As long as the fit is the same object, so is the mesh: nothing is made anew for it.
        """

    def sharpen(self) -> Any:
        """What is expected over the histogram of ``u - B``: sharp log intensities as a look-up table, and the gain."""

    def fit(self, expected: Any) -> Any:
        """Control points that the fit makes of the residual ``(u - B) - E(u - B)``, with E the table."""

    def subtract(self, update: Any) -> None:
        """Add the spline with these control points to B, and note how much that changed."""

    def converged(self) -> bool:
        """Whether the stage may end; may be late by a few iterations, which then do nothing."""

    def end_stage(self) -> tuple[np.ndarray, list[float]]:
        """Control points of B, and the coefficient of variation of ``exp(-update)`` at each iteration."""


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


class Expected(NamedTuple):
    """What sharpening a histogram finds."""

    table: np.ndarray  # (bins,): expected sharp log intensity at the bin centres
    gain: float  # see `sharpening.sharpening_gain`


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
        self.spline_fit: SplineFit | None = None

    def start_stage(self, stage: Stage, fit: SplineFit, lattice: np.ndarray) -> None:
        if fit is not self.spline_fit:
            self.set_mesh(fit.bases, fit.matrices)
        self.stage, self.spline_fit, self.lattice = stage, fit, lattice
        self.cvs: list[float] = []

    def sharpen(self) -> Expected:
        histogram = self.histogram()
        table = expected_log_values(
            histogram,
            self.low,
            self.high,
            fwhm=self.stage.fwhm,
            wiener_noise=self.parameters.wiener_noise,
            twicing=self.stage.twicing,
            as_itk=self.parameters.as_itk,
        )
        return Expected(table, sharpening_gain(histogram, table, self.low, self.high))

    def fit(self, expected: Expected) -> np.ndarray:
        assert self.spline_fit
        return self.spline_fit.update(self.gather(expected.table), self.lattice, expected.gain, self.stage.fwhm)

    def subtract(self, update: np.ndarray) -> None:
        self.low, self.high, cv = self.subtract_update(update)
        self.lattice = self.lattice + update
        self.cvs.append(cv)

    def converged(self) -> bool:
        return self.low == self.high or (len(self.cvs) > 0 and self.cvs[-1] <= self.parameters.convergence_threshold)

    def end_stage(self) -> tuple[np.ndarray, list[float]]:
        return self.lattice, self.cvs

    @abstractmethod
    def set_mesh(self, bases: Sequence[np.ndarray], matrices: Sequence[np.ndarray]) -> None:
        """Take the basis matrices of a mesh, and those with which the residual is gathered."""

    @abstractmethod
    def histogram(self) -> np.ndarray:
        """Histogram of ``u - B`` as `sharpening.linear_histogram` defines it."""

    @abstractmethod
    def gather(self, table: np.ndarray) -> np.ndarray:
        """Sum of the weighted residual over the voxels, contracted with the matrices of the fit."""

    @abstractmethod
    def subtract_update(self, update: np.ndarray) -> Statistics:
        """Subtract a spline from ``u - B``."""
