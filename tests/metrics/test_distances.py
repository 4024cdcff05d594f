"""Distances against independent formulas: SciPy's matrix functions and transport solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import normal

from sdesolve.metrics import bures_wasserstein, frechet_distance, gaussian_kl, sliced_wasserstein, wasserstein_1d

seeds = st.integers(0, 1000)
shapes = st.lists(st.integers(1, 3), min_size=0, max_size=2).map(tuple)
forms = st.sampled_from(["isotropic", "diagonal", "full"])


def draws(seed: int, *shape: int) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=201, dtype=torch.float64).reshape(shape)


def covariance(form: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    d = math.prod(shape)
    if form == "isotropic":
        return draws(seed).exp()
    if form == "diagonal":
        return draws(seed, *shape).exp()
    a = draws(seed, d, d + 1)
    return a @ a.mT


def full(cov: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    d = math.prod(shape)
    if cov.ndim == 2 and cov.shape == (d, d) and cov.shape != shape:
        return cov.numpy()
    return torch.diag(cov.reshape(-1).expand(d)).numpy()


@given(shapes, forms, forms, seeds)
def test_bures_wasserstein_is_the_trace_formula(shape, form0, form1, seed):
    m0, m1 = draws(seed, *shape), draws(seed + 1, *shape)
    c0, c1 = covariance(form0, shape, seed + 2), covariance(form1, shape, seed + 3)
    a, b = full(c0, shape), full(c1, shape)
    root = scipy.linalg.sqrtm(a)
    cross = scipy.linalg.sqrtm(root @ b @ root)
    squared = float((m0 - m1).square().sum()) + np.trace(a + b - 2 * cross).real
    assert float(bures_wasserstein(m0, c0, m1, c1)) == pytest.approx(math.sqrt(max(squared, 0.0)), rel=1e-6, abs=1e-6)
    assert float(bures_wasserstein(m1, c1, m0, c0)) == pytest.approx(
        float(bures_wasserstein(m0, c0, m1, c1)), abs=1e-12
    )


@given(shapes, seeds)
def test_the_three_forms_of_a_covariance_agree(shape, seed):
    d, m = math.prod(shape), draws(seed, *shape)
    other, variance = covariance("full", shape, seed + 1), draws(seed + 2).exp()
    same = [variance, variance.expand(shape), variance * torch.eye(d, dtype=torch.float64)]
    for distance in (bures_wasserstein, gaussian_kl):
        values = torch.stack([distance(0 * m, c, m, other) for c in same])
        torch.testing.assert_close(values, values[:1].expand(3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["isotropic", "diagonal", "full"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-10, 1e-13])
def test_tiny_distances_are_not_lost_to_cancellation(form, epsilon):
    """The trace formula, in float64, is noise below 1e-8."""
    shape = (3, 2)
    m, c = draws(0, *shape), covariance(form, shape, 1)
    # Scaling a law by 1 + e moves each point by e times itself: W = e sqrt(tr C) for a centred law.
    distance = bures_wasserstein(m, c, m, c * (1 + epsilon) ** 2)
    size = math.sqrt(np.trace(full(c, shape)))
    assert float(distance) == pytest.approx(epsilon * size, rel=1e-3, abs=1e-14 * size)
    assert float(bures_wasserstein(m, c, m, c)) < 1e-14 * size


def test_singular_laws_have_a_distance():
    line = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    zero = torch.zeros(2)
    assert float(bures_wasserstein(zero, line, zero, 0.0)) == pytest.approx(math.sqrt(2))
    assert float(bures_wasserstein(zero, line, zero, line)) < 1e-14
    assert float(bures_wasserstein(zero, 0.0, zero + 3, 0.0)) == pytest.approx(3 * math.sqrt(2))


@given(shapes, forms, forms, seeds)
def test_kl_agrees_with_torch(shape, form0, form1, seed):
    m0, m1 = draws(seed, *shape), draws(seed + 1, *shape)
    c0, c1 = covariance(form0, shape, seed + 2), covariance(form1, shape, seed + 3)
    p, q = (
        torch.distributions.MultivariateNormal(m.reshape(-1), torch.from_numpy(full(c, shape)))
        for m, c in ((m0, c0), (m1, c1))
    )
    expected = float(torch.distributions.kl_divergence(p, q))
    assert float(gaussian_kl(m0, c0, m1, c1)) == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_kl_at_the_edges():
    zero = torch.zeros(2)
    assert float(gaussian_kl(zero, 1.0, zero, 1.0)) == 0.0
    assert float(gaussian_kl(zero, torch.ones(2, 2), zero, 1.0)) == math.inf
    assert float(gaussian_kl(zero, torch.tensor([1.0, 0.0]), zero, 1.0)) == math.inf
    with pytest.raises(ValueError, match="cov1 is singular"):
        gaussian_kl(zero, 1.0, zero, torch.ones(2, 2))


@given(st.integers(1, 5), st.integers(2, 30), st.integers(2, 30), seeds)
def test_frechet_distance_is_that_of_the_fitted_gaussians(d, n, m, seed):
    a, b = draws(seed, n, d), 0.5 + 2 * draws(seed + 1, m, d)
    ca, cb = (np.cov(x.numpy(), rowvar=False).reshape(d, d) for x in (a, b))
    # A product of two positive matrices has positive eigenvalues, and the trace of its root is the sum of their roots.
    cross = np.sqrt(np.maximum(np.linalg.eigvals(ca @ cb).real, 0.0)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca) + np.trace(cb) - 2 * cross
    # With fewer rows than columns that product is singular and its tiny eigenvalues are rounding: 1e-8 after the root.
    assert float(frechet_distance(a, b)) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert float(frechet_distance(a.float(), b.float())) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_frechet_distance_of_one_law_is_the_documented_bias():
    """Means alone give tr(C) (1/n + 1/m); covariances add about d (d + 1) / 4 * (1/n + 1/m) for C = I."""
    d, n, repeats = 4, 500, 200
    values = torch.stack([frechet_distance(draws(2 * k, n, d), draws(2 * k + 1, n, d)) for k in range(repeats)])
    expected = (d + d * (d + 1) / 4) * 2 / n
    # First order in 1/n; the next is smaller by d / n, which the 3% leave room for. The rest is sampling error.
    assert abs(float(values.mean()) - expected) < 6 * float(values.std()) / math.sqrt(repeats) + 0.03 * expected


@given(st.integers(1, 12), st.integers(1, 12), seeds)
def test_wasserstein_1d_of_order_one_is_scipys(n, m, seed):
    a, b = draws(seed, n), draws(seed + 1, m)
    assert float(wasserstein_1d(a, b, p=1.0)) == pytest.approx(
        scipy.stats.wasserstein_distance(a, b), rel=1e-10, abs=1e-12
    )


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1.0, 1.5, 2.0, 3.0]), seeds)
@settings(max_examples=40)
def test_wasserstein_1d_solves_the_transport_problem(n, m, p, seed):
    a, b = draws(seed, n), draws(seed + 1, m)
    cost = (a[:, None] - b).abs().pow(p)
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    plan = scipy.optimize.linprog(
        cost.reshape(-1).numpy(),
        A_eq=np.concatenate([rows, columns]),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
    )
    assert float(wasserstein_1d(a, b, p)) == pytest.approx(plan.fun ** (1 / p), rel=1e-6, abs=1e-8)


@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_wasserstein_1d_by_column(n, m, seed):
    a, b = draws(seed, n, 3), draws(seed + 1, m, 3)
    expected = torch.stack([wasserstein_1d(a[:, j], b[:, j]) for j in range(3)])
    torch.testing.assert_close(wasserstein_1d(a, b), expected)


def test_sliced_wasserstein_of_a_shift_and_on_the_line():
    a = draws(0, 50, 2, 3)
    # Every projection of a shift v is a shift by theta . v, and E (theta . v)^2 = |v|^2 / d.
    shift = draws(1, 2, 3)
    distance = sliced_wasserstein(a, a + shift, projections=20_000)
    spread = math.sqrt(2 / 20_000)  # (theta . v)^2 d / |v|^2 has a variance below that of a squared normal, 2
    assert float(distance.square()) == pytest.approx(float(shift.square().sum()) / 6, rel=6 * spread)
    line_a, line_b = draws(2, 40), draws(3, 25)
    assert float(sliced_wasserstein(line_a, line_b, p=1.0)) == pytest.approx(float(wasserstein_1d(line_a, line_b, 1.0)))
    assert float(sliced_wasserstein(a, a)) == 0.0
    assert torch.equal(sliced_wasserstein(a, a + 1, seed=4), sliced_wasserstein(a, a + 1, seed=4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bures_wasserstein(torch.zeros(2), 1.0, torch.zeros(3), 1.0), r"one shape, got \(2,\) and \(3,\)"),
        (lambda: bures_wasserstein(torch.zeros(2), 1.0, torch.zeros(2), -1.0), "cov1 holds variances"),
        (lambda: gaussian_kl(torch.zeros(2), torch.eye(3), torch.zeros(2), 1.0), "cov0 must be a number"),
        (lambda: frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2)), r"features_a must hold at least 2"),
        (lambda: frechet_distance(torch.zeros(5, 2), torch.zeros(5, 3)), "as many features on both sides"),
        (lambda: frechet_distance(torch.zeros(5, 2, 2), torch.zeros(5, 2, 2)), "flatten images"),
        (lambda: wasserstein_1d(torch.zeros(0), torch.zeros(2)), "a must hold at least 1"),
        (lambda: wasserstein_1d(torch.zeros(3), torch.zeros(3, 2)), "columns"),
        (lambda: wasserstein_1d(torch.zeros(3), torch.tensor([math.nan])), "b must be finite"),
        (lambda: wasserstein_1d(torch.zeros(3), torch.zeros(3), p=0.5), "at least 1, got 0.5"),
        (lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 3)), "one shape"),
        (
            lambda: sliced_wasserstein(torch.zeros(3, 2), torch.zeros(3, 2), projections=0),
            "projections must be at least",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
