"""Crops of an OME-Zarr image at full resolution: where they lie, and that they show the voxels that are there."""

import json
import tracemalloc
import warnings
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import zarr
from PIL import Image as Picture

from n4flow.images.files import write_json
from n4flow.images.ngff import read_image
from n4flow.images.nifti import Volume
from n4flow.qc import crops
from n4flow.qc.crops import draw_crops
from tests.pyramids import binned, sheet_volume, write_store

SHAPE = (48, 80, 96)
VALUES = np.rint(sheet_volume(SHAPE)[0]).astype(np.uint16)


def files_of(folder, units_per_part, values=VALUES, **options):
    """A store, one that is twice as bright, a plan, a mask on level 1 and the sidecar of a coarse volume."""
    folder.mkdir(exist_ok=True)
    pair = {}
    for name, factor in (("store", 1), ("corrected", 2)):
        levels = [values * values.dtype.type(factor), np.rint(binned(values)).astype(np.uint16)]
        pair[name] = write_store(folder / f"{name}.ome.zarr", levels, chunks=(16, 32, 32), **options)
    write_json(folder / "plan.json", {"Levels": [{"UnitsPerPart": units_per_part}]})
    write_json(folder / "coarse.json", {"Offset": 0})
    write_json(folder / "out.json", {"Clipped": 0.0009, "Levels": []})
    image = read_image(pair["store"])
    affine = np.array(image.grid(image.levels[1])[1])
    space = values if values.ndim == 3 else values[0]
    nib.save(nib.Nifti1Image((binned(space) > 500).astype(np.uint8).T, affine), folder / "m.nii.gz")
    made = {"plan": folder / "plan.json", "mask": folder / "m.nii.gz", "sidecar": folder / "coarse.json"}
    made["told"] = folder / "out.json"
    return pair | made | {"output": folder / "crops.webp", "channel": "", "pyramid_origin": "auto"}


def chosen(files, channel=0):
    image = read_image(files["store"])
    per_part = json.loads(files["plan"].read_text())["Levels"][0]["UnitsPerPart"]
    return crops._choose(image, image.levels[0], Volume(files["mask"]), (channel, 0), per_part)


def part_at(voxel, per_part):
    unit = np.ravel_multi_index([at // size for at, size in zip(voxel, (16, 32, 32), strict=True)], (3, 3, 3))
    return unit // per_part


@pytest.mark.parametrize("per_part", [1, 3, 4, 9])
def test_they_lie_in_the_mask_where_parts_meet(tmp_path, per_part):
    files = files_of(tmp_path, per_part)
    seams = chosen(files)
    image = read_image(files["store"])
    assert len({str(crops._region(image, image.levels[0], seam)) for seam in seams}) == len(seams) >= 2
    for seam in seams:
        before = list(seam.centre)
        before[seam.across] -= 1
        assert seam.normal != seam.across
        if seam.parts[0] != seam.parts[1]:
            assert (part_at(before, per_part), part_at(seam.centre, per_part)) == seam.parts
        assert binned(VALUES)[tuple(min(n // 2, m - 1) for n, m in zip(seam.centre, (24, 40, 48), strict=True))] > 500
    assert any(seam.parts[0] != seam.parts[1] for seam in seams)


def test_of_many_units_few_faces_are_held():
    grid = (40, 50, 60)
    image = SimpleNamespace(axes=("z", "y", "x"), space=(0, 1, 2), channel_axis=None)
    level = SimpleNamespace(unit=(16, 16, 16), shape=tuple(16 * n for n in grid), unit_grid=grid)
    tracemalloc.start()
    seams = list(crops._seams(image, level, (0, 0), 7))
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 200 * np.prod(grid)
    assert 2 * crops.PLACES >= len(seams) > crops.PLACES
    for kind in (True, False):
        some = [seam.centre for seam in seams if (seam.parts[0] != seam.parts[1]) == kind]
        assert np.ptp(some, axis=0).min() > 0.9 * 16 * min(grid), "they reach through the whole image"
    for seam in seams:
        unit = [n // 16 for n in seam.centre]
        behind = np.ravel_multi_index(unit, grid) // 7
        unit[seam.across] -= 1
        assert seam.parts == (np.ravel_multi_index(unit, grid) // 7, behind)


def test_of_one_part_the_units_are_shown(tmp_path):
    seams = chosen(files_of(tmp_path, 27))
    assert len(seams) >= 2
    assert {seam.parts for seam in seams} == {(0, 0)}


def test_they_show_original_and_corrected_in_one_window(tmp_path):
    files = files_of(tmp_path, 4)
    draw_crops(**files)
    sheet = np.asarray(Picture.open(files["output"]).convert("L")).astype(float)
    (first, *_), scale = chosen(files), 512 // 96
    region = [slice(0, n) for n in SHAPE]
    region[first.normal] = first.centre[first.normal]
    values = VALUES[tuple(region)].astype(float)
    height, width = (n * scale for n in values.shape)
    before = sheet[crops.LINE : crops.LINE + height, :width].reshape(values.shape[0], scale, values.shape[1], scale)
    left = width + crops.GAP
    after = sheet[crops.LINE : crops.LINE + height, left : left + width].reshape(before.shape)
    top = values.max() * 255 / before.mean((1, 3)).max()
    for shown, expected in ((before, values), (after, 2 * values)):
        assert np.abs(shown.mean((1, 3)) - (expected * 255 / top).clip(0, 255))[4:-4, 4:-4].mean() < 6


def test_above_them_it_says_that_voxels_were_cut_off(tmp_path):
    files = files_of(tmp_path, 4)
    heights = []
    for clipped in (0.0009, 0.0011):
        write_json(files["told"], {"Clipped": clipped, "Levels": []})
        draw_crops(**files)
        with Picture.open(files["output"]) as sheet:
            heights.append(sheet.height)
            head = np.asarray(sheet)[: crops.LINE].astype(int)
    assert heights[1] == heights[0] + crops.LINE
    assert ((head[..., 0] > 150) & (head[..., 2] < 100)).sum() > 50  # amber


def test_above_them_it_says_that_chunks_are_missing(tmp_path):
    files = files_of(tmp_path, 4)
    heights = []
    for missing in ([], ["0.0.0"]):
        write_json(files["told"], {"Clipped": 0.5, "Levels": [{"MissingUnits": missing}, {"MissingUnits": []}]})
        draw_crops(**files)
        with Picture.open(files["output"]) as sheet:
            heights.append(sheet.height)
    assert heights[1] == heights[0] + crops.LINE


@pytest.mark.parametrize("scale", [(0.01, 4, 4), (4, 0.01, 0.01), (40, 0.01, 40), (1, 1, 1)])
def test_they_are_of_a_fair_size_whatever_the_voxels(tmp_path, scale, caplog):
    files = files_of(tmp_path, 1, scale_um=scale)
    draw_crops(**files)
    assert not caplog.records
    with Picture.open(files["output"]) as sheet:
        assert sheet.height <= crops.CROPS * (2 * crops.EDGE + 2 * crops.LINE)
        assert 200 < sheet.width <= 4 * crops.EDGE + crops.GAP


def test_what_cannot_be_drawn_is_said_and_no_failure(tmp_path, caplog):
    files = files_of(tmp_path, 4)
    files["told"].unlink()
    draw_crops(**files)
    assert "no crops: TypeError" in caplog.text
    with Picture.open(files["output"]) as sheet:
        assert sheet.height < 100
        assert (np.asarray(sheet)[..., 0] > 150).sum() > 50


def test_floats_far_below_one_and_infinite_ones_are_shown(tmp_path, caplog):
    usual = files_of(tmp_path / "usual", 4)
    values = (VALUES / 1e8).astype(np.float32)
    tiny = files_of(tmp_path / "tiny", 4, values) | {"mask": usual["mask"]}
    for name in ("store", "corrected"):
        zarr.open_array(str(tiny[name] / "0"))[20:30, 30, 40] = np.inf
    shown = []
    for files in (usual, tiny):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_crops(**files)
        with Picture.open(files["output"]) as sheet:
            shown.append(np.asarray(sheet.convert("L")).astype(float))
    assert not caplog.records
    assert np.abs(shown[0] - shown[1]).mean() < 2


def test_a_channel_and_a_plane(tmp_path):
    both = np.stack([VALUES // 3, VALUES])
    files = files_of(tmp_path / "channels", 9, both, axes="czyx", labels=("a", "b"))
    draw_crops(**files | {"channel": "b"})
    assert files["output"].stat().st_size > 1000
    assert chosen(files, channel=1)
    plane = files_of(tmp_path / "plane", 2, VALUES[20:24])
    store = plane["store"]
    root, array = (json.loads((store / name).read_text()) for name in ("zarr.json", "0/zarr.json"))
    assert root
    assert array["shape"] == [4, 80, 96]
    draw_crops(**plane)


def test_where_no_units_meet_the_middle_is_shown(tmp_path):
    files = files_of(tmp_path, 1)
    mask = np.zeros((48, 40, 24), np.uint8)
    mask[6, 6, 3] = 1
    nib.save(nib.Nifti1Image(mask, nib.load(files["mask"]).affine), files["mask"])
    (seam,) = chosen(files)
    assert np.abs(np.subtract(seam.centre, (6, 12, 12))).max() <= 1
    draw_crops(**files)
