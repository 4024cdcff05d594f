"""Coefficients: moments, weights, and schemes that are exact where theory says so."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

import sdesolve as sds
from sdesolve.solvers.multistep import exponential_moments, interpolation_weights
from sdesolve.solvers.schedule import Schedule

PROCESSES = [
    *(sds.VP(), sds.VP(sds.CosineBeta()), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()),
    sds.LinearDiffusion(alpha=lambda t: 1 - t, sigma=lambda t: t, t_max=0.99),
]
EXPONENTIAL = [
    *(sds.DPMSolverPP(order) for order in (1, 2, 3)),
    *(sds.SDEDPMSolverPP(order) for order in (1, 2, 3)),
    *(sds.DPMSolver(order) for order in (1, 2, 3)),
    *(sds.UniPC(order) for order in (1, 2, 3)),
    *(sds.DPMSolverPP2S(), sds.SDEDPMSolverPP2S(), sds.SASolver(3, 3), sds.SASolver(2, 0)),
    *(sds.DDIM(), sds.DDIM(0.3), sds.Ancestral(), sds.DEIS(3), sds.LinearMultistep(4)),
    *(sds.EDMHeun(), sds.DPM2(), sds.EDMHeun(churn=5.0), sds.DPM2(churn=5.0)),
]


def ids(value):
    return type(value).__name__ if isinstance(value, sds.diffusions.base.AbstractDiffusion) else repr(value)


def equation(process, solver, score):
    if solver.weak_order is None:
        return process.probability_flow(score)
    return process.reverse(score, solver.stochasticity or 1.0)


@given(st.floats(-8.0, 40.0).filter(lambda eta: abs(eta) > 1e-9), st.integers(0, 4))
@settings(max_examples=60)
def test_exponential_moments_are_their_integrals(eta, m):
    got = float(exponential_moments(torch.tensor([eta], dtype=torch.float64), 5)[0, m])
    expected, _ = quad(lambda u: eta * math.exp(-eta * (1 - u)) * u**m, 0, 1, epsabs=1e-13, epsrel=1e-12)
    assert got == pytest.approx(expected, rel=2e-10, abs=1e-13)


@given(st.lists(st.floats(0.1, 3.0), min_size=3, max_size=3), st.floats(0.01, 5.0))
def test_interpolation_weights_integrate_polynomials(gaps, eta):
    nodes = torch.tensor([0.0, -gaps[0], -gaps[0] - gaps[1], -sum(gaps)], dtype=torch.float64)
    moments = exponential_moments(torch.tensor([eta], dtype=torch.float64), 4)
    b = interpolation_weights(nodes[None], moments)[0]
    polynomial = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    values = sum(c * nodes**m for m, c in enumerate(polynomial))
    torch.testing.assert_close(b @ values, moments[0] @ polynomial, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
@pytest.mark.parametrize("solver", EXPONENTIAL, ids=ids)
def test_data_at_one_point_is_sampled_exactly(solver, process):
    """The denoised state is constant then, and all else is integrated exactly: the marginals are right at every step.

    Noise in the wrong proportion to the drift, or scaled by another power of eta, would show.
    """
    point = torch.tensor([0.7, -2.0], dtype=torch.float64)
    data = sds.Gaussian(point, torch.zeros(2))
    grid = process.time_grid(7)
    start = data.moments(process, float(grid[0]))
    sde = equation(process, solver, data.score(process))
    chain = sds.oracle.chain_moments(sde, solver, grid, start.mean, start.cov, diagonal=True, every_step=True)
    for k, t in enumerate(grid.tolist()):
        exact = data.moments(process, t)
        torch.testing.assert_close(chain.mean[k], exact.mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(chain.cov[k], exact.cov.expand(2), rtol=1e-8, atol=1e-12)


@given(
    beta=st.tuples(st.floats(0.01, 1.0), st.floats(2.0, 30.0)),
    gaps=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=9),
    stochasticity=st.floats(0.1, 2.0),
    which=st.integers(0, 3),
)
@settings(max_examples=40)
def test_data_at_one_point_is_sampled_exactly_on_any_grid(beta, gaps, stochasticity, which):
    solver = [sds.SDEDPMSolverPP(3), sds.SDEDPMSolverPP2S(), sds.SASolver(1, 3), sds.SASolver(3, 1)][which]
    process, data = sds.VP(sds.LinearBeta(*beta)), sds.Gaussian(torch.tensor([-1.5]), torch.zeros(1))
    times = 1.0 - 0.999 * torch.tensor([0.0, *gaps], dtype=torch.float64).cumsum(0) / sum(gaps)
    start, end = (data.moments(process, float(t)) for t in (times[0], times[-1]))
    sde = process.reverse(data.score(process), stochasticity)
    chain = sds.oracle.chain_moments(sde, solver, times, start.mean, start.cov, diagonal=True)
    torch.testing.assert_close(chain.mean, end.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(chain.cov, end.cov, rtol=1e-6, atol=1e-12)


def test_eta_scales_the_standard_deviation():
    """Peers scale the variance."""
    process = sds.VP()
    times, score = process.time_grid(10), lambda x, t: -x
    noise = {eta: sds.DDIM(eta).table(process.reverse(score, eta), times).rows[0][:, -1] for eta in (0.3, 1.0)}
    torch.testing.assert_close(noise[0.3], 0.3 * noise[1.0], rtol=1e-12, atol=0)
    posterior = sds.Ancestral().table(process.reverse(score), times).rows[0]
    torch.testing.assert_close(sds.DDIM(1.0).table(process.reverse(score), times).rows[0], posterior)


def test_ancestral_sampling_is_the_posterior_of_the_chain():
    """Ho et al. 2020, eq. 7, with beta of the discrete chain; and the posterior of a sum of Gaussians (SMLD)."""
    process = sds.VP()
    times = process.time_grid(10)
    a, b, c = sds.Ancestral().table(process.reverse(lambda x, t: -x), times).rows[0].unbind(1)
    abar, abar_next = process.alpha(times[:-1]).square(), process.alpha(times[1:]).square()
    beta = 1 - abar / abar_next
    torch.testing.assert_close(a, (1 - beta).rsqrt())
    torch.testing.assert_close(b, beta * (1 - beta).rsqrt())
    torch.testing.assert_close(c.square(), beta * (1 - abar_next) / (1 - abar))
    forward = sds.Ancestral("forward").table(process.reverse(lambda x, t: -x), times).rows[0][:, -1]
    torch.testing.assert_close(forward.square(), beta)

    process = sds.EDM()
    times = process.time_grid(10)
    a, b, c = sds.Ancestral().table(process.reverse(lambda x, t: -x), times).rows[0].unbind(1)
    s, s_next = times[:-1].square(), times[1:].square()
    torch.testing.assert_close(a, torch.ones_like(a))
    torch.testing.assert_close(b, s - s_next)
    torch.testing.assert_close(c.square(), s_next * (s - s_next) / s)


def test_reverse_diffusion_mirrors_the_forward_chain():
    """Song et al. 2021, eq. 46: ``x' = (2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z`` for VP."""
    process = sds.VP()
    times = process.time_grid(10)
    a, b, c = sds.ReverseDiffusion().table(process.reverse(lambda x, t: -x), times).rows[0].unbind(1)
    beta = 1 - (process.alpha(times[:-1]) / process.alpha(times[1:])).square()
    torch.testing.assert_close(a, 2 - (1 - beta).sqrt())
    torch.testing.assert_close(b, beta)
    torch.testing.assert_close(c, beta.sqrt())


def test_edm_heun_is_the_published_algorithm():
    """Karras et al. 2022, algorithm 2, written out; the last step goes to 0 by Euler alone."""
    process, data = sds.EDM(), sds.Gaussian(torch.zeros(3), torch.tensor([1.0, 0.3, 2.0]))
    score = data.score(process)
    t = torch.cat([process.time_grid(6), torch.zeros(1, dtype=torch.float64)]).tolist()
    churn, low, high, extra = 3.0, 0.05, 10.0, 1.003
    z = sds.BrownianPath(3).increments(torch.arange(8.0), (4, 3), dtype=torch.float64)
    x = x0 = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    for k in range(7):
        gamma = min(churn / 7, 2**0.5 - 1) if low <= t[k] <= high else 0.0
        t_hat = t[k] * (1 + gamma)
        x_hat = x + (t_hat**2 - t[k] ** 2) ** 0.5 * extra * z[k]
        d = (x_hat - score.denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[k + 1] - t_hat) * d
        if t[k + 1] > 0:
            x = x_hat + (t[k + 1] - t_hat) * 0.5 * (d + (x - score.denoise(x, t[k + 1])) / t[k + 1])
    solver = sds.EDMHeun(churn, (low, high), extra)
    sol = sds.solve(
        process.reverse(score), x0, grid=torch.tensor(t, dtype=torch.float64), solver=solver, seed=3, backend="kernel"
    )
    assert sol.stats.nfe == 13
    torch.testing.assert_close(sol.x1, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_in_one_row_is_predict_evaluate_correct(variant):
    """Zhao et al. 2023, order 2, written out with the corrected state and the prediction kept apart."""
    process, data = sds.VP(), sds.Gaussian(torch.zeros(3), torch.tensor([1.0, 0.3, 2.0]))
    score, times = data.score(process), process.time_grid(8)
    alpha, sigma, lam = process.alpha(times), process.sigma(times), 0.5 * process.log_snr(times)
    h = lam.diff()
    B = h if variant == "bh1" else 1 - (-h).exp()
    y = x = x0 = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    D = []
    for k in range(8):
        D.insert(0, score.denoise(y, times[k]))
        if k:  # correct x, which so far is the state at the start of step k - 1
            linear = sigma[k] / sigma[k - 1] * x + alpha[k] * (1 - (-h[k - 1]).exp()) * D[1]
            if k == 1:
                x = linear + 0.5 * alpha[k] * B[0] * (D[0] - D[1])
            else:
                r = -h[k - 2] / h[k - 1]
                R = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
                hh = -float(h[k - 1])
                phi1 = (math.exp(hh) - 1) / hh - 1
                phi2 = phi1 / hh - 0.5
                rho = torch.linalg.solve(R, torch.tensor([phi1, 2 * phi2], dtype=torch.float64) / -B[k - 1])
                x = linear - alpha[k] * -B[k - 1] * (rho[0] * (D[2] - D[1]) / r + rho[1] * (D[0] - D[1]))
        y = sigma[k + 1] / sigma[k] * x + alpha[k + 1] * (1 - (-h[k]).exp()) * D[0]
        if k:
            y = y + 0.5 * alpha[k + 1] * B[k] * (D[0] - D[1]) * h[k] / h[k - 1]
    got = sds.solve(process.probability_flow(score), x0, grid=times, solver=sds.UniPC(2, variant), backend="kernel")
    assert got.stats.nfe == 8
    torch.testing.assert_close(got.x1, y, rtol=1e-10, atol=1e-10)


def test_deis_integrates_its_polynomial_in_time():
    """Zhang and Chen 2023, eq. 15, by adaptive quadrature: ``int prod_j (t - t_j) / (t_i - t_j) drho``."""
    process = sds.VP()
    times = process.time_grid(5)
    row = sds.DEIS(3).table(process.probability_flow(lambda x, t: -x), times).rows[0][4]
    t = times.tolist()

    def slope(u):  # d rho / dt = g^2 / (2 alpha sigma)
        return float(process.squared_diffusion(u) / (2 * process.alpha(u) * process.sigma(u)))

    def weight(i):
        others = [j for j in (4, 3, 2) if j != i]
        return lambda u: slope(u) * math.prod((u - t[j]) / (t[i] - t[j]) for j in others)

    for column, i in enumerate((4, 3, 2), start=1):
        integral, _ = quad(weight(i), t[4], t[5], epsabs=1e-12, epsrel=1e-11, limit=200)
        expected = -float(process.alpha(t[5]) * process.sigma(t[i])) * integral
        assert float(row[column]) == pytest.approx(expected, rel=1e-6)


def test_first_orders_coincide():
    process = sds.VP()
    flow, times = process.probability_flow(lambda x, t: -x), process.time_grid(9)
    ddim = sds.DDIM().table(flow, times).rows[0]
    for solver in (sds.DPMSolver(1), sds.DEIS(1), sds.LinearMultistep(1)):
        torch.testing.assert_close(solver.table(flow, times).rows[0], ddim, rtol=1e-9, atol=1e-12)
    second = [solver.table(flow, times).rows[1] for solver in (sds.DPMSolver(2), sds.DPM2())]
    torch.testing.assert_close(*second)


@pytest.mark.parametrize("process", PROCESSES, ids=ids)
def test_times_of_a_log_snr(process):
    flow, times = process.probability_flow(lambda x, t: -x), process.time_grid(20)
    p = Schedule.of(sds.DDIM(), flow, times)
    middle = 0.5 * (p.lam[1:] + p.lam[:-1])
    t = p.time_of(middle, times[:-1], times[1:])
    assert ((t < times[:-1]) & (t > times[1:])).all()
    torch.testing.assert_close(p.at(t).lam, middle, rtol=1e-9, atol=1e-9)
