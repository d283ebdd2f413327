"""The bias field as an object: a lattice of control points, the mesh it belongs to and the grid it is seen on."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from n4flow.core.affine import LARGEST_LENGTH, affine_problem
from n4flow.core.bspline import basis_matrix, control_points, evaluate_at, expand
from n4flow.core.planes import PlaneGains
from n4flow.errors import InputError

log = logging.getLogger(__name__)

Positions = Sequence[np.ndarray]

#: In spans of the mesh: an axis of a grid that strays from its mesh axis by less than this, over the whole grid, runs
#: along it. Headers hold affines in single precision.
ALIGNMENT_TOLERANCE = 1e-5

#: Points evaluated at a time on a grid that is oblique to the mesh.
BLOCK_POINTS = 2**14

#: Where a larger share of an image lies outside of the field's, and of the field's outside of it, they are of different
#: spaces. A slab of a head, or a plane, lies within it.
MOST_OUTSIDE = 0.99

FORMAT = "n4flow log bias field, version 1"

#: With gains of planes, which a reader of version 1 would leave out.
FORMAT_WITH_GAINS = "n4flow log bias field, version 2"


@dataclass(frozen=True)
class Mesh:
    """Where the control points lie, in voxel indices of the image the field was estimated on.

    Parameters
    ----------
    spans : tuple of int
        Mesh elements per axis; 0 on an axis of one voxel.
    start : tuple of float
        Voxel index at which the parametric coordinate is 0, per axis.
    span_voxels : tuple of float
        Voxels per span, per axis.
    """

    spans: tuple[int, ...]
    start: tuple[float, ...]
    span_voxels: tuple[float, ...]

    @classmethod
    def of_distance(cls, shape: Sequence[int], voxel_size_mm: Sequence[float], spline_distance_mm: float) -> Mesh:
        """Spans of exactly `spline_distance_mm` on a virtual domain centred on the image.

        Each axis has as many spans as cover the distance between its outermost voxel centres. So the domain is in
        general larger than the image, and mirrored images get mirrored meshes.

        Parameters
        ----------
        shape : three ints
            Voxels per axis of the image; an axis of one voxel gets no span.
        voxel_size_mm : three floats
        spline_distance_mm : float
            Length of a span, above 0.

        Returns
        -------
        Mesh
        """
        spans, start, span_voxels = [], [], []
        for n, size in zip(shape, voxel_size_mm, strict=True):
            length = spline_distance_mm / size
            # the tolerance keeps an extent of exactly k spans at k, whatever the rounding
            count = max(1, int(np.ceil((n - 1) / length - 1e-6))) if n > 1 else 0
            spans.append(count)
            start.append((n - 1) / 2 - count * length / 2)
            span_voxels.append(length)
        return cls(tuple(spans), tuple(start), tuple(span_voxels))

    @classmethod
    def of_grid(cls, shape: Sequence[int], spans: Sequence[int]) -> Mesh:
        """So many spans from the centre of the first voxel to that of the last: the domain ITK uses.

        ITK takes a voxel at its far end for one a thousandth of a voxel inside, since its basis ends
        there. Ours does not, which keeps it the same under flips: where a mask reaches the last
        plane, log fields differ from ITK's by about 1e-5 (rms) for that.

        Parameters
        ----------
        shape : three ints
            Voxels per axis of the image; an axis of one voxel gets no span.
        spans : three ints
            Mesh elements per axis, from 1.

        Returns
        -------
        Mesh

        References
        ----------
        ITK's BSplineScatteredDataPointSetToImageFilter.
        """
        return cls.of_box([(0, n - 1) for n in shape], spans)

    @classmethod
    def of_box(cls, box: Sequence[tuple[float, float]], spans: Sequence[int]) -> Mesh:
        """So many spans from the first to the last place along each axis.

        Parameters
        ----------
        box : three pairs of float
            Voxel indices; an axis along which both are the same gets no span.
        spans : three ints
            Mesh elements per axis, from 1.

        Returns
        -------
        Mesh
        """
        spans = tuple(s if last > first else 0 for (first, last), s in zip(box, spans, strict=True))
        lengths = tuple(float(last - first) / s if s else 1.0 for (first, last), s in zip(box, spans, strict=True))
        return cls(spans, tuple(float(first) for first, _ in box), lengths)

    @property
    def lattice_shape(self) -> tuple[int, ...]:
        """Control points per axis."""
        return tuple(control_points(s) for s in self.spans)

    def coordinate(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Parametric coordinate of voxel indices along an axis: ``(index - start) / span_voxels``.

        Parameters
        ----------
        axis : int
        index : array
            Voxel indices of the image that the mesh is laid on: any real numbers.

        Returns
        -------
        float64 array of the shape of `index`
            In spans: 0 at the beginning of the mesh, ``spans[axis]`` at its end; beyond, it is not cut off.
        """
        return (np.asarray(index, dtype=np.float64) - self.start[axis]) / self.span_voxels[axis]

    def basis(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Weights of the control points of an axis at voxel indices.

        Parameters
        ----------
        axis : int
        index : (n,) array
            Voxel indices of the image that the mesh is laid on: any real numbers. Beyond the mesh the weights at its
            end hold.

        Returns
        -------
        (n, lattice_shape[axis]) float64 array
            See `bspline.basis_matrix`.
        """
        return basis_matrix(self.coordinate(axis, index), self.spans[axis])

    def bases(self, positions: Positions) -> list[np.ndarray]:
        """Basis matrices at these voxel indices, per axis."""
        return [self.basis(axis, index) for axis, index in enumerate(positions)]

    def refined(self, refinements: int = 1) -> Mesh:
        """The mesh with twice as many spans on the same domain, or with those doubled so often."""
        times = 2**refinements
        return Mesh(
            tuple(times * s for s in self.spans), self.start, tuple(length / times for length in self.span_voxels)
        )


@dataclass(frozen=True, eq=False)
class BiasField:
    """A log bias field: a few hundred numbers that can be evaluated on any image of the same space.

    Parameters
    ----------
    lattice : (m0, m1, m2) float64 array
        Control points of the log bias field.
    mesh : Mesh
    image_shape : tuple of int
        Voxels per axis of the image that the field is evaluated on: its grid.
    affine : (4, 4) array
        Voxel-to-world matrix of the grid, in mm.
    voxel_to_mesh : (4, 4) array
        From voxel indices of the grid to those that the mesh is laid in. The identity, unless `on_grid` brought the
        field to another image than the one it was estimated on.
    has_spatial_reference : bool
        Whether the affine says where the image lies. False for one that a reader made up, of an image whose header
        names no space: nothing but that very grid can be related to it.
    gains : PlaneGains, optional
        What is added to the spline, plane by plane of the image that the field was estimated on.
    """

    lattice: np.ndarray
    mesh: Mesh
    image_shape: tuple[int, ...]
    affine: np.ndarray
    voxel_to_mesh: np.ndarray = field(default_factory=lambda: np.eye(4))
    has_spatial_reference: bool = True
    gains: PlaneGains | None = None

    def on_grid(self, shape: Sequence[int], affine: np.ndarray, source: object = "image") -> BiasField:
        """The same field, seen on the grid of another image of the same space: of another contrast, echo or resolution.

        What lies outside of the field's own image gets the field continued: by the spline as far as its mesh goes
        (`Mesh.of_distance` makes it larger than the image), beyond that by the value at the nearest point of the
        mesh's border. A warning in the log says how much of the image that is; the grid of the field itself gets the
        same bits as ever.

        Parameters
        ----------
        shape : two or three ints
            Voxels per axis of the other image; one of two axes has a single plane.
        affine : (4, 4) array
            Voxel-to-world matrix of the other image, in mm: world coordinates tell where its voxels lie in the field.
        source : object
            Name of the other image, for messages.

        Returns
        -------
        BiasField
            With the same lattice and mesh.

        Raises
        ------
        InputError
            The image does not meet that of the field, or both lie outside of the other to more than `MOST_OUTSIDE`.
        ValueError
            A shape without voxels, or an affine that cannot be inverted.
        """
        affine = np.asarray(affine, dtype=np.float64)
        if problem := affine_problem(affine):
            raise ValueError(f"the affine {problem}")
        if min(shape) < 1:
            raise ValueError(f"a grid of shape {tuple(shape)} holds no voxel")
        shape, to_own = _three_axes(shape), self._to_own(affine)
        from_own = np.linalg.inv(to_own)
        meet = _boxes_meet(to_own, shape, self.image_shape) and _boxes_meet(from_own, self.image_shape, shape)
        outside = _share_outside(to_own, shape, self.image_shape) if meet else 1.0
        # a plane's field may go to a volume, and a volume's to a plane: then one of the two lies within the other
        if outside > MOST_OUTSIDE and (not meet or _share_outside(from_own, self.image_shape, shape) > MOST_OUTSIDE):
            share = f"to {100 * outside:.0f} % " if meet else ""
            raise InputError(
                source,
                f"lies {share}outside of the image that its field was estimated on "
                f"({_extent_text(affine, shape)}; that one {_extent_text(self.affine, self.image_shape)})",
                "take the field from an image of the same space, or mend qform and sform",
            )
        if outside:
            log.warning(
                "%s: %s of it lies outside of the image that its field was estimated on; there the field is "
                "extrapolated",
                source,
                f"about {100 * outside:.0f} %" if outside >= 0.01 else "less than 1 %",
            )
        return replace(self, image_shape=shape, affine=affine, voxel_to_mesh=self.voxel_to_mesh @ to_own)

    def share_outside(self, shape: Sequence[int], affine: np.ndarray) -> float:
        """Share of the voxels of another image whose centres lie outside of this field's image.

        Parameters
        ----------
        shape : two or three ints
        affine : (4, 4) array
            As of `on_grid`.

        Returns
        -------
        float
            From 0 to 1, counted on at most 64 evenly spaced voxels per axis.
        """
        return _share_outside(self._to_own(affine), _three_axes(shape), self.image_shape)

    def _to_own(self, affine: np.ndarray) -> np.ndarray:
        """From voxel indices of another image to those of this field's grid, by world coordinates."""
        # the inverse times the matrix itself is the identity but for rounding: the same grid is to get the same bits
        return np.eye(4) if np.array_equal(affine, self.affine) else np.linalg.solve(self.affine, affine)

    @cached_property
    def _mesh_axes(self) -> tuple[int, ...] | None:
        """The mesh axis that each axis of the grid runs along; None for a grid that is oblique to the mesh."""
        steps = np.abs(self.voxel_to_mesh[:3, :3]) * [n - 1 for n in self.image_shape]
        strays = steps / np.array(self.mesh.span_voxels)[:, None] > ALIGNMENT_TOLERANCE
        if (strays.sum(axis=0) > 1).any() or (strays.sum(axis=1) > 1).any():
            return None
        along = {axis: mesh_axis for mesh_axis, axis in np.argwhere(strays).tolist()}
        rest = iter(sorted(set(range(3)) - set(along.values())))
        return tuple(along[axis] if axis in along else next(rest) for axis in range(3))

    def _separated(self, positions: Positions) -> list[np.ndarray]:
        """Basis matrices at these voxel indices of an aligned grid, per axis of the grid."""
        return [self.basis_along(axis, index) for axis, index in enumerate(positions)]

    def basis_along(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Weights of `lattice_on_grid` along an axis of an aligned grid.

        Parameters
        ----------
        axis : int
            Of the grid.
        index : (n,) array
            Voxel indices along it: any real numbers.

        Returns
        -------
        (n, lattice_on_grid.shape[axis]) float64 array
        """
        assert self._mesh_axes is not None
        mesh_axis = self._mesh_axes[axis]
        scale, offset = self.voxel_to_mesh[mesh_axis, axis], self.voxel_to_mesh[mesh_axis, 3]
        place = scale * np.asarray(index) + offset
        basis = self.mesh.basis(mesh_axis, place)
        if self.gains is not None and mesh_axis == self.gains.axis:
            basis = np.column_stack([basis, self.gains.at(place, self._thickness)])
        return basis

    @cached_property
    def _thickness(self) -> float:
        """What a voxel of the grid covers of the planes that have gains, in these."""
        assert self.gains is not None
        return float(np.abs(self.voxel_to_mesh[self.gains.axis, :3]).sum())

    @cached_property
    def lattice_on_grid(self) -> np.ndarray:
        """The lattice with its axes in the order of an aligned grid's.

        Gains stand beside it as control points of 1, of which `image_bases` has a column: the bases of the other axes
        add up to 1.
        """
        lattice = self.lattice
        if self.gains is not None:
            width = [(0, int(axis == self.gains.axis)) for axis in range(3)]
            lattice = np.pad(lattice, width, constant_values=1.0)
        return np.ascontiguousarray(lattice.transpose(self._mesh_axes))

    @cached_property
    def image_bases(self) -> list[np.ndarray]:
        """Basis matrices of an aligned grid, per axis."""
        return self._separated([np.arange(n) for n in self.image_shape])

    def log_at(self, positions: Positions) -> np.ndarray:
        """Log bias field on the grid spanned by voxel indices per axis.

        Parameters
        ----------
        positions : three 1-D arrays (n0,), (n1,), (n2,)
            Voxel indices of the field's grid along each axis: any real numbers, in any order. Beyond the mesh the
            value at its border holds.

        Returns
        -------
        (n0, n1, n2) float64 array
            Natural log of the multiplicative field.

        References
        ----------
        Lee, Wolberg & Shin 1997, doi:10.1109/2945.620490.
        """
        if self._mesh_axes is None:
            return self._log_at_oblique(positions)
        return expand(self.lattice_on_grid, self._separated(positions))

    def _log_at_oblique(self, positions: Positions) -> np.ndarray:
        """As `log_at`, point by point; in Fortran order."""
        x, y, z = (np.asarray(index, dtype=np.float64) for index in positions)
        rows = np.empty((len(z) * len(y), len(x)))
        count = max(1, BLOCK_POINTS // max(1, len(x)))
        for start in range(0, len(rows), count):
            k, j = np.divmod(np.arange(start, min(start + count, len(rows))), len(y))
            coordinates = [
                self.mesh.coordinate(axis, (b * y[j] + c * z[k] + offset)[:, None] + a * x)
                for axis, (a, b, c, offset) in enumerate(self.voxel_to_mesh[:3])
            ]
            rows[start : start + count] = evaluate_at(self.lattice, coordinates, self.mesh.spans)
            if self.gains is not None:
                a, b, c, offset = self.voxel_to_mesh[self.gains.axis]
                index = (b * y[j] + c * z[k] + offset)[:, None] + a * x
                rows[start : start + count] += self.gains.at(index, self._thickness)
        return rows.reshape(len(z), len(y), len(x)).T

    def log_tile(self, tile: Sequence[slice]) -> np.ndarray:
        """Log bias field on a tile of the grid.

        Parameters
        ----------
        tile : three slices

        Returns
        -------
        float64 array in Fortran order (first axis fastest), as NIfTI files are
        """
        if self._mesh_axes is None:
            voxels = [np.arange(n)[part] for n, part in zip(self.image_shape, tile, strict=True)]
            return self._log_at_oblique(voxels)
        # float64 throughout: a voxel gets the same bits whatever tile it is evaluated in
        bases = [basis[part] for basis, part in zip(self.image_bases, tile, strict=True)]
        return expand(self.lattice_on_grid.T, bases[::-1]).T

    def ratio_tile(self, tile: Sequence[slice]) -> np.ndarray:
        """Multiplicative bias field ``exp(B)`` on a tile of the grid: what an image is divided by.

        Parameters
        ----------
        tile : three slices
            Of the field's grid, which has three axes even for a plane; ``numpy.s_[:, :, :]`` is all of it.

        Returns
        -------
        float32 array in Fortran order (first axis fastest)
            Without unit. A voxel gets the same bits in every tile of whole planes of the third axis.
        """
        log_field = self.log_tile(tile)
        return np.exp(log_field, out=log_field).astype(np.float32)

    def along_image(self, spans: int) -> BiasField:
        """The same field on a mesh along the axes of its grid, for what evaluates no other; without gains of planes.

        Parameters
        ----------
        spans : int
            Mesh elements per axis for a grid that is oblique to the field's own mesh, on which the field is not one to
            rounding, but near. Any other keeps its own.

        Returns
        -------
        BiasField
        """
        if self.gains is not None:
            return self.smooth.along_image(spans)
        if self._mesh_axes is None:
            mesh = Mesh.of_grid(self.image_shape, 3 * (spans,))
            places = [np.linspace(0, n - 1, 3 * spans + 1 if n > 1 else 1) for n in self.image_shape]
            lattice = self.log_at(places)
            for axis, place in enumerate(places):
                columns = np.moveaxis(lattice, axis, 0)
                solved = np.linalg.lstsq(mesh.basis(axis, place), columns.reshape(len(place), -1), rcond=None)[0]
                lattice = np.moveaxis(solved.reshape(-1, *columns.shape[1:]), 0, axis)
            return replace(self, lattice=lattice, mesh=mesh, voxel_to_mesh=np.eye(4))
        lattice, counts, start, span_voxels = self.lattice_on_grid, [], [], []
        for axis, mesh_axis in enumerate(self._mesh_axes):
            count, length = self.mesh.spans[mesh_axis], self.mesh.span_voxels[mesh_axis]
            scale, offset = self.voxel_to_mesh[mesh_axis, axis], self.voxel_to_mesh[mesh_axis, 3]
            first = self.mesh.start[mesh_axis] - offset
            if count == 0:  # the field does not vary along it
                scale = 1.0
            elif scale < 0:
                first += count * length
                lattice = np.flip(lattice, axis)
            counts.append(count)
            start.append(float(first / scale))
            span_voxels.append(float(length / abs(scale)))
        mesh = Mesh(tuple(counts), tuple(start), tuple(span_voxels))
        return replace(self, lattice=lattice, mesh=mesh, voxel_to_mesh=np.eye(4))

    @property
    def smooth(self) -> BiasField:
        """The same field without gains of planes: the spline alone."""
        return replace(self, gains=None)

    def gains_along(self) -> tuple[int, np.ndarray] | None:
        """The axis of the grid along which gains lie, and the log gain of each plane; None without any, or oblique."""
        if self.gains is None or self._mesh_axes is None:
            return None
        axis = self._mesh_axes.index(self.gains.axis)
        return axis, self.image_bases[axis][:, -1]

    def shifted(self, log_offset: float) -> BiasField:
        """The same field plus a constant, which moves every control point alike."""
        return replace(self, lattice=self.lattice + log_offset)

    def to_mapping(self) -> dict[str, Any]:
        """The field as plain values, ready for JSON.

        Returns
        -------
        dict
            What `from_mapping` reads. Floats keep all their digits: the field comes back to the last bit. ``Spans``,
            ``MeshStartVoxel`` and ``SpanVoxels`` are those of the `Mesh`, in voxels; ``Affine`` is in mm; ``Lattice``
            is nested as its axes are, in natural log. ``PlaneGains`` is there where planes have gains: the axis of the
            image that was estimated on, and their natural log.
        """
        gains = self.gains
        return {
            "Format": FORMAT if gains is None else FORMAT_WITH_GAINS,
            "ImageShape": list(self.image_shape),
            "Affine": np.asarray(self.affine).tolist(),
            "Spans": list(self.mesh.spans),
            "MeshStartVoxel": list(self.mesh.start),
            "SpanVoxels": list(self.mesh.span_voxels),
            "VoxelToMesh": np.asarray(self.voxel_to_mesh).tolist(),
            "HasSpatialReference": self.has_spatial_reference,
            "Lattice": self.lattice.tolist(),
        } | ({} if gains is None else {"PlaneGains": {"Axis": gains.axis, "LogGains": gains.log_gains.tolist()}})

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> BiasField:
        """The field that `to_mapping` described, to the last bit.

        Parameters
        ----------
        content : mapping
            Other keys than those of the field are passed over.

        Returns
        -------
        BiasField

        Raises
        ------
        ValueError, KeyError, TypeError
            It does not hold a field of this format.
        """
        if content["Format"] not in (FORMAT, FORMAT_WITH_GAINS):
            raise ValueError(f"format {content['Format']!r}")
        if not isinstance(content["HasSpatialReference"], bool):
            raise ValueError("HasSpatialReference is neither true nor false")
        start, span_voxels = (_numbers(content, name, (3,)) for name in ("MeshStartVoxel", "SpanVoxels"))
        if (span_voxels < 1 / LARGEST_LENGTH).any():
            raise ValueError("SpanVoxels are not all above 0")
        if max(np.abs(start).max(), span_voxels.max()) > LARGEST_LENGTH:
            raise ValueError("MeshStartVoxel or SpanVoxels are beyond any image")
        mesh = Mesh(_counts(content, "Spans", 0), tuple(start.tolist()), tuple(span_voxels.tolist()))
        return cls(
            _numbers(content, "Lattice", mesh.lattice_shape),
            mesh,
            _counts(content, "ImageShape", 1),
            _matrix(content, "Affine"),
            _matrix(content, "VoxelToMesh"),
            content["HasSpatialReference"],
            _gains(content["PlaneGains"]) if content["Format"] == FORMAT_WITH_GAINS else None,
        )


def _numbers(content: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Finite float64 numbers of this shape out of JSON."""
    numbers = np.array(content[name])  # whatever is no number shows in the type
    if numbers.dtype.kind not in "iuf" or numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(f"{name} does not hold {' x '.join(map(str, shape))} numbers")
    return numbers.astype(np.float64)


def _gains(content: Mapping[str, Any]) -> PlaneGains:
    """Gains of planes out of JSON."""
    axis, count = content["Axis"], len(content["LogGains"])
    if axis not in (0, 1, 2) or isinstance(axis, bool) or not count:
        raise ValueError("PlaneGains names no axis from 0 to 2, or no plane")
    return PlaneGains(int(axis), _numbers(content, "LogGains", (count,)))


def _counts(content: Mapping[str, Any], name: str, least: int) -> tuple[int, ...]:
    """Three whole numbers out of JSON."""
    counts = _numbers(content, name, (3,))
    if (counts < least).any() or (counts % 1 != 0).any():
        raise ValueError(f"{name} does not hold whole numbers from {least}")
    return tuple(int(n) for n in counts)


def _matrix(content: Mapping[str, Any], name: str) -> np.ndarray:
    """An affine transform out of JSON."""
    matrix = _numbers(content, name, (4, 4))
    if problem := affine_problem(matrix):
        raise ValueError(f"{name} {problem}")
    return matrix


def _three_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """Voxels per axis of a volume; a plane is a volume of one."""
    return tuple(int(n) for n in (*shape, 1)[:3])


def _boxes_meet(matrix: np.ndarray, shape: Sequence[int], own_shape: Sequence[int]) -> bool:
    """Whether a grid, voxels and all, meets another one; the matrix leads from its voxel indices to the other's."""
    ends = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shape, 1] - [0.5, 0.5, 0.5, 0]
    corners = (ends @ matrix.T)[:, :3]
    return bool((corners.max(axis=0) > -0.5).all() and (corners.min(axis=0) < np.array(own_shape) - 0.5).all())


def _extent_text(affine: np.ndarray, shape: Sequence[int]) -> str:
    """From where to where a grid reaches, in mm of the world."""
    ends = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shape, 1] - [0.5, 0.5, 0.5, 0]
    world = (ends @ affine.T)[:, :3]
    places = zip("xyz", world.min(axis=0), world.max(axis=0), strict=True)
    return ", ".join(f"{axis} {low:.4g} to {high:.4g}" for axis, low, high in places) + " mm"


def _share_outside(matrix: np.ndarray, shape: Sequence[int], own_shape: Sequence[int]) -> float:
    """Share of the voxels of a grid that lie outside of another one, by every n-th of them."""
    counts = [min(n, 64) for n in shape]
    x, y, z = ((np.arange(count) + 0.5) * n // count for n, count in zip(shape, counts, strict=True))
    outside = np.zeros(counts, dtype=bool)
    for row, n in zip(matrix[:3], own_shape, strict=True):
        place = row[0] * x[:, None, None] + row[1] * y[:, None] + row[2] * z + row[3]
        outside |= (place < -0.5 - 1e-3) | (place > n - 0.5 + 1e-3)  # more than rounding in a header
    return float(outside.mean())
