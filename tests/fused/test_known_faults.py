"""Known faults of other libraries, on the step kernels."""

from __future__ import annotations

import math

import pytest
import torch
from sdesolve_kernels import Stream, langevin_step, linear_step, normal


def implied_sizes(x, score, **options):
    """Step sizes ``delta`` that `langevin_step` used, from the noise it must have added: ``x' - x - delta s``."""
    moved = langevin_step(x, score, seed=3, **options) - x
    z = normal(x.shape[0], x[0].numel(), seed=3, stream=Stream.CORRECTOR, dtype=x.dtype).reshape(x.shape)
    # moved = r^2 s + sqrt(2) r z per sample: the positive root r of a quadratic, by projection on z
    a, b, c = ((u * z).flatten(1).sum(1) for u in (score, math.sqrt(2.0) * z, -moved))
    return ((-b + (b * b - 4 * a * c).clamp(min=0).sqrt()) / (2 * a)).square()


def test_an_outlier_changes_the_steps_of_others_only_where_norms_are_averaged():
    """With batch-mean norms one score 100 times too large shrinks every step; a sample's own norms do not mix."""
    x = torch.zeros(64, 16, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(64, 16, dtype=torch.float64, generator=generator)
    spoilt = score.clone()
    spoilt[0] *= 100
    shrunk = float((score.norm(dim=1).mean() / spoilt.norm(dim=1).mean()).square())
    assert shrunk < 0.2
    for mode, ratio in (("sample", 1.0), ("batch", shrunk)):
        before = implied_sizes(x, score, mode=mode, size=0.16)[1:]
        after = implied_sizes(x, spoilt, mode=mode, size=0.16)[1:]
        torch.testing.assert_close(after, ratio * before, rtol=1e-9, atol=0)
    apart = langevin_step(x, score, mode="sample", size=0.16, seed=3)[1:]
    together = langevin_step(x, spoilt, mode="sample", size=0.16, seed=3)[1:]
    assert torch.equal(apart, together)


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_the_dimension_mode_keeps_a_gaussian_where_own_norms_blow_it_up(d):
    """Target ``N(0, I)``, 400 steps at SNR 0.16. With ``delta = 2 snr^2`` for all, the chain's variance tends to
    ``1 / (1 - delta / 2) = 1.026``. A sample's own norms take steps of size ``1 / |s|^2``: in one dimension a sample
    near the mode is thrown out, and the variance has no bound."""
    n = max(4000, 64_000 // d)
    x = {mode: normal(n, d, seed=1, stream=Stream.DATA, dtype=torch.float64) for mode in ("dimension", "sample")}
    for k in range(400):
        for mode, state in x.items():
            x[mode] = langevin_step(state, -state, mode=mode, size=0.16, seed=2, step=k)
    variance = {mode: float(state.var()) for mode, state in x.items()}
    # five standard deviations of a sample variance; the batch mean of |s| makes delta itself noisy by less than that
    assert abs(variance["dimension"] - 1.026) < 5 * math.sqrt(2 / (n * d)) + 0.01
    if d == 1:
        assert variance["sample"] > 100


@pytest.mark.parametrize("mode", ["fixed", "batch", "sample", "dimension"])
def test_the_scale_alpha_multiplies_the_step(mode):
    """The code that the mode comes from passes ``1 - beta`` for ``alpha``; here it is an argument of its own."""
    x = torch.zeros(8, 4, dtype=torch.float64)
    score = normal(8, 4, seed=5, dtype=torch.float64)
    whole = implied_sizes(x, score, mode=mode, size=0.1)
    half = implied_sizes(x, score, mode=mode, size=0.1, alpha=0.5)
    torch.testing.assert_close(half, 0.5 * whole, rtol=1e-9, atol=0)


def test_the_mean_of_a_step_comes_from_the_state_before_its_noise():
    """A mean built from the state after the noise keeps that noise (0.0099 instead of 2e-6 in a peer's inpainting)."""
    x, s = (normal(100, 6, seed=k, dtype=torch.float64) for k in (1, 2))
    table = torch.tensor([[0.9, 0.3, 0.01]], dtype=torch.float64)
    noisy = linear_step(x, [s], table, 0, seed=7)
    mean = linear_step(x, [s], table, 0, stochastic=False)
    torch.testing.assert_close(mean, 0.9 * x + 0.3 * s, rtol=1e-14, atol=1e-14)
    z = normal(100, 6, seed=7, dtype=torch.float64)
    torch.testing.assert_close(noisy - mean, 0.01 * z, rtol=1e-9, atol=1e-14)
    buffer = x.clone()  # in place as well
    assert torch.equal(linear_step(buffer, [s], table, 0, seed=7, out=buffer), noisy)
