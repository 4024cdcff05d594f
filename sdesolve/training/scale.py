"""Warnings of data that are far from the scale that a process or a parameterisation expects."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

from torch import Tensor, nn

from sdesolve.chains.base import ChainScore
from sdesolve.scores.network import NetworkScore

_FAR = 5.0  # times larger or smaller
_UNIT = (0.5, 2.0)  # a last noise level for which data of unit scale are meant


class _Ends(NamedTuple):
    """``x_T = alpha x_0 + sigma z`` where sampling starts from ``N(0, prior^2 I)``; and the least noise there is."""

    alpha: float
    sigma: float
    prior: float
    least: float

    def missed(self, mean: float, std: float) -> bool:
        """Whether the law of ``x_T`` is another than the prior."""
        variance = (self.alpha * std) ** 2 + self.sigma**2
        return abs(variance / self.prior**2 - 1.0) > 0.1 or self.alpha * abs(mean) > 0.2 * self.prior


def warn_of_scale(score: nn.Module, x0: Tensor) -> None:
    """Warns of data, as the score gets them, that it will hardly learn or that sampling does not start from.

    Networks are made for data of about unit scale on processes that end with noise of unit scale, and with
    ``predicts="edm"`` for ``sigma_data``: a factor of 5 is far from it. The start of sampling is wrong where what is
    left of the data at ``t_max`` changes the variance by a tenth, or the mean by a fifth of the standard deviation; and
    data that vary less than the noise at ``t_min`` are never seen.

    Args:
        score: what is trained.
        x0: some of the data, ``(samples, *state)``, normalised.
    """
    mean, std = float(x0.detach().double().mean()), float(x0.detach().double().std(correction=0))
    size = math.hypot(mean, std)
    if not (0.0 < std < math.inf and isinstance(score, NetworkScore | ChainScore)):
        return
    if isinstance(score, ChainScore):
        chain, who = score.chain, type(score.chain).__name__
        ends = _Ends(float(chain.alpha[-1]), float(chain.sigma[-1]), chain.prior.std, float(chain.sigma[1]))
    else:
        process, who = score.process, f"{type(score.process).__name__} with predicts={score.predicts!r}"
        alpha, sigma = (float(c(process.t_max)) for c in (process.alpha, process.sigma))
        ends = _Ends(
            alpha, sigma, process.prior.std, float(process.sigma(process.t_min) / process.alpha(process.t_min))
        )
    edm = isinstance(score, NetworkScore) and score.predicts == "edm"
    expected = score.sigma_data if isinstance(score, NetworkScore) and edm else 1.0
    told = f"sigma_data={expected:g}" if edm else f"{who} is made for about 1"
    if (edm or _UNIT[0] <= ends.sigma <= _UNIT[1]) and not (expected < _FAR * std and size < _FAR * expected):
        wrong = f"and {told}"
    elif ends.missed(mean, std):
        law = f"{ends.alpha * mean:.3g} and {math.hypot(ends.alpha * std, ends.sigma):.3g}"
        wrong = f"which at the end leaves {law}, where {who} starts to sample from 0 and {ends.prior:.3g}"
    elif std < ends.least:
        wrong = f"and {who} has noise of {ends.least:.3g} where it stops"
    else:
        return
    if ends.missed(0.0, 1.0):
        advice = "take a process that runs on to more noise"
    elif edm and abs(mean) < std and not ends.missed(mean, std):
        advice = f"give NetworkScore sigma_data={std:.3g}, or normalizer=Normalizer.fit(data)"
    elif isinstance(score, NetworkScore):
        advice = "give NetworkScore normalizer=Normalizer.fit(data), whose inverse makes data of samples"
    else:
        advice = "subtract their mean and divide by their deviation first"
    warnings.warn(
        f"the data have mean {mean:.3g} and standard deviation {std:.3g}, {wrong}. Learning and samples suffer: "
        f"{advice}",
        stacklevel=4,
    )
