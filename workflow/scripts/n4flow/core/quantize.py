"""Voxels divided by a field, in the type that they are kept in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Counts(NamedTuple):
    """Voxels of a tile of which something was seen."""

    fill: int
    saturated: int
    clipped: int


class Rounding:
    """``(v - offset) / ratio + offset`` in float64, and then in the type of the output.

    Parameters
    ----------
    source, target : numpy dtype
    fill : number
        Voxels of this value keep it: nothing was ever written there.
    keep_saturated : bool
        Voxels of the largest value of an integer `source` become the largest of an integer `target`, or keep their
        value in one of floats.
    """

    def __init__(self, source: np.dtype, target: np.dtype, fill: Any, keep_saturated: bool) -> None:
        self.fill = fill
        self.whole = target.kind in "iu"
        self._is_nan = bool(fill != fill)
        self._top = np.iinfo(source).max if source.kind in "iu" else None
        self._keep = keep_saturated and self._top is not None
        self._least, self._most = -np.inf, np.inf
        if self.whole:
            limits = np.iinfo(target)
            # the largest float64 that is no larger than the largest integer
            top = float(limits.max)
            self._least, self._most = float(limits.min), top if int(top) <= limits.max else float(np.nextafter(top, 0))
            self._kept_as = limits.max

    def __call__(self, values: np.ndarray, ratio: np.ndarray, offset: float, out: np.ndarray) -> Counts:
        """Divide a tile.

        Parameters
        ----------
        values : array
        ratio : float64 array of the same shape
        offset : float
        out : array of the same shape
            Where the result is put.
        """
        is_fill = np.isnan(values) if self._is_nan else values == self.fill
        fill = int(np.count_nonzero(is_fill))
        if offset:
            result = values - np.float64(offset)
            result /= ratio
            result += offset
        else:
            result = np.divide(values, ratio, dtype=np.float64)
        saturated = clipped = 0
        is_top = None
        if self._top is not None and values.max(initial=0) == self._top:
            is_top = values == self._top
            saturated = int(np.count_nonzero(is_top))
        if self.whole:
            np.rint(result, out=result)
            if fill:
                result[is_fill] = 0
            if result.max(initial=0) > self._most or result.min(initial=0) < self._least:
                beyond = (result > self._most) | (result < self._least)
                if is_top is not None and self._keep:
                    beyond &= ~is_top
                clipped = int(np.count_nonzero(beyond))
                np.clip(result, self._least, self._most, out=result)
        with np.errstate(over="ignore"):
            np.copyto(out, result, casting="unsafe")
        if is_top is not None and self._keep:
            out[is_top] = self._kept_as if self.whole else self._top
        if fill:
            out[is_fill] = self.fill
        return Counts(fill, saturated, clipped)

    def is_plain(self, values: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Where voxels come out as the formula has them, but for rounding."""
        is_fill = np.isnan(values) if self._is_nan else values == self.fill
        plain = ~is_fill & np.isfinite(expected) & (expected >= self._least) & (expected <= self._most)
        return plain & (values != self._top) if self._top is not None else plain
