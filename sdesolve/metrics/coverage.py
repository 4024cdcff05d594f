"""Precision and recall of a sample: is what was drawn real, and is all that is real drawn?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sdesolve_kernels.threads import survives_forks
from torch import Tensor

from sdesolve._internal.arguments import whole_number
from sdesolve.metrics.samples import Features, Samples, flat_pair

_BLOCK_ELEMENTS = 1 << 22


class PrecisionRecall(NamedTuple):
    """Shares between 0 and 1; 0-d float64.

    Attributes:
        precision: of generated samples, those within the support of the real ones.
        recall: of real samples, those within the support of the generated ones.
    """

    precision: Tensor
    recall: Tensor


@survives_forks
def precision_recall(
    real: Samples,
    generated: Samples,
    *,
    neighbours: int = 3,
    features: Features | None = None,
    batch_size: int = 256,
) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    The support of a sample is taken for the union of balls around its points, each reaching to the point's
    ``neighbours``-th nearest neighbour in the same sample. Two samples of one law do not score 1: quote
    ``sample_floor`` beside it. Time ``O((n + m)^2)``, memory in blocks.

    Args:
        real: ``(n, *state)``; features of a network, for images.
        generated: ``(m, *state)``; as many as real ones, for the balls shrink as a sample grows.
        neighbours: which neighbour a ball reaches to.
        features: of a batch of samples, ``(batch, ...)``, to compare in place of the samples: a network such as
            Inception's, in evaluation mode here. Samples may then come in batches: a list, or a loader.
        batch_size: samples that features are made of at once.

    Raises:
        ValueError: not more samples than ``neighbours``, states of different shapes, values that are not finite.
        TypeError: ``neighbours`` is not an integer.
    """
    k = whole_number(neighbours, "neighbours", 1)
    a, b = flat_pair(real, generated, k + 1, features, batch_size)
    return PrecisionRecall(_share_within(b, a, k), _share_within(a, b, k))


def _share_within(points: Tensor, centres: Tensor, k: int) -> Tensor:
    rows = max(1, _BLOCK_ELEMENTS // len(centres))
    # Each centre is its own nearest neighbour, at distance 0.
    radii = torch.cat([_distances(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(rows)])
    inside = torch.cat([(_distances(part, centres) <= radii).any(1) for part in points.split(rows)])
    return inside.double().mean()


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
