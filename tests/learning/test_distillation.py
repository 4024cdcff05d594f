"""Flow maps distilled from a score, beside the exact map of a Gaussian."""

from __future__ import annotations

import pytest
import torch

import sdesolve as sds
from sdesolve.scores.gaussian import GaussianFlow

DATA = sds.Gaussian(torch.tensor([1.0, -0.5]), torch.tensor([0.5, 0.04]))
PROCESSES = [sds.VP(), sds.EDM(0.01, 50.0), sds.Rectified()]


def exact(process):
    """The mean denoised state of the flow between two times, from its closed form."""
    flow = GaussianFlow(DATA, process)

    def net(x, s, t):
        ratio = (process.sigma(t) / process.sigma(s))[:, None]
        weight = process.alpha(t)[:, None] - process.alpha(s)[:, None] * ratio
        D = (flow(x, s, t) - ratio * x) / weight
        return torch.where(t[:, None] < s[:, None], D, DATA.score(process).denoise(x, s))

    return net


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_the_exact_map_is_where_the_loss_vanishes(process):
    x0, losses = DATA.sample(1000, seed=0, dtype=torch.float64), []
    model = sds.FlowMap(exact(process), process)
    for steps in (32, 128):
        loss = sds.FlowMapDistillation(DATA.score(process), steps)
        losses.append(float(loss(model, x0, seed=1)))
    off = sds.FlowMap(lambda x, s, t: exact(process)(x, s, t) + 0.1, process)
    # The teacher's steps alone are off: by the third power of their length, squared here.
    assert losses[0] < 2e-6
    assert losses[1] < losses[0] / 100
    assert float(loss(off, x0, seed=1)) > 5 * losses[1]
    t = loss.times(model, x0, seed=1)
    assert float(t.min()) == pytest.approx(process.t_min)
    assert float(t.max()) == pytest.approx(process.t_max)


def test_maps_compose_and_start_as_samples_do():
    process = sds.VP()
    model, x = sds.FlowMap(exact(process), process), torch.randn(7, 2, dtype=torch.float64)
    torch.testing.assert_close(model(x, 0.9, 0.9), x)
    torch.testing.assert_close(model(model(x, 0.9, 0.4), 0.4, 0.1), model(x, 0.9, 0.1))
    flow = GaussianFlow(DATA, process)
    torch.testing.assert_close(model(x, 0.9), flow(x, 0.9, 0.0))
    one = model.sample((7, 2), seed=4, dtype=torch.float64)
    two = model.sample((7, 2), seed=4, dtype=torch.float64, grid=torch.tensor([1.0, 0.3, 0.0], dtype=torch.float64))
    torch.testing.assert_close(one, two)
    steps = sds.sample(
        process, DATA.score(process), (7, 2), solver=sds.DPMSolverPP(2), steps=200, seed=4, dtype=torch.float64
    )
    torch.testing.assert_close(one, steps, rtol=0, atol=1e-2)


class Affine(torch.nn.Module):
    """``D = p(s, t) + q(s, t) x / S`` of two levels of noise, ``S^2 = alpha^2 + sigma^2``."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))

    def forward(self, x, s, t):
        p = self.process
        levels = [0.2 * p.log_snr(u.clamp_min(p.t_min)) for u in (s, t)]
        shift, scale = self.net(torch.stack(levels, 1)).chunk(2, 1)
        return shift + scale * x / (p.alpha(s) ** 2 + p.sigma(s) ** 2).sqrt()[:, None]


@pytest.mark.thorough
def test_a_map_is_learned_from_a_score(tmp_path):
    torch.manual_seed(0)
    process = sds.Rectified()
    model = sds.FlowMap(Affine(process), process)
    loss = sds.FlowMapDistillation(DATA.score(process), 24)
    options = {"steps": 600, "batch_size": 256, "lr": 0.02, "decay": "cosine", "ema": 0.98, "progress": False}
    sds.train(model, DATA.sample(2000, seed=0), loss=loss, seed=0, **options)
    x = process.prior.sample((500, 2), seed=1)
    truth = GaussianFlow(DATA, process)(x, process.t_max, 0.0)
    untrained = sds.FlowMap(Affine(process), process)(x, process.t_max)
    with torch.no_grad():
        error = float((model(x, process.t_max) - truth).square().mean().sqrt())
        assert error < 0.1 * float((untrained - truth).square().mean().sqrt())
    sds.save(model, tmp_path / "map.safetensors")
    other = sds.VP()
    with pytest.raises(ValueError, match="process of the map"):
        sds.load(sds.FlowMap(Affine(other), other), tmp_path / "map.safetensors")


MAP = sds.FlowMap(lambda x, s, t: x, sds.VP())
X = torch.ones(3, 2)
REFUSED = {
    "upwards": (lambda: MAP(X, 0.1, 0.5), ValueError, "from s to t <= s"),
    "grid": (lambda: MAP.sample((3, 2), seed=0, grid=torch.tensor([0.1, 0.5])), ValueError, "grid must decrease"),
    "beyond": (lambda: MAP.sample((3, 2), seed=0, grid=torch.tensor([1.5, 0.5])), ValueError, "t_max"),
    "shape": (lambda: sds.FlowMap(lambda x, s, t: x[:, :1], sds.VP())(X, 0.5), ValueError, "shape of its state"),
    "process": (lambda: sds.FlowMap(lambda x, s, t: x, 3), TypeError, "forward process"),
    "net": (lambda: sds.FlowMap(3, sds.VP()), TypeError, "net must be a function"),
    "teacher": (lambda: sds.FlowMapDistillation(3), TypeError, "teacher must be a score"),
    "as a score": (lambda: sds.sample(sds.VP(), MAP, (3, 2), steps=4, seed=0), TypeError, r"draw by model.sample\("),
    "as a threshold's": (
        lambda: sds.sample_in_parallel(
            sds.VP(), sds.ThresholdedScore(sds.VP(), MAP, sds.Clip(-1, 1)), (3, 2), solver=sds.DDIM(), steps=4, seed=0
        ),
        TypeError,
        "is no score",
    ),
    "likelihood": (lambda: sds.log_likelihood(sds.VP(), MAP, X), TypeError, "is no score"),
    "map as teacher": (lambda: sds.FlowMapDistillation(MAP), TypeError, "a FlowMap is none"),
    "share": (lambda: sds.FlowMapDistillation(MAP, to_data=2), ValueError, "must be a share"),
    "steps": (lambda: sds.FlowMapDistillation(MAP, 0), ValueError, "steps"),
    "student": (lambda: sds.FlowMapDistillation(DATA.score(sds.VP()))(X, X, seed=0), TypeError, "trains a FlowMap"),
    "another process": (
        lambda: sds.FlowMapDistillation(DATA.score(sds.EDM()))(MAP, X, seed=0),
        ValueError,
        "make both for one process",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()
