"""The passes over the voxels, behind one protocol: see `protocol`."""

from __future__ import annotations

from typing import Any

import numpy as np

from n4flow.core.samples import Samples
from n4flow.kernels.plain import PlainKernels
from n4flow.kernels.protocol import Kernels
from n4flow.parameters import N4Parameters

__all__ = ["Kernels", "PlainKernels", "choose_kernels"]

#: From so many voxels of the mask on, compiled code has made good on the CPU what it takes to load it.
COMPILED_VOXELS = 2**16


def preload() -> None:
    """Load compiled code, for a process whose children are to find it there."""
    from n4flow.kernels.compiled import preload

    preload()


def choose_kernels(samples: Samples, parameters: N4Parameters, xp: Any, threads: int) -> Kernels:
    """The kernels for a device and so many samples: the same ones for the same input, whatever the threads.

    Compiled code is imported here, where it is used: it takes as long to load as a small scan to correct.
    """
    log_image, weights = samples.log_image, samples.confidence
    if xp is not np:
        from n4flow.kernels.cuda import CudaKernels

        return CudaKernels(log_image, weights, parameters)
    if np.count_nonzero(weights) < COMPILED_VOXELS:
        return PlainKernels(log_image, weights, parameters)
    from n4flow.kernels.compiled import CompiledKernels

    return CompiledKernels(log_image, weights, parameters, threads)
