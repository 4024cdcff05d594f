"""Gradients of runs that go step by step, from steps that are taken again: the bits of plain ones, in less memory."""

from __future__ import annotations

import functools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import sdesolve as sds
from sdesolve.integrate import checkpointing

STEPS = 14
X0 = torch.linspace(-1.0, 1.5, 24).reshape(6, 4)


@pytest.fixture(params=["all", "two"])
def kept(request, monkeypatch):
    """States that are kept: all but the last, of steps that are not taken again; so few that most are made again."""

    def plan(self, k, size):
        self._slots = STEPS if request.param == "all" else 2
        self._whole = STEPS - 3 * (request.param == "all")
        self._wanted = set(checkpointing.positions(k, self._whole - k, self._slots))

    monkeypatch.setattr(checkpointing.Checkpoints, "_plan", plan)


@functools.cache
def fewest(steps, slots):
    """Steps taken forward, in the schedule with the fewest, before each of ``steps`` is begun from its own state."""
    if steps <= 1:
        return 0
    if slots == 0:
        return steps * (steps - 1) // 2
    return min(m + fewest(m, slots) + fewest(steps - m, slots - 1) for m in range(1, steps))


def taken(steps, slots):
    if steps <= 1:
        return 0
    if slots == 0:
        return steps * (steps - 1) // 2
    m = checkpointing.distance(steps, slots)
    return m + taken(m, slots) + taken(steps - m, slots - 1)


def test_the_schedule_is_the_best_there_is():
    assert all(taken(n, s) == fewest(n, s) for n in range(1, 45) for s in range(1, 8))
    assert list(checkpointing.positions(3, 5, 9)) == [4, 5, 6, 7]


def run(sde, x0, gradients="auto", **options):
    options = {"solver": sds.EulerMaruyama(), "backend": "eager", "save_at": "grid", **options}
    return sds.solve(sde, x0, 0.0, 1.0, STEPS, seed=3, gradients=gradients, **options)


def loss_of(sol):
    return (sol.xs.double().sin() * torch.linspace(0.3, 1.7, sol.xs.numel()).reshape(sol.xs.shape)).sum()


def same_bits(make, **options):
    """What ``make`` gives, an equation and what is differentiated, is made twice with the same random states."""
    found = []
    for gradients in ("auto", "checkpoint"):
        torch.manual_seed(5), random.seed(1), np.random.seed(2)  # noqa: NPY002
        x0 = X0.clone().requires_grad_()
        sde, wanted, *modules = make()
        sol = run(sde, x0, gradients, **options)
        drawn, buffers = torch.get_rng_state(), [b.clone() for m in modules for b in m.buffers()]
        for m in modules:
            m.train(not m.training)
        made = torch.autograd.grad(loss_of(sol), [x0, *wanted], allow_unused=True, materialize_grads=True)
        assert torch.equal(drawn, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(buffers, (b for m in modules for b in m.buffers()), strict=True))
        found.append([sol.xs, *buffers, *made])
        evaluations = sol.stats.nfe
        assert ("taken again" in sol.stats.reason) == (gradients == "checkpoint")
    assert evaluations == STEPS
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def network(*layers, of=lambda net, x: net(x)):
    def make():
        net = nn.Sequential(*(layer() for layer in layers))
        sde = sds.SDE(lambda x, t: of(net, x), lambda x, t: 0.1 * torch.sigmoid(net[0](x)))
        return sde, [p for p in net.parameters() if p.requires_grad], net

    return make


def linear():
    return nn.Linear(4, 4)


def force(net, x):
    y = x if x.requires_grad else x.detach().requires_grad_()
    return -torch.autograd.grad(net(y).square().sum(), y, create_graph=True)[0]


def in_bfloat16(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float()


def drawing():
    mine, w = torch.Generator().manual_seed(1), torch.ones(4, requires_grad=True)

    def drift(x, t):
        return w * x * torch.rand(4, generator=mine) * random.random() * np.random.rand() * torch.rand(())  # noqa: NPY002

    return sds.SDE(drift, lambda x, t: 0.1 * x), [w]


def drawing_late():
    """After states were kept of which nobody looked at generators."""
    w = torch.ones(4, requires_grad=True)

    def drift(x, t):
        return w * x.sin() * (1.0 if t < 0.3 else torch.rand(4) * random.random())

    return sds.SDE(drift, lambda x, t: 0.1 * x), [w]


def closure():
    """A tensor that is made of another, in a dictionary, in drift and diffusion; a frozen layer; time decides."""
    w = torch.randn(4, requires_grad=True)
    held, frozen = {"a": [w.exp(), 2 * w]}, linear().requires_grad_(False)

    def drift(x, t):
        u = held["a"][0] if t < 0.5 else held["a"][1]
        return u * torch.tanh(frozen(x)) * w

    return sds.SDE(drift, lambda x, t: 0.1 * w * x), [w], frozen


@pytest.mark.parametrize(
    "make",
    [
        network(linear, nn.Tanh, linear), network(linear, nn.Dropout, linear), drawing, drawing_late,
        closure,
        network(linear, lambda: nn.BatchNorm1d(4), linear), network(lambda: nn.utils.spectral_norm(linear()), nn.Tanh),
        network(linear, nn.Tanh, of=force), network(linear, nn.Tanh, linear, of=in_bfloat16),
    ],
    ids=["plain", "dropout", "draws", "draws late", "closure", "batch norm", "spectral norm", "force", "autocast"],
)  # fmt: skip
def test_gradients_have_the_bits_of_plain_ones(make, kept):
    same_bits(make)


def test_autocast_round_the_run_is_that_of_steps_taken_again():
    """The backward run is outside of it, as torch wants it."""
    w, made = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_(), []
    sde = sds.SDE(lambda x, t: torch.tanh(x @ w).float(), lambda x, t: 0.1 * x)
    for gradients in ("auto", "checkpoint"):
        with torch.autocast("cpu", torch.bfloat16):
            sol = run(sde, X0, gradients)
        made.append(torch.autograd.grad(loss_of(sol), w)[0])
    assert torch.equal(*made)


def test_whatever_is_saved_and_by_whichever_executor(kept):
    w = torch.ones(4, requires_grad=True)

    def make():
        return closure()[:2]

    same_bits(make, save_at=[0.0, 0.33, 0.5, 1.0])
    same_bits(make, observable=lambda x: x.square() * w, save_at="grid")
    same_bits(make, backend="kernel")


def test_sums_of_moments_and_a_run_that_goes_on(kept):
    made = []
    for gradients in ("auto", "checkpoint"):
        torch.manual_seed(5)
        sde, (w,), _ = closure()
        x0 = X0.clone().requires_grad_()
        first = run(sde, x0, gradients, reduce="moments", save_at=[0.2, 1.0])
        rest = sds.solve(sde, t1=2.0, steps=STEPS, start=first.state, solver=sds.EulerMaruyama(), gradients=gradients)
        loss = first.mean.sum() + first.variance.square().sum() + rest.x1.square().sum()
        made.append(torch.autograd.grad(loss, [x0, w]))
    assert all(map(torch.equal, *made))


def test_backward_twice_twice_differentiated_and_hooks():
    calls, x0 = [], X0.double().requires_grad_()
    w = torch.ones(4, dtype=x0.dtype, requires_grad=True)
    w.register_hook(lambda g: calls.append(1) or 2 * g)
    sde = sds.SDE(lambda x, t: torch.tanh(w * x), lambda x, t: 0.1 * w.sigmoid() * x)

    def bent(gradients):
        first = torch.autograd.grad(loss_of(run(sde, x0, gradients)), [x0, w], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), [x0, w])]

    assert all(map(torch.equal, bent("auto"), bent("checkpoint")))
    loss, before = loss_of(run(sde, x0, "checkpoint")), len(calls)
    once = torch.autograd.grad(loss, [x0, w], retain_graph=True)
    assert len(calls) == before + 1
    assert all(map(torch.equal, once, torch.autograd.grad(loss, [x0, w])))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_what_steps_save_is_not_kept():
    """Arrays that the drift makes, and torch saves for the gradient of a product, by how many live at once."""
    alive = {"now": 0, "most": 0}

    def made(like):
        array = np.full(like.shape, 0.5, dtype=np.float32)
        alive["now"] += 1
        alive["most"] = max(alive.values())
        weakref.finalize(array, lambda: alive.update(now=alive["now"] - 1))
        return torch.from_numpy(array)

    sde, most = sds.SDE(lambda x, t: x * made(x), lambda x, t: 0.1 * x), {}
    for gradients in ("auto", "checkpoint", "none"):
        alive["most"] = alive["now"]
        sol = run(sde, X0.clone().requires_grad_(), gradients, save_at=None)
        if gradients == "none":
            assert not sol.x1.requires_grad
        else:
            sol.x1.sum().backward()
        del sol
        most[gradients] = alive["most"]
    assert most["auto"] >= STEPS
    assert most["checkpoint"] <= 4  # of the first step, of the one that is taken again, of calls that only look
    assert most["none"] <= 2


def test_what_does_not_repeat_is_refused():
    w, count = torch.ones(4, requires_grad=True), []

    def counting(x, t):
        count.append(1)
        return x * w * len(count)

    def growing(x, t):
        count.append(1)
        return x * w if len(count) <= STEPS + 4 else x * w * w

    def refuses(drift, match):
        count.clear()
        sol = run(sds.SDE(drift, lambda x, t: 0.1 * x), X0, "checkpoint")
        if "inplace" in match:
            w.detach().mul_(1.0)
        with pytest.raises(RuntimeError, match=match):
            sol.x1.sum().backward()

    refuses(counting, "give other values than they gave, as they do when they count calls")
    refuses(growing, "save . tensors for it, and saved .*gradients='auto'")
    refuses(lambda x, t: x * w, "modified by an inplace operation since")


def test_reversible_steps_are_undone():
    """To rounding, which grows where a solution contracts: there a gradient is refused rather than wrong."""
    w, x0 = torch.ones(4, requires_grad=True), X0.clone().requires_grad_()

    def gradient(rate, time, gradients):
        drift = lambda x, t: w * x.sin() - rate * x  # noqa: E731
        sde = sds.SDE(drift, lambda x, t: 0.5 + 0.3 * x.cos(), calculus="stratonovich")
        solver = sds.ReversibleHeun(tolerance=1e9)
        sol = sds.solve(sde, x0, 0.0, time, 64, solver=solver, seed=0, backend="eager", gradients=gradients)
        return torch.autograd.grad(sol.x1.sum(), [x0, w])

    torch.testing.assert_close(gradient(0.0, 1.0, "reversible"), gradient(0.0, 1.0, "auto"), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"drifted away: undone to step .* root mean square, of .*; the solution"):
        gradient(8.0, 4.0, "reversible")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gradients": "adjoint"}, "gradients must be one of 'auto', 'checkpoint', 'reversible', 'none', got 'adj"),
        ({"gradients": "reversible"}, "undoes steps of ReversibleHeun, and those of EulerMaruyama cannot be undone"),
    ],
)
def test_bad_input(options, match):
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
    with pytest.raises(ValueError, match=match):
        run(sde, X0, **options)


def test_what_cannot_be_taken_again():
    ode, dropping = sds.ODE(lambda x, t: -x), nn.Dropout()
    with pytest.raises(ValueError, match="DormandPrince chooses its own steps, and gradients='checkpoint' takes those"):
        sds.solve(ode, X0, 0.0, 1.0, solver=sds.DormandPrince(), gradients="checkpoint")
    with pytest.raises(ValueError, match=r"gradients='checkpoint' runs under no transform of torch.func"):
        torch.func.grad(lambda x: run(ode, x, "checkpoint").x1.sum())(X0)
    sde = sds.SDE(lambda x, t: dropping(x), lambda x, t: 0.1 * x, calculus="stratonovich")
    with pytest.raises(ValueError, match="the functions draw random numbers or rewrite buffers"):
        run(sde, X0.clone().requires_grad_(), "reversible", solver=sds.ReversibleHeun())
