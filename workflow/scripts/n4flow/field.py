"""The bias field as an object: a lattice of control points and the mesh it belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from n4flow.bspline import basis_matrix, control_points, expand
from n4flow.errors import InputError

Positions = Sequence[np.ndarray]

FORMAT = "n4flow log bias field, version 1"


@dataclass(frozen=True)
class Mesh:
    """Where the control points lie, in voxel indices of the image the field belongs to.

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
        """So many spans from the first voxel to the last: the domain ITK uses."""
        spans = tuple(s if n > 1 else 0 for n, s in zip(shape, spans, strict=True))
        lengths = tuple((n - 1) / s if s else 1.0 for n, s in zip(shape, spans, strict=True))
        return cls(spans, (0.0,) * len(spans), lengths)

    @property
    def lattice_shape(self) -> tuple[int, ...]:
        """Control points per axis."""
        return tuple(control_points(s) for s in self.spans)

    def bases(self, positions: Positions) -> list[np.ndarray]:
        """Basis matrices at these voxel indices (any real numbers), per axis."""
        return [
            basis_matrix((np.asarray(index, dtype=np.float64) - start) / length, spans)
            for index, start, length, spans in zip(positions, self.start, self.span_voxels, self.spans, strict=True)
        ]

    def refined(self) -> Mesh:
        """The mesh with twice as many spans on the same domain."""
        return Mesh(tuple(2 * s for s in self.spans), self.start, tuple(length / 2 for length in self.span_voxels))


@dataclass(frozen=True, eq=False)
class BiasField:
    """A log bias field: a few hundred numbers that can be evaluated anywhere in the image.

    Parameters
    ----------
    lattice : (m0, m1, m2) float64 array
        Control points of the log bias field.
    mesh : Mesh
    image_shape : tuple of int
        Voxels per axis of the image the field belongs to.
    affine : (4, 4) array
        Its voxel-to-world matrix.
    """

    lattice: np.ndarray
    mesh: Mesh
    image_shape: tuple[int, ...]
    affine: np.ndarray

    @cached_property
    def _image_bases(self) -> list[np.ndarray]:
        return self.mesh.bases([np.arange(n) for n in self.image_shape])

    def log_at(self, positions: Positions) -> np.ndarray:
        """Log bias field on the grid spanned by voxel indices (any real numbers) per axis.

        Beyond the mesh the value at its border holds.
        """
        return expand(self.lattice, self.mesh.bases(positions))

    def log_tile(self, tile: Sequence[slice], xp: Any = np) -> Any:
        """Log bias field on a tile of the image's own grid.

        Parameters
        ----------
        tile : three slices
        xp : module
            numpy or cupy: where to compute.

        Returns
        -------
        float64 array in Fortran order (first axis fastest), as NIfTI files are
        """
        # float64 throughout: a voxel gets the same bits whatever tile it is evaluated in
        bases = [xp.asarray(basis[part]) for basis, part in zip(self._image_bases, tile, strict=True)]
        return expand(xp.asarray(self.lattice).T, bases[::-1]).T

    def ratio_tile(self, tile: Sequence[slice], xp: Any = np) -> Any:
        """Multiplicative bias field ``exp(B)`` on a tile, float32: what an image is divided by."""
        return xp.exp(self.log_tile(tile, xp)).astype(np.float32)

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
            return cls(lattice, mesh, shape, np.array(content["Affine"], dtype=np.float64))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(path, f"is no n4flow bias field ({error})", "make it again with the n4 rule") from None
