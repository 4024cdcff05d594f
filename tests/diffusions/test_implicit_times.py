"""Times that are found by a search, where a level of noise is: the derivatives of what they solve."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import hessian, jacfwd, jacrev

import sdesolve as sds

BETA = torch.tensor([0.1, 8.0], dtype=torch.float64)
X0 = torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)
GAUSSIAN = sds.Gaussian(torch.tensor([-1.0, 0.5]).double(), 0.5 * torch.eye(2).double())
# Values of a process whose parameters need gradients are read, to check it.
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")


def process(beta):
    def integral(t):
        return beta[0] * t + 0.5 * (beta[1] - beta[0]) * t * t

    return sds.LinearDiffusion(
        alpha=lambda t: torch.exp(-0.5 * integral(t)), sigma=lambda t: torch.sqrt(-torch.expm1(-integral(t))), t_max=1.0
    )


def exact(beta, log_snr):
    """The time: with ``B = log(1 + 1/snr)``, the root of a parabola."""
    b, a = beta[0], 0.5 * (beta[1] - beta[0])
    return (torch.sqrt(b * b + 4.0 * a * torch.log1p(torch.exp(-log_snr))) - b) / (2.0 * a)


LEVELS = torch.tensor([-2.0, 0.0, 5.0], dtype=torch.float64)


def test_the_time_of_a_level_has_its_derivatives():
    def found(beta, levels):
        return process(beta).time_at_log_snr(levels)

    torch.testing.assert_close(found(BETA, LEVELS), exact(BETA, LEVELS), rtol=1e-12, atol=0)
    beta, levels = BETA.clone().requires_grad_(), LEVELS.clone().requires_grad_()
    assert torch.equal(found(beta, levels), found(BETA, LEVELS))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def total(f, beta, levels):
        return (weights * f(beta, levels)).sum()

    ours, truth = (torch.autograd.grad(total(f, beta, levels), (beta, levels)) for f in (found, exact))
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=0)
    second = [torch.autograd.functional.hessian(lambda b, f=f: total(f, b, LEVELS), BETA) for f in (found, exact)]
    torch.testing.assert_close(*second, rtol=1e-6, atol=0)
    with forward_ad.dual_level():
        dual = found(forward_ad.make_dual(BETA, torch.ones_like(BETA)), LEVELS)
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, jacfwd(exact)(BETA, LEVELS).sum(1), rtol=1e-8, atol=0)
    for transform in (jacfwd, jacrev, hessian):
        torch.testing.assert_close(
            transform(lambda v: found(BETA, v))(LEVELS),
            transform(lambda v: exact(BETA, v))(LEVELS),
            rtol=1e-6,
            atol=1e-9,
        )


def test_there_is_none_where_there_is_no_noise():
    levels = torch.tensor([0.0, float("inf")], dtype=torch.float64, requires_grad=True)
    beta = BETA.clone().requires_grad_()
    times = process(beta).time_at_log_snr(levels)
    assert times[1] == 0
    found = torch.autograd.grad(times.sum(), (beta, levels))
    assert all(g.isfinite().all() for g in found)
    assert found[1][1] == 0


@pytest.mark.parametrize("solver", [sds.DPMSolverPP2S(), sds.DPMSolver(2), sds.DPMSolver(3), sds.EDMHeun()], ids=repr)
def test_steps_within_steps_give_schedules_their_gradients(solver):
    def loss(beta):
        p = process(beta)
        grid = torch.linspace(1.0, 0.01, 5, dtype=torch.float64)
        flow = p.probability_flow(GAUSSIAN.score(p))
        return sds.solve(flow, X0, grid=grid, solver=solver, backend="eager").x1.square().sum()

    beta = BETA.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(beta), beta)
    h = 1e-5
    differences = [(loss(BETA + h * e) - loss(BETA - h * e)) / (2.0 * h) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(gradient, torch.stack(differences), rtol=1e-6, atol=0)
