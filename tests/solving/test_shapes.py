"""How a diffusion meets the state: aligned from the right, and the same for every batch, solver and back end."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds

COLUMNS = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
BATCHES = (1, 2, 3, 4)


def after(g, n, *, noise, backend="eager", state=(3,), solver=None):
    sde = sds.SDE(lambda x, t: 0 * x, g, noise=noise, calculus="stratonovich" if solver else "ito")
    x0 = torch.ones(n, *state, dtype=torch.float64)
    return sds.solve(sde, x0, 0.0, 1.0, 2, solver=solver or sds.EulerMaruyama(), seed=3, backend=backend).x1 - x0


@pytest.mark.uncompiled
@pytest.mark.parametrize("backend", ["auto", "kernel", "eager"])
@pytest.mark.parametrize("n", BATCHES)
def test_one_number_per_column_whatever_the_batch(n, backend):
    """On three rows of three it was one per row."""
    unit = after(lambda x, t: torch.ones_like(x), n, noise="diagonal", backend=backend)
    torch.testing.assert_close(after(lambda x, t: COLUMNS, n, noise="diagonal", backend=backend), unit * COLUMNS)
    rows = torch.linspace(1, 2, n, dtype=torch.float64)[:, None]
    torch.testing.assert_close(after(lambda x, t: rows, n, noise="diagonal", backend=backend), unit * rows)


@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize(
    ("g", "same", "noise", "state"),
    [
        (lambda x, t: COLUMNS, lambda x, t: COLUMNS.expand_as(x), "additive", (3,)),
        (lambda x, t: COLUMNS, lambda x, t: COLUMNS.expand_as(x), "scalar", (3,)),
        (lambda x, t: FACTOR[None], lambda x, t: FACTOR.expand(len(x), 3, 3), "additive", (3,)),
        (lambda x, t: FACTOR[None], lambda x, t: FACTOR.expand(len(x), 3, 3), "general", (3,)),
        (lambda x, t: FACTOR[:, :2][None], lambda x, t: FACTOR[:, :2].expand(len(x), 3, 2), "general", (3,)),
        (lambda x, t: FACTOR[:2, :, None], lambda x, t: FACTOR[:2, :, None].expand_as(x), "diagonal", (2, 3, 3)),
        (lambda x, t: x.mean(1, keepdim=True), lambda x, t: x.mean(1, keepdim=True).expand_as(x), "diagonal", (3,)),
    ],
    ids=["additive", "scalar", "one factor", "one factor, general", "two channels", "an image", "rows"],
)
def test_what_broadcasts_is_what_it_broadcasts_to(g, same, noise, state, n):
    assert torch.equal(after(g, n, noise=noise, state=state), after(same, n, noise=noise, state=state))


@pytest.mark.parametrize("n", BATCHES)
@pytest.mark.parametrize(
    ("g", "noise", "state", "message"),
    [
        (lambda x, t: x.norm(dim=1), "diagonal", (3,), r"shape \({n},\).*\({n}, 1\)"),
        (lambda x, t: x.norm(dim=1), "scalar", (3,), r"shape \({n},\).*\({n}, 1\)"),
        (lambda x, t: 0.1 * x.mean((1, 2)), "diagonal", (2, 3), r"shape \({n},\).*\({n}, 1, 1\)"),
        (lambda x, t: FACTOR, "additive", (3,), r"return g\[None\]"),
        (lambda x, t: FACTOR[:, :1], "additive", (3,), r"return g\[None\]"),
        (lambda x, t: FACTOR, "general", (3,), r"return g\[None\]"),
    ],
    ids=["a number a row", "scalar", "of matrices", "one factor", "one channel", "general"],
)
def test_what_could_be_read_in_two_ways_is_refused_whatever_the_batch(g, noise, state, message, n):
    for backend in ("eager", "auto"):
        with pytest.raises(ValueError, match=message.replace("{n}", str(n))):
            after(g, n, noise=noise, state=state, backend=backend)


def test_the_advice_works():
    """For both readings of a square matrix under additive noise."""
    after(lambda x, t: FACTOR[None], 3, noise="additive")
    unit = after(lambda x, t: torch.ones_like(x), 3, noise="additive")
    torch.testing.assert_close(after(lambda x, t: FACTOR.expand_as(x), 3, noise="additive"), unit * FACTOR)


@pytest.mark.parametrize("n", BATCHES)
def test_other_solvers_and_reversals_read_the_same(n):
    for solver in (sds.Heun(), sds.Milstein()):
        one, other = (
            after(g, n, noise="diagonal", solver=solver) for g in (lambda x, t: COLUMNS, lambda x, t: COLUMNS + 0 * x)
        )
        torch.testing.assert_close(one, other)
    x, t = torch.ones(n, 3, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    forward = sds.SDE(lambda x, t: 0 * x, lambda x, t: COLUMNS, noise="additive")
    torch.testing.assert_close(sds.ProbabilityFlow(forward, lambda x, t: -x).drift(x, t), 0.5 * COLUMNS.square() * x)


@pytest.mark.uncompiled
@pytest.mark.parametrize("n", BATCHES)
def test_a_diffusion_of_a_time_per_row(n):
    """Rows run at times of their own; each ends as it does alone."""
    grid = torch.linspace(0, 1, 5, dtype=torch.float64)[:, None] * torch.linspace(1, 2, n, dtype=torch.float64)
    for g in (lambda x, t: 0.3 * t, lambda x, t: 0.3 * t * x, lambda x, t: t.reshape(-1, 1) * COLUMNS):
        sde, x0 = sds.SDE(lambda x, t: -t * x, g), torch.ones(n, 3, dtype=torch.float64)
        x = sds.solve(sde, x0, grid=grid, solver=sds.EulerMaruyama(), seed=1).x1
        for i in range(n):
            path = sds.BrownianPath(1, first_path=i)
            alone = sds.solve(sde, x0[i : i + 1], grid=grid[:, i], solver=sds.EulerMaruyama(), noise=path).x1
            torch.testing.assert_close(x[i], alone[0])
