"""The arrays of an OME-Zarr image: one level read as a coarse volume, and divided by a field unit by unit."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from n4flow.core.blocks import FieldTiles
from n4flow.core.bspline import one_blas_thread
from n4flow.core.field import BiasField
from n4flow.core.quantize import Rounding
from n4flow.errors import InputError, MachineError
from n4flow.images.files import REMEDIES
from n4flow.images.ngff import Files, Image, Level
from n4flow.images.remote import is_of_network, is_remote, options, refusal

#: Voxels that are read at a time where a level is averaged.
BLOCK_VOXELS = 2**22

#: Of the voxels that are no fill, this share counts as darker than the pedestal: `offset: auto` takes their limit.
PEDESTAL_QUANTILE = 0.01


def open_level(image: Image, level: Level) -> zarr.Array[Any]:
    """The array of a level, to be read.

    Raises
    ------
    InputError
        It cannot be opened, perhaps because a codec is missing.
    """
    files = Files(image.path)
    store: Any = zarr.storage.ZipStore(image.path, mode="r") if files.is_zip else os.path.join(image.path, level.path)
    return _open(image.path, store, files.key(level.path) if files.is_zip else "", "r", level)


def _open(source: str, store: Any, path: str, mode: Any, level: Level) -> zarr.Array[Any]:
    told = options(store) if isinstance(store, str) and is_remote(store) else None
    zarr_format = level.metadata.get("zarr_format")
    try:
        return zarr.open_array(store, path=path, mode=mode, zarr_format=zarr_format, storage_options=told)
    except Exception as error:  # every codec has errors of its own
        if is_remote(source) and is_of_network(error):
            raise refusal(source, error) from None
        raise InputError(
            source,
            f"cannot be opened by zarr ({type(error).__name__}: {error})",
            "install the codec that it names, or write the store again with another one",
        ) from None


def read_coarse(
    image: Image, level: Level, factors: Sequence[int], channel: int, time: int | None, offset: float | str
) -> tuple[np.ndarray, float, dict[str, float]]:
    """One level of a channel as a volume, at one time or the mean over time, less the pedestal; streamed by chunks.

    Parameters
    ----------
    image : Image
    level : Level
    factors : three ints
        Voxels that are averaged along each axis of the volume; those that are left over at the far end are left out.
    channel : int
    time : int, optional
        The mean over all time points without it.
    offset : float or "auto"
        The pedestal: what the camera adds to every voxel.

    Returns
    -------
    volume : (n0, n1, n2) float32 array
        In Fortran order; 0 where no voxel is usable: the array's fill value, the largest value of an integer type, NaN.
    offset : float
    shares : dict
        Of the voxels: ``Fill`` and ``Saturated``.

    Raises
    ------
    InputError
        It cannot be read.
    """
    array = open_level(image, level)
    shape = tuple(level.shape[axis] for axis in image.space)
    by_axis = tuple(factors[::-1])[-len(shape) :]
    coarse = tuple(n // f for n, f in zip(shape, by_axis, strict=True))
    limits = Limits.of(array)
    times = range(image.times) if time is None else [time]
    averaged = len(times) > 1 or any(f > 1 for f in by_axis)
    # voxels count then by themselves: those that are not usable are 0, and nothing is taken off the others
    plain = not averaged and offset == 0 and limits.fill == 0 and limits.top is not None
    total = np.zeros(coarse, dtype=np.float64 if averaged else np.float32)
    count = np.zeros(() if plain else coarse, dtype=np.uint32 if averaged else bool)
    fill = saturated = 0
    steps = _steps(level, image)
    used = [n * f for n, f in zip(coarse, by_axis, strict=True)]
    blocks = [
        [slice(start, min(start + step, n)) for start in range(0, n, step)] for n, step in zip(used, steps, strict=True)
    ]
    for at, *part in product(times, *blocks):
        values = _read(image, array, part, channel, at)
        if plain and values.max() != limits.top:  # what holds the fill value is 0 as it is
            fill += values.size - int(np.count_nonzero(values))
            total[tuple(part)] = values
            continue
        unusable = limits.fills(values)
        fill += int(np.count_nonzero(unusable))
        if values.max() == limits.top:
            is_top = values == limits.top
            saturated += int(np.count_nonzero(is_top))
            unusable |= is_top
        if values.dtype.kind == "f":
            unusable |= ~np.isfinite(values)
        usable = np.logical_not(unusable, out=unusable)
        if plain:
            total[tuple(part)] = np.where(usable, values, 0)
            continue
        if not averaged:
            total[tuple(part)], count[tuple(part)] = values, usable
            continue
        sums, counts = np.where(usable, values, 0).astype(np.float64), usable.astype(np.uint32)
        place = []
        for axis, (along, f) in enumerate(zip(part, by_axis, strict=True)):
            edges = np.arange(along.start // f, -(-along.stop // f))
            place.append(slice(int(edges[0]), int(edges[-1]) + 1))
            cuts = np.maximum(edges * f, along.start) - along.start
            sums, counts = (np.add.reduceat(each, cuts, axis=axis) for each in (sums, counts))
        total[tuple(place)] += sums
        count[tuple(place)] += counts
    if averaged:
        total /= np.maximum(count, 1)
    inside = count > 0
    if offset == "auto":
        found = total[inside]
        at = int(PEDESTAL_QUANTILE * found.size)
        offset = float(np.partition(found, at)[at]) if found.size else 0.0
    volume = total.astype(np.float32, copy=False)
    if offset:
        volume -= np.float32(offset)
    if not plain:
        volume[~inside] = 0
    voxels = len(times) * math.prod(used)
    volume = volume.reshape((1,) * (3 - len(coarse)) + coarse)
    return volume.T, float(offset), {"Fill": fill / voxels, "Saturated": saturated / voxels}


def read_part(image: Image, level: Level, part: Sequence[slice], channel: int, time: int) -> np.ndarray:
    """A part of a level along the axes of space, of a channel at a time point.

    Raises
    ------
    InputError
        It cannot be read.
    """
    return _read(image, open_level(image, level), part, channel, time)


def read_nearest(image: Image, level: Level, to_level: np.ndarray, shape: Sequence[int], time: int = 0) -> np.ndarray:
    """Voxels of a level that lie nearest to those of another grid, of the first channel at a time; read by blocks.

    Parameters
    ----------
    image : Image
    level : Level
    to_level : (4, 4) array
        From indices of the other grid to those of the level's array transposed; its axes run along those of the level.
    shape : three ints
        Of the other grid.

    Returns
    -------
    (n0, n1, n2) array
        0 outside of the level.

    Raises
    ------
    InputError
        It cannot be read.
    """
    array = open_level(image, level)
    axes = np.abs(to_level[:3, :3]).argmax(axis=1)  # for each of the level's, which of the other grid runs along it
    found = np.zeros([shape[axis] for axis in axes], dtype=array.dtype)
    nearest = [
        np.rint(to_level[row, axis] * np.arange(shape[axis]) + to_level[row, 3]).astype(np.int64)
        for row, axis in enumerate(axes)
    ]
    space = image.space[::-1]
    blocks = [
        [slice(start, min(start + step, level.shape[axis])) for start in range(0, level.shape[axis], step)]
        for axis, step in zip(space, _steps(level, image)[::-1], strict=True)
    ]
    if len(blocks) == 2:
        blocks.append([slice(0, 1)])
    for block in product(*blocks):
        wanted = [np.flatnonzero((n >= part.start) & (n < part.stop)) for n, part in zip(nearest, block, strict=True)]
        if all(map(len, wanted)):
            part = block[: len(space)][::-1]
            values = _read(image, array, part, 0, time).T.reshape([each.stop - each.start for each in block])
            places = [n[which] - each.start for n, which, each in zip(nearest, wanted, block, strict=True)]
            found[np.ix_(*wanted)] = values[np.ix_(*places)]
    return found.transpose(np.argsort(axes))


def _steps(level: Level, image: Image) -> list[int]:
    """How far apart the blocks are that are read at a time: whole units, several of them where they are small."""
    steps = [level.unit[axis] for axis in image.space]
    for axis in reversed(range(len(steps))):
        n = level.shape[image.space[axis]]
        room = max(1, BLOCK_VOXELS // math.prod(steps))
        steps[axis] = min(steps[axis] * room, -(-n // steps[axis]) * steps[axis])
    return steps


def _read(image: Image, array: zarr.Array[Any], part: Sequence[slice], channel: int, time: int) -> np.ndarray:
    index: list[Any] = [{"t": time, "c": channel}.get(name) for name in image.axes]
    for axis, along in zip(image.space, part, strict=True):
        index[axis] = along
    with _reading(image.path):
        return np.asarray(array[tuple(index)])


class _reading:
    """Turns what zarr and its codecs raise into one line for the user."""

    def __init__(self, source: str, done: str = "read") -> None:
        self.source, self.done = source, done

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (InputError, MemoryError)) or not isinstance(error, Exception):
            return
        if is_remote(self.source) and is_of_network(error):
            raise refusal(self.source, error, self.done) from None
        if isinstance(error, OSError) and error.errno in REMEDIES:
            raise MachineError(self.source, f"cannot be written ({error.strerror})", REMEDIES[error.errno]) from None
        raised = MachineError if isinstance(error, OSError) else InputError
        raise raised(self.source, f"cannot be read ({type(error).__name__}: {error})", "copy it again") from None


@dataclass(frozen=True)
class Limits:
    """Values of an array that say nothing of an intensity.

    Parameters
    ----------
    fill : float
        What voxels of chunks hold that were never written.
    top : int, optional
        The largest value of an integer type: saturated.
    """

    fill: Any
    top: int | None

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> Limits:
        """Those of an array."""
        dtype = np.dtype(array.dtype)
        fill = np.asarray(0 if array.fill_value is None else array.fill_value, dtype=dtype)[()]
        return cls(fill, int(np.iinfo(dtype).max) if dtype.kind in "iu" else None)

    def fills(self, values: np.ndarray) -> np.ndarray:
        """Where values are the fill value."""
        return np.isnan(values) if self.fill != self.fill else values == self.fill


#: A channel, and the time point of it that is meant; None for all of them.
Place = tuple[int, int | None]


class ChannelDivision(NamedTuple):
    """By what a channel is divided; nothing is copied but what has none."""

    field: BiasField
    offset: float = 0.0


@dataclass
class Tally:
    """What was seen while units were divided.

    Parameters
    ----------
    voxels, fill, saturated, clipped : int
        Voxels; those that hold the fill value, are saturated, or would be larger or smaller than the type holds.
    self_check : float
        Largest ``|written - expected|`` beyond the rounding, relative to the expected value, of a line of voxels of
        each unit that is found in another way.
    units : dict of str to str
        SHA-256 of the voxels of each unit, before and after, by its place among the units.
    empty : list of str
        Places of those that hold nothing but the fill value, of what is not copied: nobody wrote them, or they were
        lost.
    """

    voxels: int = 0
    fill: int = 0
    saturated: int = 0
    clipped: int = 0
    self_check: float = 0.0
    units: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count what another one has seen, too."""
        for name in ("voxels", "fill", "saturated", "clipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.self_check = max(self.self_check, other.self_check)
        self.units |= other.units
        self.empty += other.empty


@one_blas_thread
def divide_units(
    image: Image,
    level: Level,
    target: str | Path,
    channels: Mapping[Place, ChannelDivision],
    units: Sequence[int],
    *,
    keep_saturated: bool = True,
    threads: int = 1,
) -> Tally:
    """Divide some units of a level by the fields of its channels, and write them.

    ``out = (v - offset) / exp(B) + offset`` in float64; integers are rounded half to even and cut off at the limits of
    their type. The fill value stays what it is, and so does the largest value of an integer type, if wanted. A channel
    without a field is copied.

    Parameters
    ----------
    image : Image
    level : Level
    target : path-like
        The array to write, with the units of `level`.
    channels : mapping of (int, int or None) to ChannelDivision
        Fields on the grid of the level, of a channel at a time point or at all of them.
    units : sequence of int
        Which ones, counted in C order: no other writer may have one of these.
    keep_saturated : bool
    threads : int
        Units that are worked on side by side; the result does not depend on it.

    Returns
    -------
    Tally

    Raises
    ------
    InputError
        Something cannot be read or written.
    """
    with zarr.config.set({"threading.max_workers": threads, "async.concurrency": max(2, threads)}):
        source, out = open_level(image, level), _open(str(target), str(target), "", "r+", level)
        if tuple(out.shape) != level.shape or (out.shards or out.chunks) != level.unit:
            raise InputError(target, "is the array of another plan", "remove the store, then run it again")
        work = _Division(image, level, source, out, str(target), channels, keep_saturated)
        tally = Tally()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for part in pool.map(work.divide, units):
                    tally.add(part)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return tally


class _Division:
    """What the units of a level have in common."""

    def __init__(
        self,
        image: Image,
        level: Level,
        source: zarr.Array[Any],
        out: zarr.Array[Any],
        target: str,
        channels: Mapping[Place, ChannelDivision],
        keep_saturated: bool,
    ) -> None:
        self.image, self.level, self.source, self.out, self.channels = image, level, source, out, channels
        self.target = target
        self.tiles = {index: FieldTiles(each.field) for index, each in channels.items()}
        self.limits = Limits.of(source)
        self.rounding = Rounding(np.dtype(source.dtype), np.dtype(out.dtype), self.limits.fill, keep_saturated)

    def divide(self, unit: int) -> Tally:
        image, level = self.image, self.level
        place = [int(at) for at in np.unravel_index(unit, level.unit_grid)]
        region = _region(level, place)
        with _reading(image.path):
            values = np.asarray(self.source[region])
        out = np.empty(values.shape, dtype=self.out.dtype.newbyteorder("="))
        tally = Tally(voxels=values.size)
        block = [region[axis] for axis in image.space]
        if len(block) == 2:
            block.insert(0, slice(0, 1))
        divided = 0
        outer: list[Any] = [range(n) for n in values.shape[: values.ndim - len(image.space)]]
        for index in product(*outer):
            at = {image.axes[axis]: region[axis].start + along for axis, along in enumerate(index)}
            channel, time = at.get("c", 0), at.get("t", 0)
            here, there = values[index], out[index]
            known = next((key for key in ((channel, time), (channel, None)) if key in self.channels), None)
            if known is None:
                there[...] = here
                continue
            if here.ndim == 2:
                here, there = here[None], there[None]
            self._divide_block(block, known, here, there, tally)
            divided += here.size
        with _reading(self.target, "written"):
            self.out[region] = out
        name = ".".join(map(str, place))
        tally.units[name] = f"{_sha256(values)} {_sha256(out)}"
        if divided and tally.fill == divided and (divided == values.size or self.limits.fills(values).all()):
            tally.empty.append(name)
        return tally

    def _divide_block(
        self, block: Sequence[slice], channel: Place, values: np.ndarray, out: np.ndarray, tally: Tally
    ) -> None:
        offset = self.channels[channel].offset
        if self.limits.fills(values[:1, :1]).all() and self.limits.fills(values).all():
            out[...] = self.rounding.fill
            tally.fill += values.size
            return
        for part, ratio in self.tiles[channel].tiles(block):
            counts = self.rounding(values[part], ratio, offset, out[part])
            tally.fill += counts.fill
            tally.saturated += counts.saturated
            tally.clipped += counts.clipped
        self._check(block, channel, values, out, tally)

    def _check(self, block: Sequence[slice], channel: Place, values: np.ndarray, out: np.ndarray, tally: Tally) -> None:
        """Compare the line of voxels in the middle with the same from the field as it stands."""
        z, y = values.shape[0] // 2, values.shape[1] // 2
        line, written = values[z, y].astype(np.float64), out[z, y].astype(np.float64)
        whole = self.channels[channel]
        places = [np.arange(block[2].start, block[2].stop), [block[1].start + y], [block[0].start + z]]
        ratio = np.exp(whole.field.log_at([np.asarray(p, dtype=np.float64) for p in places]))[:, 0, 0]
        expected = (line - whole.offset) / ratio + whole.offset
        known = self.rounding.is_plain(values[z, y], expected)
        error = np.abs(written - expected)[known] - (0.5 if self.rounding.whole else 0)
        if error.size:
            relative = error / np.maximum(np.abs(expected[known]), 1)
            tally.self_check = max(tally.self_check, float(relative.max()))


def _region(level: Level, place: Sequence[int]) -> tuple[slice, ...]:
    """Of the array, what a unit holds."""
    return tuple(
        slice(at * size, min((at + 1) * size, n)) for at, size, n in zip(place, level.unit, level.shape, strict=True)
    )


def places_of(image: Image, level: Level, units: Sequence[int]) -> set[tuple[range, range]]:
    """Channels and time points that units have voxels of."""
    regions = (_region(level, place) for place in zip(*np.unravel_index(units, level.unit_grid), strict=True))
    along = (dict(zip(image.axes, region, strict=True)) for region in regions)
    whole = slice(0, 1)  # of an axis that the array has not
    return {
        (range(c.start, c.stop), range(t.start, t.stop))
        for c, t in ((of.get("c", whole), of.get("t", whole)) for of in along)
    }


def unit_digests(image: Image, level: Level, places: Iterable[str]) -> Iterator[tuple[str, str]]:
    """SHA-256 of the voxels of units, as `Tally` has them; of a unit that cannot be read, what is wrong.

    Parameters
    ----------
    image : Image
    level : Level
    places : iterable of str
        Of the units among those of the level: ``0.1.2``.

    Yields
    ------
    place, digest : str
    """
    array = open_level(image, level)
    for place in places:
        try:
            with _reading(image.path):
                values = np.asarray(array[_region(level, [int(at) for at in place.split(".")])])
            yield place, _sha256(values)
        except InputError as error:
            yield place, str(error)


def level_digest(units: Mapping[str, str]) -> str:
    """SHA-256 of a level: of the digests of its units, by their places."""
    return hashlib.sha256("".join(f"{place} {units[place]}\n" for place in sorted(units)).encode()).hexdigest()


def _sha256(values: np.ndarray) -> str:
    """Of the values in C order, lowest byte first."""
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return hashlib.sha256(values.view(np.uint8).reshape(-1).data).hexdigest()


def unit_numbers(level: Level, part: int, units_per_part: int) -> Iterator[int]:
    """Numbers of the units of a part."""
    return iter(range(part * units_per_part, min((part + 1) * units_per_part, math.prod(level.unit_grid))))
