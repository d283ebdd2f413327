"""The three passes compiled for the CPU, in float32, bit-identical for any number of threads.

Voxels lie in rows along the longest axis: the pieces of each line of the grid that hold voxels of the
mask, one behind the other. Inner loops go along a row where its place in the grid matters, and along as
many rows as fit into the first cache where it does not. They add element by element to arrays, so that
they are vectorised without any sum changing its order: the bits hang neither on the width of the CPU's
vectors nor, since planes form fixed chunks whose sums are added in order, on the threads.

All indices are unsigned: with them a compiler need not ask whether they count from the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite.binding import get_host_cpu_name  # type: ignore[import-untyped]
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, InTreeCacheLocator

from n4flow.kernels import instructions
from n4flow.kernels.instructions import APART, add, fused, give_way, publish, read, replace, seconds
from n4flow.kernels.protocol import HostKernels, Oriented, Statistics
from n4flow.parameters import N4Parameters

log = logging.getLogger(__name__)

#: Rows begin and end at multiples of this, a vector of float32.
LANES = 8

#: Voxels that inner loops go along at a time; more where a line of the grid is longer. A power of two.
RUN = 2**10

#: Buffers of a run are so much longer: a load would wait for a store to the same place of another page.
BEYOND_PAGE = 48

#: Lines along either of the first two axes that are brought into rows at a time.
BLOCK = 16

#: Planes form chunks of so many voxels, which threads share; more than so many chunks would only cost memory.
CHUNK_VOXELS, CHUNKS = 2**15, 64

#: A voxel's place in the histogram is its bin and, in so many bits, the share of the bin above.
SHARE_BITS = np.uint32(16)
SHARE_UNIT = 2**16

#: A histogram entry holds the count from this bit on, and below it the shares of the upper bins. 2**23 voxels fit;
#: after half of that, and a run, it is added to the totals.
COUNT_BIT = 40
ENTRY_VOXELS = 2**22

#: What a voxel outside of the mask holds: no field moves it, and no table reaches it.
OUTSIDE, BEYOND = np.float32(1e30), np.float32(1e29)

#: Steps that threads share, over chunks of voxels or over planes of the lattice; the last is none, but the end of the
#: threads that wait.
GATHER, ONTO_LATTICE, HISTOGRAM, EXPAND, SUBTRACT, LEAVE = range(6)

#: Where the numbers stand that tell the threads what to do: number and step of a pass, and how many parts are done.
PASS, DONE = 0, APART
STEP_BITS = 3

#: A thread that waits for the next pass looks so often (milliseconds: there is little to do between two passes), and
#: no longer than so many seconds (where others keep the core busy).
PATIENCE, PATIENCE_S = 2**13, 2

ZERO, ONE, TWO, THREE, FOUR = (np.uint64(n) for n in range(5))

#: A Taylor series of exp serves up to here; larger arguments are halved, and the result squared.
SERIES_LIMIT = 1 / 32


def cache_folder() -> str:
    """Where compiled code is kept: a folder for each kind of CPU, since machines may share a home.

    It is outside of the package, which may be read-only, and a copy that Snakemake makes for a run. So the name holds
    the content of the two files that go into the compiled code, and not where they lie or how old they are.
    """
    caches = numba.config.CACHE_DIR  # type: ignore[attr-defined]
    if not caches:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "n4flow")
    content = b"".join(Path(file).read_bytes() for file in (__file__, instructions.__file__))
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
            code = super().load_overload(*arguments)  # type: ignore[no-untyped-call]
            if code is None:
                say_once(logging.INFO, f"compiling for this CPU, once: {self.cache_path}")
            return code
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


@cache
def say_once(level: int, message: str) -> None:
    """Log what holds of many functions."""
    log.log(level, message)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function when it is first called, once a machine; once a process where no cache can be written."""
    made = njit(function, nogil=True, error_model="numpy")
    try:
        made._cache = Cache(function)  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        say_once(
            logging.WARNING,
            f"{cache_folder()}: compiled code cannot be kept there, so that every process compiles, for half a minute; "
            "let XDG_CACHE_HOME name a folder that can be written",
        )
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
    """The taps of a matrix (n, m); where it has fewer than four columns, they reach beyond it, with weight 0."""
    if matrix.shape[1] < 4:
        matrix = np.pad(matrix, ((0, 0), (0, 4 - matrix.shape[1])))
    column = np.minimum((matrix != 0).argmax(axis=1), matrix.shape[1] - 4)
    weight = np.take_along_axis(matrix, column[:, None] + np.arange(4), axis=1)
    return Taps(column.astype(np.uint64), weight.astype(np.float32))


class Work(NamedTuple):
    """What the threads share on a mesh. All memory is here: compiled code asks for none while it runs."""

    rows: Rows
    bases: tuple[Taps, Taps, Taps]
    matrices: tuple[Taps, Taps, Taps]  # with which the residual is gathered
    # what a pass is given
    limits: np.ndarray  # (2,) float64: values of the first and the last bin centre
    table: np.ndarray  # (bins,) float64: expected sharp value at each bin centre
    lines: np.ndarray  # (2, bins + 1) float32: the residual from a bin centre on, offset and slope; 0 outside the mask
    update: np.ndarray  # (m0, m1, m2) float64
    along: np.ndarray  # (m0 or 4, m1 or 4, length) float32: the update, evaluated along the last axis
    halvings: np.ndarray  # (1,) uint64
    shift: np.ndarray  # (1,) float32: about the mean of expm1(-update), which is counted from there
    # what it finds, chunk by chunk
    counts: np.ndarray  # (chunks, 2, bins) int64: voxels, and shares of the upper bins
    parts: np.ndarray  # (chunks, reach, m1 or 4, length) float32: contraction onto the first two axes
    found: np.ndarray  # (chunks, 4) float64: smallest and largest value, sums of expm1(-update) - shift and its square
    # what comes of it
    lattice: np.ndarray  # (m0, m1, m2) float64: the residual, contracted along all axes
    histogram: np.ndarray  # (bins,) float64
    totals: np.ndarray  # (4,) float64: as `found`
    # to work in, thread by thread; the end stays free, so that threads do not write to one line of the cache
    plane: np.ndarray  # (threads, (m1 or 4) + 1, length) float32
    points: np.ndarray  # (threads, m2 or 4, (m1 or 4) + LANES) float64: a plane of the lattice, last axis first
    turned: np.ndarray  # (threads, length, (m1 or 4) + LANES) float64: the same, evaluated or to be contracted
    sums: np.ndarray  # (threads, length) float64: a line of what is to be contracted, over all chunks
    run: np.ndarray  # (threads, 5, run + BEYOND_PAGE) float32
    indices: np.ndarray  # (threads, run + BEYOND_PAGE) int32
    bins: np.ndarray  # (threads, 4 + 1, bins + 1) int64
    # who does what, see `_lead`
    control: np.ndarray  # (2 * APART,) int64
    taken: np.ndarray  # (chunks or m0,) int64: number of the last step for which a thread has claimed the part


class CompiledKernels(HostKernels):
    """`protocol.Kernels` in compiled float32 code with exact histograms and float64 sums.

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
        self.given_axes = np.argsort(self.axes)
        self.rows = _rows(samples)
        self.count = int(np.count_nonzero(samples.inside))
        self.threads = min(threads, len(self.rows.chunks) - 1)
        self.pool = ThreadPoolExecutor(max(1, self.threads - 1))
        self.length = -(-samples.log_image.shape[2] // LANES) * LANES
        # the extremes as they are in float32
        extremes = (float(np.float32(v - self.centre)) + self.centre for v in (samples.low, samples.high))
        super().__init__(parameters, *extremes)

    def set_mesh(self, bases: Sequence[np.ndarray], matrices: Sequence[np.ndarray]) -> None:
        self.lattice_shape = tuple(bases[axis].shape[1] for axis in self.axes)
        i, j, k = self.axes
        basis, gathering = ((taps_of(of[i]), taps_of(of[j]), taps_of(of[k])) for of in (bases, matrices))
        n0, n1, n2 = (max(m, 4) for m in self.lattice_shape)  # taps reach as far
        run = max(RUN, 1 << (self.length - 1).bit_length())
        column = basis[0].column.astype(int)
        chunks, bins = len(self.rows.chunks) - 1, self.parameters.histogram_bins
        reach = max(column[end - 1] - column[start] for start, end in pairwise(self.rows.chunks.astype(int))) + 4
        self.work = Work(
            rows=self.rows,
            bases=basis,
            matrices=gathering,
            limits=np.zeros(2),
            table=np.zeros(bins),
            lines=np.zeros((2, bins + 1), np.float32),
            update=np.zeros(self.lattice_shape),
            along=np.zeros((n0, n1, self.length), np.float32),
            halvings=np.zeros(1, np.uint64),
            shift=np.zeros(1, np.float32),
            counts=np.zeros((chunks, 2, bins), np.int64),
            parts=np.zeros((chunks, reach, n1, self.length), np.float32),
            found=np.zeros((chunks, 4)),
            lattice=np.zeros(self.lattice_shape),
            histogram=np.zeros(bins),
            totals=np.zeros(4),
            plane=np.zeros((self.threads, n1 + 1, self.length), np.float32),
            points=np.zeros((self.threads, n2, n1 + LANES)),
            turned=np.zeros((self.threads, self.length, n1 + LANES)),
            sums=np.zeros((self.threads, self.length)),
            run=np.zeros((self.threads, 5, run + BEYOND_PAGE), np.float32),
            indices=np.zeros((self.threads, run + BEYOND_PAGE), np.int32),
            bins=np.zeros((self.threads, 4 + 1, bins + 1), np.int64),
            control=np.zeros(2 * APART, np.int64),
            taken=np.zeros(max(chunks, n0), np.int64),
        )
        self.helpers: dict[int, Future[None]] = {}

    def end_stage(self) -> tuple[np.ndarray, list[float]]:
        ended = super().end_stage()
        _lead(LEAVE, LEAVE, self.work)
        return ended

    def histogram(self) -> np.ndarray:
        self._set_limits()
        self._do(HISTOGRAM, HISTOGRAM)
        return self.work.histogram.copy()

    def gather(self, table: np.ndarray) -> np.ndarray:
        self._set_limits()
        self.work.table[:] = table - self.centre
        self._do(GATHER, ONTO_LATTICE)
        return self.work.lattice.transpose(self.given_axes).copy()

    def subtract_update(self, update: np.ndarray) -> Statistics:
        self.work.update[:] = update.transpose(self.axes)
        largest = max(update.max(), -update.min(), 1e-30)
        self.work.halvings[0] = max(0, math.ceil(math.log2(largest / SERIES_LIMIT)))
        self.work.shift[0] = shift = np.float32(np.expm1(-update.mean()))
        self._do(EXPAND, SUBTRACT)
        low, high, total, squares = self.work.totals.tolist()
        variance = (squares - total**2 / self.count) / (self.count - 1)
        cv = max(variance, 0) ** 0.5 / (1 + float(shift) + total / self.count)
        return Statistics(low + self.centre, high + self.centre, cv)

    def _set_limits(self) -> None:
        self.work.limits[:] = self.low - self.centre, self.high - self.centre

    def _do(self, first: int, last: int) -> None:
        """Do steps with all threads; those that have waited in vain, and have left, are called back."""
        for thread in range(1, self.threads):
            if thread not in self.helpers or self.helpers[thread].done():
                self.helpers[thread] = self.pool.submit(_follow, thread, self.work)
        _lead(first, last, self.work)


def preload() -> None:
    """Load (or compile) what is called first: all the rest comes with it."""
    kernels = CompiledKernels(np.zeros((4, 4, 4)), np.ones((4, 4, 4), dtype=bool), N4Parameters(), threads=1)
    kernels.set_mesh([np.eye(4)] * 3, [np.eye(4)] * 3)
    _lead(LEAVE, LEAVE, kernels.work)
    _follow(1, kernels.work)  # which finds that all has ended


def _rows(samples: Oriented) -> Rows:
    n0, n1, n2 = samples.inside.shape
    pieces = -(-n2 // LANES)
    inside = np.zeros((n0, n1, pieces * LANES), dtype=bool)
    for block in _blocks(n0, n1):
        inside[block][..., :n2] = samples.inside[block]
    words = inside.view(np.uint64)  # LANES voxels each: by far the fastest way to ask whether any is inside
    held = words != 0
    taken = np.flatnonzero(held)
    used = words.ravel()[taken].view(bool)

    def kept(grid: np.ndarray, less: float, elsewhere: np.float32) -> np.ndarray:
        """Voxels of the pieces that hold one of the mask, less a constant."""
        voxels = np.empty((n0, n1, pieces * LANES), dtype=np.float32)
        with np.errstate(all="ignore"):  # outside may be anything
            for block in _blocks(n0, n1):
                np.subtract(grid[block], less, out=voxels[block][..., :n2], casting="same_kind")
        return np.where(used, voxels.reshape(-1, LANES).take(taken, axis=0).ravel(), elsewhere)

    # where rows begin and end, in turn; a line has one place more than pieces, its end
    edges = np.flatnonzero(np.diff(held, axis=2, prepend=False, append=False))
    line, (start, end) = edges[::2] // (pieces + 1), (edges % (pieces + 1)).reshape(-1, 2).T
    offset = np.concatenate([[0], np.cumsum((end - start) * LANES)])
    row_of_plane = np.searchsorted(line, n1 * np.arange(n0 + 1))
    shares = np.linspace(0, offset[-1], min(CHUNKS, max(1, offset[-1] // CHUNK_VOXELS)) + 1)
    chunks = np.unique([0, *np.searchsorted(offset[row_of_plane], shares[1:-1]), n0])
    indices = (np.array(a, dtype=np.uint64) for a in (row_of_plane, line % n1, start * LANES, offset, chunks))
    values = kept(samples.log_image, samples.centre, OUTSIDE)
    weights = np.empty(0, np.float32) if samples.weights.dtype == bool else kept(samples.weights, 0, np.float32(0))
    return Rows(values, weights, *indices)


def _blocks(n0: int, n1: int) -> Iterator[tuple[slice, slice]]:
    """Parts of a grid that lie in the cache in whatever order its axes do."""
    for i in range(0, n0, BLOCK):
        for j in range(0, n1, BLOCK):
            yield slice(i, i + BLOCK), slice(j, j + BLOCK)


@compiled
def _expand(a: int, thread: int, work: Work) -> None:
    """Evaluate a plane of the update along its last axis; inner loops go along the other, which is longer than taps."""
    (_, _, third), update, along = work.bases, work.update, work.along
    points, turned = work.points[thread], work.turned[thread]
    for b in range(np.uint64(update.shape[1])):
        for c in range(np.uint64(update.shape[2])):
            points[c, b] = update[a, b, c]
    for k in range(np.uint64(len(third.column))):
        c = third.column[k]  # the weights one by one: to unpack a row takes as long as all that follows
        w0, w1, w2, w3 = third.weight[k, ZERO], third.weight[k, ONE], third.weight[k, TWO], third.weight[k, THREE]
        for b in range(np.uint64(along.shape[1])):
            lower = w0 * points[c, b] + w1 * points[c + ONE, b]
            turned[k, b] = lower + (w2 * points[c + TWO, b] + w3 * points[c + THREE, b])
    for b in range(np.uint64(along.shape[1])):
        for k in range(np.uint64(len(third.column))):
            along[a, b, k] = turned[k, b]


@compiled
def _onto_lattice(a: int, thread: int, work: Work) -> None:
    """Add what the chunks contracted onto a plane of the lattice, in their order; contract that along the last axis."""
    chunks, parts, lattice = work.rows.chunks, work.parts, work.lattice
    first, _, third = work.matrices
    points, turned, sums = work.points[thread], work.turned[thread], work.sums[thread]
    begin, end = ZERO, np.uint64(len(parts))
    while begin < end and first.column[chunks[begin + ONE] - ONE] + FOUR <= a:
        begin += ONE
    while begin < end and first.column[chunks[end - ONE]] > a:
        end -= ONE
    for b in range(np.uint64(lattice.shape[1])):
        sums[:] = 0
        for chunk in range(begin, end):
            part = a - first.column[chunks[chunk]]
            for k in range(np.uint64(len(sums))):
                sums[k] += parts[chunk, part, b, k]
        for k in range(np.uint64(len(third.column))):
            turned[k, b] = sums[k]
    points[:] = 0
    for k in range(np.uint64(len(third.column))):
        c = third.column[k]
        w0, w1, w2, w3 = third.weight[k, ZERO], third.weight[k, ONE], third.weight[k, TWO], third.weight[k, THREE]
        for b in range(np.uint64(lattice.shape[1])):
            points[c, b] += w0 * turned[k, b]
            points[c + ONE, b] += w1 * turned[k, b]
            points[c + TWO, b] += w2 * turned[k, b]
            points[c + THREE, b] += w3 * turned[k, b]
    for b in range(np.uint64(lattice.shape[1])):
        for c in range(np.uint64(lattice.shape[2])):
            lattice[a, b, c] = points[c, b]


@compiled
def _lead(first: int, last: int, work: Work) -> None:
    """Do steps, one after the other, together with the threads that follow."""
    control = work.control
    for step in range(first, last + 1):
        if step == GATHER:
            _find_lines(work)
        number = (read(control, PASS) >> STEP_BITS) + 1
        publish(control, DONE, 0)
        publish(control, PASS, (number << STEP_BITS) + step)
        parts = _take_part(0, number, step, work)
        while read(control, DONE) < parts:
            give_way()
        if step == HISTOGRAM:
            _sum_counts(work)
        elif step == SUBTRACT:
            _sum_found(work)


@compiled
def _follow(thread: int, work: Work) -> None:
    """Take part in one step after the other, until the end of the stage; wait for the next, but not for ever."""
    control, last = work.control, -1
    while True:
        turns, begun, now = 0, seconds(), read(control, PASS)
        while now == last:
            give_way()
            now = read(control, PASS)
            turns += 1
            if turns == PATIENCE or seconds() > begun + PATIENCE_S:
                return
        number, step, last = now >> STEP_BITS, now & ((1 << STEP_BITS) - 1), now
        if step == LEAVE:
            return
        _take_part(thread, number, step, work)


@compiled
def _take_part(thread: int, number: int, step: int, work: Work) -> int:
    """Do parts of a step as long as there are any; returns how many it has.

    A thread begins with the parts that it had in the last step of the kind, which its core may still hold, and goes on
    with what others have left. It claims a part for the step that it has read of, so that it cannot take one of the
    next step for that of another.
    """
    if step == LEAVE:
        return 0
    on_lattice = step in (ONTO_LATTICE, EXPAND)
    parts = len(work.lattice) if on_lattice else len(work.parts)
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
                _expand(np.uint64(part), np.uint64(thread), work)
            elif on_lattice:
                _onto_lattice(np.uint64(part), np.uint64(thread), work)
            else:
                _contract(np.uint64(part), np.uint64(thread), work)
            add(work.control, DONE, 1)
    return parts


@compiled
def _find_lines(work: Work) -> None:
    """Between two bin centres the residual is a line of the value."""
    lines, table, (low, high) = work.lines, work.table, work.limits
    bins = np.uint64(len(table))
    per_unit = (bins - ONE) / (high - low)
    for b in range(bins - ONE):
        centre, slope = low + b / per_unit, 1 - (table[b + ONE] - table[b]) * per_unit
        lines[ZERO, b], lines[ONE, b] = centre - table[b] - slope * centre, slope
    lines[:, bins - ONE] = lines[:, bins - TWO]  # for the largest value, which is on the last bin centre


@compiled
def _sum_counts(work: Work) -> None:
    """The histogram of all chunks."""
    total, counts = work.histogram, work.counts
    total[:] = 0
    for chunk in range(np.uint64(len(counts))):
        for b in range(np.uint64(len(total))):
            total[b] += counts[chunk, ZERO, b]
        for b in range(np.uint64(len(total)) - ONE):  # the last bin has none above it
            share = counts[chunk, ONE, b] / SHARE_UNIT
            total[b] -= share
            total[b + ONE] += share


@compiled
def _sum_found(work: Work) -> None:
    """What subtraction found in all chunks."""
    found, totals = work.found, work.totals
    totals[:] = found[ZERO]
    for chunk in range(ONE, np.uint64(len(found))):
        totals[ZERO] = min(totals[ZERO], found[chunk, ZERO])
        totals[ONE] = max(totals[ONE], found[chunk, ONE])
        totals[TWO] += found[chunk, TWO]
        totals[THREE] += found[chunk, THREE]


@compiled
def _bins_per_unit(work: Work) -> np.float32:
    """As float32 sees the values; 1 where they are so close that it has no number for it, times the unit of a share."""
    low, high = np.float64(np.float32(work.limits[ZERO])), np.float64(np.float32(work.limits[ONE]))
    scale = np.float32((len(work.table) - 1) / (high - low))
    return scale if scale * np.float32(SHARE_UNIT) < np.float32(np.inf) else np.float32(1)


@compiled
def _subtract(chunk: int, thread: int, work: Work) -> None:
    """Subtract the update; find smallest and largest value, and the sums of expm1(-update) - shift and its square."""
    rows, (first, second, _), values = work.rows, work.bases, work.rows.values
    along, plane, found = work.along, work.plane[thread], work.found
    halvings, shift = work.halvings[ZERO], work.shift[ZERO]
    field, smallest, largest = work.run[thread, ZERO], work.run[thread, ONE], work.run[thread, TWO]
    sums, squares, run = work.run[thread, THREE], work.run[thread, FOUR], np.uint64(work.run.shape[2] - BEYOND_PAGE)
    one, two, zero, infinity = np.float32(1), np.float32(2), np.float32(0), np.float32(np.inf)
    c2, c3, c4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
    scale = np.float32(-(0.5**halvings))
    low, high, total, total_squares = infinity, -infinity, 0.0, 0.0
    for i in range(rows.chunks[chunk], rows.chunks[chunk + ONE]):
        a = first.column[i]
        w0, w1, w2, w3 = first.weight[i]
        for b in range(np.uint64(along.shape[1])):
            for k in range(np.uint64(along.shape[2])):
                upper = fused(w2, along[a + TWO, b, k], w3 * along[a + THREE, b, k])
                plane[b, k] = fused(w0, along[a, b, k], fused(w1, along[a + ONE, b, k], upper))
        smallest[:], largest[:], sums[:], squares[:] = infinity, -infinity, zero, zero
        row, end = rows.plane[i], rows.plane[i + ONE]
        while row < end:
            at = rows.offset[row]
            while row < end and rows.offset[row + ONE] <= at + run:
                j, k0, r0 = rows.place[row], rows.start[row], rows.offset[row] - at
                b = second.column[j]
                w0, w1, w2, w3 = second.weight[j]
                for k in range(rows.offset[row + ONE] - rows.offset[row]):
                    upper = fused(w2, plane[b + TWO, k0 + k], w3 * plane[b + THREE, k0 + k])
                    field[r0 + k] = fused(w0, plane[b, k0 + k], fused(w1, plane[b + ONE, k0 + k], upper))
                row += ONE
            n = rows.offset[row] - at
            for k in range(n):
                value = values[at + k] - field[k]
                values[at + k] = value
                smallest[k] = min(smallest[k], value)
                largest[k] = max(largest[k], value if value < BEYOND else -infinity)
                x = field[k] * scale
                field[k] = x * fused(x, fused(x, fused(x, c4, c3), c2), one)
            for _ in range(halvings):
                for k in range(n):
                    field[k] = field[k] * (two + field[k])
            for k in range(n):
                change = (field[k] - shift) if values[at + k] < BEYOND else zero
                sums[k] += change
                squares[k] = fused(change, change, squares[k])
        left = run
        while left > ONE:
            left //= TWO
            for k in range(left):
                smallest[k] = min(smallest[k], smallest[left + k])
                largest[k] = max(largest[k], largest[left + k])
                sums[k] += sums[left + k]
                squares[k] += squares[left + k]
        low, high = min(low, smallest[ZERO]), max(high, largest[ZERO])
        total += sums[ZERO]
        total_squares += squares[ZERO]
    found[chunk, ZERO], found[chunk, ONE], found[chunk, TWO], found[chunk, THREE] = low, high, total, total_squares


@compiled
def _histogram(chunk: int, thread: int, work: Work) -> None:
    """Count and share of each bin in one number; four histograms in turn, so that none waits for its memory."""
    rows, values = work.rows, work.rows.values
    low, scale = np.float32(work.limits[ZERO]), _bins_per_unit(work)
    found, parts, place = work.counts[chunk], work.bins[thread], work.indices[thread]
    bins, run, held = found.shape[1], np.uint64(len(place) - BEYOND_PAGE), ZERO
    zero, outside, unit = np.float32(0), np.float32(bins * SHARE_UNIT), np.float32(SHARE_UNIT)
    one, share = np.int64(1) << COUNT_BIT, np.int32(SHARE_UNIT - 1)
    found[:] = 0
    parts[:] = 0
    end = rows.offset[rows.plane[rows.chunks[chunk + ONE]]]
    for at in range(rows.offset[rows.plane[rows.chunks[chunk]]], end, run):
        n = min(run, end - at)
        for k in range(n):
            place[k] = np.int32(np.rint(min(max((values[at + k] - low) * (scale * unit), zero), outside)))
        for k in range(ZERO, n, FOUR):
            parts[ZERO, np.uint32(place[k]) >> SHARE_BITS] += one + (place[k] & share)
            parts[ONE, np.uint32(place[k + ONE]) >> SHARE_BITS] += one + (place[k + ONE] & share)
            parts[TWO, np.uint32(place[k + TWO]) >> SHARE_BITS] += one + (place[k + TWO] & share)
            parts[THREE, np.uint32(place[k + THREE]) >> SHARE_BITS] += one + (place[k + THREE] & share)
        held += n
        if held > ENTRY_VOXELS or at + n == end:
            for part in range(FOUR):
                for b in range(np.uint64(bins)):
                    found[ZERO, b] += parts[part, b] >> COUNT_BIT
                    found[ONE, b] += parts[part, b] & (one - 1)
            parts[:] = 0
            held = ZERO


@compiled
def _contract(chunk: int, thread: int, work: Work) -> None:
    """Sum of the weighted residual onto two axes of the lattice."""
    rows, values, lines = work.rows, work.rows.values, work.lines
    low, scale = np.float32(work.limits[ZERO]), _bins_per_unit(work)
    first, second, _ = work.matrices
    parts, plane = work.parts[chunk], work.plane[thread]
    residual, index, run = work.run[thread, ZERO], work.indices[thread], np.uint64(work.run.shape[2] - BEYOND_PAGE)
    zero, outside = np.float32(0), np.float32(lines.shape[1] - 1)
    weighted, start = len(rows.weights) > 0, rows.chunks[chunk]
    parts[:] = zero
    for i in range(start, rows.chunks[chunk + ONE]):
        plane[:] = zero
        row, end = rows.plane[i], rows.plane[i + ONE]
        while row < end:
            begun, at = row, rows.offset[row]
            while row < end and rows.offset[row + ONE] <= at + run:
                row += ONE
            n = rows.offset[row] - at
            for k in range(n):
                index[k] = np.int32(min(max((values[at + k] - low) * scale, zero), outside))
            for k in range(n):
                line = np.uint32(index[k])
                residual[k] = fused(values[at + k], lines[ONE, line], lines[ZERO, line])
            if weighted:
                for k in range(n):
                    residual[k] *= rows.weights[at + k]
            for done in range(begun, row):
                j, k0, r0 = rows.place[done], rows.start[done], rows.offset[done] - at
                b = second.column[j]
                w0, w1, w2, w3 = second.weight[j]
                for k in range(rows.offset[done + ONE] - rows.offset[done]):
                    plane[b, k0 + k] = fused(w0, residual[r0 + k], plane[b, k0 + k])
                    plane[b + ONE, k0 + k] = fused(w1, residual[r0 + k], plane[b + ONE, k0 + k])
                    plane[b + TWO, k0 + k] = fused(w2, residual[r0 + k], plane[b + TWO, k0 + k])
                    plane[b + THREE, k0 + k] = fused(w3, residual[r0 + k], plane[b + THREE, k0 + k])
        for q in range(FOUR):
            weight, a = first.weight[i, q], first.column[i] - first.column[start] + q
            for b in range(np.uint64(parts.shape[1])):
                for k in range(np.uint64(plane.shape[1])):
                    parts[a, b, k] = fused(weight, plane[b, k], parts[a, b, k])
