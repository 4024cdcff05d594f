"""What every forward process must satisfy, for random parameters of its schedule."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdesolve import grids
from sdesolve.diffusions import (
    EDM,
    OU,
    VE,
    VP,
    AbstractDiffusion,
    CosineBeta,
    LinearBeta,
    LinearDiffusion,
    Rectified,
    SubVP,
)
from sdesolve.oracle import chain_moments
from sdesolve.sde import Calculus, Noise
from sdesolve.solvers import EulerMaruyama

# Hypothesis shrinks and prints these; repr of a process would say less.
betas = st.builds(LinearBeta, st.floats(0.01, 2.0), st.floats(2.0, 40.0)) | st.builds(CosineBeta, st.floats(1e-3, 0.1))


def power(a: float, b: float, q: float) -> LinearDiffusion:
    return LinearDiffusion(lambda t: (-a * t).exp(), lambda t: b * t**q, t_max=2.0)


def straight(b: float) -> LinearDiffusion:
    return LinearDiffusion(lambda t: 1 - t, lambda t: b * t, t_max=0.99)


closed_forms = st.one_of(
    st.builds(VP, betas),
    st.builds(SubVP, betas),
    st.builds(VE, st.floats(1e-3, 0.1), st.floats(1.0, 1e3)),
    st.builds(OU, st.floats(0.05, 4.0), st.floats(0.1, 4.0)),
    st.builds(EDM, st.floats(1e-3, 0.1), st.floats(1.0, 100.0)),
    st.builds(Rectified, st.floats(1e-3, 0.1), st.floats(0.9, 0.999)),
)
processes = (
    closed_forms
    | st.builds(power, st.floats(0.0, 3.0), st.floats(0.1, 5.0), st.floats(0.5, 2.0))
    | st.builds(straight, st.floats(0.1, 2.0))
)
fractions = st.just(0.0) | st.floats(1e-9, 1.0)  # below 1e-150 squares underflow


def double(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def at(process: AbstractDiffusion, fraction: float) -> torch.Tensor:
    return double(fraction * process.t_max)


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float, scale: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)


@given(processes, fractions, fractions)
def test_a_transition_after_a_marginal_is_a_marginal(process, u, w):
    s, t = at(process, u * w), at(process, w)
    scale, std = process.transition(s, t)
    close(scale * process.alpha(s), process.alpha(t), 1e-12)
    variance = (scale * process.sigma(s)).square() + std.square()
    close(variance, process.sigma(t).square(), 1e-12)


@given(processes, fractions)
def test_transitions_from_the_data_and_to_the_same_time(process, w):
    zero, t = double(0.0), at(process, w)
    scale, std = process.transition(zero, t)
    close(scale * process.alpha(zero), process.alpha(t), 1e-12)
    close(std, process.sigma(t), 1e-9)
    scale, std = process.transition(t, t)
    assert float(scale) == 1.0
    assert float(std) == 0.0


@given(processes, st.floats(0.01, 0.9), st.floats(1e-9, 1e-5))
def test_a_short_transition_has_the_variance_of_the_sde(process, u, step):
    s = at(process, u)
    t = s + step * process.t_max
    std = process.transition(s, t).std
    middle = 0.5 * (s + t)
    # g^2 may change by its whole size over the range, so by about `step` over this; rounding adds 1e-15 / step.
    expected = process.squared_diffusion(middle) * (t - s)
    size = process.sigma(t).square()
    torch.testing.assert_close(std.square(), expected, rtol=200 * step, atol=float(4e-15 * size))


@given(processes, st.floats(0.02, 0.98))
def test_a_short_transition_in_float32_is_as_good_as_in_float64(process, u):
    s = at(process, u).float()
    t = s + 1e-3 * process.t_max
    low, exact = process.transition(s, t), process.transition(s.double(), t.double())
    assert low.scale.dtype == low.std.dtype == torch.float32
    close(low.scale.double(), exact.scale, 1e-6)
    close(low.std.double(), exact.std, 1e-6)


@given(processes, fractions, fractions, fractions)
def test_transitions_compose(process, a, b, c):
    r, s, t = (at(process, f) for f in sorted((a, b, c)))
    first, second, both = process.transition(r, s), process.transition(s, t), process.transition(r, t)
    close(first.scale * second.scale, both.scale, 1e-12)
    variance = (second.scale * first.std).square() + second.std.square()
    close(variance, both.std.square(), 1e-11, scale=float(process.sigma(t).square()))


@given(processes, st.lists(st.floats(1e-3, 0.99), min_size=1, max_size=5))
def test_drift_and_diffusion_are_the_derivatives_of_alpha_and_sigma(process, u):
    t = (double(0.0) + torch.tensor(u, dtype=torch.float64) * process.t_max).requires_grad_()
    (d_log_alpha,) = torch.autograd.grad(process.log_alpha(t).sum() + 0.0 * t.sum(), t)
    (d_variance,) = torch.autograd.grad(process.sigma(t).square().sum(), t)
    t = t.detach()
    f, g2 = process.drift_rate(t), process.squared_diffusion(t)
    close(f, d_log_alpha, 1e-10, scale=1.0)
    # d sigma^2 / dt = 2 f sigma^2 + g^2
    size = d_variance.abs() + (2 * f * process.sigma(t).square()).abs()
    torch.testing.assert_close(
        g2 + 2 * f * process.sigma(t).square(), d_variance, rtol=0, atol=float(1e-9 * size.max())
    )


@given(closed_forms | st.just(VE(1e-4, 1e4)) | st.just(VP(LinearBeta(1e-3, 50.0))))
def test_float32_sigma_agrees_with_float64_down_to_tiny_times(process):
    """1 - exp(-B) in float32 is off by 9% at t = 1e-6 and zero at 1e-7."""
    t = torch.logspace(-7, math.log10(process.t_max), 1000, dtype=torch.float64).clamp(max=process.t_max).float()
    close(process.sigma(t).double(), process.sigma(t.double()), 1e-6)


@given(closed_forms | st.just(VE(1e-4, 1e4)))
def test_float32_coefficients_agree_with_float64(process):
    t = torch.linspace(0.0, process.t_max * (1 - 1e-6), 1000)
    low, exact = process.alpha(t).double(), process.alpha(t.double())
    # The exponent of alpha reaches log alpha, and its rounding becomes that many times the rounding of alpha.
    assert bool(((low / exact - 1).abs() <= 1e-6 * (1 + 0.2 * exact.log().abs())).all())
    close(process.drift_rate(t).double(), process.drift_rate(t.double()), 1e-6)
    close(process.squared_diffusion(t).double(), process.squared_diffusion(t.double()), 1e-6)


@given(processes, st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=8, unique=True))
def test_the_signal_to_noise_ratio_falls_and_agrees_with_its_parts(process, u):
    t = torch.tensor(sorted(u), dtype=torch.float64) * process.t_max
    snr = process.log_snr(t)
    assert bool((snr.diff() <= 1e-12).all())
    close(snr, 2 * (process.alpha(t) / process.sigma(t)).log(), 1e-9, scale=1.0)


@given(processes)
def test_the_start_is_clean_data(process):
    zero = double(0.0)
    assert float(process.alpha(zero)) == 1.0
    assert float(process.sigma(zero)) == 0.0


@given(closed_forms, st.integers(1, 40))
def test_the_default_grid_runs_from_noise_to_data(process, steps):
    grid = process.time_grid(steps)
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert float(grid[0]) == process.t_max
    assert float(grid[-1]) == process.t_min
    assert bool((grid.diff() < 0).all())


@given(closed_forms, st.integers(0, 3), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=30)
def test_shapes_and_dtypes(process, rank, dtype):
    x = torch.linspace(-1, 1, 2 * 3**rank, dtype=dtype).reshape(2, *(3,) * rank)
    assert process.noise is Noise.ADDITIVE
    assert process.calculus is Calculus.ITO
    for time_dtype in (torch.float32, torch.float64):
        for t in (torch.tensor(0.3, dtype=time_dtype), torch.tensor([0.3, 0.4], dtype=time_dtype)):
            for value in (process.alpha(t), process.sigma(t), process.log_snr(t), process.squared_diffusion(t)):
                assert value.shape == t.shape
                assert value.dtype == time_dtype
            # What acts on states has their dtype, whatever that of the time: a float64 time must not promote them.
            assert process.drift(x, t).shape == x.shape
            assert process.drift(x, t).dtype == dtype
            assert process.diffusion(x, t).dtype == dtype
            mean, std = process.marginal(x, t)
            assert mean.shape == x.shape
            assert mean.dtype == std.dtype == dtype
            assert torch.broadcast_shapes(std.shape, x.shape) == x.shape
    assert process.alpha(0.3).dtype == torch.float64


@given(closed_forms, st.integers(0, 3))
@settings(max_examples=30)
def test_the_prior_is_normal_and_addressed_by_path(process, rank):
    shape = (4, *(2,) * rank)
    x = process.sample_prior(shape, seed=3, dtype=torch.float64)
    assert x.shape == shape
    torch.testing.assert_close(process.sample_prior((2, *shape[1:]), seed=3, first_path=1, dtype=torch.float64), x[1:3])
    normal = torch.distributions.Normal(0.0, torch.tensor(process.prior.std, dtype=torch.float64))
    expected = normal.log_prob(x).reshape(4, -1).sum(1)
    torch.testing.assert_close(process.prior.log_prob(x), expected)
    assert process.prior.log_prob(x[:0]).shape == (0,)


@given(betas, st.floats(1e-4, 0.99))
def test_sub_vp_has_the_variance_of_vp_as_its_standard_deviation(schedule, u):
    """``sigma = 1 - exp(-B)`` without a root, and ``g^2 = beta (1 - exp(-2 B))``."""
    t = double(u * schedule.t_max)
    B, sub = schedule.integral(t), SubVP(schedule)
    close(sub.sigma(t), VP(schedule).sigma(t).square(), 1e-14)
    close(sub.sigma(t), 1 - (-B).exp(), 1e-10, scale=1e-5)
    close(sub.squared_diffusion(t), schedule.beta(t) * (1 - (-2 * B).exp()), 1e-10, scale=1e-4)
    close(sub.alpha(t), (-B / 2).exp(), 1e-14)


@given(st.floats(1e-3, 0.1), st.floats(1.0, 1e3), st.floats(1e-4, 1.0))
def test_the_variance_of_ve_is_the_integral_of_its_diffusion_from_zero(sigma_min, sigma_max, t):
    """``sigma_min^2 r^(2t)``, often used, is larger by sigma_min^2 at every time."""
    process = VE(sigma_min, sigma_max)
    # Gauss-Legendre with 64 points is exact to rounding for exp(a u) with a below 30.
    nodes, weights = _legendre(64)
    u, w = 0.5 * t * (nodes + 1), t * weights
    integral = (w * process.squared_diffusion(u)).sum()
    close(process.sigma(double(t)).square(), integral, 1e-10)


@functools.cache
def _legendre(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gauss-Legendre nodes on [-1, 1], and weights that add up to 1, from Golub and Welsch's matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k.square() - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0].square()


def test_an_euler_maruyama_run_of_ve_from_data_has_its_marginal():
    """Against the SDE itself: the exact variance of the chain, then a limit in the step size."""
    process = VE(0.5, 5.0)
    exact = float(process.sigma(1.0).square())
    errors = []
    for steps in (200, 400):
        chain = chain_moments(process, EulerMaruyama(), grids.uniform(0.0, 1.0, steps), 0.0, 0.0, diagonal=True)
        errors.append(float(chain.cov) - exact)
    # Order one: Richardson's combination of two chains cancels the error of each.
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.02)
    assert 2 * errors[1] - errors[0] == pytest.approx(0.0, abs=1e-4 * exact)
    assert exact == pytest.approx(5.0**2 - 0.5**2)


def test_known_values():
    assert float(VP().sigma(1.0)) == pytest.approx(math.sqrt(1 - math.exp(-10.05)))
    assert float(VP(CosineBeta(s=0.008)).alpha(0.5)) == pytest.approx(
        math.cos(0.508 / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    )
    assert float(OU().sigma(0.7)) == pytest.approx(math.sqrt(1 - math.exp(-1.4)))
    assert OU(rate=2.0, scale=3.0).prior.std == pytest.approx(1.5)
    assert float(EDM().sigma(3.0)) == 3.0
    assert float(VP().alpha(1.0)) ** 2 + float(VP().sigma(1.0)) ** 2 == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize("process", [straight(1.5), power(0.7, 2.0, 1.0)], ids=["straight", "power"])
def test_rates_of_a_time_that_samples_share(process):
    t = torch.tensor(0.4, dtype=torch.float64)
    assert torch.equal(process.drift_rate(t.expand(3)), process.drift_rate(t).expand(3))
    assert torch.equal(process.squared_diffusion(t.expand(3)), process.squared_diffusion(t).expand(3))


@given(process=processes, fraction=fractions)
def test_both_coefficients_at_once_are_those_of_two_calls(process, fraction):
    """To the bit: scores of networks take them so."""
    for t in (double(fraction * process.t_max), torch.tensor([0.0, fraction * process.t_max])):
        log_alpha, sigma = process.log_alpha_and_sigma(t)
        assert torch.equal(log_alpha, process.log_alpha(t))
        assert torch.equal(sigma, process.sigma(t))
