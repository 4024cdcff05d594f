"""A run that is cut at a grid point and gone on with has the bits of the whole: every solver, corrector and chain."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from sdesolve_kernels.dispatch import use_backend

import sdesolve as sds
from sdesolve.mcmc.base import AbstractKernel
from sdesolve.sde import Calculus, Noise
from sdesolve.solvers.base import AbstractSolver
from sdesolve.solvers.correctors import AbstractCorrector

VP = sds.VP()
SCORE = sds.Gaussian(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 0.3])).score(VP)
X0 = torch.tensor([[1.0, 2.0], [0.5, 0.3], [0.7, 1.1]])
STEPS = 5
# What cannot be made without arguments, and settings whose steps carry or draw something else than the default's.
MADE = {
    "PredictorCorrector": [
        sds.PredictorCorrector(sds.SDEDPMSolverPP(2), sds.LangevinCorrector(snr=0.1), n=2),
        sds.PredictorCorrector(sds.SDEDPMSolverPP2S(), sds.LangevinCorrector(step_size=0.01)),
        sds.PredictorCorrector(sds.UniPC(2), sds.LangevinCorrector(snr=0.1, norms="batch")),
    ],
    "DPMSolverPP": [sds.DPMSolverPP(2), sds.DPMSolverPP(3)],
    "DDIM": [sds.DDIM(), sds.DDIM(0.5)],
    "SASolver": [sds.SASolver(3, 3), sds.SASolver(2, 0)],
    "EDMHeun": [sds.EDMHeun(), sds.EDMHeun(churn=5.0)],
    "Milstein": [sds.Milstein(), sds.Milstein(area="foster")],
    "UniPC": [sds.UniPC(3), sds.UniPC(1, "bh1")],
    "ReversibleHeun": [sds.ReversibleHeun(tolerance=5.0)],  # five steps are coarse
    "SKSROCK": [sds.SKSROCK(5)],
}


EQUATIONS = {
    sds.UnderdampedLangevin: sds.UnderdampedLangevin(lambda x, t: x + torch.sin(3 * t), friction=0.7),
    sds.models.CIR: sds.models.CIR(1.0, 1.0, 0.5),
}


def exported(kind):
    classes = [getattr(sds, name) for name in sds.__all__] + [getattr(sds.mcmc, name) for name in dir(sds.mcmc)]
    return {c for c in classes if inspect.isclass(c) and issubclass(c, kind) and not inspect.isabstract(c)}


def made(kind):
    """Solvers of a class: those above, that of its defaults, or one that wraps another solver."""
    if kind.__name__ in MADE:
        return MADE[kind.__name__]
    needed = [p for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    return [kind(sds.EulerMaruyama()) if needed else kind()]


# Reactions are of counts, and are cut in test_jumps.
SOLVERS = [
    solver for kind in sorted(exported(AbstractSolver) - {sds.Gillespie, sds.TauLeap}, key=str) for solver in made(kind)
]


def column(t):
    return t.reshape(-1, 1)


def equation(solver):
    """One that the solver is for, with time in all of its coefficients."""
    if not isinstance(solver, sds.AbstractOneStep):
        flow = solver.weak_order is None or (Calculus.ITO, Noise.ADDITIVE) not in solver.supported
        return VP.probability_flow(SCORE) if flow else VP.reverse(SCORE, solver.stochasticity or 1.0)
    if solver.equations:
        return EQUATIONS[solver.equations[0]]
    kinds = [
        n
        for n in (Noise.GENERAL, Noise.DIAGONAL, Noise.SCALAR, Noise.ADDITIVE)
        if any(n is m for _, m in solver.supported)
    ]
    if not kinds:
        return sds.ODE(lambda x, t: torch.sin(3 * column(t)) - x)
    calculus = next(c for c, n in solver.supported if n is kinds[0])
    g = {
        Noise.GENERAL: lambda x, t: torch.stack([0.3 * x, 0.2 * (1 + column(t)) * x], -1),
        Noise.ADDITIVE: lambda x, t: 0.3 * (1 + column(t)),
    }.get(kinds[0], lambda x, t: 0.3 * (1 + column(t)) * x)
    return sds.SDE(lambda x, t: torch.sin(3 * column(t)) - x, g, kinds[0].value, calculus.value)


def cuts(solver, x0, **options):
    """The whole run, and for each grid point the run that is cut there."""
    sde = equation(solver)
    ends = (0.9, 0.2) if isinstance(sde, sds.AbstractSemilinear) else (0.2, 0.9)
    grid = sds.grids.uniform(*ends, STEPS)
    options = {"solver": solver, "save_at": "grid", **options}
    whole = sds.solve(sde, x0, grid=grid, noise=sds.BrownianPath(3, first_path=2), **options)
    yield whole, whole
    for k in (1, 3):
        first = sds.solve(sde, x0, grid=grid[: k + 1], noise=sds.BrownianPath(3, first_path=2), **options)
        state = pickle.loads(pickle.dumps(first.state)) if k == 3 else first.state
        yield whole, sds.solve(sde, grid=grid[k:], start=state, **options)


# What a solver hands on is the same in torch, where every third is tried.
WHERE = [("fused", s) for s in SOLVERS] + [
    pytest.param("eager", s, marks=[pytest.mark.thorough] if i % 3 else []) for i, s in enumerate(SOLVERS)
]


@pytest.mark.parametrize(("backend", "solver"), WHERE, ids=repr)
def test_a_run_that_is_cut_has_the_bits_of_the_whole(solver, backend):
    """SDEDPMSolverPP2S in two pieces had a variance of 1.57 for 0.98; DPMSolverPP(2) and UniPC(2) forgot."""
    x0 = X0.double()
    if not solver.divisible:
        times = {} if solver.controller else {"grid": VP.time_grid(3)}
        ends = {} if times else {"t0": 0.9, "t1": 0.2}
        sol = sds.solve(equation(solver), x0, solver=solver, seed=0, **times, **ends)
        assert sol.state is None
        with pytest.raises(TypeError, match="give x0, the states to start from, or start"):
            sds.solve(equation(solver), solver=solver, start=sol.state, **times, **ends)
        return
    if isinstance(solver, sds.PredictorCorrector) and not solver.corrector.affine and backend == "fused":
        return  # not fused, and says so
    with use_backend("reference"):  # walks the traced step; the compiled one is below
        for whole, rest in cuts(solver, x0, backend=backend):
            k = STEPS - rest.stats.steps
            assert torch.equal(rest.xs, whole.xs[k:])
            assert torch.equal(rest.x1, whole.x1)
            assert torch.equal(rest.ts, whole.ts[k:])
            assert torch.equal(rest.state.times, whole.state.times)
            assert [*map(torch.equal, rest.state.memory, whole.state.memory)] == [True] * len(whole.state.memory)


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), sds.SASolver(2, 1), sds.SDEDPMSolverPP2S()], ids=repr)
@pytest.mark.parametrize("backend", ["fused", "kernel"])
def test_kernels_go_on_at_any_step(solver, backend):
    if isinstance(solver, sds.EulerMaruyama) and backend == "kernel":
        return  # of general noise, which no kernel steps
    for whole, rest in cuts(solver, X0, backend=backend):
        assert torch.equal(rest.xs, whole.xs[STEPS - rest.stats.steps :])
    moments = sds.solve(
        equation(solver), start=whole.state, t1=0.1, steps=2, solver=solver, backend=backend, reduce="moments"
    )
    assert moments.stats.steps == 2


def test_every_corrector_and_chain_goes_on():
    """Kernels of `run_chain` carry all they remember in `Chain`: state and velocity."""
    assert exported(AbstractCorrector) == {sds.LangevinCorrector}  # each is in `MADE`
    energy = lambda x: 0.25 * x.pow(4).flatten(1).sum(1)  # noqa: E731
    for kernel in exported(AbstractKernel):
        kernel = kernel(0.1)
        whole = sds.run_chain(kernel, X0.double(), 9, energy=energy, seed=2, save_every=1)
        for k in (1, 4, 8):
            first = sds.run_chain(kernel, X0.double(), k, energy=energy, seed=2)
            rest = sds.run_chain(
                kernel, first.x, 9 - k, energy=energy, noise=sds.BrownianPath(2).after(k), velocity=first.velocity
            )
            assert torch.equal(rest.x, whole.x), (kernel, k)


def test_noise_is_counted_in_steps_of_the_solver():
    solver, grid = sds.SDEDPMSolverPP2S(), VP.time_grid(6)
    reverse, path = VP.reverse(SCORE), sds.BrownianPath(1)
    options = {"solver": solver, "backend": "eager"}
    whole = sds.solve(reverse, X0, grid=grid, noise=path, **options)
    half = sds.solve(reverse, X0, grid=grid[:3], noise=path, **options)
    rest = sds.solve(reverse, half.x1, grid=grid[2:], noise=path.after(2), **options)
    torch.testing.assert_close(rest.x1, whole.x1)


def test_a_time_per_sample_and_padding_go_on():
    sde = equation(sds.EulerMaruyama())
    grid = torch.stack([torch.linspace(0, 1, 7), torch.linspace(1, 0, 7), torch.linspace(2, 3, 7)], 1).double()
    grid[3:, 2] = grid[3, 2]
    options = {"solver": sds.EulerMaruyama(), "save_at": "grid"}
    whole = sds.solve(sde, X0, grid=grid, seed=5, **options)
    first = sds.solve(sde, X0, grid=grid[:3], seed=5, **options)
    rest = sds.solve(sde, grid=grid[2:], start=first.state, **options)
    assert torch.equal(torch.cat([first.xs, rest.xs[1:]]), whole.xs)
    shared = sds.solve(sde, X0, 0.0, 1.0, 4, seed=5, solver=sds.EulerMaruyama())  # and from one time into several
    spread = sds.solve(sde, start=shared.state, t1=torch.tensor([2.0, 3.0, 0.5]), steps=3, solver=sds.EulerMaruyama())
    assert spread.state.times.shape == (8, 3)


def test_saved_between_grid_points_after_a_cut():
    sde, grid, solver = equation(sds.EulerMaruyama()), sds.grids.uniform(0.0, 1.0, 6), sds.EulerMaruyama()
    times = [0.55, 0.7, 5 / 6, 0.99]
    for backend in ("eager", "fused"):
        with use_backend("reference"):
            options = {"solver": solver, "save_at": times, "backend": backend}
            whole = sds.solve(sde, X0, grid=grid, seed=5, **options)
            first = sds.solve(sde, X0, grid=grid[:4], seed=5, solver=solver, backend=backend)
            rest = sds.solve(sde, grid=grid[3:], start=first.state, **options)
        assert torch.equal(rest.xs, whole.xs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": X0}, ValueError, "start holds state and noise of the run to go on with: leave x0 out"),
        ({"seed": 1}, ValueError, "leave seed out"),
        ({"t0": 0.5}, ValueError, "start is the state at t = 1.0, and the grid begins at 0.5"),
        ({"t1": None, "steps": None, "grid": [0.9, 2.0]}, ValueError, "at t = 1.0, and the grid begins at 0.9"),
        ({"solver": sds.Milstein()}, ValueError, r"start comes from EulerMaruyama\(\).* not Milstein\(.*x0=start.x"),
        ({"start": X0}, TypeError, "start must be the state of a Solution, got Tensor; tensors go to x0"),
        ({"start": None}, TypeError, "give x0, the states to start from, or start"),
    ],
)
def test_what_does_not_go_on(options, error, message):
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    state = sds.solve(sde, X0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), seed=0, backend="eager").state
    with pytest.raises(error, match=message):
        sds.solve(sde, **{"t1": 2.0, "steps": 4, "solver": sds.EulerMaruyama(), "start": state, **options})


class Idle(sds.AbstractOneStep):
    """Its step returns the very state that it was given."""

    supported = sds.supports(ito=(Noise.DIAGONAL,))
    strong_order, weak_order, ode_order, evaluations = 0.5, 1.0, None, 0

    def step(self, sde, x, span, noise):
        return x


@pytest.mark.parametrize("solver", [sds.EulerMaruyama(), Idle()], ids=repr)
@pytest.mark.parametrize("save_at", [None, "grid", [0.3, 1.0]], ids=str)
def test_results_share_no_memory_whatever_ran(solver, save_at):
    """`x1` and the last of `xs` were one in fused runs and two in eager ones."""
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    for backend in ("eager", "fused", "kernel") if isinstance(solver, sds.EulerMaruyama) else ("eager", "fused"):
        for observable in (None, lambda x: x):
            options = {"solver": solver, "seed": 0, "backend": backend, "save_at": save_at, "observable": observable}
            with use_backend("auto" if backend == "kernel" else "reference"):
                sol = sds.solve(sde, X0, 0.0, 1.0, 2, **options)
            owners = {t.untyped_storage().data_ptr() for t in (X0, sol.x1, sol.xs)}
            assert len(owners) == 3
            assert sol.state.x is sol.x1
