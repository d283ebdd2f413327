"""Gains of single planes: found, applied on every grid, and left alone where there are none."""

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal

from n4flow.core import planes
from n4flow.core.blocks import FieldTiles
from n4flow.core.field import BiasField, Mesh
from n4flow.core.planes import PlaneGains, find_gains, most_frequent
from n4flow.images.division import write_corrected
from n4flow.images.fields import load_field, save_field
from n4flow.images.ngff import read_image
from n4flow.images.nifti import Volume
from n4flow.qc.measuring import measure_subject
from n4flow.qc.methods import methods_text
from n4flow.qc.subject_panels import plot_panels
from n4flow.qc.viewer import _lattice
from n4flow.steps.apply import apply_scan
from n4flow.steps.correct import correct_scan
from n4flow.steps.mask import mask_scan
from n4flow.steps.reference import reference_scan
from n4flow.steps.store import correct_store
from n4flow.study.manifest import _field, _largest_difference
from tests.phantoms import serial_sections
from tests.pyramids import write_store

WHOLE = (slice(None),) * 3
AFFINE = np.diag([0.12, 0.12, 0.12, 1.0])


def field_with_gains(axis, shape=(20, 16, 12), affine=AFFINE, seed=0):
    rng = np.random.default_rng(seed)
    mesh = Mesh.of_grid(shape, (3, 3, 3))
    gains = PlaneGains(axis, rng.normal(0, 0.3, shape[axis]))
    return BiasField(rng.normal(0, 0.1, mesh.lattice_shape), mesh, shape, affine, gains=gains)


def along(gains):
    shape = [1, 1, 1]
    shape[gains.axis] = -1
    return gains.log_gains.reshape(shape)


def corrected(folder, image, axis, mask=None, **more):
    """Mask and correct as the workflow does; files by role, and the log field on the image's grid."""
    nib.save(nib.Nifti1Image(image, AFFINE), folder / "x.nii.gz")
    if mask is not None:
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), AFFINE), folder / "own.nii.gz")
    own = folder / "own.nii.gz" if mask is not None else None
    how = {"method": "otsu", "percentile": 50, "plane_gains": axis}
    mask_scan(folder / "x.nii.gz", own, folder / "m.nii.gz", folder / "m.json", **how)
    files = {"corrected": folder / "c_SPIM.nii.gz", "sidecar": folder / "c_SPIM.json", "field": folder / "f.json"}
    correct_scan(folder / "x.nii.gz", folder / "m.nii.gz", files, parameters={}, device="cpu", plane_gains=axis, **more)
    return files, load_field(files["field"]).log_tile(WHOLE)


# ---------------------------------------------------------------- what is found


def steps_of(rng, gains, change=0.2, voxels=2000):
    """Log planes of two tissues; from plane to plane some voxels become of the brighter one."""
    tissue = rng.random(voxels) < 0.3
    rows = []
    for gain in gains:
        tissue |= rng.random(voxels) < change / 10
        rows.append(gain + 0.7 * tissue + rng.normal(0, 0.05, voxels))
    return np.array(rows)


def test_gains_are_found_but_for_a_parabola():
    rng = np.random.default_rng(1)
    gains = rng.normal(0, 0.3, 30)
    place = np.linspace(-1, 1, 30)
    powers = np.stack([np.ones(30), place, place**2], axis=1)
    expected = gains - powers @ np.linalg.lstsq(powers, gains, rcond=None)[0]
    assert np.abs(find_gains(steps_of(rng, gains)).log_gains - expected).max() < 0.05
    smooth = find_gains(steps_of(rng, powers @ [1, 0.5, 0.5]))
    assert np.abs(smooth.log_gains).max() < 0.05
    assert not smooth.is_needed


def test_the_most_frequent_change_is_not_that_of_a_third_that_changes():
    rng = np.random.default_rng(2)
    values = np.concatenate([rng.normal(0.1, 0.05, 700), rng.normal(0.8, 0.05, 300)])
    assert abs(most_frequent(values) - 0.1) < 0.01
    assert abs(np.median(values) - 0.1) > 0.02
    assert most_frequent(np.full(9, 0.25)) == 0.25


@pytest.mark.parametrize("empty", [[0, 1], [28, 29], [10], [4, 5, 6, 20]])
def test_planes_without_samples_change_nothing_for_the_others(empty):
    rng = np.random.default_rng(3)
    rows = steps_of(rng, rng.normal(0, 0.3, 30), change=0)
    whole = find_gains(rows).log_gains
    rows[empty] = np.nan
    found = find_gains(rows)
    left = np.delete(np.arange(30), empty)
    difference = (found.log_gains - whole)[left]
    # a parabola through fewer planes is another one
    powers = np.polynomial.polynomial.polyvander(left / 30, 2)
    assert np.abs(difference - powers @ np.linalg.lstsq(powers, difference, rcond=None)[0]).max() < 0.01
    assert np.isfinite(found.log_gains).all()


def test_too_few_planes_have_no_gains():
    rows = steps_of(np.random.default_rng(4), [0, 1, 0])
    assert not find_gains(rows).is_needed
    assert not find_gains(np.full((30, 2000), np.nan)).is_needed


def test_noise_beside_an_object_is_not_compared_with_it():
    rng = np.random.default_rng(5)
    rows = np.full((12, 3000), np.nan)
    rows[:8, :1000] = 7 + rng.normal(0, 0.05, (8, 1000))
    for row in rows[8:]:  # what is above a threshold between noise and noise
        row[rng.random(3000) < 0.3] = 2
    assert np.ptp(find_gains(rows, 0.5).log_gains) < 0.1
    assert np.ptp(find_gains(rows).log_gains) > 1


# ---------------------------------------------------------------- on every grid


@pytest.mark.parametrize("axis", range(3))
def test_gains_are_added_to_the_spline(axis, tmp_path):
    field = field_with_gains(axis)
    whole = field.log_tile(WHOLE)
    assert_allclose(whole, field.smooth.log_tile(WHOLE) + along(field.gains), atol=1e-12)
    assert_allclose(field.log_at([np.arange(n) for n in field.image_shape]), whole, atol=1e-12)
    assert_array_equal(field.log_tile(np.s_[3:9, :, 2:5]), whole[3:9, :, 2:5])
    ((along_axis, log_gains),) = [field.gains_along()]
    assert along_axis == axis
    assert_allclose(log_gains, field.gains.log_gains, atol=1e-12)
    save_field(field, tmp_path / "f.json")
    assert_array_equal(load_field(tmp_path / "f.json").log_tile(WHOLE), whole)


@pytest.mark.parametrize("axis", range(3))
def test_a_store_is_divided_by_them_in_tiles(axis):
    field = field_with_gains(axis, (150, 70, 20))
    found = np.empty(field.image_shape[::-1])
    for part, ratio in FieldTiles(field).tiles([slice(0, n) for n in found.shape]):
        found[part] = ratio
    assert_allclose(found.T, np.exp(field.log_tile(WHOLE)), rtol=1e-12)


@pytest.mark.parametrize("axis", range(3))
def test_a_fine_plane_gets_the_gain_of_the_coarse_one_that_it_lies_in(axis):
    field = field_with_gains(axis)
    affine = AFFINE @ np.diag([0.25, 0.25, 0.25, 1])
    affine[:3, 3] = AFFINE[:3, :3] @ np.full(3, (0.25 - 1) / 2)
    fine = field.on_grid([4 * n for n in field.image_shape], affine)
    expected = np.repeat(along(field.gains), 4, axis=axis)
    assert_allclose(fine.log_tile(WHOLE) - fine.smooth.log_tile(WHOLE) - expected, 0, atol=1e-9)


@pytest.mark.parametrize("factor", [2, 3, 2.5])
def test_a_coarse_plane_gets_the_mean_of_the_gains_that_it_covers(factor):
    field = field_with_gains(2, (8, 8, 30))
    affine = np.diag([0.12, 0.12, 0.12 * factor, 1])
    affine[2, 3] = 0.12 * (factor - 1) / 2
    coarse = field.on_grid((8, 8, int(30 / factor)), affine)
    tenths = np.exp(np.repeat(field.gains.log_gains, 10)).reshape(-1, round(10 * factor)).mean(axis=1)
    found = (coarse.log_tile(WHOLE) - coarse.smooth.log_tile(WHOLE))[0, 0]
    assert_allclose(found, np.log(tenths), atol=1e-9)


def test_flipped_permuted_and_oblique_grids_get_the_same_gains():
    field = field_with_gains(2)
    turned = AFFINE[:, [2, 0, 1, 3]] @ np.diag([-1, 1, 1, 1])
    turned[:3, 3] = AFFINE[:3, 2] * 11
    seen = field.on_grid((12, 20, 16), turned).log_tile(WHOLE)
    assert_allclose(seen[::-1].transpose(1, 2, 0), field.log_tile(WHOLE), atol=1e-9)
    c, s = np.cos(0.3), np.sin(0.3)
    about_z = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    oblique = field.on_grid(field.image_shape, about_z @ AFFINE)
    assert oblique._mesh_axes is None
    assert_allclose(oblique.log_tile(WHOLE) - oblique.smooth.log_tile(WHOLE) - along(field.gains), 0, atol=1e-9)
    assert oblique.gains_along() is None


def test_planes_beyond_the_ends_get_the_gain_there():
    gains = PlaneGains(0, np.array([0.5, 0.1, -0.3]))
    assert_allclose(gains.at([-7, -1, 0, 2, 3, 50], 1.0), [0.5, 0.5, 0.5, -0.3, -0.3, -0.3], atol=1e-12)
    assert_allclose(gains.at([-20, 20], 5.0), [0.5, -0.3], atol=1e-12)


def test_a_field_without_gains_is_written_as_ever(tmp_path):
    field = field_with_gains(2)
    assert "PlaneGains" not in field.smooth.to_mapping()
    assert field.smooth.to_mapping()["Format"].endswith("version 1")
    assert field.to_mapping()["Format"].endswith("version 2")


@pytest.mark.parametrize(
    "gains",
    [{"Axis": 3, "LogGains": [0.0]}, {"Axis": 2, "LogGains": []}, {"Axis": 2, "LogGains": [None]}, {"Axis": True}, []],
)
def test_gains_that_make_no_sense_are_refused(gains, tmp_path):
    (tmp_path / "f.json").write_text(json.dumps(field_with_gains(2).to_mapping() | {"PlaneGains": gains}))
    with pytest.raises(ValueError, match="is no n4flow bias field"):
        load_field(tmp_path / "f.json")


def test_fields_are_compared_with_their_gains(tmp_path):
    field = field_with_gains(2)
    save_field(field, tmp_path / "f.json")

    def difference(other):
        content = _field(other)
        return _largest_difference(tmp_path / "f.json", content | {"Lattice": np.array(content["Lattice"])})

    moved = PlaneGains(2, field.gains.log_gains + 1e-3)
    assert difference(field) == 0
    assert difference(replace(field, gains=moved)) == pytest.approx(1e-3, abs=1e-6)
    assert difference(replace(field, gains=PlaneGains(1, moved.log_gains))) is None
    assert difference(field.smooth) is None


# ---------------------------------------------------------------- from file to file


@pytest.mark.parametrize("axis", range(3))
def test_sections_are_levelled(tmp_path, axis):
    scan = serial_sections(2, axis=axis)
    files, found = corrected(tmp_path, scan.image, "ijk"[axis])
    whole = np.std(scan.log_bias[scan.brain])
    assert np.std((found - scan.log_bias)[scan.brain]) < 0.1 * whole
    inside = nib.load(tmp_path / "m.nii.gz").get_fdata() > 0
    after = nib.load(files["corrected"]).get_fdata()
    assert after[inside].mean() == pytest.approx(scan.image[inside].mean(), rel=1e-6)
    assert json.loads(files["sidecar"].read_text())["N4"]["PlaneGains"]["Levelled"]


def test_without_gains_nothing_is_levelled_and_the_bytes_stay(tmp_path):
    scan = serial_sections(2, gain_sd=0, attenuation=0)
    outputs = []
    for name, axis in (("with", "k"), ("without", None)):
        (tmp_path / name).mkdir()
        files, _ = corrected(tmp_path / name, scan.image, axis)
        found = json.loads(files["sidecar"].read_text())["N4"].get("PlaneGains")
        assert found is None if axis is None else not found["Levelled"]
        outputs.append([files[role].read_bytes() for role in ("corrected", "field")])
    assert outputs[0] == outputs[1]


def test_what_outputs_are_does_not_depend_on_threads_or_slabs(tmp_path, monkeypatch):
    scan = serial_sections(2)
    lattices = []
    for threads, voxels in ((1, 2**18), (2, 2**12)):
        monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", voxels)
        files, _ = corrected(tmp_path, scan.image, "k", scan.brain, threads=threads)
        lattices.append(files["field"].read_bytes())
    assert lattices[0] == lattices[1]


def test_a_gpu_leaves_the_division_to_the_host(tmp_path):
    """Its kernel knows splines alone: here there is none at all."""
    field = field_with_gains(2)
    image = np.random.default_rng(6).uniform(1, 2, field.image_shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, AFFINE), tmp_path / "x.nii.gz")
    write_corrected(Volume(tmp_path / "x.nii.gz"), field, tmp_path / "y.nii.gz", xp=object())
    assert_allclose(nib.load(tmp_path / "y.nii.gz").get_fdata(), image / field.ratio_tile(WHOLE), rtol=1e-6)


def test_another_scan_gets_them_with_the_field(tmp_path):
    scan = serial_sections(2)
    files, _ = corrected(tmp_path, scan.image, "k", scan.brain)
    other = {"corrected": tmp_path / "d_SPIM.nii.gz", "sidecar": tmp_path / "d.json", "field": tmp_path / "g.json"}
    apply_scan(tmp_path / "x.nii.gz", files["field"], other)
    assert_array_equal(nib.load(other["corrected"]).get_fdata(), nib.load(files["corrected"]).get_fdata())


def test_simpleitk_gets_the_same_planes(tmp_path):
    scan = serial_sections(2)
    _, found = corrected(tmp_path, scan.image, "k", scan.brain)
    other = {"corrected": tmp_path / "d_SPIM.nii.gz", "sidecar": tmp_path / "d.json", "field": tmp_path / "g.json"}
    reference_scan(tmp_path / "x.nii.gz", tmp_path / "m.nii.gz", other, plane_gains="k")
    reference = load_field(other["field"]).log_tile(WHOLE)
    assert np.std((reference - found)[scan.brain]) < 0.1


def test_without_the_limit_little_would_be_found_where_there_is_nothing(tmp_path, monkeypatch):
    scan = serial_sections(2, gain_sd=0, attenuation=0)
    monkeypatch.setattr(planes, "LEAST_STEP", 0.0)
    files, found = corrected(tmp_path, scan.image, "k", scan.brain)
    assert json.loads(files["sidecar"].read_text())["N4"]["PlaneGains"]["LargestSteps"] < 0.05
    assert np.std((found - scan.log_bias)[scan.brain]) < 0.03


def test_a_store_is_levelled_on_all_its_levels(tmp_path):
    """By the coarse level, the fine one is divided by the gain of the plane that it lies in."""
    scan = serial_sections(2, sections=10)
    coarse = np.rint(scan.image[16:66, 9:57]).clip(0, 65535).astype(np.uint16).T
    fine = coarse.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    store = write_store(tmp_path / "a.ome.zarr", [fine, coarse], scale_um=(60, 60, 60))
    correct_store(store, tmp_path / "out.ome.zarr", level=1, plane_gains="k", device="cpu", dtype="float32")
    field = load_field(tmp_path / "out_channel-0_biasfield.json")
    assert np.ptp(field.gains.log_gains) > 0.3
    image = read_image(tmp_path / "out.ome.zarr")
    for level, before in zip(image.levels, (fine, coarse), strict=True):
        shape, affine = image.grid(level)
        ratio = np.exp(field.on_grid(shape, np.array(affine)).log_tile(WHOLE)).T
        after = zarr.open_array(tmp_path / "out.ome.zarr" / level.path, mode="r")[...]
        assert_allclose(after, before / ratio, rtol=1e-6)
    told = json.loads((tmp_path / "out.json").read_text())["N4"]["channel 0"]["PlaneGains"]
    assert told["Axis"] == "k"
    assert told["Levelled"]


def test_the_page_and_the_methods_tell_of_them(tmp_path):
    scan = serial_sections(2)
    files, _ = corrected(tmp_path, scan.image, "k", scan.brain)
    made = {role: files[role] for role in ("corrected", "sidecar", "field")}
    subject = measure_subject(
        name="sub-1_SPIM",
        image=tmp_path / "x.nii.gz",
        mask=tmp_path / "m.nii.gz",
        mask_sidecar=tmp_path / "m.json",
        field_window_log=0.4,
        keep_volume=True,
        **made,
    )
    (panel,) = plot_panels(subject, ["Gains of planes"])
    assert panel["source"].startswith("data:image/webp")
    assert not [flag for flag in subject.values["flags"] if flag.startswith("field_steep")]
    assert "planes along k were levelled" in methods_text([subject.values])
    drawn = _lattice(subject.field)
    assert drawn["gains"]["axis"] == 2
    lattice = np.reshape(drawn["lattice"], [s + 3 + (axis == 2) for axis, s in enumerate(drawn["spans"])])
    assert (lattice[:, :, -1] == 1).all()
    assert_allclose(drawn["gains"]["log"], subject.field.gains.log_gains, atol=1e-12)
