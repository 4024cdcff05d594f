"""Metrics of samples against closed forms, brute force and SciPy, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sdesolve_kernels import normal

from sdesolve.metrics import (
    energy_distance,
    frechet_distance,
    precision_recall,
    sample_floor,
    sliced_wasserstein,
    squared_mmd,
    wasserstein_1d,
)


def draws(seed: int, *shape: int) -> torch.Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=214, dtype=torch.float64).reshape(shape)


def gaussian_mmd(shift: torch.Tensor, v0: float, v1: float, h: float) -> float:
    """``|mu_p - mu_q|^2`` of ``N(0, v0 I)`` and ``N(shift, v1 I)`` for the Gaussian kernel: three normal integrals."""
    d = len(shift)

    def mean_kernel(v: float, m2: float) -> float:
        return (h**2 / (h**2 + v)) ** (d / 2) * math.exp(-0.5 * m2 / (h**2 + v))

    return mean_kernel(2 * v0, 0) + mean_kernel(2 * v1, 0) - 2 * mean_kernel(v0 + v1, float(shift.square().sum()))


def deviations(kernel, a, b, estimate):
    """How many of its own standard deviations the upper end of an interval lies above the estimate."""
    K = {k: np.array([[kernel(x, y) for y in q] for x in p]) for k, p, q in (("aa", a, a), ("bb", b, b), ("ab", a, b))}
    n, m = K["ab"].shape
    weight = {"aa": n**-2, "bb": m**-2, "ab": 2 / (n * m)}
    centred = {k: v - v.mean(0) - v.mean(1)[:, None] + v.mean() for k, v in K.items()}
    squared = sum(weight[k] * (v**2).mean() for k, v in centred.items())  # tr S^2
    seen = K["aa"].mean() + K["bb"].mean() - 2 * K["ab"].mean()  # |D|^2 of the embeddings that were seen
    slope = float(estimate.std_error) ** 2 / (4 * seen)
    noise = min(max((seen - float(estimate.value)) / seen, 0.0), 1.0)
    slope += noise * max(math.sqrt(squared) - slope, 0.0)
    high = float(estimate.high)
    return (high - float(estimate.value)) / math.sqrt(4 * slope * high + 2 * squared)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (2, 5), (7, 4)])
def test_discrepancies_by_brute_force(n, m):
    a, b = draws(0, n, 2, 2), draws(1, m, 2, 2) + 0.5

    def gaussian(x, y):
        return math.exp(-0.5 * float((x - y).square().sum()) / 1.7**2)

    def distance(x, y):
        return -float((x - y).norm())

    for kernel, estimate in ((gaussian, squared_mmd(a, b, bandwidth=1.7)), (distance, energy_distance(a, b))):

        def theta(a, b, kernel=kernel):
            aa = [kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j]
            bb = [kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j]
            return np.mean(aa) + np.mean(bb) - 2 * np.mean([kernel(x, y) for x in a for y in b])

        assert float(estimate.value) == pytest.approx(theta(a, b), rel=1e-12)
        assert deviations(kernel, a, b, estimate) == pytest.approx(scipy.stats.t.ppf(0.975, min(n, m) - 1))
        assert float(estimate.low) < float(estimate.value)
        if min(n, m) > 2:
            variance = 0.0
            for x, y, first in ((a, b, True), (b, a, False)):
                left = [torch.cat([x[:i], x[i + 1 :]]) for i in range(len(x))]
                values = np.array([theta(part, y) if first else theta(y, part) for part in left])
                variance += (len(x) - 1) / len(x) * ((values - values.mean()) ** 2).sum()
            assert float(estimate.std_error) == pytest.approx(math.sqrt(variance), rel=1e-10)


def test_energy_distance_on_the_line_is_scipys():
    """SciPy's is the square root of the one with pairs of a sample with itself."""
    a, b = draws(2, 40), draws(3, 60) + 0.3
    n, m = 40, 60
    biased = scipy.stats.energy_distance(a.numpy(), b.numpy()) ** 2
    within = [float(torch.cdist(x[:, None], x[:, None]).sum()) for x in (a, b)]
    expected = biased + within[0] * (1 / n**2 - 1 / (n * (n - 1))) + within[1] * (1 / m**2 - 1 / (m * (m - 1)))
    assert float(energy_distance(a, b).value) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("shift", "least"), [(0.5, 0.91), (0.0, 0.95)])
def test_intervals_cover_the_truth(shift, least):
    """300 runs: at 95% coverage, 91% is 3.2 binomial standard deviations below; equal laws are covered more often."""
    m1 = torch.tensor([shift, 0.0], dtype=torch.float64)
    truth = gaussian_mmd(m1, 1.0, 1.0, 1.0)
    covered = 0
    values = []
    for run in range(300):
        e = squared_mmd(draws(100 + run, 60, 2), draws(1000 + run, 80, 2) + m1, bandwidth=1.0)
        covered += bool(e.low <= truth <= e.high)
        values.append(float(e.value))
    assert covered / 300 >= least
    assert abs(np.mean(values) - truth) < 4 * np.std(values) / math.sqrt(300)
    if shift:
        assert covered / 300 <= 0.985  # the interval is not merely wide; 2.8 standard deviations above


@pytest.mark.parametrize(("shift", "scale", "n", "m"), [(0.3, 1.0, 50, 50), (0.3, 1.0, 100, 30), (0.0, 1.5, 100, 30)])
def test_intervals_of_energy_distances_cover_the_truth(shift, scale, n, m):
    """Deviations at the estimate alone held it in 0.83, 0.83 and 0.90 of runs: they are small where the estimate is."""

    def mean_size(m, v):  # E|N(m, v)|
        spread = math.exp(-m * m / (2 * v)) * math.sqrt(2 * v / math.pi)
        return spread + m * math.erf(m / math.sqrt(2 * v))

    truth = 2 * mean_size(shift, 1 + scale**2) - mean_size(0, 2) - mean_size(0, 2 * scale**2)
    covered = 0
    for run in range(300):
        e = energy_distance(draws(100 + run, n), shift + scale * draws(1000 + run, m))
        covered += bool(e.low <= truth <= e.high)
    assert covered / 300 >= 0.91  # at 95%, 3.2 binomial standard deviations below


def test_wider_confidence_is_a_wider_interval():
    a, b = draws(4, 30, 2), draws(5, 30, 2)
    ends = [(float(e.low), float(e.high)) for e in (squared_mmd(a, b, confidence=c) for c in (0.5, 0.9, 0.99))]
    assert ends[2][0] < ends[1][0] < ends[0][0] < ends[0][1] < ends[1][1] < ends[2][1]


def test_the_default_bandwidth_is_a_median_distance():
    a, b = draws(6, 30, 2), draws(7, 25, 2) + 1.0
    h = float(torch.pdist(torch.cat([a, b])).median())
    assert torch.equal(squared_mmd(a, b).value, squared_mmd(a, b, bandwidth=h).value)


def test_large_samples_go_through_in_blocks(monkeypatch):
    a, b = draws(8, 50, 3), draws(9, 40, 3)
    whole = squared_mmd(a, b), precision_recall(a, b)
    monkeypatch.setattr("sdesolve.metrics.kernels._BLOCK_ELEMENTS", 100)
    monkeypatch.setattr("sdesolve.metrics.coverage._BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(squared_mmd(a, b), whole[0], rtol=1e-12, atol=1e-14)
    assert precision_recall(a, b) == whole[1]


def test_precision_and_recall_by_brute_force():
    real, generated, k = draws(10, 40, 2), 0.5 * draws(11, 30, 2) + 0.3, 2

    def inside(points, centres):
        count = 0
        for p in points:
            hit = False
            for i, c in enumerate(centres):
                others = sorted(float((c - o).norm()) for j, o in enumerate(centres) if j != i)
                hit |= float((p - c).norm()) <= others[k - 1]
            count += hit
        return count / len(points)

    result = precision_recall(real, generated, neighbours=k)
    assert float(result.precision) == pytest.approx(inside(generated, real))
    assert float(result.recall) == pytest.approx(inside(real, generated))


def test_precision_and_recall_tell_missing_modes_from_bad_samples():
    near, far = draws(12, 200, 2), draws(13, 200, 2) + 50
    both = torch.cat([near, far])
    dropped = precision_recall(both, draws(14, 400, 2))
    assert float(dropped.precision) > 0.9
    assert float(dropped.recall) < 0.55
    astray = precision_recall(near, torch.cat([draws(15, 100, 2), far[:100]]))
    assert float(astray.precision) < 0.55
    assert float(astray.recall) > 0.9


def test_the_floor_is_what_equal_laws_score():
    """Against fresh pairs: W2 of 200 and 300 normals, exact in one dimension; 5 standard errors of 40 rounds."""
    data = draws(16, 4000)
    floor = sample_floor(wasserstein_1d, data, (200, 300), rounds=40)
    fresh = torch.stack([wasserstein_1d(draws(200 + k, 200), draws(300 + k, 300)) for k in range(40)])
    assert floor.values.shape == (40,)
    spread = math.sqrt(float(fresh.var() + floor.std**2) / 40)
    assert abs(float(floor.mean - fresh.mean())) < 5 * spread
    assert float(floor.mean) == pytest.approx(float(floor.values.mean()))
    assert float(floor.std) == pytest.approx(float(floor.values.std()))
    again = sample_floor(wasserstein_1d, data, (200, 300), rounds=40)
    assert torch.equal(again.values, floor.values)
    assert not torch.equal(sample_floor(wasserstein_1d, data, (200, 300), rounds=40, seed=1).values, floor.values)


def test_parts_of_a_floor_share_no_sample():
    seen = []
    sample_floor(lambda a, b: seen.append((a, b)) or torch.zeros(()), torch.arange(10.0), (4, 6), rounds=3)
    for a, b in seen:
        assert sorted(torch.cat([a, b]).tolist()) == list(range(10))
    assert not torch.equal(seen[0][0], seen[1][0])


def test_every_metric_has_a_floor():
    data = draws(17, 120, 3)
    for metric in (
        frechet_distance,
        sliced_wasserstein,
        lambda a, b: squared_mmd(a, b, bandwidth=1.0).value,
        lambda a, b: energy_distance(a, b).value,
        lambda a, b: precision_recall(a, b).recall,
    ):
        floor = sample_floor(metric, data, rounds=3)
        assert bool(floor.values.isfinite().all())
        assert float(floor.std) > 0


A = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: squared_mmd(A[:1], A), ValueError, "at least 2 sample"),
        (lambda: squared_mmd(A, torch.ones(4, 3)), ValueError, "one shape"),
        (lambda: squared_mmd(A, A), ValueError, "if all samples are equal"),
        (lambda: squared_mmd(A, A, bandwidth=-1.0), ValueError, "bandwidth must be positive"),
        (lambda: squared_mmd(A, A, bandwidth=1.0, confidence=95), ValueError, "between 0 and 1, got 95"),
        (lambda: energy_distance(A, A * math.nan), ValueError, "must be finite"),
        (lambda: energy_distance(A, A.to(torch.complex64)), TypeError, "must be real"),
        (lambda: precision_recall(A[:3], A, neighbours=3), ValueError, "at least 4 sample"),
        (lambda: precision_recall(A, A, neighbours=0), ValueError, "neighbours must be at least 1"),
        (lambda: sample_floor(1.0, A), TypeError, "metric must be"),
        (lambda: sample_floor(frechet_distance, A, (3, 2)), ValueError, "need 5 samples"),
        (lambda: sample_floor(frechet_distance, A, rounds=0), ValueError, "rounds must be at least 1"),
        (lambda: sample_floor(wasserstein_1d, A), ValueError, "must return a single number"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Features of a function


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Sequential(torch.nn.Linear(12, 3), torch.nn.Dropout(0.5), torch.nn.Tanh())
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return self.inner(x.flatten(1).float() / 255.0)[:, None]


def test_metrics_of_features_are_those_of_what_the_function_makes():
    """By batches, in evaluation mode, without gradients; of tensors, lists and loaders."""
    network = Network()
    a, b = ((draws(k, 50, 3, 2, 2) * 60 + 128 + 20 * k).clamp(0, 255).to(torch.uint8) for k in (0, 1))
    with torch.no_grad():
        features = [network.eval()(x).flatten(1) for x in (a, b)]
    network.train()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(b, torch.arange(50)), 17)
    for metric in (
        frechet_distance, precision_recall, energy_distance, squared_mmd, lambda *s, **o: squared_mmd(*s, degree=3, **o)
    ):  # fmt: skip
        expected = metric(*features)
        for second in (b, list(b.split(9)), loader):
            network.batches.clear()
            found = metric(a, second, features=network, batch_size=20)
            assert network.batches[:3] == [20, 20, 10]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert network.training
    for wrong, error, message in (
        ({"features": 3}, TypeError, "features must be a function"),
        ({"features": lambda x: x.sum()}, ValueError, "a row for each of 50 samples"),
        ({"features": lambda x: x.tolist()}, TypeError, "features must return a tensor"),
        ({"features": network, "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"features": lambda x: x.float() * math.nan}, ValueError, "must be finite"),
    ):
        with pytest.raises(error, match=message):
            frechet_distance(a, b, **wrong)
    with pytest.raises(TypeError, match="batches of b must be tensors"):
        squared_mmd(a, ["x"], features=network)
    with pytest.raises(ValueError, match="b holds no sample"):
        squared_mmd(a, [], features=network)


def test_the_polynomial_kernel_by_brute_force():
    a, b = draws(2, 7, 3), draws(3, 5, 3) + 0.5

    def mean(x, y, same):
        values = [
            (float(p @ q) / 3 + 1) ** 3 for i, p in enumerate(x) for j, q in enumerate(y) if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert float(squared_mmd(a, b, degree=3).value) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="give one of them"):
        squared_mmd(a, b, degree=3, bandwidth=1.0)
