"""Samples of analytic laws: functions of their coordinates, with the right moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdesolve.scores import Gaussian, GaussianMixture

A = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.4]], dtype=torch.float64)
LAWS = {
    "isotropic": Gaussian(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), 0.25),
    "diagonal": Gaussian(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, 2.0, 0.0])),
    "full": Gaussian(torch.tensor([1.0, -2.0, 0.0]), A @ A.mT),
    "rank 0": Gaussian(2.0, 3.0),
    "mixture": GaussianMixture(
        torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.3, 0.6]), torch.tensor([1.0, 3.0])
    ),
    "mixture of matrices": GaussianMixture(
        torch.tensor([[-2.0, 0.0, 1.0], [2.0, 1.0, 0.0]]), covs=torch.stack([A @ A.mT, torch.eye(3).double()])
    ),
}
names = pytest.mark.parametrize("name", LAWS)


def exact_moments(law: Gaussian | GaussianMixture) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance over the flattened state, from the arguments and not from the class's own spectra."""
    if isinstance(law, Gaussian):
        mean = law.mean.reshape(-1)
        cov = torch.as_tensor(law.cov)
        full = cov if cov.shape == (len(mean),) * 2 and cov.ndim == 2 else torch.diag(cov.reshape(-1).expand(len(mean)))
        return mean, full
    means, w = law.means.flatten(1), law.weights
    mean = w @ means
    inner = {2: [0.09 * torch.eye(2), 0.36 * torch.eye(2)], 3: [A @ A.mT, torch.eye(3)]}[means.shape[1]]
    within = sum(w[k] * inner[k] for k in range(2))
    centred = means - mean
    return mean, within + (centred.mT * w) @ centred


@names
def test_sample_moments(name):
    law, n = LAWS[name], 200_000
    x = law.sample(n, seed=1, dtype=torch.float64).reshape(n, -1)
    mean, cov = exact_moments(law)
    # Six standard errors: a Gaussian exceeds that once in 5e8. Standard errors come from the laws' own moments, fourth
    # ones estimated from the sample.
    assert bool(((x.mean(0) - mean).abs() <= 6 * (cov.diag() / n).sqrt() + 1e-12).all())
    products = (x - mean).unsqueeze(2) * (x - mean).unsqueeze(1)
    assert bool(((products.mean(0) - cov).abs() <= 6 * products.std(0) / math.sqrt(n) + 1e-12).all())


def test_components_come_with_their_weights_and_independent_of_the_normals():
    n = 200_000
    law = GaussianMixture(torch.tensor([[-50.0], [0.0], [50.0]]), 1.0, torch.tensor([0.2, 0.5, 0.3]))
    x = law.sample(n, seed=2, dtype=torch.float64)[:, 0]
    k = (x / 50).round()
    for value, w in ((-1, 0.2), (0, 0.5), (1, 0.3)):
        share = float((k == value).double().mean())
        assert abs(share - w) < 6 * math.sqrt(w * (1 - w) / n)
        z = x[k == value] - 50 * value
        # A component drawn from a word that a normal uses as well would leave that normal skewed within it.
        assert abs(float(z.mean())) < 6 / math.sqrt(len(z))
        assert abs(float(z.square().mean()) - 1) < 6 * math.sqrt(2 / len(z))


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(first=st.integers(0, 40), count=st.integers(0, 25), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=15)
def test_a_sample_is_a_function_of_seed_and_path(name, dtype, first, count, seed):
    law = LAWS[name]
    whole = law.sample(70, seed=seed, dtype=dtype)
    part = law.sample(count, seed=seed, first_path=first, dtype=dtype)
    assert part.shape == (count, *law.state_shape)
    assert part.dtype == dtype
    assert torch.equal(part, whole[first : first + count])


@names
def test_both_dtypes_draw_the_same_sample(name):
    law = LAWS[name]
    low, high = law.sample(1000, seed=5), law.sample(1000, seed=5, dtype=torch.float64)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-5)


@names
def test_large_path_indices_do_not_wrap(name):
    law = LAWS[name]
    far = law.sample(4, seed=0, first_path=2**33, dtype=torch.float64)
    assert not torch.equal(far, law.sample(4, seed=0, dtype=torch.float64))
    assert not torch.equal(far, law.sample(4, seed=0, first_path=2**32, dtype=torch.float64))


def test_a_large_matrix_product_does_not_depend_on_the_batch():
    """A BLAS product sums in an order that depends on the number of rows."""
    a = torch.randn(96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    law = Gaussian(torch.zeros(96), a @ a.mT)
    whole = law.sample(800, seed=0)
    for first, count in ((0, 1), (7, 3), (681, 4), (500, 300)):
        assert torch.equal(law.sample(count, seed=0, first_path=first), whole[first : first + count])
