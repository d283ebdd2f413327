"""What the sidecar of a corrected image says of the image itself, and what its header and those of others inherit."""

import json

import nibabel as nib
import numpy as np
import pytest

from n4flow.images.nifti import Volume, VolumeWriter
from n4flow.steps.derivatives import Border, _image_metadata


def metadata(volume, suffix):
    """What the sidecar of a derivative says, of an image that was seen slab by slab."""
    border = Border(volume.shape)
    for slab, frame, values in volume.slabs():
        if frame == 0:
            border.add(slab, values)
    return _image_metadata(volume, suffix, border)


def series(path, frames=4, seconds=2.5, units=("mm", "sec"), sidecar=None):
    image = nib.Nifti1Image(np.ones((5, 6, 7, frames), np.float32), np.eye(4))
    image.header.set_xyzt_units(*units)
    image.header.set_zooms((1, 1, 1, seconds))
    nib.save(image, path)
    if sidecar:
        path.with_suffix(".json").write_text(json.dumps(sidecar))
    return Volume(path)


@pytest.mark.parametrize(
    ("suffix", "how", "expected"),
    [
        ("bold", {}, 2.5),
        ("asl", {}, 2.5),
        ("bold", {"units": ("mm", "msec"), "seconds": 2500}, 2.5),
        ("bold", {"sidecar": {"RepetitionTime": 3.0}}, 3.0),
        ("bold", {"sidecar": {"VolumeTiming": [0, 2, 4, 9]}}, None),
        ("bold", {"units": ("mm", "hz")}, None),
        ("bold", {"units": ("mm", "ppm")}, None),
        ("bold", {"frames": 1}, None),
        ("MEGRE", {}, None),
        ("T2starw", {}, None),
        ("MP2RAGE", {}, None),
        ("T1w", {}, None),
        ("MEGRE", {"sidecar": {"RepetitionTime": 3.0}}, 3.0),
    ],
)
def test_repetition_time_is_that_of_a_series_in_time_unless_its_timing_is_told(tmp_path, suffix, how, expected):
    assert metadata(series(tmp_path / "a.nii", **how), suffix).get("RepetitionTime") == pytest.approx(expected)


def brain(head):
    return head.image * head.brain


SKULLS = {
    "air of noise": (lambda head: head.image, False),
    "brain": (brain, True),
    "brain in a background of NaN": (lambda head: np.where(head.brain, head.image, np.nan), True),
    "brain in a background below 0": (lambda head: np.where(head.brain, head.image, -1024), True),
    "brain in a tight box": (lambda head: brain(head)[box(head.brain)], True),
    "series of a brain": (lambda head: np.stack([brain(head)] * 2, axis=3), True),
    "head with air of 0": (lambda head: (head.image * (head.truth > 0))[:, :, 30:], False),
    "plane of a brain": (lambda head: brain(head)[:, :, 45], True),
    "plane of a head": (lambda head: head.image[:, :, 45], False),
}


def box(mask):
    return tuple(slice(hit.min(), hit.max() + 1) for hit in np.nonzero(mask))


@pytest.mark.parametrize("kind", SKULLS)
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1)])
def test_whether_the_skull_is_off_is_looked_up_in_the_image(head, tmp_path, kind, axes):
    make, stripped = SKULLS[kind]
    image = make(head).astype(np.float32)
    if image.ndim == 3:
        image = image.transpose(axes)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "a.nii.gz")
    volume = Volume(tmp_path / "a.nii.gz")
    assert metadata(volume, "T1w")["SkullStripped"] is stripped
    assert "SkullStripped" not in metadata(volume, "SPIM")
    for said in (True, False):
        (tmp_path / "a.json").write_text(json.dumps({"SkullStripped": said}))
        assert metadata(volume, "T1w")["SkullStripped"] is said


@pytest.mark.parametrize("frames", [1, 3])
def test_a_field_and_a_mask_inherit_nothing_that_is_said_of_the_values(tmp_path, frames):
    image = nib.Nifti1Image(np.ones((5, 6, 7, frames), np.float32), np.diag([2.0, 3, 4, 1]))
    image.header.set_intent("correlation", (30,), name="of a task")
    image.header["descrip"], image.header["aux_file"] = b"TE=30", b"colours"
    nib.save(image, tmp_path / "a.nii")
    like = Volume(tmp_path / "a.nii")
    for name, given in (("field", 1), ("corrected", None)):
        with VolumeWriter(tmp_path / f"{name}.nii", like, np.float32, frames=given) as writer:
            for _ in range(given or frames):
                writer.write(np.ones((5, 6, 7)))
    field, corrected = (nib.load(tmp_path / f"{name}.nii").header for name in ("field", "corrected"))
    for key in ("intent_code", "intent_p1", "intent_name", "descrip", "aux_file"):
        assert field[key] == nib.Nifti1Header()[key]
        assert corrected[key] == image.header[key]
    for key in ("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(field[key], corrected[key])
