"""A score of a continuous condition against the exact one; the benchmark of learned scores in small."""

from __future__ import annotations

import torch

import sdesolve as sds
from benchmarks.learned_scores import PROCESS, conditional, fisher_errors, split
from sdesolve.training.losses import LogNormalNoise


def test_a_learned_conditional_score_is_within_three_percent_of_the_exact_one():
    """Under 1% after the 8000 steps of the benchmark; here in 150, beside a score of all conditions at once."""
    data = conditional(1)
    x, c = split(data, data.sample(1 << 12, seed=0))
    torch.manual_seed(0)
    net = sds.nn.MLP(2, width=48, depth=2, embedding=sds.nn.FourierFeatures.log_spaced(8, 0.5, 8.0), values=1)
    score = sds.NetworkScore(net, PROCESS, "edm", sigma_data=float((x - x.mean(0)).square().mean().sqrt()))
    loss = sds.DenoisingScoreMatching("simple", "stratified", law=LogNormalNoise(-1.2, 1.6), antithetic=True)
    sds.train(
        score, {"x": x, "values": c}, loss=loss, steps=150, batch_size=256, lr=2e-2, warmup=20, decay="cosine",
        condition_dropout=0.1, progress=False, seed=0,
    )  # fmt: skip
    times = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    told = float(fisher_errors(score, data, times).mean())
    unknown = float(fisher_errors(sds.NetworkScore(Deaf(net), PROCESS, "edm", score.sigma_data), data, times).mean())
    assert told < 0.03
    assert unknown > 5 * told


class Deaf(torch.nn.Module):
    """The network, told nothing."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t, values=None):
        return self.net(x, t)


def test_the_exact_conditional_score_is_the_gradient_of_the_joint_density():
    data = conditional(2)
    x, c = split(data, data.sample(6, seed=1, dtype=torch.float64))
    t = torch.tensor(0.3, dtype=torch.float64)
    scale = torch.tensor([float(PROCESS.alpha(t))] * 2 + [1.0] * 2, dtype=torch.float64)
    noise = torch.diag(torch.tensor([float(PROCESS.sigma(t)) ** 2] * 2 + [0.0] * 2, dtype=torch.float64))
    covs = scale[:, None] * data.joint.covs * scale + noise
    noised = sds.GaussianMixture(scale * data.joint.means, covs=covs, weights=data.joint.weights)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(noised.log_prob(torch.cat([x, c], 1)).sum(), x)
    torch.testing.assert_close(data.score(c)(x.detach(), t), expected, rtol=1e-9, atol=1e-9)
