import errno
import gzip
import os
import resource
import threading

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from n4flow import InputError
from n4flow.images.nifti import Volume, VolumeWriter, _decompressed

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([1.0, 2.0, 3.5]) @ np.eye(3)[[2, 0, 1]], [-10, 20, 30]
)


def save(path, array, affine=OBLIQUE, kind=nib.Nifti1Image, **header):
    image = kind(array, affine, dtype=array.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(affine, 1)
    image.set_sform(affine, 4)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


ARRAY = np.random.default_rng(5).integers(0, 200, (11, 12, 13))


@pytest.mark.parametrize("dtype", ["u1", "i1", ">i2", "u2", "<i4", "u4", "i8", "u8", "f4", ">f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_real_dtype_is_read_slab_by_slab(tmp_path, dtype, name):
    array = (ARRAY // 2).astype(dtype)
    volume = Volume(save(tmp_path / name, array))
    read = np.concatenate([values for _, _, values in volume.slabs(planes=5)], axis=2)
    assert_array_equal(read, array)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_slope_and_intercept_are_honoured(tmp_path, name):
    image = nib.Nifti1Image(ARRAY.astype(np.int16), OBLIQUE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / name)
    assert_array_equal(Volume(tmp_path / name).mean(), (ARRAY * 0.5 - 3).astype(np.float32))


@pytest.mark.parametrize("ones", [1, 2, 4])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3), (5, 6, 1)])
def test_trailing_ones_are_no_dimensions(tmp_path, shape, ones):
    array = np.random.default_rng(6).random(shape).astype(np.float32)
    ones = (1,) * min(ones, 7 - len(shape))
    volume = Volume(save(tmp_path / "a.nii.gz", array.reshape(*shape, *ones)))
    plain = Volume(save(tmp_path / "b.nii.gz", array))
    assert (volume.shape, volume.frames) == (shape[:3], shape[3] if len(shape) > 3 else 1)
    assert_array_equal(volume.mean(), plain.mean())
    volume.check_same_grid(plain, "mask")
    for name, frames in (("same.nii", None), ("field.nii", 1)):
        with VolumeWriter(tmp_path / name, volume, np.float32, frames=frames) as writer:
            for _, frame, values in volume.slabs(2):
                if not (frames and frame):
                    writer.write(values)
    # a fourth axis stays, which some readers ask of a series of one frame; of more, BIDS' validator takes none
    written = array.reshape(*shape, *ones) if len(shape) + len(ones) == 4 else array
    assert_array_equal(np.asarray(nib.load(tmp_path / "same.nii").dataobj), written)
    assert_array_equal(Volume(tmp_path / "field.nii").mean(), array if array.ndim == 3 else array[..., 0])


def test_a_fifth_dimension_of_several_is_one(tmp_path):
    with pytest.raises(InputError, match=r"has 5 dimensions \(5, 6, 7, 1, 3\)"):
        Volume(save(tmp_path / "a.nii", np.ones((5, 6, 7, 1, 3), np.float32)))


def test_a_series_is_read_frame_by_frame_and_averaged(tmp_path):
    series = np.random.default_rng(6).random((5, 6, 7, 4)).astype(np.float32)
    volume = Volume(save(tmp_path / "a.nii.gz", series))
    assert (volume.shape, volume.frames) == ((5, 6, 7), 4)
    read = np.empty_like(series)
    for slab, frame, values in volume.slabs(planes=3):
        read[:, :, slab, frame] = values
    assert_array_equal(read, series)
    np.testing.assert_allclose(volume.mean(), series.mean(axis=3), rtol=1e-6)


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("frames", [[0], [3], [0, 1, 3]])
def test_the_mean_is_that_of_the_frames_that_are_whole(tmp_path, caplog, frames, lost):
    series = np.random.default_rng(6).uniform(1, 2, (5, 6, 7, 4)).astype(np.float32)
    series[..., frames] = lost
    series[0, 0, 0] = lost
    series[1, 1, 1, 2], series[1, 1, 1, frames[0]] = lost, 1.5
    volume = Volume(save(tmp_path / "a.nii.gz", series))
    expected = np.nanmean(np.where(np.isfinite(series), series, np.nan).astype(float)[1:], axis=3)
    for _ in range(2):
        mean = volume.mean()
        np.testing.assert_allclose(mean[1:], expected, rtol=1e-6)
        assert np.isnan(mean[0, 0, 0])
        assert np.isfinite(mean).sum() == mean.size - 1
    (record,) = caplog.records
    named = record.getMessage().rpartition(" left out of the mean: ")[2].split()
    assert {str(n + 1) for n in frames} <= set(named) <= {str(n + 1) for n in (*frames, 2)}


def test_of_a_background_of_nan_nothing_is_said(tmp_path, caplog):
    series = np.ones((5, 6, 7, 4), np.float32)
    series[:2] = np.nan
    mean = Volume(save(tmp_path / "a.nii.gz", series)).mean()
    assert np.isnan(mean[:2]).all()
    assert (mean[2:] == 1).all()
    assert not caplog.records


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1e-3), ("meter", 1e3), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize(("forms", "sizes"), [("sform", (3.2, 2.4, 4)), ("qform", (1, 2, 3)), ("none", (1, 2, 3))])
def test_lengths_are_those_of_the_affine_that_is_used(tmp_path, forms, sizes, unit, scale):
    header = nib.Nifti1Header()
    header.set_data_shape(ARRAY.shape)
    header.set_xyzt_units(unit)
    turned = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1))
    header.set_qform(turned @ np.diag([1.0, 2, 3, 1]), int(forms == "qform"))
    header.set_sform(turned @ np.diag([3.2, 2.4, 4, 1]), int(forms == "sform"))
    (tmp_path / "a.nii").write_bytes(nib.Nifti1Image(ARRAY.astype(np.uint8), None, header).to_bytes())
    assert Volume(tmp_path / "a.nii").voxel_size_mm == pytest.approx([size * scale for size in sizes])


@pytest.mark.parametrize("shape", [(30, 40), (30, 40, 1), (30, 40, 5), (30, 40, 5, 2)])
def test_a_plane_is_a_millimetre_thick_unless_its_header_has_a_third_axis(tmp_path, shape):
    volume = Volume(save(tmp_path / "a.nii", np.zeros(shape, np.uint8), np.diag([2.0, 3, 4, 1])))
    assert volume.voxel_size_mm == pytest.approx((2, 3, 1 if len(shape) == 2 else 4))


def test_units_of_micrometres_become_millimetres(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(ARRAY.astype(np.uint8), np.diag([25.0, 25, 50, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, path)
    assert Volume(path).voxel_size_mm == pytest.approx((0.025, 0.025, 0.05))


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(11, 12, 13), (11, 12, 13, 3), (11, 12)])
@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_a_written_image_keeps_the_geometry(tmp_path, kind, shape, name):
    array = np.random.default_rng(7).random(shape).astype(np.float32)
    source = save(tmp_path / "in.nii.gz", array, kind=kind, descrip=b"a scan")
    volume = Volume(source)
    with VolumeWriter(tmp_path / name, volume, np.float32) as writer:
        for _, _, values in volume.slabs(planes=4):
            writer.write(values)
    written, original = nib.load(tmp_path / name), nib.load(source)
    assert type(written) is type(original)
    assert_array_equal(np.asarray(written.dataobj), array)
    for key in ("dim", "pixdim", "qform_code", "sform_code", "srow_x", "quatern_b", "xyzt_units", "descrip"):
        assert_array_equal(written.header[key], original.header[key])
    assert_array_equal(written.affine, original.affine)


def test_the_same_image_is_the_same_file_whatever_the_name_and_the_day(tmp_path):
    volume = Volume(save(tmp_path / "in.nii", ARRAY.astype(np.uint8)))
    for name in ("a.nii.gz", "b.nii.gz"):
        with VolumeWriter(tmp_path / name, volume, np.uint8) as writer:
            writer.write(ARRAY)
    content = (tmp_path / "a.nii.gz").read_bytes()
    assert content == (tmp_path / "b.nii.gz").read_bytes()
    assert content[3] == 0, "no name in the gzip header"
    assert content[4:8] == b"\0\0\0\0", "no time in the gzip header"
    assert len(gzip.decompress(content)) == 352 + ARRAY.size


def test_nothing_is_visible_until_a_file_is_complete(tmp_path):
    volume = Volume(save(tmp_path / "in.nii", ARRAY.astype(np.uint8)))
    target = tmp_path / "out.nii.gz"

    def write_half():
        with VolumeWriter(target, volume, np.uint8) as writer:
            writer.write(ARRAY)
            assert not target.exists()
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["in.nii"]


@pytest.mark.parametrize("name", ["written.nii", "written.nii.gz"])
@pytest.mark.parametrize("at", [0, 5, -1], ids=["first", "sixth", "last"])
def test_a_disk_that_fills_up_is_told_of_and_nothing_stays(tmp_path, monkeypatch, name, at):
    slabs = [np.full((256, 256, 4), i, np.float32) for i in range(20)]
    volume = Volume(save(tmp_path / "a.nii", np.zeros((256, 256, 80), np.uint8)))
    pieces = 0

    def write(self, piece, last):
        nonlocal pieces
        pieces += 1
        if last if at < 0 else pieces == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(VolumeWriter, "_write_piece", write)

    def write_all():
        with VolumeWriter(tmp_path / name, volume, np.float32) as writer:
            for slab in slabs:
                writer.write(slab)

    with pytest.raises(InputError, match=rf"{name}: cannot be written \(No space left on device\); make room"):
        write_all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("name", ["written.nii", "written.nii.gz"])
def test_the_system_that_refuses_to_write_on_is_told_of(tmp_path, name):
    """Also what the compressor still holds at the end, and what the file does."""
    volume = Volume(save(tmp_path / "a.nii", np.zeros((64, 64, 64), np.uint8)))
    noise = np.random.default_rng(0).random((64, 64, 64)).astype(np.float32)
    threads, limits = threading.active_count(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_all():
        with VolumeWriter(tmp_path / name, volume, np.float32) as writer:
            writer.write(noise)

    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(InputError, match=rf"{name}: cannot be written \(File too large\); raise the limit"):
            write_all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]
    assert threading.active_count() == threads


def test_after_an_error_nothing_more_is_compressed(tmp_path, monkeypatch):
    volume = Volume(save(tmp_path / "a.nii", np.zeros((256, 256, 80), np.uint8)))
    begun, go_on, pieces = threading.Event(), threading.Event(), []

    def write(self, piece, last):
        pieces.append(piece)
        begun.set()
        go_on.wait()

    def stop_half_way():
        with VolumeWriter(tmp_path / "b.nii", volume, np.float32) as writer:
            writer.write(np.zeros((256, 256, 24), np.float32))
            begun.wait()
            threading.Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt

    monkeypatch.setattr(VolumeWriter, "_write_piece", write)
    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert len(pieces) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("name", ["b.nii", "b.nii.gz"])
def test_more_planes_than_the_image_has_are_refused(tmp_path, name):
    volume = Volume(save(tmp_path / "a.nii", np.zeros((8, 9, 10), np.uint8)))
    with (
        pytest.raises(ValueError, match="72 bytes more than the image holds"),
        VolumeWriter(tmp_path / name, volume, np.uint8) as writer,
    ):
        writer.write(np.zeros((8, 9, 11), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_an_image_that_lacks_planes_is_not_written(tmp_path):
    volume = Volume(save(tmp_path / "a.nii", np.zeros((8, 9, 10), np.uint8)))
    with (
        pytest.raises(ValueError, match="144 bytes of the image have not been written"),
        VolumeWriter(tmp_path / "b.nii.gz", volume, np.uint8) as writer,
    ):
        writer.write(np.zeros((8, 9, 8), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_a_shift_of_the_grid_is_noticed_and_rounding_is_not(tmp_path):
    volume = Volume(save(tmp_path / "a.nii", ARRAY.astype(np.uint8)))
    shifted, rounded = OBLIQUE.copy(), OBLIQUE.copy()
    shifted[0, 3] += 0.1
    rounded[0, 3] += 1e-5
    with pytest.raises(InputError, match="the affine of the mask differs"):
        volume.check_same_grid(Volume(save(tmp_path / "b.nii", ARRAY.astype(np.uint8), shifted)), "mask")
    volume.check_same_grid(Volume(save(tmp_path / "c.nii", ARRAY.astype(np.uint8), rounded)), "mask")


ELSEWHERE = nib.affines.from_matvec(OBLIQUE[:3, :3], [50, 0, -9])


def with_forms(path, sform, qform):
    """An image with these affines, None for a code of 0."""
    header = nib.Nifti1Header()
    header.set_data_shape(ARRAY.shape)
    header.set_qform(OBLIQUE if qform is None else qform, 0 if qform is None else 1)
    header.set_sform(OBLIQUE if sform is None else sform, 0 if sform is None else 2)
    path.write_bytes(nib.Nifti1Image(ARRAY.astype(np.uint8), None, header).to_bytes())
    return Volume(path)


@pytest.mark.parametrize(
    ("image", "mask", "fits"),
    [
        ((ELSEWHERE, OBLIQUE), (None, OBLIQUE), True),
        ((None, OBLIQUE), (ELSEWHERE, OBLIQUE), True),
        ((ELSEWHERE, OBLIQUE), (OBLIQUE, None), True),
        ((ELSEWHERE, OBLIQUE), (OBLIQUE, ELSEWHERE), True),
        ((OBLIQUE, None), (ELSEWHERE, None), False),
        ((OBLIQUE, OBLIQUE), (None, ELSEWHERE), False),
        ((OBLIQUE, OBLIQUE), (np.eye(4), np.eye(4)), False),
    ],
)
def test_a_mask_agrees_by_qform_or_sform(tmp_path, image, mask, fits):
    grid, own = with_forms(tmp_path / "a.nii", *image), with_forms(tmp_path / "m.nii", *mask)
    if fits:
        grid.check_same_grid(own, "mask")
    else:
        with pytest.raises(
            InputError, match=r"copy the image's header to it \(fslcpgeom a\.nii m\.nii\); else resample"
        ):
            grid.check_same_grid(own, "mask")


@pytest.mark.parametrize("lacks", ["image", "mask"])
def test_a_header_that_names_no_space_contradicts_none_but_by_its_voxel_size(tmp_path, caplog, lacks):
    forms = {"image": (OBLIQUE, OBLIQUE), "mask": (OBLIQUE, OBLIQUE)} | {lacks: (None, None)}
    volumes = {role: with_forms(tmp_path / f"{role}.nii", *given) for role, given in forms.items()}
    volumes["image"].check_same_grid(volumes["mask"], "mask")
    assert f"{lacks}.nii: names no space" in caplog.text
    other = with_forms(tmp_path / "other.nii", np.eye(4), None)
    with pytest.raises(InputError, match="affine of the mask differs"):
        volumes[lacks].check_same_grid(other, "mask")


@pytest.mark.parametrize(("unit", "scale"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1.0)])
def test_grids_are_compared_in_voxels_whatever_the_unit(tmp_path, unit, scale):
    def volume(name, shift):
        affine = np.diag([scale, scale, scale, 1.0])
        affine[0, 3] = shift * scale
        image = nib.Nifti1Image(ARRAY.astype(np.uint8), affine)
        image.header.set_xyzt_units(unit)
        nib.save(image, tmp_path / name)
        return Volume(tmp_path / name)

    volume("a.nii", 0).check_same_grid(volume("b.nii", 1e-4), "mask")
    with pytest.raises(InputError, match="affine of the mask differs"):
        volume("c.nii", 0).check_same_grid(volume("d.nii", 0.5), "mask")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS, not the image; fetch it: git lfs pull"),
        (b"/annex/objects/SHA256E-s1--0.nii.gz\n", "git-annex, not the image; fetch it: git annex get"),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_file_without_an_image_is_named_as_such(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        Volume(tmp_path / name)


def test_a_wrong_suffix_is_named_as_such(tmp_path):
    path = save(tmp_path / "a.nii", ARRAY.astype(np.uint8))
    (tmp_path / "b.nii.gz").write_bytes(path.read_bytes())
    (tmp_path / "c.nii").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=r"is not compressed, .* rename it to \.nii"):
        Volume(tmp_path / "b.nii.gz")
    with pytest.raises(InputError, match=r"is compressed, .* rename it to \.nii\.gz"):
        Volume(tmp_path / "c.nii")


def test_a_compressed_image_is_decompressed_once_by_two_steps_and_anew_when_it_has_changed(tmp_path):
    _decompressed.cache_clear()
    path = save(tmp_path / "a.nii.gz", np.full((5, 4, 3), 1, np.float32))
    for _ in range(2):
        assert Volume(path).mean().max() == 1
    assert (_decompressed.cache_info().misses, _decompressed.cache_info().hits) == (1, 1)
    save(path, np.full((5, 4, 3), 2, np.float32))
    assert Volume(path).mean().max() == 2
