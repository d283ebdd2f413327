"""The noise of an image, and samples that are freed of it: against a plain loop, and what must not matter."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from n4flow import correct
from n4flow.core.noise import ROUNDS, denoised, noise_sd, surroundings
from n4flow.core.samples import sample_positions
from n4flow.images.sampling import Box, Image, Slab, take_samples
from n4flow.parameters import PRESETS, N4Parameters
from tests.phantoms import light_sheet

SHAPE = (40, 36, 32)


def steps(shape=SHAPE, seed=0):
    """Blocks of 6 voxels, each of one of three intensities."""
    levels = np.random.default_rng(seed).choice([400.0, 700.0, 1000.0], [n // 6 + 1 for n in shape])
    for axis in range(3):
        levels = levels.repeat(6, axis)
    return levels[tuple(slice(n) for n in shape)]


def noisy(image, sd, seed=1):
    return image + np.random.default_rng(seed).normal(0, sd, image.shape)


def around(image, positions, kept=None):
    """Intensities at the surroundings of samples, as `take_samples` gathers them."""
    known = image if kept is None else np.where(kept, image, np.nan)
    padded = np.pad(known, 1, constant_values=np.nan)
    return padded[np.ix_(*(w + 1 for w in surroundings(positions)))]


def taken(image, mask, parameters, planes=7, weights=None):
    """Samples of an array, slab by slab."""

    def slabs():
        for start in range(0, image.shape[2], planes):
            part = slice(start, min(start + planes, image.shape[2]))
            yield Slab(part, image[..., part], mask[..., part], None if weights is None else weights[..., part])

    described = Image("test", image.shape, (1.0, 1.0, 1.0), np.eye(4), slabs)
    return take_samples(described, Box(image.shape), parameters)[0]


@pytest.mark.parametrize("sd", [5, 30, 90])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_noise_is_measured_whatever_lies_beneath_it(sd, step):
    shape = (80, 72, 64)
    positions = sample_positions(shape, step)
    kept = np.ones([len(p) for p in positions], dtype=bool)
    gains = np.random.default_rng(2).uniform(0.8, 1.2, shape[2])
    for image in (np.full(shape, 700.0), 500 + 5.0 * np.arange(shape[0])[:, None, None] + np.zeros(shape)):
        for scan in (noisy(image, sd), noisy(image * gains, sd)):  # planes with gains of their own are no noise
            assert noise_sd(around(scan, positions), positions, kept) == pytest.approx(sd, rel=0.06)


def test_anatomy_with_steps_is_taken_for_little_noise():
    positions = sample_positions(SHAPE, 1)
    found = noise_sd(around(noisy(steps(), 20), positions), positions, np.ones(SHAPE, dtype=bool))
    assert found == pytest.approx(20, rel=0.25)
    assert noise_sd(around(steps(), positions), positions, np.ones(SHAPE, dtype=bool)) == 0


@pytest.mark.parametrize("shape", [(60, 50, 1), (60, 50, 2), (1, 60, 50)])
def test_noise_of_planes(shape):
    positions = sample_positions(shape, 1)
    image = noisy(np.full(shape, 500.0), 10)
    assert noise_sd(around(image, positions), positions, np.ones(shape, dtype=bool)) == pytest.approx(10, rel=0.1)


def test_of_too_few_samples_no_noise_is_known():
    positions = sample_positions((10, 10, 10), 1)
    image = noisy(np.full((10, 10, 10), 500.0), 10)
    assert noise_sd(around(image, positions), positions, np.ones((10, 10, 10), dtype=bool)) == 0


@pytest.mark.parametrize("step", [1, 3])
def test_the_mean_is_that_of_a_plain_loop(step):
    image = noisy(steps(), 40)
    inside = np.random.default_rng(3).random(SHAPE) > 0.2
    positions = sample_positions(SHAPE, step)
    kept = inside[np.ix_(*positions)]
    expected = []
    for index in np.argwhere(kept):
        voxel = [p[n] for p, n in zip(positions, index, strict=True)]
        near = [np.add(voxel, offset) for offset in product((-1, 0, 1), repeat=3)]
        values = [
            image[tuple(v)] for v in near if all(0 <= n < size for n, size in zip(v, SHAPE, strict=True))
            and inside[tuple(v)]
        ]  # fmt: skip
        mean = image[tuple(voxel)]
        for _ in range(ROUNDS):
            mean = np.mean([value for value in values if abs(value - mean) <= 60])
        expected.append(mean)
    found = denoised(around(image, positions, inside), positions, kept, 60)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_noise_falls_and_steps_stay():
    image = steps((60, 54, 48))
    positions = sample_positions(image.shape, 1)
    kept = np.ones(image.shape, dtype=bool)
    found = denoised(around(noisy(image, 20), positions), positions, kept, 30).reshape(image.shape)
    assert np.std(found - image) < 0.55 * 20
    within = np.abs(found - image) < 100  # 300 from one step to the next
    assert within.mean() > 0.9999


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.int32, np.int64, np.uint64, np.float32, np.float64])
def test_without_denoising_samples_are_the_voxels_to_the_last_digit(dtype):
    image = np.clip(noisy(steps() / 8, 8), 1, 250).round()
    if np.dtype(dtype).itemsize >= 4 and np.dtype(dtype) != np.float32:
        image += 2**24  # which float32 does not hold
    image = image.astype(dtype)
    mask = image > 0
    for denoise in (0.0, 1e-9):  # nothing but what is equal lies as near
        samples = taken(image, mask, N4Parameters(denoise=denoise, shrink_factor=2))
        own = image[np.ix_(*samples.positions)].astype(np.float64)
        np.testing.assert_allclose(samples.log_image[samples.mask], np.log(own[samples.mask]), rtol=1e-15)


@pytest.mark.parametrize("values", [lambda i: np.exp(np.sin(i / 7)), lambda i: 0.1 * (i + 10), lambda i: 700 * 1.01**i])
def test_rounding_is_no_noise(values):
    image = np.zeros(SHAPE) + values(np.arange(SHAPE[0]))[:, None, None] + 0.01 * np.arange(SHAPE[1])[:, None]
    positions, kept = sample_positions(SHAPE, 1), np.ones(SHAPE, dtype=bool)
    assert noise_sd(around(image, positions), positions, kept) == 0
    # and if it were, no sample is lost
    assert np.isfinite(denoised(around(image, positions), positions, kept, 1e-17)).all()
    samples = taken(image, image > 0, N4Parameters())
    np.testing.assert_array_equal(samples.log_image, np.log(image))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flipped", [(), (0,), (1, 2)])
def test_axes_may_be_flipped_and_permuted(axes, flipped):
    image = noisy(steps(), 40)
    mask = np.random.default_rng(3).random(SHAPE) > 0.2
    first = taken(image, mask, N4Parameters())

    def turned(array):
        return np.flip(array, flipped).transpose(axes)

    found = taken(turned(image), turned(mask), N4Parameters())
    np.testing.assert_allclose(found.log_image, turned(first.log_image), rtol=1e-13)


def test_slabs_and_what_lies_outside_of_the_mask_do_not_matter():
    image = noisy(steps(), 40).astype(np.float32)
    mask = np.random.default_rng(3).random(SHAPE) > 0.3
    first = taken(image, mask, N4Parameters())
    assert not np.array_equal(first.log_image, taken(image, mask, N4Parameters(denoise=0)).log_image)
    for planes in (1, 2, 32):
        np.testing.assert_array_equal(taken(image, mask, N4Parameters(), planes).log_image, first.log_image)
    rubbish = np.where(mask, image, np.random.default_rng(4).choice([np.nan, np.inf, -5, 1e9, 600], SHAPE))
    np.testing.assert_array_equal(taken(rubbish.astype(np.float32), mask, N4Parameters()).log_image, first.log_image)
    # nor what has no weight
    weights = mask.astype(np.float32)
    found = taken(rubbish.astype(np.float32), np.isfinite(rubbish), N4Parameters(), weights=weights)
    np.testing.assert_array_equal(found.log_image[found.mask], first.log_image[first.mask])


@pytest.mark.parametrize(("noise_steps", "averaged"), [(0.25, False), (1.5, True)])
def test_few_grey_levels_are_spread_where_they_are_wider_than_the_noise(noise_steps, averaged):
    step = 20
    shaded = steps() * np.linspace(0.7, 1.3, SHAPE[0])[:, None, None]
    image = np.rint(noisy(shaded, noise_steps * step) / step)
    assert len(np.unique(image)) < 100
    default, plain = (taken(image, image > 0, N4Parameters(denoise=denoise)) for denoise in (1.5, 0))
    off = np.exp(plain.log_image[plain.mask]) - image[plain.mask]
    assert np.abs(off).max() <= 0.5 + 1e-9
    assert np.std(off) == pytest.approx(12**-0.5, rel=0.05)
    assert np.array_equal(default.log_image, plain.log_image) != averaged
    if averaged:
        off, raw = (np.std(array * step - shaded) for array in (np.exp(default.log_image), image))
        assert off < 0.6 * raw
    # ITK's histogram has its spikes
    as_itk = taken(image, image > 0, N4Parameters(**PRESETS["itk"] | {"shrink_factor": 1}))
    np.testing.assert_array_equal(np.exp(as_itk.log_image[as_itk.mask]).round(9) % 1, 0)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"default"}))
def test_presets_that_compare_take_samples_as_they_are(preset):
    assert N4Parameters.from_mapping({"preset": preset}).denoise == 0


def test_a_field_beneath_much_noise_is_found_better():
    scan = light_sheet(0.5, 0.24, seed=2, noise_percent=9)
    positions = sample_positions(scan.image.shape, 2)
    grid = np.ix_(*positions)
    errors = []
    for denoise in (N4Parameters().denoise, 0):
        parameters = replace(N4Parameters(), denoise=denoise)
        found = correct(scan.image, scan.mask, voxel_size_mm=scan.voxel_size_mm, parameters=parameters, device="cpu")
        errors.append(np.std((found.field.log_at(positions) - scan.log_bias[grid])[scan.brain[grid]]))
    assert errors[0] < 0.75 * errors[1]
