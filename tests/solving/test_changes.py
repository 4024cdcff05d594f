"""Changes of the state at given times (`at=`): where they apply, executors, gradients, what is refused."""

import itertools
import math

import pytest
import torch
from sdesolve_kernels import use_backend

import sdesolve as sds

F64 = torch.float64
OU = sds.SDE(lambda x, t: -x, lambda x, t: 0.5, noise="additive")
STRATONOVICH = sds.SDE(lambda x, t: -x, lambda x, t: 0.5 * x, noise="diagonal", calculus="stratonovich")
STILL = sds.ODE(lambda x, t: 0.0 * x)
REMEMBERING = sds.ReversibleHeun(tolerance=100.0)
GRID = sds.grids.uniform(0.0, 2.0, 8)


def start(batch=5):
    return torch.linspace(0.5, 1.5, batch, dtype=F64)[:, None]


def dosed(x):
    return x + 1.0


def timed(x, t):
    return 0.5 * x + t


AT = [(GRID[[8, 0, 4]], dosed), ({0.75, 1.0}, timed)]
POINTS = {0: [dosed], 3: [timed], 4: [dosed, timed], 8: [dosed]}


def changed(x, t, maps):
    for map_ in maps:
        x = map_(x) if map_ is dosed else map_(x, t)
    return x


def by_pieces(sde, grid, x, points, **options):
    """The same by runs that end at each time, and begin again from the changed state with the noise of their steps."""
    cuts = sorted({0, len(grid) - 1, *points})
    x = changed(x, grid[0], points.get(0, ()))
    states = [x]
    for a, b in itertools.pairwise(cuts):
        noise = sds.BrownianPath(3, first_step=a)
        sol = sds.solve(sde, x, grid=grid[a : b + 1], noise=noise, save_at="grid", backend="eager", **options)
        x = changed(sol.x1, grid[b], points.get(b, ()))
        states += [*sol.xs[1:-1], x]
    return torch.stack(states)


@pytest.mark.parametrize(
    ("sde", "solver", "backend", "backwards"),
    [
        (STRATONOVICH, REMEMBERING, "eager", False),  # which remembers, and begins anew
        (STRATONOVICH, REMEMBERING, "fused", True),
        (OU, sds.EulerMaruyama(), "eager", True),
        (OU, sds.EulerMaruyama(), "kernel", False),
        (OU, sds.ShARK(), "fused", False),
        (sds.ODE(lambda x, t: -x), sds.RK4(), "eager", True),
    ],
)
def test_a_run_is_shorter_runs_with_the_maps_between_them(sde, solver, backend, backwards):
    grid = GRID.flip(0) if backwards else GRID
    points = {8 - k: maps for k, maps in POINTS.items()} if backwards else POINTS
    want = by_pieces(sde, grid, start(), points, solver=solver)
    options = {"grid": grid, "solver": solver, "seed": 3, "at": AT, "backend": backend}
    sol = sds.solve(sde, start(), save_at="grid", **options)
    assert sol.stats.execution == backend
    torch.testing.assert_close(sol.xs, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(sol.x1, sol.xs[-1])
    assert torch.equal(sds.solve(sde, start(), **options).x1, sol.x1)


@pytest.mark.uncompiled
def test_doses_of_an_ornstein_uhlenbeck_process_add_up_as_they_decay():
    dose, times = 2.0, torch.tensor([0.4, 0.8, 1.2])  # in float32, as the grid is not
    x0 = torch.zeros(4000, 1, dtype=F64)
    sol = sds.solve(OU, x0, 0.0, 2.0, 200, solver=sds.ShARK(), seed=1, at=[(times, lambda x: x + dose)])
    mean = dose * sum(math.exp(-(2.0 - t)) for t in (0.4, 0.8, 1.2))
    variance = 0.125 * (1.0 - math.exp(-4.0))
    assert sol.stats.execution == "fused"
    assert abs(float(sol.x1.mean()) - mean) < 4.0 * math.sqrt(variance / 4000)
    assert abs(float(sol.x1.var()) / variance - 1.0) < 4.0 * math.sqrt(2.0 / 4000)


@pytest.mark.uncompiled
@pytest.mark.parametrize("options", [{"backend": "fused"}, {"backend": "eager"}, {"gradients": "checkpoint"}])
def test_gradients_of_what_maps_are_made_of(options):
    dose = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x0 = (start() - 1.0).requires_grad_()
    # A root that has no value where the state is before and after that time takes no part there.
    at = [(0.0, lambda x: dose * x), (1.0, lambda x: (x - x.detach() + dose).sqrt()), (2.0, lambda x: x - 4.0 * dose)]
    drift = sds.ODE(lambda x, t: 0.0 * x + 1.0)
    if options.get("gradients"):
        options = {"backend": "eager", **options}
    sol = sds.solve(drift, x0, 0.0, 2.0, 4, solver=sds.RK4(), at=at, **options)
    by_x0, by_dose = torch.autograd.grad(sol.x1.sum(), [x0, dose])
    root = 0.5 / math.sqrt(2.0)
    torch.testing.assert_close(sol.x1, torch.full_like(x0, math.sqrt(2.0) + 1.0 - 8.0))
    torch.testing.assert_close(by_x0, torch.full_like(x0, 2.0 * root))
    torch.testing.assert_close(by_dose, (root * (1.0 + x0) - 4.0).sum().detach())


def test_a_map_is_called_at_its_times_alone_in_torch():
    met = []

    def noted(x, t):
        met.append(float(t))
        return x

    run = {"solver": sds.RK4(), "backend": "eager"}
    sds.solve(STILL, start(1), 0.0, 2.0, 8, at=[([0.75, 2.0], noted)], **run)
    assert met[-2:] == [0.75, 2.0]
    assert set(met[:-2]) <= {0.0}  # what is looked at beforehand


def test_a_run_that_goes_on_has_changes_of_its_own():
    grid, run = GRID, {"solver": REMEMBERING, "backend": "eager", "seed": 3}
    whole = sds.solve(STRATONOVICH, start(), grid=grid, at=[(1.0, dosed), (1.5, timed)], **run)
    del run["seed"]
    for first, then in (
        ([(1.0, dosed)], [(1.5, timed)]),
        ([], [(1.5, timed), (1.0, dosed)]),
    ):
        half = sds.solve(STRATONOVICH, start(), grid=grid[:5], at=first, seed=3, **run)
        rest = sds.solve(STRATONOVICH, start=half.state, grid=grid[4:], at=then, save_at="grid", **run)
        torch.testing.assert_close(rest.x1, whole.x1, rtol=1e-12, atol=1e-12)
        assert torch.equal(rest.xs[0], half.x1 if first else half.x1 + 1.0)
    # What has stopped stands, whatever changes where the run goes on.
    run = {"solver": sds.RK4(), "backend": "eager"}
    moves = sds.ODE(lambda x, t: 0.0 * x + 1.0)
    half = sds.solve(moves, start(), grid=grid[:5], until=sds.Crossing(lambda x, t: x[:, 0] - 2.1), **run)
    rest = sds.solve(moves, start=half.state, grid=grid[4:], at=[(1.0, lambda x: x - 3.0), (2.0, timed)], **run)
    assert 0 < int(half.stopped.sum()) < 5
    torch.testing.assert_close(rest.x1[:, 0], torch.where(half.stopped, 2.1, 0.5 * (start()[:, 0] - 1.0) + 2.0))


@pytest.mark.parametrize(("backend", "kernels"), [("eager", "auto"), ("fused", "auto"), ("fused", "reference")])
def test_what_follows_paths_sees_both_sides_of_a_change(backend, kernels):
    line = sds.SDE(lambda x, t: 0.0 * x + 1.0, lambda x, t: 0.0 * x, noise="diagonal")
    x0 = torch.tensor([[0.0], [-2.5], [3.0]], dtype=F64).repeat(6, 1)
    with use_backend(kernels):
        sol = sds.solve(
            line, x0, 0.0, 2.0, 8, solver=sds.EulerMaruyama(), seed=0, backend=backend,
            at=[(1.0, lambda x: x + 2.0), (1.5, lambda x: x - 4.0)], save_at=[1.0, 1.5, 2.0],
            carry=sds.Integral(lambda x, t: x[:, 0]), until=sds.Crossing(lambda x, t: x[:, 0] - 1.75),
        )  # fmt: skip
    assert sol.stats.execution == backend
    # Row 0 is taken across at 1 and stands there; row 1 stays below; row 2 passes the level as it falls at 1.5.
    third = torch.tensor([[3.0, 3.0, 3.0], [0.5, -3.0, -2.5], [6.0, 2.5, 3.0]], dtype=F64)
    torch.testing.assert_close(sol.xs[:, :2, 0], third[:2].T)
    torch.testing.assert_close(sol.xs[:, 2, 0], third[2])
    torch.testing.assert_close(sol.carry[:2], torch.tensor([0.5, -2.0 + 0.375 - 1.375], dtype=F64))
    assert sol.stopped[:3].tolist() == [True, False, False]
    assert float(sol.stop_time[0]) == 1.0
    assert torch.equal(sol.x1, sol.x1[:3].repeat(6, 1))


def test_a_gradient_passes_what_stops_a_path():
    x0, dose = start().requires_grad_(), torch.tensor(2.0, dtype=F64, requires_grad=True)
    sol = sds.solve(
        OU, x0, 0.0, 2.0, 8, solver=sds.EulerMaruyama(), seed=0, backend="eager", at=[(0.5, lambda x: x + dose)],
        until=sds.Crossing(lambda x, t: x[:, 0] - 2.0, 1),
    )  # fmt: skip
    assert bool(sol.stopped.all())
    by_x0, by_dose = torch.autograd.grad(sol.x1.sum(), [x0, dose])
    torch.testing.assert_close(by_x0, torch.full_like(x0, 0.75**2))
    assert float(by_dose) == 5.0


def test_the_last_time_may_be_repeated_and_changes_once():
    grid = torch.tensor([0.0, 1.0, 2.0, 2.0, 2.0], dtype=F64)
    sol = sds.solve(STILL, start(), grid=grid, solver=sds.RK4(), at=[(2.0, dosed)], save_at="grid")
    assert [float((x - start()).mean()) for x in sol.xs] == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.0])


def test_a_time_off_the_grid_is_put_there_as_the_message_says():
    run = {"solver": sds.RK4(), "at": [([0.25, 1.9, 1.1], dosed)]}
    for grid in (GRID, GRID.flip(0)):
        with pytest.raises(ValueError, match=r"at\[0\] holds 1\.9, which is no point") as met:
            sds.solve(STILL, start(), grid=grid, **run)
        assert ("flip(0)" in str(met.value)) == (grid is not GRID)
        more = torch.cat([grid, torch.tensor([1.9, 1.1], dtype=F64)]).unique()
        sol = sds.solve(STILL, start(), grid=more if grid is GRID else more.flip(0), **run)
        torch.testing.assert_close(sol.x1, start() + 3.0)


@pytest.mark.parametrize(
    ("at", "error", "says"),
    [
        ((1.0, dosed), TypeError, "write at="),
        ({1.0: dosed}, TypeError, "list of pairs"),
        (torch.ones(3, 2), TypeError, "list of pairs"),
        ([(1.0, 3.0)], TypeError, r"at\[0\] must hold a map"),
        ([(1.0, dosed), (1.0, lambda x, t, y: x)], TypeError, "has 3 arguments"),
        ([("1.0", dosed)], TypeError, r"at\[0\] must be a number"),
        ([([], dosed)], ValueError, "at least one"),
        ([(torch.ones(5, 1), dosed)], ValueError, "same for all samples"),
        ([(2.5, dosed)], ValueError, "outside the grid"),
        ([(math.nan, dosed)], ValueError, "outside the grid"),
        ([([1.0, 1.0], dosed)], ValueError, "twice"),
        ([(1.0, lambda x: x[:, 0])], ValueError, r"map of at\[0\] must return the shape"),
        ([(1.0, lambda x: 2.0)], TypeError, "must return a tensor"),
        ([(1.0, lambda x: x.float())], TypeError, "float32"),
        ([(1.0, lambda x: x - x.mean(0))], ValueError, "couples the paths"),
        ([(1.0, lambda x: x.add_(1.0))], ValueError, "changed the state"),
        ([(0.0, lambda x: x / 0.0)], ValueError, "must be finite"),
    ],
)
def test_what_is_no_change_is_refused(at, error, says):
    with pytest.raises(error, match=says):
        sds.solve(STILL, start(), 0.0, 2.0, 8, solver=sds.RK4(), at=at)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"t1": torch.linspace(1.0, 2.0, 5)}, "grid of its own"),
        ({"save_at": [0.9, 2.0]}, "whose end at= changes"),
        ({"at": [(1.0, lambda x: x / 0.0)]}, "at= changes the end of this step"),
    ],
)
def test_runs_without_changes_are_refused_by_name(options, says):
    run = {"t0": 0.0, "t1": 2.0, "steps": 8, "solver": sds.RK4(), "at": [(1.0, dosed)], **options}
    with pytest.raises((ValueError, sds.DivergenceError), match=says):
        sds.solve(STILL, start(), **run)


def test_multistep_samplers_are_refused():
    flow = sds.VP().probability_flow(sds.Gaussian(torch.zeros(1), torch.eye(1)).score(sds.VP()))
    with pytest.raises(ValueError, match="goes by states of earlier steps"):
        sds.solve(flow, torch.zeros(3, 1), 1.0, 0.1, 9, solver=sds.DPMSolverPP(), at=[(0.5, dosed)])
