"""OME-Zarr metadata, NGFF 0.4 and 0.5: what is in a store, and where its voxels lie.

Only the standard library is used: the workflow plans with this before any job runs.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from n4flow.errors import DamagedError, InputError
from n4flow.images.remote import is_remote, read_all

#: The user, and perhaps the password, in an address.
USER = re.compile(r"([^/]+://)[^/]*@")

#: What names an OME-Zarr image: a folder, also one in it, or such a folder in a zip file.
STORE = re.compile(r"\.zarr(/.*)?$|\.ozx$|\.zarr\.zip$", re.IGNORECASE)

#: Root metadata by the version of NGFF. It is written last: without it, readers refuse the store.
ROOTS = {"0.5": "zarr.json", "0.4": ".zattrs"}

#: Metadata of an array.
ARRAYS = {"0.5": "zarr.json", "0.4": ".zarray"}

MM_PER_UNIT = {
    **dict.fromkeys(("micrometer", "micrometre", "micron", "um", "µm", "μm"), 1e-3),
    **dict.fromkeys(("millimeter", "millimetre", "mm"), 1.0),
    **dict.fromkeys(("nanometer", "nanometre", "nm"), 1e-6),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), 10.0),
    **dict.fromkeys(("meter", "metre", "m"), 1e3),
    **dict.fromkeys(("angstrom", "Å"), 1e-7),
    **dict.fromkeys(("picometer", "picometre", "pm"), 1e-9),
    "inch": 25.4,
}

#: Without a unit, lengths are µm if the longest edge of the object is one of these, in mm.
EDGE_WITHOUT_UNIT_MM = (0.1, 1000.0)

#: With a unit, no object is shorter or longer, in mm.
EDGE_MM = (1e-3, 3000.0)

#: How levels are called whose voxels are picked from the level before, not averaged: the first voxels' centres agree.
PICKED = re.compile(r"nearest|stride|subsampl|decimat|pick|slic", re.IGNORECASE)

#: Names of the space axes, as of the rows of an affine.
SPACE = ("x", "y", "z")


@dataclass(frozen=True)
class Level:
    """An array of a pyramid.

    Parameters
    ----------
    path : str
        In the store.
    shape, chunks, unit : tuple of int
        Of all axes, in the order of the array. A unit is what one writer must write as a whole: a shard, or a chunk
        where there are none.
    dtype : str
        As NumPy knows it, byte order left out: ``uint16``.
    scale, translation : tuple of float
        Of all axes: from an index to a place; along space in mm.
    metadata : mapping
        The array's own, as it stands in the store.
    """

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    unit: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    metadata: Mapping[str, Any]

    @property
    def itemsize(self) -> int:
        """Bytes of a voxel."""
        return int(re.sub(r"\D", "", self.dtype)) // 8

    @property
    def unit_grid(self) -> tuple[int, ...]:
        """Units along each axis."""
        return tuple(-(-n // size) for n, size in zip(self.shape, self.unit, strict=True))

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit before it is compressed."""
        return math.prod(min(n, size) for n, size in zip(self.shape, self.unit, strict=True)) * self.itemsize

    def units_per_part(self, job_gb: float) -> int:
        """Units that a job does which is to divide so many GB (of voxels that are not compressed)."""
        return max(1, int(job_gb * 1e9 / self.unit_bytes))

    def parts(self, job_gb: float) -> int:
        """Jobs that divide this level."""
        return -(-math.prod(self.unit_grid) // self.units_per_part(job_gb))


@dataclass(frozen=True)
class Image:
    """An OME-Zarr image: a pyramid of arrays on the same axes.

    Parameters
    ----------
    path : str
        Of the store.
    version : str
        Of NGFF: ``0.4`` (zarr v2) or ``0.5`` (zarr v3).
    axes : tuple of str
        Names: t, c and those of space, in the order of the arrays.
    levels : tuple of Level
        From the finest to the coarsest.
    labels : tuple of str
        Of the channels; empty for one that has no name.
    origin_assumed : bool
        Nothing in the metadata says where the coarser levels begin: they are taken for averages of the finer ones.
    unit_assumed : bool
        The axes have no unit: lengths are taken for µm.
    attributes : mapping
        ``multiscales`` and ``omero``, as they stand in the store.
    """

    path: str
    version: str
    axes: tuple[str, ...]
    levels: tuple[Level, ...]
    labels: tuple[str, ...]
    origin_assumed: bool
    unit_assumed: bool
    attributes: Mapping[str, Any]

    @cached_property
    def space(self) -> tuple[int, ...]:
        """Which axes of the arrays are those of space."""
        return tuple(index for index, name in enumerate(self.axes) if name in SPACE)

    @property
    def channel_axis(self) -> int | None:
        """Which axis of the arrays is that of channels."""
        return self.axes.index("c") if "c" in self.axes else None

    @property
    def channels(self) -> int:
        """How many there are."""
        return 1 if self.channel_axis is None else self.levels[0].shape[self.channel_axis]

    @property
    def times(self) -> int:
        """How many time points there are."""
        return self.levels[0].shape[self.axes.index("t")] if "t" in self.axes else 1

    @property
    def root(self) -> str:
        """Name of the root metadata."""
        return ROOTS[self.version]

    @property
    def array_metadata(self) -> str:
        """Name of the metadata of an array."""
        return ARRAYS[self.version]

    @property
    def digest(self) -> str:
        """SHA-256, shortened, of the metadata: of root and levels."""
        content = [self.attributes, [level.metadata for level in self.levels]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def grid(self, level: Level) -> tuple[tuple[int, ...], list[list[float]]]:
        """Shape (three axes) and affine, in mm, of the space axes of a level's array transposed (``.T``)."""
        axes = self.space[::-1]
        shape = tuple(level.shape[axis] for axis in axes)
        matrix = [[0.0] * 4 for _ in range(3)] + [[0.0, 0.0, 0.0, 1.0]]
        for column, axis in enumerate(axes):
            row = SPACE.index(self.axes[axis])
            matrix[row][column] = level.scale[axis]
            matrix[row][3] = level.translation[axis]
        if len(axes) == 2:  # a plane: as thick as its voxels are wide
            row = next(row for row in range(3) if not any(matrix[row][:2]))
            matrix[row][2] = level.scale[axes[0]]
        return (*shape, 1)[:3], matrix

    def voxels(self, level: Level) -> int:
        """Voxels of a channel at a time point."""
        return math.prod(level.shape[axis] for axis in self.space)

    def channel_index(self, channel: str) -> int:
        """Which channel a row of the sheet means: by label, else by index.

        Raises
        ------
        InputError
            There is no such channel, or several and none is named.
        """
        named = ", ".join(f"{index} {label}".strip() for index, label in enumerate(self._all_labels))
        if not channel:
            if self.channels == 1:
                return 0
            raise InputError(self.path, f"has {self.channels} channels", f"name one in the column channel: {named}")
        if self._all_labels.count(channel) == 1:
            return self._all_labels.index(channel)
        if channel.isdecimal() and int(channel) < self.channels:
            return int(channel)
        near = difflib.get_close_matches(channel, filter(None, self._all_labels), n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {named}"
        raise InputError(self.path, f"has no channel {channel!r}", hint)

    def time_index(self, time: str) -> int | None:
        """Which time point a row of the sheet means; None for all of them.

        Raises
        ------
        InputError
            There is no such time point.
        """
        if not time:
            return None
        if time.isdecimal() and int(time) < self.times:
            return int(time)
        has = f"has {self.times} time points" if "t" in self.axes else "has no axis of time"
        rule = (
            f"give one from 0 to {self.times - 1} in the column t" if "t" in self.axes else "leave the column t empty"
        )
        raise InputError(self.path, f"{has}, and no {time!r}", rule)

    @property
    def _all_labels(self) -> list[str]:
        return [*self.labels, *[""] * self.channels][: self.channels]


@dataclass(frozen=True)
class Coarse:
    """The volume on which the field of a channel is estimated: a level, perhaps averaged further.

    Parameters
    ----------
    level : int
    factors : three ints
        Voxels that are averaged along each axis of the volume.
    shape : three ints
    affine : 4 lists of 4 floats
        In mm.
    """

    level: int
    factors: tuple[int, ...]
    shape: tuple[int, ...]
    affine: list[list[float]]


def choose_coarse(image: Image, level: int | str, most_voxels: int) -> Coarse:
    """The volume on which fields are estimated.

    Parameters
    ----------
    image : Image
    level : int or "auto"
        Which level; ``auto`` is the finest with no more voxels than `most_voxels`, or the coarsest.
    most_voxels : int
        A level of more voxels is averaged, along the axes of the smallest voxels first.

    Returns
    -------
    Coarse

    Raises
    ------
    InputError
        There is no such level.
    """
    if isinstance(level, str):
        fitting = (k for k, each in enumerate(image.levels) if image.voxels(each) <= most_voxels)
        level = next(fitting, len(image.levels) - 1)
    if level >= len(image.levels):
        raise InputError(image.path, f"has no level {level}", f"set zarr.level to at most {len(image.levels) - 1}")
    shape, affine = image.grid(image.levels[level])
    sizes = [max(map(abs, column)) for column in zip(*affine[:3], strict=True)][:3]
    factors = [1, 1, 1]
    while math.prod(n // f for n, f in zip(shape, factors, strict=True)) > most_voxels:
        free = [axis for axis in range(3) if shape[axis] >= 2 * factors[axis]]
        factors[min(free, key=lambda axis: sizes[axis] * factors[axis])] *= 2
    for row in affine[:3]:
        for axis, factor in enumerate(factors):
            row[3] += row[axis] * (factor - 1) / 2
            row[axis] *= factor
    return Coarse(level, tuple(factors), tuple(n // f for n, f in zip(shape, factors, strict=True)), affine)


class Files:
    """The files of a store, wherever it lies: a folder, here or in a bucket, or a zip file (or a folder in one).

    Parameters
    ----------
    path : path-like
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path).rstrip("/")
        self.prefix = ""
        self.is_zip = self.path.lower().endswith((".zip", ".ozx"))
        self.is_remote = is_remote(self.path)
        self._fetched: dict[str, bytes | InputError | None] = {}
        if self.is_remote and (secret := USER.match(self.path)):
            raise InputError(
                f"{secret[1]}…@{self.path[secret.end() :]}",
                "has a user's name in its address, which would be written into logs and sidecars",
                "give it by the environment or ~/.netrc",
            )
        if self.is_zip and self.is_remote:
            raise InputError(
                path, "is a zip file that does not lie on this machine", "copy it here, or unpack it there"
            )
        if self.is_zip:
            try:
                with zipfile.ZipFile(self.path) as file:
                    self._names = set(file.namelist())
            except (OSError, zipfile.BadZipFile) as error:
                raise InputError(path, f"cannot be read ({error})", "copy it again") from None
            roots = [name for name in self._names if os.path.basename(name) in ROOTS.values()]
            self.prefix = os.path.dirname(min(roots, key=lambda name: name.count("/"), default=""))

    def key(self, *parts: str) -> str:
        """Name of a file in the zip file."""
        return "/".join(filter(None, (self.prefix, *parts)))

    def fetch(self, names: Iterable[str]) -> None:
        """Read files that are asked for next side by side, if they do not lie on this machine."""
        if self.is_remote:
            self._fetched |= read_all(os.path.join(self.path, name) for name in names)

    def json(self, *parts: str) -> dict[str, Any] | None:
        """Content of a JSON file; None if it is not there.

        Raises
        ------
        InputError
            It cannot be read.
        """
        name = os.path.join(self.path, *parts)
        try:
            text: bytes | InputError | None
            if self.is_remote:
                if name not in self._fetched:
                    self.fetch(["/".join(parts)])
                text = self._fetched[name]
                if text is None:
                    return None
                if isinstance(text, InputError):
                    raise text
            elif self.is_zip:
                if self.key(*parts) not in self._names:
                    return None
                with zipfile.ZipFile(self.path) as file:
                    text = file.read(self.key(*parts))
            else:
                text = Path(name).read_bytes()
            content = json.loads(text)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except InputError:
            raise
        except OSError as error:
            raise InputError(name, f"cannot be read ({error})", "copy the store again") from None
        except (ValueError, RecursionError, zipfile.BadZipFile) as error:
            raise DamagedError(name, f"cannot be read ({error})", "copy the store again") from None
        if not isinstance(content, dict):
            raise DamagedError(name, "holds no JSON object", "copy the store again")
        return content


def is_store(path: str | Path) -> bool:
    """Whether a path is named as an OME-Zarr image is."""
    return bool(STORE.search(str(path)))


def file_of(path: str | Path) -> str:
    """The file by whose time it is seen that an image has changed: of a store, its root metadata; else itself."""
    path = str(path).rstrip("/")
    if os.path.isfile(path) or not is_store(path):
        return path
    names = [os.path.join(path, name) for name in ROOTS.values()]
    return next(filter(os.path.isfile, names), names[0])


def files_of(path: str | Path) -> list[str]:
    """The files by whose times it is seen that an image has changed: of a store, the metadata of root and levels.

    Chunks are not among them: there may be a hundred thousand. Of a store that does not lie on this machine there are
    none: see `stores.metadata_digest`.
    """
    if is_remote(path):
        return []
    found = [file_of(path)]
    if found[0] == str(path).rstrip("/"):
        return found
    try:
        image = read_image(path)
    except InputError:  # whoever reads it says so; until it is mended, by what may be the metadata of levels
        return found + sorted(str(file) for name in set(ARRAYS.values()) for file in Path(path).glob(f"*/{name}"))
    return found + [os.path.join(image.path, level.path, image.array_metadata) for level in image.levels]


def read_image(path: str | Path, pyramid_origin: str = "auto") -> Image:
    """Read the metadata of an OME-Zarr image.

    Parameters
    ----------
    path : path-like
        Folder, here or in a bucket, or zip file.
    pyramid_origin : {"auto", "declared"}
        Whether coarser levels that say nothing of where they begin are taken for averages of the finest one, whose
        outer edges agree; or as the metadata has it, with the centres of the first voxels in one place.

    Returns
    -------
    Image

    Raises
    ------
    InputError
        It is not there, or is no image of NGFF 0.4 or 0.5 with real voxels that can be corrected.
    """
    try:
        return _read_image(str(path).rstrip("/"), pyramid_origin)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise DamagedError(
            path, f"has metadata that are not understood ({error!r})", "write it again, and check it"
        ) from None


def _read_image(path: str, pyramid_origin: str) -> Image:
    if not is_remote(path) and not os.path.exists(path):
        raise InputError(path, "is not there", "check the path (it is taken from the working directory)")
    files = Files(path)
    files.fetch(ROOTS.values())
    if (root := files.json("zarr.json")) is not None:
        version, attributes = "0.5", root.get("attributes", {}).get("ome", {})
        if not attributes and "multiscales" in root.get("attributes", {}):
            attributes = root["attributes"]
    else:
        version, attributes = "0.4", files.json(".zattrs")
        if attributes is None:
            raise InputError(
                path,
                "holds neither zarr.json nor .zattrs, as if it were no OME-Zarr image or not complete",
                "check the path, or copy it again",
            )
    if "bioformats2raw.layout" in attributes or "bioformats2raw.layout" in (root or {}).get("attributes", {}):
        raise InputError(path, "is a root of bioformats2raw, of one image or several", f"give one of them: {path}/0")
    if "plate" in attributes or "well" in attributes:
        raise InputError(path, "is a plate or a well (HCS)", "give one of its images, a row each")
    if not attributes.get("multiscales"):
        raise InputError(path, "holds no image (no multiscales)", "give the path of an OME-Zarr image")
    multiscale = attributes["multiscales"][0]
    given = str(attributes.get("version") or multiscale.get("version") or version)
    if given != version:
        fits = "zarr v3" if version == "0.5" else "zarr v2"
        raise InputError(path, f"is NGFF {given} on {fits}", "write it as NGFF 0.4 (zarr v2) or 0.5 (zarr v3)")
    axes, scales, no_unit = _axes(path, multiscale)
    for dataset in multiscale["datasets"]:
        # what is written goes by it too
        if os.path.isabs(dataset["path"]) or ".." in dataset["path"].split("/"):
            raise DamagedError(path, f"has a level outside of it ({dataset['path']})", "write it again, and check it")
    files.fetch(f"{dataset['path']}/{ARRAYS[version]}" for dataset in multiscale["datasets"])
    levels, declared = [], []
    for dataset in multiscale["datasets"]:
        transforms = [*dataset["coordinateTransformations"], *multiscale.get("coordinateTransformations", [])]
        scale, translation = _composed(path, transforms, len(axes))
        declared.append(any(step["type"] == "translation" for step in dataset["coordinateTransformations"]))
        metadata = files.json(dataset["path"], ARRAYS[version])
        if metadata is None:
            raise DamagedError(path, f"lacks the metadata of its level {dataset['path']}", "copy it again")
        shape, chunks, unit, dtype = (_array_v3 if version == "0.5" else _array_v2)(path, metadata)
        if len(shape) != len(axes):
            raise InputError(
                path, f"has {len(axes)} axes, and level {dataset['path']} has {len(shape)}", "write it again"
            )
        if min(shape) < 1:
            raise InputError(path, f"its level {dataset['path']} has no voxels", "write it again")
        levels.append(Level(dataset["path"], shape, chunks, unit, dtype, scale, translation, metadata))
    space = [index for index, name in enumerate(axes) if name in SPACE]
    assumed = False
    if pyramid_origin == "auto" and not PICKED.search(str(multiscale.get("type", ""))):
        assumed = not all(declared[1:])
        levels = [
            level if told else _moved(level, levels[0], space)
            for level, told in zip(levels, [True, *declared[1:]], strict=True)
        ]
    levels, unit_assumed = _in_mm(path, levels, space, scales, no_unit)
    _check_extents(path, levels, space)
    labels = [str(c.get("label") or "") for c in attributes.get("omero", {}).get("channels", [])]
    kept = {key: attributes[key] for key in ("multiscales", "omero") if key in attributes}
    image = Image(path, version, axes, tuple(levels), tuple(labels), assumed, unit_assumed, kept)
    for level in levels[1:]:
        if image.channel_axis is not None and level.shape[image.channel_axis] != image.channels:
            raise InputError(path, "has another number of channels at another level", "write it again")
        if "t" in axes and level.shape[axes.index("t")] != image.times:
            raise InputError(path, "has another number of time points at another level", "write it again")
    return image


def _axes(path: str, multiscale: Mapping[str, Any]) -> tuple[tuple[str, ...], list[float | None], bool]:
    """Names of the axes; mm per unit of each, None along those that are not space; whether space has no unit."""
    axes = multiscale.get("axes")
    if not axes or not all(isinstance(axis, Mapping) for axis in axes):
        raise InputError(path, "is older than NGFF 0.4 (its axes have no types)", "write it as NGFF 0.4 or 0.5")
    names = tuple(str(axis["name"]).lower() for axis in axes)
    by_name = {"t": "time", "c": "channel"}
    types = [axis.get("type") or by_name.get(name, "space") for axis, name in zip(axes, names, strict=True)]
    names = tuple({"time": "t", "channel": "c"}.get(kind, name) for name, kind in zip(names, types, strict=True))
    space = [index for index, kind in enumerate(types) if kind == "space"]
    if (
        len(set(names)) < len(names)
        or set(names) - {"t", "c", *SPACE}
        or not 2 <= len(space) <= 3
        or space != list(range(len(names) - len(space), len(names)))
    ):
        raise InputError(path, f"has the axes {' '.join(names)}", "give 2 to 5 of t c z y x, those of space last")
    units = [axes[index].get("unit") for index in space]
    if any(units) and not all(units):
        raise InputError(path, "gives a unit to some of its space axes only", "give one to all of them")
    for unit in filter(None, units):
        if unit not in MM_PER_UNIT:
            near = difflib.get_close_matches(unit, MM_PER_UNIT, n=1) or ["micrometer"]
            raise InputError(path, f"has the unit {unit!r}, which is not known", f"write {near[0]}, if that is meant")
    scales: list[float | None] = [None] * len(names)
    for index, unit in zip(space, units, strict=True):
        scales[index] = MM_PER_UNIT[unit] if unit else 1e-3
    return names, scales, not any(units)


def _composed(
    path: str, transforms: Sequence[Mapping[str, Any]], axes: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and translation of all steps, one after the other."""
    scale, translation = [1.0] * axes, [0.0] * axes
    for step in transforms:
        kind = step["type"]
        if kind == "identity":
            continue
        if kind not in ("scale", "translation") or kind not in step:
            raise InputError(path, f"has a transformation of type {kind!r}", "write scale and translation as numbers")
        values = [float(value) for value in step[kind]]
        if len(values) != axes or not all(map(math.isfinite, values)) or (kind == "scale" and min(values) <= 0):
            raise InputError(path, f"has the {kind} {step[kind]}", "give a number for each axis, of a scale above 0")
        if kind == "scale":
            scale = [a * b for a, b in zip(scale, values, strict=True)]
            translation = [a * b for a, b in zip(translation, values, strict=True)]
        else:
            translation = [a + b for a, b in zip(translation, values, strict=True)]
    return tuple(scale), tuple(translation)


def _moved(level: Level, finest: Level, space: Sequence[int]) -> Level:
    """A level whose outer edges agree with those of the finest one, at its first voxel."""
    translation = list(level.translation)
    for axis in space:
        translation[axis] = finest.translation[axis] + (level.scale[axis] - finest.scale[axis]) / 2
    return _placed(level, level.scale, translation)


def _placed(level: Level, scale: Sequence[float], translation: Sequence[float]) -> Level:
    return Level(
        level.path, level.shape, level.chunks, level.unit, level.dtype, tuple(scale), tuple(translation), level.metadata
    )


def _in_mm(
    path: str, levels: Sequence[Level], space: Sequence[int], mm: Sequence[float | None], no_unit: bool
) -> tuple[list[Level], bool]:
    def in_mm(values: Sequence[float]) -> list[float]:
        return [value * (mm[axis] or 1.0) for axis, value in enumerate(values)]

    placed = [_placed(level, in_mm(level.scale), in_mm(level.translation)) for level in levels]
    edge = max(placed[0].shape[axis] * placed[0].scale[axis] for axis in space)
    least, most = EDGE_WITHOUT_UNIT_MM if no_unit else EDGE_MM
    if not least <= edge <= most:
        if no_unit:
            problem = f"its axes have no unit, and as µm its longest edge would be {edge:.3g} mm"
        else:
            problem = f"its longest edge is {edge:.3g} mm by the unit of its axes: µm taken for mm?"
        raise InputError(path, problem, "write the right unit into its axes (micrometer, millimeter)")
    return placed, no_unit


def _check_extents(path: str, levels: Sequence[Level], space: Sequence[int]) -> None:
    for level in levels[1:]:
        for axis in space:
            extent, of_first = (each.shape[axis] * each.scale[axis] for each in (level, levels[0]))
            if abs(extent - of_first) > level.scale[axis] * (1 + 1e-6):
                raise InputError(
                    path,
                    f"its level {level.path} is {extent:.6g} mm long where level {levels[0].path} is {of_first:.6g} mm",
                    "mend the scale of that level",
                )


def _array_v2(path: str, metadata: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    if metadata.get("zarr_format") != 2:
        raise InputError(path, "mixes zarr v2 and v3", "write it again")
    shape, chunks = (tuple(map(int, metadata[key])) for key in ("shape", "chunks"))
    kind = metadata["dtype"] if isinstance(metadata["dtype"], str) else ""
    names = {"u": "uint", "i": "int", "f": "float"}
    found = re.fullmatch(r"[<>|]([uif])(1|2|4|8)", kind)
    dtype = f"{names[found[1]]}{8 * int(found[2])}" if found else ""
    return shape, chunks, chunks, _checked(path, dtype, metadata["dtype"])


def _array_v3(path: str, metadata: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
    if metadata.get("node_type") != "array":
        raise InputError(path, "a level of it is no array", "write it again")
    grid = metadata["chunk_grid"]
    if grid["name"] != "regular":
        raise InputError(path, f"has chunks of a grid that is {grid['name']}", "write it with regular chunks")
    unit = tuple(map(int, grid["configuration"]["chunk_shape"]))
    sharding = [codec for codec in metadata["codecs"] if codec["name"] == "sharding_indexed"]
    chunks = tuple(map(int, sharding[0]["configuration"]["chunk_shape"])) if sharding else unit
    kind = metadata["data_type"]
    dtype = kind if isinstance(kind, str) and re.fullmatch(r"u?int(8|16|32|64)|float(16|32|64)", kind) else ""
    return tuple(map(int, metadata["shape"])), chunks, unit, _checked(path, dtype, kind)


def _checked(path: str, dtype: str, given: object) -> str:
    if not dtype:
        raise InputError(path, f"holds voxels of type {given}", "give an image of real numbers")
    return dtype
