"""Equations whose paths jump, and reactions: laws, coordinates, what they are combined with, and what is refused."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import sdesolve as sds

F64 = torch.float64


def states(n: int, *values: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).expand(n, -1).clone()


def within(values: torch.Tensor, truth: float, errors: float = 4.0) -> bool:
    """Whether the mean of a sample is within so many standard errors of its expectation."""
    return abs(float(values.mean()) - truth) <= errors * float(values.std()) / math.sqrt(len(values))


def birth_death(k: float = 10.0, mu: float = 1.0) -> sds.Reactions:
    return sds.Reactions([[1, -1]], lambda x, t: torch.stack([torch.full_like(x[:, 0], k), mu * x[:, 0]], 1))


MERTON = {"rate": 0.75, "jump": lambda x, t, z: -0.1 + 0.15 * z}


def merton(**given) -> sds.JumpSDE:
    mean_jump = math.exp(-0.1 + 0.15**2 / 2) - 1
    drift = 0.05 - 0.02 - 0.75 * mean_jump
    return sds.JumpSDE(
        lambda x, t: torch.full_like(x, drift), lambda x, t: torch.full_like(x, 0.2), "additive", **{**MERTON, **given}
    )


# Laws


@pytest.mark.parametrize("given", [{}, {"adapted": False}, {"rate": lambda x, t: 0.75, "bound": 2.0}])
def test_price_of_a_call_in_merton_s_model(given):
    sol = sds.solve(merton(**given), states(6000, math.log(100.0)), 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=3)
    assert within(math.exp(-0.05) * (sol.x1[:, 0].exp() - 100.0).clamp_min(0.0), 12.22443365)
    assert within(sol.jumps.double(), 0.75)
    assert within((sol.jumps - 0.75).square(), 0.75)


def test_kou_s_jumps_by_a_quantile_function():
    """Double exponential jumps: up with chance .4 and mean .1, down with mean .2."""

    def quantile(u):
        up = (u - 0.6) / 0.4
        return torch.where(u > 0.6, -0.1 * (-up.clamp(0.0, 1 - 1e-16)).log1p(), 0.2 * (u / 0.6).clamp_max(1.0).log())

    sde = sds.JumpSDE(lambda x, t: 0.0 * x, rate=3.0, jump=lambda x, t, z: z, mark=quantile)
    sol = sds.solve(sde, states(20_000, 0.0), 0.0, 2.0, 3, solver=sds.RK4(), seed=1)
    x = sol.x1[:, 0]
    assert within(x, 6.0 * (0.4 * 0.1 - 0.6 * 0.2))
    assert within((x - x.mean()).square(), 6.0 * (0.4 * 0.02 + 0.6 * 0.08))


def test_rates_that_depend_on_the_state_by_thinning():
    """Births at the rate x: geometric counts. A bound that is a function holds until the next candidate."""
    sde = sds.JumpSDE(lambda x, t: 0.0 * x, rate=lambda x, t: x[:, 0], bound=lambda x, t: 1.5 * x[:, 0], jump=1.0)
    sol = sds.solve(sde, states(20_000, 1.0), 0.0, 1.0, 2, solver=sds.RK4(), seed=2)
    assert within(sol.x1[:, 0], math.e)
    assert within((sol.x1[:, 0] == 1).double(), math.exp(-1))
    assert torch.equal(sol.jumps, sol.x1[:, 0].long() - 1)


def test_a_process_that_excites_itself():
    """Hawkes: the intensity is drawn to 1, and each point adds .6 to it; its mean closes."""
    sde = sds.JumpSDE(
        lambda x, t: 2.0 * (1.0 - x), rate=lambda x, t: x[:, 0], bound=lambda x, t: x[:, 0].clamp_min(1.0), jump=0.6
    )
    sol = sds.solve(sde, states(20_000, 0.5), 0.0, 1.5, 12, solver=sds.RK4(), seed=4)
    limit = 2.0 / 1.4
    assert within(sol.x1[:, 0], limit + (0.5 - limit) * math.exp(-1.4 * 1.5))
    integral = limit * 1.5 + (0.5 - limit) * (1 - math.exp(-1.4 * 1.5)) / 1.4
    assert within(sol.jumps.double(), integral)


@pytest.mark.parametrize(
    ("solver", "steps"), [(sds.Gillespie(), 3), (sds.TauLeap(), 16), (sds.TauLeap(epsilon=0.2), 1)], ids=repr
)
def test_immigration_and_death(solver, steps):
    sol = sds.solve(birth_death(), states(4000, 0.0), 0.0, 2.0, steps, solver=solver, seed=5)
    x = sol.x1[:, 0]
    assert bool(((x >= 0) & (x == x.round())).all())
    if isinstance(solver, sds.Gillespie):
        assert within(x, 8.646647168)
        assert within((x - 8.646647168).square(), 8.646647168)
        assert within((x == 8).double(), math.exp(-8.646647168) * 8.646647168**8 / math.factorial(8))
    elif solver.epsilon is None:  # counts hardly ever fail here, and means are Euler's
        assert within(x, 10.0 * (1 - (1 - 2.0 / steps) ** steps))
    else:
        assert abs(float(x.mean()) - 8.646647168) < 0.4


def test_dimers_by_leaps_agree_with_exact_ones():
    def a(x, t):
        return torch.stack([0.01 * x[:, 0] * (x[:, 0] - 1) / 2, 0.5 * x[:, 1], 0.1 * x[:, 0]], 1)

    reactions, x0 = sds.Reactions([[-2, 2, -1], [1, -1, 0]], a), states(1500, 60.0, 5.0)
    runs = [
        sds.solve(reactions, x0, 0.0, 1.0, steps, solver=solver, seed=1).x1
        for solver, steps in ((sds.Gillespie(), 1), (sds.TauLeap(midpoint=True), 25))
    ]
    for i in range(2):
        exact, leapt = (run[:, i] for run in runs)
        error = float(((exact.var() + leapt.var()) / len(exact)).sqrt())
        assert abs(float(exact.mean() - leapt.mean())) < 4 * error + 0.1
    assert bool((runs[1] >= 0).all())


def test_a_leap_ends_at_the_first_reaction_that_finds_nothing():
    """Deaths at a constant rate from 5 on, one leap: 5 - N, and 0 from the sixth event on."""
    queue = sds.Reactions([[-1]], lambda x, t: 4.0 * (x > 0).to(x.dtype))
    sol = sds.solve(queue, states(20_000, 5.0), 0.0, 1.0, 1, solver=sds.TauLeap(), seed=7)
    x = sol.x1[:, 0]
    for k in range(5):
        assert within((x == 5 - k).double(), math.exp(-4.0) * 4.0**k / math.factorial(k))
    assert bool((x >= 0).all())
    assert torch.equal(sol.jumps, (5 - x).long())


def test_the_time_at_which_a_leap_ends_has_its_law():
    """A molecule dies at the rate 3, and its death gives a token that makes children at the rate 2 while it is there.

    Reaction 0 fails a second time, at the second point of a Poisson process of intensity 3; from there on propensities
    are those after the first. Children appear from then on alone, so their mean is 2 E (1 - T)^+ for its time T.
    """
    reactions = sds.Reactions([[-1, 0], [1, 0], [0, 1]], lambda x, t: torch.stack([3.0 * x[:, 0], 2.0 * x[:, 1]], 1))
    sol = sds.solve(reactions, states(8000, 1.0, 0.0, 0.0), 0.0, 1.0, 1, solver=sds.TauLeap(), seed=8)
    # E (1 - T)^+ = int_0^1 P(T < s) ds, with P(T < s) = 1 - e^{-3 s} (1 + 3 s).
    wanted = 1 - ((1 - math.exp(-3)) / 3 + (1 - 4 * math.exp(-3)) / 3)
    assert within(sol.x1[:, 2], 2.0 * wanted)


def test_approximations_of_reactions_are_equations_of_their_own():
    n, steps, reactions = 400, 20, birth_death(60.0)
    truth, spread = 60.0 - 30.0 * math.exp(-1), 60 - 30 * math.exp(-1) - 30 * math.exp(-2)
    mean = sds.solve(reactions.mean_field(), states(1, 30.0), 0.0, 1.0, steps, solver=sds.RK4()).x1
    assert float(mean) == pytest.approx(truth, rel=1e-6)
    for equation in (reactions.langevin(), reactions.hybrid([1], bound=60.0)):
        x = sds.solve(equation, states(n, 30.0), 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=0).x1[:, 0]
        assert abs(float(x.mean()) - truth) < 4 * float(x.std()) / n**0.5 + 0.3  # of Euler's method, .28
        assert float(x.var()) == pytest.approx(spread, rel=4 * (2 / n) ** 0.5 + 0.05)


# Orders, and the Brownian motion that jumps cut


def test_jumps_do_not_change_the_brownian_motion():
    """Steps that are cut by jumps of no size have the same W, and the same integral of it, as those that are not."""
    g = torch.tensor([[1.0], [0.0]], dtype=F64)

    def f(x, t):
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0]], 1)

    parts = {"drift": f, "diffusion": lambda x, t: g[None], "noise": "additive"}
    plain = sds.solve(sds.SDE(**parts), states(200, 0.0, 0.0), 0.0, 1.0, 4, solver=sds.ShARK(), seed=3)
    cut = sds.solve(
        sds.JumpSDE(**parts, rate=9.0, jump=0.0), states(200, 0.0, 0.0), 0.0, 1.0, 4, solver=sds.ShARK(), seed=3
    )
    assert int(cut.jumps.max()) > 10
    assert torch.allclose(plain.x1, cut.x1, atol=1e-12)


def test_parts_of_a_step_have_the_law_of_a_brownian_motion():
    """Jumps read W where they happen: X counts W^2 at the points of N, so its mean is the integral of rate times t."""

    def jump(x, t):
        return torch.stack([torch.zeros_like(x[:, 0]), x[:, 0] ** 2], 1)

    sde = sds.JumpSDE(
        lambda x, t: 0.0 * x, lambda x, t: torch.tensor([1.0, 0.0], dtype=F64), "additive", rate=4.0, jump=jump
    )
    sol = sds.solve(sde, states(20_000, 0.0, 0.0), 0.0, 1.0, 1, solver=sds.EulerMaruyama(), seed=6)
    assert within(sol.x1[:, 1], 2.0)
    assert within(sol.x1[:, 0] ** 2, 1.0)


def test_a_solver_keeps_its_strong_order():
    """Along one path: dX = a X dt + b X dW + c X dN has a closed form in W(1) and N(1)."""
    a, b, c = 0.4, 0.6, 0.35
    n, x0 = 400, 1.0
    errors = []
    for adapted in (True, False):
        for steps in (8, 32):
            sde = sds.JumpSDE(
                lambda x, t: a * x, lambda x, t: b * x, rate=3.0, jump=lambda x, t: c * x, adapted=adapted
            )
            path = sds.BrownianPath(11, substeps=32 // steps)
            sol = sds.solve(sde, states(n, x0), 0.0, 1.0, steps, solver=sds.Milstein(), noise=path)
            W = path.increments(torch.linspace(0, 1, steps + 1, dtype=F64), (n, 1), dtype=F64).sum(0)
            exact = x0 * torch.exp((a - b * b / 2) + b * W) * (1 + c) ** sol.jumps[:, None]
            errors.append(float((sol.x1 - exact).square().mean().sqrt()))
    assert errors[0] / errors[1] > 3.0  # 4 for order 1
    assert errors[1] < 0.05


# Coordinates


SYSTEMS = {
    "merton": (merton(), sds.EulerMaruyama(), (0.0,)),
    "thinned": (
        sds.JumpSDE(
            lambda x, t: -x, lambda x, t: 0.3 * x, rate=lambda x, t: 1.0 + t + x[:, 0].abs().clamp_max(2.0), bound=5.0,
            jump=lambda x, t, z: 0.2 * z + 0.1 * t, marks=2,
        ),
        sds.SRIW1(),
        (1.0, 2.0),
    ),
    "on the grid": (merton(adapted=False), sds.EulerMaruyama(), (0.0,)),
    "exact": (birth_death(), sds.Gillespie(), (3.0,)),
    "leaps": (birth_death(6.0, 3.0), sds.TauLeap(), (3.0,)),
    "short leaps": (birth_death(), sds.TauLeap(0.1), (3.0,)),
}  # fmt: skip


def run(name: str, n: int = 12, steps: int = 4, dtype: torch.dtype = F64, **given) -> sds.Solution:
    sde, solver, start = SYSTEMS[name]
    given.setdefault("noise", sds.BrownianPath(9))
    return sds.solve(sde, states(n, *start, dtype=dtype), 0.0, 1.0, steps, solver=solver, **given)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_path_is_a_function_of_seed_and_number(name):
    whole = run(name)
    again = run(name, noise=sds.BrownianPath(9))
    parts = [run(name, n, noise=sds.BrownianPath(9).rows(first)) for first, n in ((0, 5), (5, 1), (6, 6))]
    listed = run(name, 3, noise=None, seed=9, paths=[7, 2, 11])
    seeds = run(name, 2, noise=sds.BrownianRows([9, 5], [4, 4]))
    for what in ("x1", "jumps"):
        values = getattr(whole, what)
        assert torch.equal(values, getattr(again, what))
        assert torch.equal(values, torch.cat([getattr(p, what) for p in parts]))
        assert torch.equal(values[[7, 2, 11]], getattr(listed, what))
        assert torch.equal(values[4], getattr(seeds, what)[0])
    assert not torch.equal(whole.x1, run(name, noise=sds.BrownianPath(10)).x1)
    repeated = run(name, 6, noise=sds.BrownianPath(9, repeat=3))
    assert torch.equal(repeated.x1[:3], repeated.x1[3:])
    assert torch.equal(repeated.x1[:3], whole.x1[:3])


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_run_that_is_cut_goes_on_as_the_whole_one(name):
    whole = run(name, save_at="grid")
    sde, solver, start = SYSTEMS[name]
    first = sds.solve(
        sde, states(12, *start), grid=whole.ts[:3], solver=solver, noise=sds.BrownianPath(9), save_at="grid"
    )
    rest = sds.solve(sde, grid=whole.ts[2:], solver=solver, start=pickle.loads(pickle.dumps(first.state)))
    assert torch.equal(first.xs, whole.xs[:3])
    assert torch.equal(rest.x1, whole.x1)
    assert torch.equal(rest.jumps, whole.jumps)


@pytest.mark.parametrize("name", ["merton", "exact"])
def test_jumps_of_a_constant_bound_do_not_depend_on_the_grid(name):
    few, many = run(name, steps=2), run(name, steps=64)
    assert torch.equal(few.jumps, many.jumps)
    if name == "exact":
        assert torch.equal(few.x1, many.x1)


def test_float32_states_and_repeated_runs():
    for name in ("thinned", "exact", "leaps"):
        sol = run(name, dtype=torch.float32)
        assert sol.x1.dtype == torch.float32
        assert torch.equal(sol.jumps, run(name, dtype=torch.float32).jumps)


PROPENSITY = torch.tensor([0.02, 0.5, 1.0], dtype=F64)


def dimers(x, t, p):
    """With one parameter of each path, one of all, one that is held, and time."""
    a, b = p
    pairs = 0.5 * x[:, 0] * (x[:, 0] - 1)
    return torch.stack([PROPENSITY[0].to(x) * pairs, a * x[:, 1], b * (1 + t) * x[:, 0]], 1)


NETWORKS = {
    "one reaction": (sds.Reactions([[-1]], lambda x, t: 0.7 * x), (9.0,), None),
    "dimers": (sds.Reactions([[-2, 2, -1], [1, -1, 0]], dimers), (30.0, 4.0), (torch.linspace(0.2, 2, 12), 0.3)),
    "nothing to change": (sds.Reactions([[0, 1], [0, 0]], lambda x, t: torch.ones_like(x)), (0.0, 5.0), None),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("dimers", F64), ("dimers", torch.float32), ("one reaction", F64), ("nothing to change", torch.float32)],
)
def test_a_kernel_of_reactions_has_the_counts_of_steps_in_torch(name, dtype):
    equation, start, p = NETWORKS[name]
    given = {"params": p and (p[0].to(dtype), torch.tensor(p[1], dtype=dtype))} if p else {}
    grid = torch.tensor([0.5, 0.6, 1.7, 2.5], dtype=F64)

    def both(backend):
        common = {"solver": sds.Gillespie(), "backend": backend, **given}
        seeds = sds.BrownianRows([3] * 6 + [4] * 6, list(range(12)))
        first = sds.solve(
            equation, states(12, *start, dtype=dtype), grid=grid[:3], noise=seeds, save_at=[0.6], **common
        )
        return first, sds.solve(equation, grid=grid[2:], start=first.state, **common)

    for fused, eager in zip(both("fused"), both("eager"), strict=True):
        assert fused.stats.execution == "fused"
        for what in ("x1", "xs", "jumps"):
            assert torch.equal(getattr(fused, what), getattr(eager, what)), what
        assert fused.x1.dtype == dtype
        assert torch.allclose(fused.state.jumps[0], eager.state.jumps[0], rtol=1e-5 if dtype != F64 else 1e-11)
    assert int(fused.jumps.max()) > 3


def test_which_reactions_are_fused_is_said():
    assert run("exact").stats.execution == "fused"
    carried = run("exact", carry=sds.TimeAverage(lambda x, t: x[:, 0]))
    assert carried.stats.execution == "eager"
    assert "follows paths" in carried.stats.reason
    coupled = sds.Reactions([[1]], lambda x, t: x.mean(0, keepdim=True).expand(len(x), 1) + 1)
    sol = sds.solve(coupled, states(3, 2.0), 0.0, 1.0, 2, solver=sds.Gillespie(), seed=0)
    assert sol.stats.execution == "eager"
    assert "couples the paths" in sol.stats.reason
    rare = sds.Reactions([[1]], lambda x, t: torch.full_like(x, 3e-50, dtype=F64))
    runs = [
        sds.solve(rare, states(3, 0.0, dtype=torch.float32), 0.0, 1e51, 2, solver=sds.Gillespie(), seed=0, backend=b)
        for b in ("auto", "eager")
    ]
    assert "a kernel of counts in torch.float32 would round them" in runs[0].stats.reason
    assert torch.equal(runs[0].x1, runs[1].x1)
    assert int(runs[1].jumps.min()) > 0
    scale = {"by": 1.0}
    held = sds.Reactions([[1]], lambda x, t: scale["by"] * torch.ones_like(x))
    few = sds.solve(held, states(50, 0.0), 0.0, 5.0, 1, solver=sds.Gillespie(), seed=0)
    scale["by"] = 4.0
    many = sds.solve(held, states(50, 0.0), 0.0, 5.0, 1, solver=sds.Gillespie(), seed=0)
    assert within(few.x1, 5.0)
    assert within(many.x1, 20.0)
    with pytest.raises(sds.RateError, match="reaction 1 is -1 for path 0"):
        sds.solve(birth_death(mu=-1.0), states(2, 1.0), 0.0, 1.0, 1, solver=sds.Gillespie(), seed=0, backend="fused")
    assert few.stats.execution == many.stats.execution == "fused"


# What jumps are combined with


@pytest.mark.parametrize("name", ["thinned", "exact", "leaps"])
def test_observables_moments_carries_stops_and_changes(name):
    x = run(name, save_at="grid").xs
    seen = run(name, save_at="grid", observable=lambda x, t: x[:, 0] * t).xs
    assert torch.allclose(seen, x[..., 0] * torch.linspace(0, 1, 5, dtype=F64)[:, None])
    assert torch.allclose(run(name, reduce="moments").mean, x[-1:].mean(1))
    total = run(name, carry=sds.Carry(lambda x: 0.0 * x[:, 0], lambda c, x, y, t, s: c + y[:, 0] - x[:, 0]))
    assert torch.allclose(total.carry, x[-1, :, 0] - x[0, :, 0])
    stopped = run(name, until=sds.Crossing(lambda x, t: x[:, 0] - 4.0, direction=1, bridge=False))
    reached = (x[..., 0] >= 4.0).any(0)
    assert torch.equal(stopped.stopped, reached)
    first = (x[..., 0] >= 4.0).int().argmax(0)
    assert torch.equal(stopped.x1[reached], x[first[reached], reached.nonzero()[:, 0]])
    changed = run(name, at=[(0.5, lambda x: x + 7.0)], save_at="grid")
    assert torch.equal(changed.xs[:2], x[:2])
    assert torch.equal(changed.xs[2], x[2] + 7.0)


def test_backwards_in_time_jumps_come_at_the_same_rate():
    sde = sds.JumpSDE(lambda x, t: 1.0 + 0.0 * x, rate=2.0, jump=lambda x, t: t)
    sol = sds.solve(sde, states(4000, 0.0), 1.0, 0.0, 2, solver=sds.RK4(), seed=0)
    assert within(sol.jumps.double(), 2.0)
    assert within(sol.x1[:, 0], -1.0 + 2.0 * 0.5)


def test_parameters_and_models():
    def run_with(rate):
        sde = sds.JumpSDE(
            lambda x, t, p: -p["k"] * x, rate=lambda x, t, p: p["rate"], bound=lambda x, t, p: 4.0,
            jump=lambda x, t, z, p: p["k"] * z,
        )  # fmt: skip
        params = {"k": torch.tensor([[1.0], [2.0], [3.0]], dtype=F64), "rate": torch.full((3,), rate, dtype=F64)}
        return sds.solve(sde, states(3, 1.0), 0.0, 1.0, 8, solver=sds.RK4(), seed=0, params=params)

    none = run_with(0.0)
    assert none.jumps.tolist() == [0, 0, 0]
    assert torch.allclose(none.x1[:, 0], torch.tensor([1.0, 2.0, 3.0], dtype=F64).neg().exp(), rtol=1e-3)
    assert run_with(4.0).jumps.sum() > 3
    model = sds.JumpSDE(sds.GeometricBrownianMotion(0.05, 0.2), rate=0.0, jump=0.0)
    plain = sds.solve(model.between, states(3, 1.0), 0.0, 1.0, 8, solver=sds.Milstein(), seed=0, backend="eager")
    assert torch.allclose(sds.solve(model, states(3, 1.0), 0.0, 1.0, 8, solver=sds.Milstein(), seed=0).x1, plain.x1)


def test_gradients_pass_jumps_whose_times_do_not_depend_on_what_is_differentiated():
    size = torch.tensor(0.3, dtype=F64, requires_grad=True)
    x0 = states(50, 1.0).requires_grad_()
    for gradients in ("auto", "checkpoint"):
        sde = sds.JumpSDE(lambda x, t: 0.1 * x, lambda x, t: 0.2 * x, rate=2.0, jump=lambda x, t: size * x)
        sol = sds.solve(sde, x0, 0.0, 1.0, 8, solver=sds.Milstein(), seed=0, gradients=gradients)
        by_start, by_size = torch.autograd.grad(sol.x1.sum(), (x0, size))
        assert torch.allclose(by_start, sol.x1 / x0)
        assert torch.allclose(by_size, (sol.jumps[:, None] * sol.x1 / (1 + size)).sum())


def test_gradients_through_rates_are_refused():
    x0 = states(4, 1.0).requires_grad_()
    own = {"drift": lambda x, t: -x, "bound": 5.0, "jump": 0.5}
    sde = sds.JumpSDE(**own, rate=lambda x, t: x[:, 0])
    with pytest.raises(ValueError, match=r"rate depends on what gradients.*x\.detach"):
        sds.solve(sde, x0, 0.0, 1.0, 4, solver=sds.RK4(), seed=0)
    assert not sds.solve(sde, x0, 0.0, 1.0, 4, solver=sds.RK4(), seed=0, gradients="none").x1.requires_grad
    sol = sds.solve(sds.JumpSDE(**own, rate=lambda x, t: x.detach()[:, 0]), x0, 0.0, 1.0, 4, solver=sds.RK4(), seed=0)
    assert sol.x1.requires_grad
    with pytest.raises(ValueError, match="propensities depend on what gradients"):
        sds.solve(birth_death(), x0, 0.0, 1.0, 4, solver=sds.TauLeap(), seed=0)


# What is refused


def bad_rate(rate, bound=2.0, **given):
    return sds.JumpSDE(lambda x, t: 0.0 * x + 1.0, rate=rate, bound=bound, jump=1.0, **given)


def test_a_rate_beyond_its_bound_is_named_with_path_time_and_values():
    with pytest.raises(sds.RateError, match=r"exceeds its bound 2 for path \d+ at t = .*raise bound") as met:
        sds.solve(
            bad_rate(lambda x, t: 1.9 + x[:, 0]), states(9, 0.0), 0.0, 5.0, 5, solver=sds.RK4(),
            noise=sds.BrownianPath(0, first_path=100),
        )  # fmt: skip
    e = pickle.loads(pickle.dumps(met.value))
    assert 100 <= e.path < 109
    assert e.rate > e.bound == 2.0
    row = e.path - 100
    assert float(e.reached.t[row]) == e.time
    assert float(e.reached.x[row, 0]) == pytest.approx(e.rate - 1.9)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_rates_that_are_none_are_named(value):
    with pytest.raises(sds.RateError, match=r"the (rate|bound) is (-1|nan|inf) for path \d at t = "):
        sds.solve(bad_rate(lambda x, t: torch.full_like(x[:, 0], value)), states(3, 0.0), 0.0, 9.0, 3, solver=sds.RK4())
    with pytest.raises(sds.RateError, match=r"the bound is (-1|nan|inf)"):
        sds.solve(
            bad_rate(1.0, bound=lambda x, t: torch.full_like(x[:, 0], value)), states(3, 0.0), 0.0, 9.0, 3,
            solver=sds.RK4(),
        )  # fmt: skip
    reactions = sds.Reactions([[1, -1]], lambda x, t: torch.stack([x[:, 0] * 0 + 1, x[:, 0] * 0 + value], 1))
    for solver in (sds.Gillespie(), sds.TauLeap()):
        with pytest.raises(sds.RateError, match=r"propensity of reaction 1 is (-1|nan|inf) for path 0 at t = 0"):
            sds.solve(reactions, states(3, 5.0), 0.0, 1.0, 3, solver=solver)


def test_too_many_events_are_named_with_what_was_kept():
    explosive = sds.Reactions([[1]], lambda x, t: x**2)
    with pytest.raises(sds.StepLimitError, match=r"more than max_steps=300 reactions") as met:
        sds.solve(explosive, states(3, 5.0), 0.0, 5.0, 1, solver=sds.Gillespie(max_steps=300), seed=0)
    assert met.value.reached.x.shape == (3, 1)
    assert int(met.value.reached.accepted.max()) == 301
    with pytest.raises(sds.StepLimitError, match="max_steps=5 leaps"):
        sds.solve(birth_death(), states(2, 900.0), 0.0, 5.0, 1, solver=sds.TauLeap(0.01, max_steps=5), seed=0)
    with pytest.raises(sds.StepLimitError, match="max_jumps=20 candidates"):
        sds.solve(bad_rate(1.0, 1e3, max_jumps=20), states(2, 0.0), 0.0, 1.0, 1, solver=sds.RK4(), seed=0)


def test_states_that_are_no_counts_are_refused():
    for solver in (sds.Gillespie(), sds.TauLeap()):
        for value, what in ((1.5, "1.5"), (-2.0, "-2")):
            with pytest.raises(ValueError, match=f"species 0 of path 0 is {what} at t = 0.*round"):
                sds.solve(birth_death(), states(2, value), 0.0, 1.0, 2, solver=solver)
        with pytest.raises(ValueError, match=r"float32 does not hold counts that large; integrate in float64"):
            sds.solve(birth_death(), states(2, 2.0**25, dtype=torch.float32), 0.0, 1.0, 2, solver=solver)
        with pytest.raises(ValueError, match=r"stoichiometry has 1 rows, so states are \(batch, 1\)"):
            sds.solve(birth_death(), states(2, 1.0, 2.0), 0.0, 1.0, 2, solver=solver)
        with pytest.raises(ValueError, match=r"is 0.5 at t = 0.5"):
            sds.solve(birth_death(), states(2, 1.0), 0.0, 1.0, 2, solver=solver, at=[(0.5, lambda x: 0 * x + 0.5)])
        with pytest.raises(ValueError, match="forwards in time"):
            sds.solve(birth_death(), states(2, 1.0), 1.0, 0.0, 2, solver=solver)
    greedy = sds.Reactions([[-1]], lambda x, t: x * 0 + 1.0)
    with pytest.raises(sds.RateError, match="fewer than none"):
        sds.solve(greedy, states(2, 1.0), 0.0, 50.0, 2, solver=sds.TauLeap())
    huge = sds.Reactions([[1]], lambda x, t: x * 0 + 1e12)
    with pytest.raises(sds.RateError, match=r"1e\+12 reactions of number 0"):
        sds.solve(huge, states(2, 1.0), 0.0, 1.0, 1, solver=sds.TauLeap())


def test_arguments_are_refused_before_any_work():
    f, x0 = (lambda x, t: -x), states(2, 1.0)
    for given, error, match in (
        ({"rate": lambda x, t: 1.0, "jump": 1.0}, TypeError, "needs bound="),
        ({"rate": -1.0, "jump": 1.0}, ValueError, "rate must be finite and not negative"),
        ({"rate": 3.0, "bound": 2.0, "jump": 1.0}, ValueError, "exceeds bound"),
        ({"rate": "often", "jump": 1.0}, TypeError, "rate must be a number or a function"),
        ({"rate": 1.0, "jump": "up"}, TypeError, "jump must be a function"),
        ({"rate": 1.0, "jump": 1.0, "mark": "gamma"}, ValueError, "mark must be"),
        ({"rate": torch.tensor(1.0, requires_grad=True), "jump": 1.0}, ValueError, "asks for gradients"),
    ):
        with pytest.raises(error, match=match):
            sds.JumpSDE(f, **given)
    for nu, error, match in (
        ([1, -1], ValueError, "must be a matrix"),
        ([[0.5]], ValueError, "whole numbers"),
        ("A -> B", TypeError, "matrix of whole numbers"),
    ):
        with pytest.raises(error, match=match):
            sds.Reactions(nu, lambda x, t: x)
    with pytest.raises(ValueError, match=r"number for each of 2 reactions.*got \(2, 1\)"):
        sds.solve(sds.Reactions([[1, -1]], lambda x, t: x), x0, 0.0, 1.0, 2, solver=sds.TauLeap())
    with pytest.raises(ValueError, match=r"take TauLeap\(\) or Gillespie\(\)"):
        sds.solve(birth_death(), x0, 0.0, 1.0, 2, solver=sds.EulerMaruyama())
    with pytest.raises(ValueError, match="TauLeap integrates Reactions alone"):
        sds.solve(sds.SDE(f, f), x0, 0.0, 1.0, 2, solver=sds.TauLeap())
    with pytest.raises(ValueError, match="epsilon must be between 0 and 1"):
        sds.TauLeap(3.0)
    sde = sds.JumpSDE(f, lambda x, t: 0.1 * x, rate=1.0, jump=lambda x, t: x[:, 0])
    with pytest.raises(ValueError, match=r"jump must return the shape of the state"):
        sds.solve(sde, x0, 0.0, 50.0, 2, solver=sds.EulerMaruyama())


def test_what_jumps_are_not_combined_with():
    x0 = states(2, 1.0)
    sde = sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.1 * x, rate=1.0, jump=0.1)
    stratonovich = sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.1 * x, calculus="stratonovich", rate=1.0, jump=0.1)

    def solve(equation=sde, solver=sds.EulerMaruyama(), steps=4, **given):  # noqa: B008
        return sds.solve(equation, x0, 0.0, 1.0, steps, solver=solver, **given)

    for given, match in (
        ({"save_at": [0.3]}, "paths that jump have values at grid points alone"),
        ({"until": sds.Crossing(lambda x, t: x[:, 0] - 3.0)}, "bridge=False"),
        ({"carry": sds.RunningMaximum(lambda x, t: x[:, 0])}, "bridge=False"),
        ({"kl_to": lambda x, t: -x}, "kl_to= compares diffusions"),
        ({"backend": "fused"}, "cannot be fused: each path jumps at times of its own"),
        ({"increments": "two-point"}, "adapted=False"),
        ({"equation": stratonovich, "solver": sds.Adaptive(sds.SPaRK()), "steps": None}, "fixed steps"),
        ({"solver": sds.W2Ito1()}, "two-point numbers.*adapted=False"),
    ):
        with pytest.raises(ValueError, match=match):
            solve(**given)
    with pytest.raises(ValueError, match="too far along the path"):
        solve(noise=sds.BrownianPath(0, first_step=1 << 50))
    with pytest.raises(ValueError, match="jump changed the state"):
        solve(sds.JumpSDE(lambda x, t: -x, rate=90.0, jump=lambda x, t: x.mul_(2.0)), sds.RK4())
    with pytest.raises(sds.DivergenceError, match=r"jump is not finite for path 0 at t = 0\."):
        solve(sds.JumpSDE(lambda x, t: -x, rate=90.0, jump=lambda x, t: x / 0), sds.RK4())
    on_grid = sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.1 * x, rate=1.0, jump=0.1, adapted=False)
    assert solve(on_grid, increments="two-point").jumps.shape == (2,)
    assert solve(on_grid, sds.W2Ito1()).jumps.shape == (2,)


def test_jumps_are_never_left_out_silently():
    sde, f = sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.1 * x, rate=1.0, jump=0.1), (lambda x, t: -x)
    plain, x0 = sds.SDE(f, lambda x, t: 0.1 * x), states(3, 1.0)
    for make in (
        sds.to_ito,
        sds.to_stratonovich,
        lambda s: sds.correlated(s, torch.eye(1)),
        lambda s: sds.adapters.ToTorchSDE(s, x0, 0.0, 1.0),
        lambda s: sds.euler_law(s, x0, 0.0, 1.0),
    ):
        with pytest.raises(ValueError, match="JumpSDE jumps"):
            make(sde)
    with pytest.raises(ValueError, match="JumpSDE jumps: leave it out"):
        sds.solve(plain, x0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), kl_to=sde)
    with pytest.raises(ValueError, match="substeps=2"):
        sds.solve(birth_death(), x0, 0.0, 1.0, 2, solver=sds.TauLeap(), noise=sds.BrownianPath(0, substeps=2))


@pytest.mark.thorough
def test_levels_of_a_multilevel_estimate_share_their_jumps():
    estimate = sds.multilevel(
        sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.3 * x, rate=1.0, jump=lambda x, t, z: 0.3 * x * z),
        states(1, 1.0), 0.0, 1.0, payoff=lambda x: x[:, 0], solver=sds.Milstein(), rmse=0.02, seed=0,
    )  # fmt: skip
    assert abs(float(estimate.estimate) - math.exp(-1)) < 4 * 0.02
    assert all(float(level.consistency) < 1 for level in estimate.levels[1:])
    assert float(estimate.levels[-1].variance) < float(estimate.levels[0].variance) / 10


def test_a_solver_that_remembers_begins_anew_at_a_jump():
    """Where every step has a jump, each of ReversibleHeun is a first one, which is Heun's."""
    sde = sds.JumpSDE(
        lambda x, t: 0.1 * x, lambda x, t: 0.2 * x, calculus="stratonovich", rate=200.0, jump=0.01, adapted=False
    )
    runs = [
        sds.solve(sde, states(50, 1.0), 0.0, 1.0, 4, solver=solver, seed=0)
        for solver in (sds.ReversibleHeun(), sds.Heun())
    ]
    assert int(runs[0].jumps.min()) > 100
    assert torch.allclose(runs[0].x1, runs[1].x1, rtol=1e-12)
    with pytest.raises(ValueError, match="jumps"):
        sds.solve(
            sde, states(2, 1.0).requires_grad_(), 0.0, 1.0, 4, solver=sds.ReversibleHeun(), gradients="reversible"
        )
