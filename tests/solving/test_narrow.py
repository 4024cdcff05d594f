"""Flows of 16 bits: what they are, and what noise has in their place."""

import pytest
import torch

import sdesolve as sds

SDE = sds.SDE(lambda x, t: -x, lambda x, t: 0.1)
NARROW = [torch.float16, torch.bfloat16]


def unit(dtype):
    return torch.finfo(dtype).eps


def network(dtype=torch.float32):
    torch.manual_seed(0)
    net = sds.nn.MLP(2, width=16, depth=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_an_ode_of_16_bit_states(dtype):
    seen = []

    def drift(x, t):
        seen.append(x.dtype)
        return -x

    x0 = torch.linspace(-1, 1, 6).reshape(3, 2).to(dtype)
    for backend in ("auto", "eager"):
        sol = sds.solve(sds.ODE(drift), x0, 0.0, 1.0, 1000, solver=sds.RK4(), save_at=[0.5, 1.0], backend=backend)
        assert sol.x1.dtype == sol.xs.dtype == dtype
        assert set(seen) == {dtype}
        # 1000 steps, each of less than half a unit in the last place of the state, are not lost.
        torch.testing.assert_close(sol.x1.double(), x0.double() * torch.e**-1, rtol=2 * unit(dtype), atol=0)
    by_name = sds.solve(
        x0=x0, sde=sds.ODE(lambda x, t, a: a * x), t0=0.0, t1=1.0, steps=4, solver=sds.RK4(), params=-1.0
    )
    torch.testing.assert_close(by_name.x1.double(), x0.double() * torch.e**-1, rtol=2 * unit(dtype) + 1e-3, atol=0)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("weights", [torch.float32, "narrow"])
def test_flows_of_networks(dtype, weights):
    process, shape = sds.VP(), (64, 2)
    own = dtype if weights == "narrow" else weights
    narrow, wide = (sds.NetworkScore(network(d), process, "data") for d in (own, torch.float32))
    for solver in (sds.DDIM(), sds.DPMSolverPP(2), sds.RK4()):
        options = {"solver": solver, "steps": 8, "seed": 0, "stochasticity": 0.0, "backend": "eager"}
        x = sds.sample(process, narrow, shape, dtype=dtype, **options)
        expected = sds.sample(process, wide, shape, **options)
        assert x.dtype == dtype
        # Weights, outputs and times of 16 bits: relative errors of a few units each.
        assert float((x.float() - expected).abs().max()) < 40 * unit(dtype) * float(expected.abs().max())
    x0 = 0.5 * torch.ones(4, 2, dtype=dtype)
    assert sds.sample(process, narrow, x0=x0, from_time=0.5, solver=sds.DDIM(), steps=4, backend="eager").dtype == dtype
    flow = sds.solve(process.probability_flow(narrow), x0, 0.1, 0.9, 8, solver=sds.Heun(), backend="eager")
    assert flow.x1.dtype == dtype
    assert bool(flow.x1.isfinite().all())


def test_flows_of_exact_scores_guidance_and_functions():
    process = sds.VP()
    data = sds.Gaussian(torch.tensor([1.0, -1.0]), 0.25 * torch.eye(2))
    x = sds.sample(
        process,
        data.score(process),
        (256, 2),
        solver=sds.DDIM(),
        steps=20,
        seed=0,
        dtype=torch.bfloat16,
        backend="eager",
    )
    exact = sds.sample(process, data.score(process), (256, 2), solver=sds.DDIM(), steps=20, seed=0, backend="eager")
    assert torch.equal(x, exact.bfloat16())
    net = network(torch.bfloat16)
    guided = sds.ClassifierFreeGuidance(
        sds.NetworkScore(net, process), sds.NetworkScore(network(torch.bfloat16), process), scale=2.0
    )
    made = sds.sample(
        process, guided, (8, 2), solver=sds.DDIM(), steps=4, seed=0, dtype=torch.bfloat16, backend="eager"
    )
    assert made.dtype == torch.bfloat16
    seen = []

    def function(x, t):
        seen.append(x.dtype)
        return -x

    sds.sample(process, function, (8, 2), solver=sds.DDIM(), steps=4, seed=0, dtype=torch.bfloat16, backend="eager")
    assert set(seen) == {torch.bfloat16}


def test_gradients_of_a_narrow_flow():
    x0 = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    a = torch.tensor(-1.0, requires_grad=True)
    sol = sds.solve(sds.ODE(lambda x, t: a * x), x0, 0.0, 1.0, 32, solver=sds.RK4(), backend="eager")
    sol.x1.float().sum().backward()
    assert x0.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x0.grad.float(), torch.full((3, 2), torch.e**-1), rtol=2**-7, atol=0)
    assert abs(float(a.grad) / (6 * torch.e**-1) - 1) < 2**-6


@pytest.mark.parametrize("dtype", NARROW)
def test_noise_is_refused_with_advice_that_works(dtype):
    process, score = sds.VP(), sds.NetworkScore(network(), sds.VP())
    with pytest.raises(TypeError, match=r"small steps vanishes in 16 bits\. Flows have them.*DDIM\(\); else sample"):
        sds.sample(process, score, (4, 2), steps=2, seed=0, dtype=dtype)
    assert (
        sds.sample(process, score, (4, 2), steps=2, seed=0, dtype=dtype, solver=sds.DDIM(), backend="eager").dtype
        == dtype
    )
    assert (
        sds.sample(process, score, (4, 2), steps=2, seed=0, dtype=dtype, stochasticity=0, backend="eager").dtype
        == dtype
    )
    with torch.autocast("cpu", dtype=dtype):
        assert sds.sample(process, score, (4, 2), steps=2, seed=0, backend="eager").dtype == torch.float32
    with pytest.raises(TypeError, match=r"Brownian increments of small steps vanish in 16 bits; convert it with"):
        sds.solve(SDE, torch.ones(2, 2, dtype=dtype), 0.0, 1.0, 4, solver=sds.EulerMaruyama())
    with pytest.raises(TypeError, match="x0 must be float32 or float64"):
        sds.sample(process, score, x0=torch.ones(2, 2, dtype=dtype), steps=2)
    # A network in 16 bits on a state of float32 stays refused: it is not what a flow in 16 bits asks for.
    with pytest.raises(TypeError, match="the network's weights are"):
        sds.sample(process, sds.NetworkScore(network(dtype), process), (4, 2), steps=2, seed=0, solver=sds.DDIM())
    x0 = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"dtype must be torch\.float32 or torch\.float64"):
        sds.sample(process, score, x0=x0, steps=2, solver=sds.DDIM(), dtype=dtype)
