"""An objective of your own, in one file: denoising with an absolute error.

An objective is one subclass of `Objective` with the loss of each sample, made of numbers that are functions of ``seed``
and of the sample's number, and a text that names its settings. `train` then resumes it, splits it and averages it.
"""

from typing import final

import torch

import sdesolve as sds


@final
class AbsoluteDenoising(sds.Objective):
    """``mean |sigma s(x_t, t) + z|`` over the elements of ``x_t = alpha x_0 + sigma z``, at uniform times."""

    def __init__(self, process):
        self.process = process

    def times(self, score, x0, *, seed, first_sample=0):
        return sds.TrainingTimes(self.process).draw(score, x0, seed=seed, first_sample=first_sample)

    def per_sample(self, score, x0, *, seed, first_sample=0):
        t = self.times(score, x0, seed=seed, first_sample=first_sample)
        path = sds.BrownianPath(seed, first_path=first_sample, stream=200)
        z = path.increments(torch.tensor([0.0, 1.0]), tuple(x0.shape), dtype=x0.dtype)[0]
        alpha, sigma = (c.to(x0)[:, None] for c in (self.process.alpha(t), self.process.sigma(t)))
        return (sigma * score(alpha * x0 + sigma * z, t) + z).abs().flatten(1).mean(1)

    def __repr__(self):
        return f"AbsoluteDenoising({self.process!r})"


PROCESS = sds.VP()


def test_it_trains_a_score_and_resumes_to_the_same_bits(tmp_path):
    data = torch.linspace(-1, 1, 64)[:, None]

    def trained(steps, **options):
        torch.manual_seed(0)
        score = sds.NetworkScore(sds.nn.MLP(1, width=16, depth=1), PROCESS)
        run = sds.train(score, data, loss=AbsoluteDenoising(PROCESS), steps=steps, batch_size=16, seed=1, **options)
        return score, run

    before = AbsoluteDenoising(PROCESS)(trained(1)[0], data, seed=5)
    whole, _ = trained(60)
    assert AbsoluteDenoising(PROCESS)(whole, data, seed=5) < before
    trained(30, checkpoint=tmp_path)
    again, _ = trained(60, checkpoint=tmp_path)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
