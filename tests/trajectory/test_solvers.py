"""Every solver, noise type, shape, precision and direction of time: the fused trajectory is the eager one."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds

RUNS = [(dtype, span) for dtype in (torch.float32, torch.float64) for span in ((1.0, 0.0), (0.0, 1.0))]
SHAPES = [(5,), (5, 1), (5, 32), (5, 2, 3)]


def drift(x, t):
    y = x.reshape(len(x), -1)
    return (torch.tanh(y) - 0.3 * y * torch.cos(t) + 0.1 * y.flip(1)).reshape(x.shape)


def rate(t):
    return 0.3 + 0.1 * torch.sin(3 * t)


def channels(x, m):
    return torch.linspace(0.1, 0.3, m, dtype=x.dtype)


# Noise type and diffusion; matrices are square where a state has one axis of three or 32.
DIFFUSIONS = {
    "none": ("none", None),
    "additive number": ("additive", lambda x, t: 0.3),
    "additive, of time": ("additive", lambda x, t: rate(t)),
    "additive, diagonal": ("additive", lambda x, t: rate(t) * torch.ones_like(x)),
    "additive matrix": ("additive", lambda x, t: rate(t) * channels(x, 3).expand(*x.shape, 3)),
    "scalar": ("scalar", lambda x, t: rate(t) * torch.sin(x)),
    "diagonal": ("diagonal", lambda x, t: rate(t) * torch.cos(x)),
    "general": ("general", lambda x, t: rate(t) * torch.sin(x[..., None] + channels(x, 4))),
    "square": ("general", lambda x, t: rate(t) * torch.sin(x[..., None] * channels(x, x[0].numel()))),
}
SOLVERS = {
    "euler": (sds.EulerMaruyama(), "ito"),
    "milstein": (sds.Milstein(), "ito"),
    "milstein, stratonovich": (sds.Milstein(), "stratonovich"),
    "heun": (sds.Heun(), "stratonovich"),
    "rk4": (sds.RK4(), "ito"),
}


def equation(kind, calculus):
    noise, g = DIFFUSIONS[kind]
    return sds.ODE(drift) if noise == "none" else sds.SDE(drift, g, noise=noise, calculus=calculus)


def pairs():
    """Every kind of noise with Euler's steps; other solvers with their last, and all of theirs in a thorough run.

    `test_fused_is_eager` of `solving/test_orders.py` has every solver with every noise, on one shape.
    """
    for name, (solver, calculus) in SOLVERS.items():
        found = []
        for kind in DIFFUSIONS:
            sde = equation(kind, calculus)
            commutes = sde.noise != "general" or not solver.commutative_noise
            if (sde.calculus, sde.noise) in solver.supported and commutes:
                found.append((kind, sde))
        for kind, sde in found:
            rest = name != "euler" and kind != found[-1][0]
            yield pytest.param(solver, sde, id=f"{name}, {kind}", marks=[pytest.mark.thorough] if rest else [])


@pytest.mark.parametrize(("solver", "sde"), list(pairs()))
def test_fused_is_eager_step_for_step(solver, sde, both, difference, interpreted, normals):
    """Five steps of a contracting equation: each adds a few roundings at the size of the state."""
    for shape in SHAPES:
        for dtype, span in {(5, 32): RUNS[:1], (5, 1): RUNS}.get(shape, RUNS[::3]):
            fused, eager = both(sde, normals(*shape, dtype=dtype), *span, 5, solver=solver, save_at="grid")
            assert difference(fused.xs, eager.xs) < 64 * torch.finfo(dtype).eps, (shape, dtype, span)
            assert torch.equal(fused.x1, fused.xs[-1])
            assert torch.equal(fused.ts, eager.ts)
            assert fused.stats.nfe == eager.stats.nfe


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("none", torch.float64),
        ("additive matrix", torch.float64),
        ("diagonal", torch.float32),
        ("general", torch.float32),
        ("general", torch.float64),
    ],
    ids=str,
)
def test_kernels_do_what_the_plan_says(kind, dtype, both, difference, normals):
    solver, calculus = SOLVERS["milstein, stratonovich"] if kind in ("diagonal",) else SOLVERS["heun"]
    fused, eager = both(
        equation(kind, calculus), normals(131, 2, 3, dtype=dtype), 1.0, 0.0, 7, solver=solver, save_at="grid"
    )
    assert difference(fused.xs, eager.xs) < 64 * torch.finfo(dtype).eps


PROCESS = sds.VP()
CIRCLE = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)
SCORES = {
    "gaussian": sds.Gaussian(CIRCLE[0], torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=torch.float64)).score(PROCESS),
    "mixture": sds.GaussianMixture(CIRCLE, torch.full((3,), 0.4, dtype=torch.float64)).score(PROCESS),
}


def test_a_sampler_with_two_draws_a_step_goes_on_where_another_stopped(both, difference, interpreted, normals):
    noise = sds.BrownianPath(1, first_path=3, first_step=7)
    equation = PROCESS.reverse(SCORES["gaussian"])
    for solver in (
        sds.SDEDPMSolverPP2S(),
        sds.PredictorCorrector(sds.EulerMaruyama(), sds.LangevinCorrector(0.1), n=2),
    ):
        fused, eager = both(equation, normals(40, 2), 1.0, 0.05, 12, solver=solver, noise=noise)
        assert difference(fused.x1, eager.x1) < 1e4 * torch.finfo(torch.float64).eps


SAMPLERS = [
    pytest.param(sds.EulerMaruyama(), True, id="euler"),
    pytest.param(sds.Heun(), False, id="heun on the flow"),
    pytest.param(sds.RK4(), False, id="rk4 on the flow"),
    pytest.param(sds.DPMSolverPP(order=2), False, id="dpm-solver++, with memory"),
    pytest.param(sds.Ancestral(), True, id="ancestral"),
]


@pytest.mark.parametrize("score", list(SCORES.values()), ids=list(SCORES))
@pytest.mark.parametrize(("solver", "noisy"), SAMPLERS)
def test_samplers_with_exact_scores(solver, noisy, score, both, difference, interpreted, normals):
    """Steps near the data multiply errors by at most ``1 / sigma(0.05)``, about ten here."""
    equation = PROCESS.reverse(score) if noisy else PROCESS.probability_flow(score)
    fused, eager = both(equation, normals(40, 2), 1.0, 0.05, 12, solver=solver, save_at="grid")
    assert difference(fused.xs, eager.xs) < 1e4 * torch.finfo(torch.float64).eps
