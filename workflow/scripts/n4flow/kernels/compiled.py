"""The three passes compiled for the CPU, in float32, bit-identical for any number of threads.

Voxels lie in rows along the longest axis: the pieces of each line of the grid that hold voxels of the
mask, one behind the other. Every inner loop runs along a row and adds element by element to arrays of
the line's length, so that it is vectorised without any sum changing its order: the bits hang neither
on the width of the CPU's vectors nor, since planes form fixed chunks whose sums are added in order, on
the threads.

All indices are unsigned: with them a compiler need not ask whether they count from the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]
from numba import njit
from numba.core.caching import FunctionCache

from n4flow.bspline import divide_where_seen, fit_matrices
from n4flow.kernels import threads
from n4flow.kernels.protocol import HostKernels, Oriented, Statistics
from n4flow.kernels.threads import APART, add, give_way, publish, read, replace, seconds
from n4flow.parameters import N4Parameters

log = logging.getLogger(__name__)

#: Rows begin and end at multiples of this, the widest vector of float32.
LANES = 16

#: Planes form chunks of so many voxels, which threads share; more than so many chunks would only cost memory.
CHUNK_VOXELS, CHUNKS = 2**14, 64

#: A histogram entry holds the count from this bit on, and below it the shares of the upper bins. 2**23 voxels fit;
#: after half as many, and a row, it is added to the totals.
COUNT_BIT = 40
SHARE_UNIT = 2**16
ENTRY_VOXELS = 2**22

#: Passes over the voxels; the last one is none, but the end of the threads that wait.
OMEGA, HISTOGRAM, DELTA, SUBTRACT, LEAVE = range(5)

#: Where the numbers stand that tell the threads what to do: number and step of a pass, and how many chunks are done.
PASS, DONE = 0, APART
STEP_BITS = 3

#: A thread that waits for the next pass looks so often (milliseconds: there is little to do between two passes), and
#: no longer than so many seconds (where others keep the core busy).
PATIENCE, PATIENCE_S = 2**13, 2

ZERO, ONE, TWO, THREE, FOUR = (np.uint64(n) for n in range(5))

#: A Taylor series of exp serves up to here; larger arguments are halved, and the result squared.
SERIES_LIMIT = 0.25


def cache_folder() -> str:
    """Where compiled code is kept: a folder for each kind of CPU, since machines may share a home.

    It is outside of the package, which may be read-only. Numba looks for changes of this file alone, and not of the
    other one that goes into the compiled code, so that its content is part of the name.
    """
    caches = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    if not caches:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "n4flow")
    other = hashlib.sha256(Path(threads.__file__).read_bytes()).hexdigest()[:8]
    return str(Path(caches, f"numba-{numba.__version__}-{get_host_cpu_name()}-{other}"))


class Cache(FunctionCache):
    """Numba's cache on disk, that of each function; whatever is wrong with it, the code is compiled once more."""

    def load_overload(self, *arguments: Any) -> Any:
        """Compiled code, or None."""
        try:
            return super().load_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception as error:  # a file that was cut off, by anything
            log.warning("%s: compiled code cannot be read (%r); it is made anew", self.cache_path, error)
            with contextlib.suppress(Exception):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, *arguments: Any) -> None:
        """Keep compiled code, if there is room."""
        try:
            super().save_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception as error:
            log.warning("%s: compiled code cannot be kept there (%r)", self.cache_path, error)


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function when it is first called, once a machine; once a process where no cache can be written."""
    made = njit(function, nogil=True, error_model="numpy")
    of_user = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        numba.config.CACHE_DIR = cache_folder()  # type: ignore[attr-defined]
        made._cache = Cache(function)  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        pass
    finally:
        numba.config.CACHE_DIR = of_user  # type: ignore[attr-defined]
    return made


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

    column: np.ndarray  # (n,) uint64: the first of the four
    weight: np.ndarray  # (n, 4) float32


def taps_of(matrix: np.ndarray) -> Taps:
    """The taps of a matrix (n, m); they may reach three columns beyond it, with weight 0."""
    column = (matrix != 0).argmax(axis=1)
    padded = np.pad(matrix, ((0, 0), (0, 3)))
    weight = np.take_along_axis(padded, column[:, None] + np.arange(4), axis=1)
    return Taps(column.astype(np.uint64), weight.astype(np.float32))


class Work(NamedTuple):
    """What the threads share on a mesh. All memory is here: compiled code asks for none while it runs."""

    rows: Rows
    bases: tuple[Taps, Taps]  # of the first two axes
    delta: tuple[Taps, Taps]
    omega: tuple[Taps, Taps]
    # what a pass is given
    limits: np.ndarray  # (2,) float32: value of the first bin centre, and bins per unit
    lines: np.ndarray  # (2, bins - 1) float32: the residual between two bin centres, offset and slope
    along: np.ndarray  # (m0 + 3, m1 + 3, length) float32: the update, evaluated along the last axis
    halvings: np.ndarray  # (1,) uint64
    shift: np.ndarray  # (1,) float32: about the mean of expm1(-update), which is counted from there
    # what it finds, chunk by chunk
    counts: np.ndarray  # (chunks, 2, bins) int64: voxels, and shares of the upper bins
    parts: np.ndarray  # (chunks, reach, m1 + 3, length) float32: contraction onto the first two axes
    found: (
        np.ndarray
    )  # (chunks, 4) float64: smallest and largest value, sums of expm1(-update) less `shift`, and of its square
    planes: np.ndarray  # (m0 + 3, m1 + 3, length) float64: the sum of the parts
    # to work in, thread by thread; the last row stays free, so that threads do not write to one line of the cache
    plane: np.ndarray  # (threads, m1 + 3 + 1, length) float32
    line: np.ndarray  # (threads, 5 + 1, length) float32
    indices: np.ndarray  # (threads, 2 + 1, length) int32
    bins: np.ndarray  # (threads, 4 + 1, bins + 1) int64
    # who does what, see `_take_part`
    control: np.ndarray  # (2 * APART,) int64
    taken: np.ndarray  # (chunks,) int64: number of the last pass for which a thread has claimed the chunk


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
        self.threads = min(threads, len(self.rows.chunks) - 1)
        self.pool = ThreadPoolExecutor(max(1, self.threads - 1))
        self.length = -(-samples.log_image.shape[2] // LANES) * LANES
        # the extremes as they are in float32
        extremes = (float(np.float32(v - self.centre)) + self.centre for v in (samples.low, samples.high))
        super().__init__(parameters, *extremes)

    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        bases = [bases[axis] for axis in self.axes]
        self.lattice_shape = tuple(basis.shape[1] for basis in bases)
        of_bases, of_omega, of_delta = ([taps_of(matrix) for matrix in m] for m in (bases, *fit_matrices(bases)))
        self.last_basis, self.last_delta = of_bases[2], of_delta[2]
        m0, m1, _ = self.lattice_shape
        column = of_bases[0].column.astype(int)
        chunks, bins = len(self.rows.chunks) - 1, self.parameters.histogram_bins
        reach = max(column[end - 1] - column[start] for start, end in pairwise(self.rows.chunks.astype(int))) + 4
        self.work = Work(
            rows=self.rows,
            bases=(of_bases[0], of_bases[1]),
            delta=(of_delta[0], of_delta[1]),
            omega=(of_omega[0], of_omega[1]),
            limits=np.zeros(2, np.float32),
            lines=np.zeros((2, bins - 1), np.float32),
            along=np.zeros((m0 + 3, m1 + 3, self.length), np.float32),
            halvings=np.zeros(1, np.uint64),
            shift=np.zeros(1, np.float32),
            counts=np.zeros((chunks, 2, bins), np.int64),
            parts=np.zeros((chunks, reach, m1 + 3, self.length), np.float32),
            found=np.zeros((chunks, 4)),
            planes=np.zeros((m0 + 3, m1 + 3, self.length)),
            plane=np.zeros((self.threads, m1 + 4, self.length), np.float32),
            line=np.zeros((self.threads, 6, self.length), np.float32),
            indices=np.zeros((self.threads, 3, self.length), np.int32),
            bins=np.zeros((self.threads, 5, bins + 1), np.int64),
            control=np.zeros(2 * APART, np.int64),
            taken=np.zeros(chunks, np.int64),
        )
        self.helpers: dict[int, Future[None]] = {}
        self._pass(OMEGA)
        self.omega = self._onto_lattice(of_omega[2])

    def end_level(self) -> tuple[np.ndarray, list[float]]:
        ended = super().end_level()
        _take_part(0, LEAVE, self.work)
        return ended

    def histogram(self) -> np.ndarray:
        self._set_limits()
        self._pass(HISTOGRAM)
        counts, shares = self.work.counts.sum(axis=0)
        shares = shares / SHARE_UNIT
        total = counts - shares
        total[1:] += shares[:-1]
        return total

    def fit(self, table: np.ndarray) -> np.ndarray:
        # between two bin centres the residual is a line of the value, which is relative to the centre
        low, per_unit = self.low - self.centre, (len(table) - 1) / (self.high - self.low)
        slope = 1 - np.diff(table) * per_unit
        at_bin = low + np.arange(len(table) - 1) / per_unit
        self.work.lines[:] = at_bin - (table[:-1] - self.centre) - slope * at_bin, slope
        self._set_limits()
        self._pass(DELTA)
        return divide_where_seen(self._onto_lattice(self.last_delta), self.omega).transpose(np.argsort(self.axes))

    def subtract_update(self, update: np.ndarray) -> Statistics:
        update = update.transpose(self.axes)
        _expand_rows(np.ascontiguousarray(update), self.last_basis, self.work.along)
        self.work.halvings[0] = max(0, int(np.ceil(np.log2(max(np.abs(update).max(), 1e-30) / SERIES_LIMIT))))
        self.work.shift[0] = shift = np.float32(np.expm1(-update.mean()))
        self._pass(SUBTRACT)
        found = self.work.found
        total, squares = found[:, 2].sum(), found[:, 3].sum()
        variance = (squares - total**2 / self.count) / (self.count - 1)
        return Statistics(
            float(found[:, 0].min()) + self.centre,
            float(found[:, 1].max()) + self.centre,
            float(max(variance, 0) ** 0.5 / (1 + float(shift) + total / self.count)),
        )

    def _set_limits(self) -> None:
        low, high = np.float32(self.low - self.centre), np.float32(self.high - self.centre)
        bins = self.parameters.histogram_bins
        self.work.limits[:] = low, (bins - 1) / (float(high) - float(low)) if high > low else 0

    def _onto_lattice(self, last: Taps) -> np.ndarray:
        """What the chunks have contracted, added and contracted along the last axis."""
        m0, m1, m2 = self.lattice_shape
        _gather(self.work)
        result = np.zeros((m0, m1, m2 + 3))
        _contract_rows(self.work.planes, last, result)
        return result[:, :, :m2]

    def _pass(self, step: int) -> None:
        """Do a pass with all threads; those that have waited for it in vain, and have left, are called back."""
        for thread in range(1, self.threads):
            if thread not in self.helpers or self.helpers[thread].done():
                self.helpers[thread] = self.pool.submit(_take_part, thread, step, self.work)
        _take_part(0, step, self.work)


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
    indices = (np.array(a, dtype=np.uint64) for a in (row_of_plane, line, start * LANES, offset, chunks))
    return Rows(values, weights, *indices)


@compiled
def _expand_rows(lattice: np.ndarray, taps: Taps, along: np.ndarray) -> None:
    """Evaluate the lattice along its last axis."""
    for a in range(np.uint64(lattice.shape[0])):
        for b in range(np.uint64(lattice.shape[1])):
            for k in range(np.uint64(len(taps.column))):
                value = 0.0
                for q in range(FOUR):
                    c = taps.column[k] + q
                    if c < lattice.shape[2]:
                        value += lattice[a, b, c] * taps.weight[k, q]
                along[a, b, k] = value


@compiled
def _gather(work: Work) -> None:
    """Add what the chunks contracted, in their order."""
    chunks, column, parts, planes = work.rows.chunks, work.bases[0].column, work.parts, work.planes
    planes[:] = 0
    for chunk in range(np.uint64(len(parts))):
        first = column[chunks[chunk]]
        for a in range(column[chunks[chunk + ONE] - ONE] - first + FOUR):
            for b in range(np.uint64(planes.shape[1])):
                for k in range(np.uint64(planes.shape[2])):
                    planes[first + a, b, k] += parts[chunk, a, b, k]


@compiled
def _contract_rows(along: np.ndarray, taps: Taps, lattice: np.ndarray) -> None:
    """The transpose of `_expand_rows`."""
    for a in range(np.uint64(lattice.shape[0])):
        for b in range(np.uint64(lattice.shape[1])):
            for k in range(np.uint64(len(taps.column))):
                for q in range(FOUR):
                    lattice[a, b, taps.column[k] + q] += along[a, b, k] * taps.weight[k, q]


@compiled
def _take_part(thread: int, step: int, work: Work) -> None:
    """Do chunks of passes: thread 0 begins one and waits for its end; the others wait for passes, but not for ever.

    A thread begins with the chunks that it had in the last pass, which its core may still hold, and goes on with
    what others have left. It claims a chunk for the pass that it has read of, so that it cannot take one of the next
    pass for that of another.
    """
    control, chunks = work.control, len(work.taken)
    share, now = chunks * thread // len(work.plane), read(control, PASS)
    if thread == 0:
        now = (((now >> STEP_BITS) + 1) << STEP_BITS) + step
        publish(control, DONE, 0)
        publish(control, PASS, now)
        if step == LEAVE:
            return
    while True:
        number, step = now >> STEP_BITS, now & ((1 << STEP_BITS) - 1)
        for turn in range(chunks):
            chunk = (share + turn) % chunks
            before = read(work.taken, chunk)
            if before < number and replace(work.taken, chunk, before, number):
                if step == HISTOGRAM:
                    _histogram(np.uint64(chunk), np.uint64(thread), work)
                elif step == SUBTRACT:
                    _subtract(np.uint64(chunk), np.uint64(thread), work)
                else:
                    _contract(np.uint64(chunk), np.uint64(thread), work, step == DELTA)
                add(control, DONE, 1)
        if thread == 0:
            while read(control, DONE) < chunks:
                give_way()
            return
        turns, begun, last = 0, seconds(), now
        while now == last:
            give_way()
            now = read(control, PASS)
            turns += 1
            if turns == PATIENCE or seconds() > begun + PATIENCE_S:
                return
        if now & ((1 << STEP_BITS) - 1) == LEAVE:
            return


@compiled
def _subtract(chunk: int, thread: int, work: Work) -> None:
    """Subtract the update; find smallest and largest value, and the sums of expm1(-update) - shift and its square."""
    rows, (first, second) = work.rows, work.bases
    along, plane, found = work.along, work.plane[thread], work.found
    halvings, shift, length = work.halvings[ZERO], work.shift[ZERO], np.uint64(along.shape[2])
    smallest, largest, changes = work.line[thread, ZERO], work.line[thread, ONE], work.line[thread, TWO]
    sums, squares = work.line[thread, THREE], work.line[thread, FOUR]
    one, two, zero, infinity = np.float32(1), np.float32(2), np.float32(0), np.float32(np.inf)
    c2, c3, c4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
    c5, c6 = np.float32(1 / 120), np.float32(1 / 720)
    scale = np.float32(-(0.5**halvings))
    smallest[:], largest[:] = infinity, -infinity
    total, total_squares = 0.0, 0.0
    for i in range(rows.chunks[chunk], rows.chunks[chunk + ONE]):
        a = first.column[i]
        w0, w1, w2, w3 = first.weight[i]
        for b in range(np.uint64(along.shape[1])):
            for k in range(length):
                plane[b, k] = (
                    w0 * along[a, b, k]
                    + w1 * along[a + ONE, b, k]
                    + w2 * along[a + TWO, b, k]
                    + w3 * along[a + THREE, b, k]
                )
        sums[:], squares[:] = zero, zero
        for row in range(rows.plane[i], rows.plane[i + ONE]):
            j, k0, at = rows.place[row], rows.start[row], rows.offset[row]
            n = rows.offset[row + ONE] - at
            b = second.column[j]
            w0, w1, w2, w3 = second.weight[j]
            for k in range(n):
                field = (
                    w0 * plane[b, k0 + k]
                    + w1 * plane[b + ONE, k0 + k]
                    + w2 * plane[b + TWO, k0 + k]
                    + w3 * plane[b + THREE, k0 + k]
                )
                value = rows.values[at + k] - field
                rows.values[at + k] = value
                inside = rows.weights[at + k] > zero
                smallest[k0 + k] = min(smallest[k0 + k], value if inside else infinity)
                largest[k0 + k] = max(largest[k0 + k], value if inside else -infinity)
                x = field * scale
                series = x * (one + x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * c6)))))
                changes[k] = series
            for _ in range(halvings):
                for k in range(n):
                    changes[k] = changes[k] * (two + changes[k])
            for k in range(n):
                change = (changes[k] - shift) if rows.weights[at + k] > zero else zero
                sums[k0 + k] += change
                squares[k0 + k] += change * change
        for k in range(length):
            total += sums[k]
            total_squares += squares[k]
    found[chunk, ZERO], found[chunk, ONE] = smallest.min(), largest.max()
    found[chunk, TWO], found[chunk, THREE] = total, total_squares


@compiled
def _histogram(chunk: int, thread: int, work: Work) -> None:
    """Count and share of each bin in one number; four histograms in turn, so that none waits for its memory."""
    rows, (low, scale) = work.rows, work.limits
    found, parts = work.counts[chunk], work.bins[thread]
    index, share = work.indices[thread, ZERO], work.indices[thread, ONE]
    bins = found.shape[1]
    zero, top, first, last = np.float32(0), np.float32(bins - 1), np.int32(0), np.int32(bins - 2)
    unit, half, one = np.float32(SHARE_UNIT), np.float32(0.5), np.int64(1) << COUNT_BIT
    found[:] = 0
    parts[:] = 0
    held = ZERO
    end = rows.plane[rows.chunks[chunk + ONE]]
    for row in range(rows.plane[rows.chunks[chunk]], end):
        at = rows.offset[row]
        n = rows.offset[row + ONE] - at
        for k in range(n):
            position = min(max((rows.values[at + k] - low) * scale, zero), top)
            bin_ = max(min(np.int32(position), last), first)
            share[k] = np.int32((position - np.float32(bin_)) * unit + half)
            index[k] = bin_ if rows.weights[at + k] > zero else np.int32(bins)
        for k in range(ZERO, n, FOUR):
            parts[ZERO, np.uint32(index[k])] += one + share[k]
            parts[ONE, np.uint32(index[k + ONE])] += one + share[k + ONE]
            parts[TWO, np.uint32(index[k + TWO])] += one + share[k + TWO]
            parts[THREE, np.uint32(index[k + THREE])] += one + share[k + THREE]
        held += n
        if held > ENTRY_VOXELS or row == end - ONE:
            for part in range(FOUR):
                for b in range(np.uint64(bins)):
                    found[ZERO, b] += parts[part, b] >> COUNT_BIT
                    found[ONE, b] += parts[part, b] & (one - 1)
            parts[:] = 0
            held = ZERO


@compiled
def _contract(chunk: int, thread: int, work: Work, of_residual: bool) -> None:
    """Sum of the weighted residual, or of the weights alone, onto two axes of the lattice."""
    rows, lines, (low, scale) = work.rows, work.lines, work.limits
    first, second = work.delta if of_residual else work.omega
    parts, plane = work.parts[chunk], work.plane[thread]
    residual, index = work.line[thread, ZERO], work.indices[thread, ZERO]
    zero, last = np.float32(0), np.float32(lines.shape[1] - 1)
    start = rows.chunks[chunk]
    parts[:] = zero
    for i in range(start, rows.chunks[chunk + ONE]):
        plane[:] = zero
        for row in range(rows.plane[i], rows.plane[i + ONE]):
            j, k0, at = rows.place[row], rows.start[row], rows.offset[row]
            n = rows.offset[row + ONE] - at
            if of_residual:
                for k in range(n):
                    index[k] = max(np.int32(min(max((rows.values[at + k] - low) * scale, zero), last)), np.int32(0))
                for k in range(n):
                    line = np.uint32(index[k])
                    residual[k] = (lines[ZERO, line] + rows.values[at + k] * lines[ONE, line]) * rows.weights[at + k]
            else:
                for k in range(n):
                    residual[k] = rows.weights[at + k]
            b = second.column[j]
            w0, w1, w2, w3 = second.weight[j]
            for k in range(n):
                plane[b, k0 + k] += w0 * residual[k]
                plane[b + ONE, k0 + k] += w1 * residual[k]
                plane[b + TWO, k0 + k] += w2 * residual[k]
                plane[b + THREE, k0 + k] += w3 * residual[k]
        for q in range(FOUR):
            weight, a = first.weight[i, q], first.column[i] - first.column[start] + q
            for b in range(np.uint64(parts.shape[1])):
                for k in range(np.uint64(plane.shape[1])):
                    parts[a, b, k] += weight * plane[b, k]
