"""Equations with delays: exact pieces and recursions, moments, orders, gradients, and what goes on or is refused."""

from __future__ import annotations

import math

import pytest
import torch

import sdesolve as sds

ONE = torch.ones(1, 1, dtype=torch.float64)


def linear(**options):
    """``x' = -x(t - 1)`` from a past of 1."""
    return sds.DelaySDE(lambda x, t, pasts: -pasts[0], lags=1.0, **options)


def pieces(t: float) -> float:
    """Its solution by the method of steps, ``sum_k (-1)^k (t - k + 1)^k / k!`` over ``k <= floor(t) + 1``."""
    return sum((-1) ** k * (t - k + 1) ** k / math.factorial(k) for k in range(math.floor(t) + 2))


def test_heun_is_exact_while_the_solution_is_quadratic():
    sol = sds.solve(linear(), ONE, 0.0, 2.0, 4, solver=sds.Heun(), save_at="grid")
    exact = torch.tensor([pieces(float(t)) for t in sol.ts], dtype=torch.float64)
    assert (sol.xs[:, 0, 0] - exact).abs().max() < 1e-15


@pytest.mark.parametrize(("solver", "order"), [(sds.EulerMaruyama(), 1), (sds.EulerHeun(), 1), (sds.Heun(), 2)])
def test_order_on_an_equation_with_two_lags_whose_history_does_not_meet_the_start(solver, order):
    sde = sds.DelaySDE(
        lambda x, t, p: torch.sin(p[0]) * (1 + t) - x * p[1],
        lags=(0.75, 0.25), history=lambda t: torch.cos(3 * t) - 0.5,
    )  # fmt: skip
    run = [sds.solve(sde, ONE, 0.0, 2.0, n, solver=solver).x1 for n in (64, 128, 1024)]
    if order == 1:  # the reference is of second order
        run[2] = sds.solve(sde, ONE, 0.0, 2.0, 1024, solver=sds.Heun()).x1
    coarse, fine = (float((x - run[2]).abs()) for x in run[:2])
    assert abs(math.log2(coarse / fine) - order) < 0.15


def test_euler_is_its_recursion_to_the_bit():
    """Two lags, one of a single step, in both coefficients, with history, noise and parameters."""
    h, n, p = 0.125, 24, {"a": torch.tensor(0.7, dtype=torch.float64)}
    sde = sds.DelaySDE(
        lambda x, t, past, p: -p["a"] * past[0] + torch.sin(past[1]) * t,
        lambda x, t, past, p: 0.3 * past[1] + 0.1 * x,
        lags=[5 * h, h], history=lambda t, p: p["a"] * t.exp(),
    )  # fmt: skip
    x0, noise = torch.tensor([[0.4, -0.2], [1.0, 0.3]], dtype=torch.float64), sds.BrownianPath(3)
    sol = sds.solve(sde, x0, 0.0, n * h, n, solver=sds.EulerMaruyama(), noise=noise, params=p, save_at="grid")
    t = torch.arange(n + 1, dtype=torch.float64) * h
    dW = noise.over(n).increments(t, (2, 2), step=0, dtype=torch.float64, device=torch.device("cpu"))
    xs = {k: (p["a"] * torch.tensor(k * h, dtype=torch.float64).exp()).expand(2, 2) for k in range(-5, 0)} | {0: x0}
    for k in range(n):
        x, far, near = xs[k], xs[k - 5], xs[k - 1]
        f, g = -p["a"] * far + torch.sin(near) * t[k], 0.3 * near + 0.1 * x
        xs[k + 1] = x + f * h + g * dW[k]
    assert torch.equal(sol.xs, torch.stack([xs[k] for k in range(n + 1)]))
    assert sol.stats.execution == "eager"
    assert "delays" in sol.stats.reason


def test_moments_of_a_linear_equation():
    """``dX = -X(t - 1) dt + s X(t - 1) dW``: Euler's mean and mean square go by recursions of covariances."""
    paths, n, m, s = 40_000, 24, 8, 0.4
    h = 1 / m
    sde = sds.DelaySDE(lambda x, t, p: -p[0], lambda x, t, p: s * p[0], lags=1.0)
    x = sds.solve(sde, ONE.expand(paths, 1), 0.0, n * h, n, solver=sds.EulerMaruyama(), seed=0).x1[:, 0]
    # Mean products of the states of the last m + 1 times, one step after another.
    mean, second = torch.ones(m + 1, dtype=torch.float64), torch.ones(m + 1, m + 1, dtype=torch.float64)
    move = torch.diag(torch.ones(m, dtype=torch.float64), -1)
    move[0, 0], move[0, m] = 1.0, -h
    for _ in range(n):
        added = s * s * h * second[m, m]
        mean, second = move @ mean, move @ second @ move.T
        second[0, 0] += added
    assert abs(x.mean() - mean[0]) < 4 * x.std() / math.sqrt(paths)
    assert abs(x.square().mean() - second[0, 0]) < 4 * x.square().std() / math.sqrt(paths)
    assert abs(float(mean[0]) - pieces(3.0)) < 0.1  # which is where h -> 0 goes


def strong_errors(sde, solver, reference, steps, finest, paths=256):
    x0 = ONE.expand(paths, 1)
    exact = sds.solve(sde, x0, 0.0, 2.0, finest, solver=reference, seed=1).x1
    found = []
    for n in steps:
        noise = sds.BrownianPath(1, substeps=finest // n)
        x1 = sds.solve(sde, x0, 0.0, 2.0, n, solver=solver, noise=noise).x1
        found.append(float((x1 - exact).square().mean().sqrt()))
    return found


@pytest.mark.parametrize(
    ("calculus", "solver"),
    [("ito", sds.EulerMaruyama()), ("stratonovich", sds.Heun())],
)
def test_strong_order_is_a_half_where_the_diffusion_reads_past_and_present(calculus, solver):
    sde = sds.DelaySDE(lambda x, t, p: -p[0], lambda x, t, p: 0.5 * p[0] + 0.4 * x, calculus=calculus, lags=0.25)
    errors = strong_errors(sde, solver, solver, (16, 64), 1024)
    assert 0.35 < math.log2(errors[0] / errors[1]) / 2 < 0.75


@pytest.mark.parametrize("solver", [sds.Heun(), sds.EulerHeun()])
def test_calculi_differ_by_the_derivative_in_the_present_alone(solver):
    f, g, s = (lambda x, t, p: -p[0]), (lambda x, t, p: 0.5 * p[0] + 0.4 * x), 0.4
    ito = sds.DelaySDE(lambda x, t, p: f(x, t, p) + 0.5 * s * g(x, t, p), g, lags=0.25)
    stratonovich = sds.DelaySDE(f, g, calculus="stratonovich", lags=0.25)
    a, b = (
        sds.solve(sde, ONE.expand(256, 1), 0.0, 2.0, 1024, solver=scheme, seed=0).x1
        for sde, scheme in ((ito, sds.EulerMaruyama()), (stratonovich, solver))
    )
    wrong = sds.solve(
        sds.DelaySDE(f, g, lags=0.25), ONE.expand(256, 1), 0.0, 2.0, 1024, solver=sds.EulerMaruyama(), seed=0
    )
    assert (a - b).square().mean().sqrt() < 0.2 * (wrong.x1 - b).square().mean().sqrt()


NOISY = sds.DelaySDE(
    lambda x, t, p: torch.tanh(p[0]) - x * p[1], lambda x, t, p: 0.2 + 0.1 * p[1],
    "additive", lags=(0.5, 0.125), history=lambda t: 1 + 0.3 * t,
)  # fmt: skip
X0 = torch.tensor([[0.4, -0.2], [1.0, 0.3], [0.1, 0.9]], dtype=torch.float64)


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.Heun()])
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 11])
def test_a_run_goes_on_with_the_bits_of_the_whole(solver, cut):
    options = {"solver": solver, "carry": sds.TimeAverage(lambda x, t: x[:, 0])}
    whole = sds.solve(NOISY, X0, 0.0, 2.0, 16, seed=2, **options)
    t = 0.125 * cut
    first = sds.solve(NOISY, X0, 0.0, t, cut, seed=2, **options)
    rest = sds.solve(NOISY, None, t, 2.0, 16 - cut, start=first.state, solver=solver)
    assert torch.equal(rest.x1, whole.x1)
    assert torch.equal(rest.carry, whole.carry)


def test_what_a_run_goes_on_with_must_be_its_own():
    first = sds.solve(NOISY, X0, 0.0, 1.0, 8, seed=2, solver=sds.Heun())
    again = {"start": first.state, "solver": sds.Heun()}
    with pytest.raises(ValueError, match=r"holds 4 states of the past, and lags of .* need 2"):
        sds.solve(sds.DelaySDE(lambda x, t, p: -p[0], lags=0.25), None, 1.0, 2.0, 8, **again)
    with pytest.raises(ValueError, match="steps of equal length"):
        sds.solve(NOISY, None, 1.0, 2.0, 16, **again)
    plain = sds.solve(sds.ODE(lambda x, t: -x), X0, 0.0, 1.0, 8, solver=sds.Heun())
    with pytest.raises(ValueError, match="holds 0 states"):
        sds.solve(NOISY, None, 1.0, 2.0, 8, start=plain.state, solver=sds.Heun())


@pytest.mark.parametrize("gradients", ["auto", "checkpoint"])
def test_gradients_flow_through_the_past(gradients):
    def loss(x0, a, b, cut=None):
        sde = sds.DelaySDE(
            lambda x, t, p: a * torch.tanh(p[0]) - x, lambda x, t, p: 0.2 * a * p[0], lags=(0.5,),
            history=lambda t: b * torch.cos(t),
        )  # fmt: skip
        options = {"solver": sds.EulerMaruyama(), "gradients": gradients}
        if cut is None:
            return sds.solve(sde, x0, 0.0, 1.5, 12, seed=2, **options).x1.square().sum()
        first = sds.solve(sde, x0, 0.0, 0.125 * cut, cut, seed=2, **options)
        return sds.solve(sde, None, 0.125 * cut, 1.5, 12 - cut, start=first.state, **options).x1.square().sum()

    given = [
        X0.clone().requires_grad_(),
        *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 1.2)),
    ]
    found = torch.autograd.grad(loss(*given), given)
    for which in range(3):
        with torch.no_grad():
            shifted = [[v + (s if i == which else 0.0) for i, v in enumerate(given)] for s in (1e-5, -1e-5)]
            slope = (loss(*shifted[0]) - loss(*shifted[1])) / 2e-5
        assert abs(slope - found[which].sum()) < 1e-8
    for whole, part in zip(found, torch.autograd.grad(loss(*given, cut=5), given), strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-13, atol=1e-13)


def test_rows_are_paths_whatever_the_batch_and_stand_where_they_stop():
    options = {"solver": sds.EulerMaruyama(), "until": sds.Crossing(lambda x, t: x[:, 0] - 0.8, bridge=False)}
    x0 = X0.expand(3, 2).repeat(20, 1) * 0.5
    all_rows = sds.solve(NOISY, x0, 0.0, 2.0, 16, seed=5, save_at="grid", **options)
    some = torch.tensor([41, 3, 17])
    chosen = sds.solve(NOISY, x0[some], 0.0, 2.0, 16, seed=5, paths=some, **options)
    assert torch.equal(chosen.x1, all_rows.x1[some])
    assert torch.equal(chosen.stop_time, all_rows.stop_time[some])
    free = sds.solve(NOISY, x0, 0.0, 2.0, 16, seed=5, solver=sds.EulerMaruyama(), save_at="grid")
    assert 5 < int(all_rows.stopped.sum()) < 55
    over = (free.xs[1:, :, 0] >= 0.8).double()
    first = torch.where(over.any(0), over.argmax(0) + 1, 16)
    assert torch.equal(all_rows.x1, free.xs[first, torch.arange(60)])


def test_doses_are_seen_a_lag_later():
    sde = linear(history=0.0)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    dose = {"at": [([0.5], lambda x: x + 1.0)]}
    sol = sds.solve(sde, zero, 0.0, 2.5, 20, solver=sds.EulerMaruyama(), save_at="grid", **dose)
    late = sds.solve(linear(history=0.0), ONE, 0.0, 2.0, 16, solver=sds.EulerMaruyama(), save_at="grid")
    assert torch.equal(sol.xs[4:], late.xs)
    assert not sol.xs[:4].any()
    with pytest.raises(ValueError, match="take EulerMaruyama"):
        sds.solve(sde, zero, 0.0, 2.0, 16, solver=sds.Heun(), **dose)


F = {"solver": sds.EulerMaruyama()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sds.DelaySDE(lambda x, t, p: x, lags=[]), "lags holds none"),
        (lambda: sds.DelaySDE(lambda x, t, p: x, lags=0.0), "positive and finite"),
        (lambda: sds.DelaySDE(lambda x, t, p: x, lags=[1.0, -1.0]), "positive and finite"),
        (lambda: sds.solve(linear(), ONE, 0.0, 1.5, 10, **F), r"1 is 6\.66667 of them .*steps=12 would do"),
        (lambda: sds.solve(linear(), ONE, 0.0, math.pi, 10, **F), "end 1 times a whole number after the start"),
        (lambda: sds.solve(linear(), ONE, 2.0, 0.0, 10, **F), "later times"),
        (lambda: sds.solve(linear(), ONE, grid=torch.tensor([0.0, 0.5, 2.0]), **F), "equal length"),
        (lambda: sds.solve(linear(), ONE, torch.zeros(1), 2.0, 4, **F), "one grid for all paths"),
        (lambda: sds.solve(linear(), ONE, 0.0, 2.0, 4, solver=sds.RK4()), "ends of steps, and RK4"),
        (lambda: sds.solve(linear(), ONE, 0.0, 2.0, solver=sds.DormandPrince()), "ends of steps, and DormandPrince"),
        (lambda: sds.solve(linear(), ONE, 0.0, 2.0, 4, save_at=[0.3], **F), "put every time of save_at on the grid"),
        (lambda: sds.solve(linear(history=lambda t: torch.ones(3)), ONE, 0.0, 2.0, 4, **F), "history must return"),
        (lambda: sds.solve(linear(history=math.nan), ONE, 0.0, 2.0, 4, **F), "history must be finite"),
        (lambda: sds.solve(sds.DelaySDE(lambda x, t, p: p[1].neg_(), lags=[1, 2]), ONE, 0, 4, 4, **F), "past"),
        (lambda: sds.solve(NOISY, X0, 0.0, 2.0, 16, kl_to=lambda x, t: -x, **F), "leave it out"),
        (lambda: sds.solve(linear(), ONE, 0.0, 2.0, 4, backend="fused", **F), "cannot be fused: delays"),
        (lambda: sds.solve(sds.DelaySDE(lambda x, t, p: p[0][0], lags=1.0), ONE, 0.0, 2.0, 4, **F), "drift must"),
        (lambda: sds.solve(sds.DelaySDE(lambda x, t, p: p[0], lags=1e308), ONE, 0.0, 2.0, 4, **F), "longer steps"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message) as met:
        call()
    assert len(str(met.value)) < 400


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sds.DelaySDE(lambda x, t: -x, lags=1.0), r"must take \(x, t, pasts\)"),
        (lambda: sds.DelaySDE(1.0, lags=1.0), "drift must be a function"),
        (lambda: sds.DelaySDE(lambda x, t, p: x, noise="diagonal", lags=1.0), "needs a diffusion"),
        (lambda: sds.DelaySDE(lambda x, t, p: x, lags="1"), "must be a number"),
        (lambda: sds.DelaySDE(lambda x, t, p: x, lags=1.0, history="x"), "history must be"),
        (lambda: NOISY.drift(X0, torch.zeros(())), "within solve alone"),
    ],
)
def test_what_is_of_another_type_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_the_steps_that_an_error_names_work():
    sde = sds.DelaySDE(lambda x, t, p: -p[0] + p[1], lags=(0.3, 0.7))
    with pytest.raises(ValueError, match=r"steps=(\d+) would do") as met:
        sds.solve(sde, ONE, 0.0, 1.2, 7, **F)
    steps = int(str(met.value).split("steps=")[-1].split()[0])
    assert steps == 12
    assert sds.solve(sde, ONE, 0.0, 1.2, steps, **F).stats.steps == 12


def test_why_no_kernel_does_its_steps():
    equation = sds.DelaySDE(lambda x, t, pasts: -pasts[0], lags=[1.0], history=1.0)
    for backend in ("kernel", "fused"):
        with pytest.raises(ValueError, match=r": delays read states of earlier steps, which no kernel keeps"):
            sds.solve(equation, torch.ones(3, 1), 0.0, 2.0, 4, solver=sds.EulerMaruyama(), seed=0, backend=backend)
