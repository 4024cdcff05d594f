"""What is kept of many paths in place of each: moments, quantiles, counts, statistics of features."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, whole_number


class AbstractReduction(abc.ABC):
    """A summary of values over paths that merges: of a block, then of all blocks in their order.

    Subclasses give three methods; what a block leaves is a dictionary of tensors on the host, which a store can keep.
    """

    @abc.abstractmethod
    def of(self, values: Tensor) -> dict[str, Tensor]:
        """The summary of ``values: (paths, *rest)``."""

    @abc.abstractmethod
    def merged(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        """The summary of the paths of ``a``, then those of ``b``."""

    @abc.abstractmethod
    def read(self, summary: dict[str, Tensor]) -> Any:
        """What the user gets."""


@dataclasses.dataclass(frozen=True)
class MergedMoments:
    """Mean and variance over all paths of a run.

    Attributes:
        count: of paths.
        mean: float64, of the shape of what one path leaves.
        variance: unbiased, float64, likewise.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @property
    def standard_error(self) -> Tensor:
        """Of the mean."""
        return (self.variance / max(self.count, 1)).sqrt()


@final
@dataclasses.dataclass(frozen=True)
class Moments(AbstractReduction):
    """Mean and variance, by count, mean and sum of squared deviations of each block in float64.

    Blocks are merged in their order (Chan, Golub and LeVeque 1983, eq. 2.1), so the result has the same bits whoever
    did which block.
    """

    def of(self, values: Tensor) -> dict[str, Tensor]:
        x = values.detach().to("cpu", torch.float64)
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1:])
        return {"count": torch.tensor(len(x)), "mean": mean, "m2": (x - mean).square().sum(0)}

    def merged(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        n, m = int(a["count"]), int(b["count"])
        if not n or not m:
            return a if n else b
        shift = b["mean"] - a["mean"]
        return {
            "count": torch.tensor(n + m),
            "mean": a["mean"] + shift * (m / (n + m)),
            "m2": a["m2"] + b["m2"] + shift.square() * (n * (m / (n + m))),
        }

    def read(self, summary: dict[str, Tensor]) -> MergedMoments:
        n = int(summary["count"])
        return MergedMoments(n, summary["mean"], summary["m2"] / (n - 1 if n > 1 else math.nan))


@final
@dataclasses.dataclass(frozen=True)
class FeatureMoments(AbstractReduction):
    r"""Mean and covariance of features, ``n``, ``sum z`` and ``sum z z^T`` in float64: what a Fréchet distance needs.

    ``result()`` has ``count``, ``mean`` and ``covariance``, and ``frechet_distance(other)``.

    Args:
        features: ``(paths, *state) -> (paths, d)``; the flattened values themselves by default.
    """

    features: Callable[[Tensor], Tensor] | None = None

    def of(self, values: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            z = _numbers(values) if self.features is None else self.features(values)
        if z.ndim != 2 or len(z) != len(values):
            raise ValueError(
                f"features must be (paths, d), a row for each of {len(values)} values; got {tuple(z.shape)}"
            )
        z = z.detach().to("cpu", torch.float64)
        outer = torch.zeros(z.shape[1], z.shape[1], dtype=torch.float64)
        with _one_thread():  # several may cut the sum of a matrix product, and round it elsewhere
            for rows in z.split(1024):
                outer += rows.T @ rows
        return {"count": torch.tensor(len(z)), "sum": z.sum(0), "outer": outer}

    def merged(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: a[name] + b[name] for name in a}

    def read(self, summary: dict[str, Tensor]) -> MergedFeatures:
        n = int(summary["count"])
        mean = summary["sum"] / max(n, 1)
        spread = summary["outer"] - n * torch.outer(mean, mean)
        return MergedFeatures(n, mean, spread / (n - 1 if n > 1 else math.nan))


@dataclasses.dataclass(frozen=True)
class MergedFeatures:
    """Mean and covariance of features over all paths of a run.

    Attributes:
        count: of paths.
        mean: ``(d,)``, float64.
        covariance: ``(d, d)``, unbiased, float64.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    def frechet_distance(self, other: MergedFeatures) -> float:
        """The squared Wasserstein distance between the normal laws of these moments (Dowson and Landau 1982, eq. 4).

        Args:
            other: of the other run, or of data.
        """
        from sdesolve.metrics import bures_wasserstein

        return float(bures_wasserstein(self.mean, self.covariance, other.mean, other.covariance)) ** 2


@final
@dataclasses.dataclass(frozen=True)
class ValueHistogram(AbstractReduction):
    """Counts of values between edges, over paths, for each number of what a path leaves.

    ``result()`` is a tensor ``(*values, bins + 2)``, int64: below ``low``, in the bins ``[a, b)``, and from ``high``
    on; values that are nan are not counted.

    Args:
        low: of the first bin.
        high: end of the last bin.
        bins: how many of equal width.
    """

    low: float
    high: float
    bins: int = 100

    def __post_init__(self) -> None:
        low, high = number(self.low, "low"), number(self.high, "high")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low must be below high, and both finite; got {low} and {high}")
        whole_number(self.bins, "bins", 1)

    def of(self, values: Tensor) -> dict[str, Tensor]:
        flat = _numbers(values)
        edges = self.low + (self.high - self.low) * torch.arange(self.bins + 1, dtype=torch.float64) / self.bins
        edges[-1] = self.high
        place = torch.bucketize(flat, edges, right=True)  # 0 below, bins + 1 from high on
        place = torch.where(flat.isnan(), self.bins + 2, place)
        counts = torch.zeros(flat.shape[1], self.bins + 3, dtype=torch.int64)
        counts.scatter_add_(1, place.T.contiguous(), torch.ones_like(place.T, memory_format=torch.contiguous_format))
        return {"counts": counts[:, :-1].reshape(*values.shape[1:], self.bins + 2).contiguous()}

    def merged(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"counts": a["counts"] + b["counts"]}

    def read(self, summary: dict[str, Tensor]) -> Tensor:
        return summary["counts"]


@final
@dataclasses.dataclass(frozen=True)
class QuantileSketch(AbstractReduction):
    r"""Quantiles over paths to a relative accuracy, for each number of what a path leaves.

    Values are counted in bins ``(g^{k-1}, g^k]`` of their size, ``g = (1 + a) / (1 - a)``, by sign; whole counts merge
    to the same result in any order (Masson, Rim and Lee 2019, DDSketch, section 2). A quantile is that of some rank,
    within the fraction ``a`` of it.

    ``result()`` is a function: ``result()(0.95)`` is a tensor like what a path leaves.

    Args:
        accuracy: the ``a`` above, in ``(0, 0.5)``.
        smallest: what is smaller counts as 0.
        largest: what is larger counts as this.
    """

    accuracy: float = 0.005
    smallest: float = 1e-9
    largest: float = 1e9

    def __post_init__(self) -> None:
        a, low, high = (number(getattr(self, name), name) for name in ("accuracy", "smallest", "largest"))
        if not 1e-4 <= a < 0.5:
            raise ValueError(f"accuracy must be in [0.0001, 0.5), got {a}")
        if not 0 < low < high < math.inf:
            raise ValueError(f"0 < smallest < largest is needed, got {low} and {high}")

    @property
    def _growth(self) -> float:
        return math.log1p(self.accuracy) - math.log1p(-self.accuracy)

    @property
    def _bins(self) -> int:
        return math.ceil(math.log(self.largest / self.smallest) / self._growth) + 1

    def of(self, values: Tensor) -> dict[str, Tensor]:
        flat = _numbers(values)
        size = flat.abs()
        k = ((size.clamp(self.smallest, self.largest) / self.smallest).log() / self._growth).ceil().long()
        k = k.clamp(0, self._bins - 1)
        middle = self._bins
        place = torch.where(size < self.smallest, middle, middle + torch.where(flat < 0, -1, 1) * (k + 1))
        place = torch.where(flat.isnan(), 2 * self._bins + 1, place)
        counts = torch.zeros(flat.shape[1], 2 * self._bins + 2, dtype=torch.int64)
        counts.scatter_add_(1, place.T.contiguous(), torch.ones_like(place.T, memory_format=torch.contiguous_format))
        return {"counts": counts.reshape(*values.shape[1:], -1)}

    def merged(self, a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"counts": a["counts"] + b["counts"]}

    def read(self, summary: dict[str, Tensor]) -> Callable[[float], Tensor]:
        counts = summary["counts"][..., :-1]
        k = torch.arange(self._bins, dtype=torch.float64)
        upper = self.smallest * (k * self._growth).exp()
        sizes = torch.where(k == 0, self.smallest, upper * (2 / (1 + math.exp(self._growth))))
        points = torch.cat([-sizes.flip(0), sizes.new_zeros(1), sizes])
        total, below = counts.sum(-1), counts.cumsum(-1)

        def quantile(q: float) -> Tensor:
            """The quantile of level ``q`` in [0, 1]; nan where nothing was counted."""
            if not 0 <= number(q, "q") <= 1:
                raise ValueError(f"the level of a quantile is in [0, 1], got {q}")
            rank = (q * (total - 1).clamp(min=0)).floor().long()
            index = (below <= rank[..., None]).sum(-1).clamp(max=len(points) - 1)
            return torch.where(total > 0, points[index], math.nan)

        return quantile


def _numbers(values: Tensor) -> Tensor:
    """``(paths, numbers of each)`` in float64 on the host."""
    return values.detach().to("cpu", torch.float64).reshape(len(values), math.prod(values.shape[1:]))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def merge(reduction: AbstractReduction, summaries: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All summaries, merged from the first to the last."""
    made = summaries[0]
    for other in summaries[1:]:
        made = reduction.merged(made, other)
    return made
