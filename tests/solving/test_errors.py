"""What bad input is told."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sdesolve_kernels.trajectory import numba_launch

import sdesolve as sds
from sdesolve.integrate.executors import Steps

GBM = sds.SDE(lambda x, t: x, lambda x, t: 0.1 * x)
EM = sds.EulerMaruyama()
X0 = torch.ones(4, 2)
SPAN = {"t0": 0.0, "t1": 1.0, "steps": 5}


def refuses(error, message, sde=GBM, x0=X0, **options):
    options = {**SPAN, "solver": EM, "seed": 0, **options}
    with pytest.raises(error, match=message):
        sds.solve(sde, x0, **options)


@pytest.mark.parametrize(
    ("x0", "error", "message"),
    [
        (torch.ones(2, 2, device="meta"), ValueError, "x0 is on the meta device"),
        ([[1.0]], TypeError, r"arrays and lists are converted with torch.as_tensor\(x0\)"),
        ([1.0], TypeError, r"x0 must be a tensor of shape \(batch, \*state\), got list"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, r"must be float32 or float64, got torch.int64.*x0.float\(\)"),
        (torch.ones(2, 2, dtype=torch.float16), TypeError, r"got torch.float16: Brownian increments of small steps"),
        (torch.ones(2, 2, dtype=torch.complex64), TypeError, r"got torch.complex64: .*give torch.view_as_real\(x0\)"),
        (torch.tensor(1.0), ValueError, r"must have a batch axis.*use x0\[None\]"),
        (torch.tensor([[1.0, 2.0], [math.nan, 0.0]]), ValueError, "x0 must be finite; row 1 holds nan or inf"),
        (torch.tensor([1.0, math.inf]), ValueError, "x0 must be finite; row 1 holds nan or inf"),
    ],
)
@pytest.mark.parametrize("reduce", [None, "moments"])
def test_states(x0, error, message, reduce):
    refuses(error, message, x0=x0, reduce=reduce)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t1": 0.0}, ValueError, "t0 and t1 must differ, both are 0.0: there is nothing to integrate"),
        ({"t1": math.nan}, ValueError, "times must be finite"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": -3}, ValueError, "steps must be at least 1, got -3"),
        ({"steps": 2.5}, TypeError, "steps must be an integer, got 2.5 of type float"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"steps": None}, ValueError, "missing: steps"),
        ({"t0": None, "steps": None}, ValueError, "missing: t0, steps"),
        ({"grid": torch.tensor([0.0, 1.0])}, ValueError, "either grid or t0, t1 and steps, not both"),
        ({"t0": torch.zeros(3)}, ValueError, r"t0 must be a number or one time per sample, \(4,\), got shape \(3,\)"),
        ({"t0": torch.tensor([0.0, 1.0, 0.0, 0.0])}, ValueError, "for sample 1 they are equal"),
        ({"t0": torch.tensor([0.0, math.inf, 0.0, 0.0])}, ValueError, "must be finite for every sample"),
    ],
)
def test_times(options, error, message):
    refuses(error, message, **options)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0.0], r"at least two times, as \(steps \+ 1,\)"),
        ([0.0, 0.5, 0.5, 1.0], r"strictly increasing or strictly decreasing; step 1 goes from 0.5 to 0.5"),
        ([0.0, 0.5, 0.25], "step 1 goes from 0.5 to 0.25. Sort it"),
        ([0.0, math.nan], "finite times"),
        ([[0.0] * 3, [1.0] * 3], "grid has times for 3 samples, x0 has 4"),
    ],
)
def test_grids(grid, message):
    refuses(ValueError, message, grid=torch.tensor(grid), t0=None, t1=None, steps=None)


@pytest.mark.parametrize(
    ("save_at", "message"),
    [
        ([0.5, 0.2], "must follow the direction of integration, from 0.0 to 1.0"),
        ([0.5, 0.5], "without repeats"),
        ([0.5, 1.5], "holds 1.5, which is outside the grid from 0.0 to 1.0"),
        ([math.nan], "outside the grid"),
        ([], "at least one time"),
        ("all", "\"grid\" or None, got 'all'"),
    ],
)
def test_save_times(save_at, message):
    refuses(ValueError, message, save_at=save_at)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"save_at": torch.tensor([0.2, 0.5], dtype=torch.float16), "steps": 5000}, ValueError, "in float64"),
        ({"save_at": torch.tensor([0.3, 0.7]), "steps": 5_000_000}, ValueError, "give grid and save_at in float64"),
        ({"save_at": torch.tensor([0.2, 0.5], requires_grad=True)}, TypeError, r"give save_at.detach\(\)"),
        ({"save_at": {0.5: 1}}, TypeError, "save_at must be a number or a tensor"),
        ({"save_at": [0.2, 1j]}, TypeError, "got 1j"),
        ({"save_at": np.array(["a"])}, TypeError, "array of <U1"),
        ({"save_at": [0.2, 0.2 + 1e-15]}, ValueError, "are one point"),
        ({"t0": torch.tensor(True)}, TypeError, "t0 must be real numbers, got a tensor of torch.bool"),
        ({"t0": 1.7e9, "t1": 1.7e9 + 1e-5}, ValueError, r"too short at t = 1.7e\+09.*nearer origin"),
        ({"t0": torch.full((4,), 1.7e9).double(), "t1": 1.7e9 + 1e-5}, ValueError, "too short at t"),
        ({"grid": {0.0, 1.0}}, TypeError, r"grid must be in order, and a set has none; give sorted\(grid\)"),
        ({"grid": [0.0, 0.0, 1.0]}, ValueError, "step 0 goes from 0.0 to 0.0"),
        ({"grid": [[0.0] * 4, [1.0] * 4, [1.0, 1.0, 2.0, 1.0], [2.0] * 4]}, ValueError, "1.0 in row 0.*padding"),
    ],
)  # fmt: skip
def test_times_that_are_refused(options, error, message):
    if "grid" in options:
        options = {"t0": None, "t1": None, "steps": None, **options}
    refuses(error, message, **options)


def test_save_times_with_a_time_per_sample():
    refuses(ValueError, 'can be None or "grid" only', t0=torch.zeros(4), save_at=[0.5])


@pytest.mark.parametrize(
    ("solver", "sde", "error", "message"),
    [
        (sds.RK4(), GBM, ValueError, "RK4 integrates ODEs and this is an SDE with diagonal noise"),
        (sds.Heun(), GBM, ValueError, "Heun does not converge to the ito solution.*takes stratonovich calculus"),
        (
            EM,
            sds.SDE(lambda x, t: x, lambda x, t: x, calculus="stratonovich"),
            ValueError,
            "EulerMaruyama does not converge to the stratonovich solution.*takes additive or none noise",
        ),
        (
            sds.Midpoint(),
            GBM,
            ValueError,
            r"takes stratonovich calculus; sds.to_stratonovich\(sde\) is the SDE of that calculus",
        ),
        (
            sds.SRIW1(),
            sds.SDE(lambda x, t: x, lambda x, t: x[..., None], noise="general"),
            ValueError,
            "SRIW1 does not converge.*general noise it takes no calculus",
        ),
        *(
            (
                solver,
                sds.SDE(lambda x, t: x, lambda x, t: torch.stack([x, x * x], -1), "general", "stratonovich"),
                ValueError,
                f"{type(solver).__name__} needs general noise that commutes.*Give it Levy areas, area='foster'",
            )
            for solver in (sds.Milstein(), sds.SRI2(), sds.LogODE(area=None))
        ),
        (
            sds.Milstein(),
            sds.SDE(lambda x, t: x, lambda x, t: 0.1 * x.flip(-1)),
            ValueError,
            "every diffusion component g_i to depend on x_i alone",
        ),
        (
            sds.Milstein(),
            sds.SDE(lambda x, t: x, lambda x, t: x - x.mean(0)),
            ValueError,
            "couples the samples of the batch",
        ),
        (sds.EulerMaruyama, GBM, TypeError, r"did you mean EulerMaruyama\(\)\?"),
        ("euler", GBM, TypeError, "solver must be a solver object"),
        (EM, lambda x, t: x, TypeError, "sde must be an SDE, ODE or process of sdesolve, got function"),
    ],
)
def test_solvers_and_equations_that_do_not_fit(solver, sde, error, message):
    refuses(error, message, sde=sde, solver=solver)


@pytest.mark.parametrize(
    ("noise", "g", "message"),
    [
        (
            "diagonal",
            lambda x, t: x[:, :1].expand(4, 3),
            r"returned shape \(4, 3\).*noise='diagonal'.*broadcasts to \(4, 2\)",
        ),
        ("diagonal", lambda x, t: x[..., None], r"declare noise='general'"),
        ("diagonal", lambda x, t: torch.ones(4), r"expected what broadcasts to \(4, 2\).*return g.reshape\(4, 1\)"),
        ("scalar", lambda x, t: x[..., None], r"noise='scalar'"),
        ("general", lambda x, t: x, r"expected \(4, 2, channels\), or \(1, \*state, channels\)"),
        ("general", lambda x, t: torch.ones(2, 3), r"noise='general'"),
        ("additive", lambda x, t: torch.ones(3, 3), r"noise='additive'"),
    ],
)
def test_diffusions_that_do_not_fit_their_noise_type(noise, g, message):
    refuses(ValueError, message, sde=sds.SDE(lambda x, t: x, g, noise=noise))


@pytest.mark.parametrize(
    ("drift", "diffusion", "error", "message"),
    [
        (
            lambda x, t: x[:, :1],
            lambda x, t: x,
            ValueError,
            r"drift must return the shape of the state, \(4, 2\), got \(4, 1\)",
        ),
        (
            lambda x, t: x.double(),
            lambda x, t: x,
            TypeError,
            "drift returned torch.float64, the state is torch.float32",
        ),
        (lambda t, x: -x, lambda t, x: 0.1, ValueError, r"got \(\) at t = 0; .* state first: f\(x, t\)"),
        (lambda x, t: 1.0, lambda x, t: x, TypeError, r"got float; write torch.full_like\(x, value\)"),
        (lambda x, t: 1.0, lambda x, t: x, TypeError, "drift must return a tensor.*got float"),
        (lambda x, t: x, lambda x, t: x.double(), TypeError, "diffusion returned torch.float64"),
        (lambda x, t: x, lambda x, t: None, TypeError, "diffusion must return a tensor, got NoneType"),
        (lambda x, t: x.mul_(-1), lambda x, t: x, ValueError, "drift changed the state that it was given; .*x.clone"),
        (lambda x, t: -x, lambda x, t: x.mul_(2), ValueError, "diffusion changed the state that it was given"),
        (lambda x, t: x.to("meta"), lambda x, t: x, ValueError, "drift returned a tensor on meta, the state is on cpu"),
    ],
)
def test_what_user_functions_return(drift, diffusion, error, message):
    refuses(error, message, sde=sds.SDE(drift, diffusion))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1.0, lambda x, t: x), TypeError, r"drift must be a function of \(x, t\), got float"),
        ((lambda x, t: x, None), TypeError, "an SDE is made of drift and diffusion, .*; got drift"),
        ((lambda x, t: x, 0.5), TypeError, r"diffusion must be a function of \(x, t\), got float"),
        ((lambda x, t: x, lambda x, t: x, "matrix"), ValueError, "noise='matrix' is unknown; choose one of"),
        ((lambda x, t: x, lambda x, t: x, "none"), ValueError, r"use sdesolve.ODE\(drift\)"),
        ((lambda x, t: x, lambda x, t: x, "diagonal", "Ito"), ValueError, "calculus='Ito' is unknown"),
    ],
)
def test_equations(arguments, error, message):
    with pytest.raises(error, match=message):
        sds.SDE(*arguments)


@pytest.mark.parametrize(
    ("sde", "options", "error", "message"),
    [
        (sds.VP, {}, TypeError, r"got the class VP; did you mean VP\(...\)\?"),
        (lambda x, t: x, {}, TypeError, r"got function; wrap drift and diffusion in sds.SDE\(drift, diffusion\)"),
        (GBM, {"t0": "0"}, TypeError, r"t0 must be a number or a tensor \(batch,\) of times, got '0'"),
        (GBM, {"steps": 10.0}, TypeError, "got 10.0 of type float; write 10"),
        (GBM, {"steps": 0.01}, TypeError, "got 0.01 of type float$"),
        (GBM, {"save_at": 0.5}, ValueError, r"for one time write save_at=\[t\]"),
        (GBM, {"observable": "x"}, TypeError, "observable must be a function of x, got str"),
    ],
)
def test_things_of_the_wrong_kind(sde, options, error, message):
    refuses(error, message, sde=sde, **options)


def test_noise_arguments():
    refuses(ValueError, "give one of them", noise=sds.BrownianPath(0))
    refuses(TypeError, "noise must be a BrownianPath, got int; a number goes to seed=", seed=None, noise=3)
    refuses(ValueError, "backend must be one of 'auto', 'fused', 'kernel', 'eager', got 'cuda'", backend="cuda")


@pytest.mark.parametrize("backend", ["auto", "fused", "eager"])
@pytest.mark.parametrize("noise", ["additive", "general"])
def test_what_is_wrong_with_a_diffusion_is_said_by_every_backend(noise, backend):
    def g(x, t):
        return x[:, :1] if noise == "general" else torch.ones(3, 3)

    message = f"diffusion returned shape.*does not fit noise='{noise}'"
    refuses(ValueError, message, sde=sds.SDE(lambda x, t: x, g, noise), backend=backend)
    taking_two = sds.SDE(lambda x, t: x, lambda x, t: torch.ones_like(x), noise)
    refuses(TypeError, "takes 2 positional arguments", sde=taking_two, params=torch.ones(()), backend=backend)


def test_divergence_names_step_time_path_and_function():
    """The drift of the third path turns nan once t passes 0.5; the step is found by going through it again."""

    def drift(x, t):
        poison = torch.zeros_like(x)
        poison[2] = math.nan
        return torch.where(t > 0.5, poison, x)

    with pytest.raises(
        sds.DivergenceError, match=r"path 12 stopped being finite in step 6 of 10.*drift returned nan"
    ) as e:
        sds.solve(
            sds.SDE(drift, lambda x, t: 0.1 * x), X0, 0.0, 1.0, 10, solver=EM, noise=sds.BrownianPath(0, first_path=10)
        )
    for error in (e.value, pickle.loads(pickle.dumps(e.value)), copy.copy(e.value)):
        assert (error.step, error.path, str(error)) == (6, 12, str(e.value))
        assert error.time == pytest.approx(0.6)


def test_nan_in_the_first_step_is_told_at_once():
    calls = []

    def diffusion(x, t):
        calls.append(t)
        return x * math.nan

    with pytest.raises(sds.DivergenceError, match=r"step 0 of 1000.*diffusion returned nan"):
        sds.solve(sds.SDE(lambda x, t: x, diffusion), X0, 0.0, 1.0, 1000, solver=EM, seed=0, backend="eager")
    assert len(calls) < 5


@pytest.mark.uncompiled
@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_loss_that_is_not_finite_has_no_gradient(backend):
    """An observable or a carry that is undefined on some paths, whose states are finite."""
    theta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    x0 = torch.tensor([[0.9], [0.2], [-0.8], [-0.35]], dtype=torch.float64)
    sde = sds.SDE(lambda x, t: theta * x, lambda x, t: 0.0 * x)
    log = lambda x: (x[:, 0] + 1).log()  # noqa: E731

    def run(**options):
        options = {"observable": log, "noise": sds.BrownianPath(0, first_path=10), **options}
        return sds.solve(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), backend=backend, **options)

    # -0.8 (1 + 1.5 / 8)^n passes -1 at n = 2, the first path to do so; -0.35 at n = 7
    for options, of, step, path in (
        ({"save_at": "grid"}, lambda s: s.xs[-1].sum(), 1, 12), ({}, lambda s: s.xs[0, 2:].sum(), 7, 12),
        ({"save_at": [0.22, 0.5]}, lambda s: s.xs.sum(), 1, 12),
        ({"save_at": "grid"}, lambda s: s.xs[:, 3].sum(), 6, 13),
        ({"reduce": "moments"}, lambda s: s.mean.sum(), 7, 12), ({"reduce": "moments"}, lambda s: s.variance, 7, 12),
        ({"observable": None, "carry": {"a": sds.Integral(lambda x, t: log(x))}}, lambda s: s.carry["a"].sum(), 1, 12),
    ):  # fmt: skip
        loss = of(run(**options))
        assert not loss.isfinite().all()
        with pytest.raises(sds.DivergenceError, match=r"the loss takes values of (observable|carry)=") as error:
            loss.sum().backward()
        assert (error.value.step, error.value.time, error.value.path) == (step, step / 8, path)
    sol = run(save_at="grid")
    torch.where(sol.xs.isfinite(), sol.xs, 0.0).sum().backward()  # which leaves them out
    assert theta.grad.isfinite()
    run(check_finite=False).xs.sum().backward()


@pytest.mark.uncompiled
def test_overflow_is_told_from_nan():
    stiff = sds.ODE(lambda x, t: -1e6 * x)
    with pytest.raises(sds.DivergenceError, match="overflowed; take smaller steps"):
        sds.solve(stiff, X0, 0.0, 1.0, 20, solver=EM)
    assert not bool(sds.solve(stiff, X0, 0.0, 1.0, 20, solver=EM, check_finite=False).x1.isfinite().all())


@pytest.mark.uncompiled
def test_a_derivative_that_is_infinite_is_no_overflow():
    """Milstein on a square root, from its zero: smaller steps would not help."""
    root = sds.SDE(lambda x, t: 1 - x, lambda x, t: x.clamp(min=0).sqrt())
    with pytest.raises(sds.DivergenceError, match=r"step 0 of 4.*\(Milstein\) the derivative of the diffusion"):
        sds.solve(root, torch.zeros(3, 2), 0.0, 1.0, 4, solver=sds.Milstein(), seed=1)


def test_sde_with_multiplicative_noise_is_not_reversed():
    with pytest.raises(ValueError, match="only SDEs with additive noise can be reversed here, this one has diagonal"):
        sds.ReverseSDE(GBM, lambda x, t: x)
    with pytest.raises(ValueError, match=r"stochasticity must be a positive number, got 0; for 0 use probability_flow"):
        sds.VP().reverse(lambda x, t: x, 0)
    with pytest.raises(TypeError, match="score must be a function"):
        sds.VP().probability_flow(3)


@pytest.mark.parametrize(
    ("solver", "grid"),
    [(EM, sds.VP().time_grid(300)), (sds.UniPC(), sds.VP().time_grid(61)), (EM, sds.VP().time_grid(1))],
)
def test_diagnosis_of_a_fused_run_costs_one_more(solver, grid, monkeypatch):
    """At most, in steps by the kernel; one step is done in torch, from where the kernel has come."""
    process, last, steps, in_torch = sds.VP(), grid[-2], [], []

    def score(x, t):
        return torch.where((t <= last) & (x > 100.0), math.nan, -x)

    equation = process.reverse(score) if solver is EM else process.probability_flow(score)
    run, after = numba_launch.NumbaTrajectory.run, Steps.after

    def by_kernel(self, launch):
        steps.append(launch.end - launch.first_step)
        return run(self, launch)

    def by_torch(self, k, states):
        in_torch.append(k)
        return after(self, k, states)

    x0 = torch.tensor([1.0, 1.0, 1.0, 1e6, 1e6])[:, None].repeat(1, 2)

    def failure(backend):
        noise = sds.BrownianPath(1, first_path=10)
        with pytest.raises(sds.DivergenceError, match="drift returned nan") as met:
            sds.solve(equation, x0, grid=grid, solver=solver, noise=noise, backend=backend)
        return met.value

    expected = failure("eager")
    assert failure("auto").path == 13
    monkeypatch.setattr(numba_launch.NumbaTrajectory, "run", by_kernel)
    monkeypatch.setattr(Steps, "after", by_torch)
    found = failure("auto")
    assert (found.step, found.path, found.time) == (expected.step, expected.path, expected.time)
    assert "2 of 5 paths" in str(found)
    assert steps
    assert sum(steps) <= 2 * (len(grid) - 1)
    assert in_torch == [found.step]


def test_weak_schemes_refuse_increments_of_fewer_moments_than_they_need():
    with pytest.raises(ValueError, match="W2Ito1 has weak order 2 with three-point or normal increments"):
        sds.solve(GBM, torch.ones(2, 1), 0.0, 1.0, 4, solver=sds.W2Ito1(), seed=0, increments="two-point")


@pytest.mark.parametrize("arguments", [{"area": "davie"}, {"area": "foster", "terms": 0}])
def test_areas_that_there_are_none_of_are_refused(arguments):
    with pytest.raises(ValueError, match=r"area must be one of 'foster', |terms must be at least 1"):
        sds.Milstein(**arguments)


def test_paths_beyond_the_last_are_refused_before_any_function_is_called():
    sde = sds.SDE(lambda x, t: pytest.fail("called"), lambda x, t: x)
    with pytest.raises(ValueError, match=r"first_path \+ batch must be at most 2\^64, got 18446744073709551615 \+ 5"):
        sds.solve(sde, torch.ones(5, 2), 0.0, 1.0, 2, solver=EM, noise=sds.BrownianPath(1, first_path=2**64 - 1))
