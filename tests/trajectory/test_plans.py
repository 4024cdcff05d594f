"""A call of `solve` that runs by the plan of an earlier one gives what the same call gives in full."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from sdesolve_kernels import use_backend

import sdesolve as sds
from sdesolve.integrate import fused as fusing
from sdesolve.integrate import plans as planning
from sdesolve.integrate.plans import Plan

FACTOR = 1.0


class Model:
    """Holds what drift and diffusion read, of many kinds."""

    bend = 0.1

    def __init__(self):
        self.rate, self.weights, self.buffer = 0.5, [0.1, 0.2], torch.tensor([0.3, -0.2])
        self.options, self.array, self.net = {"scale": 0.4}, np.array([0.05, 0.1]), torch.nn.Linear(2, 2)
        self.net.requires_grad_(False)
        shift = 0.02

        def inner(x):
            return shift * x.cos()

        self.inner = inner

    def drift(self, x, t):
        f = -self.rate * FACTOR * x + self.weights[1] * x.sin() + self.buffer * t + self.inner(x)
        return f + self.bend * torch.tanh(self.net(x)) + float(self.array[0])

    def diffusion(self, x, t):
        return self.options["scale"] + 0.1 * x.sin()


def _rate(model):
    model.rate += 0.3


def _item(model):
    model.weights[1] += 0.2


def _in_place(model):
    model.buffer.add_(0.1)


def _data(model):
    model.buffer.data.mul_(0.7)


def _by_numpy(model):
    model.buffer.detach().numpy()[0] += 0.4


def _other_tensor(model):
    model.buffer = model.buffer.clone() * 1.5


def _other_storage(model):
    model.buffer.data = torch.tensor([-0.4, 0.6])


def _option(model):
    model.options["scale"] *= 0.8


def _array(model):
    model.array[0] += 0.3


def _weight(model):
    model.net.weight.mul_(0.5)


def _parameter(model):
    model.net.bias = torch.nn.Parameter(model.net.bias * 2 + 0.1, requires_grad=False)


def _cell(model):
    for cell in model.inner.__closure__ or ():
        cell.cell_contents *= 3.0


def _function(model):
    model.inner = lambda x: 0.05 * x


def _code(model):
    def inner(x):
        return shift * x.tanh()

    shift = 0.0
    model.inner.__code__ = inner.__code__ if model.inner.__closure__ else (lambda x: 0.1 * x.cos()).__code__


def _hook(model):
    model.net.register_forward_hook(lambda module, args, out: 0.5 * out)


def _on_the_class(model):
    Model.bend += 0.2


def _a_method(model):
    own = Model.diffusion
    Model.diffusion = lambda self, x, t: 0.9 * own(self, x, t)


def _bound(model):
    model.drift = lambda x, t: -x


def _global(model):
    globals()["FACTOR"] *= 1.2


def _a_library(model):
    own = torch.tanh
    torch.tanh = lambda x: 0.5 * own(x)


def _wants_a_gradient(model):
    model.buffer.requires_grad_(not model.buffer.requires_grad)


CHANGES = [
    _rate, _item, _in_place, _data, _by_numpy, _other_tensor, _other_storage, _option, _array, _weight, _parameter,
    _cell, _function, _code, _hook, _on_the_class, _a_method, _bound, _global, _a_library, _wants_a_gradient,
]  # fmt: skip


@pytest.fixture
def as_before():
    """What tests change beyond their own model."""
    kept = FACTOR, Model.bend, Model.diffusion, torch.tanh
    yield
    globals()["FACTOR"], Model.bend, Model.diffusion, torch.tanh = kept


def outcome(sol):
    """All that a solution holds, tensors as values."""
    flat = {}
    for field in dataclasses.fields(sol):
        value = getattr(sol, field.name)
        if field.name == "state" and value is not None:
            flat |= {f"state.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        elif field.name == "stats":
            flat |= {f"stats.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        else:
            flat[field.name] = value
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in flat.items() if k != "state.memory"}


def forget():
    fusing._kernels.clear()


def planned():
    return sum(isinstance(made, Plan) for made in fusing._kernels.values())


@contextlib.contextmanager
def by_plan_alone(monkeypatch):
    """Inside the block, a call that no plan is for fails."""

    def refused(*args):
        raise AssertionError("it was made in full")

    with monkeypatch.context() as patch:
        patch.setattr(fusing, "prepared", refused)
        yield


X0 = torch.linspace(-1.0, 1.0, 8).reshape(4, 2)
LINEAR = sds.SDE(lambda x, t: -0.5 * x, lambda x, t: 0.3 * x, noise="diagonal")
FIELD = sds.ODE(lambda x, t: x.cos() - t)
STRATONOVICH = sds.SDE(lambda x, t: -x, lambda x, t: 0.3 * x.sin(), noise="diagonal", calculus="stratonovich")
VP = sds.VP()
REVERSE = VP.reverse(sds.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.4]).score(VP))
KINDS = {
    "Euler-Maruyama": (LINEAR, {"solver": sds.EulerMaruyama()}),
    "Milstein": (LINEAR, {"solver": sds.Milstein()}),
    "SRIW1": (LINEAR, {"solver": sds.SRIW1()}),
    "Heun": (STRATONOVICH, {"solver": sds.Heun()}),
    "reversible Heun": (STRATONOVICH, {"solver": sds.ReversibleHeun()}),
    "ODE": (FIELD, {"solver": sds.RK4()}),
    "every point": (LINEAR, {"solver": sds.EulerMaruyama(), "save_at": "grid"}),
    "moments": (LINEAR, {"solver": sds.EulerMaruyama(), "save_at": "grid", "reduce": "moments"}),
    "observable": (LINEAR, {"solver": sds.EulerMaruyama(), "save_at": "grid", "observable": lambda x: x.sum(1)}),
    "coarse steps": (LINEAR, {"solver": sds.EulerMaruyama(), "noise": sds.BrownianPath(3, substeps=2, first_path=5)}),
    "mirrored": (LINEAR, {"solver": sds.EulerMaruyama(), "noise": sds.BrownianPath(4).antithetic()}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_runs_by_the_plan_of_the_first(kind, monkeypatch, interpreted):
    sde, options = KINDS[kind]
    options = {"seed": 3} | options
    if "noise" in options:
        del options["seed"]

    def call(x0, **others):
        return outcome(sds.solve(sde, x0, 0.0, 1.0, 6, backend="fused", **(options | others)))

    call(X0)
    for x0, others in ((X0, {}), (0.5 * X0 + 0.1, {}), (X0, {} if "noise" in options else {"seed": 2**63 + 5})):
        with by_plan_alone(monkeypatch):
            found = call(x0, **others)
        kernels = fusing._kernels.copy()
        for key, made in kernels.items():
            if isinstance(made, Plan):
                del fusing._kernels[key]
        assert found == call(x0, **others)


def test_reverse_equations_have_plans(monkeypatch):
    def call(x0):
        return sds.solve(REVERSE, x0, 1.0, 0.01, 8, solver=sds.EulerMaruyama(), seed=1, backend="fused").x1

    call(X0)
    with by_plan_alone(monkeypatch):
        found = call(2 * X0)
    forget()
    assert torch.equal(found, call(2 * X0))


@pytest.mark.parametrize("seed", range(2))
def test_random_changes_between_calls_are_seen(seed, as_before, interpreted):
    rng = np.random.default_rng(seed)
    model = Model()
    sde = sds.SDE(lambda x, t: model.drift(x, t), lambda x, t: model.diffusion(x, t), noise="diagonal")
    bound = sds.SDE(model.drift, model.diffusion, noise="diagonal")
    options = {"solver": sds.EulerMaruyama(), "seed": seed}
    changed = []
    for _ in range(18):
        change = CHANGES[rng.integers(len(CHANGES))]
        changed.append(change.__name__)
        with torch.no_grad():
            change(model)
        for equation in (sde, bound):
            sols = [sds.solve(equation, X0, 0.0, 1.0, 5, **options) for _ in range(2)]
            eager = sds.solve(equation, X0, 0.0, 1.0, 5, backend="eager", **options)
            for sol in sols:
                torch.testing.assert_close(sol.x1, eager.x1, rtol=2e-5, atol=2e-6, msg=lambda m: f"{changed}: {m}")
                assert sol.x1.requires_grad == eager.x1.requires_grad


ARGUMENTS = {
    "t0": 0.25,
    "t1": 1.5,
    "steps": 7,
    "seed": 9,
    "solver": sds.Milstein(),
    "save_at": "grid",
    "reduce": "moments",
    "x0": X0[:3],
    "observable": lambda x: x.square(),
    "noise": sds.BrownianPath(3, first_path=1),
    "backend": "eager",
    "params": torch.tensor(2.0),
    "paths": [3, 2, 1, 0],
    "increments": "two-point",
    "grid": torch.tensor([0.0, 0.1, 1.0]),
    "at": [(1.0, lambda x: x + 1.0)],
    "carry": sds.Integral(lambda x, t: x.sum(1)),
    "kl_to": lambda x, t: -x,
    "until": sds.Crossing(lambda x, t: x[:, 0] - 0.5),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_each_argument_makes_another_call(name, interpreted):
    sde = LINEAR
    if name == "params":
        sde = sds.SDE(lambda x, t, p=1.0: -0.5 * p * x, lambda x, t, p=1.0: 0.3 * x, noise="diagonal")
    base = {"x0": X0, "t0": 0.0, "t1": 1.0, "steps": 4, "solver": sds.EulerMaruyama(), "seed": 3}
    other = base | {name: ARGUMENTS[name]}
    for left_out in {"grid": ("t0", "t1", "steps"), "noise": ("seed",)}.get(name, ()):
        del other[left_out]

    first = outcome(sds.solve(sde, **base))
    found = [sds.solve(sde, **other).x1 for _ in range(2)]
    assert outcome(sds.solve(sde, **base)) == first
    forget()
    assert all(torch.equal(x1, sds.solve(sde, **other).x1) for x1 in found)


@pytest.mark.parametrize("mode", ["default dtype", "autocast", "inference", "no_grad", "another back end", "mode"])
def test_modes_make_other_calls(mode, interpreted):
    weight = torch.tensor([[0.5, 0.1], [0.0, -0.3]], requires_grad=mode == "no_grad")

    def drift(x, t):
        return x @ weight * (0.3 if torch.get_default_dtype() == torch.float32 else 0.7)

    sde = sds.SDE(drift, lambda x, t: 0.3 * x, noise="diagonal")

    @contextlib.contextmanager
    def in_mode():
        if mode == "default dtype":
            torch.set_default_dtype(torch.float64)
            try:
                yield
            finally:
                torch.set_default_dtype(torch.float32)
            return
        with {
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "inference": torch.inference_mode,
            "no_grad": torch.no_grad,
            "another back end": lambda: use_backend("numba"),
            "mode": lambda: torch.device("cpu"),
        }[mode]():
            yield

    def call():
        try:
            sol = sds.solve(sde, X0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=2)
        except Exception as met:
            return str(met)
        return sol.x1.tolist(), sol.x1.requires_grad, sol.x1.is_inference(), sol.stats.execution

    contexts = [contextlib.nullcontext, contextlib.nullcontext, in_mode, in_mode] * 2
    made = {True: [], False: []}
    for afresh in (False, True):
        forget()
        for context in contexts:
            with context():
                made[afresh].append(call())
            if afresh:
                forget()
    assert made[True] == made[False]


def test_bad_input_is_refused_as_ever():
    options = {"solver": sds.EulerMaruyama(), "seed": 1}
    sds.solve(LINEAR, X0, 0.0, 1.0, 4, **options)
    with pytest.raises(ValueError, match="row 1 holds nan"):
        sds.solve(LINEAR, X0.clone().index_fill_(0, torch.tensor([1]), float("nan")), 0.0, 1.0, 4, **options)
    with pytest.raises(ValueError, match="seed is short for"):
        sds.solve(LINEAR, X0, 0.0, 1.0, 4, noise=sds.BrownianPath(1), **options)
    with pytest.raises(ValueError, match="seed must be"):
        sds.solve(LINEAR, X0, 0.0, 1.0, 4, **options | {"seed": -1})


def test_divergence_is_reported_by_a_call_in_full():
    steep = sds.SDE(lambda x, t: -(x**3), lambda x, t: 0.1 * x, noise="diagonal")
    options = {"solver": sds.EulerMaruyama(), "seed": 1}
    sds.solve(steep, X0, 0.0, 1.0, 40, **options)
    with pytest.raises(sds.DivergenceError) as by_plan:
        sds.solve(steep, 1e3 * X0, 0.0, 1.0, 40, **options)
    forget()
    with pytest.raises(sds.DivergenceError) as in_full:
        sds.solve(steep, 1e3 * X0, 0.0, 1.0, 40, **options)
    assert str(by_plan.value) == str(in_full.value)


def test_what_is_not_to_be_checked_is_checked_in_other_calls():
    steep = sds.SDE(lambda x, t: -(x**3), lambda x, t: 0.1 * x, noise="diagonal")
    options = {"solver": sds.EulerMaruyama(), "seed": 1}
    for _ in range(2):
        unchecked = sds.solve(steep, X0 + 9e2, 0.0, 1.0, 40, check_finite=False, **options)
        assert not bool(unchecked.x1.isfinite().any())
        assert bool(sds.solve(steep, X0, 0.0, 1.0, 40, **options).x1.isfinite().all())
        with pytest.raises(sds.DivergenceError):
            sds.solve(steep, X0 + 9e2, 0.0, 1.0, 40, **options)


def test_one_seed_is_drawn_whoever_runs():
    def drawn():
        torch.manual_seed(0)
        made = [sds.solve(LINEAR, X0, 0.0, 1.0, 4, solver=sds.EulerMaruyama()).stats.seed for _ in range(3)]
        return made, float(torch.rand(()))

    forget()
    assert drawn() == drawn()
    assert len(set(drawn()[0])) == 3


def test_results_share_no_memory_with_a_plan():
    options = {"solver": sds.EulerMaruyama(), "seed": 1, "save_at": "grid"}
    first = outcome(sds.solve(LINEAR, X0, 0.0, 1.0, 4, **options))
    for _ in range(2):
        sol = sds.solve(LINEAR, X0, 0.0, 1.0, 4, **options)
        for tensor in (sol.x1, sol.xs, sol.ts, sol.state.times):
            tensor.zero_()
    assert outcome(sds.solve(LINEAR, X0, 0.0, 1.0, 4, **options)) == first


def test_a_plan_keeps_nothing_of_the_user_alive():
    class Held:
        rate = 0.5

        def drift(self, x, t):
            return -self.rate * x

    held = Held()
    sde = sds.SDE(held.drift, lambda x, t: 0.1 * x, noise="diagonal")
    for _ in range(3):
        sds.solve(sde, X0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=1)
    gone = weakref.ref(held), weakref.ref(sde)
    del held, sde
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_long_grid_is_not_kept(interpreted, monkeypatch):
    monkeypatch.setattr(planning, "_MOST_STEPS", 6)
    for steps, plans in ((6, 1), (7, 0)):
        forget()
        sds.solve(LINEAR, X0[:1], 0.0, 1.0, steps, solver=sds.EulerMaruyama(), seed=1)
        assert planned() == plans


def test_plans_are_bounded_and_safe_under_threads(monkeypatch):
    monkeypatch.setattr(fusing, "_KERNELS_KEPT", 12)
    expected = {}
    for n in range(8):
        expected[n] = sds.solve(LINEAR, X0, 0.0, 1.0, 4 + n, solver=sds.EulerMaruyama(), seed=n).x1
    failures = []

    def work(offset):
        for i in range(60):
            n = (i * 3 + offset) % 8
            x1 = sds.solve(LINEAR, X0, 0.0, 1.0, 4 + n, solver=sds.EulerMaruyama(), seed=n).x1
            if not torch.equal(x1, expected[n]):
                failures.append(n)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 0 < planned() < len(fusing._kernels) <= 12
