"""The README's first example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

import sdesolve as sds

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example_runs_verbatim(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 12, "the opening example is meant to be read at a glance"
    scope: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), scope)
    printed = [float(number) for number in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    assert isinstance(scope["x"], torch.Tensor)
    # Chance in the modes' shares moves a mass of sqrt(2) / (2 sqrt(4096)) = 0.011 (one sd) over the 4.1 between them:
    # at 4 sd a distance of 0.044 * 4.1 * 0.64 (the mean length of a projection) = 0.12, for true samples too.
    assert len(printed) == 3
    assert all(0 < number < 0.12 for number in printed)


def test_the_fused_example_prices_a_call(capsys):
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "heston" in c)
    scope: dict[str, object] = {"torch": torch, "sds": sds}
    exec(compile(code, str(README), "exec"), scope)
    price, error = (float(number) for number in re.findall(r"\d+\.\d+(?:e-\d+)?", capsys.readouterr().out))
    assert scope["call"].stats.backend == "fused"
    # Heston's formula, by quadrature of his characteristic function; Euler-Maruyama at 250 steps adds 3e-4 at most
    assert abs(price - heston_call()) < 4 * error + 3e-4


def heston_call(strike=1.0, v0=0.04, kappa=2.0, theta=0.04, xi=0.3, rho=-0.7, r=0.02):
    """Undiscounted price of a call of maturity 1 on a start of 1 (Heston 1993; form of Albrecher et al. 2007)."""

    def characteristic(u):
        b = kappa - rho * xi * 1j * u
        d = (b * b + xi * xi * (1j * u + u * u)) ** 0.5
        g = (b - d) / (b + d)
        decay = np.exp(-d)
        C = r * 1j * u + kappa * theta / xi**2 * (b - d - 2 * np.log((1 - g * decay) / (1 - g)))
        return np.exp(C + v0 * (b - d) / xi**2 * (1 - decay) / (1 - g * decay))

    u = np.linspace(1e-6, 200, 400_001)
    forward, log_strike = characteristic(-1j).real, np.log(strike)
    kernel = np.exp(-1j * u * log_strike) / (1j * u)
    p1 = 0.5 + np.trapezoid((kernel * characteristic(u - 1j) / forward).real, u) / np.pi
    p2 = 0.5 + np.trapezoid((kernel * characteristic(u)).real, u) / np.pi
    return forward * p1 - strike * p2


def test_links_lead_somewhere():
    root = README.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text()):
        assert (root / target).exists(), target
