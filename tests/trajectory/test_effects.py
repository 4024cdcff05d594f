"""Functions that do more than compute: draw random numbers, change what they hold, count, write in place."""

from __future__ import annotations

import functools
import itertools
import random

import numpy as np
import pytest
import torch

import sdesolve as sds

X0 = torch.linspace(-2.0, 2.0, 36, dtype=torch.float64).reshape(12, 3)


def diffusion(x, t):
    return 0.1 * torch.ones_like(x)


def solve(f, backend, x0=X0, solver=None, **options):
    sde = f if isinstance(f, sds.SDE | sds.ODE) else sds.SDE(f, diffusion)
    return sds.solve(sde, x0, 0.0, 1.0, 3, solver=solver or sds.EulerMaruyama(), seed=1, backend=backend, **options)


DRAWING = {
    "torch": lambda x, t: x + torch.randn_like(x),
    "torch, of a constant shape": lambda x, t: x + torch.randn(3),
    "generator": lambda x, t, g=torch.Generator().manual_seed(1): x + torch.randn(3, generator=g),  # noqa: B008
    "numpy": lambda x, t: x * (1.0 if np.random.rand() < 2 else 2.0),  # noqa: NPY002
    "numpy's new": lambda x, t, g=np.random.default_rng(0): x * (1.0 if g.random() < 2 else 2.0),  # noqa: B008
    "numpy, seeded each time": lambda x, t: (np.random.seed(5), x * np.random.rand())[1],  # noqa: NPY002
    "python": lambda x, t: x * (1.0 if random.random() < 2 else 2.0),
    "python, own": lambda x, t, g=random.Random(0): x * (1.0 if g.random() < 2 else 2.0),  # noqa: B008
    "dropout": lambda x, t, layer=torch.nn.Dropout(0.5): layer(x),  # noqa: B008
    "rrelu": lambda x, t: torch.nn.functional.rrelu(x, training=True),
    "multinomial": lambda x, t: x * torch.multinomial(x.softmax(1), 1),
}


@pytest.mark.parametrize("f", list(DRAWING.values()), ids=list(DRAWING))
def test_random_numbers_in_functions(f, interpreted):
    with pytest.raises(ValueError, match=r"random numbers|changes Python values"):
        solve(f, "fused")
    assert solve(f, "auto").stats.backend != "fused"


@pytest.mark.filterwarnings("ignore:the functions of this equation hold a BatchNorm1d in training mode")
def test_dropout_in_evaluation_and_buffers_are_fine(both, difference, interpreted):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).double().eval()
    net[1].running_mean.add_(0.5)
    net[1].running_var.mul_(2.0)
    with torch.no_grad():
        for _ in range(2):
            fused, eager = both(sds.SDE(lambda x, t: net(x), diffusion), X0)
            assert difference(fused.x1, eager.x1) < 1e-13
            net[1].running_mean.add_(1.0)
    assert interpreted.made == 1
    net.train()
    with torch.no_grad(), pytest.raises(ValueError, match="cannot be fused"):
        solve(lambda x, t: net(x), "fused")


COUNTER, SEEN = itertools.count(), []


def counting(x, t):
    next(COUNTER)
    return -x


class Counting:
    calls = 0

    def __call__(self, x, t):
        self.calls += 1
        return -x * self.calls


def remembering(x, t):
    SEEN.append(1)
    return -x * len(SEEN)


def test_side_effects_are_noticed(interpreted):
    for f in (Counting(), remembering):
        with pytest.raises(ValueError, match=r"changes Python values|not treated alike"):
            solve(f, "fused")
        assert solve(f, "auto").stats.backend != "fused"


def changes_x(x, t):
    x += 1
    return x


def changes_part_of_x(x, t):
    x[:, 0] = 0
    return x


def changes_what_it_holds(x, t, held=torch.zeros(3, dtype=torch.float64)):  # noqa: B008
    held += 1
    return x * held


def changes_time(x, t):
    t.mul_(2)
    return x * t


def test_in_place_changes_of_inputs_are_refused_and_of_temporaries_kept(both, difference, interpreted):
    for f in (changes_x, changes_part_of_x, changes_what_it_holds, changes_time):
        with pytest.raises(ValueError, match="in place"):
            solve(f, "fused")

    def own(x, t):
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 1]
        y[:, 1:] += x[:, :2] * t
        z = y.T
        z[2] -= 1
        y.clamp_(-1, 1)[:, 1].mul_(0.5)
        w = x.clone()
        w[:, [0, 2]] = y[:, :2]
        w[:, torch.tensor([False, True, False])] *= 2
        return w.sub_(y, alpha=0.5)

    fused, eager = both(sds.SDE(own, diffusion), X0)
    assert difference(fused.x1, eager.x1) < 1e-14


def copied(x, t):
    y = x * 2
    y.T.contiguous().zero_()
    return y


def aliased(x, t):
    y = x * 2
    (+y).mul_(2)
    return y


def test_inference_mode_shows_operations_that_are_taken_apart_elsewhere(difference, interpreted):
    for f in (copied, aliased):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert difference(solve(f, "auto").x1, solve(f, "eager").x1) < 1e-14


def test_what_a_function_keeps_of_its_first_call(difference, interpreted):
    """A table made when it is needed is an ordinary one afterwards, and other traces make nothing else of it."""
    weights = torch.linspace(0.5, 2.0, 9, dtype=torch.float64).reshape(3, 3)
    for make in (lambda: torch.arange(3, dtype=torch.float64), lambda: weights @ weights.T, lambda: weights[0]):
        for kept in ({}, functools.lru_cache(make)):

            def f(x, t, kept=kept, make=make):
                if callable(kept):
                    return -(x * kept() if kept().ndim == 1 else x @ kept())
                if "table" not in kept:
                    kept["table"] = make()
                return -(x * kept["table"] if kept["table"].ndim == 1 else x @ kept["table"])

            results = [solve(f, backend) for backend in ("auto", "eager", "auto")]
            assert difference(results[0].x1, results[1].x1) < 1e-14
            assert difference(results[2].x1, results[1].x1) < 1e-14
            table = kept() if callable(kept) else kept["table"]
            assert type(table) is torch.Tensor
            assert torch.equal(table, make())


def test_sparse_tensors_are_refused(interpreted):
    def f(x, t, sparse=torch.eye(3, dtype=torch.float64).to_sparse()):  # noqa: B008
        return (sparse @ x.T).T

    with pytest.raises(ValueError, match="sparse"):
        solve(f, "fused")
    torch.testing.assert_close(solve(f, "auto").x1, solve(f, "eager").x1)
