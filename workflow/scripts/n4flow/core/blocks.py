"""The field on a grid that nothing holds as a whole, in tiles: a voxel gets the same bits, whatever is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from n4flow.core.field import BiasField

#: Tiles have this edge along the last two axes of an array, and lie on its multiples; along the first one they have as
#: many planes as are wanted, up to `PLANES`: an array of the field's values then lies in a core's cache.
EDGE, PLANES = 64, 8

#: Where a span has so many voxels or more, and the log field changes over none of them by more than `STEEPEST`,
#: ``exp`` of it is interpolated between `NODES` nodes a tile, with a relative error below 1e-10.
LONG_SPAN, STEEPEST, NODES = 8 * EDGE, 1.0, 8


class FieldTiles:
    """The multiplicative field ``exp(B)`` on tiles of a grid whose axes run along those of the mesh.

    Matrix products have one shape for each axis, whatever part of a tile is wanted: so their sums have one order.

    Parameters
    ----------
    field : BiasField
        On the grid of the array, transposed: its first axis is the array's last.

    Raises
    ------
    ValueError
        The grid is oblique to the mesh.
    """

    def __init__(self, field: BiasField) -> None:
        if field._mesh_axes is None:
            raise ValueError("the grid is oblique to the mesh of the field")
        self.shape = field.image_shape[::-1]
        self._lattice = np.ascontiguousarray(field.lattice_on_grid.T)
        self._bases = field.image_bases[::-1]
        self._rows = _padded(self._bases[1])
        axis = field._mesh_axes[0]
        scale, offset = field.voxel_to_mesh[axis, 0], field.voxel_to_mesh[axis, 3]
        steepest = float(np.abs(np.diff(self._lattice, axis=2)).max(initial=0))
        smooth = field.mesh.span_voxels[axis] >= LONG_SPAN * abs(scale) and steepest <= STEEPEST
        smooth = smooth and (field.gains is None or field.gains.axis != axis)  # steps are no polynomial
        nodes = (EDGE - 1) / 2 * (1 + np.cos((2 * np.arange(NODES) + 1) * np.pi / (2 * NODES)))
        self._weights = _lagrange(nodes, np.arange(EDGE))
        self._columns, self._interpolated = [], []
        for start in range(0, self.shape[2], EDGE):
            voxels = start + np.arange(EDGE)
            ends = field.mesh.coordinate(axis, scale * voxels[[0, -1]] + offset).clip(0, field.mesh.spans[axis])
            # a knot within it, or an end of the mesh, would be a bend
            inside = smooth and len(set(np.floor(ends))) == 1
            inside = inside and bool(ends.min() > 0) and bool(ends.max() < field.mesh.spans[axis])
            self._interpolated.append(inside)
            places = start + nodes if inside else voxels
            self._columns.append(np.ascontiguousarray(field.basis_along(0, places).T))

    def tiles(self, block: Sequence[slice]) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray]]:
        """``exp(B)`` on the tiles of a block.

        Parameters
        ----------
        block : three slices
            Of the array: with start and stop.

        Yields
        ------
        part : three slices
            Of the block.
        ratio : float64 array of that shape
            To be used before the next; may be overwritten.
        """
        z, y, x = block
        planes = sum(self._bases[0][z, k, None, None] * self._lattice[k] for k in range(len(self._lattice)))
        for top in range(y.start // EDGE * EDGE, y.stop, EDGE):
            lines = self._rows[top : top + EDGE] @ planes
            ys = slice(max(top, y.start), min(top + EDGE, y.stop))
            for left in range(x.start // EDGE * EDGE, x.stop, EDGE):
                xs = slice(max(left, x.start), min(left + EDGE, x.stop))
                columns, interpolated = self._columns[left // EDGE], self._interpolated[left // EDGE]
                for first in range(0, len(planes), PLANES):
                    values = lines[first : first + PLANES] @ columns
                    np.exp(values, out=values)
                    if interpolated:
                        values = values @ self._weights
                    part = (
                        slice(first, first + len(values)),
                        slice(ys.start - y.start, ys.stop - y.start),
                        slice(xs.start - x.start, xs.stop - x.start),
                    )
                    yield part, values[:, ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]


def _padded(basis: np.ndarray) -> np.ndarray:
    """A basis with rows of 0 up to a multiple of a tile's edge."""
    return np.concatenate([basis, np.zeros((-len(basis) % EDGE, basis.shape[1]))])


def _lagrange(nodes: np.ndarray, places: np.ndarray) -> Any:
    """Weights of the values at nodes, at each place: (nodes, places)."""
    rows = []
    for k, node in enumerate(nodes):
        others = np.delete(nodes, k)
        rows.append(np.prod((places[:, None] - others) / (node - others), axis=1))
    return np.ascontiguousarray(rows)
