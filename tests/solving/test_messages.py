"""Messages: short whatever they are about, and right about what helps."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

import sdesolve as sds

EM, VP = sds.EulerMaruyama(), sds.VP()
SDE = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x)
SCORE = sds.Gaussian(torch.zeros(2), torch.eye(2)).score(VP)
X = torch.linspace(-1.0, 1.0, 6).reshape(3, 2)
SPAN = {"t0": 0.0, "t1": 1.0, "steps": 2, "solver": EM, "seed": 0, "backend": "eager"}
TWO = {"steps": 2, "seed": 0, "backend": "eager"}
STEPS = {"process": VP, "score": SCORE, "steps": 2}
SAMPLES = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))

HUGE = [
    torch.arange(9_000.0), torch.zeros(95, 95), list(range(9_000)), [1.0] * 9_000, "x" * 9_000, np.zeros(9_000),
    {i: i for i in range(9_000)}, set(range(9_000)), [torch.ones(2)] * 900, torch.full((9_000,), torch.nan),
]  # fmt: skip
CALLS = {
    "solve": (sds.solve, {"sde": SDE, "x0": X, **SPAN}),
    "solve on a grid": (
        sds.solve,
        {"sde": SDE, "x0": X, "grid": torch.linspace(0, 1, 3), "solver": EM, "backend": "eager"},
    ),
    "sample": (sds.sample, {**STEPS, "shape": (3, 2), "seed": 0, "backend": "eager"}),
    "log_likelihood": (sds.log_likelihood, {**STEPS, "x": X}),
    "encode": (sds.encode, {**STEPS, "x": X}),
    "run_chain": (sds.run_chain, {"kernel": sds.mcmc.Langevin(0.1), "x0": X, "steps": 1, "score": lambda x: -x}),
    "AnnealedLangevin": (sds.AnnealedLangevin, {"sigmas": [1.0, 0.5], "step_size": 0.01, "inner_steps": 1}),
    "SDE": (sds.SDE, {"drift": lambda x, t: x, "diffusion": lambda x, t: x}),
    "BrownianPath": (sds.BrownianPath, {"seed": 0}),
    "increments": (sds.BrownianPath(0).increments, {"times": torch.linspace(0, 1, 3), "shape": (3, 2)}),
    "energy_distance": (sds.metrics.energy_distance, {"a": SAMPLES, "b": SAMPLES}),
    "squared_mmd": (sds.metrics.squared_mmd, {"a": SAMPLES, "b": SAMPLES}),
    "karras_sigma": (sds.grids.karras_sigma, {"process": VP, "steps": 3}),
    "VP": (sds.VP, {}),
    "LangevinCorrector": (sds.LangevinCorrector, {"snr": 0.1}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_messages_are_short_whatever_the_size_of_what_they_are_about(name):
    """A refused grid printed 163,061 characters."""
    function, arguments = CALLS[name]
    longest = {}
    for parameter in inspect.signature(function).parameters.keys() - {"progress", "device", "cuda_graph"}:
        if (name, parameter) == ("increments", "shape"):
            continue  # of many dimensions is one
        for value in HUGE:
            try:
                function(**arguments | {parameter: value})
            except Exception as error:
                longest[len(str(error))] = (parameter, type(value), str(error)[:200])
    assert max(longest, default=0) < 700, longest[max(longest)]


def refusal(call):
    with pytest.raises((ValueError, TypeError)) as met:
        call()
    return str(met.value)


NET = torch.nn.Linear(2, 2).bfloat16()
COMPLEX = torch.complex(X, 2 * X)
TURN = sds.SDE(lambda z, t: 1j * z, lambda z, t: 0 * z)


def narrow():
    return sds.NetworkScore(sds.nn.MLP((2,), width=4, depth=1).bfloat16(), VP)


def under_autocast(drift):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = torch.eye(2)
        return sds.solve(sds.SDE(lambda x, t: drift(x @ weight, x), lambda x, t: 0.1 * x), X, **SPAN)


def sampled_in_16_bits():
    score = narrow()
    score.net.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        return sds.sample(VP, score, (3, 2), **TWO)


def of_complex():
    def drift(x, t):
        return torch.view_as_real(1j * torch.view_as_complex(x))

    return sds.solve(sds.SDE(drift, lambda x, t: 0 * x), torch.view_as_real(COMPLEX), **SPAN)


def solve(x0=X, sde=SDE, **options):
    return sds.solve(sde, x0, **SPAN | options)


VELOCITY = sds.AnnealedLangevin([1.0, 0.5], 0.01, 1)
VE_SCORE = sds.Gaussian(torch.zeros(2), torch.eye(2)).score(sds.VE())
ADVICE = [
    (lambda: solve(COMPLEX, TURN), r"torch.view_as_real(x0)", of_complex),
    (lambda: solve(X.half()), "x0.float()", lambda: solve(X.half().float())),
    (lambda: solve(X.long()), "x0.float()", lambda: solve(X.long().float())),
    (lambda: solve(torch.tensor(1.0)), "use x0[None]", lambda: solve(torch.tensor(1.0)[None])),
    (lambda: solve(X.tolist()), "torch.as_tensor(x0)", lambda: solve(torch.as_tensor(X.tolist()))),
    (lambda: solve(X.to_sparse()), "to_dense()", lambda: solve(X.to_sparse().to_dense())),
    (
        lambda: solve(X, lambda x, t: -x),
        "sds.SDE(drift, diffusion)",
        lambda: solve(X, sds.SDE(lambda x, t: -x, lambda x, t: x)),
    ),
    (lambda: solve(solver=sds.EulerMaruyama), "EulerMaruyama()", lambda: solve(solver=sds.EulerMaruyama())),
    (lambda: solve(steps=2.0), "write 2", lambda: solve(steps=2)),
    (lambda: solve(save_at=0.5), "save_at=[t]", lambda: solve(save_at=[0.5])),
    (lambda: solve(seed=None, noise=3), "a number goes to seed=", lambda: solve(seed=3)),
    (
        lambda: solve(X, sds.ODE(lambda x, t: 1.0)),
        "torch.full_like(x, value)",
        lambda: solve(X, sds.ODE(lambda x, t: torch.full_like(x, 1.0))),
    ),
    (lambda: solve(X, sds.ODE(lambda t, x: -x)), "f(x, t)", lambda: solve(X, sds.ODE(lambda x, t: -x))),
    (
        lambda: solve(X, sds.ODE(lambda x, t: x.mul_(-1))),
        "x.clone()",
        lambda: solve(X, sds.ODE(lambda x, t: x.clone().mul_(-1))),
    ),
    (
        lambda: solve(X, sds.SDE(lambda x, t: -x, lambda x, t: x[..., None])),
        "noise='general'",
        lambda: solve(X, sds.SDE(lambda x, t: -x, lambda x, t: x[..., None], noise="general")),
    ),
    (
        lambda: solve(X, sds.ODE(lambda x, t: x.double())),
        "dtype=x.dtype",
        lambda: solve(X, sds.ODE(lambda x, t: x.double().to(x.dtype))),
    ),
    (
        lambda: under_autocast(lambda y, x: y),
        "torch.autocast is on: end its block before, or convert the result with .to(x.dtype)",
        lambda: under_autocast(lambda y, x: y.to(x.dtype)),
    ),
    (
        lambda: sds.sample(VP, narrow(), (3, 2), **TWO),
        ".to(torch.float32), and compute in it by torch.autocast",
        sampled_in_16_bits,
    ),
    (
        lambda: sds.sample(VP, lambda x, t: NET(x.bfloat16()), (3, 2), **TWO),
        ".to(x.dtype)",
        lambda: sds.sample(VP, lambda x, t: NET(x.bfloat16()).to(x.dtype), (3, 2), **TWO),
    ),
    (
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO, dtype=torch.bfloat16),
        "torch.float32 or torch.float64",
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO, dtype=torch.float64),
    ),
    (
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO, device="nowhere"),
        "device='cpu'",
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO, device="cpu"),
    ),
    (
        lambda: sds.sample(VP.reverse(SCORE), SCORE, (3, 2), **TWO),
        "give the forward process",
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO),
    ),
    (
        lambda: sds.sample(SCORE, VP, (3, 2), **TWO),
        "the process comes first",
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO),
    ),
    (
        lambda: sds.sample(VP, sds.Gaussian(torch.zeros(2), torch.eye(2)), (3, 2), **TWO),
        ".score(process)",
        lambda: sds.sample(VP, sds.Gaussian(torch.zeros(2), torch.eye(2)).score(VP), (3, 2), **TWO),
    ),
    (
        lambda: sds.sample(VP, SCORE, (3, 2), grid=grids_to_zero(), seed=0),
        "DPMSolverPP",
        lambda: sds.sample(VP, SCORE, (3, 2), grid=grids_to_zero(), backend="eager", solver=sds.DPMSolverPP()),
    ),
    (
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO | {"backend": "kernel"}, solver=sds.Heun()),
        "backend='auto' runs it",
        lambda: sds.sample(VP, SCORE, (3, 2), **TWO, solver=sds.Heun()),
    ),
    (
        lambda: VELOCITY(sds.VE(), VE_SCORE, X, noise=5),
        "a number goes to seed=",
        lambda: VELOCITY(sds.VE(), VE_SCORE, X, seed=5),
    ),
    (
        lambda: torch.func.vmap(
            lambda x: sds.solve(sds.ODE(lambda x, t: -x), x, 0.0, 1.0, solver=sds.DormandPrince()).x1
        )(X[None]),
        "give all samples as one batch",
        lambda: sds.solve(sds.ODE(lambda x, t: -x), X, 0.0, 1.0, solver=sds.DormandPrince()),
    ),
    (
        lambda: sds.log_likelihood(VP, SCORE, X, solver=sds.RK4()),
        "needs steps= or grid=",
        lambda: sds.log_likelihood(VP, SCORE, X, solver=sds.RK4(), steps=2),
    ),
    (lambda: sds.VP().reverse(SCORE, 0), "probability_flow", lambda: sds.VP().probability_flow(SCORE)),
]


def grids_to_zero():
    return sds.grids.with_zero(VP.time_grid(3))


@pytest.mark.parametrize("case", ADVICE, ids=lambda case: case[1])
def test_advice_works_when_it_is_followed(case):
    """Complex states were told `.float()`, which loses half of them; 16-bit scores a dtype that was refused next."""
    wrong, advice, right = case
    assert advice in refusal(wrong)
    right()


def test_nothing_to_average_is_no_crash():
    with pytest.raises(ValueError, match=r"reduce='moments' averages over the batch, and x0 has no rows"):
        solve(torch.empty(0, 2), reduce="moments")


def diverging(step):
    sds.solve(sds.ODE(lambda x, t: torch.where(t >= step, torch.nan, x)), X, 0.0, 4.0, 4, solver=EM, backend="eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_pool_hears_of_a_divergence():
    """It waited for ever: the error did not unpickle."""
    with multiprocessing.get_context("fork").Pool(1) as pool, pytest.raises(sds.DivergenceError) as met:
        pool.map_async(diverging, [2.0]).get(timeout=60)
    assert (met.value.step, met.value.path, met.value.time) == (2, 0, 2.0)


def test_every_exception_of_ours_survives_pickling():
    kinds, waiting = set(), [Exception]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.__module__.startswith("sdesolve"):
                kinds.add(kind)
    assert sds.DivergenceError in kinds
    for kind in kinds:
        error = kind("why", step=1, time=0.5, path=2) if kind is sds.DivergenceError else kind("why")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), repr(vars(again))) == (kind, "why", repr(vars(error)))  # which may hold nan


def test_what_the_soak_found_is_refused_with_words_of_ours():
    many = {"t0": torch.zeros(3), "steps": 2**70}
    for call, message in (
        (lambda: solve(steps=2**70), r"steps must be at most 2\^32"),
        (lambda: solve(**many), r"steps must be at most 2\^32"),
        (
            lambda: sds.run_chain(sds.mcmc.Langevin(0.1), X, 1, energy=lambda x: x.detach().sum(1)),
            "energy has no gradient",
        ),
        (lambda: sds.encode(VP, lambda x, t: x[:, :1], X), "must return what is like the state"),
        (lambda: sds.metrics.wasserstein_1d(X.to("meta"), X), "dense tensor with values"),
        (lambda: sds.train(NET, SAMPLES.to_sparse(), loss=sds.DenoisingScoreMatching(), steps=1), "dense tensors"),
        (lambda: sds.log_likelihood(VP, VP, X), "score must be a function"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
