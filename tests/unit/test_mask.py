import json
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_array_equal

import n4flow.images.nifti
import n4flow.steps.mask
from n4flow import InputError, correct
from n4flow.core.phantom import T1_LIKE, head_tissues, make_phantom
from n4flow.core.samples import sample_positions
from n4flow.images.nifti import Volume
from n4flow.steps.mask import adopt_mask, find_foreground, head_from_foreground, make_mask, mask_scan, otsu_threshold

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


@pytest.mark.parametrize("shape", [(48, 37, 50), (66, 17, 33)])
def test_the_threshold_of_a_large_image_is_that_of_a_sub_grid(tmp_path, monkeypatch, shape):
    image = np.random.default_rng(3).gamma(2, 100, shape)
    path = save(tmp_path / "a.nii", image)
    every = np.ix_(*sample_positions(shape, 2))
    monkeypatch.setattr(n4flow.steps.mask, "SUB_GRID_VOXELS", image[every].size)
    monkeypatch.setattr(n4flow.steps.mask, "MOST_TURNS", 0)
    for slab_voxels in (shape[0] * shape[1], 3 * shape[0] * shape[1], image.size):
        monkeypatch.setattr(n4flow.images.nifti, "SLAB_VOXELS", slab_voxels)
        assert find_foreground(Volume(path)).threshold == otsu_threshold(image[every].ravel())


def test_the_threshold_of_a_large_image_keeps_none_of_its_slabs(tmp_path, monkeypatch):
    image = np.random.default_rng(3).gamma(2, 100, (64, 64, 256)).astype(np.float32)
    volume = Volume(save(tmp_path / "a.nii", image))
    monkeypatch.setattr(n4flow.steps.mask, "SUB_GRID_VOXELS", image.size // 4**3)
    monkeypatch.setattr(n4flow.steps.mask, "MOST_TURNS", 0)
    monkeypatch.setattr(n4flow.images.nifti, "SLAB_VOXELS", 64 * 64)  # a plane, most of which give no voxel
    tracemalloc.start()
    find_foreground(volume)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < image.nbytes / 4


def surface_coil(inside, direction, ratio=20):
    """Log sensitivity of a small coil beside the head, falling with the square of the distance by `ratio` inside."""
    voxels = np.argwhere(inside)
    direction = np.array(direction) / np.linalg.norm(direction)

    def squared_distance(away):
        place = voxels.mean(axis=0) + away * direction
        return sum((axis - p) ** 2 for axis, p in zip(np.ogrid[tuple(map(slice, inside.shape))], place, strict=True))

    surface = ((voxels - voxels.mean(axis=0)) @ direction).max()
    near, far = surface, 10 * surface
    for _ in range(30):
        middle = (near + far) / 2
        squares = squared_distance(middle)[inside]
        near, far = (middle, far) if squares.max() / squares.min() > ratio else (near, middle)
    log_field = -np.log(squared_distance(far))
    return log_field - log_field[inside].mean()


def coil_scan(tissues, direction, noise_percent):
    """A head under a surface coil: image, log field, head, brain, white matter; noise of the latter where brightest."""
    shares = head_tissues(tissues, 2.0)
    inside = sum(shares.values()) > 0.5
    log_bias = surface_coil(inside, direction)
    image = sum(T1_LIKE[name] * share for name, share in shares.items()) * np.exp(log_bias)
    wm = shares["wm"] > 0.9
    rng = np.random.default_rng(4)
    sigma = noise_percent / 100 * np.percentile(image[wm], 99.9)
    image = np.hypot(image + sigma * rng.standard_normal(image.shape), sigma * rng.standard_normal(image.shape))
    return image.astype(np.float32), log_bias, inside, shares["gm"] + shares["wm"] > 0.5, wm


def shading_left(image, mask, log_bias, wm):
    """Standard deviation of the log shading in white matter after a correction at the defaults."""
    field = correct(image, mask, voxel_size_mm=(2, 2, 2)).field.log_tile(np.s_[:, :, :])
    return (field - log_bias)[wm].std()


def test_a_mask_that_has_not_settled_is_told(tissues, tmp_path, monkeypatch, caplog):
    image = save(tmp_path / "a.nii", coil_scan(tissues, (1, 0.3, 0.2), 3)[0])
    make_mask(image, tmp_path / "mask.nii")
    assert "not settled" not in caplog.text
    monkeypatch.setattr(n4flow.steps.mask, "MOST_TURNS", 1)
    make_mask(image, tmp_path / "mask.nii")
    assert "has not settled" in caplog.text


COILS = [(1, 0.3, 0.2), (0, 1, 0.5), (-0.2, -0.3, 1)]


@pytest.mark.parametrize("direction", COILS)
@pytest.mark.parametrize(("noise_percent", "covered"), [(2, 0.965), (3, 0.9)])
def test_the_dark_half_of_a_surface_coils_scan_is_found(tissues, tmp_path, direction, noise_percent, covered):
    image, log_bias, inside, brain, wm = coil_scan(tissues, direction, noise_percent)
    made = make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")
    mask = load(tmp_path / "mask.nii") > 0
    assert (image > otsu_threshold(image.ravel()))[brain].mean() < 0.5, "a threshold alone leaves out more than half"
    assert mask[brain].mean() > covered
    assert mask[~inside].mean() < 0.002, "noise that a continued field amplifies is none of it"
    assert 2 <= made["Turns"] <= n4flow.steps.mask.MOST_TURNS
    left, by_hand = (shading_left(image, given, log_bias, wm) for given in (mask, inside))
    # what is as dark as noise is missing from the mask, and the histogram of the far side is cut off there
    assert left < 0.06
    assert by_hand < 0.04


@pytest.mark.parametrize(("spreads", "few"), [(n4flow.steps.mask.NOISE_SPREADS, True), (-np.inf, False)])
def test_noise_in_a_weak_field_is_held_off_by_its_level(tissues, tmp_path, monkeypatch, spreads, few):
    image, _, inside, _, _ = coil_scan(tissues, COILS[0], 5)
    monkeypatch.setattr(n4flow.steps.mask, "NOISE_SPREADS", spreads)
    make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")
    air = (load(tmp_path / "mask.nii") > 0)[~inside].mean()
    assert air < 0.003 if few else air > 0.03


@pytest.mark.parametrize("inu_percent", [0, 40, 100])
@pytest.mark.parametrize("noise_percent", [0, 3, 9])
def test_turns_do_no_harm_where_a_threshold_does(tissues, tmp_path, inu_percent, noise_percent):
    scan = make_phantom(tissues, 2.0, inu_percent=inu_percent, noise_percent=noise_percent, seed=5)
    made = make_mask(save(tmp_path / "a.nii", scan.image), tmp_path / "mask.nii")
    mask, tissue = load(tmp_path / "mask.nii") > 0, scan.truth > 300
    at_once = scan.image > otsu_threshold(scan.image.ravel())
    assert dice(mask, tissue) > dice(at_once, tissue) - 0.002
    assert mask[scan.truth == 0].mean() < 0.001
    if inu_percent == 0:
        assert made["Turns"] == 0, "what the threshold gives"


@pytest.mark.parametrize("method", ["otsu", "head", "percentile"])
@pytest.mark.parametrize("background", [np.nan, -np.inf, -1e4])
def test_whatever_has_no_logarithm_is_background_as_0_is(head, tmp_path, method, background):
    masks = []
    for name, value in (("zero", 0), ("other", background)):
        image = np.where(head.truth > 0, head.image, np.float32(value))
        make_mask(save(tmp_path / f"{name}.nii", image), tmp_path / "mask.nii", method=method)
        masks.append(load(tmp_path / "mask.nii"))
    assert_array_equal(*masks)


def test_the_field_is_taken_off_the_whole_image_whatever_its_slabs(tissues, tmp_path, monkeypatch):
    image, *_ = coil_scan(tissues, COILS[0], 2)
    volume = Volume(save(tmp_path / "a.nii", np.rint(image).astype(np.int16)))
    found = find_foreground(volume)
    limit = found.limit(found.field.log_tile(np.s_[:, :, :]))
    for planes in (1, 7, 95):
        monkeypatch.setattr(n4flow.images.nifti, "SLAB_VOXELS", planes * image.shape[0] * image.shape[1])
        make_mask(tmp_path / "a.nii", tmp_path / "mask.nii")
        assert_array_equal(load(tmp_path / "mask.nii") > 0, np.rint(image) > limit)


def test_of_too_few_voxels_for_a_field_a_threshold_is_all(tmp_path):
    image = np.zeros((12, 12, 12), np.float32)
    image[4:8, 4:8, 4:8] = np.random.default_rng(0).uniform(400, 600, (4, 4, 4))
    made = make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")
    assert made == {"Method": "otsu", "Threshold": otsu_threshold(image.ravel()), "Turns": 0, "Voxels": 64}


def test_a_mask_of_the_sheet_is_taken_as_it_is(tissues, tmp_path):
    image, _, inside, _, _ = coil_scan(tissues, COILS[0], 2)
    own = inside & (np.arange(inside.shape[0]) < 40)[:, None, None]
    paths = save(tmp_path / "a.nii", image), save(tmp_path / "own.nii", own.astype(np.uint8))
    mask_scan(*paths, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)
    assert_array_equal(load(tmp_path / "mask.nii") > 0, own)
    assert json.loads((tmp_path / "mask.json").read_text())["Mask"] == {"Method": "given", "Voxels": own.sum()}


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


def test_a_sparse_image_of_which_a_sub_grid_shows_nothing_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(n4flow.steps.mask, "SUB_GRID_VOXELS", 40**3)
    image = np.zeros((80, 80, 80), np.float32)
    image[20:60:2, 20:60:2, 20:60:2] = 100
    assert not image[np.ix_(*sample_positions(image.shape, 2))].any()
    with pytest.raises(InputError, match=r"none of the voxels that the mask is sought on .* is above 0; give a mask"):
        make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii")


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


def uniform_image(head, noise_percent, air_is_dark=False):
    """MP2RAGE's (Marques et al. 2010): of two inversions, in whose ratio air is noise from end to end."""
    rng = np.random.default_rng(3)
    inversions = (head.truth / 1000 - 0.55) * (head.truth > 0), 0.8 * (head.truth > 0)
    first, second = (image + noise_percent / 100 * rng.standard_normal(image.shape) for image in inversions)
    ratio = first * second / (first**2 + second**2)
    return np.rint(4095 * (ratio + 0.5) * np.where(air_is_dark, head.truth > 0, 1)).astype(np.uint16)


@pytest.mark.parametrize("method", ["otsu", "head", "percentile"])
@pytest.mark.parametrize(("noise_percent", "cut"), [(1, 0), (9, 0), (3, 4)])
def test_of_mp2rages_uniform_image_a_mask_is_asked_for(head, tmp_path, method, noise_percent, cut):
    image = uniform_image(head, noise_percent)[cut : image_end(cut), cut : image_end(cut), cut : image_end(cut)]
    with pytest.raises(InputError, match=r"a\.nii: has air as bright as .*; if .* name .* \(INV2\) in .* mask$"):
        make_mask(save(tmp_path / "a.nii", image), tmp_path / "mask.nii", method=method)


def image_end(cut):
    return -cut or None


def test_one_whose_air_is_dark_needs_none(head, tmp_path):
    make_mask(save(tmp_path / "a.nii", uniform_image(head, 3, air_is_dark=True)), tmp_path / "mask.nii")
    assert not load(tmp_path / "mask.nii")[head.truth == 0].any()


@pytest.mark.parametrize("grain", [0.1, 0.3, 0.4, 0.6])
@pytest.mark.parametrize("around", [0, 24])
def test_an_object_that_is_grainy_needs_none(tmp_path, grain, around):
    """Whether it fills the image or not."""
    rng = np.random.default_rng(0)
    white = sitk.GetImageFromArray(rng.standard_normal((120, 120, 96)))
    texture = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(white, 2))
    shown = 1 + 0.3 * texture / texture.std()
    shown[:around] = shown[120 - around :] = 0
    real, imaginary = rng.standard_normal((2, *shown.shape))
    image = np.hypot(shown * (1 + grain * real) + 0.02 * real, 0.02 * imaginary)
    make_mask(save(tmp_path / "a.nii", image.astype(np.float32)), tmp_path / "mask.nii")


def phase_of(head):
    return np.random.default_rng(1).uniform(-np.pi, np.pi, head.image.shape).astype(np.float32)


SIGNED = {
    "uint16 as int16": lambda head: (head.image * 65000 / head.image.max()).astype(np.uint16).view(np.int16),
    "uint8 as int8": lambda head: (head.image * 250 / head.image.max()).astype(np.uint8).view(np.int8),
    "phase in radians": phase_of,
    "phase from -4096": lambda head: np.rint(phase_of(head) * 4096 / np.pi).astype(np.int16),
    "real part": lambda head: head.image * np.cos(phase_of(head)),
    "imaginary part": lambda head: (
        head.image * np.sin(np.linspace(0, 9, head.image.shape[0], dtype="f4"))[:, None, None]
    ),
    "z-scores": lambda head: (head.image - head.image[head.truth > 0].mean()) * (head.truth > 0) / head.image.std(),
}


@pytest.mark.parametrize("kind", SIGNED)
@pytest.mark.parametrize("method", ["otsu", "head", "percentile"])
def test_an_image_whose_object_lies_on_both_sides_of_0_is_refused(head, tmp_path, kind, method):
    image = save(tmp_path / "a.nii", SIGNED[kind](head))
    with pytest.raises(
        InputError, match=r"a\.nii: has intensities as far below 0 as .*; give magnitudes: .* give a mask$"
    ):
        make_mask(image, tmp_path / "mask.nii", method=method)
    assert not (tmp_path / "mask.nii").exists()


NOT_SIGNED = {
    "noise around 0": lambda head: head.image + np.random.default_rng(1).normal(0, 60, head.image.shape),
    "ringing": lambda head: np.gradient(np.gradient(head.truth, axis=0), axis=0) * -0.3 + head.truth,
    "a background of -1024": lambda head: np.where(head.truth > 0, head.image, -1024),
    "air of noise at -1024": lambda head: head.image * 2 - 1024,
    "two voxels": lambda head: np.where(np.arange(head.image.size).reshape(head.image.shape) < 2, -9e3, head.image),
}


@pytest.mark.parametrize("kind", NOT_SIGNED)
def test_negative_values_that_are_none_of_the_object_do_no_harm(head, tmp_path, kind):
    image = NOT_SIGNED[kind](head).astype(np.float32)
    assert (image < 0).sum() > 1
    masks = []
    for name, array in (("a", image), ("zero", np.maximum(image, 0))):
        make_mask(save(tmp_path / f"{name}.nii", array), tmp_path / "mask.nii")
        masks.append(load(tmp_path / "mask.nii"))
    assert_array_equal(*masks)


def wrapped(head, turns, noise, low, high):
    """A phase of so many turns across the head, stored from `low` to `high`; 0 in air."""
    x, y, z = (np.linspace(-0.5, 0.5, n) for n in head.image.shape)
    phase = 2 * np.pi * turns * (x[:, None, None] + 0.3 * y[:, None] ** 2 - 0.5 * z) + 0.3 * head.truth / 1000
    phase = phase + noise * np.random.default_rng(2).standard_normal(phase.shape)
    share = np.angle(np.exp(1j * phase)) / (2 * np.pi) + 0.5
    return np.where(head.truth > 0, np.rint(low + (high - low) * share), 0)


PHASES = {
    "0 to 4095": lambda head: wrapped(head, 2, 0.1, 0, 4095).astype(np.uint16),
    "many turns": lambda head: wrapped(head, 5, 0.3, 0, 4095).astype(np.uint16),
    "0 to 255": lambda head: wrapped(head, 3, 0.1, 0, 255).astype(np.uint8),
    "from -4096": lambda head: wrapped(head, 3, 0.1, -4096, 4095).astype(np.int16),
    "uint16 as int16": SIGNED["uint16 as int16"],
}


@pytest.mark.parametrize("kind", PHASES)
def test_what_wraps_around_is_refused_with_a_mask_too(head, tmp_path, kind):
    paths = save(tmp_path / "a.nii", PHASES[kind](head)), save(tmp_path / "own.nii", (head.truth > 0).astype(np.uint8))
    for own in (None, paths[1]):
        with pytest.raises(InputError, match=r"a\.nii: (wraps around|has intensities as far below 0)") as error:
            mask_scan(paths[0], own, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)
    assert "wraps around" in str(error.value)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("air", ["dark", "noise"])
def test_a_phase_that_turns_along_any_axis_is_refused(head, tmp_path, axis, air):
    """Also of a head that fills the image, so that half of its border is no air."""
    part = (slice(8, -8), slice(10, -12), slice(4, -10))
    truth = head.truth[part]
    turning = np.moveaxis(np.linspace(-2, 2, truth.shape[axis])[:, None, None], 0, axis) * 2 * np.pi
    rng = np.random.default_rng(3)
    phase = np.angle(np.exp(1j * (turning + 0.3 * truth / 1000 + 0.1 * rng.standard_normal(truth.shape))))
    around = rng.integers(0, 4096, truth.shape) if air == "noise" else 0
    values = np.where(truth > 0, np.rint((phase / np.pi + 1) / 2 * 4095), around).astype(np.uint16)
    image = save(tmp_path / "a.nii", values)
    with pytest.raises(InputError, match="give its magnitude"):
        mask_scan(image, None, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)


def test_what_is_called_a_magnitude_is_taken_for_one(head, tmp_path):
    own = save(tmp_path / "own.nii", (head.truth > 0).astype(np.uint8))
    for name, sidecar in (("sub-1_part-mag_T1w", "{}"), ("a", '{"ImageType": ["ORIGINAL", "PRIMARY", "M"]}')):
        image = save(tmp_path / f"{name}.nii", PHASES["0 to 4095"](head))
        (tmp_path / f"{name}.json").write_text(sidecar)
        mask_scan(image, own, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)


MAGNITUDES = {
    "a head": lambda head: head.image,
    "of 16 greys": lambda head: np.rint(head.image / head.image.max() * 15).astype(np.uint8),
    "off the scale": lambda head: np.minimum(head.image, 500).astype(np.int16),
    "two values": lambda head: np.where(head.truth > 700, 4095, 1).astype(np.int16),
    "a uniform image": lambda head: uniform_image(head, 9),
    "one without air": lambda head: uniform_image(head, 1, air_is_dark=True),
    "one of some noise": lambda head: uniform_image(head, 3),
    "noise": lambda head: np.random.default_rng(0).integers(0, 4096, head.image.shape).astype(np.int16),
    "salt and pepper": lambda head: np.where(np.random.default_rng(0).random(head.image.shape) < 0.02, 4e3, head.image),
    "a ramp": lambda head: np.broadcast_to(np.arange(1, 100.0)[:, None, None], head.image.shape),
}


@pytest.mark.parametrize("kind", MAGNITUDES)
def test_what_does_not_wrap_is_taken_with_a_mask(head, tmp_path, kind):
    image = save(tmp_path / "a.nii", MAGNITUDES[kind](head))
    for number, inside in enumerate((head.truth > 0, np.ones(head.truth.shape))):
        own = save(tmp_path / f"{number}.nii", inside.astype(np.uint8))
        assert adopt_mask(image, own, tmp_path / "mask.nii")["Voxels"] == inside.sum()


def test_the_mask_of_a_uniform_image_is_found_on_the_second_inversion(head, tmp_path):
    image, second = save(tmp_path / "uni.nii", uniform_image(head, 3)), save(tmp_path / "inv2.nii", head.image)
    expected = make_mask(second, tmp_path / "expected.nii")
    sidecar = tmp_path / "mask.json"
    options = {"method": "otsu", "percentile": 50}
    mask_scan(image, None, tmp_path / "mask.nii", sidecar, **options, found_on=second)
    assert_array_equal(load(tmp_path / "mask.nii"), load(tmp_path / "expected.nii"))
    content = json.loads(sidecar.read_text())
    assert content["Mask"] == expected
    assert content["Sources"] == ["uni.nii", "inv2.nii"]
    assert set(content["Provenance"]["InputSHA256"]) == {"image", "mask_image"}
    other = save(tmp_path / "inv2.nii", head.image[1:])
    with pytest.raises(InputError, match=r"inv2\.nii: the mask image has shape"):
        mask_scan(image, None, tmp_path / "mask.nii", sidecar, **options, found_on=other)


def test_phase_by_its_sidecar_is_refused_even_with_a_mask(head, tmp_path):
    paths = save(tmp_path / "a.nii", head.image), save(tmp_path / "own.nii", (head.truth > 0).astype(np.uint8))
    (tmp_path / "a.json").write_text('{"ImageType": ["ORIGINAL", "PRIMARY", "P", "ND"]}')
    with pytest.raises(InputError, match="is a part of a complex image"):
        mask_scan(*paths, tmp_path / "mask.nii", tmp_path / "mask.json", method="otsu", percentile=50)


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
