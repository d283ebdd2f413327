"""The three passes as array code in float64: the readable truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from n4flow.core.bspline import contract, expand
from n4flow.core.sharpening import linear_histogram, look_up
from n4flow.kernels.protocol import HostKernels, Statistics
from n4flow.parameters import N4Parameters

#: Voxels worked on at a time. Blocks bound the temporary arrays, and since they do not depend on
#: the machine, neither does the order in which their sums are added.
BLOCK_VOXELS = 2**18


class PlainKernels(HostKernels):
    """`protocol.Kernels` in float64 array code.

    Parameters
    ----------
    log_image : (n0, n1, n2) float64 array
        Log intensities on the sample grid; anything where the weight is 0.
    weights : (n0, n1, n2) array of bool or float
        Confidence of each sample; 0 outside the mask. It gates the histogram and weights the fit.
    parameters : N4Parameters
    """

    def __init__(self, log_image: np.ndarray, weights: np.ndarray, parameters: N4Parameters) -> None:
        inside = weights > 0
        self.weights = weights
        self.values = np.where(inside, log_image, 0)
        self.count = int(inside.sum())
        planes = max(1, BLOCK_VOXELS // max(1, self.values[0].size))
        self.blocks = [slice(i, i + planes) for i in range(0, len(self.values), planes)]
        used = self.values[inside]
        super().__init__(parameters, float(used.min()), float(used.max()))

    def set_mesh(self, bases: Sequence[np.ndarray], matrices: Sequence[np.ndarray]) -> None:
        self.bases, self.matrices = bases, matrices

    def histogram(self) -> np.ndarray:
        bins = self.parameters.histogram_bins
        parts = [linear_histogram(values, self.low, self.high, bins) for values, _, _ in self._inside()]
        return np.sum(parts, axis=0)

    def gather(self, table: np.ndarray) -> np.ndarray:
        a, b, c = self.matrices
        total: Any = 0
        for values, inside, block in self._inside():
            residual = np.zeros(inside.shape)
            residual[inside] = values - look_up(values, table, self.low, self.high)
            residual *= self.weights[block]
            total = total + contract(residual, (a[block], b, c))
        return np.asarray(total)

    def subtract_update(self, update: np.ndarray) -> Statistics:
        a, b, c = self.bases
        lows, highs, total, squares = [], [], 0.0, 0.0
        for block in self.blocks:
            field = expand(update, (a[block], b, c))
            inside = self.weights[block] > 0
            self.values[block] -= np.where(inside, field, 0)
            values = self.values[block][inside]
            if values.size == 0:
                continue
            change = np.expm1(-field[inside])
            lows.append(float(values.min()))
            highs.append(float(values.max()))
            total += float(change.sum())
            squares += float((change**2).sum())
        variance = (squares - total**2 / self.count) / (self.count - 1)
        return Statistics(min(lows), max(highs), max(variance, 0) ** 0.5 / (1 + total / self.count))

    def _inside(self) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
        """Values inside the mask, where they lie, and their block, block by block."""
        for block in self.blocks:
            inside = self.weights[block] > 0
            yield self.values[block][inside], inside, block
