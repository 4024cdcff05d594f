"""What torch does to functions that call `solve` and `sample`: derivatives, maps, compilation, modes, other tensors."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels.trajectory import tangents
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.masked import masked_tensor

import sdesolve as sds

EM = sds.EulerMaruyama()
X0 = torch.linspace(-1.0, 1.5, 6, dtype=torch.float64).reshape(3, 2)
VP = sds.VP()
SCORE = sds.Gaussian(torch.tensor([-1.0, 0.5]).double(), 0.5 * torch.eye(2).double()).score(VP)


def solved(solver, sde, **options):
    options = {"t0": 0.0, "t1": 1.0, "steps": 3, **options}
    return lambda x, backend="auto": sds.solve(sde, x, solver=solver, seed=1, backend=backend, **options)


def end_of(solver, sde, **options):
    f = solved(solver, sde, **options)
    return lambda *args: f(*args).x1


def reverse_of(solver):
    flow = VP.reverse(SCORE) if solver.sampling_stochasticity else VP.probability_flow(SCORE)
    return end_of(solver, flow, t0=None, t1=None, steps=None, grid=VP.time_grid(3))


ITO = sds.SDE(lambda x, t: -x * t.cos(), lambda x, t: 0.3 * x.cos())
STRATONOVICH = sds.SDE(lambda x, t: -x * t.cos(), lambda x, t: 0.3 * x.cos(), calculus="stratonovich")
BETWEEN = solved(EM, ITO, save_at=[0.1, 0.5, 1.0])
FUNCTIONS = {
    "Euler-Maruyama": end_of(EM, ITO),
    "Heun": end_of(sds.Heun(), STRATONOVICH),
    "Milstein": end_of(sds.Milstein(), ITO),
    "saved between": lambda *args: BETWEEN(*args).xs,
    "DPM-Solver++": reverse_of(sds.DPMSolverPP()),
    "corrected": reverse_of(sds.PredictorCorrector(EM, sds.LangevinCorrector(0.1))),
}


@pytest.mark.uncompiled
@pytest.mark.filterwarnings("ignore:create_graph=True")  # of autograd, which second derivatives are compared with
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_transform_is_the_derivative(name):
    """Of every kind of solver and way of saving, under auto, which fuses what is forwards alone."""
    f = FUNCTIONS[name]
    x = X0.clone().requires_grad_()
    v = torch.linspace(1.0, -0.5, 6, dtype=torch.float64).reshape(3, 2)

    def total(x):
        return f(x).square().sum()

    (slope,) = torch.autograd.grad(total(x), x, create_graph=True)
    (bent,) = torch.autograd.grad((slope * v).sum(), x)
    close = torch.testing.assert_close
    close(grad(total)(X0), slope)
    close(vjp(total, X0)[1](torch.ones(()).double())[0], slope)
    close(jvp(total, (X0,), (v,))[1], (slope * v).sum())
    close(torch.tensordot(hessian(total)(X0), v, 2), bent)
    close(jacrev(f)(X0), jacfwd(f)(X0))
    both = torch.stack([X0, 0.5 * X0])
    close(vmap(f)(both), torch.stack([f(x, "eager") for x in both]))  # the same noise for all
    close(vmap(grad(total))(both)[0], slope)
    with forward_ad.dual_level():
        close(forward_ad.unpack_dual(total(forward_ad.make_dual(X0, v))).tangent, (slope * v).sum())


def end(backend):
    return lambda x: solved(EM, ITO)(x, backend).x1


def normals(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def diagonal(theta, calculus="ito"):
    def drift(x, t):
        return theta[0] * torch.tanh(x).flip(-1) - x * torch.exp(-theta[1] * t)

    return sds.SDE(drift, lambda x, t: 0.2 * torch.cos(theta[0] * x), calculus=calculus)


def general(rows):
    """With a row for each path, and channels that commute."""
    channels = torch.arange(1.0, 5.0, dtype=torch.float64)
    drift = lambda x, t, p: -p.exp() * x + rows[:, :1] * torch.sin(rows[:, 1:] * t)  # noqa: E731
    return sds.SDE(drift, lambda x, t, p: torch.sin(x + p)[..., None] * channels, noise="general")


def mapped(w):
    """By matrices that are kept whole, and one row of one on its own."""

    def drift(x, t):
        y = torch.cat([x, x.cos(), x.sin(), x * t, 1 + 0 * x], 1) @ w
        return (y.tanh() @ w + w[0])[:, :2]

    return sds.SDE(drift, lambda x, t: 0.1 * x)


class Rate(sds.diffusions.AbstractBetaSchedule):
    """``r_0 + 2 r_1 t``, so that the numbers of each step have tangents."""

    t_min, t_max = 1e-3, 1.0

    def __init__(self, r):
        self.r = r

    def beta(self, t):
        return self.r[0] + 2 * self.r[1] * t

    def integral(self, t):
        return self.r[0] * t + self.r[1] * t * t

    def time_at_integral(self, integral):
        return ((self.r[0] ** 2 + 4 * self.r[1] * integral).sqrt() - self.r[0]) / (2 * self.r[1])


def sampled(backend, w, r):
    """From a learned score, under `no_grad`, which leaves tangents alone."""
    grid = torch.linspace(1.0, 0.05, 5, dtype=torch.float64)
    with torch.no_grad():
        return sds.sample(
            sds.VP(Rate(r)), lambda x, t: torch.tanh(x @ w) - x, (4, 2), solver=sds.DPMSolverPP(order=2), grid=grid,
            seed=1, dtype=X0.dtype, backend=backend, full=True,
        )  # fmt: skip


@pytest.mark.parametrize(
    "solver",
    [sds.DPMSolverPP(order=2), sds.DDIM(0.0), sds.ReverseDiffusion(), sds.EDMHeun()],
    ids=repr,
)
def test_parameters_of_schedules_have_gradients_where_there_is_no_noise(solver):
    """Of the flow; the square root of a variance of 0 made them nan."""
    grid, r = torch.linspace(1.0, 0.05, 5, dtype=torch.float64), torch.tensor([0.3, 6.0]).double()

    def end(r):
        flow = sds.VP(Rate(r)).probability_flow(lambda x, t: x.sin() - x)
        return sds.solve(flow, X0, grid=grid, solver=solver, backend="eager").x1.sum()

    slope = grad(end)(r)
    assert slope.abs().min() > 0
    along = (end(r + 1e-5 * r) - end(r - 1e-5 * r)) / 2e-5
    torch.testing.assert_close((slope * r).sum(), along, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(jacfwd(end)(r), slope, rtol=1e-10, atol=0)


def kept(sol):
    """All that a run gives that may have a derivative."""
    more = (sol.x1, sol.xs, sol.mean, sol.variance, sol.kl, sol.carry, sol.stop_time)
    return tuple(t.nan_to_num(posinf=0.0) for t in more if t is not None)


def moments_of(sol):
    return sol.mean, sol.variance


def run_of(make, **options):
    """A run of an equation made of parameters."""
    options = {"t0": 0.0, "t1": 0.5, "steps": 3, "solver": EM, "seed": 1, **options}
    return lambda backend, x, p: sds.solve(make(p), x, backend=backend, **options)


THETA, ROWS, WEIGHTS = normals(2), normals(3, 2, seed=2), 0.3 * normals(10, 10)
FORWARDS = {
    "backwards in time": (
        run_of(lambda p: diagonal(p, "stratonovich"), t0=0.5, t1=0.0, solver=sds.Heun(), save_at="grid"),
        (X0, THETA),
    ),
    "a row for each path": (lambda b, x, p: run_of(general, params=p, increments="two-point")(b, x, p), (X0, ROWS)),
    "moments of an observable": (
        lambda b, x, w: run_of(mapped, observable=lambda x: x @ w[0, :2] + x[:, 0], reduce="moments")(b, x, w),
        (X0, WEIGHTS),
    ),
    "what is carried": (
        lambda b, x, p: run_of(
            diagonal,
            save_at=[0.1, 0.5],
            kl_to=lambda x, t: p[0] * x,
            carry=sds.Carry(lambda x: p[1] * x, lambda c, x, y, t, u: c + p * (y - x).abs()),
        )(b, x, p),
        (X0, THETA),
    ),
    "a sampler and its schedule": (sampled, (normals(2, 2), torch.tensor([0.3, 6.0]).double())),
}


@pytest.mark.uncompiled
@pytest.mark.parametrize("name", FORWARDS)
def test_forward_mode_is_fused(name, monkeypatch):
    """Equal to that of the eager run: dual tensors, one direction, and more than a launch takes."""
    monkeypatch.setattr(tangents, "_AT_ONCE", 2)
    run, start = FORWARDS[name]
    ways = [normals(3, *p.shape, seed=i) for i, p in enumerate(start)]
    executions = []

    def values(backend, *given):
        sol = run(backend, *given)
        executions.append(sol.stats.execution)
        return kept(sol)

    def along(backend):
        return lambda u: values(backend, *(p + torch.tensordot(u, v, 1) for p, v in zip(start, ways, strict=True)))

    def dual(backend):
        with forward_ad.dual_level():
            made = values(backend, *(forward_ad.make_dual(p, v[0]) for p, v in zip(start, ways, strict=True)))
            return [forward_ad.unpack_dual(y).tangent for y in made]

    u = torch.zeros(3).double()
    ways_of_torch = (
        dual,
        lambda b: vmap(lambda v: jvp(along(b), (u,), (v,))[1], in_dims=1)(torch.ones(3, 1).double()),
        lambda b: jacfwd(along(b))(u),
    )
    for differentiate in ways_of_torch:
        for given, expected in zip(*map(differentiate, ("auto", "eager")), strict=True):
            torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)
    assert executions == ["fused", "eager"] * 3


@pytest.mark.uncompiled
def test_a_kernel_is_for_the_tensors_that_have_tangents():
    """Which have changes between calls that hold the same, and with the times, whether the solver's numbers do."""

    class Late(Rate):
        def integral(self, t):
            return super().integral(t) if float(t.max()) > 0.5 else Rate(self.r.detach()).integral(t)

    start = normals(2, 2), torch.tensor([0.3, 6.0]).double()

    def end(backend, first, given):
        w, r = given
        sol = sds.sample(
            sds.VP(Late(r)), lambda x, t: torch.tanh(x @ w) - x, (3, 2), solver=sds.DPMSolverPP(order=2), seed=1,
            grid=torch.linspace(first, 0.05, 4, dtype=torch.float64), dtype=X0.dtype, backend=backend, full=True,
        )  # fmt: skip
        assert backend == "eager" or sol.stats.execution == "fused"
        return sol.x1

    def along(backend, first, moving):
        def moved(*values):
            return end(backend, first, [values[moving.index(i)] if i in moving else p for i, p in enumerate(start)])

        return jvp(moved, tuple(start[i] for i in moving), tuple(start[i].cos() for i in moving))

    for first in (0.4, 1.0):
        for moving in ([1], [0], [0, 1]):
            for found, expected in zip(*(along(b, first, moving) for b in ("auto", "eager")), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(end("auto", first, start), end("eager", first, start), rtol=1e-10, atol=1e-12)


@pytest.mark.uncompiled
@pytest.mark.filterwarnings("error:var")
def test_one_path_has_a_variance_that_is_none_and_no_tangent_of_it():
    run = run_of(diagonal, reduce="moments")
    for backend in ("auto", "eager"):
        sol, moved = jvp(lambda p, b=backend: moments_of(run(b, X0[:1], p)), (THETA,), (THETA,))
        assert sol[1].isnan().all()
        assert torch.equal(moved[1], torch.zeros_like(moved[1]))
        assert moved[0].abs().min() > 0


def test_tangents_of_a_kernel_have_the_same_bits_for_any_number_of_threads():
    x0 = normals(3000, 2)
    run = run_of(diagonal, steps=60)
    threads, found = torch.get_num_threads(), []
    f = lambda p, backend="fused": run(backend, x0, p).x1.square()  # noqa: E731
    try:
        for n in (1, 2, 8):
            torch.set_num_threads(n)
            found.append(jacfwd(f)(THETA))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, found[0]) for a in found[1:])
    expected = jacfwd(lambda p: f(p, "eager"))(THETA)
    assert (found[0] - expected).abs().max() <= 1e-10 * expected.abs().max()
    mean = jacrev(lambda p: f(p, "eager").mean())(THETA)
    torch.testing.assert_close(jacfwd(lambda p: f(p).mean())(THETA), mean, rtol=1e-10, atol=0)


@pytest.mark.uncompiled
def test_tangents_that_differ_from_torchs_are_not_trusted(monkeypatch):
    made = tangents.jvp
    monkeypatch.setattr(
        tangents,
        "jvp",
        lambda graph, *rest: [graph.op("mul", graph.const(1.001, e.dtype), e) for e in made(graph, *rest)],
    )
    run = run_of(diagonal)
    f = lambda backend: jvp(lambda p: run(backend, X0, p).x1, (THETA,), (THETA,))[1]  # noqa: E731
    with pytest.raises(ValueError, match="its kernel and its step in torch differ by more than rounding"):
        f("fused")
    torch.testing.assert_close(f("auto"), f("eager"), rtol=0, atol=0)


@pytest.mark.uncompiled
@pytest.mark.slow
def test_weights_of_a_network_have_derivatives():
    net = torch.nn.Linear(2, 2).double()
    weights = dict(net.named_parameters())

    def loss(weights):
        sde = VP.reverse(lambda x, t: functional_call(net, weights, (x,)))
        return sds.solve(sde, X0, grid=VP.time_grid(3), solver=EM, seed=0).x1.square().mean()

    def drawn(weights):
        return sds.sample(VP, lambda x, t: functional_call(net, weights, (x,)), (4, 2), steps=3, seed=1, dtype=X0.dtype)

    loss(weights).backward()
    found = grad(loss)(weights)
    assert all(torch.allclose(found[name], weight.grad) for name, weight in weights.items())
    ahead = {name: torch.ones_like(weight) for name, weight in weights.items()}
    h = 1e-6
    moved = [drawn({name: w + s * h for name, w in weights.items()}) for s in (1, -1)]
    torch.testing.assert_close(
        jvp(drawn, (weights,), (ahead,))[1], (moved[0] - moved[1]) / (2 * h), atol=1e-5, rtol=1e-5
    )
    slopes = grad(lambda weights: drawn(weights).sum())(weights)
    total = sum(slope.sum() for slope in slopes.values())
    torch.testing.assert_close(total, ((moved[0] - moved[1]) / (2 * h)).sum(), atol=1e-5, rtol=1e-5)


def test_nothing_made_under_a_transform_outlives_it():
    """A grid that calls share belonged to the transform, and was worth nothing afterwards."""
    f = end_of(EM, ITO, steps=37)
    grad(lambda x: f(x).sum())(X0)
    grid = torch.linspace(0.0, 1.0, 38, dtype=torch.float64)
    torch.testing.assert_close(f(X0, "eager"), end_of(EM, ITO, t0=None, t1=None, steps=None, grid=grid)(X0, "eager"))


def test_noise_is_a_constant_for_transforms():
    times, path = torch.linspace(0.0, 1.0, 3, dtype=torch.float64), sds.BrownianPath(3)
    expected = path.increments(times, (2, 1))
    assert torch.equal(vmap(lambda x: x + path.increments(times, (2, 1)))(torch.zeros(1))[0], expected)
    assert torch.equal(jacrev(lambda x: x * path.increments(times, (2, 1)))(torch.zeros(())), expected)


@pytest.mark.parametrize("backend", ["fused", "kernel"])
def test_kernels_refuse_transforms(backend):
    f = end_of(EM, ITO)
    for call in (lambda: grad(lambda x: f(x, backend).sum())(X0), lambda: vmap(lambda x: f(x, backend))(X0[None])):
        with pytest.raises(ValueError, match=r"takes part in a torch.func transform.*backend='auto' runs it"):
            call()


@pytest.mark.uncompiled
def test_forward_derivatives_that_no_kernel_has_are_refused_in_a_sentence():
    """And taken in torch where nothing else is asked for."""
    run, p = run_of(diagonal), THETA
    held = X0.clone().requires_grad_()
    ode = sds.ODE(lambda x, t: -x)
    adaptive = lambda x, b: sds.solve(ode, x, 0.0, 1.0, solver=sds.DormandPrince(), backend=b).x1  # noqa: E731
    both, ones = torch.stack([X0, X0]), torch.ones_like(X0)
    for why, call in {
        "other than one jvp or jacfwd": lambda b: jvp(lambda x: jvp(end(b), (x,), (x,))[1], (X0,), (ones,))[1],
        "torch.func transform other": lambda b: jacfwd(grad(lambda x: end(b)(x).sum()))(X0),
        "mapped or differentiated themselves": lambda b: vmap(lambda x: jvp(end(b), (x,), (ones,))[1])(both),
        "needs a gradient where tangents are wanted": lambda b: jvp(lambda p: run(b, held, p).x1, (p,), (p,))[1],
        "steps that each path chooses": lambda b: jvp(lambda x: adaptive(x, b), (X0,), (ones,))[1],
    }.items():
        with pytest.raises(ValueError, match=rf"cannot be fused: .*{why}.*backend='auto' runs it in another way"):
            call("fused")
        torch.testing.assert_close(call("auto"), call("eager"), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="forward-mode differentiation, which kernels are blind to"):
        jvp(end("kernel"), (X0,), (ones,))


def test_what_has_no_derivative_says_so():
    ode = sds.ODE(lambda x, t: -x)
    with pytest.raises(ValueError, match=r"DormandPrince chooses its steps by the values.*vmap hides.*take jacrev"):
        jacfwd(lambda x: sds.solve(ode, x, 0.0, 1.0, solver=sds.DormandPrince()).x1)(X0)
    jacobian = jacrev(lambda x: sds.solve(ode, x, 0.0, 1.0, solver=sds.DormandPrince()).x1)(X0)
    torch.testing.assert_close(
        jacobian.reshape(6, 6), torch.eye(6).double() * torch.exp(-torch.ones(())), rtol=1e-3, atol=0.0
    )
    with pytest.raises(ValueError, match=r"a likelihood runs under no transform.*encode and decode, and solve"):
        grad(lambda x: sds.log_likelihood(VP, SCORE, x).sum())(X0)
    with pytest.raises(ValueError, match="run_chain runs under no transform"):
        vmap(lambda x: sds.run_chain(sds.mcmc.Langevin(0.1), x, 2, score=lambda x: -x, seed=0).x)(X0[None])
    with pytest.raises(ValueError, match="AnnealedLangevin runs under no transform"):
        grad(lambda x: sds.AnnealedLangevin([1.0, 0.5], 0.01, 1)(sds.VE(), lambda x, t: -x, x).sum())(X0)


def test_divergence_under_transforms_names_step_and_path():
    def poisoned(x, t):
        return torch.where(t > 0.5, x.new_tensor([0.0, torch.nan, 0.0])[:, None] + 0 * x, -x)

    f = end_of(EM, sds.SDE(poisoned, lambda x, t: 0.1 * x), steps=4)
    for call in (lambda: vmap(f)(torch.stack([X0, X0])), lambda: grad(lambda x: f(x).sum())(X0)):
        with pytest.raises(sds.DivergenceError, match="path 1 stopped being finite in step 3 of 4") as met:
            call()
        assert (met.value.step, met.value.path) == (3, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile looks at .grad of every tensor
def test_a_compiled_module_that_solves_runs():
    """With a break in its graph; it died of recursion."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

        def forward(self, x):
            sde = sds.SDE(lambda x, t: self.layer(x), lambda x, t: 0.1 * torch.ones_like(x), noise="additive")
            x = sds.solve(sde, 2 * x, 0.0, 1.0, 3, solver=EM, seed=0).x1  # eager, for its gradient
            return x + sds.sample(VP, lambda x, t: -x, (3, 2), steps=2, seed=0, backend="eager")

    module, x = Module(), X0.float()
    expected = module(x)
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    assert float(module.layer.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: FakeTensorMode().from_tensor(x), "FakeTensor whose values cannot be read.*give a plain tensor"),
        (lambda x: masked_tensor(x, x > 0), "MaskedTensor whose values cannot be read"),
        (lambda x: x.to_sparse(), r"of layout torch.sparse_coo; .*to_dense\(\)"),
        (lambda x: x.to_sparse_csr(), "of layout torch.sparse_csr"),
        (lambda x: torch.nested.nested_tensor([x, x]), "must be a dense tensor, and is nested"),
        (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), r"got torch.qint8: .*x0.dequantize\(\)"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        solved(EM, ITO)(make(X0))


def test_fake_mode_is_refused_by_name():
    with FakeTensorMode(), pytest.raises(ValueError, match="solve needs values, and FakeTensorMode holds shapes alone"):
        solved(EM, ITO)(torch.ones(3, 2))
    with FakeTensorMode(), pytest.raises(ValueError, match="sample needs values"):
        sds.sample(VP, SCORE, (3, 2), steps=2)
