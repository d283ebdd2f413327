import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_array_equal

import n4flow.mask
import n4flow.volume
from n4flow import InputError
from n4flow.mask import adopt_mask, foreground_threshold, head_from_foreground, make_mask, otsu_threshold
from n4flow.volume import Volume

AFFINE = np.diag([2.0, 2, 2, 1])


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def load(path):
    return np.asarray(nib.load(path).dataobj)


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_threshold_is_otsus(head):
    image = sitk.GetImageFromArray(np.minimum(head.image, np.percentile(head.image, 99.9)))
    otsu = sitk.OtsuThresholdImageFilter()
    otsu.SetNumberOfHistogramBins(256)
    otsu.Execute(image)
    assert otsu_threshold(head.image.ravel()) == pytest.approx(otsu.GetThreshold(), abs=float(head.image.max()) / 128)


@pytest.mark.parametrize("margin", [0, 40, 80])
@pytest.mark.parametrize("air", ["zero", "noise"])
def test_otsu_finds_the_same_head_in_any_amount_of_air(head, tmp_path, margin, air):
    image = np.pad(head.image, margin)
    if air == "noise":
        noise = np.hypot(*np.random.default_rng(8).normal(0, 30, (2, *image.shape))).astype(np.float32)
        image = np.where(image == 0, noise, image)
    made = make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii.gz")
    mask = load(tmp_path / "mask.nii.gz")
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1}
    assert made["Voxels"] == mask.sum()
    expected = np.pad(head.truth > 300, margin)
    assert dice(mask > 0, expected) > 0.95


def test_a_hot_voxel_does_not_decide(head, tmp_path):
    image = head.image.copy()
    image[40:43, 40:43, 40] = 1e7
    make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")
    assert dice(load(tmp_path / "mask.nii") > 0, head.truth > 300) > 0.95


def test_a_thing_that_fills_less_than_a_thousandth_of_the_image_is_found(tmp_path):
    image = np.zeros((120, 120, 120), np.float32)
    image[50:60, 50:60, 50:60] = 500
    make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")
    assert_array_equal(load(tmp_path / "mask.nii") > 0, image > 0)


@pytest.mark.parametrize("shape", [(11, 9, 20), (6, 7, 5)])
def test_the_threshold_of_a_large_image_is_that_of_every_so_manieth_voxel(tmp_path, monkeypatch, shape):
    image = np.random.default_rng(3).gamma(2, 100, shape)
    path = save(tmp_path / "a.nii", image)
    monkeypatch.setattr(n4flow.mask, "THRESHOLD_VOXELS", image.size / 3.5**3)  # every 4th along each axis
    for slab_voxels in (shape[0] * shape[1], 3 * shape[0] * shape[1], image.size):
        monkeypatch.setattr(n4flow.volume, "SLAB_VOXELS", slab_voxels)
        assert foreground_threshold(Volume(path)) == otsu_threshold(image[::4, ::4, ::4].ravel())


def test_the_threshold_of_a_large_image_keeps_none_of_its_slabs(tmp_path, monkeypatch):
    image = np.random.default_rng(3).gamma(2, 100, (64, 64, 256)).astype(np.float32)
    volume = Volume(save(tmp_path / "a.nii", image))
    monkeypatch.setattr(n4flow.mask, "THRESHOLD_VOXELS", image.size / 8**3)
    monkeypatch.setattr(n4flow.volume, "SLAB_VOXELS", 64 * 64)  # a plane, most of which give no voxel
    tracemalloc.start()
    foreground_threshold(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes / 4


def test_head_is_one_filled_piece_without_loose_noise(head, tmp_path):
    image = head.image.copy()
    image[:4, :4, -4:] = 900
    make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii", method="head")
    mask = load(tmp_path / "mask.nii") > 0
    assert not mask[:4, :4, -4:].any()
    assert mask[head.truth > 100].mean() > 0.98, "skull and fluid are inside"
    components = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8))))
    assert components.max() == 1
    assert dice(mask, head.truth > 0) > 0.95


def test_a_gap_is_closed_by_millimetres_whatever_the_voxel():
    halves = np.zeros((40, 40, 12), dtype=bool)
    halves[5:18, 5:35, 3:9] = halves[21:35, 5:35, 3:9] = True
    assert head_from_foreground(halves, (2.0, 2.0, 3.0))[18:21, 10:30, 5].all(), "a gap of 6 mm"
    assert not head_from_foreground(halves, (9.0, 9.0, 9.0))[18:21, 10:30, 5].any(), "a gap of 27 mm"


def test_a_cavity_wider_than_the_closing_is_filled():
    head = np.zeros((40, 40, 40), dtype=bool)
    head[4:36, 4:36, 4:36] = True
    hollow = head.copy()
    hollow[10:30, 10:30, 10:30] = False  # 40 mm of air: the closing reaches across 12
    np.testing.assert_array_equal(head_from_foreground(hollow, (2.0, 2.0, 2.0)), head)


def test_percentile_is_of_the_positive_voxels(tmp_path):
    image = np.zeros((30, 30, 30), dtype=np.float32)
    image[10:20, 10:20, 10:20] = np.arange(1, 1001).reshape(10, 10, 10)
    made = make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii", method="percentile", percentile=25)
    assert made["Voxels"] == 750


def test_own_mask_counts_whatever_is_not_zero(tmp_path):
    image = save(tmp_path / "a.nii", np.ones((5, 6, 7), dtype=np.float32))
    own = np.zeros((5, 6, 7), dtype=np.float32)
    own[0, 0, 0], own[1, 1, 1], own[2, 2, 2], own[3, 3, 3] = 1, -2, 0.25, np.nan
    assert adopt_mask(image, save(tmp_path / "m.nii", own), tmp_path / "mask.nii")["Voxels"] == 3
    assert load(tmp_path / "mask.nii").sum() == 3


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        (np.zeros((20, 20, 20)), "no voxel is above 0"),
        (np.full((20, 20, 20), 4.0), "the same intensity"),
        (np.full((20, 20, 20), np.nan), "no voxel is above 0"),
        (np.full((20, 20, 20), -1.0), "no voxel is above 0"),
    ],
)
def test_an_image_without_foreground_is_refused_and_leaves_no_file(tmp_path, array, problem):
    with pytest.raises(InputError, match=problem):
        make_mask(save(tmp_path / "a.nii", array.astype(np.float32)), tmp_path / "mask.nii")
    assert not (tmp_path / "mask.nii").exists()


@pytest.mark.parametrize(
    ("mask", "affine", "problem"),
    [
        (np.zeros((5, 6, 7)), AFFINE, r"m\.nii: the mask is empty; draw it anew"),
        (np.ones((5, 6, 8)), AFFINE, r"the mask has shape \(5, 6, 8\)"),
        (np.ones((5, 6, 7)), np.diag([2.0, 2, 2.1, 1]), "the affine of the mask differs"),
        (np.ones((5, 6, 7, 2)), AFFINE, "the mask has 2 frames"),
    ],
)
def test_an_own_mask_that_does_not_fit_is_refused(tmp_path, mask, affine, problem):
    image = save(tmp_path / "a.nii", np.ones((5, 6, 7), dtype=np.float32))
    own = save(tmp_path / "m.nii", mask.astype(np.uint8), affine)
    with pytest.raises(InputError, match=problem):
        adopt_mask(image, own, tmp_path / "mask.nii")
    assert not (tmp_path / "mask.nii").exists()


def test_closing_stays_within_the_image_on_voxels_of_micrometres():
    foreground = np.zeros((40, 40, 40), dtype=bool)
    foreground[10:30, 10:30, 10:30] = True
    assert head_from_foreground(foreground, (0.001, 0.001, 0.001)).sum() >= foreground.sum()
