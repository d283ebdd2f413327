import json
import re
from itertools import permutations
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import BiasField, InputError
from n4flow.core.bspline import expand
from n4flow.core.field import Mesh
from n4flow.images.fields import load_field, save_field


@pytest.fixture
def field():
    shape = (30, 25, 20)
    mesh = Mesh.of_distance(shape, (2.0, 2.0, 3.0), 20.0)
    lattice = np.random.default_rng(3).normal(0, 0.3, mesh.lattice_shape)
    return BiasField(lattice, mesh, shape, np.diag([2.0, 2, 3, 1]))


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(field, tmp_path):
    save_field(field, tmp_path / "field.json", Sources=["x"])
    assert json.loads((tmp_path / "field.json").read_text())["Sources"] == ["x"]
    again = load_field(tmp_path / "field.json")
    assert_array_equal(again.lattice, field.lattice)
    assert again.mesh == field.mesh
    assert again.image_shape == field.image_shape
    assert_array_equal(again.affine, field.affine)


@pytest.mark.parametrize(
    "mutate",
    [
        lambda content: content.update(Format="something else"),
        lambda content: content.pop("Lattice"),
        lambda content: content["Lattice"].pop(),
        lambda content: content.update(Lattice="cos\nsystem"),
        lambda content: content.update(Spans=[1, 1]),
        lambda content: content.update(VoxelToMesh=[[1, 0], [0, 1]]),
        lambda content: content.update(VoxelToMesh=np.diag([1.0, 0, 1, 1]).tolist()),
        lambda content: content.update(VoxelToMesh=np.diag([1.0, np.nan, 1, 1]).tolist()),
        lambda content: content.update(VoxelToMesh=np.diag([1.0, 1, 1, 2]).tolist()),
        lambda content: content["Affine"].pop(),
        lambda content: content.pop("VoxelToMesh"),
        lambda content: content.pop("HasSpatialReference"),
        lambda content: content.update(HasSpatialReference="no"),
        lambda content: content.update(Lattice=np.full(np.shape(content["Lattice"]), "1").tolist()),
        lambda content: content["Lattice"][0][0].__setitem__(0, np.nan),
        lambda content: content.update(Affine=np.diag([1e400, 1, 1, 1]).tolist()),
        *(
            lambda content, key=key, value=value: content[key].__setitem__(1, value)
            for key in ("Spans", "MeshStartVoxel", "SpanVoxels", "ImageShape")
            for value in (np.nan, np.inf, 10**400, "2", None, [2])
        ),
        *(
            lambda content, key=key, change=change: change(content[key])
            for key in ("Spans", "MeshStartVoxel", "SpanVoxels", "ImageShape")
            for change in (list.pop, lambda values: values.append(1))
        ),
        *(
            lambda content, key=key, value=value: content[key].__setitem__(0, value)
            for key, values in {"SpanVoxels": (0, -1.5), "Spans": (-3, 3.5), "ImageShape": (0, -4, 20.5)}.items()
            for value in values
        ),
    ],
)
def test_a_file_that_holds_no_field_is_refused(field, tmp_path, mutate):
    content = field.to_mapping()
    mutate(content)
    path = tmp_path / "field.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"field\.json: is no n4flow bias field"):
        load_field(path)


@pytest.mark.parametrize(
    "content", [b"[" * 10**6, b"[]", b"7", b"null", b"\xff"], ids=lambda content: content[:5].hex()
)
def test_a_file_that_holds_no_object_is_refused(tmp_path, content):
    path = tmp_path / "field.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"field\.json: is no n4flow bias field"):
        load_field(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no n4flow bias field"):
        load_field(tmp_path / "nothing.json")


def test_tiles_of_any_size_have_the_bits_of_the_whole(field):
    whole = field.ratio_tile((slice(None),) * 3)
    assert whole.shape == field.image_shape
    assert whole.dtype == np.float32
    for planes in (1, 3, 7, 20):
        tiles = [field.ratio_tile((slice(None), slice(None), slice(k, k + planes))) for k in range(0, 20, planes)]
        assert_array_equal(np.concatenate(tiles, axis=2), whole)


def test_it_can_be_evaluated_between_the_voxels(field):
    halves = [np.arange(0, n - 0.5, 0.5) for n in field.image_shape]
    fine = field.log_at(halves)
    coarse = field.log_tile((slice(None),) * 3)
    assert_allclose(fine[::2, ::2, ::2], coarse, atol=1e-12)
    # between two voxels a smooth function lies near their mean
    assert np.abs(fine[1::2, ::2, ::2] - (coarse[1:] + coarse[:-1]) / 2).max() < 0.05


def test_a_constant_moves_the_whole_field(field):
    tile = (slice(3, 9),) * 3
    assert_allclose(field.shifted(0.25).log_tile(tile), field.log_tile(tile) + 0.25, atol=1e-12)


# ---------------------------------------------------------------- on the grid of another image


SHAPE = (30, 25, 20)

#: Voxel sizes, a turn and a shift: nothing in it is a round number.
OBLIQUE = np.array(
    [[1.9, -0.31, 0.12, -20.5], [0.34, 1.87, -0.2, 13.25], [-0.1, 0.24, 2.96, 7.125], [0, 0, 0, 1]], dtype=float
)


def random_field(shape=SHAPE, affine=None, seed=3):
    affine = np.diag([2.0, 2, 3, 1]) if affine is None else affine
    mesh = Mesh.of_distance(shape, np.linalg.norm(affine[:3, :3], axis=0), 20.0)
    return BiasField(np.random.default_rng(seed).normal(0, 0.3, mesh.lattice_shape), mesh, shape, affine)


def at_world(field, points):
    """Log field at points in world coordinates, one by one, by the Cox-de Boor recursion."""

    def weight(m, spans, p):
        if spans == 0:
            return float(m == 0)
        x = np.clip(p, 0, spans) - m + 3  # from the first of this control point's five knots, in spans

        def spline(degree, x):
            if degree == 0:
                return float(0 <= x < 1)
            return (x * spline(degree - 1, x) + (degree + 1 - x) * spline(degree - 1, x - 1)) / degree

        return spline(3, x)

    values = []
    for point in points:
        voxel = (np.linalg.inv(field.affine) @ [*point, 1])[:3]
        p = (voxel - field.mesh.start) / field.mesh.span_voxels
        rows = [
            [weight(m, s, q) for m in range(n)]
            for n, s, q in zip(field.lattice.shape, field.mesh.spans, p, strict=True)
        ]
        values.append(np.einsum("ijk,i,j,k", field.lattice, *rows))
    return np.array(values)


def some_voxels(shape, count=40, seed=0):
    voxels = np.random.default_rng(seed).integers(0, shape, (count, 3))
    return np.concatenate([voxels, list(np.ndindex(2, 2, 2)) * (np.array(shape) - 1)])


def assert_follows_world_coordinates(field, shape, affine, atol=1e-9):
    """The whole field on another grid against its values at the world coordinates of some voxels."""
    there = field.on_grid(shape, affine)
    whole = there.log_tile((slice(None),) * 3)
    assert whole.shape == tuple(shape)
    assert whole.flags.f_contiguous
    voxels = some_voxels(shape)
    points = voxels @ affine[:3, :3].T + affine[:3, 3]
    assert_allclose(whole[tuple(voxels.T)], at_world(field, points), atol=atol)
    assert_allclose(there.log_at([np.arange(n) for n in shape]), whole, atol=1e-12)
    halves = [np.arange(n - 1) + 0.5 if n > 1 else np.zeros(1) for n in shape]
    points = np.array([h[len(h) // 2] for h in halves]) @ affine[:3, :3].T + affine[:3, 3]
    between = there.log_at(halves)[tuple(len(h) // 2 for h in halves)]
    assert_allclose(between, at_world(field, [points])[0], atol=atol)
    return there


def turned(affine, shape, order, flips, scale=(1.0, 1.0, 1.0), shift=(0.0, 0.0, 0.0)):
    """Shape and affine of a grid over an image: its axes in another order, flipped, scaled and moved."""
    to_image = np.eye(4)
    to_image[:3, :3] = 0
    for axis, image_axis in enumerate(order):
        to_image[image_axis, axis] = scale[axis] * (-1 if flips[axis] else 1)
        to_image[image_axis, 3] = (shape[image_axis] - 1 if flips[axis] else 0) + shift[axis]
    return tuple(int(shape[a] / s) for a, s in zip(order, scale, strict=True)), affine @ to_image


@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 3, 1]), OBLIQUE], ids=["upright", "oblique"])
def test_on_its_own_grid_it_has_the_same_bits(affine):
    field = random_field(affine=affine)
    again = field.on_grid(SHAPE, affine.copy())
    assert_array_equal(again.voxel_to_mesh, np.eye(4))
    for tile in ((slice(None),) * 3, (slice(3, 9), slice(0, 4), slice(7, 8))):
        assert_array_equal(again.log_tile(tile), field.log_tile(tile))
        # as the field was evaluated before it knew of other grids
        bases = [b[part] for b, part in zip(field.mesh.bases([np.arange(n) for n in SHAPE]), tile, strict=True)]
        assert_array_equal(field.log_tile(tile), expand(field.lattice.T, bases[::-1]).T)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 3, 1]), OBLIQUE], ids=["upright", "oblique"])
def test_on_turned_flipped_and_scaled_grids_it_follows_world_coordinates(affine, order):
    field = random_field(affine=affine)
    flips = [(sum(order[:2]) + axis) % 2 for axis in range(3)]
    shape, there = turned(affine, SHAPE, order, flips, scale=(0.5, 1.25, 0.8), shift=(0.25, -0.3, 0.7))
    seen = assert_follows_world_coordinates(field, shape, there)
    assert seen._mesh_axes == order  # the fast way


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_along_the_axes_of_another_grid_it_is_the_same_field(order):
    field = random_field()
    flips = [(sum(order[:2]) + axis) % 2 for axis in range(3)]
    shape, there = turned(field.affine, SHAPE, order, flips, scale=(0.5, 1.25, 0.8), shift=(0.25, -0.3, 0.7))
    seen = field.on_grid(shape, there)
    along = seen.along_image(4)
    assert_array_equal(along.voxel_to_mesh, np.eye(4))
    assert_allclose(along.log_tile((slice(None),) * 3), seen.log_tile((slice(None),) * 3), atol=1e-9)


def test_along_the_axes_of_an_oblique_grid_it_is_nearly_the_same_field():
    rng = np.random.default_rng(3)
    mesh = Mesh.of_grid(SHAPE, (2, 2, 2))
    field = BiasField(rng.normal(0, 0.3, mesh.lattice_shape), mesh, SHAPE, np.diag([2.0, 2, 3, 1]))
    seen = field.on_grid((18, 22, 1), OBLIQUE)
    for grid in (seen, field.on_grid((18, 22, 15), OBLIQUE)):
        along = grid.along_image(12)
        assert along._mesh_axes == (0, 1, 2)
        assert_allclose(along.log_tile((slice(None),) * 3), grid.log_tile((slice(None),) * 3), atol=0.01)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.floats(-0.6, 0.6), min_size=3, max_size=3),
    st.lists(st.floats(0.5, 1.5), min_size=3, max_size=3),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_on_any_grid_it_follows_world_coordinates(angles, scale, shift):
    grid = OBLIQUE @ np.diag([*scale, 1.0])
    for axis, angle in enumerate(angles):
        a, b = (n for n in range(3) if n != axis)
        turn = np.eye(4)
        turn[[a, a, b, b], [a, b, a, b]] = (np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle))
        grid = grid @ turn
    grid[:3, 3] += shift
    # a turn that moves no voxel by a hundred-thousandth of a span is none
    assert_follows_world_coordinates(random_field(affine=OBLIQUE), (16, 12, 9), grid, atol=1e-5)


def test_two_ways_of_evaluating_agree_at_a_turn_too_small_to_see():
    field = random_field()
    turns = [1e-9, 1e-7, 1e-6, 1e-5]  # the field changes with them, but not at a stroke
    seen = []
    for angle in turns:
        grid = field.affine.copy()
        grid[:2, :2] = 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        seen.append(field.on_grid(SHAPE, grid))
    assert seen[0]._mesh_axes == (0, 1, 2)
    assert seen[-1]._mesh_axes is None
    whole = field.log_tile((slice(None),) * 3)
    for angle, turned_field in zip(turns, seen, strict=True):
        assert np.abs(turned_field.log_tile((slice(None),) * 3) - whole).max() < 1e-5 + 2 * angle


@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 3, 1]), OBLIQUE], ids=["aligned", "oblique"])
def test_tiles_have_the_bits_of_the_whole_on_any_grid(affine):
    field = random_field().on_grid((18, 22, 15), affine)
    whole = field.log_tile((slice(None),) * 3)
    for planes in (1, 4, 15):
        tiles = [field.log_tile((slice(None), slice(None), slice(k, k + planes))) for k in range(0, 15, planes)]
        assert_array_equal(np.concatenate(tiles, axis=2), whole)
    tile = (slice(5, 6), slice(2, 9), slice(3, 4))
    if field._mesh_axes is None:  # a product of matrices may hang on its other axes
        assert_array_equal(field.log_tile(tile), whole[tile])


def test_many_points_are_evaluated_as_few_are(monkeypatch):
    field = random_field().on_grid((18, 22, 15), OBLIQUE)
    whole = field.log_tile((slice(None),) * 3)
    monkeypatch.setattr("n4flow.core.field.BLOCK_POINTS", 50)
    assert_array_equal(field.log_tile((slice(None),) * 3), whole)


@pytest.mark.parametrize("shape", [(30, 25, 1), (1, 25, 20), (30, 1, 20), (30, 1, 1)], ids=str)
@pytest.mark.parametrize("turn", [np.eye(4), OBLIQUE], ids=["upright", "oblique"])
def test_planes_and_lines_work_as_source_and_as_target(shape, turn):
    affine = turn @ np.diag([1.0, 1, 1, 1])
    flat = random_field(shape, affine)
    assert_follows_world_coordinates(flat, *turned(affine, shape, (2, 0, 1), (0, 1, 0)))
    # a finer plane of it, and the whole volume around it: the field goes on along the normal as it is
    finer = tuple(max(1, 2 * n - 1) for n in shape)
    scale = np.diag([*(0.5 if n > 1 else 1.0 for n in shape), 1.0])
    assert_follows_world_coordinates(flat, finer, affine @ scale)
    assert_follows_world_coordinates(flat, SHAPE, affine)
    assert_follows_world_coordinates(random_field(SHAPE, affine), shape, affine)
    tilted = affine @ OBLIQUE
    tilted[:3, 3] = affine[:3, 3]
    assert_follows_world_coordinates(random_field(SHAPE, affine), shape, tilted)


def test_full_resolution_level_gets_the_field_of_a_downsampled_one():
    fine = np.diag([0.5, 0.5, 1.5, 1])
    coarse = fine @ np.diag([4.0, 4, 2, 1])
    coarse[:3, 3] = fine[:3, :3] @ [1.5, 1.5, 0.5]  # a coarse voxel lies in the middle of the fine ones it is made of
    shape, fine_shape = (30, 25, 20), (120, 100, 40)
    field = random_field(shape, coarse)
    level = assert_follows_world_coordinates(field, fine_shape, fine)
    # the mean over the fine voxels of a coarse one is nearly its own value: no half voxel is lost
    means = level.log_tile((slice(None),) * 3).reshape(30, 4, 25, 4, 20, 2).mean(axis=(1, 3, 5))
    inner = (slice(2, -2),) * 3
    assert np.abs(means - field.log_tile((slice(None),) * 3))[inner].max() < 0.005


def test_a_field_can_be_brought_from_grid_to_grid():
    field = random_field()
    direct = field.on_grid((16, 12, 9), OBLIQUE)
    by_way = field.on_grid(*turned(field.affine, SHAPE, (2, 0, 1), (1, 0, 1), scale=(0.7, 0.9, 1.3)))
    again = by_way.on_grid((16, 12, 9), OBLIQUE)
    assert_allclose(again.log_tile((slice(None),) * 3), direct.log_tile((slice(None),) * 3), atol=1e-10)


@pytest.mark.parametrize("turn", [0.0, 1e-3], ids=["aligned", "oblique"])
def test_beyond_the_mesh_the_value_at_its_border_holds(turn):
    field = random_field()
    grid = field.affine.copy()
    grid[2, 0] = turn
    far = field.on_grid((300, 25, 20), grid).log_tile((slice(200, 300), slice(7, 8), slice(8, 9)))[:, 0, 0]
    end = field.mesh.start[0] + field.mesh.spans[0] * field.mesh.span_voxels[0]
    planes = 8 + turn * np.arange(200, 300) / 3  # along the third axis it goes on, being inside
    border = [field.log_at([[end], [7], [plane]])[0, 0, 0] for plane in planes]
    assert_allclose(far, border, atol=1e-12)


@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 3, 1]), OBLIQUE], ids=["aligned", "oblique"])
def test_another_space_is_refused(affine):
    elsewhere = affine.copy()
    elsewhere[:3, 3] = (1000, 0, 0)
    with pytest.raises(InputError, match=r"^sub-01_T2w: lies outside of the image .*; take the field from") as error:
        random_field().on_grid(SHAPE, elsewhere, "sub-01_T2w")
    assert "(x 99" in str(error.value)  # and where both lie


def test_next_to_nothing_in_common_is_refused():
    """Such as where the headers of two scanners have their zero in different places."""
    field = random_field()
    for share, refused in ((0.97, False), (0.99, True)):
        grid = field.affine.copy()
        grid[0, 3] += share * 60
        if not refused:
            field.on_grid(SHAPE, grid)
            continue
        with pytest.raises(InputError) as error:
            field.on_grid(SHAPE, grid, "sub-01_T2w")
        assert str(error.value).startswith(
            "sub-01_T2w: lies to 100 % outside of the image that its field was estimated"
        )


def test_a_thin_slab_beside_a_tilted_volume_is_refused():
    # its box, drawn along the axes of the other, would overlap
    grid = np.diag([2.0, 2, 3, 1])
    angle = np.pi / 4
    grid[:2, :2] = 2 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid[:3, 3] = (115, 5, 0)
    with pytest.raises(InputError, match="lies outside"):
        random_field().on_grid((4, 80, 20), grid)


@pytest.mark.parametrize("size", [40, 400])
def test_share_that_lies_outside_is_said(caplog, size):
    field = random_field()
    field.on_grid(SHAPE, field.affine @ np.diag([-1.0, 1, 1, 1]) + np.array([[0, 0, 0, 58]] + [[0] * 4] * 3))
    assert not caplog.records  # flipped in place
    grid = field.affine @ np.diag([30 / size, 1, 1, 1])
    grid[0, 3] += 15  # a quarter of the extent, 60 mm
    field.on_grid((size, 25, 20), grid, "sub-01_T2w")
    (line,) = caplog.messages
    share = np.mean(np.arange(size) * 30 / size + 7.5 > 29.5)
    found = re.match(r"sub-01_T2w: about (\d+) % of it lies outside of the image", line)
    assert int(found[1]) == pytest.approx(100 * share, abs=1)
    assert field.share_outside((size, 25, 20), grid) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "turn", "words"),
    [((300, 25, 20), 0, "about 91 %"), ((31, 25, 20), 0, "about 3 %"), (SHAPE, 0.04, "less than 1 %")],
)
def test_share_that_lies_outside_is_said_in_plain_numbers(caplog, shape, turn, words):
    field = random_field()
    grid = field.affine.copy()
    grid[:2, :2] = 2 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    grid[1, 3] -= 15 * 2 * np.sin(turn)
    grid[0, 3] += 12 * 2 * np.sin(turn)
    field.on_grid(shape, grid)
    (line,) = caplog.messages
    assert f"image: {words} of it lies outside" in line


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_field_on_another_grid_is_saved_and_loaded_to_the_last_bit(seed, aligned):
    rng = np.random.default_rng(seed)
    to_grid = np.eye(4)
    to_grid[:3, :3] = np.diag(rng.uniform(0.5, 2, 3)) if aligned else np.eye(3) + rng.normal(0, 0.1, (3, 3))
    to_grid[:3, 3] = rng.uniform(-3, 3, 3)
    field = random_field(affine=OBLIQUE, seed=seed).on_grid((9, 8, 7), OBLIQUE @ to_grid)
    with TemporaryDirectory() as folder:
        save_field(field, Path(folder) / "field.json")
        again = load_field(Path(folder) / "field.json")
    assert_array_equal(again.voxel_to_mesh, field.voxel_to_mesh)
    assert_array_equal(again.affine, field.affine)
    tile = (slice(2, 9), slice(None), slice(0, 3))
    assert_array_equal(again.log_tile(tile), field.log_tile(tile))


def test_a_plane_may_be_given_as_two_axes():
    field = random_field((30, 25, 1))
    there = field.on_grid((60, 50), field.affine @ np.diag([0.5, 0.5, 1, 1]))
    assert there.image_shape == (60, 50, 1)
    assert_array_equal(there.log_tile((slice(None),) * 3)[::2, ::2], field.log_tile((slice(None),) * 3))
