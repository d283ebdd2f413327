"""Bad files: each is refused with one line that names the file, what is wrong and what to do."""

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from n4flow.errors import InputError
from n4flow.images.nifti import Volume, VolumeWriter
from n4flow.images.sampling import read_samples
from n4flow.parameters import N4Parameters
from n4flow.steps.correct import correct_scan
from n4flow.steps.derivatives import CorrectionFiles

SHAPE = (24, 22, 20)
AFFINE = np.diag([2.0, 2, 2, 1])


def values(shape=SHAPE):
    return np.random.default_rng(0).uniform(50, 150, shape)


def save(path, array, kind=nib.Nifti1Image, **how):
    nib.save(kind(array, AFFINE, **how), path)
    return path


def good(path, dtype=np.float32, shape=SHAPE):
    array = values(shape).astype(dtype)
    return save(path, array, dtype=array.dtype)


def edit_header(path, **fields):
    """Overwrite header fields of an uncompressed NIfTI-1 file, past all that nibabel would mend."""
    with open(path, "r+b") as file:
        header = nib.Nifti1Header(file.read(348), check=False)
        for name, value in fields.items():
            header[name] = value
        file.seek(0)
        file.write(header.binaryblock)
    return path


def read(path):
    """Everything the chain reads of an image: header, samples, all slabs."""
    mask = save(path.with_name("mask_of_it.nii"), np.ones(Volume(path).shape, np.uint8))
    read_samples(path, mask, N4Parameters(shrink_factor=2))[0].check()
    return Volume(path).mean()


def one_line(error, path):
    line = str(error.value)
    assert "\n" not in line
    source, _, rest = line.partition(": ")
    problem, _, remedy = rest.rpartition("; ")
    assert source == str(path)
    assert problem
    assert len(remedy) > 8
    return problem


def write(content):
    return lambda path: path.write_bytes(content)


def truncate(share):
    def make(path):
        content = good(path).read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def claims_more(path):
    plain = edit_header(good(path.with_name("plain.nii")), dim=[3, 24, 22, 400, 1, 1, 1, 1])
    content = plain.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def flip_bit(path):
    content = bytearray(good(path).read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def wrong_checksum(path):
    content = bytearray(good(path).read_bytes())
    content[-6] ^= 0xFF
    path.write_bytes(content)


def link(path):
    path.symlink_to("not_fetched.nii")


def colours(path):
    save(path, np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))


def colours_with_alpha(path):
    save(path, np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]))


def header_of(**fields):
    return lambda path: edit_header(good(path), **fields)


def pixdim(*sizes):
    return header_of(pixdim=[1, *sizes, 0, 0, 0, 0])


def analyze(path):
    """An ANALYZE header: the size of NIfTI's, without its magic."""
    edit_header(good(path), magic=b"")


BAD = {
    "absent": ("x.nii", lambda path: None, "is not there"),
    "folder": ("x.nii", lambda path: path.mkdir(), "folder"),
    "broken link": ("x.nii", link, "is a link to a file that is not there"),
    "empty": ("x.nii", write(b""), "is empty"),
    "empty gz": ("x.nii.gz", write(b""), "is empty"),
    "text": ("x.nii", write(b"no image\n" * 99), "is no NIfTI image"),
    "text as gz": ("x.nii.gz", write(b"no image\n" * 99), "is no gzip file, though its name says so"),
    "a word as gz": ("x.nii.gz", write(b"hello\n"), "is no gzip file, though its name says so"),
    "gz of garbage": ("x.nii.gz", write(gzip.compress(b"no image\n" * 99)), "is no NIfTI image"),
    "gz of nothing": ("x.nii.gz", write(gzip.compress(b"")), "is no NIfTI image"),
    "garbage after a gz header": ("x.nii.gz", write(b"\x1f\x8b\x08" + bytes(range(200))), "cannot be decompressed"),
    "header alone": ("x.nii", truncate(0.01), "is cut off"),
    "part of the header": ("x.nii", truncate(0.003), "is no NIfTI image"),
    "cut off": ("x.nii", truncate(0.7), "is cut off"),
    "cut-off gz": ("x.nii.gz", truncate(0.7), "compressed data end too early"),
    "changed gz": ("x.nii.gz", flip_bit, "cannot be decompressed"),
    "wrong checksum": ("x.nii.gz", wrong_checksum, "cannot be decompressed"),
    "claims more": ("x.nii", claims_more, "is cut off"),
    "claims more, gz": ("x.nii.gz", claims_more, "Expected 844800 bytes, got 42240 bytes"),
    "no magic": ("x.nii", analyze, "is no NIfTI image"),
    "complex64": ("x.nii", lambda path: save(path, values().astype(np.complex64)), "holds complex values"),
    "complex128": ("x.nii", lambda path: save(path, values().astype(np.complex128)), "holds complex values"),
    "RGB": ("x.nii", colours, "holds colour values"),
    "RGBA": ("x.nii", colours_with_alpha, "holds colour values"),
    "unknown dtype": ("x.nii", header_of(datatype=3), "is no NIfTI image"),
    "float128": ("x.nii", header_of(datatype=1536, bitpix=128), "not supported"),
    "bits": ("x.nii", header_of(datatype=1, bitpix=1), ""),
    "1-D": ("x.nii", lambda path: save(path, values((50,)).astype(np.float32)), "has 1 dimension"),
    "5-D": ("x.nii", lambda path: good(path, shape=(8, 8, 8, 2, 2)), "has 5 dimensions"),
    "no dimension": ("x.nii", header_of(dim=[0, 24, 22, 20, 1, 1, 1, 1]), ""),
    "too many dimensions": ("x.nii", header_of(dim=[9, 24, 22, 20, 1, 1, 1, 1]), ""),
    "an axis of no voxel": ("x.nii", header_of(dim=[3, 24, 0, 20, 1, 1, 1, 1]), "dimensions (24, 0, 20)"),
    "an axis below zero": ("x.nii", header_of(dim=[3, 24, -22, 20, 1, 1, 1, 1]), ""),
    "size 0": ("x.nii", pixdim(2, 0, 2), "has the voxel size 2 x 0 x 2"),
    "size NaN": ("x.nii", pixdim(2, 2, np.nan), "has the voxel size 2 x 2 x nan"),
    "size infinite": ("x.nii", pixdim(np.inf, 2, 2), "has the voxel size inf x 2 x 2"),
    "affine without an axis": ("x.nii", header_of(sform_code=1, srow_z=[0, 0, 0, 0]), "affine cannot be inverted"),
    "affine of NaN": ("x.nii", header_of(sform_code=1, srow_x=[np.nan, 0, 0, 0]), "affine holds what is no finite"),
    "affine to NaN": ("x.nii", header_of(sform_code=1, srow_x=[1, 0, 0, np.nan]), "affine holds what is no finite"),
    "affine to the stars": ("x.nii", header_of(sform_code=1, srow_x=[1, 0, 0, 1e10]), "affine is beyond any image"),
    "offset beyond the file": ("x.nii", header_of(vox_offset=1e6), "is cut off"),
    "zero": ("x.nii", lambda path: save(path, np.zeros(SHAPE, np.float32)), "most of the mask cannot be used"),
    "constant": ("x.nii", lambda path: save(path, np.full(SHAPE, 5, np.int16)), "the same intensity"),
    "NaN": ("x.nii", lambda path: save(path, np.full(SHAPE, np.nan, np.float32)), "not finite"),
    "negative": ("x.nii", lambda path: save(path, -values().astype(np.float32)), "negative"),
    "few voxels": ("x.nii", lambda path: good(path, shape=(6, 6, 6)), "only 216 usable samples"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_image_is_refused_with_one_line(tmp_path, kind):
    name, make, words = BAD[kind]
    path = tmp_path / name
    make(path)
    with pytest.raises(InputError) as error:
        read(path)
    assert words in one_line(error, path)


@pytest.mark.parametrize("kind", ["complex64", "5-D", "cut off", "text", "size 0"])
def test_bad_mask_is_refused_with_one_line_that_names_the_mask(tmp_path, kind):
    name, make, words = BAD[kind]
    mask = tmp_path / name
    make(mask)
    with pytest.raises(InputError) as error:
        read_samples(good(tmp_path / "image.nii"), mask, N4Parameters())
    assert words in one_line(error, mask)


@pytest.mark.parametrize(
    ("array", "affine", "words"),
    [
        (np.zeros(SHAPE), AFFINE, "the mask is empty"),
        (np.ones((24, 22, 19)), AFFINE, "has shape (24, 22, 19)"),
        (np.ones(SHAPE), AFFINE + np.diag([0.01, 0, 0, 0]), "affine of the mask differs"),
        (np.ones(SHAPE), AFFINE @ np.diag([-1, 1, 1, 1]), "affine of the mask differs"),
    ],
    ids=["empty", "shape", "voxel size", "flipped"],
)
def test_mask_that_does_not_fit_is_refused_with_one_line(tmp_path, array, affine, words):
    mask = tmp_path / "mask.nii"
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), mask)
    image = good(tmp_path / "image.nii")
    with pytest.raises(InputError) as error:
        read_samples(image, mask, N4Parameters())
    assert words in one_line(error, image if words == "the mask is empty" else mask)


def test_mask_whose_affine_differs_by_rounding_is_taken(tmp_path):
    mask = tmp_path / "mask.nii"
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE + 1e-5 * np.eye(4)), mask)
    assert read_samples(good(tmp_path / "image.nii"), mask, N4Parameters())[0].mask.all()


@pytest.mark.parametrize(
    "dtype",
    ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"],
)
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_every_real_type_is_read(tmp_path, dtype, name):
    path = good(tmp_path / name, dtype=np.dtype(dtype))
    expected = np.asarray(nib.load(path).dataobj, dtype=np.float32)
    assert np.array_equal(read(path), expected)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_big_endian_is_read_and_written(tmp_path, dtype, kind):
    array = np.rint(values()).clip(0, 120).astype(dtype)
    path = tmp_path / "big.nii"
    nib.save(kind(array, AFFINE, kind.header_class(endianness=">"), dtype=array.dtype), path)
    assert np.array_equal(read(path), array.astype(np.float32))
    with VolumeWriter(tmp_path / "copy.nii", Volume(path), dtype) as writer:
        for _, _, slab in Volume(path).slabs(3):
            writer.write(slab)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "copy.nii").dataobj), array)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_largest_and_smallest_integers_are_written_as_such(tmp_path, dtype):
    like = Volume(good(tmp_path / "like.nii", shape=(2, 2, 1)))
    limits = np.iinfo(dtype)
    slope = 2.0
    wanted = np.array([[limits.max, limits.min], [0, 1]], dtype=np.float64)[..., None] * slope
    with VolumeWriter(tmp_path / "x.nii", like, dtype, slope=slope) as writer:
        writer.write(wanted.astype(np.float32))
    stored = np.asarray(nib.load(tmp_path / "x.nii").dataobj.get_unscaled())
    np.testing.assert_allclose(stored.astype(np.float64), wanted / slope, rtol=1e-6)


@pytest.mark.parametrize("code", [7, 200])
def test_unknown_unit_is_taken_for_mm(tmp_path, code):
    path = edit_header(good(tmp_path / "x.nii"), xyzt_units=code)
    assert Volume(path).voxel_size_mm == (2, 2, 2)
    assert np.isfinite(read(path)).all()
    with VolumeWriter(tmp_path / "copy.nii", Volume(path), np.float32) as writer:
        writer.write(Volume(path).mean())
    assert nib.load(tmp_path / "copy.nii").header["xyzt_units"] == code


@pytest.mark.parametrize(("unit", "mm"), [("mm", 2), ("micron", 0.002), ("meter", 2000), ("unknown", 2)])
def test_voxel_size_is_in_mm_whatever_the_unit(tmp_path, unit, mm):
    image = nib.Nifti1Image(values().astype(np.float32), AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "x.nii")
    assert Volume(tmp_path / "x.nii").voxel_size_mm == pytest.approx((mm, mm, mm))


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_half_written_file_never_has_the_name(tmp_path, name):
    like = Volume(good(tmp_path / "like.nii"))

    def write_until_it_fails():
        with VolumeWriter(tmp_path / name, like, np.float32) as writer:
            writer.write(values()[:, :, :5])
            raise InputError("test", "ends here", "nothing")

    with pytest.raises(InputError):
        write_until_it_fails()
    assert [path.name for path in tmp_path.iterdir()] == ["like.nii"]


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"", b"\xff", b'{"EchoTime": NaN}', b'{"EchoTime": Infinity}', b"3"],
    ids=["cut off", "list", "empty", "no text", "NaN", "infinity", "number"],
)
def test_bad_sidecar_of_the_image_does_not_keep_it_from_being_corrected(tmp_path, content):
    image = good(tmp_path / "image.nii")
    mask = save(tmp_path / "mask.nii", np.ones(SHAPE, np.uint8))
    (tmp_path / "image.json").write_bytes(content)
    files = CorrectionFiles(
        corrected=tmp_path / "out.nii.gz", sidecar=tmp_path / "out.json", field=tmp_path / "field.json"
    )
    correct_scan(image, mask, files, parameters=N4Parameters(iterations=(2,), fwhm=0.1, twicing=0.9), device="cpu")
    assert json.loads(files.sidecar.read_text())["SkullStripped"] is False
