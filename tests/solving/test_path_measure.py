"""`solve(kl_to=)`: divergences in closed form, weights of mean 1, another library's numbers, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torchsde
from sdesolve_kernels import use_backend

import sdesolve as sds
from sdesolve.integrate.path_measure import _solved

DOUBLE = torch.float64
EM = sds.EulerMaruyama()
OURS, OTHER, SCALE = 1.0, 0.3, 0.6  # dX = -X dt + 0.6 dW, and -0.3 X dt + 0.6 dW
MATRIX = torch.tensor([[0.6, -0.2, 0.1, 0.3], [0.1, 0.5, 0.4, -0.2]], dtype=DOUBLE)


def towards(rate):
    return lambda x, t: -rate * x


def wavy(x, t):
    return 0.5 + 0.2 * torch.sin(x) * torch.cos(t)


def drift(x, t):
    return torch.sin(3.0 * t) - x


def prior(x, t):
    return -0.5 * x * torch.cos(t)


def energy(mean_square):
    return 0.5 * ((OURS - OTHER) / SCALE) ** 2 * mean_square


def within(samples, exact, bias=0.0):
    return abs(float(samples.mean()) - exact) < 4.5 * float(samples.std()) / len(samples) ** 0.5 + bias


@pytest.mark.parametrize("name", ["additive", "diagonal", "scalar", "general", "stratonovich", "backwards"])
def test_divergence_of_one_ou_process_from_another(name):
    """At 40 steps: Euler's own chains exactly; an order-2 rule to 1e-3 of the closed form at T = 2 (P22: 0.5189172)."""
    noise = name if name in ("additive", "scalar", "general") else "diagonal"
    g = torch.full((1, 1, 1) if noise == "general" else (1,), SCALE, dtype=DOUBLE)
    calculus = "stratonovich" if name == "stratonovich" else "ito"
    times, rate = ((2.0, 0.0), -1.0) if name == "backwards" else ((0.0, 2.0), 1.0)
    sde = sds.SDE(towards(rate * OURS), lambda x, t: g, noise, calculus)
    trapezoidal = {"additive": sds.SRA1(), "stratonovich": sds.Heun()}.get(name, EM)
    x0, n, h = torch.ones(4000, 1, dtype=DOUBLE), 40, 2.0 / 40
    chain, exact = 0.0, 1.0
    for _ in range(n):
        chain, exact = chain + h * energy(exact), (1 - OURS * h) ** 2 * exact + SCALE**2 * h
    stationary = SCALE**2 / (2 * OURS)
    integral = 2 * stationary + (1 - stationary) * (1 - math.exp(-4 * OURS)) / (2 * OURS)
    assert energy(integral) == pytest.approx(0.5189172058, abs=1e-9)
    for solver, value, bias in ((EM if name != "stratonovich" else sds.EulerHeun(), chain, 0.0),
                                (trapezoidal, energy(integral) if trapezoidal is not EM else chain, 1e-3)):  # fmt: skip
        sol = sds.solve(sde, x0, *times, n, solver=solver, seed=2, kl_to=towards(rate * OTHER), backend="eager")
        assert within(sol.kl, value, bias)
        assert within(-sol.log_weight, value, 2 * h)  # the weight's own rule is of order 1
        assert torch.equal(sol.kls, sol.kl[None])


@pytest.mark.parametrize(("noise", "g", "solver"), [
    ("diagonal", wavy, EM),
    ("diagonal", wavy, sds.SRIW1()),
    ("scalar", wavy, EM),
    ("general", lambda x, t: MATRIX * (1 + 0.3 * torch.sin(x)).unsqueeze(-1), EM),
])  # fmt: skip
def test_weights_have_mean_one_whatever_the_steps(noise, g, solver):
    """Coarse steps and bounded u: the mean holds for each grid, and each saving time, between grid points too."""
    shift = {"scalar": lambda x, t: wavy(x, t)}.get(noise, lambda x, t: 0.4 * torch.cos(x))
    sde = sds.SDE(lambda x, t: -x + shift(x, t), g, noise)
    x0 = torch.linspace(-1, 1, 2 * 8000, dtype=DOUBLE).reshape(8000, 2)
    sol = sds.solve(
        sde, x0, 0.0, 1.0, 4, solver=solver, seed=1, kl_to=towards(1.0), save_at=[0.25, 0.4, 1.0], backend="eager"
    )
    assert all(within(w.exp(), 1.0) for w in sol.log_weights)
    assert torch.equal(sol.log_weights[-1], sol.log_weight)
    assert (sol.kls.diff(dim=0) > 0).all()
    if solver is EM:  # means under the prior's own chain
        plain = (
            sds.solve(sds.SDE(towards(1.0), g, noise), x0, 0.0, 1.0, 4, solver=EM, seed=7, backend="eager")
            .x1.sin()
            .sum(1)
        )
        ours = sol.log_weight.exp() * sol.x1.sin().sum(1)
        assert abs(float(ours.mean() - plain.mean())) < 4.5 * float(ours.var() + plain.var()) ** 0.5 / 8000**0.5


@pytest.mark.uncompiled
def test_a_rare_event():
    """``P(W_1 > 4)`` from paths that drift there, to 3% from 4000 of them; 126,000 plain ones would hold 4."""
    tilted = sds.SDE(lambda x, t: torch.full_like(x, 4.0), lambda x, t: torch.ones_like(x), "additive")
    sol = sds.solve(tilted, torch.zeros(4000, 1), 0.0, 1.0, 16, solver=EM, seed=3, kl_to=lambda x, t: 0 * x)
    assert sol.stats.execution == "fused"
    shares = (sol.log_weight.double().exp() * (sol.x1[:, 0] > 4.0)).double()
    exact = 0.5 * math.erfc(4.0 / math.sqrt(2.0))
    error = float(shares.std()) / 4000**0.5
    assert error < 0.04 * exact
    assert abs(float(shares.mean()) - exact) < 4.5 * error
    assert torch.allclose(sol.kl, torch.full_like(sol.kl, 8.0))  # of a constant control, exactly


class Latent(torch.nn.Module):
    def __init__(self, noise, calculus):
        super().__init__()
        self.noise_type, self.sde_type = noise, calculus

    def f(self, t, y):
        return drift(y, t) if self.noise_type != "scalar" else prior(y, t) + self.g(t, y)[..., 0] * torch.sin(t)

    def h(self, t, y):
        return prior(y, t)

    def g(self, t, y):
        g = wavy(y, t)
        return {"scalar": g[..., None], "general": MATRIX * g[..., None]}.get(self.noise_type, g)


@pytest.mark.uncompiled
@pytest.mark.parametrize(("noise", "calculus", "method", "solver"), [
    ("diagonal", "ito", "euler", EM),
    ("general", "ito", "euler", EM),
    ("scalar", "ito", "euler", EM),
    ("diagonal", "stratonovich", "euler_heun", sds.EulerHeun()),
])  # fmt: skip
def test_the_other_library_has_the_same_divergence(noise, calculus, method, solver):
    """torchsde's ``logqp``, path by path and interval by interval, on the same increments."""
    model, x0, n = Latent(noise, calculus), torch.linspace(-1, 1, 10, dtype=DOUBLE).reshape(5, 2), 10
    channels = {"general": 4, "scalar": 1}.get(noise, 2)
    grid, ts = torch.linspace(0, 1, n + 1, dtype=DOUBLE), torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE)
    W = sds.BrownianPath(1).increments(grid, (5, channels), step=0, dtype=DOUBLE, device=x0.device)
    if noise == "diagonal":
        W = torch.cat([W, W[..., :1]], -1)  # for the component that it adds

    class Given:
        shape, dtype, device, levy_area_approximation = W.shape[1:], W.dtype, W.device, "none"

        def __call__(self, s, t):
            return W[round(float(s) * n) : round(float(t) * n)].sum(0)

    ys, logqp = torchsde.sdeint(model, x0, ts, bm=Given(), method=method, dt=1 / n, logqp=True)
    sde = sds.SDE(
        lambda x, t: model.f(t, x), lambda x, t: model.g(t, x)[..., 0] if noise == "scalar" else model.g(t, x),
        noise, calculus,
    )  # fmt: skip
    sol = sds.solve(sde, x0, grid=grid, solver=solver, seed=1, kl_to=lambda x, t: model.h(t, x), save_at=ts)
    assert torch.allclose(sol.xs, ys, rtol=0, atol=1e-12)
    assert torch.allclose(sol.kls.diff(dim=0), logqp, rtol=0, atol=1e-11)


class Both(torch.nn.Module):
    """Posterior and prior with a trunk in common."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.ours, self.theirs = (torch.nn.Linear(*n) for n in ((2, 4), (4, 2), (4, 2)))
        self.scale = torch.nn.Parameter(torch.tensor(0.3))

    def drift(self, x, t):
        return self.ours(torch.tanh(self.trunk(x))) - x

    def prior(self, x, t):
        return self.theirs(torch.tanh(self.trunk(x))) * torch.cos(t)

    def diffusion(self, x, t):
        return (0.5 + self.scale.square()) * torch.ones_like(x)


def losses(sol):
    at = torch.arange(1.0, 1 + len(sol.kls), dtype=sol.kl.dtype)[:, None]
    return sol.kl.mean() + (sol.kls * at).mean() + sol.log_weights.cos().mean() + sol.xs.sin().mean()


@pytest.mark.parametrize(("calculus", "solver", "at", "compiler"), [
    ("ito", EM, "grid", "reference"),
    ("stratonovich", sds.Heun(), [0.3, 0.512], "auto"),
])  # fmt: skip
def test_gradients_to_both_drifts_and_to_what_they_share(calculus, solver, at, compiler):
    """One kernel and its reverse, equal to autograd of the steps."""
    net, found = Both().double(), []
    sde = sds.SDE(net.drift, net.diffusion, calculus=calculus)
    for backend in ("eager", "fused"):
        x0 = torch.full((6, 2), 0.4, dtype=DOUBLE, requires_grad=True)
        options = {"solver": solver, "seed": 1, "kl_to": net.prior, "save_at": at}
        with use_backend(compiler):
            sol = sds.solve(sde, x0, 0.0, 1.0, 8, backend=backend, **options)
            found.append(torch.autograd.grad(losses(sol), [x0, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        assert float(a.abs().max()) > 0
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


CASES = {
    "a number a path": {"x0": (5,)},
    "matrices, between grid points": {"x0": (5, 2, 3), "save_at": [0.0, 0.31, 1.0]},
    "backwards": {"x0": (5, 2), "t": (1.0, 0.2), "save_at": [0.71, 0.5]},
    "one step": {"x0": (5, 2), "steps": 1},
    "scalar": {"x0": (5, 2), "sde": sds.SDE(lambda x, t: prior(x, t) - wavy(x, t), wavy, "scalar")},
    "more motions than entries": {"x0": (5, 2), "sde": sds.SDE(drift, lambda x, t: MATRIX[None], "general")},
    "fewer": {"x0": (5, 3), "sde": sds.SDE(
        lambda x, t: prior(x, t) + torch.sin(x[:, :2]) @ MATRIX[:, :3], lambda x, t: MATRIX.T[None, :3], "additive",
    )},
    "converted": {"x0": (5, 2), "sde": sds.to_stratonovich(sds.SDE(drift, wavy)), "solver": sds.Heun()},
    "a solver that remembers": {
        "x0": (5, 2), "sde": sds.SDE(drift, wavy, calculus="stratonovich"), "solver": sds.ReversibleHeun(),
        "save_at": "grid",
    },
    "moments": {"x0": (5, 2), "reduce": "moments", "observable": lambda x: x.square(), "save_at": [0.5, 1.0]},
    "stopped, with a carry": {
        "x0": (5, 2), "until": sds.Crossing(lambda x, t: 1.2 - x.abs()[:, 0]),
        "carry": sds.Integral(lambda x, t: x[:, 0]), "observable": lambda x, t, c: c + x[:, 0], "save_at": "grid",
    },
    "another model": {
        "x0": (5, 2, 1), "sde": sds.UnderdampedLangevin(lambda x, t: 2 * x),
        "kl_to": sds.UnderdampedLangevin(lambda x, t: x), "solver": sds.ALIGN(),
    },
    "zero where both drifts are one": {
        "x0": (5, 2), "sde": sds.SDE(lambda x, t: x.flip(1), lambda x, t: torch.tensor([0.0, 0.7], dtype=DOUBLE)),
        "kl_to": lambda x, t: torch.stack([x[:, 1], -x[:, 1]], 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_fused_as_eager_and_the_path_as_without(name):
    """Of every shape, noise and direction; the plan of a kernel is walked in torch."""
    case = {"sde": sds.SDE(drift, wavy), "kl_to": prior, "steps": 6, "solver": EM, "t": (0.0, 1.0), **CASES[name]}
    sde, shape, steps, t = (case.pop(key) for key in ("sde", "x0", "steps", "t"))
    x0 = torch.linspace(-1, 1, math.prod(shape), dtype=DOUBLE).reshape(shape)
    eager = sds.solve(sde, x0, *t, steps, seed=3, backend="eager", **case)
    with use_backend("reference"):
        fused = sds.solve(sde, x0, *t, steps, seed=3, backend="fused", **case)
    del case["kl_to"]
    assert torch.equal(eager.x1, sds.solve(sde, x0, *t, steps, seed=3, backend="eager", **case).x1)
    for key in ("x1", "xs", "kl", "log_weight", "kls", "log_weights", "mean"):
        a, b = getattr(eager, key), getattr(fused, key)
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12), key
    assert (eager.kl > 0).all()
    assert eager.kl.shape == eager.log_weight.shape == (5,)


def test_rows_of_their_own_grids_and_runs_that_go_on():
    x0, sde = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(2, 2, 3), sds.SDE(drift, wavy)
    times = torch.linspace(0, 1, 9, dtype=DOUBLE)[:, None] * torch.tensor([1.0, -0.5], dtype=DOUBLE)
    times[6:, 1] = times[6, 1]
    both = sds.solve(sde, x0, grid=times, seed=1, solver=EM, kl_to=prior)
    for i, grid in enumerate((times[:, 0], times[:7, 1])):
        noise = sds.BrownianPath(1).rows(i)
        alone = sds.solve(sde, x0[i : i + 1], grid=grid, noise=noise, solver=EM, kl_to=prior, backend="eager")
        assert torch.allclose(alone.kl, both.kl[i : i + 1], rtol=1e-13)
        assert torch.allclose(alone.log_weight, both.log_weight[i : i + 1], rtol=1e-13)
        options = {"solver": EM, "kl_to": prior, "backend": "eager"}
        part = sds.solve(sde, x0[i : i + 1], grid=grid[:4], noise=noise, **options)
        rest = sds.solve(sde, grid=grid[3:], start=part.state, **options)
        assert torch.equal(rest.kl, alone.kl)
        assert torch.equal(rest.log_weight, alone.log_weight)
        bare = sds.solve(sde, grid=grid[3:], start=sds.solve(
            sde, x0[i : i + 1], grid=grid[:4], noise=noise, solver=EM, backend="eager").state, **options)  # fmt: skip
        assert torch.allclose(part.kl + bare.kl, alone.kl, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (4, 2), (3, 3), (8, 3)])
def test_the_least_control(shape, dtype):
    """That of the pseudo-inverse, rank deficient too; infinite where there is none."""
    d, channels = shape
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(20, d, channels, generator=generator, dtype=DOUBLE)
    g[10:, 1] = 2 * g[10:, 0]
    u = torch.randn(20, channels, generator=generator, dtype=DOUBLE)
    v = (g * u.unsqueeze(1)).sum(-1)
    found, excess = _solved(g.to(dtype), v.to(dtype), v.abs().to(dtype))
    exact = (torch.linalg.pinv(g) @ v.unsqueeze(-1)).squeeze(-1)
    assert (excess == 0).all()
    condition = float(torch.linalg.svdvals(g)[:, : min(shape)].amax() / torch.linalg.svdvals(g[:10]).amin())
    assert torch.allclose(found.double(), exact, rtol=0, atol=64 * condition * torch.finfo(dtype).eps)
    v[10:, 1] += 0.3
    _, excess = _solved(g.to(dtype), v.to(dtype), v.abs().to(dtype))
    assert (excess[10:].sum(1) == math.inf).all()
    assert d > channels or (excess[:10] == 0).all()


def test_what_is_refused():
    sde, x0 = sds.SDE(drift, wavy), torch.ones(3, 2, dtype=DOUBLE)

    def solved(sde=sde, kl_to=prior, solver=EM, backend="eager"):
        return sds.solve(sde, x0, 0.0, 1.0, 4, solver=solver, seed=0, kl_to=kl_to, backend=backend)

    with pytest.raises(TypeError, match=r"kl_to must be the drift of a prior, .* got int"):
        solved(kl_to=3)
    with pytest.raises(ValueError, match="an ODE has no noise"):
        solved(sds.ODE(drift))
    with pytest.raises(ValueError, match=r"kl_to must return the shape of the state, \(3, 2\), got \(3, 1\)"):
        solved(kl_to=lambda x, t: x[:, :1])
    with pytest.raises(ValueError, match=r"another diffusion than the SDE.* or its drift alone"):
        solved(kl_to=sds.SDE(prior, lambda x, t: 1.01 * wavy(x, t)))
    assert torch.equal(solved(kl_to=sds.SDE(prior, wavy)).kl, solved().kl)
    with pytest.raises(ValueError, match="both need one diffusion in one calculus"):
        solved(sds.to_stratonovich(sde), sds.SDE(prior, wavy), sds.Heun())
    with pytest.raises(ValueError, match=r"infinite: for row 0 of x0 .* in a direction without noise"):
        solved(sds.SDE(drift, lambda x, t: 0 * x))
    with pytest.raises(sds.DivergenceError, match=r"path 0 in step 3 of 4, which starts at t = 0\.75") as caught:
        solved(sds.SDE(drift, lambda x, t: torch.where(t > 0.5, 0.0, 1.0) * torch.ones_like(x)))
    assert (caught.value.step, caught.value.time, caught.value.path) == (3, 0.75, 0)
    with pytest.raises(ValueError, match="no kernel of one step compares its path with a prior"):
        solved(backend="kernel")
    with pytest.raises(ValueError, match="QE has not: take a solver"):
        solved(sds.CIR(2.0, 0.04, 0.3), solver=sds.QE())
    reverse = sds.VP().reverse(lambda x, t: -x)
    with pytest.raises(ValueError, match=r"integrate sds.SDE\(sde.drift, sde.diffusion, 'additive'\) instead"):
        solved(reverse)
    advised = sds.SDE(reverse.drift, reverse.diffusion, "additive")
    assert (solved(advised, kl_to=lambda x, t: 0.9 * reverse.drift(x, t)).kl > 0).all()
