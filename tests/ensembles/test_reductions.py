"""Summaries of many paths: right, and the same bits whoever did which block."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import sdesolve as sds
from sdesolve.ensembles.reductions import merge

from .conftest import make

VALUES = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor(
    [1, 5, 0.1]
)


def merged(reduction, blocks=(0, 120, 121, 300, 500)):
    parts = [reduction.of(VALUES[a:b]) for a, b in itertools.pairwise(blocks)]
    return reduction.read(merge(reduction, parts))


def test_moments_of_blocks_are_those_of_all():
    found = merged(sds.Moments())
    assert found.count == 500
    torch.testing.assert_close(found.mean, VALUES.mean(0), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(found.variance, VALUES.var(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(found.standard_error, VALUES.std(0) / math.sqrt(500), rtol=1e-13, atol=0)
    empty = sds.Moments().of(VALUES[:0])
    one = sds.Moments().of(VALUES[:5])
    assert sds.Moments().merged(empty, one) is one


def test_features_have_their_covariance():
    found = merged(sds.FeatureMoments(lambda x: x.square()))
    torch.testing.assert_close(found.covariance, VALUES.square().T.cov(), rtol=1e-11, atol=1e-12)
    own, other = merged(sds.FeatureMoments()), sds.FeatureMoments()
    shifted = other.read(other.of(VALUES + torch.tensor([3.0, 0.0, 4.0])))
    assert own.frechet_distance(shifted) == pytest.approx(25.0, rel=1e-9)
    with pytest.raises(ValueError, match=r"features must be \(paths, d\).*got \(500,\)"):
        sds.FeatureMoments(lambda x: x.sum(-1)).of(VALUES)


def test_histogram_counts_all_that_is_a_number():
    found = merged(sds.ValueHistogram(-1.0, 1.0, 8))
    assert found.shape == (3, 10)
    assert found.sum(1).tolist() == [500, 500, 500]
    for k in range(3):
        assert found[k, 1:-1].tolist() == torch.histc(VALUES[:, k], 8, -1.0, 1.0).long().tolist()
    edges = sds.ValueHistogram(0.0, 1.0, 4).of(torch.tensor([[0.0], [0.25], [1.0], [math.nan], [-1.0]]))["counts"]
    assert edges.tolist() == [[1, 1, 1, 0, 0, 1]]
    with pytest.raises(ValueError, match="low must be below high"):
        sds.ValueHistogram(1.0, 1.0)


@pytest.mark.parametrize("q", [0.0, 0.01, 0.5, 0.9, 1.0])
def test_quantiles_to_their_accuracy(q):
    found = merged(sds.QuantileSketch(0.01))(q)
    exact = VALUES.sort(0).values[int(q * 499)]
    torch.testing.assert_close(found, exact, rtol=0.0101, atol=1e-9)


def test_quantiles_at_the_ends_of_their_range():
    sketch = sds.QuantileSketch(0.01, smallest=1e-3, largest=1e3)
    found = sketch.read(sketch.of(torch.tensor([[0.0], [1e-9], [-1e9], [1e9], [math.nan], [5.0]])))
    assert [float(found(q)) for q in (0.0, 0.3, 0.5)] == pytest.approx([-1e3, 0.0, 0.0], rel=0.011)
    assert float(found(1.0)) == pytest.approx(1e3, rel=0.011)
    assert sketch.read(sketch.of(torch.zeros(0, 1)))(0.5).isnan().all()
    with pytest.raises(ValueError, match="level of a quantile"):
        found(1.5)
    with pytest.raises(ValueError, match="accuracy"):
        sds.QuantileSketch(0.9)


def test_runs_reduce_to_the_same_bits_in_any_order(whole):
    save_at = [0.3, 1.0]
    run = make(save_at=save_at, reduce="moments")
    for k in (2, 0, 1):
        run.do(k)
    other = make(save_at=save_at, reduce="moments")()
    assert torch.equal(run.result().mean, other.result().mean)
    torch.testing.assert_close(run.result().mean, whole.xs.double().mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(run.result().variance, whole.xs.double().var(1), rtol=1e-5, atol=1e-8)
    parts = make(save_at=save_at, reduce="moments", segments=3)()
    assert torch.equal(parts.result().variance, other.result().variance)
    sums = make(save_at=save_at, reduce="sums")().result()
    assert sums == make(save_at=save_at, reduce="sums", block=7)().result()  # exact, so of any blocks
    several = make(save_at=save_at, reduce={"q": sds.QuantileSketch(), "m": sds.Moments()})().result()
    assert set(several) == {"q", "m"}
    torch.testing.assert_close(several["m"].mean, whole.xs.double().mean(1).reshape(2, 2), rtol=1e-12, atol=1e-14)


def test_a_single_path_has_no_variance():
    found = make(x0=torch.zeros(1, 2), paths=1, reduce="moments")().result()
    assert found.count == 1
    assert found.variance.isnan().all()
