"""The three passes compiled for the CPU, in float32, bit-identical for any number of threads.

Voxels lie in rows along the longest axis: the pieces of each line of the grid that hold voxels of the
mask, one behind the other. Every inner loop runs along a row and adds element by element to arrays of
the line's length, so that it is vectorised without any sum changing its order: the bits hang neither
on the width of the CPU's vectors nor, since planes form fixed chunks whose sums are added in order, on
the threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]
from numba import njit

from n4flow.bspline import divide_where_seen, fit_matrices
from n4flow.kernels.protocol import HostKernels, Oriented, Statistics
from n4flow.parameters import N4Parameters

#: Rows begin and end at multiples of this, the widest vector of float32.
LANES = 16

#: Planes form chunks of so many voxels, which threads share; more than so many chunks would only cost memory.
CHUNK_VOXELS, CHUNKS = 2**14, 64

#: A histogram entry holds the count from this bit on, and below it the shares of the upper bins. 2**23 voxels fit;
#: after half as many, and a row, it is added to the totals.
COUNT_BIT = 40
SHARE_UNIT = 2**16
ENTRY_VOXELS = 2**22

#: A Taylor series of exp serves up to here; larger arguments are halved, and the result squared.
SERIES_LIMIT = 0.25

# a folder for each kind of CPU, since machines may share a home, and outside of the package, which may be read-only
if not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "n4flow" / f"numba-{numba.__version__}-{get_host_cpu_name()}"
    numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined]


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function when it is first called, once a machine; once a process where no cache can be written."""
    try:
        return njit(function, cache=True, nogil=True, error_model="numpy")
    except (RuntimeError, OSError):
        return njit(function, nogil=True, error_model="numpy")


class Rows(NamedTuple):
    """Voxels of the mask, with those between them along a row; a line of the grid may hold several rows."""

    values: np.ndarray  # (voxels,) float32: u - B, less a constant
    weights: np.ndarray  # (voxels,) float32: 0 outside the mask
    plane: np.ndarray  # (planes + 1,): first row of each plane
    place: np.ndarray  # (rows,): index of its line in the plane
    start: np.ndarray  # (rows,): index of its first voxel along the line
    offset: np.ndarray  # (rows + 1,): its first voxel in `values`
    chunks: np.ndarray  # (chunks + 1,): first plane of each chunk


class Taps(NamedTuple):
    """A basis matrix by its four entries per row that are not 0."""

    column: np.ndarray  # (n,) int64: the first of the four
    weight: np.ndarray  # (n, 4) float32


def taps_of(matrix: np.ndarray) -> Taps:
    """The taps of a matrix (n, m); they may reach three columns beyond it, with weight 0."""
    column = (matrix != 0).argmax(axis=1)
    padded = np.pad(matrix, ((0, 0), (0, 3)))
    return Taps(column, np.take_along_axis(padded, column[:, None] + np.arange(4), axis=1).astype(np.float32))


class CompiledKernels(HostKernels):
    """`Kernels` in compiled float32 code with exact histograms and float64 sums.

    Parameters
    ----------
    log_image : (n0, n1, n2) array
        Log intensities on the sample grid; anything where the weight is 0.
    weights : (n0, n1, n2) array of bool or float
        Confidence of each sample; 0 outside the mask. It gates the histogram and weights the fit.
    parameters : N4Parameters
    threads : int
    """

    def __init__(self, log_image: np.ndarray, weights: np.ndarray, parameters: N4Parameters, threads: int) -> None:
        samples = Oriented.of(log_image, weights)
        self.axes, self.centre = samples.axes, samples.centre
        self.rows = _rows(samples)
        self.count = int(samples.inside.sum())
        self.threads, self.pool = threads, ThreadPoolExecutor(max(1, threads - 1))
        self.length = -(-samples.log_image.shape[2] // LANES) * LANES
        # the extremes as they are in float32
        extremes = (float(np.float32(v - self.centre)) + self.centre for v in (samples.low, samples.high))
        super().__init__(parameters, *extremes)

    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        bases = [bases[axis] for axis in self.axes]
        self.lattice_shape = tuple(basis.shape[1] for basis in bases)
        omega_matrices, delta_matrices = fit_matrices(bases)
        self.taps = [taps_of(basis) for basis in bases]
        self.delta_taps = [taps_of(matrix) for matrix in delta_matrices]
        chunks, column = self.rows.chunks, self.taps[0].column
        reach = max(column[end - 1] - column[start] for start, end in pairwise(chunks)) + 4
        self.parts = np.empty((len(chunks) - 1, reach, self.lattice_shape[1] + 3, self.length), np.float32)
        self.omega = self._contract(np.zeros((2, 0), np.float32), [taps_of(matrix) for matrix in omega_matrices])

    def histogram(self, bins: int) -> np.ndarray:
        found = np.zeros((len(self.rows.chunks) - 1, 2, bins), dtype=np.int64)
        self._share_out(_histogram, self.rows, *self._bin_scale(bins), bins, self.length, ENTRY_VOXELS, found)
        counts, shares = found.sum(axis=0)
        shares = shares / SHARE_UNIT
        total = counts - shares
        total[1:] += shares[:-1]
        return total

    def fit(self, table: np.ndarray) -> np.ndarray:
        # between two bin centres the residual is a line of the value, which is relative to the centre
        low, per_unit = self.low - self.centre, (len(table) - 1) / (self.high - self.low)
        slope = 1 - np.diff(table) * per_unit
        at_bin = low + np.arange(len(table) - 1) / per_unit
        lines = np.stack([at_bin - (table[:-1] - self.centre) - slope * at_bin, slope]).astype(np.float32)
        delta = self._contract(lines, self.delta_taps)
        return divide_where_seen(delta, self.omega).transpose(np.argsort(self.axes))

    def subtract_update(self, update: np.ndarray) -> Statistics:
        update = update.transpose(self.axes)
        along = np.zeros((*(m + 3 for m in self.lattice_shape[:2]), self.length), dtype=np.float32)
        _expand_rows(np.ascontiguousarray(update), self.taps[2], along)
        halvings = max(0, int(np.ceil(np.log2(max(np.abs(update).max(), 1e-30) / SERIES_LIMIT))))
        found = np.zeros((len(self.rows.chunks) - 1, 4))
        self._share_out(_subtract, self.rows, along, self.taps[0], self.taps[1], halvings, found)
        total, squares = found[:, 2].sum(), found[:, 3].sum()
        variance = (squares - total**2 / self.count) / (self.count - 1)
        return Statistics(
            float(found[:, 0].min()) + self.centre,
            float(found[:, 1].max()) + self.centre,
            float(max(variance, 0) ** 0.5 / (1 + total / self.count)),
        )

    def _contract(self, lines: np.ndarray, taps: Sequence[Taps]) -> np.ndarray:
        """Contraction of the residual onto the lattice; of the weights, if it has no lines."""
        first, second, third = taps
        m0, m1, m2 = self.lattice_shape
        scale = self._bin_scale(lines.shape[1] + 1)
        self._share_out(_contract, self.rows, *scale, lines, first, second, self.parts)
        planes = np.zeros((m0 + 3, m1 + 3, self.length))
        _gather(self.parts, self.rows.chunks, first.column, planes)
        result = np.zeros((m0, m1, m2 + 3))
        _contract_rows(planes, third, result)
        return result[:, :, :m2]

    def _bin_scale(self, bins: int) -> tuple[np.float32, np.float32]:
        """Value of the first bin centre, and bins per unit."""
        low, high = np.float32(self.low - self.centre), np.float32(self.high - self.centre)
        return low, np.float32((bins - 1) / (float(high) - float(low)) if high > low else 0)

    def _share_out(self, kernel: Callable[..., None], *arguments: Any) -> None:
        """Run a pass over all chunks; each thread, this one too, takes every n-th."""
        others = [self.pool.submit(kernel, thread, self.threads, *arguments) for thread in range(1, self.threads)]
        kernel(0, self.threads, *arguments)
        for other in others:
            other.result()


def _rows(samples: Oriented) -> Rows:
    n0, n1, n2 = samples.inside.shape
    pieces = -(-n2 // LANES)
    grid = np.zeros((n0, n1, pieces * LANES), dtype=np.float32)
    lanes = grid.reshape(n0, n1, pieces, LANES)
    grid[:, :, :n2] = samples.weights
    held = lanes.any(axis=3)
    weights = lanes[held].ravel()
    np.subtract(samples.log_image, samples.centre, out=grid[:, :, :n2], casting="same_kind")
    values = lanes[held].ravel()
    values[weights == 0] = 0
    edges = np.diff(held.astype(np.int8), axis=2, prepend=0, append=0)
    (plane, line, start), end = np.nonzero(edges == 1), np.nonzero(edges == -1)[2]
    offset = np.concatenate([[0], np.cumsum((end - start) * LANES)])
    row_of_plane = np.searchsorted(plane, np.arange(n0 + 1))
    shares = np.linspace(0, offset[-1], min(CHUNKS, max(1, offset[-1] // CHUNK_VOXELS)) + 1)
    chunks = np.unique([0, *np.searchsorted(offset[row_of_plane], shares[1:-1]), n0])
    return Rows(values, weights, row_of_plane, line, start * LANES, offset, chunks)


@compiled
def _expand_rows(lattice: np.ndarray, taps: Taps, along: np.ndarray) -> None:
    """Evaluate the lattice along its last axis."""
    for a in range(lattice.shape[0]):
        for b in range(lattice.shape[1]):
            for k in range(len(taps.column)):
                value = 0.0
                for q in range(4):
                    c = taps.column[k] + q
                    if c < lattice.shape[2]:
                        value += lattice[a, b, c] * taps.weight[k, q]
                along[a, b, k] = value


@compiled
def _gather(parts: np.ndarray, chunks: np.ndarray, column: np.ndarray, planes: np.ndarray) -> None:
    """Add what the chunks found, in their order."""
    for chunk in range(len(parts)):
        first = column[chunks[chunk]]
        for a in range(column[chunks[chunk + 1] - 1] - first + 4):
            for b in range(planes.shape[1]):
                part, total = parts[chunk, a, b], planes[first + a, b]
                for k in range(len(total)):
                    total[k] += part[k]


@compiled
def _contract_rows(along: np.ndarray, taps: Taps, lattice: np.ndarray) -> None:
    """The transpose of `_expand_rows`."""
    for a in range(lattice.shape[0]):
        for b in range(lattice.shape[1]):
            for k in range(len(taps.column)):
                for q in range(4):
                    lattice[a, b, taps.column[k] + q] += along[a, b, k] * taps.weight[k, q]


@compiled
def _subtract(
    thread: int,
    threads: int,
    rows: Rows,
    along: np.ndarray,
    first: Taps,
    second: Taps,
    halvings: int,
    found: np.ndarray,
) -> None:
    """Subtract the update; find smallest and largest value, and the sums of expm1(-update) and its square."""
    length = along.shape[2]
    plane = np.empty((along.shape[1], length), np.float32)
    smallest, largest, sums, squares, changes = np.empty((5, length), np.float32)
    one, two, zero, infinity = np.float32(1), np.float32(2), np.float32(0), np.float32(np.inf)
    c2, c3, c4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
    c5, c6 = np.float32(1 / 120), np.float32(1 / 720)
    scale = np.float32(-(0.5**halvings))
    for chunk in range(thread, len(rows.chunks) - 1, threads):
        smallest[:], largest[:] = infinity, -infinity
        for i in range(rows.chunks[chunk], rows.chunks[chunk + 1]):
            _expand_plane(along, first.column[i], first.weight[i], plane)
            sums[:], squares[:] = zero, zero
            for row in range(rows.plane[i], rows.plane[i + 1]):
                j, at, end = rows.place[row], rows.offset[row], rows.offset[row + 1]
                n, k0 = end - at, rows.start[row]
                values, weights = rows.values[at:end], rows.weights[at:end]
                w0, w1, w2, w3 = second.weight[j]
                b = second.column[j]
                p0, p1, p2, p3 = (
                    plane[b, k0 : k0 + n],
                    plane[b + 1, k0 : k0 + n],
                    plane[b + 2, k0 : k0 + n],
                    plane[b + 3, k0 : k0 + n],
                )
                low, high = smallest[k0 : k0 + n], largest[k0 : k0 + n]
                total, square = sums[k0 : k0 + n], squares[k0 : k0 + n]
                for k in range(n):
                    field = w0 * p0[k] + w1 * p1[k] + w2 * p2[k] + w3 * p3[k]
                    value = values[k] - field
                    values[k] = value
                    inside = weights[k] > zero
                    low[k] = min(low[k], value if inside else infinity)
                    high[k] = max(high[k], value if inside else -infinity)
                    x = field * scale
                    series = x * (one + x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * c6)))))
                    changes[k] = series if inside else zero
                for _ in range(halvings):
                    for k in range(n):
                        changes[k] = changes[k] * (two + changes[k])
                for k in range(n):
                    total[k] += changes[k]
                    square[k] += changes[k] * changes[k]
            for k in range(length):
                found[chunk, 2] += sums[k]
                found[chunk, 3] += squares[k]
        found[chunk, 0], found[chunk, 1] = smallest.min(), largest.max()


@compiled
def _expand_plane(along: np.ndarray, column: int, weight: np.ndarray, plane: np.ndarray) -> None:
    """Evaluate the lattice along its first axis, for one plane."""
    w0, w1, w2, w3 = weight
    for b in range(plane.shape[0]):
        l0, l1, l2, l3 = along[column, b], along[column + 1, b], along[column + 2, b], along[column + 3, b]
        out = plane[b]
        for k in range(len(out)):
            out[k] = w0 * l0[k] + w1 * l1[k] + w2 * l2[k] + w3 * l3[k]


@compiled
def _histogram(
    thread: int,
    threads: int,
    rows: Rows,
    low: np.float32,
    scale: np.float32,
    bins: int,
    length: int,
    entry_voxels: int,
    found: np.ndarray,
) -> None:
    """Count and share of each bin in one number; four histograms in turn, so that none waits for its memory."""
    index, share = np.empty(length, np.int32), np.empty(length, np.int32)
    parts = np.empty((4, bins + 1), np.int64)
    zero, top, first, last = np.float32(0), np.float32(bins - 1), np.int32(0), np.int32(bins - 2)
    unit, half, one = np.float32(SHARE_UNIT), np.float32(0.5), np.int64(1) << COUNT_BIT
    for chunk in range(thread, len(rows.chunks) - 1, threads):
        parts[:] = 0
        held = 0
        end_row = rows.plane[rows.chunks[chunk + 1]]
        for row in range(rows.plane[rows.chunks[chunk]], end_row):
            at, end = rows.offset[row], rows.offset[row + 1]
            values, weights = rows.values[at:end], rows.weights[at:end]
            for k in range(end - at):
                position = min(max((values[k] - low) * scale, zero), top)
                bin_ = max(min(np.int32(position), last), first)
                share[k] = np.int32((position - np.float32(bin_)) * unit + half)
                index[k] = bin_ if weights[k] > zero else np.int32(bins)
            for k in range(0, end - at, 4):
                parts[0, np.uint32(index[k])] += one + share[k]
                parts[1, np.uint32(index[k + 1])] += one + share[k + 1]
                parts[2, np.uint32(index[k + 2])] += one + share[k + 2]
                parts[3, np.uint32(index[k + 3])] += one + share[k + 3]
            held += end - at
            if held > entry_voxels or row == end_row - 1:
                for part in range(4):
                    for b in range(bins):
                        found[chunk, 0, b] += parts[part, b] >> COUNT_BIT
                        found[chunk, 1, b] += parts[part, b] & (one - 1)
                parts[:] = 0
                held = 0


@compiled
def _contract(
    thread: int,
    threads: int,
    rows: Rows,
    low: np.float32,
    scale: np.float32,
    lines: np.ndarray,
    first: Taps,
    second: Taps,
    parts: np.ndarray,
) -> None:
    """Sum of the weighted residual (of the weights, without lines) onto two axes of the lattice."""
    length = parts.shape[3]
    plane = np.empty_like(parts[0, 0], np.float32)
    residual, index = np.empty(length, np.float32), np.empty(length, np.int32)
    offset, slope = lines
    zero, last = np.float32(0), np.float32(len(slope) - 1)
    for chunk in range(thread, len(rows.chunks) - 1, threads):
        start = rows.chunks[chunk]
        parts[chunk] = zero
        for i in range(start, rows.chunks[chunk + 1]):
            plane[:] = zero
            for row in range(rows.plane[i], rows.plane[i + 1]):
                j, at, end = rows.place[row], rows.offset[row], rows.offset[row + 1]
                n, k0 = end - at, rows.start[row]
                values, weights = rows.values[at:end], rows.weights[at:end]
                if len(slope):
                    for k in range(n):
                        index[k] = max(np.int32(min(max((values[k] - low) * scale, zero), last)), np.int32(0))
                    for k in range(n):
                        line = np.uint32(index[k])
                        residual[k] = (offset[line] + values[k] * slope[line]) * weights[k]
                else:
                    for k in range(n):
                        residual[k] = weights[k]
                w0, w1, w2, w3 = second.weight[j]
                b = second.column[j]
                p0, p1, p2, p3 = (
                    plane[b, k0 : k0 + n],
                    plane[b + 1, k0 : k0 + n],
                    plane[b + 2, k0 : k0 + n],
                    plane[b + 3, k0 : k0 + n],
                )
                for k in range(n):
                    p0[k] += w0 * residual[k]
                    p1[k] += w1 * residual[k]
                    p2[k] += w2 * residual[k]
                    p3[k] += w3 * residual[k]
            for q in range(4):
                weight = first.weight[i, q]
                for b in range(plane.shape[0]):
                    total = parts[chunk, first.column[i] - first.column[start] + q, b]
                    line = plane[b]
                    for k in range(length):
                        total[k] += weight * line[k]
