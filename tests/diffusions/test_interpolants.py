"""Linear interpolants, with data at either end, and the networks of flow matching along them."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import sdesolve as sds

MIXTURE = sds.GaussianMixture([[-1.0], [1.5]], [0.2, 0.3], weights=[0.4, 0.6])


def sine(s):
    return (0.5 * math.pi * s).sin()


def cosine(s):
    return (0.5 * math.pi * s).cos()


def square(s):
    return 1 - s**2


CURVES = {
    "line": lambda data_at: sds.Rectified(data_at=data_at),
    "trigonometric": lambda data_at: (
        sds.LinearInterpolant(sine, cosine, data_at=1) if data_at else sds.LinearInterpolant(cosine, sine)
    ),
    "other": lambda data_at: (
        sds.LinearInterpolant(lambda s: square(1 - s), lambda s: 2 * (1 - s), data_at=1)
        if data_at
        else sds.LinearInterpolant(square, lambda s: 2 * s)
    ),
}


def network(process):
    """The exact velocity on the clock of the network, by derivatives of ``alpha`` and ``sigma`` there."""
    exact = MIXTURE.score(process)

    def net(x, s):
        t = 1 - s if process.data_at else s
        h = 1e-5
        slopes = [
            (c(t + h) - c(t - h)) / (2 * h) * (-1 if process.data_at else 1) for c in (process.alpha, process.sigma)
        ]
        data = exact.denoise(x, t)
        noise = (x - process.alpha(t)[:, None] * data) / process.sigma(t)[:, None]
        return slopes[0][:, None] * data + slopes[1][:, None] * noise

    return net


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("curve", CURVES)
def test_a_velocity_is_the_score_whatever_the_curve_and_the_clock(curve, data_at):
    process = CURVES[curve](data_at)
    score, exact = sds.NetworkScore(network(process), process, "flow"), MIXTURE.score(process)
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)[:, None]
    for time in (0.01, 0.4, 0.99):
        t = torch.tensor(time, dtype=torch.float64)
        torch.testing.assert_close(score(x, t), exact(x, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(score.data(x, t), exact.denoise(x, t), rtol=1e-6, atol=1e-6)
        flow, by_flow = score.flow_and_score(x, t)
        torch.testing.assert_close(flow, process.probability_flow(exact).drift(x, t), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(by_flow, exact(x, t), rtol=1e-6, atol=1e-6)
        x0, z = torch.ones_like(x), torch.full_like(x, -0.5)
        ahead, behind = (process.alpha(t + h) * x0 + process.sigma(t + h) * z for h in (1e-5, -1e-5))
        expected = (ahead - behind) / 2e-5 * (-1 if data_at else 1)
        torch.testing.assert_close(score.target(x0, z, t), expected, rtol=1e-7, atol=1e-7)
    options = {"solver": sds.DPMSolverPP(2), "steps": 20, "seed": 0, "backend": "eager", "dtype": torch.float64}
    samples = sds.sample(process, score, (400, 1), **options)
    same = sds.sample(process, exact, (400, 1), **options)
    torch.testing.assert_close(samples, same, rtol=0, atol=1e-5)


def test_clocks_differ_in_files_and_processes_pickle(tmp_path):
    one, other = (sds.NetworkScore(torch.nn.Linear(1, 1), sds.Rectified(data_at=end), "flow") for end in (0, 1))
    sds.save(one, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="data at 1 here"):
        sds.load(other, tmp_path / "weights.safetensors")
    process = sds.LinearInterpolant(sine, cosine, data_at=1)
    assert float(pickle.loads(pickle.dumps(process)).alpha(0.3)) == float(process.alpha(0.3))
    assert repr(sds.Rectified(data_at=1)) == "Rectified(data_at=1, t_min=0.001, t_max=0.999)"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sds.LinearInterpolant(sine, cosine), ValueError, "wrong side: alpha = 1 .* s = 1, .* say data_at=1"),
        (lambda: sds.LinearInterpolant(cosine, sine, data_at=1), ValueError, "wrong side.* say data_at=0"),
        (lambda: sds.LinearDiffusion(lambda t: t, lambda t: 1 - t, t_max=0.99), ValueError, "LinearInt.*data_at=1"),
        (lambda: sds.LinearInterpolant(lambda s: 1 - s, lambda s: 0.1 + s), ValueError, "at s = 0, .* got 1 and 0.1"),
        (
            lambda: sds.LinearInterpolant(lambda s: 1 - s * s * (3 - 2 * s), lambda s: s * s * (3 - 2 * s), t_max=1.0),
            ValueError,
            "no inverse where alpha sigma' - alpha' sigma is 0.* at t = 1 it is",
        ),
        (lambda: sds.LinearInterpolant(cosine, sine, t_max=1.5), ValueError, "t_max must be at most 1"),
        (lambda: sds.LinearInterpolant(cosine, lambda s: 1.0), TypeError, r"sigma\(t\) must return a tensor"),
        (lambda: sds.LinearInterpolant(0.5, sine), TypeError, "alpha must be a function"),
        (lambda: sds.Rectified(data_at=0.5), ValueError, "data_at must be 0 or 1"),
        (
            lambda: sds.NetworkScore(network, sds.LinearInterpolant(cosine, sine), "velocity"),
            ValueError,
            "an interpolant a velocity is that of flow matching, alpha' x_0",
        ),
        (lambda: sds.NetworkScore(network, sds.VP(), "flow"), ValueError, "LinearInterpolant"),
        (
            lambda: sds.NetworkScore(lambda x, t: x, sds.VP()).flow_and_score(torch.ones(1, 1), torch.tensor(0.5)),
            TypeError,
            "VP is no interpolant",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_advice_on_the_end_without_inverse_works():
    def smooth(s):
        return s * s * (3 - 2 * s)

    process = sds.LinearInterpolant(lambda s: 1 - smooth(s), smooth)
    assert process.t_max == 0.999
    whole = sds.LinearInterpolant(cosine, sine, t_max=1.0)  # alpha is 0 there, and the velocity still tells the data

    def velocity(x, s):  # of data at 1
        c, r = cosine(s)[:, None], sine(s)[:, None]
        return 0.5 * math.pi * (c * (x - c) / r - r)

    score = sds.NetworkScore(velocity, whole, "flow")
    x = sds.sample(whole, score, (3, 1), solver=sds.DDIM(), grid=torch.tensor([1.0, 0.5, 0.0]), seed=0)
    torch.testing.assert_close(x, torch.ones_like(x))
