"""What making a kernel may cost before anybody knows that it pays."""

import pytest
import torch

import sdesolve as sds
from sdesolve.integrate import fused

X0 = torch.linspace(-1.0, 1.0, 20).reshape(10, 2)


def long_chain(x, t):
    for i in range(400):
        x = torch.sin(x + 0.1 * i)
    return x


def solve(backend):
    return sds.solve(sds.ODE(long_chain), X0, 0.0, 1.0, 3, solver=sds.EulerMaruyama(), backend=backend)


def test_auto_does_not_compile_what_takes_long(monkeypatch):
    """By an estimate, so that nothing is compiled here; a call that insists is not bound by it."""
    made = []
    plain = fused.compile_trajectory

    def compiled(program, kinds, seconds):
        made.append(seconds)
        return plain(program, kinds, min(seconds, 10.0))

    monkeypatch.setattr(fused, "compile_trajectory", compiled)
    for _ in range(2):
        auto = solve("auto")
        assert auto.stats.execution == "eager"
        assert "would take about" in auto.stats.reason
    assert len(made) == 1  # the second call knows
    assert torch.equal(auto.x1, solve("eager").x1)
    with pytest.raises(ValueError, match="would take about"):
        solve("fused")
    assert made[1] == float("inf")
