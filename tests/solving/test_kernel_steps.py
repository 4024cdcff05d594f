"""Step kernels inside `solve` and `sample`: the solver's own step, to rounding, and no waiting for the device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import use_backend
from torch.utils._python_dispatch import TorchDispatchMode

import sdesolve as sds
from sdesolve.integrate.cuda_graph import StraightSampler

DATA = sds.Gaussian(torch.tensor([0.5, -0.5, 0.0]), torch.tensor([1.0, 0.3, 2.0]))
PROCESSES = [sds.VP(), sds.VP(sds.CosineBeta()), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM()]
EQUATIONS = {
    "diagonal": sds.SDE(lambda x, t: 1.0 - x, lambda x, t: 0.2 * x),
    "stored constant": sds.SDE(lambda x, t: -x * t, lambda x, t: 0.3, noise="additive"),
    "per sample": sds.SDE(
        lambda x, t: -x, lambda x, t: x.detach().abs().sum(1, keepdim=True) * 0 + 0.5, noise="additive"
    ),
    "broadcast": sds.SDE(lambda x, t: -x, lambda x, t: 0.1 + x[:, :1] ** 2 / 10),
}
EM = sds.EulerMaruyama()


class NoReads(TorchDispatchMode):
    """Fails where a tensor's value would have to come to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EQUATIONS)
@given(seed=st.integers(0, 2**64 - 1), steps=st.integers(1, 20), backwards=st.booleans())
@settings(max_examples=10)
def test_euler_maruyama_by_kernel_is_its_own_step(name, dtype, seed, steps, backwards):
    x0 = torch.linspace(0.5, 1.5, 12, dtype=dtype).reshape(4, 3)
    t0, t1 = (1.0, 0.0) if backwards else (0.0, 1.0)
    a = sds.solve(EQUATIONS[name], x0, t0, t1, steps, solver=EM, seed=seed, backend="kernel")
    b = sds.solve(EQUATIONS[name], x0, t0, t1, steps, solver=EM, seed=seed, backend="eager")
    assert (a.stats.backend, b.stats.backend) == ("kernel", "eager")
    assert "euler_maruyama_step" in a.stats.reason
    # each step rounds a few times; the normals of both agree to 4e-7 relative in float32, 6e-15 in float64
    torch.testing.assert_close(a.x1, b.x1, rtol=0, atol=steps * (4e-6 if dtype == torch.float32 else 4e-14))


@pytest.mark.parametrize("stochasticity", [0.0, 1.0, 1.3])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_reverse_equations_by_table_are_the_solvers_own_steps(process, stochasticity):
    score = DATA.score(process)
    sde = process.reverse(score, stochasticity) if stochasticity else process.probability_flow(score)
    x0 = process.sample_prior((50, 3), seed=1, dtype=torch.float64)
    grid = process.time_grid(30)
    a = sds.solve(sde, x0, grid=grid, solver=EM, seed=0, backend="kernel")
    b = sds.solve(sde, x0, grid=grid, solver=EM, seed=0, backend="eager")
    assert "linear_step" in a.stats.reason
    assert a.stats.nfe == b.stats.nfe == 30
    torch.testing.assert_close(a.x1, b.x1, rtol=1e-10, atol=1e-11 * process.prior.std)


@pytest.mark.parametrize("path", [sds.BrownianPath(0, substeps=3), sds.BrownianPath(0, kind="two-point")], ids=repr)
def test_an_equation_without_noise_runs_by_kernel_whatever_the_path(path):
    flow, x0, grid = sds.VP().probability_flow(DATA.score(sds.VP())), torch.ones(4, 3), sds.VP().time_grid(5)
    options = {"grid": grid, "solver": sds.DDIM(), "backend": "kernel"}
    assert torch.equal(sds.solve(flow, x0, noise=path, **options).x1, sds.solve(flow, x0, seed=0, **options).x1)


def test_a_table_with_a_time_per_sample():
    process = sds.VP()
    sde = process.reverse(DATA.score(process))
    x0 = process.sample_prior((4, 3), seed=1, dtype=torch.float64)
    t0 = torch.tensor([1.0, 0.9, 0.5, 0.2], dtype=torch.float64)
    options = {"solver": EM, "seed": 0}
    a = sds.solve(sde, x0, t0, 0.01, 20, **options)
    b = sds.solve(sde, x0, t0, 0.01, 20, backend="eager", **options)
    assert a.stats.backend == "kernel"
    torch.testing.assert_close(a.x1, b.x1, rtol=1e-11, atol=1e-12)


@pytest.mark.uncompiled
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_matrix_of_any_shape_is_not_taken_for_elementwise_noise(channels):
    """With as many channels as components the increment has the state's shape, and still mixes components."""
    G = torch.linspace(-1, 1, 3 * channels, dtype=torch.float64).reshape(3, channels)
    forward = sds.SDE(lambda x, t: -x, lambda x, t: G.expand(len(x), 3, channels), noise="additive")
    x0 = torch.ones(5, 3, dtype=torch.float64)
    dW = sds.BrownianPath(0).increments(torch.tensor([0.0, 0.5]), (5, channels), dtype=torch.float64)[0]
    sol = sds.solve(forward, x0, 0.0, 0.5, 1, solver=EM, seed=0)
    torch.testing.assert_close(sol.x1, 0.5 * x0 + dW @ G.T, rtol=1e-12, atol=1e-12)
    reverse = sds.ReverseSDE(forward, lambda x, t: -x)
    back = sds.solve(reverse, x0, 0.5, 0.0, 1, solver=EM, seed=0).x1
    torch.testing.assert_close(back, x0 - 0.5 * (-x0 + x0 @ (G @ G.T)) + dW @ G.T, rtol=1e-12, atol=1e-12)


def test_what_no_kernel_covers_runs_in_torch_and_says_why():
    x0 = torch.ones(4, 3)
    noise = sds.BrownianPath(0, substeps=2)
    with pytest.raises(ValueError, match="coarse or weak increments"):
        sds.solve(EQUATIONS["diagonal"], x0, 0.0, 1.0, 4, solver=EM, noise=noise, backend="kernel")
    asked = sds.solve(EQUATIONS["diagonal"], x0, 0.0, 1.0, 4, solver=EM, seed=0, backend="eager")
    assert asked.stats.reason == "requested"
    with pytest.raises(ValueError, match="no kernel does Milstein on diagonal noise"):
        sds.solve(EQUATIONS["diagonal"], x0, 0.0, 1.0, 4, solver=sds.Milstein(), seed=0, backend="kernel")


def test_the_reference_backend_is_the_oracle_of_all_of_it():
    process = sds.VP()
    score = DATA.score(process)
    fast = sds.sample(process, score, (20, 3), steps=20, seed=0)
    with use_backend("reference"):
        slow = sds.sample(process, score, (20, 3), steps=20, seed=0)
    assert not torch.equal(fast, slow)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
def test_the_straight_sampler_draws_what_sample_draws_and_never_waits(process, denoise, stochasticity):
    score = DATA.score(process)
    backward = process.reverse(score) if stochasticity else process.probability_flow(score)
    kind = {"denoise": denoise, "dtype": torch.float64}
    times = process.time_grid(12)
    sampler = StraightSampler(process, score, backward, EM, times, (8, 3), device=torch.device("cpu"), **kind)
    with NoReads():
        x = sampler(seed=5, first_path=2)
    noise = sds.BrownianPath(5, first_path=2)
    y = sds.sample(process, score, (8, 3), grid=times, noise=noise, stochasticity=stochasticity, **kind)
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    again = sampler(torch.tensor(5), torch.tensor(2))  # as the captured graph passes them
    assert torch.equal(x, again)


def test_solve_waits_a_fixed_number_of_times_whatever_the_steps():
    """Once for the start, once for the first step (on the host only), once for the end."""
    process = sds.VP()
    sde = process.reverse(DATA.score(process))
    x0 = process.sample_prior((8, 3), seed=1)

    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.reads += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    counts = []
    for steps in (10, 40):
        Count.reads = 0
        with Count():
            sds.solve(sde, x0, grid=process.time_grid(steps).clone(), solver=EM, seed=0)
        counts.append(Count.reads)
    assert counts[0] == counts[1]


def test_a_captured_sampler_needs_a_cuda_device():
    process = sds.VP()
    with pytest.raises(ValueError, match="cuda_graph=True needs device='cuda', got 'cpu'"):
        sds.sample(process, DATA.score(process), (4, 3), steps=4, seed=0, cuda_graph=True)
    with pytest.raises(ValueError, match=r"Heun on ReverseSDE is not; use EulerMaruyama\(\)"):
        sds.sample(process, DATA.score(process), (4, 3), steps=4, seed=0, cuda_graph=True, solver=sds.Heun())


@pytest.mark.gpu
def test_a_captured_sampler_replays_with_new_seeds(device):
    process = sds.VP()
    net = sds.nn.MLP((3,), width=64).to(device)
    score = sds.NetworkScore(net, process)
    options = {"steps": 20, "device": device, "shape": (64, 3)}

    def draw(seed, **more):
        return sds.sample(process, score, options["shape"], steps=20, device=device, seed=seed, **more)

    for seed in (0, 1, 2**63 + 5):
        torch.testing.assert_close(draw(seed, cuda_graph=True), draw(seed), rtol=1e-4, atol=1e-4)
    assert math.isfinite(float(draw(3, cuda_graph=True).sum()))
