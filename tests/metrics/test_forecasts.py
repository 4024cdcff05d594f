"""Scores of ensemble forecasts, against closed forms and their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from sdesolve.metrics import crps, energy_score, rank_histogram, spread_skill


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fair", [True, False])
def test_crps_and_energy_score_are_their_definitions(fair):
    x, y = normals(5, 3, 2), normals(3, 2, seed=1)
    pairs = (x[:, None] - x[None]).abs().sum((0, 1)) / (5 * (4 if fair else 5))
    torch.testing.assert_close(crps(x, y, fair=fair), (x - y).abs().mean(0) - 0.5 * pairs)
    norms = (x[:, None] - x[None]).norm(dim=3).sum((0, 1)) / (5 * (4 if fair else 5))
    torch.testing.assert_close(energy_score(x, y, fair=fair), (x - y).norm(dim=2).mean(0) - 0.5 * norms)
    torch.testing.assert_close(energy_score(x[..., :1], y[..., :1], fair=fair), crps(x, y, fair=fair)[:, 0])
    if not fair:
        torch.testing.assert_close(crps(x[:1], y, fair=False), (x[0] - y).abs())


def test_the_fair_score_has_the_expectation_of_the_law():
    n, m = 4000, 4
    scores = crps(normals(m, n), normals(n, seed=1))
    exact = 1.0 / math.sqrt(math.pi)  # of N(0, 1) judged by draws of itself
    assert abs(float(scores.mean()) - exact) < 4 * float(scores.std()) / math.sqrt(n)


def test_reliable_forecasts_have_flat_ranks_and_as_much_spread_as_error():
    n, m = 20_000, 9
    y, x = normals(n, seed=1), normals(m, n)
    counts = rank_histogram(x, y)
    assert counts.shape == (m + 1,)
    assert int(counts.sum()) == n
    assert (counts - n / (m + 1)).abs().max() < 4.5 * math.sqrt(n * 0.1 * 0.9)
    assert abs(spread_skill(x, y) - 1.0) < 4 / math.sqrt(n)
    assert abs(spread_skill(0.5 * x, y) - 0.5 * math.sqrt((1 + 1 / m) / (1 + 0.25 / m))) < 0.02
    narrow = rank_histogram(0.3 * x, y)
    assert narrow[0] > 3 * narrow[m // 2]
    tied = rank_histogram(torch.zeros(m, n), torch.zeros(n))
    assert (tied - n / (m + 1)).abs().max() < 4.5 * math.sqrt(n * 0.1 * 0.9)


def test_bad_forecasts_are_named():
    x, y = normals(3, 4), normals(4)
    for wrong, error, message in (
        ((x, y[:3]), ValueError, r"got \(3, 4\) and \(3,\)"),
        ((x[:1], y), ValueError, "at least 2 member"),
        ((x.long(), y), TypeError, "members must be a floating-point tensor, got torch.int64"),
        ((x, [1.0]), TypeError, "y must be a floating-point tensor, got list"),
        ((x / 0, y), ValueError, "members must be finite"),
    ):
        with pytest.raises(error, match=message):
            crps(*wrong)
