"""Generated Triton reverse kernels against torch's autograd of eager steps, and against Numba's."""

from __future__ import annotations

import itertools

import pytest
import torch
from sdesolve_kernels import register_backend, use_backend
from sdesolve_kernels._triton.backend import TritonBackend
from sdesolve_kernels.trajectory import backward, triton_backward
from sdesolve_kernels.trajectory.triton_source import Shape

import sdesolve as sds

F64 = torch.float64


class OnTheHost(TritonBackend):
    """The interpreter runs on tensors in host memory."""

    name = "triton on the host"
    devices = frozenset({"cpu"})
    priority = -1
    compared = False  # every gradient is compared here


register_backend(OnTheHost(), replace=True)


def cut_small(monkeypatch, lanes=4, programs=1, longest=3):
    """Several tiles a program, the last of them not full; several stretches, the last of them shorter."""
    monkeypatch.setattr(triton_backward, "_shape", lambda batch, **kind: Shape(lanes, 1, **kind))
    monkeypatch.setattr(triton_backward, "_LANES_AT_ONCE", programs * lanes)
    monkeypatch.setattr(triton_backward, "_FEWEST", longest)
    monkeypatch.setattr(triton_backward, "_LONGEST", longest)


@pytest.fixture
def small(monkeypatch):
    cut_small(monkeypatch)


@pytest.fixture
def segments(monkeypatch):
    """One stretch, of several segments."""
    cut_small(monkeypatch)
    monkeypatch.setattr(backward, "_KEPT", 1)


def leaf(*shape, seed=0, dtype=F64):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(run, wanted, backend):
    """Of a loss that no symmetry makes 0."""
    sol = run(backend)
    values = [sol.xs] if sol.mean is None else [sol.mean, sol.variance, sol.x1]
    weights = [torch.randn(v.shape, dtype=F64, generator=torch.Generator().manual_seed(7)) for v in values]
    loss = sum((v * w).sum() + (v.double() ** 2).mean() for v, w in zip(values, weights, strict=True))
    return torch.autograd.grad(loss, wanted), sol.stats


def fused(run, wanted, backend=OnTheHost.name):
    with use_backend(backend):
        made, stats = gradients(run, wanted, "fused")
    assert stats.execution == "fused"
    return made, stats


def check(run, wanted, tolerance=1e-10):
    made, stats = fused(run, wanted)
    assert "@triton.jit" in stats.source
    assert "def back(" in stats.source
    expected, _ = gradients(run, wanted, "eager")
    for a, b in zip(made, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def solver_of(sde, x0, steps=7, t0=0.0, t1=1.0, **options):
    options = {"solver": sds.EulerMaruyama(), "seed": 3, **options}
    return lambda backend: sds.solve(sde, x0, t0, t1, steps, backend=backend, **options)


def with_theta(noise="diagonal", calculus="ito"):
    theta, phase = leaf(2), leaf(seed=1)

    def drift(x, t):
        return theta * torch.tanh(x).flip(-1) - x * torch.exp(-phase * t)

    def diffusion(x, t):
        rate = 0.2 + 0.1 * torch.cos(phase * t)
        if noise == "general":
            return rate * torch.sin(x + theta)[..., None] * torch.arange(1.0, 4.0, dtype=x.dtype)
        return rate * (theta if noise == "additive" else torch.cos(theta * x))

    return sds.SDE(drift, diffusion, noise=noise, calculus=calculus), [theta, phase]


@pytest.mark.parametrize(
    ("solver", "noise", "calculus", "times"),
    [(sds.EulerMaruyama(), "general", "ito", (1.0, 0.0)), (sds.SRIW1(), "diagonal", "ito", (0.0, 1.0)),
     (sds.ReversibleHeun(), "diagonal", "stratonovich", (0.0, 1.0))],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)  # fmt: skip
def test_solvers(solver, noise, calculus, times, small):
    """Noise of several channels and sources, columns pulled back to a phase, what solvers carry."""
    sde, wanted = with_theta(noise, calculus)
    x0 = leaf(5, 2, seed=5)
    check(solver_of(sde, x0, 4, *times, solver=solver, save_at="grid"), [x0, *wanted])


@pytest.mark.parametrize(
    "options",
    [{"save_at": [0.0, 2 / 7, 3 / 7, 1.0], "increments": "three-point"}, {"increments": "two-point", "steps": 18},
     pytest.param({"noise": sds.BrownianPath(5, first_path=2**33 - 1, first_step=2**33 - 2), "seed": None},
                  marks=pytest.mark.thorough),
     {"reduce": "moments", "save_at": [0.0, 4 / 7, 1.0], "observable": lambda x: torch.relu(x.sum(1)) + x[:, 0]}],
    ids=["saves", "two-point", "counters", "moments"],
)  # fmt: skip
def test_runs(options, segments, monkeypatch):
    """With groups of steps and single ones, across the ends of blocks and of counters' halves."""
    cut_small(monkeypatch, longest=17 if "steps" in options else 4)
    theta, x0 = leaf(2), leaf(5, 2, seed=1)
    sde = sds.SDE(lambda x, t: theta * torch.sin(x.flip(-1)), lambda x, t: 0.3 * theta * x, noise="diagonal")
    check(solver_of(sde, x0, **options), [x0, theta])


def test_a_mean_comes_with_its_gradient(segments):
    """In one launch, on several tiles and segments; the same run also gives gradients of all else."""
    theta, x0 = leaf(2), leaf(5, 2, seed=1)
    sde = sds.SDE(lambda x, t: theta * torch.sin(x.flip(-1)), lambda x, t: 0.3 * theta * x, noise="diagonal")
    run = solver_of(sde, x0, reduce="moments", save_at=[4 / 7], observable=lambda x: torch.relu(x.sum(1)) + x[:, 0])
    with use_backend(OnTheHost.name):
        sol = run("fused")
        with torch.no_grad():
            plain = run("fused")
    assert "the gradient of its mean are one generated kernel" in sol.stats.reason
    assert torch.equal(sol.x1, plain.x1)
    for a, b in ((sol.mean, plain.mean), (sol.variance, plain.variance)):  # of tiles of other sizes
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    eager = run("eager")
    for of in (lambda s: (s.mean - s.mean**3).sum(), lambda s: s.mean.sum() + s.variance.sum()):
        expected = torch.autograd.grad(of(eager), [x0, theta], retain_graph=True)
        for a, b in zip(torch.autograd.grad(of(sol), [x0, theta], retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_forward_mode():
    """One tangent and several, of shared numbers, of a row for each path, and of a matrix that is kept whole."""
    rows, w, x0 = (leaf(*shape, seed=i).detach() for i, shape in enumerate([(5, 2), (2, 60), (5, 2)]))
    channels = leaf(60, 2, seed=4).detach()

    def end(backend, u):
        drift = lambda x, t, p: torch.tanh(x @ (u[0] * w)) @ channels + p * torch.exp(u[1] * t)  # noqa: E731
        sde = sds.SDE(drift, lambda x, t, p: 0.2 * u[2] * torch.sin(p + x), noise="diagonal")
        run = solver_of(sde, u[1] * x0, 3, params=(1 + u[2]) * rows, save_at="grid")
        return run(backend).xs

    u = torch.tensor([0.3, 0.7, 1.1], dtype=F64)
    for differentiate in (lambda f: torch.func.jvp(f, (u,), (u.flip(0),))[1], lambda f: torch.func.jacfwd(f)(u)):
        with use_backend(OnTheHost.name):
            given = differentiate(lambda u: end("fused", u))
        torch.testing.assert_close(given, differentiate(lambda u: end("eager", u)), rtol=1e-10, atol=1e-12)


def test_parameters_of_each_path(segments):
    rate, scale, x0 = leaf(5, 2), leaf(), leaf(5, 2, seed=2)
    sde = sds.SDE(lambda x, t, p: torch.exp(p * scale) * torch.sin(x), lambda x, t, p: 0.2 * p * x, noise="diagonal")
    check(solver_of(sde, x0, 4, params=rate), [x0, rate, scale])


def test_sampler_with_a_learned_score(small):
    """What a multistep scheme carries, and the solver's own table; a matrix written out."""
    w, b, x0 = leaf(2, 2), leaf(2, seed=1), leaf(5, 2, seed=2)
    flow = sds.VP().probability_flow(lambda x, t: torch.tanh(x @ w + b) - x)
    grid = sds.VP().time_grid(5)
    check(lambda k: sds.solve(flow, x0, grid=grid, solver=sds.DPMSolverPP(order=2), backend=k), [x0, w, b])


@pytest.mark.parametrize("hidden", [(6,), (5, 22)], ids=["written out, two stages", "kept whole, observed too"])
def test_weights_of_a_network(hidden, segments):
    """Products over lanes, and sums of their vectors."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(2, hidden[0])]
    for n, m in itertools.pairwise((*hidden, 2)):
        layers += [torch.nn.Tanh(), torch.nn.Linear(n, m)]
    net, x0 = torch.nn.Sequential(*layers).double(), leaf(5, 2)
    sde = sds.SDE(lambda x, t: net(x), lambda x, t: 0.3, noise="additive", calculus="stratonovich")
    options = {"solver": sds.Heun()} if len(hidden) == 1 else {"solver": sds.EulerMaruyama(), "observable": net}
    check(solver_of(sde, x0, 2, save_at=[0.5, 1.0], **options), [x0, *net.parameters()])


def test_float32():
    theta, x0 = leaf(2, dtype=torch.float32), leaf(40, 2, seed=1, dtype=torch.float32)
    sde = sds.SDE(lambda x, t: theta * torch.sin(x), lambda x, t: 0.3 * theta * x, noise="diagonal")
    check(solver_of(sde, x0, 5), [x0, theta], tolerance=2e-5)


def test_sums_have_the_same_bits_for_any_grid(monkeypatch):
    theta, x0 = leaf(2), leaf(11, 2, seed=1)
    sde = sds.SDE(lambda x, t: theta * torch.sin(x), lambda x, t: 0.3 * theta * x, noise="diagonal")
    made = []
    for programs in (1, 2, 3):
        cut_small(monkeypatch, programs=programs, longest=8)
        made.append(fused(solver_of(sde, x0, 3), [theta, x0])[0])
    for a, b in itertools.pairwise(made):
        assert all(map(torch.equal, a, b))
