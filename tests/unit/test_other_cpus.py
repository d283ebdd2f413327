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
import json, sys
from pathlib import Path
import numpy as np
from threadpoolctl import threadpool_info
from n4flow import kernels
from n4flow.derivatives import CorrectionFiles, correct_scan
from n4flow.field import BiasField
from n4flow.parameters import N4Parameters
folder = Path(sys.argv[1])
fields = {}
for name, voxels in (("plain", 2**62), ("compiled", 0)):
    kernels.COMPILED_VOXELS = voxels
    files = CorrectionFiles(folder / f"{name}.nii", folder / f"{name}.json", folder / f"{name}_field.json")
    correct_scan(folder / "image.nii", folder / "mask.nii", files, parameters=N4Parameters(), device="cpu", threads=2)
features = np._core._multiarray_umath.__cpu_features__
print(json.dumps({"avx2": features["AVX2"] and features.get("X86_V3"), "blas": threadpool_info()[0]["architecture"]}))
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


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_field_and_image_of_an_old_cpu_are_the_same_within_a_hundred_thousandth(runs, kernels):
    lattices, images = [], []
    for folder in runs.values():
        lattices.append(np.array(json.loads((folder / f"{kernels}_field.json").read_text())["Lattice"]))
        images.append(np.asarray(nib.load(folder / f"{kernels}.nii").dataobj, dtype=np.float64))
    assert np.abs(lattices[0] - lattices[1]).max() < 1e-5
    there = images[0] > 0
    assert np.abs(np.log(images[0][there] / images[1][there])).max() < 1e-5
