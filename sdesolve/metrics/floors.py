"""The floor of a metric: what two samples of one law score, by chance alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from sdesolve_kernels import Stream, uniform
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.metrics.samples import samples


class Floor(NamedTuple):
    """What a metric makes of two samples of one law; 0-d float64.

    Attributes:
        mean: over the rounds.
        std: between the rounds; nan for one round.
        values: of every round, ``(rounds,)``.
    """

    mean: Tensor
    std: Tensor
    values: Tensor


@survives_forks
def sample_floor(
    metric: Callable[[Tensor, Tensor], Tensor],
    data: Tensor,
    sizes: tuple[int, int] | None = None,
    *,
    rounds: int = 20,
    seed: int = 0,
) -> Floor:
    """The metric between two disjoint random parts of one sample, of the sizes that it is to be judged at.

    No distance between samples of these sizes can be told from 0 below ``mean`` plus some two ``std``; precision and
    recall have a ceiling in the same sense. Rounds share the data, so ``std`` is between splits of this sample, not
    between fresh ones.

    Args:
        metric: a function of two samples, such as `sliced_wasserstein`; of what returns more, take one part:
            ``lambda a, b: precision_recall(a, b).recall``.
        data: real samples, ``(n, *state)``.
        sizes: of both parts, together at most ``n``; halves by default.
        rounds: how many splits.
        seed: of the splits.

    Raises:
        ValueError: fewer data than both parts need, no round, a metric that returns no single number, values that are
            not finite.
        TypeError: ``metric`` is not callable, sizes that are not integers.

    Example:
        >>> floor = sample_floor(frechet_distance, features, (500, 500))
    """
    if not callable(metric):
        raise TypeError(f"metric must be a function of two samples, got {type(metric).__name__}")
    x = samples(data, "data", 2)
    n, m = (len(x) // 2, len(x) // 2) if sizes is None else sizes
    n, m = whole_number(n, "sizes[0]", 1), whole_number(m, "sizes[1]", 1)
    if n + m > len(x):
        raise ValueError(f"parts of {n} and {m} need {n + m} samples that are all different, data has {len(x)}")
    values = []
    for k in range(whole_number(rounds, "rounds", 1)):
        u = uniform(1, len(x), seed=seed, stream=Stream.DATA_ORDER, first_path=k, dtype=torch.float64)
        order = u[0].argsort(stable=True).to(x.device)
        value = torch.as_tensor(metric(x[order[:n]], x[order[n : n + m]]))
        if value.ndim:
            raise ValueError(
                f"the metric must return a single number, got shape {tuple(value.shape)}; take one part of it in a "
                "lambda"
            )
        values.append(value.double().cpu())
    stacked = torch.stack(values)
    return Floor(stacked.mean(), stacked.std(), stacked)
