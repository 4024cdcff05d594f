"""Gradients of fused runs against torch's autograd of the eager scheme: to 1e-10 in float64.

What lies before a kernel, from traces to the reverse of a plan, is checked on the reference back end; a few kernels are
compiled.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types

import pytest
import torch
from sdesolve_kernels.trajectory import backward, numba_backward

import sdesolve as sds
from sdesolve.integrate import fused

F64, BOTH = torch.float64, ("fused", "eager")


def leaf(*shape, seed=0, dtype=F64, scale=1.0):
    z = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return (scale * z).to(dtype).requires_grad_()


def gradients(run, backend, wanted, loss=None):
    """Of a loss that no symmetry makes 0, and what ran."""
    sol = run(backend)
    values = [sol.xs] if sol.mean is None else [sol.mean, sol.variance, sol.x1]
    if loss is None:
        weights = [torch.randn(v.shape, dtype=F64, generator=torch.Generator().manual_seed(7)) for v in values]
        loss = sum((v * w).sum() + (v.double() ** 2).mean() for v, w in zip(values, weights, strict=True))
    return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True), sol.stats


def check(run, wanted, tolerance=1e-10, backend="fused", execution="fused"):
    given, stats = gradients(run, backend, wanted)
    expected, _ = gradients(run, "eager", wanted)
    assert stats.execution == execution, stats.reason
    for a, b in zip(given, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    return stats


def solver_of(sde, x0, steps=5, t0=0.0, t1=1.0, **options):
    options = {"solver": sds.EulerMaruyama(), "seed": 3, **options}
    return lambda backend, **others: sds.solve(sde, x0, t0, t1, steps, backend=backend, **options, **others)


def with_theta(noise="diagonal", calculus="ito", d=2):
    """An equation that holds parameters in drift and diffusion, by itself and in functions of time."""
    theta, phase = leaf(d), leaf(seed=1)

    def drift(x, t):
        return theta * torch.tanh(x).flip(-1) - x * torch.exp(-phase * t)

    def diffusion(x, t):
        rate = 0.2 + 0.1 * torch.cos(phase * t)
        if noise == "general":  # whose channels commute
            return rate * torch.sin(x + theta)[..., None] * torch.arange(1.0, 4.0, dtype=x.dtype)
        if noise == "additive":
            return rate * theta
        return rate * torch.cos(theta * x)

    if noise == "none":
        return sds.ODE(drift), [theta, phase]
    return sds.SDE(drift, diffusion, noise=noise, calculus=calculus), [theta, phase]


def one_step_solvers():
    """Every public scheme that takes no controller and has a step, with the two most general kinds of noise for it.

    The second, of which the first is a more general case, is left for the thorough profile.

    One that is not fused at all has nothing to lose.
    """
    for name in sorted(sds.__all__):
        made = getattr(sds, name)
        if not (isinstance(made, type) and issubclass(made, sds.AbstractOneStep)):
            continue
        try:
            solver = made()
        except (TypeError, ValueError):  # it takes arguments
            continue
        if solver.controller is not None:
            continue
        if sds.UnderdampedLangevin in solver.equations:
            theta, mass = leaf(2), leaf(2, seed=1).detach().exp().requires_grad_()
            model = sds.UnderdampedLangevin(lambda x, t, w=theta: w * torch.sin(x), mass)
            yield pytest.param(solver, model, [theta, mass], id=name)
        if solver.equations:
            continue
        every = itertools.product(("general", "diagonal", "additive", "none"), ("ito", "stratonovich"))
        found = {}
        for noise, (sde, wanted) in ((noise, with_theta(noise, calculus)) for noise, calculus in every):
            if (sde.calculus, sde.noise) in solver.supported:
                marks = [pytest.mark.thorough] if found and noise not in found else []
                found.setdefault(noise, pytest.param(solver, sde, wanted, id=f"{name}, {noise}", marks=marks))
        yield from list(found.values())[:2]


@pytest.mark.parametrize(("solver", "sde", "wanted"), list(one_step_solvers()))
def test_every_solver_in_both_directions(solver, sde, wanted, interpreted):
    """Of one that does general noise, other noise backwards alone."""
    x0 = leaf(7, 2, *([2] if solver.equations else []), seed=5)
    general = {noise for _, noise in solver.supported} >= {sde.noise, sds.Noise.GENERAL}
    for t0, t1 in ((0.0, 0.5), (0.5, 0.0))[general and sde.noise is not sds.Noise.GENERAL :]:
        run = solver_of(sde, x0, 3, t0, t1, solver=solver, save_at="grid")
        with torch.no_grad():
            execution = run("auto").stats.execution
        check(run, [x0, *wanted], backend="auto", execution=execution)
        if t0:
            taken_again(functools.partial(run, "eager"), [x0, *wanted])


def taken_again(run, wanted):
    """Gradients of steps that are taken again have the bits of others."""
    plain, again = (gradients(lambda g: run(gradients=g), g, wanted)[0] for g in ("auto", "checkpoint"))
    assert all(map(torch.equal, plain, again))


class Score(torch.nn.Module):
    """A score that is learned: affine, with a bend."""

    def __init__(self):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(leaf(2, 2, scale=0.3).detach()), torch.nn.Parameter(leaf(2).detach())

    def forward(self, x, t):
        return torch.tanh(x @ self.w + self.b) - x


@pytest.mark.parametrize(
    "solver",
    [sds.Ancestral(), sds.DPMSolverPP(order=2), sds.SDEDPMSolverPP2S(), sds.EDMHeun(), sds.SASolver(2, 2),
     sds.PredictorCorrector(sds.EulerMaruyama(), sds.LangevinCorrector(0.1, norms="level"), n=2)],
    ids=repr,
)  # fmt: skip
def test_samplers_with_a_learned_score(solver, interpreted):
    process, net, x0 = sds.VP(), Score(), leaf(6, 2)
    equation = process.probability_flow(net) if solver.sampling_stochasticity == 0 else process.reverse(net)
    grid = process.time_grid(5)
    run = functools.partial(sds.solve, equation, x0, grid=grid, solver=solver, seed=1)
    check(lambda b: run(backend=b), [x0, *net.parameters()])
    taken_again(functools.partial(run, backend="eager"), [x0, *net.parameters()])


def test_what_may_be_saved(interpreted):
    sde, wanted = with_theta()
    x0, w = leaf(9, 2), leaf(2, 3, seed=2)
    observable = lambda x: torch.relu(x @ w) + x[:, :1]  # noqa: E731
    for options in (
        {}, {"save_at": [0.0, 0.4, 1.0]}, {"save_at": [0.1, 0.4, 0.77]}, {"observable": observable, "save_at": "grid"},
        {"reduce": "moments", "save_at": [0.0, 0.6, 1.0]}, {"reduce": "moments", "observable": observable},
        {"increments": "two-point", "steps": 70}, {"increments": "three-point"},
        {"noise": sds.BrownianPath(3, substeps=2), "seed": None},
    ):  # fmt: skip
        steps = options.pop("steps", 5)
        used = [x0, *wanted, *([w] if "observable" in options else [])]
        check(solver_of(sde, x0, steps, **options), used)


def test_parameters_wherever_they_are(interpreted):
    """Rows for each path, a tensor in two places and in the initial state, views, other types, modules."""
    x0, rows, shared, raw = leaf(11, 2), leaf(11, 2, seed=1), leaf(3, 2, seed=2), leaf(2, seed=3)
    held = {"rows": rows, "both": [raw, (raw,)]}
    double = leaf(2, seed=4)
    layer = torch.nn.Linear(2, 2).to(F64)
    layer.bias.requires_grad_(False)
    frozen = torch.tensor([1.0, 2.0], dtype=F64)

    def drift(x, t, p):
        return -p["a"].exp() * x + p["b"][0] * frozen + layer(x) * held["both"][1][0]

    sde = sds.SDE(drift, lambda x, t, p: 0.3 * torch.sigmoid(p["a"] + held["rows"]) * p["b"][1:].sum(0))
    params = {"a": rows, "b": shared}
    check(solver_of(sde, x0, params=params), [x0, rows, shared, raw, layer.weight])

    def made_of_what_is_held(backend):
        scale, part = raw.exp(), raw[0]
        sde = sds.SDE(lambda x, t: scale * x - raw, lambda x, t: 0.1 * x * part)
        return solver_of(sde, scale * x0.detach())(backend)

    check(made_of_what_is_held, [raw])
    small = leaf(11, 2, dtype=torch.float32)
    sde = sds.SDE(lambda x, t: (double * x.double()).sin().float(), lambda x, t: 0.1 * x * double.float())
    check(solver_of(sde, small), [small, double], 1e-5)


def test_ties_and_edges_are_those_of_torch(interpreted):
    """Zeros, limits and equal numbers; 0 where torch has nan from a branch of ``where`` that was not taken."""
    zero = torch.zeros(4, 3, dtype=F64, requires_grad=True)
    theta, limit = leaf(3), torch.zeros(3, dtype=F64, requires_grad=True)

    def edges(x, t):
        y = torch.relu(x) + x.abs() + x.clamp(0, 1) + torch.maximum(x, limit) + x.norm(dim=1, keepdim=True)
        y = y + torch.nn.functional.relu6(x) + torch.nn.functional.hardtanh(x + 1)
        y = y + torch.nn.functional.hardswish(x + 3) + torch.nn.functional.hardswish(x - 3)
        y = y + torch.relu(limit) + limit.clamp(min=0) + x.std(1, keepdim=True) + x.remainder(2.0)
        y = y * theta + x.amax(1, keepdim=True) + x.max(dim=1)[0][:, None] * theta[0]
        return y + theta[1] * x.amin(1, keepdim=True) + theta[2] * x.min(1, keepdim=True).values

    constant = sds.SDE(edges, lambda x, t: 0.1 * torch.ones_like(x))
    check(solver_of(constant, zero, 1), [zero, theta, limit])
    x0 = torch.tensor([[-1.0, 4.0]], dtype=F64, requires_grad=True)
    unsafe = sds.SDE(lambda x, t: torch.where(x > 0, x.sqrt() * torch.log(x), x), lambda x, t: 0.0 * x)
    (given,), _ = gradients(solver_of(unsafe, x0, 1, t1=0.1), "auto", [x0], None)
    assert given.isfinite().all()


def test_derivatives_stop_where_the_function_stops_them(interpreted):
    x0, theta = leaf(6, 2), leaf(2, seed=1)

    def drift(x, t):
        y = (theta * x).tanh()
        with torch.no_grad():
            size = y.norm(dim=1, keepdim=True) + 1
            size[:, 0] *= 2
        return y / size + y.detach() * x * theta.data

    check(solver_of(sds.SDE(drift, lambda x, t: 0.1 * theta.detach() * x), x0), [x0, theta])

    def force(x, t):
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return -torch.autograd.grad((theta * y.tanh() ** 2).sum(), y)[0] + theta * x

    check(solver_of(sds.SDE(force, lambda x, t: 0.1 * x), x0), [x0, theta])


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_what_cannot_be_reversed_runs_in_torch_and_says_why(interpreted):
    x0, theta = leaf(6, 2), leaf(2, seed=1)

    def in_place(x, t):
        y = theta * x
        with torch.no_grad():
            y.mul_(2)
        return y

    hooked = leaf(2, seed=2)
    hooked.register_hook(lambda g: g.clamp(-1, 1))
    cases = {
        "autograd.Function": lambda x, t: Doubled.apply(theta * x),
        "under no_grad": in_place,
        "hooks": lambda x, t: hooked * x,
        "register_hook": lambda x, t: _hooked(theta * x),
    }
    for why, drift in cases.items():
        run = solver_of(sds.SDE(drift, lambda x, t: 0.1 * x), x0)
        given, stats = gradients(run, "auto", [x0, theta])
        expected, _ = gradients(run, "eager", [x0, theta])
        assert stats.execution != "fused"
        assert why in stats.reason, stats.reason
        torch.testing.assert_close(given, expected)


def test_gradients_of_many_weights_run_in_torch_unless_asked_for(interpreted, monkeypatch):
    """A rule of the equation alone: a kernel that was made because it was asked for does not change it."""
    monkeypatch.setattr(fused, "_MOST_GRADED", 400)
    x0, w = leaf(6, 2), leaf(20, 20)
    sde = sds.SDE(lambda x, t: (x.repeat(1, 10) @ w)[:, :2].tanh(), lambda x, t: 0.1 * x)
    run = solver_of(sde, x0)
    assert run("auto").stats.execution == "fused"
    monkeypatch.setattr(fused, "_MOST_GRADED", 399)
    for backend, execution in (("auto", "kernel"), ("fused", "fused"), ("auto", "kernel")):
        stats = run(backend).stats
        assert stats.execution == execution
        assert ("400 weights, more than 399, take less time in torch" in stats.reason) == (backend == "auto")
    assert run("auto", gradients="none").stats.execution == "fused"


def _hooked(y):
    y.register_hook(lambda g: 2 * g)
    return y


def test_a_gradient_that_differs_from_torchs_is_not_trusted(interpreted, monkeypatch):
    run = backward.Adjoint.backward

    def wrong(self, kept, cotangents):
        made = run(self, kept, cotangents)
        return made if made.captured[0] is None else type(made)(made.x0, None, None, [1.001 * made.captured[0]])

    monkeypatch.setattr(backward.Adjoint, "backward", wrong)
    x0, theta = leaf(6, 2), leaf(2, seed=1)
    run_one = solver_of(sds.SDE(lambda x, t: theta * x, lambda x, t: 0.1 * x), x0)
    with pytest.raises(ValueError, match="gradient of its kernel and that of its steps"):
        run_one("fused")
    assert run_one("auto").stats.execution != "fused"


def test_second_derivatives_and_tensors_changed_since(interpreted):
    x0, theta = leaf(6, 2), leaf(2, seed=1)
    run = solver_of(sds.SDE(lambda x, t: (theta * x).sin(), lambda x, t: 0.1 * x * theta), x0, save_at="grid")

    def penalty(backend):
        first = torch.autograd.grad(run(backend).xs.square().sum(), [x0, theta], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [x0, theta])

    with pytest.warns(UserWarning, match="backend='eager' runs it once"):
        given = penalty("fused")
    torch.testing.assert_close(given, penalty("eager"), rtol=1e-10, atol=1e-12)
    sol = run("fused")
    with torch.no_grad():
        theta.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sol.x1.sum().backward()


# Kernels.


def network(width, time=False):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3 if time else 2, width), torch.nn.Softplus(), torch.nn.Linear(width, width)]
    net = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, 2)).to(F64)
    if not time:
        return lambda x, t: net(x), net
    return lambda x, t: net(torch.cat([x, t.expand(len(x), 1)], 1)), net


def compiled_cases():
    x0 = leaf(150, 2)
    sde, wanted = with_theta("general")
    observed = lambda x: x.square() * wanted[0]  # noqa: E731
    yield "moments of an observable, uneven grid", x0, sde, wanted, {"reduce": "moments", "observable": observed,
           "grid": torch.linspace(0.0, 1.0, 11, dtype=F64) ** 2, "save_at": [0.0, 1.0]}  # fmt: skip
    rows = leaf(150, 2, seed=1)
    paths = sds.SDE(lambda x, t, p: -p.exp() * x, lambda x, t, p: 0.1 * x * p, calculus="stratonovich")
    yield "a row for each path", x0, paths, [rows], {"solver": sds.Heun(), "save_at": "grid", "params": rows}
    drift, net = network(8, time=True)
    yield "a network", x0, sds.SDE(drift, lambda x, t: 0.1 * x), list(net.parameters()), {"save_at": "grid"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x0", "sde", "wanted", "options"), [pytest.param(*c, id=name) for name, *c in compiled_cases()]
)
def test_kernels(x0, sde, wanted, options, monkeypatch):
    """On tapes of 4 steps, with stretches and kept states so few that most are gone through again."""
    monkeypatch.setattr(numba_backward, "_TAPE", 1)
    monkeypatch.setattr(numba_backward, "_SEGMENTS", 2)
    if "grid" in options:
        run = lambda b: sds.solve(sde, x0, seed=3, backend=b, **{"solver": sds.EulerMaruyama(), **options})  # noqa: E731
    else:
        run = solver_of(sde, x0, 11, **options)
    check(run, [x0, *wanted])
    monkeypatch.setattr(backward, "_KEPT", 1)
    check(run, [x0, *wanted])
    of_the_end = [torch.autograd.grad(run(b).x1.square().sum(), [x0, *wanted], allow_unused=True)[0] for b in BOTH]
    torch.testing.assert_close(*of_the_end, rtol=1e-10, atol=1e-12)


def test_sums_over_paths_have_the_same_bits_for_any_number_of_threads():
    x0 = leaf(3000, 2, dtype=torch.float32)
    theta = leaf(2, seed=1, dtype=torch.float32)
    sde = sds.SDE(lambda x, t: theta * x.tanh(), lambda x, t: 0.2 * theta * x * (1 + t))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            given, stats = gradients(solver_of(sde, x0, 60), "fused", [x0, theta], None)
            found.append(given)
    finally:
        torch.set_num_threads(threads)
    assert stats.execution == "fused"
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


@pytest.mark.slow
def test_steps_that_take_each_others_increments(monkeypatch):
    """From either step of a pair on, on tapes that begin and end within pairs."""
    sde, wanted = with_theta()
    x0 = leaf(5, 2)
    monkeypatch.setattr(numba_backward, "_TAPE", 1)
    for tape, first_step in ((4, 0), (3, 1)):
        monkeypatch.setattr(numba_backward, "_FEWEST", tape)
        check(
            solver_of(sde, x0, 9, noise=sds.BrownianPath(3, first_step=first_step, swapped=True), seed=None),
            [x0, *wanted],
        )


def at_once(run, wanted, tolerance=1e-10, why="the gradient of its mean are one generated kernel"):
    """The gradient of a mean that comes with it, and of all else that the same run gives."""
    sol, eager = run("fused"), run("eager")
    assert why in sol.stats.reason
    with torch.no_grad():
        plain = run("fused")
    assert all(torch.equal(a, b) for a, b in ((sol.x1, plain.x1), (sol.mean, plain.mean)))
    torch.testing.assert_close(sol.variance, plain.variance, rtol=0, atol=0, equal_nan=True)
    for of in (
        lambda s: (3 * s.mean - s.mean**2).sum(),
        lambda s: s.mean.sum() + (s.x1.double() ** 2).mean() + (s.variance.sum() if len(s.x1) > 1 else 0),
    ):
        made, expected = (torch.autograd.grad(of(s), wanted, retain_graph=True) for s in (sol, eager))
        for a, b in zip(made, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a - b).abs().max() <= tolerance * b.abs().max()
    return made


def cases_at_once():
    """An observable of a solver's memory and of the start, a state of one number, rows of each path, one path."""
    sde, wanted = with_theta()
    x0, w, rows = leaf(70, 2), leaf(2, seed=2), leaf(70, 2, seed=1)
    paid = {"reduce": "moments", "observable": lambda x: torch.relu(x @ w) + x[:, 0]}
    yield "mean", solver_of(sde, x0, 9, **paid), [x0, w, *wanted]
    yield "backwards", solver_of(sde, x0, 9, 1.0, 0.0, solver=sds.SRIW1(), **paid), [x0, w, *wanted]
    yield "at the start", solver_of(sde, x0, 9, save_at=[0.0], **paid), [x0, w]
    of_rows = sds.SDE(lambda x, t, p: torch.exp(p) * torch.sin(x), lambda x, t, p: 0.2 * p * x)
    for batch in (1, 70):
        single = {"params": rows[:batch, :1], "reduce": "moments", "save_at": [5 / 9], "solver": sds.SEA()}
        single |= {"increments": "two-point", "solver": sds.EulerMaruyama()}
        yield f"{batch} rows", solver_of(of_rows, x0[:batch, :1], 9, **single), [x0, rows]


@pytest.mark.parametrize(("run", "wanted"), [pytest.param(*c, id=name) for name, *c in cases_at_once()])
def test_a_mean_comes_with_its_gradient(run, wanted, interpreted):
    at_once(run, wanted)


@pytest.mark.slow
def test_a_mean_comes_with_its_gradient_from_a_kernel(monkeypatch):
    """On tapes of one segment and of several; by any number of threads; where it cannot, it says so."""
    _, run, wanted = next(cases_at_once())
    made = at_once(run, wanted)
    monkeypatch.setattr(numba_backward, "_TAPE", 1)
    for a, b in zip(made, at_once(run, wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(numba_backward, "_SEGMENTS", 2)
    at_once(run, wanted, why="its gradient another")
    done, threads, found = [], torch.get_num_threads(), []
    monkeypatch.undo()
    monkeypatch.setattr(
        fused, "progress_bar", lambda *_, **__: contextlib.nullcontext(types.SimpleNamespace(update=done.append))
    )
    x0, theta = leaf(3000, 2, dtype=torch.float32), leaf(2, seed=1, dtype=torch.float32)
    sde = sds.SDE(lambda x, t: theta * x.tanh(), lambda x, t: 0.2 * theta * x * (1 + t))
    run = solver_of(sde, x0, 60, observable=lambda x: x.square().sum(1), reduce="moments", progress=True)
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            sol = run("fused")
            found.append([sol.mean, *torch.autograd.grad(sol.mean.sum(), [x0, theta])])
    finally:
        torch.set_num_threads(threads)
    assert sum(done) == 3 * 60 * 3000
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


@pytest.mark.parametrize("jump", [False, True])
def test_numbers_that_all_steps_share(jump, interpreted):
    """Those made of parameters and the length of a step are pulled back as numbers, unless they jump."""
    theta, scale, x0 = leaf(4), leaf(), leaf(5, 2, seed=1)
    given = [theta, scale]

    def drift(x, t):
        rate = torch.exp(theta[0]) * theta[1] / (1 + theta[1] ** 2) - theta[2:].sum() * torch.sqrt(theta[3].abs())
        return rate * torch.sin(x) - (torch.where(scale > 0, scale, -2 * scale) if jump else scale**3) * x

    sde = sds.SDE(drift, lambda x, t: 0.2 * torch.tanh(theta[:2]) * x)
    run = solver_of(sde, x0)
    check(run, [x0, *given])
    assert (run("fused").x1.grad_fn.adjoint._scalars is None) == jump


def test_memory_does_not_grow_with_the_number_of_steps():
    """What is kept between forward and backward, and a stretch at a time; by counting what the adjoint holds."""
    x0, theta = leaf(256, 2, dtype=torch.float32), leaf(2, dtype=torch.float32)
    sde = sds.SDE(lambda x, t: -theta * x, lambda x, t: 0.1 * x)
    kept = []
    for steps in (1000, 16_000):
        sol = solver_of(sde, x0, steps)("fused")
        sol.x1.sum().backward()
        held = sol.x1.grad_fn.kept
        kept.append(sum(s.nbytes for s in held.states.values()))
    assert kept[1] <= backward._KEPT
    assert held.stretches * x0.nbytes <= 2 * backward._KEPT
