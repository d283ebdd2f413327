"""The bias field as an object: a lattice of control points, the mesh it belongs to and the grid it is seen on."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from n4flow.bspline import basis_matrix, control_points, evaluate_at, expand
from n4flow.errors import InputError

log = logging.getLogger(__name__)

Positions = Sequence[np.ndarray]

#: An axis of a grid that strays from its mesh axis by less than this many spans, over the whole grid, runs along it:
#: headers hold affines in single precision.
STRAY_SPANS = 1e-5

#: Points evaluated at a time on a grid that is oblique to the mesh.
BLOCK_POINTS = 2**14

FORMAT = "n4flow log bias field, version 1"


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

        Each axis has as many spans as cover the distance between its outermost voxel centres.
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
        """So many spans from the first voxel to the last: the domain ITK uses.

        ITK takes a voxel at its far end for one a thousandth of a voxel inside, since its basis ends
        there. Ours does not, which keeps it the same under flips: where a mask reaches the last
        plane, log fields differ from ITK's by about 1e-5 (rms) for that.
        """
        spans = tuple(s if n > 1 else 0 for n, s in zip(shape, spans, strict=True))
        lengths = tuple((n - 1) / s if s else 1.0 for n, s in zip(shape, spans, strict=True))
        return cls(spans, (0.0,) * len(spans), lengths)

    @property
    def lattice_shape(self) -> tuple[int, ...]:
        """Control points per axis."""
        return tuple(control_points(s) for s in self.spans)

    def coordinate(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Parametric coordinate, in spans, of voxel indices (any real numbers) along an axis."""
        return (np.asarray(index, dtype=np.float64) - self.start[axis]) / self.span_voxels[axis]

    def basis(self, axis: int, index: np.ndarray) -> np.ndarray:
        """Basis matrix at voxel indices (any real numbers) along an axis."""
        return basis_matrix(self.coordinate(axis, index), self.spans[axis])

    def bases(self, positions: Positions) -> list[np.ndarray]:
        """Basis matrices at these voxel indices, per axis."""
        return [self.basis(axis, index) for axis, index in enumerate(positions)]

    def refined(self) -> Mesh:
        """The mesh with twice as many spans on the same domain."""
        return Mesh(tuple(2 * s for s in self.spans), self.start, tuple(length / 2 for length in self.span_voxels))


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
    """

    lattice: np.ndarray
    mesh: Mesh
    image_shape: tuple[int, ...]
    affine: np.ndarray
    voxel_to_mesh: np.ndarray = field(default_factory=lambda: np.eye(4))

    def on_grid(self, shape: Sequence[int], affine: np.ndarray, source: object = "image") -> BiasField:
        """The same field, seen on the grid of another image of the same space: of another contrast, echo or resolution.

        Parameters
        ----------
        shape : three ints
        affine : (4, 4) array
            Voxel-to-world matrix of the other image, in mm: world coordinates tell where its voxels lie in the field.
        source : object
            Name of the other image, for messages.

        Returns
        -------
        BiasField

        Raises
        ------
        InputError
            The image does not meet that of the field anywhere.
        """
        # the inverse times the matrix itself is the identity but for rounding: the same grid is to get the same bits
        affine = np.asarray(affine, dtype=np.float64)
        same = np.array_equal(affine, self.affine)
        to_own = np.eye(4) if same else np.linalg.solve(self.affine, affine)
        if not (
            _boxes_meet(to_own, shape, self.image_shape) and _boxes_meet(np.linalg.inv(to_own), self.image_shape, shape)
        ):
            raise InputError(
                source,
                "lies outside of the image that its field was estimated on",
                "take the field from an image of the same space, or mend qform and sform",
            )
        if outside := _share_outside(to_own, shape, self.image_shape):
            log.warning(
                "%s: about %.2g %% of it lies outside of the image that its field was estimated on; there the field is "
                "extrapolated",
                source,
                100 * outside,
            )
        grid = tuple(int(n) for n in shape)
        return replace(self, image_shape=grid, affine=affine, voxel_to_mesh=self.voxel_to_mesh @ to_own)

    @cached_property
    def _mesh_axes(self) -> tuple[int, ...] | None:
        """The mesh axis that each axis of the grid runs along; None for a grid that is oblique to the mesh."""
        steps = np.abs(self.voxel_to_mesh[:3, :3]) * [n - 1 for n in self.image_shape]
        strays = steps / np.array(self.mesh.span_voxels)[:, None] > STRAY_SPANS
        if (strays.sum(axis=0) > 1).any() or (strays.sum(axis=1) > 1).any():
            return None
        along = {axis: mesh_axis for mesh_axis, axis in np.argwhere(strays).tolist()}
        rest = iter(sorted(set(range(3)) - set(along.values())))
        return tuple(along[axis] if axis in along else next(rest) for axis in range(3))

    def _separated(self, positions: Positions) -> list[np.ndarray]:
        """Basis matrices at these voxel indices of an aligned grid, per axis of the grid."""
        assert self._mesh_axes is not None
        bases = []
        for axis, mesh_axis in enumerate(self._mesh_axes):
            scale, offset = self.voxel_to_mesh[mesh_axis, axis], self.voxel_to_mesh[mesh_axis, 3]
            bases.append(self.mesh.basis(mesh_axis, scale * np.asarray(positions[axis]) + offset))
        return bases

    @cached_property
    def lattice_on_grid(self) -> np.ndarray:
        """The lattice with its axes in the order of an aligned grid's."""
        return np.ascontiguousarray(self.lattice.transpose(self._mesh_axes))

    @cached_property
    def image_bases(self) -> list[np.ndarray]:
        """Basis matrices of an aligned grid, per axis."""
        return self._separated([np.arange(n) for n in self.image_shape])

    def log_at(self, positions: Positions) -> np.ndarray:
        """Log bias field on the grid spanned by voxel indices (any real numbers) per axis.

        Beyond the mesh the value at its border holds.
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
        """Multiplicative bias field ``exp(B)`` on a tile, float32: what an image is divided by."""
        return np.exp(self.log_tile(tile)).astype(np.float32)

    def shifted(self, log_offset: float) -> BiasField:
        """The same field plus a constant, which moves every control point alike."""
        return replace(self, lattice=self.lattice + log_offset)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, ready for JSON; floats keep all their digits."""
        return {
            "Format": FORMAT,
            "ImageShape": list(self.image_shape),
            "Affine": np.asarray(self.affine).tolist(),
            "Spans": list(self.mesh.spans),
            "MeshStartVoxel": list(self.mesh.start),
            "SpanVoxels": list(self.mesh.span_voxels),
            "VoxelToMesh": np.asarray(self.voxel_to_mesh).tolist(),
            "Lattice": self.lattice.tolist(),
        }

    @classmethod
    def load(cls, path: str | Path) -> BiasField:
        """Read a field from the JSON file that `to_mapping` went into.

        Raises
        ------
        InputError
            The file is missing, or does not hold a field of this format.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["Format"] != FORMAT:
                raise ValueError(f"format {content['Format']!r}")
            mesh = Mesh(
                tuple(int(s) for s in content["Spans"]),
                tuple(float(s) for s in content["MeshStartVoxel"]),
                tuple(float(s) for s in content["SpanVoxels"]),
            )
            lattice = np.array(content["Lattice"], dtype=np.float64)
            if lattice.shape != mesh.lattice_shape or not np.isfinite(lattice).all():
                raise ValueError("the lattice does not fit its mesh")
            shape = tuple(int(n) for n in content["ImageShape"])
            to_mesh = _matrix(content.get("VoxelToMesh", np.eye(4)), "VoxelToMesh")
            return cls(lattice, mesh, shape, _matrix(content["Affine"], "Affine"), to_mesh)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(path, f"is no n4flow bias field ({error})", "make it again with the n4 rule") from None


def _matrix(values: Any, name: str) -> np.ndarray:
    """An affine transform out of JSON."""
    matrix = np.array(values, dtype=np.float64)
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all() or (matrix[3] != [0, 0, 0, 1]).any():
        raise ValueError(f"{name} is no affine matrix")
    if np.linalg.det(matrix) == 0:
        raise ValueError(f"{name} cannot be inverted")
    return matrix


def _boxes_meet(matrix: np.ndarray, shape: Sequence[int], own_shape: Sequence[int]) -> bool:
    """Whether a grid, voxels and all, meets another one; the matrix leads from its voxel indices to the other's."""
    ends = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*shape, 1] - [0.5, 0.5, 0.5, 0]
    corners = (ends @ matrix.T)[:, :3]
    return bool((corners.max(axis=0) > -0.5).all() and (corners.min(axis=0) < np.array(own_shape) - 0.5).all())


def _share_outside(matrix: np.ndarray, shape: Sequence[int], own_shape: Sequence[int]) -> float:
    """Share of the voxels of a grid that lie outside of another one, by every n-th of them."""
    counts = [min(n, 64) for n in shape]
    x, y, z = ((np.arange(count) + 0.5) * n // count for n, count in zip(shape, counts, strict=True))
    outside = np.zeros(counts, dtype=bool)
    for row, n in zip(matrix[:3], own_shape, strict=True):
        place = row[0] * x[:, None, None] + row[1] * y[:, None] + row[2] * z + row[3]
        outside |= (place < -0.5 - 1e-3) | (place > n - 0.5 + 1e-3)  # more than rounding in a header
    return float(outside.mean())
