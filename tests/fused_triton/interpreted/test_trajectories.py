"""Generated Triton trajectories against eager steps and against the Numba kernels, on the same noise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sdesolve_kernels import register_backend, use_backend
from sdesolve_kernels._triton.backend import TritonBackend
from sdesolve_kernels.trajectory import Launch, Signature, compile_trajectory, trace
from sdesolve_kernels.trajectory import triton_launch as launcher
from sdesolve_kernels.trajectory.triton_source import Shape

import sdesolve as sds

# Normals agree within this (kernels/README.md), and enter a state a few times over.
NOISE = {torch.float32: 1e-5, torch.float64: 2e-14}
A = torch.tensor([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]])


class OnTheHost(TritonBackend):
    """The interpreter runs on tensors in host memory."""

    name = "triton on the host"
    devices = frozenset({"cpu"})
    priority = -1
    compared = False  # every result is compared here, and the interpreter is slow


register_backend(OnTheHost(), replace=True)


@pytest.fixture
def programs_of_four(monkeypatch):
    """Several programs even for a few paths, the last of them not full."""
    monkeypatch.setattr(launcher, "shape_for", lambda paths, operations, **kind: Shape(4, 1, **kind))


def triton(sde, x0, *args, **options):
    with use_backend(OnTheHost.name):
        return sds.solve(sde, x0, *args, backend="fused", **options)


def assert_same(sde, x0, *args, numba=False, **options):
    """Triton and eager (and Numba) agree as far as their normals and their roundings do; returns the first."""
    ours = triton(sde, x0, *args, **options)
    eager = sds.solve(sde, x0, *args, backend="eager", **options)
    exact = NOISE[x0.dtype]
    tolerance = 16 * exact + 64 * torch.finfo(x0.dtype).eps * float(eager.xs.abs().max())
    assert ours.stats.backend == "fused"
    assert ours.xs.shape == eager.xs.shape
    assert float((ours.xs - eager.xs).abs().max()) <= tolerance
    assert float((ours.x1 - eager.x1).abs().max()) <= tolerance
    if numba:
        with use_backend("numba"):
            other = sds.solve(sde, x0, *args, backend="fused", **options)
        assert float((ours.xs - other.xs).abs().max()) <= tolerance
    return ours


def start(paths=5, width=3, dtype=torch.float32):
    return torch.linspace(0.5, 1.5, paths * width, dtype=torch.float64).reshape(paths, width).to(dtype)


def drift(x, t):
    return torch.sin(x) - 0.5 * x * t


SDES = {
    "diagonal": sds.SDE(drift, lambda x, t: 0.3 * torch.cos(x) + 0.1 * t, noise="diagonal"),
    "scalar": sds.SDE(drift, lambda x, t: 0.2 * x, noise="scalar"),
    "additive": sds.SDE(drift, lambda x, t: 0.2 + 0.1 * t, noise="additive"),
    "general": sds.SDE(drift, lambda x, t: A * x.unsqueeze(-1).tanh(), noise="general"),
}
STRATONOVICH = {
    name: sds.SDE(drift, lambda x, t: 0.3 * x, noise=name, calculus="stratonovich") for name in ("diagonal", "scalar")
}
PAIRS = [
    *((sds.EulerMaruyama(), n, sde) for n, sde in SDES.items()),
    (sds.Milstein(), "diagonal", SDES["diagonal"]),
    *((sds.Heun(), n, sde) for n, sde in STRATONOVICH.items()),
    (sds.RK4(), "none", sds.ODE(drift)),
]


@pytest.mark.parametrize(("solver", "noise", "sde"), PAIRS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_every_solver_and_noise(solver, noise, sde):
    """Half of them backwards."""
    times = (1.0, 0.25) if noise in ("scalar", "none") or isinstance(solver, sds.Milstein) else (0.0, 1.0)
    assert_same(sde, start(), *times, 6, solver=solver, seed=2**63 + 5)


@pytest.mark.parametrize(
    ("noise", "width", "swapped"),
    [("diagonal", 1, False), ("diagonal", 2, False), ("diagonal", 4, False), ("general", 3, False),
     ("diagonal", 1, True), ("diagonal", 4, True)],
)  # fmt: skip
def test_starts_inside_a_block(noise, width, swapped):
    """Runs begin and end anywhere; groups of steps, single steps and grids that are not steady have the same bits."""
    sde, x0, motion = SDES[noise], start(3, width), sds.BrownianPath(1, swapped=swapped)
    grid = torch.linspace(0.0, 1.0, 12, dtype=torch.float64) ** 1.5
    options = {"solver": sds.EulerMaruyama()}
    whole = assert_same(sde, x0, grid=grid, noise=motion, save_at="grid", **options).xs
    for first in (1, 2, 5):
        path = motion.after(first)
        part = triton(sde, whole[first], grid=grid[first:], noise=path, **options)
        assert torch.equal(part.x1, whole[-1])
        rows = triton(sde, x0[first % 3 :], grid=grid, noise=motion.rows(first % 3), **options)
        assert torch.equal(rows.x1, whole[-1][first % 3 :])


def test_saving_in_programs_that_are_not_full(programs_of_four):
    options = {"solver": sds.EulerMaruyama(), "seed": 3}
    at = [0.0, 0.25, 0.625]  # and not the end
    saved = assert_same(SDES["diagonal"], start(7), 0.0, 1.0, 8, save_at=at, **options)
    moments = triton(SDES["diagonal"], start(7), 0.0, 1.0, 8, save_at=at, reduce="moments", **options)
    exact = saved.xs.double()
    assert torch.allclose(moments.mean, exact.mean(1), rtol=1e-13)
    assert torch.allclose(moments.variance, exact.var(1), rtol=1e-13)
    seen = assert_same(
        SDES["diagonal"], start(7), 0.0, 1.0, 8, save_at=at, observable=lambda x: torch.relu(x.sum(1) - 2.0), **options
    )
    assert torch.allclose(seen.xs, torch.relu(saved.xs.sum(2) - 2.0), atol=1e-6)


@pytest.mark.parametrize(("kind", "width"), [("two-point", 3), ("two-point", 33), ("three-point", 1)])
def test_weak_increments(kind, width):
    """40 steps: a run of whole words, and steps on both sides of it."""
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.3 * x, noise="diagonal")
    steps = 40 if width < 33 else 5
    noise = sds.BrownianPath(11, first_step=29, kind=kind)
    ours = assert_same(sde, start(3, width), 0.0, 1.0, steps, solver=sds.EulerMaruyama(), noise=noise, numba=width == 3)
    again = triton(sde, start(3, width), 0.0, 1.0, steps, solver=sds.EulerMaruyama(), noise=noise, save_at="grid")
    assert torch.equal(ours.x1, again.x1)


def test_float64():
    sde = sds.SDE(lambda x, t: torch.where(x > 1.0, 0.1 * x**2.5, 0.3), lambda x, t: 0.1 * x, noise="diagonal")
    options = {"solver": sds.EulerMaruyama(), "seed": 4}
    ours = assert_same(sde, start(3, dtype=torch.float64), 0.0, 1.0, 9, numba=True, **options)
    assert "DOUBLE = tl.constexpr(True)" in ours.stats.source


def test_parameters_are_arguments():
    sde = sds.SDE(lambda x, t, p: p["rate"] * x * p["all"], lambda x, t, p: 0.1 * p["rate"] * x, noise="diagonal")
    options = {"solver": sds.EulerMaruyama(), "seed": 0}
    sources = set()
    for scale in (1.0, 2.0):
        params = {"rate": scale * torch.linspace(0.1, 1.0, 5)[:, None], "all": torch.tensor([1.0, 2.0, scale])}
        sources.add(assert_same(sde, start(5), 0.0, 1.0, 5, params=params, **options).stats.source)
    assert len(sources) == 1


@pytest.mark.parametrize("width", [1, 3])
def test_counters_beyond_32_bits(width):
    """Numbers on both sides of block 2^32, where a run of groups must stop, and paths above 2^32."""
    first = (2**34 - 12) // width
    noise = sds.BrownianPath(5, first_path=2**33 - 1, first_step=first)
    assert_same(SDES["scalar" if width == 1 else "diagonal"], start(3, width), 0.0, 1.0, 11,
                solver=sds.EulerMaruyama(), noise=noise)  # fmt: skip


def test_memory_and_table():
    """A multistep scheme carries what it computed the step before, and reads the solver's own table."""
    process = sds.VP()
    data = sds.GaussianMixture(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), torch.tensor([0.3, 0.5]))
    score = data.score(process)
    x = start(4, 2)
    for equation, solver in (
        (process.probability_flow(score), sds.DPMSolverPP(order=2)),
        (process.reverse(score), sds.EulerMaruyama()),
    ):
        assert_same(equation, x, 1.0, 0.1, 6, solver=solver, seed=1)


def test_memory_starts_at_zero():
    x0 = start()
    signature = Signature(x0.dtype, x0.device, ((3,), (3,)), (), 0, len(x0))
    program = trace(lambda inputs: (inputs.states[0] + inputs.states[1], inputs.states[1] + 1.0), signature)
    with use_backend(OnTheHost.name):
        made = compile_trajectory(program, []).run(Launch(x0, torch.arange(5.0).double(), None, (), (), False, ()))
    assert torch.allclose(made.x1, x0 + 6.0, rtol=1e-6)


def test_networks_are_written_out_up_to_a_limit():
    torch.manual_seed(0)

    def network(hidden):
        layers = [torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, hidden), torch.nn.SiLU()]
        return torch.nn.Sequential(*layers, torch.nn.Linear(hidden, 3)).requires_grad_(False)

    def solve(net):
        sde = sds.SDE(lambda x, t: net(x), lambda x, t: 0.1, noise="additive")
        return assert_same(sde, start(3), 0.0, 1.0, 2, solver=sds.EulerMaruyama(), seed=0)

    solve(network(17))
    with pytest.raises(ValueError, match=r"matrices of \d+ entries"):
        solve(network(80))


def test_a_large_step_takes_single_steps_only():
    def rough(x, t):
        for _ in range(60):
            x = x + 0.001 * torch.sin(x) * x * x / (1 + x)
        return x

    sde = sds.SDE(rough, lambda x, t: 0.1 * x, noise="diagonal")
    ours = assert_same(
        sde, start(2, 4), 0.0, 0.1, 3, solver=sds.EulerMaruyama(), noise=sds.BrownianPath(0, first_step=1)
    )
    assert "for _ in range" not in ours.stats.source


def test_operations():
    """One of each, with what torch returns where there is no finite answer."""

    def f(x, t):
        a = torch.exp(x) + torch.expm1(x) - torch.log(x) * torch.log1p(x) + torch.sqrt(x) / torch.rsqrt(x)
        b = torch.sin(x) * torch.cos(x) + torch.tan(0.3 * x) - torch.asin(0.1 * x) * torch.acos(0.2 * x)
        c = torch.sinh(x) - torch.cosh(x) + torch.tanh(x) * torch.atan(x) + torch.atan2(x, 1 + x)
        d = torch.erf(x) + torch.sigmoid(x) + torch.nn.functional.softplus(x) + torch.pow(x, 1.7) + x.abs()
        e = torch.floor(3 * x) + torch.ceil(x) - torch.round(5 * x) + torch.trunc(-7 * x) + torch.sign(x - 1)
        g = torch.where((x > 0.7) & ~(x > 1.2) | (x < 0.6), x.clamp(0.8, 1.1), torch.maximum(x, -x))
        h = torch.softmax(x, 1) + torch.logsumexp(x, 1, keepdim=True) + x.cumsum(1) + x.norm(dim=1, keepdim=True)
        return 0.1 * (a + b + c + d + e + g + h)

    assert_same(sds.ODE(f), start(), 0.0, 0.1, 1, solver=sds.RK4())
    assert_same(sds.ODE(f), start(dtype=torch.float64), 0.0, 0.1, 1, solver=sds.RK4())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, which the interpreter computes with
def test_what_is_not_finite():
    def f(x, t):
        infinite = 1.0 / x
        none = torch.log(x - 2.0)
        values = (infinite, none, torch.maximum(none, x), torch.minimum(none, x), torch.sign(none),
                  torch.where(none > 0, x, -x), torch.exp(infinite), (x - 3.0).pow(0.5))  # fmt: skip
        return torch.stack([v[:, i] for i, v in enumerate(values)], dim=1)

    x = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0], [-0.0, 2.0, 2.5, 2.5, 2.0, 3.5, -0.0, 3.0]])
    options = {"solver": sds.EulerMaruyama(), "check_finite": False}
    ours = triton(sds.ODE(f), x, 0.0, 1.0, 1, **options)
    eager = sds.solve(sds.ODE(f), x, 0.0, 1.0, 1, backend="eager", **options)
    assert torch.equal(ours.x1.isnan(), eager.x1.isnan())
    assert torch.allclose(ours.x1, eager.x1, rtol=1e-6, equal_nan=True)


def test_state_that_depends_on_time_alone():
    def f(x, t):
        return torch.stack([t.expand(len(x)), x[:, 0], 0 * x[:, 0]], 1)

    sde = sds.SDE(f, lambda x, t: torch.zeros(()), noise="additive")
    assert_same(sde, start(), 0.0, 1.0, 5, solver=sds.EulerMaruyama(), seed=0)


@pytest.mark.parametrize("case", ["saves", "moments", "memory", "two-point"])
def test_long_runs_are_launched_in_segments(case, monkeypatch, programs_of_four):
    """To the bit as in one launch; an exception between two launches leaves the others out."""
    solver = sds.DPMSolverPP(order=2)
    options = {"solver": sds.EulerMaruyama(), "noise": sds.BrownianPath(2**40 + 3, first_step=5)}
    if case == "saves":
        options["save_at"] = [0.0, 0.25, 0.3125, 0.9375, 1.0]
    elif case == "moments":
        options |= {"save_at": [0.25, 0.3125, 1.0], "reduce": "moments"}
    elif case == "two-point":
        options["noise"] = sds.BrownianPath(3, first_step=125, kind="two-point")

    def run():
        if case == "memory":
            score = sds.Gaussian(torch.zeros(3), torch.eye(3)).score(sds.VP())
            with use_backend(OnTheHost.name):
                return sds.sample(sds.VP(), score, (6, 3), solver=solver, steps=16, seed=0, backend="fused"), None
        sol = triton(SDES["diagonal"], start(6), 0.0, 1.0, 16, **options)
        return sol.x1, (sol.mean, sol.variance) if case == "moments" else (sol.xs,)

    launched = []
    plain = launcher.TritonTrajectory._launch

    def launch(self, *args):
        launched.append(args[7])
        plain(self, *args)

    monkeypatch.setattr(launcher.TritonTrajectory, "_launch", launch)
    x1, saved = run()
    assert launched == [16]
    launched.clear()
    monkeypatch.setattr(launcher, "_AT_ONCE", 1.0)  # as if a step took long: segments of one step, then of more
    again, saved_again = run()
    assert len(launched) > 2
    assert sum(launched) == 16
    assert torch.equal(again, x1)
    assert saved is None or all(map(torch.equal, saved_again, saved))


def test_progress_and_interrupts_between_launches(monkeypatch):
    sde, x0 = SDES["diagonal"], start(6)
    monkeypatch.setattr(launcher, "_AT_ONCE", 1.0)
    got = []
    plain = launcher.TritonTrajectory.run
    monkeypatch.setattr(
        launcher.TritonTrajectory, "run", lambda self, launch: got.append((self, launch)) or plain(self, launch)
    )
    triton(sde, x0, 0.0, 1.0, 16, solver=sds.EulerMaruyama(), seed=0)
    ((trajectory, launch),) = got
    done = []
    plain(trajectory, dataclasses.replace(launch, progress=done.append))
    assert sum(done) == 6 * 16
    assert len(done) > 2

    def stop(amount):
        done.append(amount)
        raise KeyboardInterrupt

    done.clear()
    with pytest.raises(KeyboardInterrupt):
        plain(trajectory, dataclasses.replace(launch, progress=stop))
    assert len(done) == 1


def test_a_divergence_beside_the_state():
    g = 0.5 * torch.eye(3) + 0.1 * A @ A.T
    sde = sds.SDE(drift, lambda x, t: g * torch.ones_like(x).unsqueeze(-1), "general")
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "kl_to": lambda x, t: -x, "save_at": [0.5, 0.7]}
    ours, eager = (run(sde, start(), 0.0, 1.0, 6, **options) for run in (triton, sds.solve))
    for a, b in ((ours.kl, eager.kl), (ours.kls, eager.kls), (ours.log_weights, eager.log_weights)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4)


def test_paths_that_stop_leave_the_batch_with_what_they_carry(programs_of_four):
    sde = sds.SDE(lambda x, t: x - x**3, lambda x, t: 0.7, noise="additive")
    until = [sds.Crossing(lambda x, t: x[:, 0]), sds.Crossing(lambda x, t: x[:, 0] + 1.0, -1)]
    options = {
        "solver": sds.EulerMaruyama(), "seed": 4, "until": until, "save_at": [0.5, 2.0],
        "carry": sds.RunningMaximum(lambda x, t: x[:, 0]), "observable": lambda x, t, c: torch.stack([t, c], 1),
        "at": [(0.5, lambda x, t: x - 0.5 * t), (1.0, lambda x: 0.9 * x)],
    }  # fmt: skip
    ours = assert_same(sde, torch.full((18, 1), -0.5), 0.0, 2.0, 12, **options)
    eager = sds.solve(sde, torch.full((18, 1), -0.5), 0.0, 2.0, 12, backend="eager", **options)
    assert torch.equal(ours.boundary, eager.boundary)
    assert torch.allclose(ours.stop_time, eager.stop_time, atol=1e-5)
    assert torch.allclose(ours.carry, eager.carry, atol=1e-5)
    assert int(ours.stopped.sum()) > 9


def test_rows_that_take_paths_again(programs_of_four):
    assert_same(
        SDES["additive"], start(7), 0.0, 1.0, 5, solver=sds.EulerMaruyama(), noise=sds.BrownianPath(3, repeat=3)
    )
