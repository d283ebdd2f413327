"""The three passes, and the division by the field, on an NVIDIA GPU: launches what `cuda.cu` holds.

An iteration is a chain of launches that waits for nothing: what sharpening finds, statistics, lattice
and the decision that a stage is done stay on the device, and the host looks only now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from n4flow.core.field import BiasField
from n4flow.core.fit import BENT, FULLY_DAMPED_GAIN, LEAST_DAMPING, PenalisedLeastSquares, SplineFit
from n4flow.core.sharpening import NARROWEST_BINS, NEXT_TO_NOTHING, SMALLEST_GAIN, TWICINGS
from n4flow.kernels.protocol import Oriented
from n4flow.parameters import N4Parameters, Stage

#: Threads in a block.
THREADS = 256

#: Rows that each warp of 32 threads subtracts an update from.
WARP_ROWS = 4

#: Voxels that a block counts in a histogram of its own: below 2**16, or its 32 bits would overflow.
HISTOGRAM_VOXELS = 2**13

#: Rows that one thread adds up in the fit, and that it divides by the field (as in cuda.cu).
GROUP_ROWS = STRETCH = 32

#: Rows begin and end at multiples of this: what a GPU reads at once, 32 bytes.
LANES = 8

#: Shared memory that every GPU gives a block without being asked.
SHARED_BYTES = 48 * 1024

#: More copies of a block's histogram than this save no time; nor may they take this much from other blocks.
HISTOGRAM_COPIES, HISTOGRAM_BYTES = 8, 16 * 1024

#: A stage is looked at every so many iterations: those past its end cost only their launches.
LOOK_EVERY = 8

#: Bytes of a Found in cuda.cu.
FOUND_BYTES = 24

WARP = 32

#: Of shared memory: what a block adds up numbers in.
SUM_BYTES = 8 * THREADS // WARP

#: Numbers that sharpening holds for each bin of the padded histogram (as in cuda.cu).
SHARPEN_DOUBLES = 6

SOURCE = Path(__file__).with_name("cuda.cu")


def compiler_options() -> tuple[str, ...]:
    """What `SOURCE` is compiled with."""
    constants = {
        "THREADS": THREADS,
        "WARP_ROWS": WARP_ROWS,
        "HISTOGRAM_VOXELS": HISTOGRAM_VOXELS,
        "STRETCH": STRETCH,
        "NARROWEST_BINS": NARROWEST_BINS,
        "NEXT_TO_NOTHING": NEXT_TO_NOTHING,
        "TWICINGS": TWICINGS,
        "SMALLEST_GAIN": SMALLEST_GAIN,
        "BENT": BENT,
        "FULLY_DAMPED_GAIN": FULLY_DAMPED_GAIN,
        "LEAST_DAMPING": LEAST_DAMPING,
    }
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in constants.items()))


@cache
def _module(cupy: Any) -> Any:
    """The kernels; CuPy keeps them on disk once they have been compiled for a device."""
    return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=compiler_options())


@cache
def _kernel(cupy: Any, name: str) -> Any:
    return _module(cupy).get_function(name)


def _launch(name: str, threads: int, *arguments: Any, shared_bytes: int = 0) -> Callable[[], None]:
    """What enqueues a kernel with at least so many threads, in blocks of `THREADS`, when it is called.

    Arguments are arrays on the device, or numbers of exactly the type that the kernel takes: a
    whole number is passed as its 4 bytes (int32) unless it is an np.int64, a float as float64.
    """
    import cupy

    typed = tuple(np.int32(a) if type(a) is int else np.float64(a) if type(a) is float else a for a in arguments)
    return partial(_kernel(cupy, name), (-(-threads // THREADS),), (THREADS,), typed, shared_mem=shared_bytes)


def _run(launches: Iterable[Callable[[], None]]) -> None:
    for launch in launches:
        launch()


class Taps(NamedTuple):
    """A basis matrix by its four entries per row that may not be 0, on the device."""

    columns: Any  # (n,) int32: the first of the four
    weights: Any  # (n, 4) float32 or float64


def _first_columns(basis: np.ndarray) -> np.ndarray:
    return np.minimum((basis != 0).argmax(axis=1), max(basis.shape[1] - 4, 0))


def _taps(matrix: np.ndarray, columns: np.ndarray, dtype: Any) -> Taps:
    import cupy

    padded = np.pad(matrix, ((0, 0), (0, 3)))
    weights = np.take_along_axis(padded, columns[:, None] + np.arange(4), axis=1)
    return Taps(cupy.asarray(columns.astype(np.int32)), cupy.asarray(weights.astype(dtype)))


def _reach(columns: np.ndarray, points: int) -> Any:
    """For each control point c, and four more, the first sample whose taps begin at c - 3 or later."""
    import cupy

    return cupy.asarray(np.searchsorted(columns, np.arange(-3, points + 1)).astype(np.int32))


class _Rows(NamedTuple):
    """Voxels of the mask on the device, with those between them along a row."""

    values: Any  # (voxels,) float32: u - B less the centre; NaN outside the mask
    weights: Any  # (voxels,) float32, or `values` again where all are 1
    base: Any  # (rows,) int64: place of voxel 0 of each row in `values`, were it there
    ends: Any  # (rows, 2) int32: its first voxel there, and that behind its last


class CudaKernels:
    """`protocol.Kernels` in CUDA: float32 over the voxels, exact histograms, float64 sums in a fixed order.

    Parameters
    ----------
    log_image : (n0, n1, n2) array
        Log intensities on the sample grid; anything where the weight is 0.
    weights : (n0, n1, n2) array of bool or float
        Confidence of each sample; 0 outside the mask. It gates the histogram and weights the fit.
    parameters : N4Parameters
    """

    def __init__(self, log_image: np.ndarray, weights: np.ndarray, parameters: N4Parameters) -> None:
        import cupy

        self.parameters = parameters
        samples = Oriented.of(log_image, weights)
        self.axes, self.centre = samples.axes, samples.centre
        self.count = int(samples.inside.sum())
        self.planes, self.rows_a_plane, self.length = samples.log_image.shape
        self.width = -(-self.length // WARP) * WARP
        self.rows = _rows(samples)
        self.weighted = int(self.rows.weights is not self.rows.values)

        bins = self.bins = parameters.histogram_bins
        low, high = (np.float32(value - self.centre) for value in (samples.low, samples.high))
        per_unit = (bins - 1) / (float(high) - float(low)) if high > low else 0.0
        self.range = cupy.asarray(np.array([low, high, per_unit], dtype=np.float32))
        self.counters = cupy.zeros(2, dtype=np.int32)  # done, iterations
        self.done = self.counters[:1]
        self.cvs = cupy.zeros(max(parameters.iterations), dtype=np.float64)
        self.gain = cupy.zeros(1, dtype=np.float64)
        self.bent = cupy.zeros(1, dtype=np.float64)
        self.spline_fit: SplineFit | None = None

        self.counts = cupy.zeros(bins, dtype=np.uint64)
        self.copies = min(max(HISTOGRAM_BYTES // (4 * bins), int(4 * bins <= SHARED_BYTES)), HISTOGRAM_COPIES)
        self.lines = cupy.zeros((bins - 1, 2), dtype=np.float32)
        self.padded = 2 ** (int(np.ceil(np.log2(bins))) + 1)
        angles = -2 * np.pi / self.padded * np.arange(self.padded // 2)
        self.roots = cupy.asarray(np.stack([np.cos(angles), np.sin(angles)], axis=1))
        in_shared = SUM_BYTES + SHARPEN_DOUBLES * 8 * self.padded
        self.in_shared = int(in_shared <= SHARED_BYTES)
        self.sharpen_bytes = in_shared if self.in_shared else SUM_BYTES
        self.scratch = cupy.zeros(1 if self.in_shared else SHARPEN_DOUBLES * self.padded, dtype=np.float64)

        self.subtract_blocks = -(-self.planes * self.rows_a_plane // (WARP_ROWS * THREADS // WARP))
        self.extremes = cupy.zeros((self.subtract_blocks, 2), dtype=np.float32)
        self.sums = cupy.zeros((self.subtract_blocks, 2), dtype=np.float64)

    def start_stage(self, stage: Stage, fit: SplineFit, lattice: np.ndarray) -> None:
        import cupy

        if fit is not self.spline_fit:
            self._set_mesh(fit)
        self.stage, self.enqueued = stage, 0
        self.lattice[...] = cupy.asarray(np.ascontiguousarray(lattice.transpose(self.axes)))
        if isinstance(fit, PenalisedLeastSquares):
            modes = fit.to_modes @ lattice.ravel()
            self.modes[...] = cupy.asarray(modes)
            self.bent[...] = cupy.asarray(np.array([(fit.bending * modes**2).sum()]))
        low, high, _ = self.range.get().tolist()
        self.counters[:] = 0
        if low == high:
            self.counters[:1] = 1
        # all that an iteration launches is put together here, since that takes as long as an iteration
        self.to_sharpen, self.to_fit, self.to_subtract = self._to_sharpen(), self._to_fit(), self._to_subtract()

    def _set_mesh(self, fit: SplineFit) -> None:
        import cupy

        self.spline_fit = fit
        bases, matrices = ([of[axis] for axis in self.axes] for of in (fit.bases, fit.matrices))
        shape = m0, m1, m2 = tuple(basis.shape[1] for basis in bases)
        self.padded_j = max(m1, 4)
        self.lattice, self.update = (cupy.zeros(shape, dtype=np.float64) for _ in range(2))
        columns = [_first_columns(basis) for basis in bases]
        types = (np.float64, np.float32, np.float64)
        self.taps, self.gather_taps = (
            [_taps(*axis) for axis in zip(of, columns, types, strict=True)] for of in (bases, matrices)
        )
        self.reach = [_reach(columns[axis], bases[axis].shape[1]) for axis in (0, 2)]
        # groups of rows, and the slots that their sums take: one for each control point that they reach
        group_rows = np.append(np.arange(0, self.rows_a_plane, GROUP_ROWS), self.rows_a_plane)
        reached = columns[1][group_rows[1:] - 1] - columns[1][group_rows[:-1]] + 4
        slots = np.concatenate([[0], np.cumsum(reached)])
        self.groups, self.slots = len(reached), int(slots[-1])
        self.group_rows, self.group_slots = (cupy.asarray(a.astype(np.int32)) for a in (group_rows, slots))
        self.parts = cupy.empty((self.planes, self.slots, self.length), dtype=np.float32)
        self.plane_sums = cupy.empty((self.planes, m1, m2), dtype=np.float64)
        self.along = cupy.empty((self.planes, self.padded_j, self.length), dtype=np.float32)

        points = m0 * m1 * m2
        if isinstance(fit, PenalisedLeastSquares):
            # control points in the order of our axes
            order = np.arange(points).reshape([shape[axis] for axis in np.argsort(self.axes)])
            to_points = fit.to_points[order.transpose(self.axes).ravel()]
            self.to_points, self.of_points = cupy.asarray(to_points), cupy.asarray(np.ascontiguousarray(to_points.T))
            self.bending, self.seen = cupy.asarray(fit.bending), cupy.asarray(fit.seen)
            self.modes, self.mode_update = (cupy.zeros(len(fit.seen), dtype=np.float64) for _ in range(2))
            self.gathered = cupy.zeros(shape, dtype=np.float64)
            self.factors = cupy.asarray(np.full(shape, 1 / fit.total))
        else:
            self.bending = self.modes = self.mode_update = cupy.zeros(0, dtype=np.float64)
            self.gathered = self.update
            self.factors = cupy.asarray(np.ascontiguousarray(1 / fit.divisors.transpose(self.axes)))

    def sharpen(self) -> Any:
        _run(self.to_sharpen)
        return self.lines

    def fit(self, table: Any) -> Any:
        assert table is self.lines
        _run(self.to_fit)
        return self.update

    def subtract(self, update: Any) -> None:
        assert update is self.update
        _run(self.to_subtract)
        self.enqueued += 1

    def converged(self) -> bool:
        return self.enqueued % LOOK_EVERY == 0 and bool(self.done.get()[0])

    def end_stage(self) -> tuple[np.ndarray, list[float]]:
        cvs = self.cvs.get()[: self.counters.get()[1]].tolist()
        return np.ascontiguousarray(self.lattice.get().transpose(np.argsort(self.axes))), cvs

    def _to_sharpen(self) -> list[Callable[[], None]]:
        values, parameters = self.rows.values, self.parameters
        histogram = _launch(
            "histogram",
            THREADS * -(-values.size // HISTOGRAM_VOXELS),
            *(self.done, self.range, values, np.int64(values.size), self.bins, self.copies, self.counts),
            shared_bytes=4 * self.bins * self.copies,
        )
        sharpen = _launch(
            "sharpen",
            THREADS,
            *(self.done, self.range, self.counts, self.bins, self.padded, float(self.stage.fwhm)),
            *(float(parameters.wiener_noise), float(self.stage.twicing), int(parameters.as_itk)),
            *(self.centre, self.roots),
            *(self.scratch, self.in_shared, self.lines, self.gain),
            shared_bytes=self.sharpen_bytes,
        )
        return [histogram, sharpen]

    def _to_fit(self) -> list[Callable[[], None]]:
        m0, m1, m2 = self.lattice.shape
        points, (first, second, third) = m0 * m1 * m2, self.gather_taps
        gather = [
            self._sum_rows(second),
            self._sum_planes(third),
            _launch(
                "gather_lattice",
                WARP * points,
                *(self.done, self.plane_sums, m0, m1 * m2, first.columns, self.reach[0], first.weights),
                *(self.factors, self.gathered),
            ),
        ]
        if not isinstance(self.spline_fit, PenalisedLeastSquares):
            return gather
        modes = self.modes.size
        return [
            *gather,
            _launch(
                "solve",
                WARP * modes,
                *(self.done, self.of_points, self.gathered, modes, points, self.bending, self.seen, self.modes),
                *(self.gain, self.bent, float(self.spline_fit.penalty(self.stage.fwhm)), self.mode_update),
            ),
            _launch(
                "points_of_modes",
                WARP * points,
                *(self.done, self.to_points, self.mode_update, points, modes, self.update),
            ),
        ]

    def _to_subtract(self) -> list[Callable[[], None]]:
        parameters, update, shared_bytes = self.parameters, self.update, FOUND_BYTES * THREADS // WARP
        subtract = _launch(
            "subtract",
            THREADS * self.subtract_blocks,
            *(self.done, self.along, np.int64(self.planes * self.rows_a_plane), self.rows_a_plane, self.length),
            *(self.padded_j, *self.taps[1], self.rows.base, self.rows.ends),
            *(self.rows.values, self.extremes, self.sums),
            shared_bytes=shared_bytes,
        )
        finish = _launch(
            "finish",
            THREADS,
            *(self.counters, self.range, self.extremes, self.sums, self.subtract_blocks, np.int64(self.count)),
            *(self.bins, float(parameters.convergence_threshold), update, update.size, self.lattice),
            *(self.bending, self.mode_update, self.modes.size, self.modes, self.bent, self.cvs),
            shared_bytes=shared_bytes,
        )
        expand = _expansion(self.done, update, (0, 1, 2), self.taps[0], self.taps[2], self.along)
        return [expand, subtract, finish]

    def _sum_rows(self, taps: Taps) -> Callable[[], None]:
        rows = self.rows
        return _launch(
            "gather_rows",
            self.planes * self.groups * self.width,
            *(self.done, self.range, rows.values, rows.weights, self.weighted, rows.base, rows.ends, self.planes),
            *(self.rows_a_plane, self.length, self.width, self.groups, self.group_rows, self.group_slots),
            *(*taps, self.lines, self.bins, self.slots, self.parts),
        )

    def _sum_planes(self, taps: Taps) -> Callable[[], None]:
        _, m1, m2 = self.lattice.shape
        return _launch(
            "gather_planes",
            WARP * self.planes * m1 * m2,
            *(self.done, self.parts, self.planes, m1, m2, self.length, self.groups, self.slots, self.group_rows),
            *(self.group_slots, self.taps[1].columns, taps.columns, self.reach[1], taps.weights, self.plane_sums),
        )


def _rows(samples: Oriented) -> _Rows:
    import cupy

    inside = samples.inside
    n0, n1, n2 = inside.shape
    seen = inside.any(axis=2)
    start = np.where(seen, inside.argmax(axis=2) // LANES * LANES, 0)
    end = np.where(seen, -(-(n2 - inside[:, :, ::-1].argmax(axis=2)) // LANES) * LANES, 0)
    offset = np.concatenate([[0], np.cumsum(end - start)])
    place = np.arange(-(-n2 // LANES) * LANES)
    padding = ((0, 0), (0, len(place) - n2))
    arrays = [(samples.log_image, samples.centre, np.empty(offset[-1], dtype=np.float32))]
    if samples.weights.dtype != bool:
        arrays.append((samples.weights, 0.0, np.empty(offset[-1], dtype=np.float32)))
    for i in range(n0):
        taken = slice(offset[i * n1], offset[(i + 1) * n1])
        kept = (place >= start[i, :, None]) & (place < end[i, :, None])
        for array, zero, packed in arrays:
            plane = np.where(inside[i], array[i] - zero, np.nan)
            packed[taken] = np.pad(plane, padding, constant_values=np.nan)[kept]
    on_device = [cupy.asarray(packed) for _, _, packed in arrays]
    ends = np.stack([start.ravel(), end.ravel()], axis=1).astype(np.int32)
    base = (offset[:-1] - start.ravel()).astype(np.int64)
    return _Rows(on_device[0], on_device[-1], cupy.asarray(base), cupy.asarray(ends))


def _expansion(done: Any, lattice: Any, axes: Sequence[int], first: Taps, last: Taps, along: Any) -> Callable[[], None]:
    """Evaluate a lattice, seen with its axes in another order, along its first and last axis."""
    steps = [lattice.strides[axis] // lattice.itemsize for axis in axes]
    points = [lattice.shape[axis] for axis in axes]
    return _launch("expand", along.size, done, lattice, *points, *steps, *along.shape, *first, *last, along)


class FieldDivision:
    """Divides images on the GPU by ``exp`` of a log bias field.

    Parameters
    ----------
    field : BiasField
        On a grid that is aligned with its mesh.
    """

    def __init__(self, field: BiasField) -> None:
        import cupy

        bases = field.image_bases
        self.lattice = cupy.asarray(field.lattice_on_grid)
        columns = [_first_columns(basis) for basis in bases]
        # any axis may turn out to be the one with float32 taps
        self.taps, self.row_taps = (
            [_taps(basis, column, dtype) for basis, column in zip(bases, columns, strict=True)]
            for dtype in (np.float64, np.float32)
        )
        self.never = cupy.zeros(1, dtype=np.int32)

    def divide(self, tile: Sequence[slice], image: Any, corrected: Any, ratio: Any) -> None:
        """Divide a tile of the image; enqueued on the current stream.

        Parameters
        ----------
        tile : three slices
            Where it lies in the image.
        image : (n0, n1, n2) float32 array on the GPU
            With any strides; rows are read along the axis with the smallest.
        corrected, ratio : arrays likewise
            Take the results: image divided by field, and field. Either may be `image` itself.
        """
        import cupy

        # by strides alone: a voxel gets the same bits in a tile of any size
        axes = sorted(range(3), key=lambda axis: (image.shape[axis] > 1, -abs(image.strides[axis])))
        first, middle, last = axes
        planes, rows, length = (image.shape[axis] for axis in axes)
        first_taps, last_taps = (Taps(*(part[tile[axis]] for part in self.taps[axis])) for axis in (first, last))
        row_taps = Taps(*(part[tile[middle]] for part in self.row_taps[middle]))
        padded = max(self.lattice.shape[middle], 4)
        along = cupy.empty((planes, padded, length), dtype=np.float32)
        width, stretches = -(-length // WARP) * WARP, -(-rows // STRETCH)
        arrays: list[Any] = []
        for array in (image, corrected, ratio):
            arrays += [array, *(np.int64(array.strides[axis] // array.itemsize) for axis in axes)]
        expand = _expansion(self.never, self.lattice, axes, first_taps, last_taps, along)
        divide = _launch(
            "divide",
            planes * stretches * width,
            *(along, planes, rows, length, width, padded, stretches, *row_taps, *arrays),
        )
        _run([expand, divide])

    def divide_tiles(self, tiles: Iterable[tuple[Sequence[slice], Any]]) -> Iterator[tuple[Any, Any]]:
        """Divide tiles one after the other, and leave them where they are: on the GPU or on the host.

        While a tile of the host is used, the next is copied to the GPU, divided and copied back. Memory
        is that of two tiles, on the device and, page-locked, on the host.

        Parameters
        ----------
        tiles : iterable
            Slices of a tile, and its values, any real dtype; all CuPy arrays or all NumPy arrays.

        Yields
        ------
        corrected, ratio : float32 arrays
            Valid until the next tile is asked for.
        """
        import cupy

        cupy.cuda.get_current_stream().synchronize()  # what the lattice came on
        staged = [_Staged(self), _Staged(self)]
        waiting: _Staged | None = None
        try:
            for n, (tile, values) in enumerate(tiles):
                if isinstance(values, cupy.ndarray):
                    results = [cupy.empty(values.shape, dtype=np.float32) for _ in range(2)]
                    self.divide(tile, values.astype(np.float32, copy=False), *results)
                    yield results[0], results[1]
                    continue
                staged[n % 2].enqueue(tile, values)
                if waiting:
                    yield waiting.finished()
                waiting = staged[n % 2]
            if waiting:
                yield waiting.finished()
        finally:  # whoever has had enough of it frees memory that copies may still be under way to
            for stage in staged:
                stage.stream.synchronize()


class _Staged:
    """A tile on its way to the GPU and back, on a stream of its own."""

    def __init__(self, division: FieldDivision) -> None:
        import cupy

        self.division = division
        self.stream = cupy.cuda.Stream()
        self.host: Any = None

    def enqueue(self, tile: Sequence[slice], values: np.ndarray) -> None:
        import cupy
        import cupyx

        with self.stream:
            if self.host is None or self.host.shape[1:] != values.shape:
                # image, corrected, ratio; page-locked, or copies would not overlap with anything
                self.host = cupyx.empty_pinned((3, *values.shape[::-1]), dtype=np.float32).transpose(0, 3, 2, 1)
                self.device = cupy.empty((3, *values.shape[::-1]), dtype=np.float32).transpose(0, 3, 2, 1)
            np.copyto(self.host[0], values, casting="unsafe")
            self.device[0].data.copy_from_host_async(self.host[0].ctypes.data, self.host[0].nbytes)
            self.division.divide(tile, *self.device)
            self.device[1].data.copy_to_host_async(self.host[1].ctypes.data, 2 * self.host[0].nbytes)

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        self.stream.synchronize()
        return self.host[1], self.host[2]
