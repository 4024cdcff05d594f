"""The law of the normals, on a billion draws and more: moments, the distribution function, tails, independence.

Too long for the test suite: about two minutes on two cores. `SDESOLVE_DRAWS` sets the number of draws. Every statistic
is compared with its expectation in units of its own standard deviation; with some forty of them, five is the limit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scipy import stats
from sdesolve_kernels import Stream, normal
from torch import Tensor

DRAWS = int(float(os.environ.get("SDESOLVE_DRAWS", "1e9")))
CHUNK = 1 << 22
BINS = 4096
SEED = 20240607


def chunks(draws: int) -> Iterator[Tensor]:
    """``(paths, entries)`` blocks of float32 normals: 1024 paths at a time, 4096 entries each."""
    buffer = torch.empty(1024, CHUNK // 1024)
    for k in range(math.ceil(draws / CHUNK)):
        yield normal(1024, CHUNK // 1024, seed=SEED, stream=Stream.DRIVING, first_path=1024 * k, out=buffer)


def double_factorial(n: int) -> int:
    return math.prod(range(n, 0, -2))


@pytest.fixture(scope="module")
def summary() -> dict[str, float]:
    """Each statistic's deviation from its expectation, in standard deviations."""
    n = math.ceil(DRAWS / CHUNK) * CHUNK
    powers = torch.zeros(8, dtype=torch.float64)
    tails = torch.zeros(4, dtype=torch.float64)
    counts = torch.zeros(BINS, dtype=torch.float64)
    products = dict.fromkeys(("next entry", "twin", "entry 4 on", "next path", "square, next entry"), 0.0)
    pairs = dict.fromkeys(products, 0)
    for z in chunks(DRAWS):
        x = z.double()
        p = torch.ones_like(x)
        for k in range(8):
            p *= x
            powers[k] += p.sum()
        for k, limit in enumerate((3.0, 4.0, 5.0, 6.0)):
            tails[k] += int((z.abs() > limit).sum())
        # Bins by the distribution function itself; its float32 rounding moves far less than the counts' own noise.
        u = torch.special.ndtr(x)
        counts += torch.histc(u, BINS, 0.0, 1.0)
        for name, (a, b) in {
            "next entry": (x[:, :-1], x[:, 1:]),
            "twin": (x[:, 0::2], x[:, 1::2]),
            "entry 4 on": (x[:, :-4], x[:, 4:]),
            "next path": (x[:-1], x[1:]),
        }.items():
            products[name] += float((a * b).sum())
            pairs[name] += a.numel()
        squares = (x[:, 0::2].square() - 1.0) * (x[:, 1::2].square() - 1.0) / 2.0
        products["square, next entry"] += float(squares.sum())
        pairs["square, next entry"] += squares.numel()
    found: dict[str, float] = {"draws": n}
    for k in range(1, 9):
        mean = double_factorial(k - 1) if k % 2 == 0 else 0
        variance = double_factorial(2 * k - 1) - mean**2
        found[f"moment {k}"] = (float(powers[k - 1]) / n - mean) / math.sqrt(variance / n)
    for limit, count in zip((3, 4, 5, 6), tails.tolist(), strict=True):
        expected = 2 * stats.norm.sf(limit) * n
        found[f"beyond {limit} sigma: draws"] = count
        found[f"beyond {limit} sigma: expected"] = expected
        found[f"beyond {limit} sigma"] = (count - expected) / math.sqrt(expected)
    chi2 = float(((counts - n / BINS) ** 2).sum() / (n / BINS))
    found["chi-squared over 4096 bins"] = (chi2 - (BINS - 1)) / math.sqrt(2 * (BINS - 1))
    deviation = float((counts.cumsum(0) / n - torch.arange(1, BINS + 1, dtype=torch.float64) / BINS).abs().max())
    found["Kolmogorov-Smirnov: sqrt(n) D"] = deviation * math.sqrt(n)
    found["Kolmogorov-Smirnov: p"] = float(stats.kstwobign.sf(deviation * math.sqrt(n)))
    for name, total in products.items():
        found[f"correlation, {name}"] = total / math.sqrt(pairs[name])
    return found


@pytest.fixture(scope="module", autouse=True)
def written(summary: dict[str, float]) -> None:
    for name, value in summary.items():
        print(f"{name:36s} {value:14.6g}")
    folder = os.environ.get("SDESOLVE_RESULTS")
    if folder:
        Path(folder, "noise_quality.json").write_text(json.dumps(summary, indent=1) + "\n")


@pytest.mark.parametrize("order", range(1, 9))
def test_moments(summary, order):
    assert abs(summary[f"moment {order}"]) < 5


@pytest.mark.parametrize("limit", [3, 4, 5, 6])
def test_tails(summary, limit):
    """Poisson counts: with few expected, five standard deviations and two draws more."""
    expected = summary[f"beyond {limit} sigma: expected"]
    assert abs(summary[f"beyond {limit} sigma: draws"] - expected) < 5 * math.sqrt(expected) + 2


def test_distribution_function(summary):
    assert abs(summary["chi-squared over 4096 bins"]) < 5
    assert summary["Kolmogorov-Smirnov: p"] > 1e-6


@pytest.mark.parametrize("pair", ["next entry", "twin", "entry 4 on", "next path", "square, next entry"])
def test_independence(summary, pair):
    assert abs(summary[f"correlation, {pair}"]) < 5


@pytest.mark.parametrize("other", [Stream.INITIAL, Stream.BRIDGE, Stream.CORRECTOR, Stream.PERTURBATION])
def test_streams_and_seeds_are_independent(other):
    n = 1 << 22
    a = normal(64, n // 64, seed=SEED, dtype=torch.float64)
    for b in (
        normal(64, n // 64, seed=SEED, stream=other, dtype=torch.float64),
        normal(64, n // 64, seed=SEED + 1, dtype=torch.float64),
        normal(64, n // 64, seed=SEED + (1 << 32), dtype=torch.float64),
    ):
        assert abs(float((a * b).sum())) / math.sqrt(n) < 5
        assert abs(float(((a * a - 1) * (b * b - 1)).sum())) / (2 * math.sqrt(n)) < 5
