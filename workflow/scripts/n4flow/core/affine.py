"""What leads from voxel indices to mm, and how large anything may be."""

from __future__ import annotations

import numpy as np

#: No voxel, mesh or image is larger, in mm or voxels, and none smaller than its inverse.
LARGEST_LENGTH = 1e9

#: Axes of an affine that are closer to each other than this lets them be are one: it cannot be inverted.
LARGEST_CONDITION = 1e12


def affine_problem(matrix: np.ndarray) -> str:
    """What keeps a matrix from leading from voxel indices to mm, in words; empty if nothing does."""
    if matrix.shape != (4, 4) or (matrix[3] != [0, 0, 0, 1]).any():
        return "is no affine (4, 4) matrix"
    if not np.isfinite(matrix).all():
        return "holds what is no finite number"
    sizes = np.abs(matrix[:3]).max(axis=0)
    if sizes.max() > LARGEST_LENGTH:
        return "is beyond any image"
    if sizes[:3].min() < 1 / LARGEST_LENGTH or np.linalg.cond(matrix[:3, :3]) > LARGEST_CONDITION:
        return "cannot be inverted"
    return ""
