"""Laws on mixtures of samplers that remember earlier steps or draw several times in one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds
from sdesolve import grids, oracle
from sdesolve.oracle.joint import TooManyError, law_at_last_noise
from sdesolve.oracle.recursion import recursion
from sdesolve.oracle.transport import MixtureLaw

EDM = sds.EDM(sigma_max=20.0)
TWO_MODES = sds.GaussianMixture(torch.tensor([[-1.0], [1.0]]), 0.25, weights=torch.tensor([1.0, 2.0]))
ANGLES = 2 * math.pi / 3 * torch.arange(3)
THREE_MODES = sds.GaussianMixture(1.2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.4)
CHURN = sds.EDMHeun(churn=8.0)


def named(v):
    if isinstance(v, sds.PredictorCorrector):
        return f"corrected-{named(v.predictor)}"
    return "-".join([type(v).__name__, *map(str, v.settings().values())]) if hasattr(v, "settings") else str(v)


# Samplers, and the random points beside the newest that have to be known for the next one.
MEMORIES = [
    (sds.EulerMaruyama(), 0),
    (CHURN, 0),
    (sds.DPM2(churn=8.0, churn_range=(0.1, 5.0)), 0),
    (sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.16), 2), 0),
    (sds.SDEDPMSolverPP2S(), 1),
    (sds.SDEDPMSolverPP(2), 1),
    (sds.PredictorCorrector(sds.SDEDPMSolverPP(2), sds.LangevinCorrector(0.16)), 1),
    (sds.SASolver(1, 1), 1),
    (sds.SDEDPMSolverPP(3), 2),
    (sds.SASolver(3, 3), 3),
]
KNOWN = [solver for solver, memory in MEMORIES if memory < 3]
WITH_MEMORY = [solver for solver in KNOWN if dict(MEMORIES)[solver]]


def to(end: float, steps: int) -> torch.Tensor:
    return grids.karras(20.0, end, steps)


def multistep(process, score, x, grid, noise):
    """From elsewhere: SDE-DPM-Solver++(2M) as k-diffusion's users know it, for ``sigma(t) = t``."""
    before = None
    for t, u in itertools.pairwise(grid):
        D, h = x + t * t * score(x, t), float(t / u)
        step = 1 - h**-2
        slope = 0.0 if before is None else 0.5 * math.log(h) / before[1] * (D - before[0])
        x = u / t / h * x + step * (D + slope) + u * math.sqrt(step) * noise()
        before = D, math.log(h)
    return x


def clipped(process, score, x, grid, noise):
    """A step that is no combination of state, score and noise, though its noise is Gaussian."""
    for t, u in itertools.pairwise(grid):
        D = (x + t * t * score(x, t)).clamp(-1.2, 1.2)
        x = D + (u / t) ** 2 * (x - D) + u * (1 - (u / t) ** 2).sqrt() * noise()
    return x


def clipped_multistep(process, score, x, grid, noise):
    return multistep(process, lambda x, t: score(x, t).clamp(-1.0, 1.0), x, grid, noise)


@pytest.mark.parametrize("process", [EDM, sds.VP()], ids=["EDM", "VP"])
@pytest.mark.parametrize(("solver", "memory"), MEMORIES, ids=named)
def test_how_much_a_sampler_remembers_is_read_off_its_runs(solver, memory, process):
    data, grid = TWO_MODES, to(0.05, 10) if process is EDM else process.time_grid(10)
    chain = recursion(oracle.as_sampler(solver), process, data, grid)
    assert chain.memory == memory
    assert len(chain.points) == 2 + 10 * solver.evaluations


@pytest.mark.parametrize("options", [{}, {"prior": True, "denoise": True}], ids=["marginals", "as users do"])
@pytest.mark.parametrize("solver", [CHURN, *WITH_MEMORY], ids=named)
def test_on_the_line_a_mixture_of_one_is_a_gaussian(solver, options):
    one, gaussian = sds.GaussianMixture(torch.tensor([[0.3]]), 0.5), sds.Gaussian(torch.tensor([0.3]), 0.25)
    found = oracle.measure(solver, EDM, one, to(0.3, 6), **options)
    assert found.standard_error == 0.0
    assert found.value == pytest.approx(oracle.error(solver, EDM, gaussian, to(0.3, 6), **options), rel=2e-6)


@pytest.mark.parametrize("solver", WITH_MEMORY, ids=named)
def test_laws_followed_are_those_of_samples(solver):
    """Against 2^16 samples of the same solver: the moments of both, and the share in the lesser mode."""
    n, grid = 1 << 16, to(0.2, 6)
    start = MixtureLaw(TWO_MODES, EDM, 20.0)
    chain = recursion(oracle.as_sampler(solver), EDM, TWO_MODES, grid)
    law = law_at_last_noise(chain, start.density, start.quantiles, (-1, 1))
    x = EDM.alpha(20.0) * TWO_MODES.sample(n, seed=1, dtype=torch.float64)
    x = x + 20.0 * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = sds.solve(EDM.reverse(TWO_MODES.score(EDM)), x, grid=grid, solver=solver, seed=3, backend="eager").x1[:, 0]
    m, v = law.mean, law.std**2
    expected = {
        "mean": (x, law.mass @ m),
        "square": (x.square(), law.mass @ (m * m + v)),
        "fourth": (x**4, law.mass @ (m**4 + 6 * m * m * v + 3 * v * v)),
        "left": ((x < 0).double(), law.mass @ torch.special.ndtr(-m / law.std)),
    }
    for name, (values, exact) in expected.items():
        assert abs(float(values.mean() - exact)) < 4 * float(values.std()) / math.sqrt(n), name


@pytest.mark.parametrize("solver", WITH_MEMORY, ids=named)
def test_finer_meshes_change_nothing(solver, monkeypatch):
    """Up to the interpolation of quantiles, whose mesh moves with the law's."""
    grid = to(0.3, 6)
    error = oracle.error(solver, EDM, TWO_MODES, grid)
    monkeypatch.setattr("sdesolve.oracle.joint._SPACING", 0.8)
    monkeypatch.setattr("sdesolve.oracle.joint._ERROR", 1e-9)
    monkeypatch.setattr("sdesolve.oracle.joint._LIGHT", 1e-13)
    assert oracle.error(solver, EDM, TWO_MODES, grid) == pytest.approx(error, rel=2e-5)


@pytest.mark.parametrize("solver", WITH_MEMORY[:1], ids=named)
def test_estimates_agree_with_quadrature_and_say_how_well(solver, monkeypatch):
    """On the line both can be had. Errors shrink as paths grow in number."""
    grid = to(0.1, 8)
    error = oracle.error(solver, EDM, TWO_MODES, grid)

    def too_many(*_):
        raise TooManyError

    monkeypatch.setattr("sdesolve.oracle.transport.law_at_last_noise", too_many)
    errors = []
    for count in (1 << 10, 1 << 14):
        monkeypatch.setattr("sdesolve.oracle.particles._COUNTS", {1: count})
        found = oracle.measure(solver, EDM, TWO_MODES, grid)
        assert abs(found.value - error) < 4 * found.standard_error
        errors.append(found.standard_error)
    assert errors[1] < min(0.1 * error, 0.5 * errors[0])


@pytest.mark.parametrize(
    "solver", [CHURN, sds.SDEDPMSolverPP2S(), sds.SDEDPMSolverPP(2), sds.SASolver(3, 3)], ids=named
)
def test_in_the_plane_a_mixture_of_one_is_a_gaussian(solver, monkeypatch):
    monkeypatch.setattr("sdesolve.oracle.particles._COUNTS", {2: 1 << 14})
    one, gaussian, grid = sds.GaussianMixture(torch.zeros(1, 2), 0.5), sds.Gaussian(torch.zeros(2), 0.25), to(0.2, 8)

    def chain(x, noise):
        return oracle.as_sampler(solver)(EDM, gaussian.score(EDM), x, grid, noise)

    start = gaussian.moments(EDM, 20.0).cov
    v, w = float(oracle.affine_moments(chain, torch.zeros(2), start, diagonal=True).cov[0]), 0.25 + 0.04
    r2 = 2 * math.log(w / v) / (1 / v - 1 / w)
    expected = abs(math.exp(-r2 / (2 * v)) - math.exp(-r2 / (2 * w)))
    found = oracle.measure(solver, EDM, one, grid)
    assert (found.standard_error == 0.0) is (solver == CHURN)
    assert found.value == pytest.approx(expected, rel=1e-3, abs=4 * found.standard_error)
    assert found.standard_error < 0.03 * expected


def test_the_particle_law_in_the_plane_is_that_of_quadrature(monkeypatch):
    """Ancestral sampling, whose density can be followed, as if it had to be estimated."""
    grid = to(0.2, 6)
    error = oracle.error(sds.Ancestral(), EDM, THREE_MODES, grid)
    monkeypatch.setattr("sdesolve.oracle.particles._COUNTS", {2: 1 << 13})
    monkeypatch.setattr("sdesolve.oracle.recursion.Recursion.memory", 1)
    found = oracle.measure(sds.Ancestral(), EDM, THREE_MODES, grid)
    assert 0.0 < found.standard_error < 0.01 * error
    assert abs(found.value - error) < 4 * found.standard_error


@pytest.mark.parametrize("options", [{}, {"prior": True, "denoise": True}], ids=["marginals", "as users do"])
def test_a_sampler_from_elsewhere_is_measured_like_our_own(options):
    found = oracle.error(multistep, EDM, TWO_MODES, to(0.3, 6), **options)
    assert found == pytest.approx(oracle.error(sds.SDEDPMSolverPP(2), EDM, TWO_MODES, to(0.3, 6), **options), rel=1e-6)


def shifted(process, score, x, grid, noise):
    before = x
    for t, u in itertools.pairwise(grid):
        before, x = x, x + (t - u) * t * score(x, t) + 0.05 * (x - before) + 0.02 * t + 0.5 * u * noise()
    return x


def test_constants_are_kept():
    one, gaussian, grid = (
        sds.GaussianMixture(torch.tensor([[0.3]]), 0.5),
        sds.Gaussian(torch.tensor([0.3]), 0.25),
        to(0.3, 6),
    )
    expected = oracle.error(shifted, EDM, gaussian, grid)
    assert oracle.error(shifted, EDM, one, grid) == pytest.approx(expected, rel=2e-6)
    assert expected > 0.1


def test_steps_that_are_no_combinations_are_followed_if_each_is_for_itself():
    """Bounds that are wide change nothing; narrow ones do."""
    wide = sds.GaussianMixture(torch.tensor([[-0.5], [0.5]]), 0.02)
    error = oracle.error(clipped, EDM, wide, to(0.05, 8))
    assert error == pytest.approx(oracle.error(sds.Ancestral(), EDM, wide, to(0.05, 8)), rel=1e-6)
    assert oracle.error(clipped, EDM, TWO_MODES, to(0.05, 8)) != pytest.approx(
        oracle.error(sds.Ancestral(), EDM, TWO_MODES, to(0.05, 8)), rel=1e-2
    )


@pytest.mark.parametrize("solver", [sds.SDEDPMSolverPP(2)], ids=named)
def test_orders_on_a_mixture(solver):
    process = sds.EDM(sigma_min=0.3, sigma_max=5.0)
    table = oracle.convergence(
        solver, process, TWO_MODES, [48, 64, 96], grid=lambda n: grids.uniform_log_snr(process, n)
    )
    assert table.order == pytest.approx(2, abs=0.15)


def test_churn_outside_its_range_is_no_noise():
    off, grid = sds.EDMHeun(churn=8.0, churn_range=(50.0, 60.0)), to(0.1, 6)
    assert oracle.error(off, EDM, TWO_MODES, grid) == oracle.error(sds.EDMHeun(), EDM, TWO_MODES, grid)
    assert oracle.error(off, EDM, THREE_MODES, grid) == oracle.error(sds.EDMHeun(), EDM, THREE_MODES, grid)


def test_estimates_are_marked_in_tables():
    table = oracle.Convergence("mine", (10, 20), (10, 20), (0.1, 0.025), (0.0, 0.001))
    first, second = str(table).splitlines()[2:4]
    assert "estimate" not in first
    assert second.endswith("estimate, +- 1.0e-03")


def reused(process, score, x, grid, noise):
    z = noise()
    for t, u in itertools.pairwise(grid):
        x = x + (t - u) * t * score(x, t) + 0.1 * u * z
    return x


def mixed(process, score, x, grid, noise):
    return (x + noise()).flip(1) - score(x, grid[0])


def mixed_on_the_way(process, score, x, grid, noise):
    for t, _ in itertools.pairwise(grid):
        x = x + score(x, t) + 0.1 * x.flip(1) * score(x, t) + 0.1 * noise()
        x = x.abs() * noise() + x
    return x


def ended_at_once(process, score, x, grid, noise):
    """Remembers, and takes its last step without noise."""
    for t, u in itertools.pairwise(grid):
        before, x = x, x + (t - u) * t * score(x, t) + u * noise()
    return x + 0.1 * score(x, grid[-1]) + 0.1 * score(before, grid[-2])


@pytest.mark.parametrize(
    ("sampler", "data", "message"),
    [
        (clipped_multistep, TWO_MODES, "depend on earlier ones or on the whole grid"),
        (mixed_on_the_way, THREE_MODES, "draws noise 2 times a step"),
        (ended_at_once, TWO_MODES, "end the grid above zero noise"),
        (ended_at_once, THREE_MODES, "end the grid above zero noise"),
    ],
)
def test_what_is_refused(sampler, data, message):
    with pytest.raises(ValueError, match=message):
        oracle.error(sampler, EDM, data, to(0.2, 5))
