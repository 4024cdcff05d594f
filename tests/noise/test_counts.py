"""Counts from uniform numbers: quantiles to the last of 64 bits, in both tails."""

from __future__ import annotations

import itertools

import mpmath
import pytest
import torch
from sdesolve_kernels.counts import LARGEST_MEAN, Tail, binomial, poisson, tail

CHANCES = (2.0**-65, 1e-18, 1e-12, 1e-9, 1e-6, 1e-3, 0.07, 0.31, 0.499)


def one(chance: float, upper: bool) -> Tail:
    return Tail(torch.tensor([chance], dtype=torch.float64), torch.tensor([upper]))


def poisson_tails(k: int, mean: float):
    """``P(X <= k)`` and ``P(X > k)`` to 25 digits, each added up from its largest term."""

    def added(i: int, step: int):
        term = mpmath.exp(i * mpmath.log(mean) - mean - mpmath.loggamma(i + 1)) if i >= 0 else mpmath.mpf(0)
        total = mpmath.mpf(0)
        while term > total * mpmath.mpf(10) ** -25:
            total += term
            term *= mean / mpmath.mpf(i + 1) if step > 0 else i / mpmath.mpf(mean)
            i += step
        return total

    return (added(k, -1), 1 - added(k, -1)) if k < mean else (1 - added(k + 1, 1), added(k + 1, 1))


@pytest.mark.parametrize("mean", [1e-10, 1e-3, 0.7, 9.9, 10.0, 33.3, 130.0, 2500.5])
def test_poisson_quantiles_are_exact_in_both_tails(mean):
    for chance, upper in itertools.product(CHANCES, (False, True)):
        k = int(poisson(one(chance, upper), torch.tensor([mean], dtype=torch.float64)))
        with mpmath.workdps(40):
            (at, above), (before, above_before) = poisson_tails(k, mean), poisson_tails(k - 1, mean)
            slack = mpmath.mpf(10) ** -11  # relative, of the chance
            if upper:
                assert above <= chance * (1 + slack), (chance, k)
                assert k == 0 or above_before >= chance * (1 - slack), (chance, k)
            else:
                assert at >= chance * (1 - slack), (chance, k)
                assert k == 0 or before <= chance * (1 + slack), (chance, k)


def test_poisson_quantiles_agree_with_sums_of_chances():
    """The expansion is used where it is certain: everywhere else, and in all of these, chances are added up."""
    from sdesolve_kernels.counts import _expanded, _summed_poisson

    generator = torch.Generator().manual_seed(0)
    high, low = torch.randint(0, 1 << 32, (2, 20_000), generator=generator)
    shift = torch.randint(0, 30, (20_000,), generator=generator)
    high = torch.where(low % 2 == 0, high >> shift, (1 << 32) - 1 - (high >> shift))
    u = tail(high, low)
    mean = 10.0 * 30.0 ** torch.rand(20_000, dtype=torch.float64, generator=generator)
    k, certain = _expanded(u, mean)
    assert float(certain.double().mean()) > 0.3
    rows = certain.nonzero().squeeze(1)
    assert torch.equal(k[rows], _summed_poisson(u.at(rows), mean[rows]))


def test_poisson_quantiles_of_large_means_are_normal_to_their_expansion():
    mean = torch.full((3,), LARGEST_MEAN, dtype=torch.float64)
    u = Tail(torch.tensor([0.5, 1e-12, 1e-12], dtype=torch.float64), torch.tensor([False, False, True]))
    k = poisson(u, mean)
    w = 7.034483825301131  # of 1e-12
    assert abs(float(k[0]) - LARGEST_MEAN) <= 1
    assert torch.allclose((k[1:] - LARGEST_MEAN) / 1e5, torch.tensor([-w, w], dtype=torch.float64), atol=1e-4)


def test_counts_are_monotone_and_vanish_with_the_mean():
    words = torch.arange(0, 1 << 32, 1 << 22)
    u = tail(words, words)
    for mean in (0.0, 3.0, 12.0, 4000.0):
        k = poisson(u, torch.full(words.shape, mean, dtype=torch.float64))
        assert bool((k.diff() >= 0).all())
        assert bool((k == 0).all()) == (mean == 0.0)


@pytest.mark.parametrize(("trials", "p"), [(1, 0.5), (7, 0.5), (64, 0.5), (1001, 0.5), (30, 0.03), (200, 0.9)])
def test_binomial_quantiles_are_exact(trials, p):
    with mpmath.workdps(40):
        terms = [mpmath.binomial(trials, k) * mpmath.mpf(p) ** k * (1 - mpmath.mpf(p)) ** (trials - k)
                 for k in range(trials + 1)]  # fmt: skip
        below, above = list(itertools.accumulate(terms)), list(itertools.accumulate(reversed(terms)))
    for chance, upper in itertools.product(CHANCES, (False, True)):
        k = int(binomial(one(chance, upper), torch.tensor([float(trials)], dtype=torch.float64), p))
        assert 0 <= k <= trials
        if upper:  # the least k that no more than this chance lies above
            wanted = next(i for i in range(trials + 1) if i == trials or above[trials - i - 1] <= chance)
        else:
            wanted = next(i for i in range(trials + 1) if below[i] >= chance)
        assert k == wanted, (chance, upper)


def test_a_tail_keeps_64_bits():
    top = (1 << 32) - 1
    u = tail(torch.tensor([0, top, 0]), torch.tensor([0, top, top]))
    assert u.chance.tolist() == [2.0**-65, 2.0**-65, ((1 << 32) - 0.5) * 2.0**-64]
    assert u.upper.tolist() == [False, True, False]
