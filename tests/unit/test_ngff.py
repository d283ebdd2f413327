"""OME-Zarr metadata: where voxels lie, which channel is which, and what is refused with which words."""

import json
import shutil
import zipfile

import numpy as np
import pytest

from n4flow.errors import InputError
from n4flow.images.ngff import choose_coarse, file_of, files_of, is_store, read_image
from tests.pyramids import binned, sheet_volume, write_store

VOLUME = np.rint(sheet_volume((16, 24, 32))[0]).astype(np.uint16)
PYRAMID = [VOLUME, binned(VOLUME).astype(np.uint16)]

both = pytest.mark.parametrize("version", ["0.4", "0.5"])


def edit(path, change):
    """Change the OME part of a store's root metadata."""
    file = path / "zarr.json" if (path / "zarr.json").exists() else path / ".zattrs"
    content = json.loads(file.read_text())
    change(content["attributes"]["ome"] if "attributes" in content else content)
    file.write_text(json.dumps(content))


def multiscale(change):
    return lambda ome: change(ome["multiscales"][0])


@both
def test_metadata_come_out_as_they_went_in(tmp_path, version):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID, version=version, chunks=(8, 8, 8), scale_um=(4, 2, 1))
    image = read_image(path)
    assert (image.version, image.axes, image.channels) == (version, ("z", "y", "x"), 1)
    assert [level.shape for level in image.levels] == [(16, 24, 32), (8, 12, 16)]
    assert {(level.chunks, level.unit, level.dtype) for level in image.levels} == {((8, 8, 8), (8, 8, 8), "uint16")}
    assert not image.origin_assumed
    assert not image.unit_assumed
    shape, affine = image.grid(image.levels[1])
    assert shape == (16, 12, 8)
    expected = np.diag([0.002, 0.004, 0.008, 1])
    expected[:3, 3] = [0.0005, 0.001, 0.002]  # half a voxel of level 0
    np.testing.assert_allclose(affine, expected, rtol=1e-12)


def test_a_writer_owns_a_shard(tmp_path):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID, chunks=(4, 4, 4), shards=(8, 8, 16))
    level = read_image(path).levels[0]
    assert (level.chunks, level.unit, level.unit_grid) == ((4, 4, 4), (8, 8, 16), (2, 3, 2))


@both
@pytest.mark.parametrize("kind", [None, "gaussian", "nearest"])
def test_where_a_level_lies_that_does_not_say_it(tmp_path, version, kind):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID, version=version, translations=False, kind=kind)
    centred, declared = read_image(path), read_image(path, "declared")
    shift = np.array(centred.levels[1].translation) - centred.levels[0].translation
    np.testing.assert_allclose(shift, 0 if kind == "nearest" else 0.002, atol=1e-15)
    assert centred.origin_assumed == (kind != "nearest")
    assert declared.levels[1].translation == (0, 0, 0)
    assert not declared.origin_assumed


def test_levels_of_two_and_a_half_times_the_size(tmp_path):
    levels = [np.zeros((40, 40, 40), np.uint16), np.zeros((40, 16, 16), np.uint16)]
    options = {"scale_um": (8, 2, 2), "factors": (1, 2.5, 2.5), "translations": False}
    first, second = read_image(write_store(tmp_path / "a.ome.zarr", levels, **options)).levels
    np.testing.assert_allclose(second.scale, [0.008, 0.005, 0.005])
    np.testing.assert_allclose(np.array(second.translation) - first.translation, [0, 0.0015, 0.0015])


def test_transformations_of_the_whole_follow_those_of_a_level(tmp_path):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID)
    more = [{"type": "scale", "scale": [2, 1, 1]}, {"type": "translation", "translation": [0, 0, 100]}]
    edit(path, multiscale(lambda m: m.update(coordinateTransformations=more)))
    first, second = read_image(path).levels
    np.testing.assert_allclose(first.scale, [0.008, 0.004, 0.004])
    np.testing.assert_allclose(second.translation, [0.004, 0.002, 0.102])


@pytest.mark.parametrize(
    ("unit", "mm"), [("micrometer", 1e-3), ("millimeter", 1), ("nanometer", 1e-6), ("µm", 1e-3), (None, 1e-3)]
)
def test_lengths_are_in_mm(tmp_path, unit, mm):
    scale = 0.004 / mm
    path = write_store(tmp_path / "a.ome.zarr", [VOLUME], unit=unit, scale_um=(scale,) * 3)
    image = read_image(path)
    np.testing.assert_allclose(image.levels[0].scale, 0.004)
    assert image.unit_assumed == (unit is None)


def test_order_of_space_axes_is_by_their_names(tmp_path):
    path = write_store(tmp_path / "a.ome.zarr", [VOLUME], axes="xyz", scale_um=(1, 2, 4))
    _, affine = read_image(path).grid(read_image(path).levels[0])
    np.testing.assert_allclose(np.array(affine)[:3, :3], [[0, 0, 0.001], [0, 0.002, 0], [0.004, 0, 0]])


def test_a_plane_has_a_third_axis(tmp_path):
    path = write_store(tmp_path / "a.ome.zarr", [VOLUME])
    array = json.loads((path / "0/zarr.json").read_text())
    array["shape"], array["dimension_names"] = [24, 32], ["y", "x"]
    array["chunk_grid"]["configuration"]["chunk_shape"] = [24, 32]
    (path / "0/zarr.json").write_text(json.dumps(array))

    def flatten(m):
        m["axes"] = m["axes"][1:]
        m["datasets"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [8, 4]}]

    edit(path, multiscale(flatten))
    shape, affine = read_image(path).grid(read_image(path).levels[0])
    assert shape == (32, 24, 1)
    np.testing.assert_allclose(np.diag(affine), [0.004, 0.008, 0.004, 1])


class TestChannels:
    @pytest.fixture
    def image(self, tmp_path):
        levels = [np.stack([VOLUME] * 3)]
        return read_image(write_store(tmp_path / "a.ome.zarr", levels, axes="czyx", labels=("GFP", "1", "cFos")))

    def test_a_label_comes_before_an_index(self, image):
        assert [image.channel_index(name) for name in ("GFP", "cFos", "0", "1", "2")] == [0, 2, 0, 1, 2]

    def test_none_named(self, image):
        with pytest.raises(InputError, match=r"has 3 channels; name one in the column channel: 0 GFP, 1 1, 2 cFos"):
            image.channel_index("")

    def test_unknown(self, image):
        with pytest.raises(InputError, match=r"has no channel 'cfos'; did you mean cFos\?"):
            image.channel_index("cfos")
        with pytest.raises(InputError, match=r"has no channel '7'; give one of 0 GFP"):
            image.channel_index("7")


BAD = {
    "root metadata are missing": (
        lambda p: (p / "zarr.json").unlink(),
        r"holds neither zarr\.json nor \.zattrs",
    ),
    "root of bioformats2raw": (
        lambda p: edit(p, lambda ome: ome.update({"bioformats2raw.layout": 3})),
        r"is a root of bioformats2raw.*; give one of them: .*a\.ome\.zarr/0$",
    ),
    "plate": (lambda p: edit(p, lambda ome: ome.update(plate={})), r"is a plate or a well"),
    "version 0.6": (lambda p: edit(p, lambda ome: ome.update(version="0.6")), r"is NGFF 0\.6 on zarr v3; write it"),
    "axes without types": (
        lambda p: edit(p, multiscale(lambda m: m.update(axes=["z", "y", "x"]))),
        r"is older than NGFF 0\.4",
    ),
    "mixed axes": (
        lambda p: edit(p, multiscale(lambda m: m.update(axes=m["axes"][1:2] + m["axes"][1:]))),
        r"has the axes y y x",
    ),
    "unit of some axes": (
        lambda p: edit(p, multiscale(lambda m: m["axes"][0].pop("unit"))),
        r"gives a unit to some of its space axes only",
    ),
    "unknown unit": (
        lambda p: edit(p, multiscale(lambda m: [axis.update(unit="micrometers") for axis in m["axes"]])),
        r"has the unit 'micrometers', which is not known; write micrometer",
    ),
    "implausible unit": (
        lambda p: edit(p, multiscale(lambda m: [axis.update(unit="meter") for axis in m["axes"]])),
        r"longest edge is 1\.28e\+05 mm by the unit of its axes: µm taken for mm\?",
    ),
    "no unit and implausible": (
        lambda p: edit(p, multiscale(lambda m: ([a.pop("unit") for a in m["axes"]], _scale(m, 1e-6)))),
        r"its axes have no unit, and as µm its longest edge would be",
    ),
    "extent": (
        lambda p: edit(p, multiscale(lambda m: _scale(m, 1.2, level=1))),
        r"its level 1 is 0\.0768 mm long where level 0 is 0\.064 mm",
    ),
    "affine": (
        lambda p: edit(
            p, multiscale(lambda m: m["datasets"][0].update(coordinateTransformations=[{"type": "affine"}]))
        ),
        r"has a transformation of type 'affine'",
    ),
    "complex": (lambda p: _array(p, data_type="complex64"), r"holds voxels of type complex64"),
    "level missing": (lambda p: shutil.rmtree(p / "1"), r"lacks the metadata of its level 1"),
    "no JSON": (lambda p: (p / "zarr.json").write_text("{"), r"zarr\.json: cannot be read"),
    "nonsense": (
        lambda p: edit(p, multiscale(lambda m: m.update(datasets=[{}]))),
        r"has metadata that are not understood",
    ),
    "no store": (shutil.rmtree, r"is not there"),
}


def _scale(m, factor, level=0):
    step = m["datasets"][level]["coordinateTransformations"][0]
    step["scale"] = [value * factor for value in step["scale"]]


def _array(path, **changes):
    file = path / "0/zarr.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_one_line(tmp_path, name):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID)
    change, message = BAD[name]
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@both
@pytest.mark.parametrize("inner", ["", "a.ome.zarr/"])
def test_a_zip_file_is_read_with_or_without_a_folder_in_it(tmp_path, version, inner):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID, version=version)
    packed = tmp_path / "a.ome.zarr.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for part in sorted(path.rglob("*")):
            file.write(part, f"{inner}{part.relative_to(path)}")
    assert read_image(packed).levels == read_image(path).levels
    assert file_of(packed) == str(packed)
    assert files_of(packed) == [str(packed)]


@both
def test_metadata_of_root_and_levels_tell_that_a_store_has_changed(tmp_path, version):
    path = write_store(tmp_path / "a.ome.zarr", PYRAMID, version=version)
    names = [".zattrs", "0/.zarray", "1/.zarray"] if version == "0.4" else ["zarr.json", "0/zarr.json", "1/zarr.json"]
    assert files_of(path) == files_of(f"{path}/") == [str(path / name) for name in names]
    (path / names[-1]).unlink()
    assert files_of(path) == [str(path / name) for name in names[:-1]], "what is there of it, until it is mended"
    shutil.rmtree(path)
    assert files_of(path) == [str(path / "zarr.json")]
    assert files_of("a.nii.gz") == ["a.nii.gz"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.ome.zarr", True),
        ("/data/a.ome.zarr/", True),
        ("a.zarr/0", True),
        ("a.ozx", True),
        ("a.ome.zarr.zip", True),
        ("a.nii.gz", False),
        ("zarr/a.nii", False),
        ("a.zip", False),
    ],
)
def test_what_is_a_store_is_seen_by_its_name(path, expected):
    assert is_store(path) == expected


class TestCoarse:
    def image(self, tmp_path, scale_um=(4, 4, 4)):
        return read_image(write_store(tmp_path / "a.ome.zarr", PYRAMID, scale_um=scale_um))

    @pytest.mark.parametrize(("most", "level"), [(10**6, 0), (16 * 24 * 32 - 1, 1), (8 * 12 * 16, 1)])
    def test_the_finest_that_is_small_enough(self, tmp_path, most, level):
        assert choose_coarse(self.image(tmp_path), "auto", most).level == level

    def test_the_coarsest_is_averaged_if_it_is_too_large(self, tmp_path):
        # z has voxels of twice the size, and is left as it is
        chosen = choose_coarse(self.image(tmp_path, (8, 4, 4)), "auto", 8 * 12 * 16 // 4)
        assert (chosen.level, chosen.factors, chosen.shape) == (1, (2, 2, 1), (8, 6, 8))
        expected = np.diag([0.016, 0.016, 0.016, 1])
        expected[:3, 3] = [0.006, 0.006, 0.004]
        np.testing.assert_allclose(chosen.affine, expected)

    def test_no_such_level(self, tmp_path):
        with pytest.raises(InputError, match=r"has no level 2; set zarr\.level to at most 1"):
            choose_coarse(self.image(tmp_path), 2, 100)
