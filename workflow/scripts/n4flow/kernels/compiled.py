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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator

from n4flow.bspline import divide_where_seen, fit_matrices
from n4flow.kernels import threads
from n4flow.kernels.protocol import HostKernels, Oriented, Statistics
from n4flow.kernels.threads import APART, add, give_way, publish, read, replace, seconds
from n4flow.parameters import N4Parameters

log = logging.getLogger(__name__)

#: Rows begin and end at multiples of this, the widest vector of float32.
LANES = 16

#: Lines along either of the first two axes that are brought into rows at a time.
BLOCK = 16

#: Planes form chunks of so many voxels, which threads share; more than so many chunks would only cost memory.
CHUNK_VOXELS, CHUNKS = 2**14, 64

#: A histogram entry holds the count from this bit on, and below it the shares of the upper bins. 2**23 voxels fit;
#: after half as many, and a row, it is added to the totals.
COUNT_BIT = 40
SHARE_UNIT = 2**16
ENTRY_VOXELS = 2**22

#: What a voxel outside of the mask holds: no field moves it, and no table reaches it.
OUTSIDE, BEYOND = np.float32(1e30), np.float32(1e29)

#: Steps that threads share, over chunks of voxels or over planes of the lattice; the last is none, but the end of the
#: threads that wait.
OMEGA, ONTO_OMEGA, DELTA, ONTO_DELTA, HISTOGRAM, EXPAND, SUBTRACT, LEAVE = range(8)

#: Where the numbers stand that tell the threads what to do: number and step of a pass, and how many parts are done.
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

    It is outside of the package, which may be read-only, and a copy that Snakemake makes for a run. So the name holds
    the content of the two files that go into the compiled code, and not where they lie or how old they are.
    """
    caches = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    if not caches:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "n4flow")
    content = b"".join(Path(file).read_bytes() for file in (__file__, threads.__file__))
    return str(
        Path(caches, f"numba-{numba.__version__}-{get_host_cpu_name()}-{hashlib.sha256(content).hexdigest()[:16]}")
    )


class Locator(InTreeCacheLocator):
    """Tells Numba to keep compiled code in `cache_folder`, and to take what is there for that of this very source."""

    def __init__(self, function: Callable[..., None], file: str) -> None:
        super().__init__(function, file)  # type: ignore[no-untyped-call]
        self._cache_path = cache_folder()

    def get_source_stamp(self) -> str:
        """The folder's name, which holds the content; not its path, by which machines may differ."""
        return Path(self._cache_path).name


class InFolder(CompileResultCacheImpl):
    """What Numba does to compiled functions, in the place that is ours."""

    _locator_classes = [Locator]  # noqa: RUF012 (as Numba has it)


class Cache(FunctionCache):
    """Numba's cache on disk, that of each function; whatever is wrong with it, the code is compiled once more."""

    _impl_class = InFolder

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
    with contextlib.suppress(RuntimeError, OSError):
        made._cache = Cache(function)  # type: ignore[no-untyped-call]
    return made


class Rows(NamedTuple):
    """Voxels of the mask, with those between them along a row; a line of the grid may hold several rows."""

    values: np.ndarray  # (voxels,) float32: u - B, less a constant; OUTSIDE outside of the mask
    weights: np.ndarray  # (voxels,) float32: 0 outside of the mask; empty where all others are 1
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


class Bands(NamedTuple):
    """A basis matrix by the rows that each column acts on."""

    start: np.ndarray  # (m,) uint64
    stop: np.ndarray  # (m,) uint64
    weight: np.ndarray  # (m, length) float32


def bands_of(matrix: np.ndarray, length: int) -> Bands:
    """The bands of a matrix (n, m), whose rows are filled up with zeros to a length."""
    acts = matrix != 0
    start, stop = acts.argmax(axis=0), len(matrix) - acts[::-1].argmax(axis=0)
    weight = np.zeros((matrix.shape[1], length), np.float32)
    weight[:, : len(matrix)] = matrix.T
    return Bands(start.astype(np.uint64), np.where(acts.any(axis=0), stop, start).astype(np.uint64), weight)


class Work(NamedTuple):
    """What the threads share on a mesh. All memory is here: compiled code asks for none while it runs."""

    rows: Rows
    bases: tuple[Taps, Taps]  # of the first two axes
    last_basis: Bands  # of the third
    delta: tuple[Taps, Taps, Taps]
    omega: tuple[Taps, Taps, Taps]
    # what a pass is given
    limits: np.ndarray  # (2,) float32: value of the first bin centre, and bins per unit
    lines: np.ndarray  # (2, bins + 1) float32: the residual from a bin centre on, offset and slope; 0 outside the mask
    update: np.ndarray  # (m0, m1, m2) float64
    along: np.ndarray  # (m0 + 3, m1 + 3, length) float32: the update, evaluated along the last axis
    halvings: np.ndarray  # (1,) uint64
    shift: np.ndarray  # (1,) float32: about the mean of expm1(-update), which is counted from there
    # what it finds, chunk by chunk
    counts: np.ndarray  # (chunks, 2, bins) int64: voxels, and shares of the upper bins
    parts: np.ndarray  # (chunks, reach, m1 + 3, length) float32: contraction onto the first two axes
    found: (
        np.ndarray
    )  # (chunks, 4) float64: smallest and largest value, sums of expm1(-update) less `shift`, and of its square
    planes: np.ndarray  # (m0, m1, length) float64: the sum of the parts
    lattice: np.ndarray  # (m0, m1, m2 + 3) float64: the same, contracted along the last axis
    # to work in, thread by thread; the last row stays free, so that threads do not write to one line of the cache
    plane: np.ndarray  # (threads, m1 + 3 + 1, length) float32
    line: np.ndarray  # (threads, 5 + 1, length) float32
    indices: np.ndarray  # (threads, 2 + 1, length) int32
    bins: np.ndarray  # (threads, 4 + 1, bins + 1) int64
    # who does what, see `_take_part`
    control: np.ndarray  # (2 * APART,) int64
    taken: np.ndarray  # (chunks or m0,) int64: number of the last step for which a thread has claimed the part


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
        self.count = int(np.count_nonzero(samples.inside))
        self.threads = min(threads, len(self.rows.chunks) - 1)
        self.pool = ThreadPoolExecutor(max(1, self.threads - 1))
        self.length = -(-samples.log_image.shape[2] // LANES) * LANES
        # the extremes as they are in float32
        extremes = (float(np.float32(v - self.centre)) + self.centre for v in (samples.low, samples.high))
        super().__init__(parameters, *extremes)

    def set_mesh(self, bases: Sequence[np.ndarray]) -> None:
        bases = [bases[axis] for axis in self.axes]
        self.lattice_shape = tuple(basis.shape[1] for basis in bases)
        first, second = map(taps_of, bases[:2])
        omega, delta = ((taps_of(a), taps_of(b), taps_of(c)) for a, b, c in fit_matrices(bases))
        m0, m1, m2 = self.lattice_shape
        column = first.column.astype(int)
        chunks, bins = len(self.rows.chunks) - 1, self.parameters.histogram_bins
        reach = max(column[end - 1] - column[start] for start, end in pairwise(self.rows.chunks.astype(int))) + 4
        self.work = Work(
            rows=self.rows,
            bases=(first, second),
            last_basis=bands_of(bases[2], self.length),
            delta=delta,
            omega=omega,
            limits=np.zeros(2, np.float32),
            lines=np.zeros((2, bins + 1), np.float32),
            update=np.zeros(self.lattice_shape),
            along=np.zeros((m0 + 3, m1 + 3, self.length), np.float32),
            halvings=np.zeros(1, np.uint64),
            shift=np.zeros(1, np.float32),
            counts=np.zeros((chunks, 2, bins), np.int64),
            parts=np.zeros((chunks, reach, m1 + 3, self.length), np.float32),
            found=np.zeros((chunks, 4)),
            planes=np.zeros((m0, m1, self.length)),
            lattice=np.zeros((m0, m1, m2 + 3)),
            plane=np.zeros((self.threads, m1 + 4, self.length), np.float32),
            line=np.zeros((self.threads, 6, self.length), np.float32),
            indices=np.zeros((self.threads, 3, self.length), np.int32),
            bins=np.zeros((self.threads, 5, bins + 1), np.int64),
            control=np.zeros(2 * APART, np.int64),
            taken=np.zeros(max(chunks, m0), np.int64),
        )
        self.helpers: dict[int, Future[None]] = {}
        self._do(OMEGA)
        self._do(ONTO_OMEGA)
        self.omega = self.work.lattice[:, :, :m2].copy()

    def end_level(self) -> tuple[np.ndarray, list[float]]:
        ended = super().end_level()
        _take_part(0, LEAVE, self.work)
        return ended

    def histogram(self) -> np.ndarray:
        self._set_limits()
        self._do(HISTOGRAM)
        counts, shares = self.work.counts.sum(axis=0)
        shares = shares[:-1] / SHARE_UNIT  # the last bin has none above it
        total = counts.astype(np.float64)
        total[:-1] -= shares
        total[1:] += shares
        return total

    def fit(self, table: np.ndarray) -> np.ndarray:
        # between two bin centres the residual is a line of the value, which is relative to the centre
        bins = len(table)
        low, per_unit = self.low - self.centre, (bins - 1) / (self.high - self.low)
        slope = 1 - np.diff(table) * per_unit
        at_bin = low + np.arange(bins - 1) / per_unit
        lines = self.work.lines
        lines[:, : bins - 1] = at_bin - (table[:-1] - self.centre) - slope * at_bin, slope
        lines[:, bins - 1] = lines[:, bins - 2]  # for the largest value, which is on the last bin centre
        self._set_limits()
        self._do(DELTA)
        self._do(ONTO_DELTA)
        delta = self.work.lattice[:, :, : self.lattice_shape[2]]
        return divide_where_seen(delta, self.omega).transpose(np.argsort(self.axes))

    def subtract_update(self, update: np.ndarray) -> Statistics:
        work = self.work
        work.update[:] = update.transpose(self.axes)
        largest = max(update.max(), -update.min(), 1e-30)
        work.halvings[0] = max(0, int(np.ceil(np.log2(largest / SERIES_LIMIT))))
        work.shift[0] = shift = np.float32(np.expm1(-update.mean()))
        self._do(EXPAND)
        self._do(SUBTRACT)
        found = work.found
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
        self.work.limits[:] = low, (bins - 1) / (float(high) - float(low)) if high > low else 1

    def _do(self, step: int) -> None:
        """Do a step with all threads; those that have waited for it in vain, and have left, are called back."""
        for thread in range(1, self.threads):
            if thread not in self.helpers or self.helpers[thread].done():
                self.helpers[thread] = self.pool.submit(_take_part, thread, step, self.work)
        _take_part(0, step, self.work)


def _rows(samples: Oriented) -> Rows:
    n0, n1, n2 = samples.inside.shape
    pieces = -(-n2 // LANES)
    inside = np.zeros((n0, n1, pieces * LANES), dtype=bool)
    for block in _blocks(n0, n1):
        inside[block][..., :n2] = samples.inside[block]
    # LANES bytes are two words, which is by far the fastest way to ask whether any is not 0
    halves = inside.reshape(n0, n1, pieces, LANES).view(np.uint64)
    held = (halves[..., 0] | halves[..., 1]) != 0

    def kept(grid: np.ndarray, less: float, elsewhere: float) -> np.ndarray:
        """Voxels of the pieces that hold one of the mask, less a constant."""
        voxels = np.full((n0, n1, pieces * LANES), elsewhere, dtype=np.float32)
        for block in _blocks(n0, n1):
            voxels[block][..., :n2] = np.where(samples.inside[block], grid[block] - less, elsewhere)
        return voxels.reshape(n0, n1, pieces, LANES)[held].ravel()

    edges = np.diff(held.astype(np.int8), axis=2, prepend=0, append=0)
    (plane, line, start), end = np.nonzero(edges == 1), np.nonzero(edges == -1)[2]
    offset = np.concatenate([[0], np.cumsum((end - start) * LANES)])
    row_of_plane = np.searchsorted(plane, np.arange(n0 + 1))
    shares = np.linspace(0, offset[-1], min(CHUNKS, max(1, offset[-1] // CHUNK_VOXELS)) + 1)
    chunks = np.unique([0, *np.searchsorted(offset[row_of_plane], shares[1:-1]), n0])
    indices = (np.array(a, dtype=np.uint64) for a in (row_of_plane, line, start * LANES, offset, chunks))
    values = kept(samples.log_image, samples.centre, float(OUTSIDE))
    weights = np.empty(0, np.float32) if samples.weights.dtype == bool else kept(samples.weights, 0, 0)
    return Rows(values, weights, *indices)


def _blocks(n0: int, n1: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a grid that lie in the cache in whatever order its axes do."""
    for i in range(0, n0, BLOCK):
        for j in range(0, n1, BLOCK):
            yield slice(i, i + BLOCK), slice(j, j + BLOCK)


@compiled
def _expand(a: int, work: Work) -> None:
    """Evaluate a plane of the update along its last axis."""
    bands, update, along = work.last_basis, work.update, work.along
    for b in range(np.uint64(update.shape[1])):
        for k in range(np.uint64(along.shape[2])):
            along[a, b, k] = 0
        for c in range(np.uint64(update.shape[2])):
            value = np.float32(update[a, b, c])
            for k in range(bands.start[c], bands.stop[c]):
                along[a, b, k] += value * bands.weight[c, k]


@compiled
def _onto_lattice(a: int, work: Work, of_residual: bool) -> None:
    """Add what the chunks contracted onto a plane of the lattice, in their order; contract that along the last axis."""
    chunks, parts, planes, lattice = work.rows.chunks, work.parts, work.planes, work.lattice
    first, _, last = work.delta if of_residual else work.omega
    planes[a] = 0
    lattice[a] = 0
    for chunk in range(np.uint64(len(parts))):
        start = first.column[chunks[chunk]]
        if start <= a < first.column[chunks[chunk + ONE] - ONE] + FOUR:
            for b in range(np.uint64(planes.shape[1])):
                for k in range(np.uint64(planes.shape[2])):
                    planes[a, b, k] += parts[chunk, a - start, b, k]
    for b in range(np.uint64(lattice.shape[1])):
        for k in range(np.uint64(len(last.column))):
            for q in range(FOUR):
                lattice[a, b, last.column[k] + q] += planes[a, b, k] * last.weight[k, q]


@compiled
def _take_part(thread: int, step: int, work: Work) -> None:
    """Do parts of steps: thread 0 begins one and waits for its end; the others wait for steps, but not for ever.

    A thread begins with the parts that it had in the last step of the kind, which its core may still hold, and goes on
    with what others have left. It claims a part for the step that it has read of, so that it cannot take one of the
    next step for that of another.
    """
    control, now = work.control, read(work.control, PASS)
    if thread == 0:
        now = (((now >> STEP_BITS) + 1) << STEP_BITS) + step
        publish(control, DONE, 0)
        publish(control, PASS, now)
    while True:
        number, step = now >> STEP_BITS, now & ((1 << STEP_BITS) - 1)
        if step == LEAVE:
            return
        on_lattice = step in (ONTO_OMEGA, ONTO_DELTA, EXPAND)
        parts = len(work.planes) if on_lattice else len(work.parts)
        share = parts * thread // len(work.plane)
        for turn in range(parts):
            part = (share + turn) % parts
            before = read(work.taken, part)
            if before < number and replace(work.taken, part, before, number):
                if step == HISTOGRAM:
                    _histogram(np.uint64(part), np.uint64(thread), work)
                elif step == SUBTRACT:
                    _subtract(np.uint64(part), np.uint64(thread), work)
                elif step == EXPAND:
                    _expand(np.uint64(part), work)
                elif on_lattice:
                    _onto_lattice(np.uint64(part), work, step == ONTO_DELTA)
                else:
                    _contract(np.uint64(part), np.uint64(thread), work, step == DELTA)
                add(control, DONE, 1)
        if thread == 0:
            while read(control, DONE) < parts:
                give_way()
            return
        turns, begun, last = 0, seconds(), now
        while now == last:
            give_way()
            now = read(control, PASS)
            turns += 1
            if turns == PATIENCE or seconds() > begun + PATIENCE_S:
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
                smallest[k0 + k] = min(smallest[k0 + k], value)
                largest[k0 + k] = max(largest[k0 + k], value if value < BEYOND else -infinity)
                x = field * scale
                series = x * (one + x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * c6)))))
                changes[k] = series
            for _ in range(halvings):
                for k in range(n):
                    changes[k] = changes[k] * (two + changes[k])
            for k in range(n):
                change = (changes[k] - shift) if rows.values[at + k] < BEYOND else zero
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
    zero, outside = np.float32(0), np.float32(bins)
    unit, half, one = np.float32(SHARE_UNIT), np.float32(0.5), np.int64(1) << COUNT_BIT
    found[:] = 0
    parts[:] = 0
    held = ZERO
    end = rows.plane[rows.chunks[chunk + ONE]]
    for row in range(rows.plane[rows.chunks[chunk]], end):
        at = rows.offset[row]
        n = rows.offset[row + ONE] - at
        for k in range(n):
            position = min(max((rows.values[at + k] - low) * scale, zero), outside)
            bin_ = np.int32(position)
            share[k] = np.int32((position - np.float32(bin_)) * unit + half)
            index[k] = bin_
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
    first, second, _ = work.delta if of_residual else work.omega
    parts, plane = work.parts[chunk], work.plane[thread]
    residual, index = work.line[thread, ZERO], work.indices[thread, ZERO]
    zero, one, outside = np.float32(0), np.float32(1), np.float32(lines.shape[1] - 1)
    weighted, start = len(rows.weights) > 0, rows.chunks[chunk]
    parts[:] = zero
    for i in range(start, rows.chunks[chunk + ONE]):
        plane[:] = zero
        for row in range(rows.plane[i], rows.plane[i + ONE]):
            j, k0, at = rows.place[row], rows.start[row], rows.offset[row]
            n = rows.offset[row + ONE] - at
            if of_residual:
                for k in range(n):
                    index[k] = np.int32(min(max((rows.values[at + k] - low) * scale, zero), outside))
                for k in range(n):
                    line = np.uint32(index[k])
                    residual[k] = lines[ZERO, line] + rows.values[at + k] * lines[ONE, line]
            else:
                for k in range(n):
                    residual[k] = one if rows.values[at + k] < BEYOND else zero
            if weighted:
                for k in range(n):
                    residual[k] *= rows.weights[at + k]
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
