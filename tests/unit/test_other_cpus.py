"""The same image on other kinds of CPU: as far as one machine can play them, by taking instruction sets away."""

import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

#: The oldest x86-64 CPU that NumPy runs on.
OLD_CPU = {
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Prescott",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX,-FMA,-AVX512F,-AVX512VL",
    "NUMBA_CPU_NAME": "generic",
    "NUMBA_CPU_FEATURES": "",
}

#: Correct the scan with either set of kernels, and tell what the field is and with what it was computed.
JOB = """
import hashlib, json, sys
from pathlib import Path
import numpy as np
from numba import njit
from threadpoolctl import threadpool_info
from n4flow import kernels
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.correct import correct_scan
from n4flow.core.field import Mesh
from n4flow.core.fit import LeeWolbergShin
from n4flow.kernels.compiled import CompiledKernels
from n4flow.kernels.instructions import fused
from n4flow.parameters import N4Parameters
folder = Path(sys.argv[1])
fields = {}
for name, voxels in (("plain", 2**62), ("compiled", 0)):
    kernels.COMPILED_VOXELS = voxels
    for preset in ("default", "fixed"):
        files = CorrectionFiles(*(folder / f"{name}_{preset}{ending}" for ending in (".nii", ".json", "_field.json")))
        parameters = N4Parameters.from_mapping({"preset": preset})
        correct_scan(folder / "image.nii", folder / "mask.nii", files, parameters=parameters, device="cpu", threads=2)

rng = np.random.default_rng(2)
log_image = rng.normal(4, 0.3, (40, 41, 42))
weights = rng.uniform(0.1, 1, log_image.shape).astype(np.float32)
bases = Mesh.of_grid(log_image.shape, (4, 3, 2)).bases([np.arange(n) for n in log_image.shape])
fixed = N4Parameters.from_mapping({"preset": "fixed"})
made = CompiledKernels(log_image, weights, fixed, 2)
made.start_stage(fixed.stages[0], LeeWolbergShin(weights, bases), np.zeros((7, 6, 5)))
passes = hashlib.sha256()
for n in range(3):
    passes.update(made.histogram().tobytes())
    passes.update(made.gather(np.linspace(made.low, made.high, 200) * 0.9).tobytes())
    found = made.subtract_update(np.linspace(-0.1, 0.1 + n, 210).reshape(7, 6, 5))
    passes.update(np.array([made.low, made.high, *made.work.totals]).tobytes())
    made.low, made.high, _ = found
made.end_stage()

@njit(error_model="numpy")
def all_fused(a, b, c, out):
    for k in range(len(a)):
        out[k] = fused(a[k], b[k], c[k])
    return out

rng = np.random.default_rng(1)
a, b, c = (rng.integers(0, 2**32, 10**6, dtype=np.uint64).astype(np.uint32).view(np.float32) for _ in range(3))
a[::2], b[::2] = rng.normal(size=(2, len(a) // 2))
c[::4] = -(a * b)[::4]  # all but cancelled
c[2::4] = a[2::4] * b[2::4] * np.float32(2) ** rng.integers(-30, 60, len(a) // 4)  # most hang on the last bit
small = 2.0 ** -rng.integers(15, 21, len(a) // 4)  # in float64 these come out halfway between two float32
a[1::4], b[1::4] = 1 + small, rng.choice([-1, 1], len(small)) * (1 - small) / 2**24
c[1::4] = 1 + rng.integers(0, 2**22, len(small)) / 2**23
out = all_fused(a, b, c, np.empty_like(a))
out[np.isnan(out)] = np.nan  # of which there are many
features = np._core._multiarray_umath.__cpu_features__
print(json.dumps({"avx2": features["AVX2"] and features.get("X86_V3"), "blas": threadpool_info()[0]["architecture"],
                  "passes": passes.hexdigest(),
                  "fused": hashlib.sha256(out.tobytes()).hexdigest()}))
"""


@pytest.fixture(scope="module")
def runs(head, tmp_path_factory, pytestconfig):
    """The folders of a run with all that this CPU has, and of one with what an old one has."""
    folders = {}
    for kind, environment in (("own", {}), ("old", OLD_CPU)):
        folder = folders[kind] = tmp_path_factory.mktemp(kind)
        nib.save(nib.Nifti1Image(head.image, np.diag([2.0, 2, 2, 1])), folder / "image.nii")
        nib.save(nib.Nifti1Image(head.brain.astype(np.uint8), np.diag([2.0, 2, 2, 1])), folder / "mask.nii")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", JOB, folder],
            env={**os.environ, "PYTHONPATH": str(pytestconfig.rootpath / "workflow" / "scripts"), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (folder / "with.json").write_text(done.stdout)
    return folders


def test_the_switches_work(runs):
    used = json.loads((runs["old"] / "with.json").read_text())
    assert not used["avx2"]
    assert used["blas"].lower() in ("prescott", "katmai", "generic")


@pytest.mark.parametrize("preset", ["default", "fixed"])
@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_field_and_image_of_an_old_cpu_are_the_same_within_a_hundred_thousandth(runs, kernels, preset):
    lattices, images = [], []
    for folder in runs.values():
        lattices.append(np.array(json.loads((folder / f"{kernels}_{preset}_field.json").read_text())["Lattice"]))
        images.append(np.asarray(nib.load(folder / f"{kernels}_{preset}.nii").dataobj, dtype=np.float64))
    assert np.abs(lattices[0] - lattices[1]).max() < 1e-5
    there = images[0] > 0
    assert np.abs(np.log(images[0][there] / images[1][there])).max() < 1e-5


def test_a_multiplication_and_addition_at_once_has_the_same_bits_without_the_instruction(runs):
    own, old = (json.loads((folder / "with.json").read_text())["fused"] for folder in runs.values())
    assert own == old


def test_compiled_passes_find_the_same_bits(runs):
    """Fields do not to the last bit: what a mesh needs is found, and its equations solved, where BLAS adds."""
    own, old = (json.loads((folder / "with.json").read_text())["passes"] for folder in runs.values())
    assert own == old
