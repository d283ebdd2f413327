import json
import os
import subprocess
import sys
import threading

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import InputError, N4Parameters, correct
from n4flow.core.field import BiasField, Mesh
from n4flow.core.quadrature import keep_mean_intensity
from n4flow.estimate import estimate_field
from n4flow.images.division import _ahead, write_corrected
from n4flow.images.fields import load_field, save_field
from n4flow.images.nifti import Volume, VolumeWriter
from n4flow.images.sampling import read_samples
from n4flow.parameters import MOST_SAMPLES
from n4flow.steps.apply import apply_scan
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import mask_scan
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def mask_of_head(head):
    return head.image > 300


def test_corrected_times_field_is_the_original_and_the_mean_stays(head, mask_of_head):
    result = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")
    assert result.corrected.dtype == result.bias.dtype == np.float32
    assert_allclose(result.corrected * result.bias, head.image, rtol=3e-7)
    means = [array[mask_of_head].mean(dtype=np.float64) for array in (head.image, result.corrected)]
    assert means[1] == pytest.approx(means[0], rel=1e-7)
    assert np.ptp(np.log(result.bias[mask_of_head])) > 0.2
    assert result.history[-1].cv <= N4Parameters().convergence_threshold


@pytest.mark.parametrize("alias", ["out", "bias_out"])
def test_a_buffer_may_be_the_input_itself(head, mask_of_head, alias):
    expected = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")
    image = head.image.copy()
    result = correct(image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu", **{alias: image})
    assert_array_equal(result.corrected, expected.corrected)
    assert_array_equal(result.bias, expected.bias)
    assert image is (result.corrected if alias == "out" else result.bias)


@pytest.mark.parametrize("tile_voxels", [1, 50_000])
def test_tiles_of_any_size_give_the_same_bits(head, mask_of_head, tile_voxels, monkeypatch):
    expected = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")
    monkeypatch.setattr("n4flow.correction.TILE_VOXELS", tile_voxels)
    result = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(result.field.lattice, expected.field.lattice)
    assert_array_equal(result.corrected, expected.corrected)


def test_two_dimensions_and_axis_order(head):
    plane = head.image[:, :, 45]
    settings = {"voxel_size_mm": (2, 2), "parameters": N4Parameters(shrink_factor=1), "device": "cpu"}
    flat = correct(plane, plane > 300, **settings)
    assert flat.corrected.shape == plane.shape
    turned = correct(plane.T, plane.T > 300, **settings)
    assert_allclose(turned.bias.T, flat.bias, rtol=1e-6)


def test_integers_and_a_whole_array_without_a_mask(head):
    brain = head.image[30:70, 30:80, 30:70]
    from_floats = correct(np.rint(brain), voxel_size_mm=(2, 2, 2), device="cpu")
    from_integers = correct(brain.round().astype(np.int16), voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(from_integers.bias, from_floats.bias)


def test_scale_of_the_weights_does_not_matter(head, mask_of_head):
    weights = np.where(mask_of_head, 1 + np.linspace(0, 1, head.image.shape[0])[:, None, None], 0)
    weights[0, 0, 0] = 3e7  # outside of the mask

    def corrected(weights):
        return correct(head.image, mask_of_head, weights=weights, voxel_size_mm=(2, 2, 2), device="cpu").bias

    expected = corrected(weights)
    assert np.ptp(np.log(expected[mask_of_head])) > 0.2
    for scale in (1e-200, 1e-50, 1e-39, 1e39, 1e200):
        assert_allclose(corrected(weights * scale), expected, rtol=1e-6, err_msg=f"{scale:g}")
    # a power of two is exact, and so are its results
    assert_array_equal(corrected(weights * 2.0**500), expected)


def test_a_weight_of_0_is_as_good_as_no_mask(head, mask_of_head):
    image, hole = head.image.copy(), np.zeros_like(mask_of_head)
    hole[40:58, 45:70, 35:55] = True
    image[hole] *= 5
    settings = {"voxel_size_mm": (2, 2, 2), "device": "cpu"}
    weighted = correct(image, mask_of_head, weights=np.where(hole, 0.0, 1.0), **settings).field.lattice
    masked = correct(image, mask_of_head & ~hole, **settings).field.lattice
    # but for the mean intensity, which is kept in all of the mask
    assert np.ptp(weighted - masked) < 1e-9
    assert np.ptp(correct(image, mask_of_head, **settings).field.lattice - masked) > 0.005


@pytest.mark.parametrize("flat", [False, True], ids=["volume", "plane"])
def test_field_of_an_array_is_brought_to_another_grid(head, mask_of_head, tmp_path, flat):
    image, mask = (head.image[:, :, 45], mask_of_head[:, :, 45]) if flat else (head.image, mask_of_head)
    affine = np.array([[0, -2, 0, 40], [2.0, 0, 0, -7], [0, 0, 2, 3], [0, 0, 0, 1]])
    settings = {"voxel_size_mm": (2,) * image.ndim, "parameters": N4Parameters(shrink_factor=2), "device": "cpu"}
    result = correct(image, mask, affine=affine, **settings)
    without = correct(image, mask, **settings)
    assert_array_equal(result.bias, without.bias)
    assert_array_equal(without.field.affine, np.diag([2, 2, 1 if flat else 2, 1]))
    save_field(result.field, tmp_path / "field.json")
    # every second voxel, from the other end of the first axis
    other = affine @ np.array([[-2, 0, 0, image.shape[0] - 1], [0, 2, 0, 0], [0, 0, 1 if flat else 2, 0], [0, 0, 0, 1]])
    part = image[::-2, ::2] if flat else image[::-2, ::2, ::2]
    ratio = load_field(tmp_path / "field.json").on_grid(part.shape, other).ratio_tile(np.s_[:, :, :])
    expected = result.bias[::-2, ::2, None] if flat else result.bias[::-2, ::2, ::2]
    assert_allclose(ratio, expected, rtol=1e-6)


def test_arguments_that_do_not_fit_are_refused(head):
    image = head.image
    for affine in (np.eye(3), np.diag([1, 1, np.nan, 1]), np.diag([1, 1, 0, 1])):
        with pytest.raises(ValueError, match="affine"):
            correct(image, voxel_size_mm=(2, 2, 2), affine=affine)
    with pytest.raises(ValueError, match=r"above 0, got \(2\.0, 0\.0, 2\.0\)$"):
        correct(image, voxel_size_mm=np.array([2.0, 0, 2]))
    with pytest.raises(ValueError, match="voxel size per axis"):
        correct(image, voxel_size_mm=(2, 2))
    with pytest.raises(ValueError, match="above 0"):
        correct(image, voxel_size_mm=(2, 2, np.nan))
    with pytest.raises(ValueError, match="the mask has shape"):
        correct(image, image[1:] > 0, voxel_size_mm=(2, 2, 2))
    with pytest.raises(ValueError, match="out must be float32"):
        correct(image, voxel_size_mm=(2, 2, 2), out=np.empty(image.shape))
    with pytest.raises(InputError, match="most of the mask cannot be used"):
        correct(np.zeros((50, 50, 50)), voxel_size_mm=(2, 2, 2), device="cpu")


def run_chain(image, folder, **options):
    """Mask and correct a file; returns paths by role."""
    folder.mkdir(exist_ok=True)
    paths = {
        role: folder / name
        for role, name in {
            "mask": "mask.nii.gz",
            "mask_json": "mask.json",
            "corrected": options.pop("name", "corrected.nii.gz"),
            "sidecar": "corrected.json",
            "field": "field.json",
            "field_image": "field.nii.gz",
        }.items()
    }
    mask_scan(image, None, paths["mask"], paths["mask_json"], method="otsu", percentile=50)
    files = CorrectionFiles(*(paths[role] for role in CorrectionFiles._fields))
    correct_scan(image, paths["mask"], files, parameters=N4Parameters(), device="cpu", **options)
    return paths


@pytest.fixture(scope="module")
def head_file(head, tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.nii.gz"
    nib.save(nib.Nifti1Image(head.image, np.diag([2.0, 2, 2, 1])), path)
    return path


def test_files_and_arrays_go_through_the_same_estimate(head, head_file, tmp_path):
    paths = run_chain(head_file, tmp_path)
    mask = np.asarray(nib.load(paths["mask"]).dataobj) > 0
    result = correct(head.image, mask, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(np.asarray(nib.load(paths["field_image"]).dataobj), result.bias)
    assert_array_equal(np.asarray(nib.load(paths["corrected"]).dataobj), result.corrected)


@pytest.mark.parametrize("shrink_factor", [None, 3])
def test_background_around_the_image_changes_nothing(head, tmp_path, shrink_factor):
    """Of files and of arrays, whose samples and mesh are laid on the mask."""
    image, mask = head.image[::2, ::2, ::2], head.brain[::2, ::2, ::2]
    parameters = N4Parameters(shrink_factor=shrink_factor)
    settings = {"voxel_size_mm": (4, 4, 4), "parameters": parameters, "device": "cpu"}
    widths = [(1, 5), (0, 3), (7, 2)]
    fields = {}
    for name, given in (("as it is", (image, mask)), ("padded", (np.pad(image, widths), np.pad(mask, widths)))):
        paths = [tmp_path / f"{name}_{kind}.nii" for kind in ("image", "mask")]
        for path, array in zip(paths, (given[0], given[1].astype(np.uint8)), strict=True):
            nib.save(nib.Nifti1Image(array, np.diag([4.0, 4, 4, 1])), path)
        samples, intensity = read_samples(*paths, parameters)
        of_files = keep_mean_intensity(estimate_field(samples, parameters).field, intensity, "test")
        fields[name] = of_files, correct(*given, **settings).field
    for one, other in zip(*fields.values(), strict=True):
        assert other.mesh.start == tuple(s + before for s, (before, _) in zip(one.mesh.start, widths, strict=True))
        # but for rounding in the mean intensity, which is added up in other slabs
        assert_allclose(other.lattice, one.lattice, rtol=0, atol=1e-12)


def test_background_moves_the_automatic_mask_and_its_field_hardly(head, tmp_path):
    widths = [(3, 8), (0, 5), (7, 2)]
    inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, head.image.shape, strict=True))
    fields, masks = [], []
    for name, image in (("as it is", head.image), ("padded", np.pad(head.image, widths))):
        path = tmp_path / f"{name}.nii"
        nib.save(nib.Nifti1Image(image, np.diag([2.0, 2, 2, 1])), path)
        paths = run_chain(path, tmp_path / name)
        part = inner if name == "padded" else ...
        masks.append(np.asarray(nib.load(paths["mask"]).dataobj)[part] > 0)
        fields.append(np.log(np.asarray(nib.load(paths["field_image"]).dataobj)[part]))
    assert np.mean(masks[0] != masks[1]) < 1e-3
    assert np.std((fields[1] - fields[0])[masks[0]]) <= 1e-3


@pytest.mark.parametrize("unit", [0.1, 0.04, 3.7])
def test_a_mouse_has_the_mask_and_the_field_of_a_head(head, tmp_path, unit):
    """The same voxels said to be of another size, from the mask on."""
    found = []
    for size in (2.0, 2.0 * unit):
        path = tmp_path / f"{size}.nii"
        nib.save(nib.Nifti1Image(head.image[::2, ::2, ::2], np.diag([size, size, size, 1])), path)
        found.append(run_chain(path, tmp_path / str(size)))
    masks, fields = ([np.asarray(nib.load(paths[role]).dataobj) for paths in found] for role in ("mask", "field_image"))
    assert_array_equal(*masks)
    assert np.ptp(np.log(fields[0])) > 0.2
    assert_allclose(*fields, rtol=1e-6)


def test_slabs_of_any_size_give_the_same_files(head_file, tmp_path, monkeypatch):
    expected = run_chain(head_file, tmp_path / "a")
    monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", 30_000)
    result = run_chain(head_file, tmp_path / "b")
    for role in ("mask", "corrected", "field_image"):
        assert result[role].read_bytes() == expected[role].read_bytes()


def test_any_number_of_threads_gives_the_same_files(head_file, tmp_path):
    script = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]; "
        "from tests.unit.test_correction import run_chain; run_chain(Path(sys.argv[3]), Path(sys.argv[4]))"
    )
    for threads in ("1", "2", "3"):
        settings = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
        subprocess.run(
            [
                sys.executable,
                "-c",
                script,
                REPOSITORY,
                REPOSITORY / "workflow" / "scripts",
                head_file,
                tmp_path / threads,
            ],
            env=os.environ | settings,
            check=True,
        )
    for name in ("corrected.nii.gz", "field.nii.gz", "mask.nii.gz"):
        assert len({(tmp_path / threads / name).read_bytes() for threads in ("1", "2", "3")}) == 1


def test_integers_come_back_as_integers_if_wanted(head, tmp_path):
    path = tmp_path / "head.nii"
    image = nib.Nifti1Image(np.rint(head.image * 4).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    image.header.set_slope_inter(0.25, 0)
    nib.save(image, path)
    as_float = nib.load(run_chain(path, tmp_path / "float")["corrected"])
    as_integer = nib.load(run_chain(path, tmp_path / "integer", keep_dtype=True)["corrected"])
    assert as_float.get_data_dtype() == np.float32
    assert as_integer.get_data_dtype() == np.int16
    slope = as_integer.dataobj.slope
    assert_allclose(as_integer.get_fdata(), as_float.get_fdata(), atol=slope * 0.51)
    assert np.asarray(as_integer.dataobj.get_unscaled()).max() == np.iinfo(np.int16).max


def test_sidecar_says_what_was_done(head_file, tmp_path):
    paths = run_chain(head_file, tmp_path)
    content = json.loads(paths["sidecar"].read_text())
    assert content["SkullStripped"] is False
    assert content["N4"]["Parameters"] == N4Parameters().to_mapping()
    assert content["N4"]["History"][-1]["CV"] <= N4Parameters().convergence_threshold
    assert content["N4"]["Converged"] == [True] * 6
    assert 0 < content["N4"]["SelfCheck"] < 3e-7, "float32 rounds some voxel"
    assert set(content["Provenance"]["InputSHA256"]) == {"image", "mask"}
    assert content["Provenance"]["Versions"]["numpy"] == np.__version__


@pytest.mark.parametrize("voxel", [(40, 50, 1), (40, 50, 45), (40, 50, 88)])
def test_one_voxel_written_wrongly_shows_in_the_self_check(head, head_file, tmp_path, voxel, monkeypatch):
    class Careless(VolumeWriter):
        planes = 0

        def write(self, slab):
            slab, plane = slab.copy(), voxel[2] - self.planes
            self.planes += slab.shape[2]
            if 0 <= plane < slab.shape[2]:
                slab[voxel[0], voxel[1], plane] += head.image.max() / 100
            return super().write(slab)

    mesh = Mesh.of_grid(head.image.shape, (2, 2, 2))
    lattice = np.random.default_rng(3).normal(0, 0.1, mesh.lattice_shape)
    volume = Volume(head_file)
    field = BiasField(lattice, mesh, volume.shape, volume.affine)
    monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", 200_000)
    assert 0 < write_corrected(volume, field, tmp_path / "right.nii") < 3e-7
    monkeypatch.setattr("n4flow.images.division.VolumeWriter", Careless)
    assert write_corrected(volume, field, tmp_path / "wrong.nii") > 3e-3


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from n4flow import N4Parameters
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.correct import correct_scan
image, mask, folder = map(Path, sys.argv[2:5])
files = CorrectionFiles(*(folder / name for name in ("c.nii.gz", "c.json", "f.json", "f.nii.gz")))
parameters = N4Parameters(shrink_factor=int(sys.argv[5]) or None)
correct_scan(image, mask, files, parameters=parameters, device="cpu")
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
@pytest.mark.parametrize(
    ("suffix", "shrink_factor", "samples"), [(".nii", 4, 0), (".nii.gz", 4, 0), (".nii.gz", 0, MOST_SAMPLES)]
)
def test_the_whole_job_needs_at_most_16_bytes_a_voxel_and_some_for_each_sample(
    head, tmp_path, suffix, shrink_factor, samples
):
    """Where all samples of the default are taken, as many more as the rule asks for."""
    # interpreter and libraries included, of which a small volume would show nothing else
    image = np.tile(head.image, (2, 2, 3))
    path, mask = tmp_path / f"large{suffix}", tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(image, np.diag([1.0, 1, 1, 1])), path)
    with VolumeWriter(mask, Volume(path), np.uint8) as writer:
        writer.write(image > 300)
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, REPOSITORY / "workflow" / "scripts", path, mask, tmp_path, str(shrink_factor)],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(ran.stdout) * 1024 <= 16 * image.size + 250 * samples


@pytest.mark.parametrize(("dtype", "intercept"), [(np.uint16, -1024), (np.uint8, -20), (np.int32, 0), (np.uint32, 5)])
def test_integers_of_any_type_keep_dark_and_negative_voxels(head, tmp_path, dtype, intercept):
    path = tmp_path / "ct.nii"
    stored = np.clip(head.image * (2 if dtype == np.uint16 else 0.2), 0, 2500).astype(dtype)
    image = nib.Nifti1Image(stored, np.diag([2.0, 2, 2, 1]))
    image.header.set_slope_inter(1, intercept)
    nib.save(image, path)
    paths = run_chain(path, tmp_path / "out", keep_dtype=True)
    corrected, bias = nib.load(paths["corrected"]), nib.load(paths["field_image"])
    assert corrected.get_data_dtype() == dtype
    step = corrected.dataobj.slope
    error = corrected.get_fdata() * bias.get_fdata() - nib.load(path).get_fdata()
    assert np.abs(error).max() <= 0.51 * step * bias.get_fdata().max() + 1e-4
    assert json.loads(paths["sidecar"].read_text())["N4"]["SelfCheck"] < 1e-4


def test_self_check_notices_what_was_lost_in_writing(head, head_file, tmp_path, monkeypatch):
    volume = Volume(head_file)
    field = correct(head.image, head.image > 300, voxel_size_mm=(2, 2, 2), device="cpu").field
    assert 0 < write_corrected(volume, field, tmp_path / "a.nii") < 3e-7
    write = VolumeWriter.write
    monkeypatch.setattr(VolumeWriter, "write", lambda self, values: write(self, np.where(values > 1000, 0, values)))
    assert write_corrected(volume, field, tmp_path / "b.nii") == pytest.approx(1)


def test_world_coordinates_are_in_mm_whatever_the_unit_of_a_file(head_file, tmp_path):
    lattice = run_chain(head_file, tmp_path)["field"]
    corrected = []
    for unit, scale in (("mm", 1.0), ("micron", 1e3), ("meter", 1e-3)):
        image = nib.load(head_file)
        other = nib.Nifti1Image(np.asarray(image.dataobj)[::-1], np.diag([-2 * scale, 2 * scale, 2 * scale, 1]))
        other.affine[0, 3] = 2 * scale * (image.shape[0] - 1)
        other.header.set_xyzt_units(unit)
        nib.save(other, tmp_path / f"{unit}.nii")
        files = CorrectionFiles(*(tmp_path / "sub-01" / f"{unit}{end}" for end in (".nii", ".json", "_field.json")))
        files.corrected.parent.mkdir(exist_ok=True)
        apply_scan(tmp_path / f"{unit}.nii", lattice, files)
        corrected.append(np.asarray(nib.load(files.corrected).dataobj)[::-1])
    ours = np.asarray(nib.load(tmp_path / "corrected.nii.gz").dataobj)
    for other in corrected:
        assert_allclose(other, ours, rtol=1e-5)


@pytest.mark.parametrize("nameless", ["source", "target", "both", "neither"])
@pytest.mark.parametrize("same", [True, False], ids=["same grid", "other grid"])
def test_header_that_names_no_space_is_said(head, tmp_path, caplog, nameless, same):
    def saved(name, values, affine):
        image = nib.Nifti1Image(values, affine)
        code = 0 if nameless in (name, "both") else 1
        image.set_qform(affine, code)
        image.set_sform(affine, code)
        nib.save(image, tmp_path / f"{name}.nii")
        return tmp_path / f"{name}.nii"

    # what nibabel makes up for a header that names no space
    affine = nib.Nifti1Image(head.image, None).header.get_base_affine() @ np.diag([2.0, 2, 2, 1])
    affine[:3, 3] *= 2
    lattice = run_chain(saved("source", head.image, affine), tmp_path / "sub-01")["field"]
    target = saved("target", head.image if same else head.image[2:-2], affine)
    files = CorrectionFiles(*(tmp_path / "sub-01" / f"target{end}" for end in (".nii", ".json", "_field.json")))
    caplog.clear()
    apply_scan(target, lattice, files)
    said = [line for line in caplog.messages if "names no space" in line]
    assert len(said) == (0 if same or nameless == "neither" else 1)
    if said:
        assert said[0].startswith(f"{lattice if nameless == 'source' else target}: ")
        assert "set its qform or sform" in said[0]


def test_share_of_the_image_outside_of_the_source_is_in_the_sidecar(head_file, tmp_path):
    lattice = run_chain(head_file, tmp_path / "sub-01")["field"]
    image = nib.load(head_file)
    for name, shift, share in (("inside", 0, 0.0), ("outside", 3 * image.shape[0] // 4, 0.75)):
        affine = image.affine.copy()
        affine[0, 3] += 2 * shift
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), tmp_path / f"{name}.nii")
        files = CorrectionFiles(*(tmp_path / "sub-01" / f"{name}{end}" for end in (".nii", ".json", "_field.json")))
        apply_scan(tmp_path / f"{name}.nii", lattice, files)
        found = json.loads(files.sidecar.read_text())["N4"]["ShareOutside"]
        assert found == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_intensities_beyond_float32_are_refused(head, tmp_path, scale):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(head.image.astype(np.float64) * scale, np.diag([2.0, 2, 2, 1])), path)
    with pytest.raises(InputError, match="beyond what float32 holds; multiply the image"):
        run_chain(path, tmp_path / "out")


@pytest.mark.parametrize("scale", [1e-50, 1e50])
def test_arrays_beyond_float32_are_refused(head, mask_of_head, scale):
    with pytest.raises(InputError, match="beyond what float32 holds; multiply the image"):
        correct(head.image.astype(np.float64) * scale, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")


def test_an_image_beyond_float32_takes_no_field_of_another_one(head, head_file, tmp_path):
    field = correct(head.image, head.image > 300, voxel_size_mm=(2, 2, 2), device="cpu").field
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(head.image.astype(np.float64) * 1e45, np.diag([2.0, 2, 2, 1])), path)
    with (
        pytest.raises(InputError, match=r"a\.nii: holds intensities beyond what float32 holds"),
        np.errstate(over="ignore"),
    ):
        write_corrected(Volume(path), field, tmp_path / "b.nii", tmp_path / "c.nii")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii"]


@pytest.mark.parametrize("slope", [None, 0.5])
def test_what_still_lies_in_a_file_is_read(head, mask_of_head, tmp_path, slope):
    """Such as what nibabel gives of an image, with its scaling."""
    given = {}
    for name, values in (("volume", np.rint(head.image)), ("mask", mask_of_head), ("weights", mask_of_head * 3)):
        image = nib.Nifti1Image(values.astype(np.int16), np.eye(4))
        image.header.set_slope_inter(slope, slope and 0.0)
        nib.save(image, tmp_path / f"{name}.nii.gz")
        given[name] = nib.load(tmp_path / f"{name}.nii.gz").dataobj
    expected = correct(
        **{name: np.asarray(each) for name, each in given.items()}, voxel_size_mm=(2, 2, 2), device="cpu"
    )
    assert_array_equal(correct(**given, voxel_size_mm=(2, 2, 2), device="cpu").bias, expected.bias)
    for out in ({"out": given["volume"]}, {"bias_out": given["volume"]}):
        with pytest.raises(TypeError, match="out: need a NumPy or CuPy array"):
            correct(head.image, voxel_size_mm=(2, 2, 2), device="cpu", **out)


def test_arrays_that_cannot_be_meant_are_refused_and_nan_in_a_mask_is_outside(head, mask_of_head):
    with pytest.raises(ValueError, match="need real numbers, got complex64"):
        correct(head.image.astype(np.complex64), voxel_size_mm=(2, 2, 2))
    buffer = np.empty((*head.image.shape[:2], head.image.shape[2] + 1), dtype=np.float32)
    with pytest.raises(ValueError, match="must be two arrays"):
        correct(head.image, voxel_size_mm=(2, 2, 2), out=buffer[:, :, 1:], bias_out=buffer[:, :, :-1])
    buffer.flags.writeable = False
    with pytest.raises(ValueError, match="bias_out is read-only"):
        correct(head.image, voxel_size_mm=(2, 2, 2), bias_out=buffer[:, :, 1:])
    image = head.image.copy()
    with pytest.raises(ValueError, match="out overlaps the volume without being it"):
        correct(image, voxel_size_mm=(2, 2, 2), out=image[:, :, ::-1])
    with pytest.raises(ValueError, match="mask: need real numbers, got <U1"):
        correct(image, np.where(mask_of_head, "1", "0"), voxel_size_mm=(2, 2, 2))
    with pytest.raises(ValueError, match="weights: need real numbers, got complex128"):
        correct(image, weights=mask_of_head * 1j, voxel_size_mm=(2, 2, 2))
    field = BiasField(np.zeros((4, 1, 1)), Mesh.of_grid((5, 1, 1), (1, 1, 1)), (5, 1, 1), np.eye(4))
    sheared = np.eye(4)
    sheared[1, :3] = 1, 1e-13, 0
    perspective = np.eye(4)
    perspective[3, 0] = 1
    for affine, said in ((sheared, "cannot be inverted"), (perspective, "no affine"), (np.eye(4) * np.nan, "affine")):
        with pytest.raises(ValueError, match=said):
            correct(image, voxel_size_mm=(2, 2, 2), affine=affine)
        with pytest.raises(ValueError, match=said):
            field.on_grid((5, 5), affine)
    with_nan = np.where(mask_of_head, 1, np.nan)
    expected = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu")
    result = correct(head.image, with_nan, voxel_size_mm=(2, 2, 2), device="cpu")
    assert_array_equal(result.bias, expected.bias)


@pytest.mark.parametrize(
    ("volume", "given", "said"),
    [
        ([[1.0, 2.0]], {}, "NumPy or CuPy array"),
        (np.ma.masked_equal(np.ones((20, 20, 20)), 1), {}, "volume: .* what a masked one leaves out"),
        (np.ones((20, 20, 20)), {"mask": np.ma.masked_equal(np.ones((20, 20, 20)), 1)}, "mask: need a NumPy"),
        (np.ones((20, 20, 20)), {"weights": np.ma.masked_equal(np.ones((20, 20, 20)), 1)}, "weights: need a NumPy"),
        (np.ones((20, 20, 20)), {"mask": [[1.0]]}, "mask: need a NumPy"),
        (np.ones((20, 20, 20)), {"parameters": {"shrink_factor": 1}}, "from_mapping"),
    ],
)
def test_what_is_no_array_and_no_parameters_is_named(volume, given, said):
    with pytest.raises(TypeError, match=said):
        correct(volume, voxel_size_mm=(1, 1, 1), **given)


@pytest.mark.parametrize(("shape", "size", "said"), [((0, 20, 20), (1, 1, 1), "no voxel"), ((20, 20), 2, "per axis")])
def test_an_array_without_voxels_or_voxel_sizes_is_named(shape, size, said):
    with pytest.raises(ValueError, match=said):
        correct(np.ones(shape), voxel_size_mm=size)


@pytest.mark.parametrize("air", [0, 1e-41, 1e-39, 3e-33])
def test_a_slab_of_next_to_nothing_is_no_reason_to_refuse_an_image(head, mask_of_head, tmp_path, monkeypatch, air):
    """Float32 has few digits there, or none: 1e-41 over a field of 2 may be any whole number of its smallest steps."""
    monkeypatch.setattr("n4flow.images.nifti.SLAB_VOXELS", 1)
    image = head.image.astype(np.float32)
    image[:, :, -3:] = air
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii")
    field = correct(head.image, mask_of_head, voxel_size_mm=(2, 2, 2), device="cpu").field
    assert write_corrected(Volume(tmp_path / "image.nii"), field, tmp_path / "corrected.nii") < 3e-7


def test_a_thread_that_works_ahead_ends_with_what_it_works_for():
    def items():
        try:
            yield from "abc"
            raise InputError("scan.nii", "is damaged", "copy it again")
        finally:
            ended.append(threading.current_thread())

    ended: list[threading.Thread] = []
    threads = threading.active_count()
    taken = []
    with pytest.raises(InputError, match="is damaged"):
        taken.extend(_ahead(items()))
    begun = _ahead(items())
    assert next(begun) == "a"
    begun.close()
    assert taken == ["a", "b", "c"]
    assert len(ended) == 2
    assert threading.active_count() == threads
