"""The mean that division by a field leaves, from the nodes, beside the sum over all voxels."""

import gzip

import nibabel as nib
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from n4flow.core.field import BiasField, Mesh
from n4flow.core.quadrature import MaskIntensity, keep_mean_intensity
from n4flow.errors import InputError
from n4flow.images.nifti import Volume
from n4flow.images.sampling import read_samples
from n4flow.parameters import N4Parameters
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles


def gathered(values, usable, mesh, planes=3):
    intensity = MaskIntensity(values.shape, mesh)
    for start in range(0, values.shape[2], planes):
        slab = (slice(None), slice(None), slice(start, start + planes))
        intensity.add(values[slab], usable[slab], start)
    return intensity


def random_field(mesh, shape, strength, seed=0):
    lattice = np.random.default_rng(seed).uniform(-strength, strength, mesh.lattice_shape)
    return BiasField(lattice, mesh, shape, np.eye(4))


def mean_change(field, values, usable):
    """Voxel by voxel: log of the mean of what is divided, over the mean of what was there."""
    weights = np.where(usable, values, 0).astype(np.float64)
    return np.log((weights * np.exp(-field.log_tile((slice(None),) * 3))).sum() / weights.sum())


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 60)] * 2, st.integers(1, 40)),
    st.sampled_from(["grid", "distance", "box"]),
    st.integers(1, 6),
    st.floats(0.01, 1.0),
    st.floats(0.02, 1.0),
    st.integers(0, 2**32 - 1),
)
@example((1, 1, 11), "grid", 1, 1.0, 1.0, 1)
@example((40, 1, 1), "grid", 1, 1.0, 0.02, 3)
def test_the_mean_is_that_of_all_voxels(shape, kind, spans, strength, share, seed):
    rng = np.random.default_rng(seed)
    meshes = {
        "grid": Mesh.of_grid(shape, (spans,) * 3),
        "distance": Mesh.of_distance(shape, (1, 1, 2), 50 / spans),
        "box": Mesh.of_box([sorted(rng.integers(0, n, 2).tolist()) for n in shape], (spans,) * 3),
    }
    mesh = meshes[kind]
    values = rng.uniform(0, 1000, shape) * (rng.random(shape) < 0.9)
    usable = (values > 0) & (rng.random(shape) < share)
    usable.ravel()[0], values.ravel()[0] = True, 1.0
    field = random_field(mesh, shape, strength, seed)
    kept = keep_mean_intensity(field, gathered(values, usable, mesh), "image")
    assert mean_change(kept, values, usable) == pytest.approx(0, abs=2e-8)


@pytest.mark.parametrize(
    ("shape", "spans", "strength", "bound"),
    [
        ((64, 64, 48), 1, 1.5, 1e-9),
        ((64, 64, 48), 8, 1.0, 1e-9),
        ((240, 230, 40), 20, 0.5, 1e-8),
        ((320, 330, 12), 32, 0.3, 1e-7),
        ((420, 400, 12), 64, 0.3, 1e-6),
        ((1100, 12, 12), 160, 0.3, 1e-6),
    ],
)
def test_the_mean_is_kept_in_a_strong_field_and_on_a_fine_mesh(shape, spans, strength, bound):
    values = np.random.default_rng(1).uniform(0, 1000, shape)
    usable = values > 300
    mesh = Mesh.of_grid(shape, [min(spans, n // 6) for n in shape])
    assert max(mesh.spans) == spans
    field = random_field(mesh, shape, strength)
    kept = keep_mean_intensity(field, gathered(values, usable, mesh), "image")
    assert field.lattice.flat[0] != kept.lattice.flat[0]
    assert abs(mean_change(kept, values, usable)) <= bound


@pytest.mark.parametrize(("voxels", "spans"), [(40, 1), (200, 8), (600, 20), (600, 40)])
def test_where_intensities_are_even_polynomials_up_to_twice_the_degree_have_their_sum(voxels, spans):
    shape = (voxels, 1, 1)
    intensity = gathered(np.ones(shape), np.ones(shape, dtype=bool), Mesh.of_grid(shape, (spans, 1, 1)))
    degree = 2 * (len(intensity.nodes[0]) // spans) - 1
    assert degree >= 7
    polynomial = np.polynomial.Chebyshev(np.random.default_rng(0).normal(size=degree + 1), domain=[0, voxels - 1])
    sums = (intensity.sums.ravel() * polynomial(intensity.nodes[0])).sum()
    assert sums == pytest.approx(polynomial(np.arange(voxels)).sum(), rel=1e-11, abs=1e-9)


@pytest.mark.parametrize(("spans", "most"), [(1, 12), (4, 48), (13, 160), (29, 160), (40, 160), (64, 256), (200, 800)])
def test_there_are_far_fewer_nodes_than_voxels(spans, most):
    shape = (2000, 6, 6)
    nodes = MaskIntensity(shape, Mesh.of_grid(shape, (spans, 1, 1))).nodes
    assert len(nodes[0]) <= most


def test_intensities_that_overflow_are_not_taken_for_a_wrong_field():
    values = np.full((12, 12, 12), 1e307)
    mesh = Mesh.of_grid(values.shape, (1, 1, 1))
    with pytest.raises(InputError, match="holds intensities beyond"):
        keep_mean_intensity(random_field(mesh, values.shape, 0.1), gathered(values, values > 0, mesh), "image")


@pytest.mark.parametrize("planes", [1, 4, 90])
@pytest.mark.parametrize("order", ["C", "F"])
def test_slabs_of_any_size_and_order_give_the_same_bits(head, planes, order):
    mesh = Mesh.of_distance(head.image.shape, (2, 2, 2), 65)
    usable = head.image > 300
    expected = gathered(head.image, usable, mesh).sums
    values, usable = (np.array(array, order=order) for array in (head.image, usable))
    assert_array_equal(gathered(values, usable, mesh, planes).sums, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.float32, np.float64, np.longdouble])
def test_voxels_that_are_not_usable_do_not_count(dtype):
    values = np.random.default_rng(0).integers(1, 200, (13, 14, 15)).astype(dtype)
    usable = values > 20
    expected = gathered(np.where(usable, values, 0), usable, mesh := Mesh.of_grid(values.shape, (1, 1, 1))).sums
    if values.dtype.kind == "f":
        values[~usable] = np.random.default_rng(0).choice([np.nan, np.inf, -np.inf, -1e30], np.sum(~usable))
    assert_array_equal(gathered(values, usable, mesh).sums, expected)
    assert expected.sum() == pytest.approx(values[usable].sum(dtype=np.float64))


def test_what_is_no_field_is_refused(head):
    mesh = Mesh.of_grid(head.image.shape, (4, 4, 4))
    field = random_field(mesh, head.image.shape, 5000)
    with pytest.raises(InputError, match=r"scan\.nii: the field .* orders of magnitude"):
        keep_mean_intensity(field, gathered(head.image, head.image > 300, mesh), "scan.nii")


def test_a_mesh_that_is_too_fine_is_refused_before_memory_is_taken_for_it(head, tmp_path):
    for name, values in (("image.nii", head.image), ("mask.nii", (head.image > 300).astype(np.uint8))):
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / name)
    with pytest.raises(InputError, match="spans along axis 0"):
        read_samples(tmp_path / "image.nii", tmp_path / "mask.nii", N4Parameters(spline_distance_mm=1e-3))


@pytest.mark.parametrize("frames", [1, 3])
def test_a_large_compressed_image_is_decompressed_twice(head, tmp_path, monkeypatch, frames):
    """Once for the samples, once for the tiles: what the mean needs is taken along with the samples."""
    series = np.stack([head.image] * frames, axis=3).squeeze()
    for name, values in (("image.nii", series), ("mask.nii", (head.image > 300).astype(np.uint8))):
        nib.save(nib.Nifti1Image(values, np.diag([2, 2, 2, 1])), tmp_path / name)
    image = tmp_path / "image.nii.gz"
    image.write_bytes(gzip.compress((tmp_path / "image.nii").read_bytes(), 1))
    monkeypatch.setattr("n4flow.images.nifti.KEPT_BYTES", 0)
    passes, slabs = [], Volume.slabs

    def counted(self, *which, **how):
        passes.append(self.path)
        return slabs(self, *which, **how)

    monkeypatch.setattr(Volume, "slabs", counted)
    files = CorrectionFiles(*(tmp_path / name for name in ("c.nii.gz", "c.json", "f.json")))
    correct_scan(
        image,
        tmp_path / "mask.nii",
        files,
        parameters=N4Parameters(iterations=(2,), fwhm=0.1, twicing=0.9),
        device="cpu",
    )
    assert passes.count(image) == 2
