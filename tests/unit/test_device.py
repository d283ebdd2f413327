import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from n4flow import InputError
from n4flow.device import available_cores, claim_gpu, select_device

HOLD = """
import sys, pathlib
sys.path.insert(0, sys.argv[1])
from n4flow.device import claim_gpu
claimed = claim_gpu(2, pathlib.Path(sys.argv[2]))
print(claimed[0], flush=True)
sys.stdin.read()
"""


def gpu_is_there():
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:
        return False


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_without_a_gpu_auto_takes_the_cpu_and_says_why():
    device = select_device("auto")
    assert (device.kind, device.xp) == ("cpu", np)
    assert "CuPy" in device.reason or "driver" in device.reason


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
def test_with_cupy_but_without_a_gpu_asking_for_it_is_an_error():
    with pytest.raises(InputError, match=r"device: gpu: (CuPy cannot use a GPU|there is no NVIDIA driver) .*; install"):
        select_device("gpu")


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_where_there_is_no_driver_cupy_is_not_loaded(pytestconfig, monkeypatch):
    """It takes longer than a mask does."""
    monkeypatch.delitem(sys.modules, "cupy", raising=False)

    def refuse(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert select_device("auto").reason == "there is no NVIDIA driver (libcuda.so.1: cannot open shared object file)"
    assert "cupy" not in sys.modules


def test_what_else_goes_wrong_is_not_taken_for_a_missing_driver(monkeypatch):
    class Runtime:
        def getDeviceCount(self):
            raise PermissionError(13, "Permission denied", "/home/me/.cupy/kernel_cache")

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime())))
    reason = select_device("auto").reason
    assert reason == "CuPy cannot use a GPU ([Errno 13] Permission denied: '/home/me/.cupy/kernel_cache')"


def test_without_cupy_asking_for_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # an import of it fails
    with pytest.raises(InputError, match="CuPy is not installed"):
        select_device("gpu")
    assert select_device("auto").kind == "cpu"


def test_an_unknown_device_is_an_error():
    with pytest.raises(InputError, match="'tpu' is not a device"):
        select_device("tpu")


def test_processes_take_different_gpus_until_none_is_free(tmp_path, pytestconfig):
    scripts = pytestconfig.rootpath / "workflow" / "scripts"
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, scripts, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        assert sorted(holder.stdout.readline().strip() for holder in holders) == ["0", "1"]
        assert claim_gpu(2, tmp_path) == (0, None)
    finally:
        for holder in holders:
            holder.communicate()
    index, lock = claim_gpu(2, tmp_path)
    assert index == 0
    lock.close()


def test_locks_are_named_after_the_physical_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    first, lock = claim_gpu(2, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert first == 0
    assert claim_gpu(1, tmp_path) == (0, None)
    lock.close()


def test_the_lock_of_another_user_can_be_taken(tmp_path, monkeypatch):
    lock = tmp_path / "n4flow-gpu-0.lock"
    lock.touch()
    lock.chmod(0o444)

    def not_ours(*_, **__):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.touch", not_ours)
    index, held = claim_gpu(1, tmp_path)
    assert index == 0
    assert held is not None
    held.close()


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)])
def test_a_container_counts_the_cores_that_it_may_use(tmp_path, monkeypatch, limit, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert available_cores(tmp_path / "cpu.max") == (cores or 64)
    assert available_cores(tmp_path / "nowhere") == 64
