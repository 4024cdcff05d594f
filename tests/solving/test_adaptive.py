"""Adaptive Runge-Kutta: against scipy's, against closed forms, and each sample for itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch.utils._python_dispatch import TorchDispatchMode

from sdesolve import (
    ODE,
    RK4,
    SDE,
    VP,
    DivergenceError,
    DormandPrince,
    Gaussian,
    GaussianMixture,
    Rodas4,
    Tsit5,
    sample,
    solve,
    tweedie,
)
from sdesolve.diffusions import EDM, LinearDiffusion
from sdesolve.sde import per_sample

DATA = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), 0.3)


def flow():
    return VP().probability_flow(DATA.score(VP()))


def oscillator():
    """Van der Pol's, mildly stiff: steps differ along the way and between samples."""
    return ODE(lambda x, t: torch.stack([x[:, 1], 3 * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]], 1))


def start(n: int) -> torch.Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("ode", "t0", "t1"),
    [(flow(), 1.0, 1e-3), (flow(), 1e-3, 1.0), (oscillator(), 0.0, 6.0)],
    ids=["flow down", "flow up", "van der pol"],
)
@pytest.mark.parametrize("tolerance", [1e-3, 1e-8])
def test_every_sample_takes_the_steps_that_scipy_takes_for_it_alone(ode, t0, t1, tolerance):
    """scipy's RK45 has the same pair, error norm and step control, and knows one sample only."""
    x0, ts = start(4), np.linspace(t0, t1, 7)
    sol = solve(ode, x0, t0, t1, solver=DormandPrince(tolerance, tolerance), save_at=ts[1:])
    for i, x in enumerate(x0.numpy()):

        def drift(t, y):
            return ode.drift(torch.tensor(y)[None], torch.tensor([t], dtype=torch.float64))[0].numpy()

        peer = solve_ivp(drift, (t0, t1), x, rtol=tolerance, atol=tolerance, dense_output=True)
        assert int(sol.stats.evaluations[i]) == peer.nfev
        assert int(sol.stats.accepted[i]) == len(peer.t) - 1
        np.testing.assert_allclose(sol.x1[i].numpy(), peer.y[:, -1], rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(sol.xs[:, i].numpy(), peer.sol(ts[1:]).T, rtol=1e-9, atol=1e-10)
    assert sol.stats.nfe == int(sol.stats.evaluations.max())
    assert len(set(sol.stats.accepted.tolist())) > 1


@pytest.mark.parametrize("process", [VP(), EDM(sigma_max=20.0)], ids=["vp", "edm"])
def test_the_flow_of_gaussian_data(process):
    law = Gaussian(torch.tensor([1.0, -0.5]), torch.tensor([[1.0, 0.6], [0.6, 0.5]]))
    x0 = process.sample_prior((64, 2), seed=0, dtype=torch.float64)
    exact = law.flow(process)(x0, process.t_max, process.t_min)
    errors = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        there = solve(
            process.probability_flow(law.score(process)),
            x0,
            process.t_max,
            process.t_min,
            solver=DormandPrince(tolerance, tolerance),
        ).x1
        errors.append(float((there - exact).abs().max()))
        assert errors[-1] < 100 * tolerance
    assert errors[0] > 20 * errors[1] > 400 * errors[2]


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch():
    """With an error norm over the batch, a sample takes other steps in company than alone."""
    x0 = 4.0 * start(12)
    solver = DormandPrince(1e-6, 1e-8)
    batch = solve(oscillator(), x0, 0.0, 6.0, solver=solver)
    for i in range(12):
        alone = solve(oscillator(), x0[i : i + 1], 0.0, 6.0, solver=solver)
        assert torch.equal(alone.x1[0], batch.x1[i])
        assert int(alone.stats.accepted[0]) == int(batch.stats.accepted[i])
        assert int(alone.stats.rejected[0]) == int(batch.stats.rejected[i])
    assert len(set(batch.stats.accepted.tolist())) > 2
    spoilt = x0.clone()
    spoilt[0] *= 4  # stiff: many more steps
    assert torch.equal(
        solve(oscillator(), spoilt, 0.0, 1.0, solver=solver).x1[1:],
        solve(oscillator(), x0, 0.0, 1.0, solver=solver).x1[1:],
    )


def bent(x, t):
    """Takes the more steps the larger ``x`` is."""
    return per_sample(torch.cos(3 * t), x) * x - x**3


def hard_and_easy(n: int = 48) -> torch.Tensor:
    """Every third sample starts where steps must be small."""
    return start(n) * torch.where(torch.arange(n) % 3 == 1, 40.0, 1.0)[:, None]


def rows_of(drift, x0, **options):
    """The solution, and the sizes of batches that torch's operations on the drift's cosine saw."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cos.default:
                sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    with Sizes():
        return solve(ODE(drift), x0, 0.0, 1.0, solver=DormandPrince(1e-6, 1e-6), **options), sizes


def test_samples_that_arrived_leave_the_batch():
    """It changes nothing: states, those saved on the way, steps and gradients are what they are for a whole batch."""
    x0, count, found = hard_and_easy(), [0], []

    def counting(x, t):
        count[0] += 1
        return bent(x, t)

    for drift in (bent, counting):  # which a trace does not take
        leaf = x0.clone().requires_grad_()
        sol, sizes = rows_of(drift, leaf, save_at=[0.0, 0.3, 0.99, 1.0])
        gradient = torch.autograd.grad(sol.xs.square().sum(), leaf)[0]
        found.append((sol.x1, sol.xs, sol.stats.accepted, sol.stats.rejected, sol.stats.evaluations, gradient))
        assert sol.stats.nfe == int(sol.stats.evaluations.max())
        assert (sum(sizes) < 0.75 * len(x0) * len(sizes)) is (drift is bent)
    assert count[0] == sol.stats.nfe
    for left, stayed in zip(*found, strict=True):
        assert torch.equal(left, stayed)


RATES = torch.linspace(1.0, 3.0, 48, dtype=torch.float64)[:, None]


@pytest.mark.parametrize(
    "drift",
    [
        lambda x, t: RATES * bent(x, t),
        lambda x, t: RATES[: len(x)] * bent(x, t),
        lambda x, t: bent(x, t) + 0.1 * x.mean(0),
        lambda x, t: bent(x, t) * (1 + 1e-3 * x.shape[0]),
        lambda x, t: bent(x, t) * (2 if len(x) == 48 else 1),
        lambda x, t: bent(x, t) + (t.reshape(-1, 1) - 0.9).relu() * RATES[: len(x)],
    ],
    ids=["a parameter a row", "cut to the batch", "coupled", "of the batch's size", "of this size", "late"],
)
def test_rows_stay_where_the_drift_knows_them(drift):
    x0 = hard_and_easy()
    sol, sizes = rows_of(drift, x0)
    assert set(sizes[8:]) <= {48}  # a trace and a comparison come with the first that arrive
    count = [0]

    def counting(x, t):
        count[0] += 1
        return drift(x, t)

    assert torch.equal(rows_of(counting, x0)[0].x1, sol.x1)


def test_a_sample_is_named_by_its_place_in_the_whole_batch():
    x0 = torch.full((40,), 0.1, dtype=torch.float64)
    x0[37] = 0.6  # 1 / (1 / 0.6 - t)
    with pytest.raises(RuntimeError, match=r"equation of sample 37 cannot be taken further than t = 1.66667"):
        solve(ODE(lambda x, t: x * x), x0, 0.0, 2.0, solver=DormandPrince())


@pytest.mark.parametrize(("n", "d"), [(64, 64), (3, 3), (5, 3), (1, 3), (6, 1)])
def test_time_meets_the_state_as_for_other_solvers(n, d):
    """A time per row was taken for one per column on 64 rows of 64: a relative error of 1.15."""
    x0 = torch.linspace(0.5, 2.0, n * d, dtype=torch.float64).reshape(n, d)
    x = solve(ODE(lambda x, t: -2 * t * x), x0, 0.0, 1.0, solver=DormandPrince(1e-9, 1e-9)).x1
    torch.testing.assert_close(x, x0 * math.exp(-1), rtol=1e-8, atol=0)


W = torch.linspace(-1.0, 1.0, 32, dtype=torch.float64).reshape(16, 2)


@pytest.mark.parametrize(
    "drift",
    [
        lambda x, t: torch.tanh(x @ W.T + t * W[:, 0]) @ W,
        lambda x, t: torch.where(t > 0.7, 1.7 - t, 1.0) * x,
        lambda x, t: torch.cat([x, t.expand(len(x))[:, None]], 1) @ torch.ones(3, 2, dtype=x.dtype) * x.cos(),
        lambda x, t: x.cos() * t.reshape(-1, 1),
    ],
    ids=["a hidden layer of the batch's size", "late", "a network's", "written for both"],
)
def test_functions_get_the_time_that_they_are_right_for(drift):
    x0 = start(16)
    x = solve(ODE(drift), x0, 0.0, 1.0, solver=DormandPrince(1e-8, 1e-8)).x1
    fixed = solve(ODE(drift), x0, 0.0, 1.0, 200, solver=RK4(), backend="eager").x1
    torch.testing.assert_close(x, fixed, rtol=1e-5, atol=1e-5)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None].expand(-1, 16)
    torch.testing.assert_close(solve(ODE(drift), x0, grid=grid, solver=RK4()).x1, fixed, rtol=1e-12, atol=1e-12)


def test_a_drift_that_mixes_up_the_times_of_rows_is_refused():
    for drift in (lambda x, t: -x * t.max(), lambda x, t: -x * t[0] if t.ndim == 1 else -x * t.flatten()[0]):
        with pytest.raises(ValueError, match=r"not right for a time per row.*t.reshape\(-1, 1\)"):
            solve(ODE(drift), start(5), 0.0, 1.0, solver=DormandPrince())


def test_each_sample_has_its_own_interval_and_direction():
    t0, t1 = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, 5.0])
    x0 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    sol = solve(ODE(lambda x, t: -x), x0, t0, t1, solver=DormandPrince(1e-10, 1e-12))
    torch.testing.assert_close(sol.x1, x0 * (t0 - t1).double().exp(), rtol=1e-8, atol=0)
    assert sol.ts.shape == (1, 3)


def test_labels_stay_with_their_rows():
    rates = torch.tensor([0.1, 30.0, 1.0], dtype=torch.float64)
    x = solve(
        ODE(lambda x, t: -rates * x), torch.ones(3, dtype=torch.float64), 0.0, 1.0, solver=DormandPrince(1e-9, 1e-12)
    ).x1
    torch.testing.assert_close(x, (-rates).exp(), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize(
    ("solver", "orders"), [(DormandPrince(), (6, 5, 5)), (Tsit5(), (6, 5, 5)), (Rodas4(), (5, 4, 4))]
)
def test_orders_of_the_step_and_of_the_states_within_it(solver, orders):
    """One step of size h on a nonlinear equation with known solution, of errors such as h^6 at its end, h^5 inside."""
    inside, ends, estimates = [], [], []
    for h in (0.08, 0.04, 0.02):
        x, t = torch.ones(1, dtype=torch.float64), torch.full((1,), 1.0, dtype=torch.float64)

        def drift(x, t):
            return -2 * t * x * x  # x = 1 / t^2

        dt = torch.full_like(t, h)
        attempt = solver.attempt(drift, x, drift(x, t), t, dt)
        ends.append(float((attempt.x - (t + dt) ** -2).abs()))
        estimates.append(float(attempt.error.abs()))
        inside.append(
            max(
                float((solver.between(x, attempt, dt, torch.full_like(t, u)) - (t + u * dt) ** -2).abs())
                for u in (0.2, 0.5, 0.8)
            )
        )
    for errors, order in zip((ends, estimates, inside), orders, strict=True):
        assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.75)


def test_asking_for_states_changes_nothing_else():
    x0 = start(5)
    bare = solve(flow(), x0, 1.0, 0.01, solver=DormandPrince())
    kept = solve(flow(), x0, 1.0, 0.01, solver=DormandPrince(), save_at=[1.0, 0.9, 0.5, 0.05, 0.01])
    assert torch.equal(bare.x1, kept.x1)
    assert torch.equal(kept.xs[0], x0)
    assert torch.equal(kept.xs[-1], kept.x1)
    assert torch.equal(bare.stats.accepted, kept.stats.accepted)
    between = solve(flow(), x0, 1.0, 0.05, solver=DormandPrince(1e-10, 1e-10)).x1
    torch.testing.assert_close(kept.xs[3], between, rtol=0, atol=1e-3)


def test_a_stiff_equation_takes_few_steps():
    """x' = -1000 (x - cos t) - sin t from off its slow solution cos t, and van der Pol's at mu = 1000, by Radau."""
    x0 = torch.tensor([[2.0], [-1.0]], dtype=torch.float64)
    stiff = ODE(lambda x, t: -1000 * (x - t.cos()) - t.sin())
    sol = solve(stiff, x0, 0.0, 3.0, solver=Rodas4(1e-6, 1e-6), save_at=[1.0, 3.0])
    torch.testing.assert_close(sol.xs[:, 0, 0], torch.tensor([1.0, 3.0], dtype=torch.float64).cos(), rtol=0, atol=1e-5)
    assert sol.stats.accepted.max() < 200  # stability allows an explicit pair a thousand
    relax = ODE(lambda x, t: torch.stack([x[:, 1], 1e3 * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0]], 1))
    sol = solve(relax, torch.tensor([[2.0, 0.0]], dtype=torch.float64), 0.0, 800.0, solver=Rodas4(1e-5, 1e-8))
    there = torch.tensor([[1.08392336, -0.00619523]], dtype=torch.float64)
    torch.testing.assert_close(sol.x1, there, rtol=1e-4, atol=0)
    assert sol.stats.accepted.max() < 100
    large = torch.diag(torch.linspace(-50, -1, 6, dtype=torch.float64))  # beyond what is eliminated entry by entry
    x1 = solve(
        ODE(lambda x, t: x @ large), torch.ones(2, 6, dtype=torch.float64), 0.0, 1.0, solver=Rodas4(1e-7, 1e-9)
    ).x1
    torch.testing.assert_close(x1, large.diagonal().exp().expand(2, 6), rtol=1e-5, atol=1e-7)


def test_there_and_back():
    x0 = DATA.sample(32, seed=0, dtype=torch.float64)
    solver = DormandPrince(1e-9, 1e-9)
    noise = solve(flow(), x0, 1e-3, 1.0, solver=solver).x1
    torch.testing.assert_close(solve(flow(), noise, 1.0, 1e-3, solver=solver).x1, x0, rtol=0, atol=1e-5)


def test_gradients_pass_through_the_accepted_steps():
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x0 = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    x1 = solve(ODE(lambda x, t: -rate * x), x0, 0.0, 2.0, solver=DormandPrince(1e-9, 1e-12)).x1
    grads = torch.autograd.grad(x1.sum(), [x0, rate])
    decay = math.exp(-1.4)
    torch.testing.assert_close(grads[0], torch.full((2,), decay, dtype=torch.float64), rtol=1e-7, atol=0)
    assert float(grads[1]) == pytest.approx(-2 * 3 * decay, rel=1e-6)


def test_shapes_and_dtypes():
    for shape in ((0, 3), (4,), (2, 3, 2, 2), (3, 0)):
        for dtype in (torch.float32, torch.float64):
            sol = solve(ODE(lambda x, t: -x), torch.ones(shape, dtype=dtype), 0.0, 1.0, solver=DormandPrince())
            torch.testing.assert_close(sol.x1, torch.full(shape, math.exp(-1), dtype=dtype), rtol=0, atol=1e-4)
            assert sol.x1.dtype == dtype


def test_sampling_by_the_adaptive_flow():
    process, score = VP(), DATA.score(VP())
    x = sample(process, score, (6, 2), solver=DormandPrince(1e-6, 1e-6), seed=3, dtype=torch.float64)
    start = process.sample_prior((6, 2), seed=3, dtype=torch.float64)
    end = solve(process.probability_flow(score), start, 1.0, 1e-3, solver=DormandPrince(1e-6, 1e-6)).x1
    torch.testing.assert_close(x, tweedie(process, score, end, torch.tensor(1e-3).double()), rtol=1e-6, atol=1e-6)
    for options in ({"steps": 5}, {"grid": torch.tensor([1.0, 0.1])}, {"stochasticity": 1.0}, {"cuda_graph": True}):
        with pytest.raises(ValueError, match=r"own steps|integrates ODEs|as it goes"):
            sample(process, score, (6, 2), solver=DormandPrince(), seed=0, **options)


def test_it_says_what_it_is():
    assert repr(DormandPrince(1e-3, max_steps=50)) == "DormandPrince(rtol=0.001, atol=1e-05, max_steps=50)"


def test_what_cannot_be_solved():
    x0, solver = torch.ones(3, 1, dtype=torch.float64), DormandPrince()
    with pytest.raises(DivergenceError, match="not finite at the start, t = 0, for sample 1 and 0 more") as caught:
        solve(ODE(lambda x, t: x / torch.tensor([[1.0], [0.0], [1.0]])), x0, 0.0, 1.0, solver=solver)
    assert (caught.value.step, caught.value.path) == (0, 1)
    with pytest.raises(RuntimeError, match=r"equation of sample 0 cannot be taken further than t = 1 .*stiff or sing"):
        solve(ODE(lambda x, t: x * x), x0, 0.0, 2.0, solver=solver)  # 1 / (1 - t)
    with pytest.raises(RuntimeError, match="in max_steps=7 steps"):
        solve(oscillator(), start(3), 0.0, 50.0, solver=DormandPrince(max_steps=7))
    with pytest.raises(RuntimeError, match=r"t = 0.5.*drift is not finite"):
        solve(ODE(lambda x, t: x * (0.5 - t).reshape(-1, 1).sqrt()), x0, 0.0, 1.0, solver=solver)


@pytest.mark.parametrize(("n", "early"), [(40, 30), (16, 15)], ids=["of another size", "of a size that broadcasts"])
def test_a_drift_that_knows_its_rows_later_alone(n, early):
    """Guidance in an interval of time, say: while it is off, rows that arrived can leave, and then they cannot."""
    rates, late = torch.linspace(1.0, 3.0, n, dtype=torch.float64)[:, None], []

    def drift(x, t):
        late.append(bool((t > 0.5).any()))
        return -x * torch.where((t > 0.5)[:, None], rates, 1.0) if late[-1] else -x

    x0, t1 = start(n), torch.full((n,), 0.2, dtype=torch.float64)
    t1[early:] = 1.0
    sol = solve(ODE(drift), x0, torch.zeros(n), t1, solver=DormandPrince(1e-9, 1e-9))
    power = torch.where(t1[:, None] > 0.5, 0.5 + 0.5 * rates, t1[:, None])
    torch.testing.assert_close(sol.x1, x0 * torch.exp(-power), rtol=0, atol=1e-6)
    assert sol.stats.nfe == len(late)


def test_an_error_of_the_drift_is_its_own():
    def drift(x, t):
        if bool((t > 0.5).any()):
            raise LookupError("no such time")
        return -x

    t1 = torch.where(torch.arange(40) < 30, 0.2, 1.0)
    with pytest.raises(LookupError, match="no such time"):
        solve(ODE(drift), start(40), torch.zeros(40), t1, solver=DormandPrince())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_of_ones_own_process(dtype):
    """Its rates are derivatives by the time, which all samples have in common at the start."""
    process = LinearDiffusion(lambda t: 1 - t, lambda t: t, t_max=0.99)
    data = Gaussian(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 0.04]))
    x0 = process.sample_prior((5, 2), seed=0, dtype=dtype)
    x = solve(process.probability_flow(data.score(process)), x0, 0.99, 1e-3, solver=DormandPrince(1e-6, 1e-7)).x1
    (m0, v0), (m1, v1) = (data.moments(process, t) for t in (0.99, 1e-3))
    torch.testing.assert_close(x.double(), m1 + (v1 / v0).sqrt() * (x0.double() - m0), rtol=0, atol=1e-4)


def test_a_drift_may_differentiate_by_time():
    def drift(x, t):
        return per_sample(torch.func.jvp(torch.sin, (t,), (torch.ones_like(t),))[1], x).expand_as(x)

    x0 = start(3)
    x = solve(ODE(drift), x0, 0.0, 1.0, solver=DormandPrince(1e-9, 1e-9)).x1
    torch.testing.assert_close(x, x0 + math.sin(1.0), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solve(flow(), start(1), 1.0, 0.1, 10, solver=DormandPrince()), ValueError, "chooses its own steps"),
        (
            lambda: solve(flow(), start(1), grid=torch.tensor([1.0, 0.1]), solver=DormandPrince()),
            ValueError,
            "own steps",
        ),
        (lambda: solve(flow(), start(1), 1.0, 0.1, solver=DormandPrince(), save_at="grid"), ValueError, "save_at"),
        (lambda: solve(flow(), start(1), 1.0, 0.1, solver=DormandPrince(), save_at=[2.0]), ValueError, "outside"),
        (lambda: solve(flow(), start(1), 1.0, solver=DormandPrince()), ValueError, "missing: t1"),
        (lambda: solve(flow(), start(1), 1.0, 1.0, solver=DormandPrince()), ValueError, "must differ"),
        (
            lambda: solve(flow(), start(1), 1.0, 0.1, solver=DormandPrince(), backend="kernel"),
            ValueError,
            "kernel backend",
        ),
        (lambda: solve(flow(), start(1).float(), 1.0, 0.1, solver=DormandPrince(1e-9)), ValueError, "float32 resolves"),
        (
            lambda: solve(SDE(lambda x, t: x, lambda x, t: x), start(1), 0.0, 1.0, solver=DormandPrince()),
            ValueError,
            "ODEs",
        ),
        (lambda: DormandPrince(rtol=0.0), ValueError, "rtol > 0"),
        (lambda: DormandPrince(atol=-1.0), ValueError, "atol >= 0"),
        (lambda: DormandPrince(max_steps=0), ValueError, "max_steps must be at least 1"),
        (lambda: DormandPrince(max_steps=1.5), TypeError, "must be an integer"),
        (
            lambda: solve(ODE(lambda x, t: x.neg_()), start(1), 0.0, 1.0, solver=DormandPrince()),
            ValueError,
            "drift changed the state",
        ),
        (
            lambda: solve(ODE(lambda x, t: x[:, :1]), start(1), 0.0, 1.0, solver=DormandPrince()),
            ValueError,
            "drift must return",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
