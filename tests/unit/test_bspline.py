import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from n4flow.core.bspline import basis_matrix, bspline_fit, contract, expand, refine
from n4flow.core.field import Mesh

SPANS = st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 5))


@given(st.integers(1, 12), st.lists(st.floats(-3, 15), min_size=1, max_size=30))
def test_weights_are_a_partition_of_unity_with_four_neighbours(spans, coordinates):
    basis = basis_matrix(np.array(coordinates), spans)
    assert basis.shape == (len(coordinates), spans + 3)
    assert (basis >= 0).all()
    assert ((basis > 0).sum(axis=1) <= 4).all()
    assert_allclose(basis.sum(axis=1), 1, atol=1e-14)


def test_weights_at_a_knot_are_those_of_the_cubic_bspline():
    assert_allclose(basis_matrix(np.array([1.0]), 3)[0], [0, 1 / 6, 4 / 6, 1 / 6, 0, 0], atol=1e-15)


def test_a_cubic_polynomial_is_reproduced():
    # control points of x^3 follow from its blossom at three consecutive knots
    spans = 5
    knots = np.arange(-1, spans + 2, dtype=float)
    lattice = (knots - 1) * knots * (knots + 1)
    x = np.linspace(0, spans, 41)
    assert_allclose(basis_matrix(x, spans) @ lattice, x**3, atol=1e-12)


@given(SPANS, st.integers(0, 2**32 - 1))
def test_refining_does_not_change_the_function(spans, seed):
    rng = np.random.default_rng(seed)
    shape = [9 if s else 1 for s in spans]
    mesh = Mesh.of_grid(shape, spans)
    lattice = rng.standard_normal(mesh.lattice_shape)
    positions = [np.arange(n) for n in shape]
    finer = refine(lattice)
    assert finer.shape == mesh.refined().lattice_shape
    before, after = expand(lattice, mesh.bases(positions)), expand(finer, mesh.refined().bases(positions))
    assert_allclose(after, before, atol=1e-12)


@given(SPANS, st.integers(0, 2**32 - 1))
def test_contract_is_the_transpose_of_expand(spans, seed):
    rng = np.random.default_rng(seed)
    mesh = Mesh.of_grid((7, 8, 9), spans)
    bases = mesh.bases([np.arange(n) for n in (7, 8, 9)])
    values, lattice = rng.standard_normal((7, 8, 9)), rng.standard_normal(mesh.lattice_shape)
    assert_allclose((values * expand(lattice, bases)).sum(), (contract(values, bases) * lattice).sum(), atol=1e-9)


def brute_force_fit(values, weights, bases):
    """The formula of Lee, Wolberg & Shin, voxel by voxel."""
    shape = [basis.shape[1] for basis in bases]
    delta, omega = np.zeros(shape), np.zeros(shape)
    for index in np.ndindex(values.shape):
        if weights[index] == 0:
            continue
        t = np.einsum("a,b,c->abc", *(basis[i] for basis, i in zip(bases, index, strict=True)))
        delta += weights[index] * values[index] * t**3 / (t**2).sum()
        omega += weights[index] * t**2
    return np.divide(delta, omega, out=np.zeros(shape), where=omega > 0)


@settings(deadline=None, max_examples=20)
@given(SPANS, st.integers(0, 2**32 - 1))
def test_fit_is_the_formula_summed_over_the_voxels(spans, seed):
    rng = np.random.default_rng(seed)
    mesh = Mesh.of_grid((5, 6, 7), spans)
    bases = mesh.bases([np.arange(n) for n in (5, 6, 7)])
    values = rng.standard_normal((5, 6, 7))
    weights = rng.random((5, 6, 7)) * (rng.random((5, 6, 7)) > 0.5)
    values[weights == 0] = np.nan  # must not matter
    assert_allclose(bspline_fit(values, weights, bases), brute_force_fit(values, weights, bases), atol=1e-12)


def test_a_mesh_of_a_distance_is_centred_and_covers_the_image():
    mesh = Mesh.of_distance((100, 50, 1), (2.0, 1.0, 3.0), 40.0)
    assert mesh.spans == (5, 2, 0)
    assert mesh.span_voxels[:2] == (20.0, 40.0)
    assert_allclose(mesh.start[:2], (49.5 - 50, 24.5 - 40))


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_an_extent_of_k_spans_gets_k_spans(k):
    assert Mesh.of_distance((k * 10 + 1, 5, 5), (0.1, 1, 1), 1.0).spans[0] == k
