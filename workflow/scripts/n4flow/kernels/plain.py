"""The three passes as array code: one text for NumPy and CuPy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from n4flow.bspline import contract, divide_where_seen, expand, fit_matrices
from n4flow.device import to_host
from n4flow.kernels.protocol import Statistics
from n4flow.sharpening import linear_histogram, look_up

#: Voxels worked on at a time. Blocks bound the temporary arrays, and since they do not depend on
#: the machine, neither does the order in which their sums are added.
BLOCK_VOXELS = {"numpy": 2**18, "cupy": 2**26}


class PlainKernels:
    """`Kernels` in float64 array code.

    Parameters
    ----------
    log_image : (n0, n1, n2) float64 array
        Log intensities on the sample grid; anything where the weight is 0.
    weights : (n0, n1, n2) array of bool or float
        Confidence of each sample; 0 outside the mask. It gates the histogram and weights the fit.
    xp : module
        numpy or cupy.
    """

    def __init__(self, log_image: np.ndarray, weights: np.ndarray, xp: Any) -> None:
        self.xp = xp
        self.weights = xp.asarray(weights)
        self.values = xp.where(self.weights > 0, xp.asarray(log_image, dtype=np.float64), 0)
        self.count = int((self.weights > 0).sum())
        planes = max(1, BLOCK_VOXELS[xp.__name__] // max(1, self.values[0].size))
        self.blocks = [slice(i, i + planes) for i in range(0, len(self.values), planes)]

    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        omega_matrices, delta_matrices = fit_matrices(bases)
        self.bases = [self.xp.asarray(basis) for basis in bases]
        self.delta_matrices = [self.xp.asarray(matrix) for matrix in delta_matrices]
        a, b, c = (self.xp.asarray(matrix) for matrix in omega_matrices)
        self.omega: Any = sum(
            contract(self.weights[block].astype(np.float64), (a[block], b, c)) for block in self.blocks
        )

    def subtract(self, update: np.ndarray) -> Statistics:
        a, b, c = self.bases
        lattice = self.xp.asarray(update)
        lows, highs, total, squares = [], [], 0.0, 0.0
        for block in self.blocks:
            field = expand(lattice, (a[block], b, c))
            inside = self.weights[block] > 0
            self.values[block] -= self.xp.where(inside, field, 0)
            values = self.values[block][inside]
            if values.size == 0:
                continue
            change = self.xp.expm1(-field[inside])
            lows.append(float(values.min()))
            highs.append(float(values.max()))
            total += float(change.sum())
            squares += float((change**2).sum())
        variance = (squares - total**2 / self.count) / (self.count - 1)
        return Statistics(min(lows), max(highs), max(variance, 0) ** 0.5 / (1 + total / self.count))

    def histogram(self, low: float, high: float, bins: int) -> np.ndarray:
        parts = [linear_histogram(values, low, high, bins) for values, _, _ in self._inside()]
        return to_host(sum(parts))

    def fit(self, table: np.ndarray, low: float, high: float) -> np.ndarray:
        _, b, c = self.delta_matrices
        on_device = self.xp.asarray(table)
        delta: Any = 0
        for values, inside, block in self._inside():
            residual = self.xp.zeros(inside.shape)
            residual[inside] = values - look_up(values, on_device, low, high)
            residual *= self.weights[block]
            delta = delta + contract(residual, (self.delta_matrices[0][block], b, c))
        return to_host(divide_where_seen(delta, self.omega))

    def _inside(self) -> Iterator[tuple[Any, Any, slice]]:
        """Values inside the mask, where they lie, and their block, block by block."""
        for block in self.blocks:
            inside = self.weights[block] > 0
            yield self.values[block][inside], inside, block
