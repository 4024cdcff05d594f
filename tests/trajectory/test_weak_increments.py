"""Two- and three-point increments: their laws, the same numbers on every path of execution, and weak order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds

F64 = torch.float64
KINDS = {"two-point": [(-1.0, 0.5), (1.0, 0.5)], "three-point": [(-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6)]}


def numbers(kind: str, batch: int, steps: int, **place: int) -> torch.Tensor:
    """``(steps, batch)`` numbers of unit variance."""
    times = torch.arange(steps + 1, dtype=F64)
    return sds.BrownianPath(5, kind=kind, **place).increments(times, (batch, 1), dtype=F64)[..., 0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_law_of_the_numbers(kind):
    n = 400_000
    z = numbers(kind, n // 400, 400).flatten()
    values, counts = z.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([v for v, _ in KINDS[kind]], dtype=F64))
    for count, (_, p) in zip(counts.tolist(), KINDS[kind], strict=True):
        assert abs(count - n * p) < 4 * math.sqrt(n * p * (1 - p))
    assert sum(v * p for v, p in KINDS[kind]) == pytest.approx(0.0)
    assert sum(v**2 * p for v, p in KINDS[kind]) == pytest.approx(1.0)
    assert sum(v**4 * p for v, p in KINDS[kind]) == pytest.approx(1.0 if kind == "two-point" else 3.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_way_of_running_takes_the_same_numbers(kind, channels):
    sde = sds.SDE(lambda x, t: torch.zeros_like(x), lambda x, t: torch.ones_like(x))
    x0, grid = torch.zeros(133, channels, dtype=F64), torch.arange(132, dtype=F64)
    # an odd first step, so that neither words nor blocks of the generator begin with the run
    noise = sds.BrownianPath(5, first_path=9, first_step=27, kind=kind)
    options = {"solver": sds.EulerMaruyama(), "save_at": "grid"}
    fused, eager = (sds.solve(sde, x0, grid=grid, noise=noise, backend=b, **options).xs for b in ("fused", "eager"))
    torch.testing.assert_close(fused, eager, rtol=0, atol=1e-11)
    z = numbers(kind, 142, 131 * channels + 27 * channels)[27 * channels :, 9:]
    torch.testing.assert_close(fused.diff(dim=0)[:, :, 0], z[::channels], rtol=0, atol=1e-11)
    rest = sds.solve(sde, fused[61], grid=grid[61:], noise=noise.after(61), backend="fused", **options).xs
    assert torch.equal(rest, fused[61:])


@pytest.mark.parametrize("kind", KINDS)
def test_weak_order_one_of_the_second_moment(kind):
    """Over all paths of ``n`` steps, each with its probability: no Monte Carlo.

    For ``dX = a X dt + b X dW`` the second moment of Euler-Maruyama is ``((1 + a h)^2 + b^2 h)^n`` with these numbers
    as with normals; the fourth differs between them.
    """
    a, b, n = -0.6, 0.8, 4
    h = 1.0 / n
    moment = 0.0
    for path in itertools.product(KINDS[kind], repeat=n):
        x = 1.0
        for z, _ in path:
            x *= 1 + a * h + b * math.sqrt(h) * z
        moment += x**2 * math.prod(p for _, p in path)
    assert moment == pytest.approx(((1 + a * h) ** 2 + b * b * h) ** n, rel=1e-12)
    sde = sds.SDE(lambda x, t: a * x, lambda x, t: b * x)
    batch = 200_000
    sol = sds.solve(
        sde, torch.ones(batch, 1, dtype=F64), 0.0, 1.0, n, solver=sds.EulerMaruyama(), seed=1, increments=kind,
        backend="fused", observable=torch.square, reduce="moments",
    )  # fmt: skip
    assert abs(float(sol.mean) - moment) < 4 * math.sqrt(float(sol.variance) / batch)
    truth = math.exp(2 * a + b * b)
    errors = [((1 + a / m) ** 2 + b * b / m) ** m - truth for m in (32, 64)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_what_weak_increments_cannot_do():
    path = sds.BrownianPath(0, kind="two-point")
    with pytest.raises(ValueError, match="two-point increments are no Brownian path"):
        path.bridge(0, 0.5, (3, 1))
    with pytest.raises(ValueError, match="increments must be one of"):
        sds.BrownianPath(0, kind="four-point")
    sde = sds.SDE(lambda x, t: x, lambda x, t: x)
    with pytest.raises(ValueError, match="increments is short for"):
        sds.solve(sde, torch.ones(1, 1), 0.0, 1.0, 4, solver=sds.EulerMaruyama(), noise=path, increments="two-point")
