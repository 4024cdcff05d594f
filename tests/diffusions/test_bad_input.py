"""Messages for schedules and times that make no process."""

from __future__ import annotations

import pytest
import torch

from sdesolve.diffusions import EDM, OU, VE, VP, CosineBeta, LinearBeta, LinearDiffusion, SubVP

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearBeta(beta_min=0.0), "beta_min must be positive and finite, got 0.0"),
        (lambda: LinearBeta(beta_max=float("inf")), "beta_max must be positive"),
        (lambda: LinearBeta(t_min=1.0), "0 < t_min < t_max"),
        (lambda: CosineBeta(s=-1.0), "s must be positive"),
        (lambda: CosineBeta(t_max=1.0), "pole at t = 1"),
        (lambda: VE(sigma_min=0.0), "sigma_min must be positive"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_max must be above sigma_min"),
        (lambda: VE(sigma_max=NAN), "sigma_max must be positive"),
        (lambda: OU(rate=-1.0), "rate must be positive"),
        (lambda: OU(scale=0.0), "scale must be positive"),
        (lambda: OU(t_min=2.0, t_max=1.0), "0 < t_min < t_max"),
        (lambda: EDM(sigma_min=0.0), "0 < t_min < t_max"),
        (lambda: LinearDiffusion(lambda t: 1 - 2 * t, lambda t: t), "alpha.t. must be positive and finite; at t = 0.5"),
        (
            lambda: LinearDiffusion(torch.ones_like, lambda t: t - 0.5),
            "sigma.t. must be positive and finite; at t = 0.001",
        ),
        (lambda: LinearDiffusion(torch.ones_like, lambda t: t * NAN), "sigma.t. must be positive and finite"),
        (lambda: LinearDiffusion(torch.ones_like, lambda t: 2 - t), "must not grow with t"),
        (lambda: LinearDiffusion(torch.exp, torch.ones_like), "must not grow with t"),
        (lambda: LinearDiffusion(torch.ones_like, lambda t: t, t_min=0.0), "0 < t_min < t_max"),
    ],
)
def test_a_schedule_that_makes_no_process(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(0.1), "schedule must be an AbstractBetaSchedule"),
        (lambda: SubVP(LinearBeta), "schedule must be an AbstractBetaSchedule"),
        (lambda: VP("cosine"), r"LinearBeta\(0.1, 20\) or CosineBeta\(\), got str"),
        (lambda: LinearBeta("0.1"), "beta_min must be a number, got '0.1' of type str"),
        (lambda: LinearDiffusion(1.0, lambda t: t), "alpha must be a function of a tensor of times, got float"),
        (
            lambda: LinearDiffusion(lambda t: 1.0, lambda t: t),
            "must return a tensor of the shape of t.*torch.ones_like",
        ),
        (
            lambda: LinearDiffusion(torch.ones_like, lambda t: t.sum()),
            "sigma.t. must return a tensor of the shape of t",
        ),
    ],
)
def test_things_that_are_no_schedule(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_transition_backwards_is_refused():
    with pytest.raises(ValueError, match=r"goes forwards.*s=0.5, t=0.25"):
        VP().transition(0.5, 0.25)
    with pytest.raises(ValueError, match="goes forwards"):
        VP().transition(torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.4]))


def test_reversal_needs_a_score_and_a_positive_stochasticity():
    process = VP()
    with pytest.raises(TypeError, match="score must be a function"):
        process.reverse(None)
    with pytest.raises(ValueError, match=r"for 0 use probability_flow"):
        process.reverse(lambda x, t: x, 0.0)
    with pytest.raises(ValueError, match="positive"):
        process.reverse(lambda x, t: x, -1.0)
