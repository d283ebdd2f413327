"""What all tests share: phantoms, and the real scans where they are there."""

import os
from pathlib import Path

import numpy as np
import pytest

from n4flow import N4Parameters, kernels
from n4flow.core.phantom import make_phantom
from n4flow.core.samples import Samples, log_where
from n4flow.steps.demo import load_tissues

REPOSITORY = Path(__file__).parents[1]
TISSUES = REPOSITORY / "workflow" / "resources" / "mni152" / "tissues_2mm.nii.gz.base64"


#: Folders of tests that run the workflow, browsers or a cluster; files of those that compare with other programs,
#: compile, take a CPU for another one, or estimate many fields.
SLOW = {"workflow", "report", "slurm"}
COMPARED = {"test_agreement", "test_reference", "test_estimate", "test_invariances", "test_microscopy", "test_phantoms"}
SLOW_FILES = COMPARED | {"test_kernels", "test_cuda", "test_other_cpus"}


def pytest_xdist_auto_num_workers():
    """One and a half for a core: a third of the time, tests wait for browsers, for Snakemake and for SLURM."""
    return len(os.sched_getaffinity(0)) * 3 // 2 if hasattr(os, "sched_getaffinity") else None


def pytest_configure(config):
    """Files go to xdist's workers in the order below, not by their number of tests: those of few tests take longest."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Mark what `-m "not slow"` leaves out, and put it first, so that no long file is left over for one worker."""
    for item in items:
        if item.path.parent.name in SLOW or item.path.stem in SLOW_FILES:
            item.add_marker(pytest.mark.slow)
    order = ["workflow", "slurm", "report"]  # runs of the workflow compile what the others then find compiled
    items.sort(
        key=lambda item: (
            order.index(item.path.parent.name) if item.path.parent.name in order else len(order),
            item.get_closest_marker("slow") is None,
        )
    )


@pytest.fixture(scope="session")
def tissues():
    """Grey matter, white matter and fluid at 2 mm, 0 to 255."""
    return np.asarray(load_tissues(TISSUES).dataobj)


@pytest.fixture(scope="session")
def head(tissues):
    """A head at 2 mm with 40 % INU and 3 % noise."""
    return make_phantom(tissues, 2.0, inu_percent=40, noise_percent=3, seed=11)


@pytest.fixture(scope="session")
def real_scans():
    """Folder of the real BIDS dataset: beside the repository, or where N4FLOW_TEST_DATA points."""
    folder = Path(os.environ.get("N4FLOW_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not (folder / "bids").is_dir():
        pytest.skip(f"no real scans in {folder}: set N4FLOW_TEST_DATA to a folder that holds bids/")
    return folder / "bids"


@pytest.fixture(params=["plain", "compiled"])
def kernel_set(request, monkeypatch):
    """Run a test with either set of CPU kernels, whatever the number of voxels."""
    monkeypatch.setattr(kernels, "COMPILED_VOXELS", 0 if request.param == "compiled" else 2**62)
    return request.param


def lee_wolberg_shin(iterations=(200,), **settings):
    """Parameters of ITK's fit and its expected values; one mesh and one width, unless they are given."""
    return N4Parameters(**{"fit": "lee-wolberg-shin", "twicing": 0, "fwhm": 0.12, "iterations": iterations} | settings)


def samples_of(image, mask, voxel_size_mm=(1.0, 1.0, 1.0)):
    """Every voxel of an array as a sample."""
    mask = mask & (image > 0)
    positions = tuple(np.arange(n) for n in image.shape)
    affine = np.diag([*voxel_size_mm, 1.0])
    return Samples(log_where(image, mask), mask, positions, image.shape, voxel_size_mm, affine, {}, "test")


def demeaned_error(field, truth, inside):
    """Difference of two multiplicative fields in log, without its mean inside."""
    difference = np.log(field[inside]) - np.log(truth[inside])
    return difference - difference.mean()


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))
