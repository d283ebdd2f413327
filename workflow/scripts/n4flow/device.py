"""Which device computes. CuPy is imported here and in `kernels.cuda`, and only when it may be used."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

import numpy as np

from n4flow.errors import InputError, MachineError

DeviceChoice = Literal["auto", "gpu", "cpu"]


@dataclass(frozen=True)
class Device:
    """Where arrays live: the array module, a name for people, and how the choice came about."""

    kind: Literal["cpu", "gpu"]
    xp: ModuleType
    name: str
    reason: str
    lock: IO[str] | None = None  # held as long as the device is in use; freed with the process


def select_device(choice: DeviceChoice = "auto") -> Device:
    """Choose the device: ``auto`` takes a free GPU, or the CPU where there is none.

    Raises
    ------
    InputError
        ``gpu`` was asked for and there is none.
    """
    if choice not in ("auto", "gpu", "cpu"):
        raise InputError("device", f"{choice!r} is not a device", "give auto, gpu or cpu")
    if choice == "cpu":
        return Device("cpu", np, "CPU", "asked for")
    count, problem = 0, _driver_problem()
    if not problem:
        try:
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
            problem = "CuPy sees no GPU" if count == 0 else ""
            if count:
                # a driver alone is not enough: kernels are compiled by one of CUDA's libraries
                float(cupy.expm1(cupy.ones(2)).sum())
        except ImportError:
            problem = "CuPy is not installed"
        except Exception as error:  # CuPy raises classes of its own that cannot be named without it
            problem = f"CuPy cannot use a GPU ({error})"
    if problem and choice == "gpu":
        raise MachineError(
            "device: gpu", problem, "install envs/requirements-gpu.txt on a machine with a GPU, or use auto"
        )
    if problem:
        return Device("cpu", np, "CPU", problem)
    index, lock = claim_gpu(count)
    cupy.cuda.Device(index).use()
    name = cupy.cuda.runtime.getDeviceProperties(index)["name"].decode()
    return Device("gpu", cupy, f"GPU {index} ({name})", "asked for" if choice == "gpu" else "found", lock)


def _driver_problem() -> str:
    """Why there can be no GPU; found without CuPy, which takes longer to load than a mask takes to be made."""
    if sys.platform == "linux" and "cupy" not in sys.modules:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            return f"there is no NVIDIA driver ({error})"
    return ""


def claim_gpu(count: int, folder: Path | None = None) -> tuple[int, IO[str] | None]:
    """Take the first GPU that no other n4flow process on this machine holds.

    Snakemake counts GPUs but hands out no index, so processes agree through file locks, which the
    operating system frees when a process ends. Indices are those inside CUDA_VISIBLE_DEVICES; the
    lock is named after the physical entry. If all are held, the first is shared.

    Parameters
    ----------
    count : int
        Number of visible GPUs.
    folder : Path, optional
        Where the lock files lie; the system's temporary folder by default.

    Returns
    -------
    index : int
    lock : file or None
        Keep it open as long as the GPU is in use. None where the GPU is shared.
    """
    folder = folder or Path(tempfile.gettempdir())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for index in range(count):
        entry = visible[index].strip() if index < len(visible) and visible[index] else str(index)
        path = folder / f"n4flow-gpu-{entry.replace('/', '_')}.lock"
        with contextlib.suppress(OSError):  # another user's file, which can be locked all the same
            path.touch()
        try:
            lock = open(path)  # noqa: SIM115 (open as long as the GPU is held)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            continue
        return index, lock
    return 0, None


def available_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may run on, in a container no more than it may use.

    Parameters
    ----------
    quota : Path
        Where Linux's control groups (version 2) tell how many microseconds may be used in how many.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        used, of = map(int, quota.read_text().split())
    except (OSError, ValueError):  # other systems have no such file; without a limit it begins with the word max
        return cores
    return min(cores, max(1, -(-used // of)))


def array_module(array: Any) -> ModuleType:
    """NumPy or CuPy, whichever the array belongs to (CuPy is not imported for this)."""
    cupy = sys.modules.get("cupy")
    return cupy if cupy is not None and isinstance(array, cupy.ndarray) else np


def to_host(array: Any) -> np.ndarray:
    """The array as a NumPy array: itself, or copied from the GPU."""
    # in the order it has on the device, so that neither side transposes
    return array if isinstance(array, np.ndarray) else array.get(order="A")


def to_module(array: Any, module: ModuleType) -> Any:
    """The array as one of NumPy or CuPy: itself, or copied to or from the GPU."""
    return to_host(array) if module is np else module.asarray(array)
