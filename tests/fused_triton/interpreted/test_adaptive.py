"""Adaptive Triton kernels, interpreted, against eager steps on the same noise."""

from __future__ import annotations

import pytest
import torch
from sdesolve_kernels import register_backend, use_backend
from sdesolve_kernels._triton.backend import TritonBackend

import sdesolve as sds


class AdaptiveOnTheHost(TritonBackend):
    """The interpreter runs on tensors in host memory."""

    name = "adaptive triton on the host"
    devices = frozenset({"cpu"})
    priority = -1


register_backend(AdaptiveOnTheHost(), replace=True)


def both(equation, x0, solver, **options):
    with use_backend(AdaptiveOnTheHost.name):
        ours = sds.solve(equation, x0, 0.3, 1.0, solver=solver, backend="fused", **options)
    assert ours.stats.execution == "fused"
    assert "triton" in ours.stats.source
    return ours, sds.solve(equation, x0, 0.3, 1.0, solver=solver, backend="eager", **options)


@pytest.mark.parametrize("scheme", [sds.SPaRK(), sds.Midpoint()], ids=["estimate", "two half steps"])
def test_nested_steps(scheme):
    rates = torch.linspace(0.5, 1.5, 5)[:, None]
    sde = sds.SDE(lambda x, t: rates * (x - x**3) + t, lambda x, t: 0.4 * (1 + t) * x.cos(), "diagonal", "stratonovich")
    x0 = torch.linspace(-1, 1, 10).reshape(5, 2)
    solver = sds.Adaptive(scheme, 6e-2, 1e-2, first_steps=2)
    ours, eager = both(
        sde, x0, solver, save_at=[0.4, 0.65, 1.0], noise=sds.BrownianPath(2**40 + 3, first_path=2**32 - 9)
    )
    torch.testing.assert_close(ours.xs, eager.xs, rtol=0, atol=1e-4)
    assert torch.equal(ours.stats.accepted, eager.stats.accepted)
    assert torch.equal(ours.stats.rejected, eager.stats.rejected)
    assert len(set(eager.stats.accepted.tolist())) > 2


def test_steps_of_any_length_and_limits():
    ode = sds.ODE(lambda x, t: torch.stack([x[:, 1], 3 * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0] + t], 1))
    x0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, eager = both(ode, x0, sds.DormandPrince(1e-4, 1e-4), save_at=[0.5, 1.0])
    torch.testing.assert_close(ours.xs, eager.xs, rtol=0, atol=1e-5)  # first steps differ where time matters
    assert torch.equal(ours.stats.accepted, eager.stats.accepted)
    with use_backend(AdaptiveOnTheHost.name), pytest.raises(sds.StepLimitError, match="max_steps=3") as caught:
        sds.solve(ode, x0, 0.3, 1.0, solver=sds.DormandPrince(1e-6, 1e-6, max_steps=3), backend="fused")
    assert (caught.value.reached.accepted + caught.value.reached.rejected).max() == 3
    fast = sds.ODE(lambda x, t: 100 * torch.sin(314 * (t - 86400)) - x)
    with use_backend(AdaptiveOnTheHost.name), pytest.raises(ValueError, match=r"fused.*float32, which holds t = 864"):
        sds.solve(fast, x0.float(), 86400.0, 86400.5, solver=sds.DormandPrince(), backend="fused")
