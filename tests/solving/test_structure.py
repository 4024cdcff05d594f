"""What solvers take a diffusion for is checked in many states and at many times, before and during a run."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds
from sdesolve.sde import Noise
from sdesolve.solvers.base import AbstractOneStep, supports

ONES = torch.ones(6, 2, dtype=torch.float64)
COUPLED, DEPENDENT = "g_i to depend on x_i alone", "declared with noise='additive', and its diffusion depends"


def zero(x, t):
    return 0 * x


@pytest.mark.uncompiled
@pytest.mark.parametrize(
    ("g", "x0", "drift"),
    [
        (lambda x, t: 0.5 * x + t * x.flip(1), ONES, zero),
        (lambda x, t: 0.5 * x + torch.sin(2 * torch.pi * t) * x.flip(1), ONES, zero),
        (lambda x, t: x + (t - 0.9).relu() * x.sum(1, keepdim=True), ONES, zero),
        (lambda x, t: 0.5 + t * x * x.flip(1), 0 * ONES, zero),
        (lambda x, t: 0.5 * x + (x.flip(1) - 20).relu(), ONES, lambda x, t: 40 + 0 * x),
    ],
    ids=["grows with time", "0 at both ends", "late", "0 at the start", "far away"],
)
def test_coupled_components_are_seen_wherever_they_couple(g, x0, drift):
    """The run alone gets far away; fused, its last state is looked at, for no trace proves this diffusion."""
    sde = sds.SDE(drift, g, calculus="stratonovich")
    for backend in ("eager", "auto"):
        with pytest.raises(ValueError, match=COUPLED):
            sds.solve(sde, x0, 0.0, 1.0, 64, solver=sds.Milstein(), seed=0, backend=backend)


@pytest.mark.parametrize("solver", [sds.Heun(), sds.EulerMaruyama()], ids=repr)
@pytest.mark.parametrize(
    ("g", "drift"),
    [
        (lambda x, t: 0.5 * x, zero),
        (lambda x, t: 0.5 + torch.sin(2 * torch.pi * t) * x.square(), zero),
        (lambda x, t: 0.5 + (x - 20).relu(), lambda x, t: 40 + 0 * x),
        (lambda x, t: x[..., None] * torch.ones(3, dtype=x.dtype), zero),
    ],
    ids=["linear", "0 at both ends", "far away", "a matrix"],
)
def test_additive_noise_that_depends_on_the_state_is_refused(solver, g, drift):
    """Heun takes the two calculi for one and the same then: the mean of a martingale was 1.1335."""
    with pytest.raises(ValueError, match=DEPENDENT):
        sds.solve(sds.SDE(drift, g, noise="additive"), ONES, 0.0, 1.0, 64, solver=solver, seed=0, backend="eager")


RATES = torch.linspace(0.1, 1.0, 6, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    ("noise", "g"),
    [
        ("diagonal", lambda x, t: torch.cos(t) * RATES * x + 0.1 * x * x),
        ("diagonal", lambda x, t: torch.tensor(0.3, dtype=x.dtype)),
        ("diagonal", lambda x, t: (x / (t - 0.2928932)).clamp(-1, 1)),
        ("additive", lambda x, t: (RATES * torch.ones_like(x))[..., None]),
    ],
    ids=["rows", "a number", "not finite somewhere", "a matrix"],
)
def test_noise_that_is_what_it_was_declared_is_taken(noise, g):
    x = sds.solve(sds.SDE(zero, g, noise=noise), ONES, 0.0, 1.0, 4, solver=sds.Milstein(), seed=0, backend="eager").x1
    assert bool(x.isfinite().all())


class Commuting(AbstractOneStep):
    """Right for commutative noise alone, it says."""

    supported = supports(ito=tuple(Noise))
    strong_order = weak_order = 1.0
    ode_order = evaluations = 1
    commutative_noise = True

    def step(self, sde, x, span, noise):
        return x + sde.drift(x, span.t0) * span.dt + sde.diffusion_product(x, span.t0, noise.W)


TURN = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)


@pytest.mark.uncompiled
@pytest.mark.parametrize(
    ("g", "commutes"),
    [
        (lambda x, t: torch.stack([x, 2 * x], -1), True),
        (lambda x, t: torch.diag_embed(x.sin()), True),
        (lambda x, t: torch.stack([x, x @ TURN], -1), True),
        (lambda x, t: torch.stack([x, x * x], -1), False),
        (lambda x, t: torch.stack([x, torch.ones_like(x)], -1), False),
        (lambda x, t: torch.stack([x, x + (t - 0.6).relu() * x.flip(1).square()], -1), False),
    ],
    ids=["multiples", "one each", "a rotation", "nonlinear", "affine", "late"],
)
def test_a_solver_declares_that_it_needs_commutative_noise(g, commutes):
    def run():
        return sds.solve(sds.SDE(zero, g, noise="general"), ONES, 0.0, 1.0, 8, solver=Commuting(), seed=0).x1

    if commutes:
        assert bool(run().isfinite().all())
    else:
        with pytest.raises(ValueError, match=r"Commuting needs general noise that commutes"):
            run()


def test_looking_at_the_noise_moves_nothing_that_it_holds():
    """A table read by a count of calls, and numbers from torch's own generator."""
    calls = [0]

    def g(x, t):
        calls[0] += 1
        return 0.1 * calls[0] + 0.01 * torch.rand((), dtype=x.dtype)

    def steps(n):
        calls[0] = 0
        torch.manual_seed(3)
        return sds.solve(
            sds.SDE(zero, g, noise="diagonal"), ONES, 0.0, 1.0, n, solver=sds.Milstein(), seed=0, backend="eager"
        ).x1

    first = steps(9)
    assert calls[0] == 9
    assert torch.equal(first, steps(9))
