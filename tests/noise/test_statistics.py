"""The law of the numbers. Thresholds are five standard deviations of each statistic at its sample size, seeds fixed."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import sdesolve_kernels as k
import torch
from torch import Tensor

SIGMAS = 5.0  # two-sided 6e-7 for one statistic; about 200 are looked at here
SHAPES = [(1, 2**21), (2**21, 1), (2**17, 16)]


def correlation(x: Tensor, y: Tensor) -> float:
    """In standard deviations, for independent standard normals or other standardised variables."""
    return float((x * y).mean() * math.sqrt(x.numel()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    z = k.normal(*shape, seed=12, stream=3, dtype=dtype).double().ravel()
    n = z.numel()
    assert abs(z.mean()) < SIGMAS * math.sqrt(1 / n)
    assert abs(z.square().mean() - 1) < SIGMAS * math.sqrt(2 / n)
    assert abs(z.pow(3).mean()) < SIGMAS * math.sqrt(15 / n)
    assert abs(z.pow(4).mean() - 3) < SIGMAS * math.sqrt(96 / n)
    assert abs(z.pow(6).mean() - 15) < SIGMAS * math.sqrt((10395 - 225) / n)


@pytest.mark.parametrize("shape", SHAPES)
def test_kolmogorov_smirnov_and_tails(shape: tuple[int, int]) -> None:
    z = k.normal(*shape, seed=13).double().ravel()
    sample = z[: 2**19].sort().values
    n = sample.numel()
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    cdf = torch.special.ndtr(sample)
    distance = torch.maximum((cdf - ranks[:-1]).max(), (ranks[1:] - cdf).max())
    assert distance < math.sqrt(math.log(2 / 6e-7) / (2 * n))  # the inequality of Dvoretzky, Kiefer and Wolfowitz
    for threshold in (1.0, 2.0, 3.0, 4.0, 4.5):
        p = 2 * scipy.stats.norm.sf(threshold)
        low, high = scipy.stats.binom.ppf([3e-7, 1 - 3e-7], z.numel(), p)
        assert low <= int((z.abs() > threshold).sum()) <= high


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64])
def test_steps_and_paths_are_independent(lag: int) -> None:
    """Values and squares: Box-Muller partners share a radius, so dependence between them would show in squares."""
    z = k.normal(1100, 1100, seed=14, dtype=torch.float64)
    energy = (z.square() - 1) / math.sqrt(2)
    for x in (z, energy):
        assert abs(correlation(x[:, lag:], x[:, :-lag])) < SIGMAS
        assert abs(correlation(x[lag:], x[:-lag])) < SIGMAS
    assert abs(correlation(z[:, lag:], energy[:, :-lag])) < SIGMAS


def test_the_four_entries_of_a_block_are_independent() -> None:
    z = k.normal(1, 4 * 2**19, seed=15, dtype=torch.float64).reshape(-1, 4)
    energy = (z.square() - 1) / math.sqrt(2)
    for i in range(4):
        for j in range(i):
            assert abs(correlation(z[:, i], z[:, j])) < SIGMAS
            assert abs(correlation(energy[:, i], energy[:, j])) < SIGMAS
            assert abs(correlation(z[:, i], energy[:, j])) < SIGMAS
            # The angle between two of them is uniform: its chi-squared over 64 sectors.
            sector = ((torch.atan2(z[:, i], z[:, j]) / (2 * math.pi) + 0.5) * 64).long().clamp(0, 63)
            counts = torch.bincount(sector, minlength=64).double()
            expected = z.shape[0] / 64
            assert scipy.stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 63) > 6e-7


def test_streams_and_seeds_are_independent() -> None:
    draws = [k.normal(64, 4096, seed=16, stream=stream, dtype=torch.float64) for stream in k.Stream]
    draws += [k.normal(64, 4096, seed=16 + change, dtype=torch.float64) for change in (1, 2**31, 2**32, 2**63)]
    for i, x in enumerate(draws):
        for y in draws[:i]:
            assert abs(correlation(x, y)) < SIGMAS


@pytest.mark.parametrize("shape", SHAPES)
def test_uniforms_fill_the_interval(shape: tuple[int, int]) -> None:
    u = k.uniform(*shape, seed=17, stream=k.Stream.TIMES).double().ravel()
    assert abs(u.mean() - 0.5) < SIGMAS * math.sqrt(1 / 12 / u.numel())
    counts = torch.bincount((u * 256).long().clamp(max=255), minlength=256).double()
    expected = u.numel() / 256
    assert 6e-7 < scipy.stats.chi2.sf(float(((counts - expected) ** 2 / expected).sum()), 255) < 1 - 6e-7
