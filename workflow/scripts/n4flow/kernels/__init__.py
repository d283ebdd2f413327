"""The passes over the voxels, behind one protocol: see `protocol`."""

from n4flow.kernels.plain import PlainKernels
from n4flow.kernels.protocol import Kernels, Statistics

__all__ = ["Kernels", "PlainKernels", "Statistics"]
