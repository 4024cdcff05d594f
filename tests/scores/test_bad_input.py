"""Messages for arguments that make no law of data, and for states that do not fit one."""

from __future__ import annotations

import pytest
import torch

from sdesolve.diffusions import VP
from sdesolve.scores import Gaussian, GaussianMixture

NAN = float("nan")
TWO = torch.zeros(2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(TWO, -1.0), "variances, which cannot be negative; the smallest is -1"),
        (lambda: Gaussian(TWO, torch.tensor([1.0, -2.0])), "cannot be negative; the smallest is -2"),
        (lambda: Gaussian(TWO, torch.ones(3)), r"cov must be a number.*matrix \(2, 2\).*got shape \(3,\)"),
        (lambda: Gaussian(torch.zeros(2, 2), torch.eye(2)[:1]), r"matrix \(4, 4\)"),
        (lambda: Gaussian(TWO, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), r"must be symmetric.*up to 0.5"),
        (lambda: Gaussian(TWO, torch.tensor([[1.0, 2.0], [2.0, 1.0]])), "positive semi-definite; its smallest.*-1"),
        (lambda: Gaussian(TWO, torch.tensor([[1.0, NAN], [NAN, 1.0]])), "cov must be finite"),
        (lambda: Gaussian(torch.tensor([1.0, float("inf")]), 1.0), "mean must be finite"),
        (lambda: Gaussian(torch.zeros(0), 1.0), "mean must have at least one element"),
        (lambda: GaussianMixture(torch.tensor(1.0), 1.0), r"means must have shape \(K, \*state\)"),
        (lambda: GaussianMixture(torch.zeros(0, 2), 1.0), "at least one component"),
        (lambda: GaussianMixture(torch.zeros(3, 2)), "exactly one of them"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 1.0, covs=torch.eye(2).expand(3, 2, 2)), "exactly one of them"),
        (lambda: GaussianMixture(torch.zeros(3, 2), torch.ones(2)), r"stds must be a number, \(3,\) or \(3, 2\)"),
        (lambda: GaussianMixture(torch.zeros(3, 2), torch.ones(3, 2, 2)), "for covariance matrices use covs="),
        (lambda: GaussianMixture(torch.zeros(3, 2), -0.1), "stds are standard deviations, which cannot be negative"),
        (lambda: GaussianMixture(torch.zeros(3, 2), covs=torch.eye(2)), r"covs must have shape \(3, 2, 2\)"),
        (lambda: GaussianMixture(torch.zeros(1, 2), covs=-torch.eye(2)[None]), "positive semi-definite"),
        (lambda: GaussianMixture(torch.zeros(3, 2), 1.0, torch.ones(2)), r"weights must have shape \(3,\)"),
        (
            lambda: GaussianMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, 0.0])),
            "leave out components that have none",
        ),
        (lambda: GaussianMixture(torch.zeros(2, 2), 1.0, torch.tensor([1.0, NAN])), "weights must be finite"),
    ],
)
def test_arguments_that_make_no_law(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match="mean must be real"):
        Gaussian(torch.zeros(2, dtype=torch.complex64), 1.0)


@pytest.mark.parametrize(
    "law", [Gaussian(TWO, 1.0), GaussianMixture(torch.zeros(3, 2), 1.0)], ids=["gaussian", "mixture"]
)
def test_states_and_times_that_do_not_fit(law):
    score = law.score(VP())
    for call in (score, score.log_prob, score.denoise, lambda x, t: law.log_prob(x)):
        with pytest.raises(ValueError, match=r"x must have shape \(batch, 2\).*got \(4, 3\)"):
            call(torch.zeros(4, 3), 0.5)
        with pytest.raises(ValueError, match=r"for a single state pass x\[None\]"):
            call(torch.zeros(2), 0.5)
        with pytest.raises(TypeError, match=r"float32 or float64, got torch.int64; convert it with x.float\(\)"):
            call(torch.zeros(4, 2, dtype=torch.int64), 0.5)
        with pytest.raises(TypeError, match=r"got torch\.float16"):
            call(torch.zeros(4, 2, dtype=torch.float16), 0.5)
        with pytest.raises(TypeError, match="got list"):
            call([[0.0, 0.0]], 0.5)
    for call in (score, score.log_prob, score.denoise):
        with pytest.raises(ValueError, match=r"one time per sample, \(4,\), got shape \(3,\)"):
            call(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(TypeError, match=r"must be a forward process.*did you mean VP\("):
        law.score(VP)
    with pytest.raises(TypeError, match="n must be an integer"):
        law.sample(2.5, seed=0)
    with pytest.raises(ValueError, match="n must be at least 0"):
        law.sample(-1, seed=0)


def test_a_law_without_density_says_so():
    for law in (
        Gaussian(TWO, torch.tensor([1.0, 0.0])),
        Gaussian(TWO, torch.ones(2, 2)),
        GaussianMixture(torch.zeros(1, 2), 0.0),
    ):
        with pytest.raises(ValueError, match="direction without variance"):
            law.log_prob(torch.zeros(1, 2))
        assert bool(law.score(VP()).log_prob(torch.zeros(1, 2), 0.5).isfinite().all())


def test_moments_are_for_one_time():
    with pytest.raises(ValueError, match="moments are for one time"):
        Gaussian(TWO, 1.0).moments(VP(), torch.zeros(2))
    with pytest.raises(TypeError, match="must be a forward process"):
        Gaussian(TWO, 1.0).flow("vp")
