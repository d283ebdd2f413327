"""OME-Zarr images, level by level: read as a coarse volume, and divided unit by unit on the grid of each level."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from yaozarrs import validate_ome_json

from n4flow import cli
from n4flow.core.blocks import FieldTiles
from n4flow.core.field import BiasField, Mesh
from n4flow.core.quantize import Rounding
from n4flow.errors import InputError, MachineError
from n4flow.images import arrays
from n4flow.images.fields import load_field, save_field
from n4flow.images.files import write_json
from n4flow.images.ngff import Level, read_image
from n4flow.parameters import N4Parameters
from n4flow.steps import pyramid
from n4flow.steps.pyramid import (
    coarse_scan,
    describe_store,
    divide_part,
    finish_store,
    place_mask,
    plan_store,
)
from n4flow.steps.store import correct_store
from n4flow.study.manifest import write_manifest
from n4flow.study.provenance import PACKAGE
from n4flow.study.voxels import verify_voxels
from tests.pyramids import binned, sheet_volume, write_store

SHAPE = (40, 72, 90)
VOLUME = np.rint(sheet_volume(SHAPE)[0]).astype(np.uint16)
LEVELS = [VOLUME, np.rint(binned(VOLUME)).astype(np.uint16)]
SCALE_UM = (8.0, 4.0, 4.0)
OFFSET = 0


def some_field(shape=SHAPE, scale_um=SCALE_UM, strength=0.15, seed=3):
    """A field on a coarse grid over the whole of a store."""
    lattice = np.random.default_rng(seed).normal(0, strength, (7, 7, 7))
    shape = tuple(n // 2 for n in shape[::-1])
    affine = np.diag([*(2e-3 * s for s in scale_um[::-1]), 1])
    affine[:3, 3] = [s / 2e3 for s in scale_um[::-1]]
    mesh = Mesh.of_box([(0.1 * n, 0.9 * n) for n in shape], (4, 4, 4))
    return BiasField(lattice, mesh, shape, affine)


def ratio_on(field, image, level):
    """The field on a level in float64, by another way than the package's division."""
    shape, affine = image.grid(level)
    axes = np.linalg.inv(field.affine) @ np.array(affine)
    places = [axes[k, k] * np.arange(n) + axes[k, 3] for k, n in enumerate(shape)]
    return np.exp(field.log_at(places)).T


def divide(
    folder, store, field, *, job_gb=64.0, threads=1, offset=0.0, dtype="same", keep=True, channels=None, masks=None
):
    """Plan, divide, describe and finish; the folder of the corrected store."""
    folder.mkdir(parents=True, exist_ok=True)
    image = read_image(store)
    target = folder / "out.ome.zarr"
    save_field(field, folder / "field.json")
    told = {"Offset": offset, "Channel": "0", "Level": "1"}
    (folder / "coarse.json").write_text(json.dumps(told))
    plan_store(store, target, folder / "plan.json", job_gb=job_gb, dtype=dtype, pyramid_origin="auto")
    channels = channels or {"sub-01_SPIM": (0, None)}
    common = {"channels": channels, "pyramid_origin": "auto"}
    common |= {"fields": [folder / "field.json"] * len(channels), "coarse": [folder / "coarse.json"] * len(channels)}
    parts = []
    for number, level in enumerate(image.levels):
        for part in range(level.parts(job_gb)):
            parts.append(folder / f"level-{number}_part-{part}.json")
            divide_part(
                store,
                target,
                folder / "plan.json",
                parts[-1],
                level=number,
                part=part,
                keep_saturated=keep,
                threads=threads,
                **common,
            )
    assert not (target / image.root).exists()
    describe_store(store, parts, folder / "out.json", masks=masks or [None] * len(channels), **common)
    finish_store(store, target, folder / "out.json", target / image.root, pyramid_origin="auto")
    return target


def voxels(store):
    return [zarr.open_array(store / level.path, mode="r")[...] for level in read_image(store).levels]


def told(folder):
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_level_is_divided_by_the_field_on_its_own_grid(tmp_path, version):
    store, field = write_store(tmp_path / "in.ome.zarr", LEVELS, version=version, scale_um=SCALE_UM), some_field()
    out = divide(tmp_path, store, field)
    image = read_image(store)
    validate_ome_json((out / image.root).read_text())
    for level, before, after in zip(image.levels, LEVELS, voxels(out), strict=True):
        ratio = ratio_on(field, image, level)
        assert np.ptp(np.log(ratio)) > 0.25
        expected = np.clip(np.rint(before / ratio), 0, 65535)
        expected[before == 0] = 0
        differ = after != expected
        assert differ.mean() < 1e-4
        assert np.abs(after - expected).max(initial=0) <= 1
    assert told(tmp_path)["SelfCheck"] < 1e-9


def test_the_store_is_like_the_input(tmp_path):
    window = {"compressors": zarr.codecs.BloscCodec(cname="zstd", clevel=3), "fill_value": 7, "dtype": ">u2"}
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, version="0.5", shards=(32, 64, 64), **window)
    out = divide(tmp_path, store, some_field(scale_um=(4, 4, 4)))
    before, after = read_image(store), read_image(out)
    assert after.levels == before.levels  # metadata of the arrays included: codecs, dimension names, fill value
    assert after.attributes == before.attributes
    assert set(json.loads((out / "zarr.json").read_text())["attributes"]) == {"ome", "n4flow"}


FORMS = {
    "one part": {},
    "3 parts": {"job_gb": VOLUME.nbytes / 3e9},
    "7 parts, 2 threads": {"job_gb": VOLUME.nbytes / 7e9, "threads": 2},
    "v2": {"version": "0.4"},
    "chunks of 64": {"chunks": (64, 64, 64)},
    "shards": {"chunks": (8, 24, 24), "shards": (16, 48, 72)},
    "single planes": {"chunks": (1, 90, 90)},
    "odd chunks": {"chunks": (7, 11, 13)},
}


@pytest.fixture(scope="module")
def one_part(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return voxels(divide(folder, write_store(folder / "in.ome.zarr", LEVELS, scale_um=SCALE_UM), some_field()))


@pytest.mark.parametrize("form", FORMS)
def test_voxels_do_not_depend_on_jobs_threads_or_chunks(tmp_path, one_part, form):
    options = dict(FORMS[form])
    work = {key: options.pop(key) for key in ("job_gb", "threads") if key in options}
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM, **options)
    out = voxels(divide(tmp_path, store, some_field(), **work))
    assert [a.tobytes() for a in out] == [b.tobytes() for b in one_part]
    parts = len(list(tmp_path.glob("level-0_part-*.json")))
    assert parts >= {"3 parts": 3, "7 parts, 2 threads": 7}.get(form, 1)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_zip_file_is_divided_like_a_folder(tmp_path, one_part, version):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM, version=version)
    shutil.make_archive(str(tmp_path / "in.ome.zarr"), "zip", tmp_path, "in.ome.zarr")
    shutil.rmtree(store)
    out = divide(tmp_path, tmp_path / "in.ome.zarr.zip", some_field(), threads=2)
    assert [a.tobytes() for a in voxels(out)] == [b.tobytes() for b in one_part]
    coarse, _ = TestCoarse().coarse(tmp_path, tmp_path / "in.ome.zarr.zip", level=1)
    assert np.array_equal(coarse.get_fdata(), LEVELS[1].T)


def test_digests_tell_of_voxels_and_not_of_parts(tmp_path):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
    for name, job_gb, strength in (("a", 64, 0.15), ("b", VOLUME.nbytes / 5e9, 0.15), ("c", 64, 0.16)):
        divide(tmp_path / name, store, some_field(strength=strength), job_gb=job_gb)
    a, b, c = (told(tmp_path / name)["Levels"] for name in "abc")
    assert a == b
    assert [level["SHA256Before"] for level in a] == [level["SHA256Before"] for level in c]
    assert all(one["SHA256"] != other["SHA256"] for one, other in zip(a, c, strict=True))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(*[st.integers(1, 40)] * 3),
    unit=st.tuples(*[st.integers(1, 17)] * 3),
    job_gb=st.floats(1e-7, 1e-4),
)
def test_every_unit_has_one_writer(shape, unit, job_gb):
    from n4flow.images.arrays import unit_numbers

    level = Level("0", shape, unit, unit, "uint16", (1, 1, 1), (0, 0, 0), {})
    per_part = level.units_per_part(job_gb)
    parts = [list(unit_numbers(level, part, per_part)) for part in range(level.parts(job_gb))]
    assert all(parts)
    assert sorted(unit for part in parts for unit in part) == list(range(int(np.prod(level.unit_grid))))


def test_fill_stays_fill_and_unwritten(tmp_path):
    values = VOLUME.copy()
    values[:, :, :32] = 0
    store = write_store(tmp_path / "in.ome.zarr", [values], chunks=(40, 72, 32), scale_um=SCALE_UM)
    assert not (store / "0/c/0/0/0").exists()
    out = divide(tmp_path, store, some_field(), offset=100.0)
    assert not (out / "0/c/0/0/0").exists()
    assert (out / "0/c/0/0/1").exists()
    after = voxels(out)[0]
    assert (after[values == 0] == 0).all()
    assert told(tmp_path)["Fill"] == np.mean(values == 0)


@pytest.mark.parametrize("keep", [True, False])
def test_saturated_voxels_stay_or_are_divided(tmp_path, keep):
    values = VOLUME.copy()
    values[10:20, 10:30, 10:30] = 65535
    store = write_store(tmp_path / "in.ome.zarr", [values], scale_um=SCALE_UM)
    after = voxels(divide(tmp_path, store, some_field(), keep=keep))[0]
    assert (after[values == 65535] == 65535).all() == keep
    assert told(tmp_path)["Saturated"] == np.mean(values == 65535)


def test_what_is_too_bright_is_cut_off_and_counted(tmp_path):
    values = np.full(SHAPE, 65000, np.uint16)
    store, field = write_store(tmp_path / "in.ome.zarr", [values], scale_um=SCALE_UM), some_field()
    after = voxels(divide(tmp_path, store, field))[0]
    ratio = ratio_on(field, read_image(store), read_image(store).levels[0])
    beyond = np.rint(65000 / ratio) > 65535
    assert 0.1 < beyond.mean() < 0.9
    assert (after[beyond] == 65535).all()
    assert told(tmp_path)["Clipped"] == pytest.approx(beyond.mean(), abs=1e-4)


def test_a_pedestal_is_left_where_it_is(tmp_path):
    store, field = write_store(tmp_path / "in.ome.zarr", [VOLUME + np.uint16(100)], scale_um=SCALE_UM), some_field()
    after = voxels(divide(tmp_path, store, field, offset=100.0))[0]
    expected = np.rint(VOLUME / ratio_on(field, read_image(store), read_image(store).levels[0])) + 100
    assert (after != expected).mean() < 1e-4


DTYPES = ["uint8", "int8", "int16", "uint32", "int64", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_every_real_type(tmp_path, dtype, version):
    values = (VOLUME / 40).astype(dtype) - np.dtype(dtype).type(0 if dtype[0] == "u" else 20)
    store = write_store(tmp_path / "in.ome.zarr", [values], scale_um=SCALE_UM, version=version)
    field = some_field()
    after = voxels(divide(tmp_path, store, field))[0]
    expected = values / ratio_on(field, read_image(store), read_image(store).levels[0])
    if dtype[0] == "f":
        np.testing.assert_allclose(after, expected.astype(dtype), rtol=2e-7)
    else:
        limits = np.iinfo(dtype)
        kept = values == limits.max
        assert (after[~kept] != np.clip(np.rint(expected), limits.min, limits.max)[~kept]).mean() < 1e-4
    assert after.dtype == dtype


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_float32_is_written_where_it_is_asked_for(tmp_path, version):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM, version=version)
    field = some_field()
    after = voxels(divide(tmp_path, store, field, dtype="float32"))[0]
    assert after.dtype == np.float32
    expected = VOLUME / ratio_on(field, read_image(store), read_image(store).levels[0])
    np.testing.assert_allclose(after, expected.astype(np.float32), rtol=2e-7)


def test_channels_and_times_have_the_field_of_their_channel_and_others_are_copied(tmp_path):
    values = np.stack([np.stack([VOLUME, VOLUME // 2, VOLUME // 3])] * 2)  # t c z y x
    store = write_store(tmp_path / "in.ome.zarr", [values], axes="tczyx", scale_um=SCALE_UM)
    field = some_field()
    out = divide(tmp_path, store, field, channels={"one": (0, None), "other": (2, None)})
    after = voxels(out)[0]
    ratio = ratio_on(field, read_image(store), read_image(store).levels[0])
    assert np.array_equal(after[:, 1], values[:, 1])
    for channel in (0, 2):
        assert (after[:, channel] != np.rint(values[:, channel] / ratio)).mean() < 1e-4
    assert np.array_equal(after[0], after[1])


def test_time_points_have_the_field_of_their_row_and_others_are_copied(tmp_path):
    values = np.stack([np.stack([VOLUME, VOLUME // 2])] * 3)  # t c z y x
    store = write_store(tmp_path / "in.ome.zarr", [values], axes="tczyx", scale_um=SCALE_UM)
    field = some_field()
    out = divide(tmp_path, store, field, channels={"one": (0, 1), "other": (1, None)})
    after = voxels(out)[0]
    ratio = ratio_on(field, read_image(store), read_image(store).levels[0])
    assert np.array_equal(after[[0, 2], 0], values[[0, 2], 0])
    assert (after[1, 0] != np.rint(values[1, 0] / ratio)).mean() < 1e-4
    assert all((after[time, 1] != np.rint(values[time, 1] / ratio)).mean() < 1e-4 for time in range(3))
    rows = told(tmp_path)["Channels"]
    assert (rows["one"]["Time"], "Time" in rows["other"]) == (1, False)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
class TestMissingUnits:
    """Chunks that hold nothing are told of where the mask says that there was something."""

    def mask(self, folder, factor=2):
        inside = binned(sheet_volume(SHAPE)[0], (factor,) * 3) > 600
        affine = np.diag([*(factor * s / 1000 for s in SCALE_UM[::-1]), 1.0])
        affine[:3, 3] = [(factor - 1) / 2 * s / 1000 for s in SCALE_UM[::-1]]
        nib.save(nib.Nifti1Image(inside.T.astype(np.uint8), affine), folder / "mask.nii.gz")
        return folder / "mask.nii.gz"

    def store(self, folder, version, values):
        return write_store(
            folder / "in.ome.zarr",
            [values, np.rint(binned(values)).astype(np.uint16)],
            version=version,
            chunks=(16, 16, 16),
            scale_um=SCALE_UM,
        )

    def chunk(self, store, place):
        """File of a chunk of level 0."""
        return store / "0" / ("" if (store / ".zattrs").exists() else "c") / place.replace(".", "/")

    def test_lost_ones_are_told(self, tmp_path, version, caplog):
        store = self.store(tmp_path, version, VOLUME)
        middle = ".".join(str(n // 32) for n in SHAPE)
        self.chunk(store, middle).unlink()
        divide(tmp_path, store, some_field(), masks=[self.mask(tmp_path)])
        assert [level["MissingUnits"] for level in told(tmp_path)["Levels"]] == [[middle], []]
        assert f"of its level 0 hold nothing although most of their place is in the mask ({middle})" in caplog.text

    @pytest.mark.parametrize("rows", [{"a": (0, None)}, {"a": (0, 1)}, {"a": (0, None), "b": (1, None)}])
    def test_lost_ones_of_several_channels_and_times(self, tmp_path, version, rows):
        """Also where a chunk holds channels and time points that are copied."""
        values = np.stack([np.stack([VOLUME, VOLUME])] * 2)
        store = write_store(tmp_path / "in.ome.zarr", [values], version=version, axes="tczyx", scale_um=SCALE_UM)
        file = "zarr.json" if version == "0.5" else ".zarray"
        metadata = json.loads((store / "0" / file).read_text())
        options = {"chunks": (2, 2, 16, 16, 16), "shape": values.shape, "dtype": values.dtype}
        if version == "0.4":
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        zarr.create_array(str(store / "0"), zarr_format=metadata["zarr_format"], overwrite=True, **options)[...] = (
            values
        )
        place = ".".join(str(n // 32) for n in SHAPE)
        self.chunk(store, f"0.0.{place}").unlink()
        divide(tmp_path, store, some_field(), channels=rows, masks=[self.mask(tmp_path)] * len(rows))
        assert [level["MissingUnits"] for level in told(tmp_path)["Levels"]] == [[f"0.0.{place}"]]

    def test_with_the_field_of_another_channel(self, tmp_path, version):
        store = write_store(
            tmp_path / "in.ome.zarr",
            [np.stack([VOLUME, VOLUME // 2])],
            version=version,
            axes="czyx",
            chunks=(16, 16, 16),
            scale_um=SCALE_UM,
        )
        place = "1." + ".".join(str(n // 32) for n in SHAPE)
        self.chunk(store, place).unlink()
        correct_store(store, tmp_path / "out.ome.zarr", field_from="0", device="cpu")
        assert told(tmp_path)["Levels"][0]["MissingUnits"] == [place]

    def test_parts_of_an_earlier_version(self, tmp_path, version):
        store = self.store(tmp_path, version, VOLUME)
        divide(tmp_path, store, some_field())
        part = tmp_path / "level-0_part-0.json"
        part.write_text(
            json.dumps({key: value for key, value in json.loads(part.read_text()).items() if key != "Empty"})
        )
        row = {"a": (0, None)}
        common = {"channels": row, "fields": [tmp_path / "field.json"], "coarse": [tmp_path / "coarse.json"]}
        with pytest.raises(InputError, match=r"has parts of an earlier version; remove the files of its parts"):
            describe_store(
                store,
                [part, tmp_path / "level-1_part-0.json"],
                tmp_path / "out.json",
                masks=[None],
                pyramid_origin="auto",
                **common,
            )

    def test_background_that_nobody_wrote_is_none(self, tmp_path, version, caplog):
        values = np.where(VOLUME > 600, VOLUME, 0).astype(np.uint16)
        store = self.store(tmp_path, version, values)
        assert not self.chunk(store, "0.0.0").exists()
        divide(tmp_path, store, some_field(), masks=[self.mask(tmp_path)])
        assert not any(level["MissingUnits"] for level in told(tmp_path)["Levels"])
        assert "hold nothing" not in caplog.text


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (2, 3, 2)])
def test_a_level_gets_the_field_at_its_place_in_the_world(tmp_path, factors):
    """Odd sizes and anisotropic pyramids too."""
    levels = [VOLUME[:39, :71, :89]]
    levels.append(np.rint(binned(levels[0], factors)).astype(np.uint16))
    field = some_field()
    options = {"scale_um": SCALE_UM, "factors": factors, "translations": False}
    store = write_store(tmp_path / "in.ome.zarr", levels, **options)
    image = read_image(store)
    fine, coarse = (ratio_on(field, image, level) for level in image.levels)
    # to the second order, an average lies at the middle of what is averaged
    assert np.abs(np.log(binned(fine, factors) / coarse)).max() < 5e-3
    after = voxels(divide(tmp_path, store, field))[1]
    assert (after != np.rint(levels[1] / coarse)).mean() < 1e-4


class TestTiles:
    @pytest.fixture
    def tiles(self):
        field = some_field()
        finer = field.on_grid((4000, 80, 20), field.affine @ np.diag([0.01, 0.4, 0.9, 1]))
        return finer, FieldTiles(finer)

    def whole(self, tiles, block):
        out = np.full([part.stop - part.start for part in block], np.nan)
        for part, values in tiles.tiles(block):
            out[part] = values
        return out

    def test_interpolated_where_the_field_is_smooth(self, tiles):
        field, tiles = tiles
        assert 20 < sum(tiles._interpolated) < len(tiles._interpolated)
        block = tuple(slice(0, n) for n in tiles.shape)
        expected = np.exp(field.log_tile((slice(None),) * 3)).T
        np.testing.assert_allclose(self.whole(tiles, block), expected, rtol=1e-10)

    @pytest.mark.parametrize("cut", [(0, 1), (1, 64), (1, 7), (2, 50), (2, 1)])
    def test_same_bits_in_every_block(self, tiles, cut):
        _, tiles = tiles
        block = [slice(2, 19), slice(5, 77), slice(60, 260)]
        whole = self.whole(tiles, block)
        axis, step = cut
        pieces = []
        for start in range(block[axis].start, block[axis].stop, step):
            part = list(block)
            part[axis] = slice(start, min(start + step, block[axis].stop))
            pieces.append(self.whole(tiles, part))
        assert np.concatenate(pieces, axis=axis).tobytes() == whole.tobytes()


def test_rounding_is_half_to_even():
    values = np.array([1, 3, 5, 7], np.uint8)
    out = np.empty_like(values)
    Rounding(values.dtype, values.dtype, 0, True)(values, np.full(4, 2.0), 0.0, out)
    assert out.tolist() == [0, 2, 2, 4]


class TestCoarse:
    def coarse(self, tmp_path, store, **changes):
        settings = {"channel": "", "level": "auto", "level_voxels": 10**6, "offset": 0, "pyramid_origin": "auto"}
        coarse_scan(store, tmp_path / "c.nii.gz", tmp_path / "c.json", **settings | changes)
        return nib.load(tmp_path / "c.nii.gz"), json.loads((tmp_path / "c.json").read_text())

    @pytest.mark.parametrize("version", ["0.4", "0.5"])
    def test_a_level_comes_out_as_it_is(self, tmp_path, version):
        store = write_store(tmp_path / "a.ome.zarr", LEVELS, version=version, scale_um=SCALE_UM)
        found, told = self.coarse(tmp_path, store, level=1)
        assert np.array_equal(found.get_fdata(), LEVELS[1].T)
        assert found.get_data_dtype() == np.float32
        np.testing.assert_allclose(found.affine, read_image(store).grid(read_image(store).levels[1])[1], rtol=1e-6)
        assert found.header.get_xyzt_units()[0] == "mm"
        assert (told["PixelSize"], told["PixelSizeUnits"], told["Level"]) == ([4, 4, 8], "um", "1")
        first = (tmp_path / "c.nii.gz").read_bytes()
        self.coarse(tmp_path, store, level=1)
        assert (tmp_path / "c.nii.gz").read_bytes() == first

    @pytest.mark.parametrize("chunks", [(8, 8, 8), (40, 72, 90), (1, 72, 90), (7, 11, 13)])
    def test_averages_are_streamed(self, tmp_path, chunks, monkeypatch):
        monkeypatch.setattr("n4flow.images.arrays.BLOCK_VOXELS", 2000)
        store = write_store(tmp_path / "a.ome.zarr", [VOLUME], chunks=chunks, scale_um=(4, 4, 4))
        found, told = self.coarse(tmp_path, store, level_voxels=10000)
        assert told["LevelFactors"] == [4, 4, 2]
        usable = np.where(VOLUME > 0, 1.0, 0)
        with np.errstate(invalid="ignore"):
            expected = np.nan_to_num(binned(VOLUME.astype(float), (2, 4, 4)) / binned(usable, (2, 4, 4)))
        np.testing.assert_allclose(found.get_fdata(), expected.T, rtol=1e-6)

    def test_fill_and_saturated_voxels_are_0_and_the_pedestal_is_off(self, tmp_path):
        values = VOLUME + np.uint16(100)
        values[:4] = 9
        values[4:8] = 65535
        store = write_store(tmp_path / "a.ome.zarr", [values], fill_value=9)
        found, told = self.coarse(tmp_path, store, offset={"0": 100})
        expected = VOLUME.astype(float)
        expected[:8] = 0
        assert np.array_equal(found.get_fdata(), expected.T)
        assert (told["FillShare"], told["SaturatedShare"], told["Offset"]) == (0.1, 0.1, 100)

    def test_a_pedestal_is_found(self, tmp_path):
        noise = np.random.default_rng(0).normal(100, 3, VOLUME.shape)
        store = write_store(tmp_path / "a.ome.zarr", [np.rint(VOLUME + noise).astype(np.uint16)])
        _, told = self.coarse(tmp_path, store, offset="auto")
        assert 90 < told["Offset"] <= 100

    def test_mean_over_time(self, tmp_path):
        store = write_store(tmp_path / "a.ome.zarr", [np.stack([VOLUME, VOLUME // 2])], axes="tzyx")
        found, _ = self.coarse(tmp_path, store)
        usable = np.maximum((VOLUME > 0).astype(float) + (VOLUME // 2 > 0), 1)
        np.testing.assert_allclose(found.get_fdata(), ((VOLUME + VOLUME // 2) / usable).T, rtol=1e-6)

    def test_one_time_point(self, tmp_path):
        store = write_store(tmp_path / "a.ome.zarr", [np.stack([VOLUME, VOLUME // 2])], axes="tzyx")
        found, told = self.coarse(tmp_path, store, t="1")
        np.testing.assert_array_equal(found.get_fdata(), (VOLUME // 2).T)
        assert told["Time"] == 1

    def test_a_time_point_that_is_not_there(self, tmp_path):
        store = write_store(tmp_path / "a.ome.zarr", [np.stack([VOLUME, VOLUME // 2])], axes="tzyx")
        with pytest.raises(InputError, match="has 2 time points, and no '2'; give one from 0 to 1 in the column t"):
            self.coarse(tmp_path, store, t="2")
        with pytest.raises(InputError, match="has no axis of time, and no '1'; leave the column t empty"):
            self.coarse(tmp_path, write_store(tmp_path / "b.ome.zarr", [VOLUME]), t="1")


class TestMask:
    INSIDE = VOLUME > 1000

    @pytest.fixture
    def coarse(self, tmp_path):
        store = write_store(tmp_path / "a.ome.zarr", LEVELS, scale_um=SCALE_UM)
        TestCoarse().coarse(tmp_path, store, level=1)
        return tmp_path / "c.nii.gz"

    def placed(self, tmp_path, coarse, mask):
        place_mask(coarse, mask, tmp_path / "m.nii.gz", pyramid_origin="auto")
        found = nib.load(tmp_path / "m.nii.gz")
        assert np.array_equal(found.affine, nib.load(coarse).affine)
        return np.asarray(found.dataobj)

    @pytest.mark.parametrize("kind", ["on its grid", "finer", "label"])
    def test_a_mask_in_the_same_space_is_brought_onto_the_coarse_grid(self, tmp_path, coarse, kind):
        on_grid = binned(self.INSIDE.astype(float)).T > 0.5
        if kind == "label":
            labels = [self.INSIDE.astype(np.uint8) * 3]
            mask = write_store(tmp_path / "a.ome.zarr/labels/brain", labels, scale_um=SCALE_UM)
            mask = mask.rename(tmp_path / "brain.ome.zarr")
        else:
            image = read_image(tmp_path / "a.ome.zarr")
            values = on_grid if kind == "on its grid" else self.INSIDE.T
            affine = image.grid(image.levels[1 if kind == "on its grid" else 0])[1]
            mask = tmp_path / "mask.nii.gz"
            nib.save(nib.Nifti1Image(values.astype(np.uint8), np.array(affine)), mask)
        found = self.placed(tmp_path, coarse, mask)
        assert np.mean((found != 0) != on_grid) < (1e-9 if kind == "on its grid" else 0.1)
        assert 0.1 < found.mean() < 0.9

    @pytest.mark.parametrize("axes", ["zyx", "xyz", "czyx"])
    @pytest.mark.parametrize("scale_um", [(5.0, 3.0, 4.0), (9.0, 9.0, 9.0)], ids=["finer", "coarser"])
    def test_a_label_of_any_axes_is_read_by_blocks(self, tmp_path, coarse, axes, scale_um, monkeypatch):
        """Each voxel of the volume gets the value of the label at its place in the world."""
        monkeypatch.setattr(arrays, "BLOCK_VOXELS", 500)
        extent = dict(zip("zyx", (320, 288, 360), strict=True))  # of the image, in µm
        order = axes[-3:]
        scale = dict(zip("zyx", scale_um, strict=True))
        # shorter along x than the image
        shape = {name: int(extent[name] / scale[name]) - (4 if name == "x" else 0) for name in order}
        values = np.random.default_rng(0).integers(0, 2, [shape[name] for name in order]).astype(np.uint8)
        options = {"axes": axes, "scale_um": [scale[name] for name in order], "chunks": (7, 9, 8)}
        stored = values[None] if axes[0] == "c" else values
        found = self.placed(tmp_path, coarse, write_store(tmp_path / "brain.ome.zarr", [stored], **options))
        by_xyz = values.transpose([order.index(name) for name in "xyz"])
        affine = nib.load(coarse).affine
        places = [
            np.rint((affine[k, k] * np.arange(n) + affine[k, 3]) * 1e3 / scale[name]).astype(int)
            for k, (n, name) in enumerate(zip(found.shape, "xyz", strict=True))
        ]
        inside = np.ix_(*[(p >= 0) & (p < shape[name]) for p, name in zip(places, "xyz", strict=True)])
        expected = np.zeros(found.shape)
        expected[inside] = by_xyz[np.ix_(*[p[p < shape[name]] for p, name in zip(places, "xyz", strict=True)])]
        assert_array_equal(found, expected)

    def test_a_level_of_a_label_lies_where_the_config_says(self, tmp_path, coarse):
        levels = [np.zeros((40, 72, 360), np.uint8), np.ones((40, 72, 120), np.uint8)]
        levels[1][:, :, 0] = 0
        options = {"scale_um": (8.0, 4.0, 1.0), "factors": (1, 1, 3), "translations": False}
        label = write_store(tmp_path / "brain.ome.zarr", levels, **options)
        first = {}
        for origin in ("auto", "declared"):
            place_mask(coarse, label, tmp_path / "m.nii.gz", pyramid_origin=origin)
            first[origin] = int(np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj)[:, 0, 0].argmax())
        # the volume begins at 2 µm; the label, of 3 µm, at 1 µm if averaged, and at 0 as declared
        assert first == {"auto": 1, "declared": 0}

    def test_a_label_of_several_time_points(self, tmp_path, coarse):
        inside = np.stack([self.INSIDE, self.INSIDE[:, ::-1]]).astype(np.uint8)
        label = write_store(tmp_path / "label.ome.zarr", [inside], axes="tzyx", scale_um=SCALE_UM)
        found = []
        for t in ("", "0", "1"):
            place_mask(coarse, label, tmp_path / "m.nii.gz", pyramid_origin="auto", t=t)
            found.append(np.asarray(nib.load(tmp_path / "m.nii.gz").dataobj))
        assert np.array_equal(found[0], found[1])
        assert not np.array_equal(found[1], found[2])
        with pytest.raises(
            InputError, match=r"has 2 time points, and the row is of time point 2; give a label with as"
        ):
            place_mask(coarse, label, tmp_path / "m.nii.gz", pyramid_origin="auto", t="2")

    def test_outside_of_the_image(self, tmp_path, coarse):
        nib.save(
            nib.Nifti1Image(np.ones((5, 5, 5), np.uint8), np.diag([1, 1, 1, 1.0]) + np.eye(4, k=3) * 99),
            tmp_path / "m.nii",
        )
        with pytest.raises(InputError, match=r"m\.nii: has no voxel in c\.nii\.gz; give a mask in the same space"):
            place_mask(coarse, tmp_path / "m.nii", tmp_path / "m.nii.gz", pyramid_origin="auto")
        assert not (tmp_path / "m.nii.gz").exists()

    @pytest.mark.parametrize("times", [1000, 0.001], ids=["µm taken for mm", "mm taken for µm"])
    def test_on_another_scale(self, tmp_path, coarse, times):
        affine = nib.load(coarse).affine @ np.diag([times, times, times, 1])
        mask = nib.Nifti1Image(np.ones(nib.load(coarse).shape, np.uint8), affine)
        mask.header.set_xyzt_units("mm")
        nib.save(mask, tmp_path / "m.nii")
        with pytest.raises(InputError, match=r"m\.nii: is [\d.e+-]+ mm long, and c\.nii\.gz [\d.]+ mm; .*µm"):
            place_mask(coarse, tmp_path / "m.nii", tmp_path / "m.nii.gz", pyramid_origin="auto")
        assert not (tmp_path / "m.nii.gz").exists()

    def test_label_on_another_scale(self, tmp_path, coarse):
        scale_um = [1000 * each for each in SCALE_UM]
        label = write_store(tmp_path / "brain.ome.zarr", [self.INSIDE.astype(np.uint8)], scale_um=scale_um)
        with pytest.raises(InputError, match=r"brain\.ome\.zarr: is \d+ mm long, and c\.nii\.gz"):
            place_mask(coarse, label, tmp_path / "m.nii.gz", pyramid_origin="auto")


def test_arrays_of_another_plan_are_made_anew(tmp_path):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
    out = divide(tmp_path, store, some_field())
    (out / "0/c/stale").write_text("")
    plan_store(store, out, tmp_path / "plan.json", job_gb=1, dtype="same", pyramid_origin="auto")
    assert (out / "0/c/stale").exists()  # what fits stays
    assert not (out / "zarr.json").exists()
    plan_store(store, out, tmp_path / "plan.json", job_gb=1, dtype="float32", pyramid_origin="auto")
    assert not (out / "0/c").exists()


def test_a_store_that_has_changed_since_the_plan(tmp_path):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
    divide(tmp_path / "out", store, some_field())
    array = json.loads((store / "0/zarr.json").read_text())
    array["chunk_grid"]["configuration"]["chunk_shape"] = [20, 32, 32]
    (store / "0/zarr.json").write_text(json.dumps(array))
    with pytest.raises(InputError, match=r"is no longer the one that .*plan\.json was made for; remove the plan"):
        divide_part(
            store,
            tmp_path / "out/out.ome.zarr",
            tmp_path / "out/plan.json",
            tmp_path / "out/x.json",
            channels={"a": (0, None)},
            fields=[tmp_path / "out/field.json"],
            coarse=[tmp_path / "out/coarse.json"],
            level=0,
            part=0,
            keep_saturated=True,
            pyramid_origin="auto",
        )


def test_codec_that_is_not_there_is_one_line(tmp_path):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS)
    array = json.loads((store / "0/zarr.json").read_text())
    array["codecs"][-1]["name"] = "middle-out"
    (store / "0/zarr.json").write_text(json.dumps(array))
    with pytest.raises(InputError, match=r"cannot be opened by zarr .*middle-out.*; install the codec") as caught:
        TestCoarse().coarse(tmp_path, store)
    assert "\n" not in str(caught.value)


def test_damaged_chunk_is_one_line(tmp_path):
    store = write_store(tmp_path / "in.ome.zarr", LEVELS)
    chunk = next(path for path in (store / "0/c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(InputError, match=r"in\.ome\.zarr: cannot be read \(.*; copy it again") as caught:
        TestCoarse().coarse(tmp_path, store)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "fault"), [(OSError(5, "Input/output error"), MachineError), (MemoryError(), MemoryError)]
)
def test_what_the_machine_fails_at_is_none_of_the_stores_fault(error, fault):
    with pytest.raises(fault), arrays._reading("in.ome.zarr"):
        raise error


class TestVerify:
    STORE = "sub-01/micr/sub-01_desc-N4_SPIM.ome.zarr"

    @pytest.fixture
    def results(self, tmp_path):
        """A folder of results with one corrected store of two levels, the first in three parts, and its manifest."""
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        out = divide(tmp_path, store, some_field(), job_gb=VOLUME.nbytes / 3e9)
        results = tmp_path / "results"
        parts = results / "parts/sub-01/micr/sub-01_SPIM"
        parts.mkdir(parents=True)
        for path in [tmp_path / "plan.json", *tmp_path.glob("level-*.json")]:
            path.rename(parts / path.name)
        (results / self.STORE).parent.mkdir(parents=True)
        out.rename(results / self.STORE)
        (tmp_path / "out.json").rename(results / self.STORE.replace(".ome.zarr", ".json"))
        files = [results / self.STORE.replace(".ome.zarr", ".json"), results / self.STORE / "zarr.json"]
        write_manifest(results / "manifest.json", {"sub-01_SPIM": files}, [])
        return results

    def parts(self, results):
        return results / "parts/sub-01/micr/sub-01_SPIM"

    def change(self, results, level=1):
        zarr.open_array(results / self.STORE / str(level), mode="r+")[0, 0, 0] += 1

    def test_nothing_has_changed(self, results):
        assert verify_voxels(results, results) == ([], [])

    def test_voxels_that_have_changed(self, results):
        self.change(results)
        (line,), notes = verify_voxels(results, results)
        assert line.endswith("N4_SPIM.ome.zarr: the voxels of level 1 have changed (1 units: 0.0.0)")
        assert notes == []

    def test_a_chunk_that_is_damaged_or_gone(self, results):
        (results / self.STORE / "0/c/0/0/0").write_bytes(b"damaged")
        (results / self.STORE / "0/c/1/1/1").unlink()
        (line,), _ = verify_voxels(results, results)
        assert "the voxels of level 0 have changed (2 units: 0.0.0 1.1.1)" in line

    @pytest.mark.parametrize("gone", ["level-1_part-0.json", "plan.json"])
    def test_where_no_part_tells_of_units_it_says_so_and_finds_what_has_changed(self, results, gone):
        (self.parts(results) / gone).unlink()
        wrong, notes = verify_voxels(results, results)
        assert wrong == []
        assert "sub-01_SPIM: of 4 of 4 units of level 1 no part tells; they were compared by the digest" in notes[-1]
        self.change(results)
        (line,), _ = verify_voxels(results, results)
        assert line.endswith("the voxels of level 1 have changed (nothing says which units)")

    @pytest.mark.parametrize(
        "damaged", ['{"a":1}', "[1]", "7", "null", "no JSON", '{"Units":{"0.0.0":"abc"}}', '{"Units":["a"]}']
    )
    @pytest.mark.parametrize("name", ["level-1_part-0.json", "plan.json"])
    def test_a_part_or_plan_that_is_damaged_is_told_and_the_voxels_are_compared_all_the_same(
        self, results, name, damaged
    ):
        (self.parts(results) / name).write_text(damaged)
        self.change(results)
        (one, other), notes = verify_voxels(results, results)
        assert f"{name}: cannot be read" in one
        assert other.endswith("the voxels of level 1 have changed (nothing says which units)")
        assert "of 4 of 4 units of level 1 no part tells" in notes[-1]

    def test_parts_of_other_voxels_than_the_sidecar_tells_of(self, results):
        part = self.parts(results) / "level-0_part-2.json"
        told = json.loads(part.read_text())
        place = next(iter(told["Units"]))
        told["Units"][place] = "0 0"
        part.write_text(json.dumps(told))
        (line,), _ = verify_voxels(results, results)
        assert "sub-01_SPIM: the parts of level 0 tell of other voxels than sub-01_desc-N4_SPIM.json" in line

    def test_voxels_and_parts_that_were_changed_together(self, results):
        self.change(results)
        part = self.parts(results) / "level-1_part-0.json"
        told = json.loads(part.read_text())
        image = read_image(results / self.STORE)
        after = dict(arrays.unit_digests(image, image.levels[1], told["Units"]))
        told["Units"] = {place: f"{digests.split()[0]} {after[place]}" for place, digests in told["Units"].items()}
        part.write_text(json.dumps(told))
        (line,), _ = verify_voxels(results, results)
        assert line.endswith("the voxels of level 1 have changed (nothing says which units)")

    def test_a_store_or_a_sidecar_that_is_gone(self, results):
        sidecar = results / self.STORE.replace(".ome.zarr", ".json")
        kept = sidecar.read_text()
        sidecar.unlink()
        (line,), _ = verify_voxels(results, results)
        assert "sub-01_desc-N4_SPIM.json: is not there" in line
        sidecar.write_text("{}")
        (line,), _ = verify_voxels(results, results)
        assert "sub-01_desc-N4_SPIM.json: cannot be read" in line
        sidecar.write_text(kept)
        manifest = (results / "manifest.json").rename(results.parent / "other.json")
        shutil.rmtree(results / self.STORE)
        (line,), _ = verify_voxels(results, manifest)
        assert "N4_SPIM.ome.zarr: is not there" in line

    def test_the_command_ends_with_1_where_voxels_have_changed_and_tells_of_parts_that_are_gone(self, results, capsys):
        (self.parts(results) / "level-1_part-0.json").unlink()
        for status in (0, 1):
            with pytest.raises(SystemExit) as end:
                cli.main(["verify", "--deep", str(results), str(results)])
            assert end.value.code == status
            assert "of level 1 no part tells" in capsys.readouterr().err
            self.change(results)


class TestOneStore:
    def test_from_store_to_store(self, tmp_path):
        channels = [np.stack([level, level // 9]) for level in LEVELS]
        store = write_store(tmp_path / "in.ome.zarr", channels, axes="czyx", labels=("auto", "cFos"), scale_um=SCALE_UM)
        out = tmp_path / "out.ome.zarr"
        correct_store(store, out, field_from="auto", level_voxels=VOLUME.size // 2, threads=2, device="cpu")
        image = read_image(out)
        assert (image.levels, image.attributes) == (read_image(store).levels, read_image(store).attributes)
        field = load_field(tmp_path / "out_channel-0_biasfield.json")
        for level, before, after in zip(image.levels, channels, voxels(out), strict=True):
            shape, affine = image.grid(level)
            ratio = np.exp(field.on_grid(shape, np.array(affine)).log_tile((slice(None),) * 3)).T
            assert (after != np.rint(before / ratio)).mean() < 1e-4
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"in.ome.zarr", "out.ome.zarr", "out.json", "out_channel-0_biasfield.json"}
        told = json.loads((tmp_path / "out.json").read_text())
        facts = told["N4"]["channel 0"]
        assert N4Parameters.from_mapping(facts["Parameters"]) == N4Parameters()
        assert {line["Stage"] for line in facts["History"]} == set(range(1, 7))
        assert facts["Mask"] == {"method": "otsu", "percentile": 50.0}
        assert told["Sources"] == ["in.ome.zarr"]
        assert json.loads((tmp_path / "out_channel-0_biasfield.json").read_text())["Sources"] == ["in.ome.zarr"]

    def test_what_is_there_is_not_replaced(self, tmp_path):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        there = write_store(tmp_path / "there.ome.zarr", LEVELS)
        with pytest.raises(InputError, match=r"there\.ome\.zarr: is there already; remove it, or give another name"):
            correct_store(store, there)
        assert_array_equal(voxels(there)[0], VOLUME)

    @pytest.mark.parametrize("fails", ["divide_part", "describe_store", "finish_store"])
    def test_half_a_store_does_not_stay_nor_what_lies_beside_it(self, tmp_path, monkeypatch, fails):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        monkeypatch.setattr(f"n4flow.steps.store.{fails}", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            correct_store(store, tmp_path / "out.ome.zarr", level=1)
        assert [path.name for path in tmp_path.iterdir()] == ["in.ome.zarr"]

    def test_the_command_does_the_same(self, tmp_path, capsys):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        config = {"zarr": {"level": 1, "offset": 2, "job_gb": 1e-4, "other_channels": "copy"}}
        config |= {"n4": {"preset": "fixed"}, "mask": {"method": "percentile"}}
        (tmp_path / "c.yaml").write_text(json.dumps(config | {"samples": "a.tsv"}))
        correct_store(
            store, tmp_path / "a.ome.zarr", level=1, offset=2, parameters=config["n4"], mask_method="percentile"
        )
        cli.main(["correct", str(store), str(tmp_path / "b.ome.zarr"), "--config", str(tmp_path / "c.yaml")])
        for one, other in zip(voxels(tmp_path / "a.ome.zarr"), voxels(tmp_path / "b.ome.zarr"), strict=True):
            assert_array_equal(one, other)
        assert "zarr.other_channels: copy counts for sheets alone" in capsys.readouterr().err
        for option in ("--weights", "--bias-field", "--report"):
            with pytest.raises(SystemExit, match=f"OME-Zarr image, for which there is no {option}; leave it out"):
                cli.main(["correct", str(store), str(tmp_path / "c.ome.zarr"), option, str(tmp_path / "x.nii.gz")])

    @pytest.mark.parametrize(
        ("output", "config", "message"),
        [
            ("in.ome.zarr", None, r"in\.ome\.zarr: would be overwritten, and goes in; give another name"),
            ("in.ome.zarr/out.ome.zarr", None, r"is the input, or lies in it; give another place"),
            ("no/out.ome.zarr", None, r"cannot be written \(its folder is not there\); make it: mkdir -p "),
            ("m.ome.zarr", "m.json", r"m\.json: would be overwritten, and goes in"),
        ],
    )
    def test_the_command_sees_first_what_would_be_overwritten(self, tmp_path, output, config, message):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
        if config:
            (tmp_path / config).write_text("{}")
        with pytest.raises(SystemExit, match=message):
            cli.main(
                [
                    "correct",
                    str(store),
                    str(tmp_path / output),
                    *(["--config", str(tmp_path / config)] if config else []),
                ]
            )
        assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before

    def test_a_pedestal_of_a_channel_that_is_not_there(self, tmp_path):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        with pytest.raises(
            InputError, match=r"zarr.offset: names channels that no image has: GPF; give labels or numb"
        ):
            correct_store(store, tmp_path / "out.ome.zarr", offset={"0": 1, "GPF": 100})

    @pytest.mark.parametrize("output", ["in.ome.zarr", "in.ome.zarr/out.ome.zarr", "out.nii.gz", "out.ozx"])
    def test_what_is_no_place_for_it(self, tmp_path, output):
        store = write_store(tmp_path / "in.ome.zarr", LEVELS, scale_um=SCALE_UM)
        with pytest.raises(InputError, match=r"is the input, or lies in it|is no name of an OME-Zarr folder"):
            correct_store(store, tmp_path / output)
        assert read_image(store)


def test_the_examples_of_the_manual(tmp_path, monkeypatch, pytestconfig):
    text = (pytestconfig.rootpath / "docs/microscopy.md").read_text(encoding="utf-8")
    whole, by_block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    levels = [VOLUME, binned(VOLUME), binned(VOLUME, (4, 4, 4))]
    channels = [np.stack([np.rint(level).astype(np.uint16)] * 2) for level in levels]
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "in.ome.zarr", channels, axes="czyx", labels=("autofluorescence", "b"), scale_um=(8, 8, 8))
    exec(whole, {})
    assert read_image("out.ome.zarr").channels == 2
    shutil.rmtree("in.ome.zarr")
    write_store(tmp_path / "in.ome.zarr", [np.rint(level).astype(np.uint16) for level in levels], scale_um=(2, 2, 2))
    names = {}
    exec(by_block, names)
    assert names["corrected"].shape == names["levels"][0][names["block"]].shape
    assert 0.01 < np.std(np.log(names["fine"].ratio_tile((slice(None),) * 3))) < 1


#: A part divided in a process of its own: what it is told stands in a file.
STEP = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
told = json.load(open(sys.argv[2]))
from n4flow.steps import pyramid
if limit := told.pop("limit", 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    getattr(pyramid, told.pop("step"))(**told)
except pyramid.InputError as error:
    sys.exit(str(error))
"""


class TestFaults:
    @pytest.fixture
    def parts(self, tmp_path):
        """What divides a store of one level with fine chunks, after a whole run."""
        store = write_store(tmp_path / "in.ome.zarr", [VOLUME], chunks=(4, 8, 90), scale_um=SCALE_UM)
        out = divide(tmp_path, store, some_field())
        return {
            "step": "divide_part",
            "store": str(store),
            "target": str(out),
            "plan": str(tmp_path / "plan.json"),
            "output": str(tmp_path / "level-0_part-0.json"),
            "channels": {"sub-01_SPIM": (0, None)},
            "fields": [str(tmp_path / "field.json")],
            "coarse": [str(tmp_path / "coarse.json")],
            "level": 0,
            "part": 0,
            "keep_saturated": True,
            "pyramid_origin": "auto",
        }

    def start(self, tmp_path, told):
        (tmp_path / "told.json").write_text(json.dumps(told))
        command = [sys.executable, "-c", STEP, PACKAGE.parent, tmp_path / "told.json"]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def test_killed_while_it_divides(self, tmp_path, parts):
        out = tmp_path / "out.ome.zarr"
        before = {path: path.read_bytes() for path in (out / "0").rglob("*") if path.is_file()}
        shutil.rmtree(out / "0/c")
        process = self.start(tmp_path, parts)
        end = time.monotonic() + 120
        while not (out / "0/c").exists() or sum(1 for _ in (out / "0/c").rglob("*")) < 20:
            assert process.poll() is None
            assert time.monotonic() < end
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()
        chunks = {path for path in (out / "0/c").rglob("*") if path.is_file() and path.suffix != ".partial"}
        assert 0 < len(chunks) < len(before) - 1
        with pytest.raises(InputError, match=r"holds neither zarr\.json nor \.zattrs"):
            read_image(out)
        # and again, with what was left half-written
        process = self.start(tmp_path, parts)
        assert (process.wait(), process.stderr.read()) == (0, "")
        process.stderr.close()
        finish_store(parts["store"], out, tmp_path / "out.json", out / "zarr.json", pyramid_origin="auto")
        assert {path: path.read_bytes() for path in (out / "0").rglob("*") if path.is_file()} == before

    def test_no_room(self, tmp_path, parts):
        (tmp_path / "level-0_part-0.json").unlink()
        process = self.start(tmp_path, {**parts, "limit": 500})
        message = process.communicate()[1]
        assert process.returncode == 1
        assert re.fullmatch(r".*cannot be written \(File too large\); raise the limit .*\n", message)
        assert not (tmp_path / "level-0_part-0.json").exists()
        assert not (tmp_path / "out.ome.zarr/zarr.json").exists()

    def test_killed_before_the_root_metadata_are_there(self, tmp_path, parts, monkeypatch):
        """Of NGFF 0.4, the group's file is written before the attributes, without which a reader finds no image."""
        store = write_store(tmp_path / "old/in.ome.zarr", [VOLUME], version="0.4", scale_um=SCALE_UM)
        out = divide(tmp_path / "old", store, some_field())
        pyramid.hide(out)
        assert not list(out.glob(".z*"))
        told = tmp_path / "old/out.json"

        def killed(path, content):
            if path.name == ".zattrs":
                raise KeyboardInterrupt
            write_json(path, content)

        monkeypatch.setattr(pyramid, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            finish_store(store, out, told, out / ".zattrs", pyramid_origin="auto")
        with pytest.raises(InputError, match="holds neither"):
            read_image(out)
