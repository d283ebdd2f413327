"""Both fits beside the formulas that they stand for, written out voxel by voxel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from n4flow.core.bspline import bspline_fit, contract, expand
from n4flow.core.field import Mesh
from n4flow.core.fit import LeeWolbergShin, PenalisedLeastSquares, normal_matrix, penalty_matrix
from tests.unit.references import dense_penalty, spline_basis

SPANS = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 5))


def grid_of(spans, seed=0, kept=0.5):
    """Basis matrices on a small grid, and weights there, many of them 0."""
    rng = np.random.default_rng(seed)
    shape = [n + 6 if n else 1 for n in spans]
    weights = rng.uniform(0.1, 1, shape) * (rng.random(shape) < kept)
    weights.flat[0] = 1
    return Mesh.of_grid(shape, spans).bases([np.arange(n) for n in shape]), weights, rng


@settings(deadline=None, max_examples=20)
@given(SPANS, st.integers(0, 2**32 - 1))
def test_the_normal_matrix_is_the_sum_over_the_voxels(spans, seed):
    bases, weights, _ = grid_of(spans, seed)
    basis = np.einsum("ia,jb,kc->ijkabc", *bases).reshape(weights.size, -1)
    assert_allclose(normal_matrix(weights, bases), (basis.T * weights.ravel()) @ basis, atol=1e-12)


@pytest.mark.parametrize("spans", [(4, 4, 4), (1, 2, 5)])
def test_the_penalty_is_the_mean_of_the_squared_third_derivatives(spans):
    lengths = (0.3, 0.5, 1.1)
    found = penalty_matrix([n + 3 for n in spans], lengths)
    assert_allclose(found, dense_penalty(spans, lengths), rtol=1e-9, atol=1e-9 * found.max())


def test_a_field_of_second_degree_costs_nothing_and_one_of_third_what_its_derivative_says():
    spans, lengths = (3, 4, 2), (0.5, 0.25, 1.0)
    penalty = penalty_matrix([n + 3 for n in spans], lengths)
    x, y, z = np.meshgrid(
        *(np.linspace(0, n, 40) * h for n, h in zip(spans, lengths, strict=True)), indexing="ij", sparse=True
    )
    basis = [spline_basis(np.linspace(0, n, 40), n) for n in spans]

    def cost(field):
        lattice = field
        for axis, matrix in enumerate(basis):
            lattice = np.moveaxis(np.tensordot(np.linalg.pinv(matrix), lattice, axes=(1, axis)), 0, axis)
        return lattice.ravel() @ penalty @ lattice.ravel()

    assert cost(1 + x - 2 * y + 3 * z + x * y - z**2 + 2 * x * x) == pytest.approx(0, abs=1e-9)
    # d3/dx3 = 6, once; of x y z, d3/dxdydz = 1, which is six of the 27 third derivatives
    assert cost(x**3 + 0 * y * z) == pytest.approx(36, rel=1e-9)
    assert cost(x * y * z) == pytest.approx(6, rel=1e-9)
    assert cost(x**2 * y + 0 * z) == pytest.approx(12, rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(SPANS, st.sampled_from([0.02, 0.2, 0.5, 1.0]), st.sampled_from([0.05, 0.2]), st.integers(0, 2**32 - 1))
def test_the_update_solves_the_penalised_equations(spans, gain, fwhm, seed):
    bases, weights, rng = grid_of(spans, seed)
    lengths = (0.3, 0.4, 0.5)
    fit = PenalisedLeastSquares(weights, bases, lengths, 1e-3)
    gathered = contract(weights * rng.normal(size=weights.shape), fit.matrices)
    lattice = fit.update(gathered, np.zeros_like(gathered), 1.0, 0.1)  # one that the fit can have come to
    gathered = contract(weights * rng.normal(size=weights.shape), fit.matrices)
    penalty = penalty_matrix([basis.shape[1] for basis in bases], lengths)
    few = 1 + 20000 * (weights.astype(float) ** 2).sum() / weights.sum() ** 2
    price = 1e-3 * gain * few * max(1, fwhm / 0.1) ** 4 * weights.sum()
    price /= np.sqrt(1 + lattice.ravel() @ penalty @ lattice.ravel() / 10)
    update = fit.update(gathered, lattice, gain, fwhm)
    # what solves them makes this as small as it can be
    system = np.clip(gain / 0.6, 0.1, 1) * normal_matrix(weights, bases) + price * penalty
    wanted = gathered.ravel() - price * penalty @ lattice.ravel()
    assert_allclose(system @ update.ravel(), wanted, atol=1e-6 * np.abs(wanted).max())


@settings(deadline=None, max_examples=20)
@given(SPANS, st.integers(0, 2**32 - 1))
def test_the_one_step_fit_is_that_of_the_public_function(spans, seed):
    bases, weights, rng = grid_of(spans, seed)
    values = rng.normal(size=weights.shape)
    fit = LeeWolbergShin(weights, bases)
    update = fit.update(contract(weights * values, fit.matrices), np.zeros(1), 1.0, 0.1)
    assert_allclose(update, bspline_fit(values, weights, bases), atol=1e-12)


def test_what_no_sample_and_no_penalty_tells_of_stays_0():
    """A parabola through the two planes of a slab, which otherwise would be whatever rounding makes it."""
    shape, spans = (20, 21, 2), (4, 4, 1)
    bases = Mesh.of_grid(shape, spans).bases([np.arange(n) for n in shape])
    weights = np.ones(shape, dtype=bool)
    fit = PenalisedLeastSquares(weights, bases, (0.3, 0.3, 0.05), 2e-6)
    assert fit.to_points.shape[1] < fit.to_points.shape[0]
    residual = np.random.default_rng(0).normal(0, 0.1, shape)
    gathered = contract(residual, bases) * (1 + np.random.default_rng(1).normal(0, 1e-7, [7, 7, 4]))  # as of float32
    update = fit.update(gathered, np.zeros(gathered.shape), 0.3, 0.1)
    assert np.abs(update).max() < 1
    between = [*bases[:2], spline_basis(np.linspace(0, 1, 9), 1)]
    assert np.ptp(expand(update, between)) < 2 * np.ptp(expand(update, bases)) + 1e-9


@pytest.mark.parametrize("kind", [bool, np.float32])
def test_blocks_of_samples_of_any_size_change_nothing_but_rounding(kind, monkeypatch):
    bases, weights, _ = grid_of((4, 3, 5))
    weights = (weights > 0.3).astype(kind)
    whole = normal_matrix(weights, bases)
    monkeypatch.setattr("n4flow.core.fit.BLOCK_SAMPLES", 1)
    assert_allclose(normal_matrix(weights, bases), whole, atol=1e-13)
