import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from n4flow import BiasField, InputError
from n4flow.field import Mesh
from n4flow.files import write_json


@pytest.fixture
def field():
    shape = (30, 25, 20)
    mesh = Mesh.of_distance(shape, (2.0, 2.0, 3.0), 20.0)
    lattice = np.random.default_rng(3).normal(0, 0.3, mesh.lattice_shape)
    return BiasField(lattice, mesh, shape, np.diag([2.0, 2, 3, 1]))


def test_saved_and_loaded_it_is_the_same_to_the_last_bit(field, tmp_path):
    write_json(tmp_path / "field.json", {"Sources": ["x"], **field.to_mapping()})
    again = BiasField.load(tmp_path / "field.json")
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
    ],
)
def test_a_file_that_holds_no_field_is_refused(field, tmp_path, mutate):
    content = field.to_mapping()
    mutate(content)
    path = tmp_path / "field.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"field\.json: is no n4flow bias field"):
        BiasField.load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no n4flow bias field"):
        BiasField.load(tmp_path / "nothing.json")


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
