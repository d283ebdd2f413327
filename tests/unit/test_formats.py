"""Images in other formats than NIfTI that are read: FreeSurfer's, and pairs of a header and an image."""

import gzip
import json
import struct

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import n4flow.images.nifti
from n4flow import InputError, N4Parameters
from n4flow.images.files import voxels_of_frame
from n4flow.images.nifti import Volume
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles
from n4flow.steps.mask import mask_scan
from n4flow.study.bids import index_dataset, metadata_of

#: Oblique, of axes that point to left, inferior and anterior, as FreeSurfer's do.
AFFINE = np.array([[-1.9, 0.2, 0.1, 88], [0.1, 0.3, 2.4, -100], [-0.2, -2.0, 0.2, 70], [0, 0, 0, 1.0]])
SQUARE = np.array([[-2.0, 0, 0, 88], [0, 0, 2.5, -100], [0, -2, 0, 70], [0, 0, 0, 1.0]])

KINDS = {
    "mgz": (nib.MGHImage, ".mgz"),
    "mgh": (nib.MGHImage, ".mgh"),
    "NIfTI pair": (nib.Nifti1Pair, ".img"),
    "NIfTI-2 pair": (nib.Nifti2Pair, ".img"),
    "SPM": (nib.Spm2AnalyzeImage, ".img"),
    "Analyze": (nib.AnalyzeImage, ".img"),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def write(kind, values, folder, affine=SQUARE):
    maker, end = KINDS[kind]
    path = folder / f"sub-01_T1w{end}"
    nib.save(maker(values, affine), path)
    (folder / "sub-01_T1w.mat").unlink(missing_ok=True)  # SPM's
    return path


@each_kind
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("frames", [1, 3])
def test_voxels_and_space_are_those_that_nibabel_reads(tmp_path, kind, dtype, frames):
    values = np.random.default_rng(0).integers(0, 200, (5, 6, 7, frames)).astype(dtype).squeeze()
    path = write(kind, values, tmp_path)
    volume = Volume(path)
    # nibabel leaves an .mgh open
    image = nib.MGHImage.from_bytes(path.read_bytes()) if kind == "mgh" else nib.load(path)
    assert volume.shape == (5, 6, 7)
    assert (volume.frames, volume.dtype.newbyteorder("=")) == (frames, dtype)
    assert_array_equal(volume.mean(), values.astype(float).reshape(5, 6, 7, -1).mean(axis=-1).astype(np.float32))
    assert [slab.stop for slab, *_ in volume.slabs(2)] == [2, 4, 6, 7] * frames
    assert_allclose(volume.voxel_size_mm, (2, 2, 2.5), rtol=1e-6)
    assert volume.has_spatial_reference == ("nalyze" not in kind and kind != "SPM")
    if volume.has_spatial_reference:
        assert_allclose(volume.affine_mm, image.affine, atol=1e-4)
    assert voxels_of_frame(path) == 210


def test_the_space_of_an_oblique_mgz_is_its_own(tmp_path):
    path = write("mgz", np.ones((5, 6, 7), np.float32), tmp_path, AFFINE)
    assert_allclose(Volume(path).affine_mm, nib.load(path).affine, atol=1e-4)
    assert_allclose(Volume(path).header.get_sform(coded=True)[0], nib.load(path).affine, atol=1e-4)


def test_scale_of_spm_is_applied(tmp_path):
    values = np.random.default_rng(0).integers(0, 200, (5, 6, 7)).astype(np.int16)
    image = nib.Spm2AnalyzeImage(values, SQUARE)
    nib.save(image, tmp_path / "a.img")
    with open(tmp_path / "a.hdr", "r+b") as file:
        file.seek(112)  # funused1
        file.write(struct.pack("<f", 0.5))
    assert_array_equal(Volume(tmp_path / "a.img").mean(), 0.5 * values.astype(np.float32))


@pytest.mark.parametrize("kind", ["mgz", "NIfTI pair", "Analyze"])
@pytest.mark.parametrize("kept", [True, False])
def test_field_is_that_of_the_same_image_as_nifti(head, tmp_path, monkeypatch, kind, kept):
    if not kept:
        monkeypatch.setattr(n4flow.images.nifti, "KEPT_BYTES", 0)
    made = {}
    same = tmp_path / "sub-01_T1w.nii.gz"
    path = write(kind, head.image, tmp_path, np.diag([2.0, 2, 2, 1]))
    nib.save(nib.Nifti1Image(head.image, np.diag([2.0, 2, 2, 1])), same)
    for image in (same, path):
        folder = tmp_path / image.suffix
        folder.mkdir()
        names = {"corrected": "c.nii.gz", "sidecar": "c.json", "field": "f.json", "field_image": "f.nii.gz"}
        files = CorrectionFiles(**{role: folder / name for role, name in names.items()})
        mask_scan(image, None, folder / "m.nii.gz", folder / "m.json", method="otsu", percentile=50)
        correct_scan(image, folder / "m.nii.gz", files, parameters=N4Parameters(), device="cpu")
        made[image] = files
    ours, expected = (nib.load(made[image].field_image) for image in (path, same))
    assert_array_equal(np.asarray(ours.dataobj), np.asarray(expected.dataobj))
    corrected = nib.load(made[path].corrected)
    assert type(corrected) is nib.Nifti1Image
    assert corrected.header.get_xyzt_units()[0] == ("mm" if kind == "mgz" else "unknown")
    assert (corrected.header["sform_code"] > 0) == (kind != "Analyze")
    if kind != "Analyze":
        assert_allclose(corrected.affine, nib.load(path).affine, atol=1e-5)
    hashed = json.loads(made[path].sidecar.read_text())["Provenance"]["InputSHA256"]
    assert set(hashed) == {"image", "mask", *(["image header"] if path.suffix == ".img" else [])}


def cut(path, count):
    path.write_bytes(path.read_bytes()[:count])


def without_header(path):
    path.with_suffix(".hdr").unlink()


def with_no_type(path):
    content = bytearray(path.read_bytes())
    content[20:24] = struct.pack(">i", 77)
    path.write_bytes(content)


def with_no_size(path):
    content = bytearray(path.read_bytes())
    content[30:34] = struct.pack(">f", 0)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "spoil", "problem"),
    [
        ("mgh", lambda path: cut(path, 40), r"sub-01_T1w\.mgh: is no MGH image \(its header is cut off\)"),
        ("mgh", lambda path: cut(path, 500), r"sub-01_T1w\.mgh: is cut off: 500 of \d+ bytes; copy it again"),
        ("mgh", with_no_type, r"sub-01_T1w\.mgh: is no MGH image \(its data type 77 is not known\)"),
        ("mgh", with_no_size, r"sub-01_T1w\.mgh: has the voxel size 0 x 2 x 2\.5; "),
        ("mgh", lambda path: path.write_bytes(b"text" * 200), r"is no MGH image \(it does not start with an MGH"),
        (
            "mgh",
            lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
            r"is compressed, .* rename it to .mgz",
        ),
        ("mgz", lambda path: path.write_bytes(gzip.decompress(path.read_bytes())), r"not compressed, .* to \.mgh$"),
        ("mgz", lambda path: cut(path, 150), r"sub-01_T1w\.mgz: "),
        ("Analyze", without_header, r"sub-01_T1w\.hdr: is not there; copy it beside sub-01_T1w\.img"),
        ("Analyze", lambda path: cut(path, 500), r"sub-01_T1w\.img: is cut off: 500 of \d+ bytes"),
        ("Analyze", lambda path: cut(path.with_suffix(".hdr"), 100), r"sub-01_T1w\.img: is no NIfTI image"),
        ("NIfTI pair", lambda path: path.with_suffix(".hdr").write_text("text" * 100), r"is no NIfTI image"),
    ],
)
def test_a_damaged_one_is_one_line(tmp_path, kind, spoil, problem):
    path = write(kind, np.random.default_rng(0).normal(9, 1, (5, 6, 7)).astype(np.float32), tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=problem) as error:
        list(Volume(path).slabs())
    assert "\n" not in str(error.value)


def test_the_header_of_a_pair_leads_to_its_image(tmp_path):
    path = write("NIfTI pair", np.ones((5, 6, 7), np.float32), tmp_path)
    with pytest.raises(InputError, match=r"sub-01_T1w\.hdr: is the header of a pair of files; give .*sub-01_T1w\.img$"):
        Volume(path.with_suffix(".hdr"))


def test_scans_in_these_formats_are_found_once_each_with_their_sidecars(tmp_path, caplog):
    (tmp_path / "dataset_description.json").write_text("{}")
    ends = {
        "0": (".img",),
        "1": (".mgz",),
        "2": (".img", ".hdr"),
        "3": (".nii.gz", ".mgz"),
        "4": (".nii", ".img", ".hdr"),
    }
    for subject, there in ends.items():
        anat = tmp_path / f"sub-{subject}/anat"
        anat.mkdir(parents=True)
        for end in there:
            (anat / f"sub-{subject}_T1w{end}").touch()
    (tmp_path / "sub-1/anat/sub-1_T1w.json").write_text('{"EchoTime": 0.003}')
    found = {scan.subject: scan.image.partition("_T1w")[2] for scan in index_dataset(tmp_path, ["T1w"])}
    assert found == {subject: there[0] for subject, there in ends.items() if subject != "0"}
    said = [line.partition("/anat/")[2] for record in caplog.records if "/anat/" in (line := record.getMessage())]
    assert said == [
        "sub-0_T1w.hdr: left out, is not there; check the path (it is taken from the working directory)",
        "sub-3_T1w.mgz: left out, the same scan is there as .nii.gz",
        "sub-4_T1w.img: left out, the same scan is there as .nii",
    ]
    assert metadata_of(tmp_path / "sub-1/anat/sub-1_T1w.mgz") == {"EchoTime": 0.003}
