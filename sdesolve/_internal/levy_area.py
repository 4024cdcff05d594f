"""Levy areas of Brownian motion over a step, given its increments and space-time areas; and how steps compose."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, final, get_args

import torch
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number

AreaMethod = Literal["foster", "mrongowius-roessler"]
METHODS = get_args(AreaMethod)
Areas = AreaMethod | Literal["zero"]
Numbers = tuple[Literal["normal", "two-point", "three-point"], int]

# Variances of W, H and K over a step of unit length; the scale of each is the square root of the step's length.
VARIANCES = {"W": 1.0, "H": 1.0 / 12.0, "K": 1.0 / 720.0}


@final
@dataclasses.dataclass(frozen=True)
class LevyArea:
    r"""``A_lk = 1/2 int (W^l dW^k - W^k dW^l)`` over a step, drawn from its law given ``W`` and ``H``.

    ``foster``: ``A = H x W - W x H + 12 (K x H - H x K) + b`` with ``(u x v)_lk = u_l v_k``. The first three terms are
    the mean given ``W, H, K``. ``b_lk = sigma_lk z_lk`` has the right variance, and the right fourth moments of ``A``:
    ``sigma_lk^2 = h^2 [3 (C_l + c) (C_k + c) + 144 (K_l^2 + K_k^2) / h] / 28`` with exponential ``C_l`` of mean 8/15,
    ``c = 1/sqrt 3 - 8/15``, and ``z_lk`` of mean 0, variance 1 and fourth moment 1.6598. Foster 2020, "Numerical
    approximations for stochastic differential equations", definition 7.3.5. Right in law to these moments, at a fixed
    cost: ``2 m + m (m - 1) / 2`` normals for ``m`` channels. For expectations and samples.

    ``mrongowius-roessler``: the Fourier series of the Brownian bridge to ``n`` terms, given ``W`` and ``H``, and a
    normal a pair for the rest: ``A = H x W - W x H + h [sum_k (X_k x Y_k - Y_k x X_k) / k + a G] / (2 pi)``, where
    ``a^2 = 2 sum_{k > n} 1 / k^2`` and the ``X_k`` are drawn given ``H``. Its error is ``sqrt(m / 12) h / (pi n)``,
    root mean square, or ``h^(3/2)`` with ``n = sqrt(m / (12 h)) / pi``, for ``2 m n + m + m (m - 1) / 2`` normals.
    Mrongowius and Roessler 2022, "On the approximation and simulation of iterated stochastic integrals", section 4.

    Attributes:
        method: ``foster`` or ``mrongowius-roessler``.
        terms: of the Fourier series.

    Raises:
        ValueError: an unknown method, or no terms.
    """

    method: AreaMethod
    terms: int = 10

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            names = ", ".join(map(repr, METHODS))
            raise ValueError(f"area must be one of {names}, 'zero', or None, got {short(self.method)}")
        whole_number(self.terms, "terms", 1)

    def numbers(self, m: int) -> int:
        """Normals that the area of ``m`` channels takes a step, beside those of ``W``, ``H`` and ``K``."""
        pairs = m * (m - 1) // 2
        return 2 * m + pairs if self.method == "foster" else 2 * m * self.terms + m + pairs

    def draw(self, W: Tensor, H: Tensor, K: Tensor, z: Tensor) -> Tensor:
        """``A: (..., m, m)`` for steps of unit length, from ``W, H, K: (..., m)`` and ``z: (..., numbers(m))``."""
        m = W.shape[-1]
        mean = antisymmetric(H, W)
        own, pairs = z[..., : -(m * (m - 1) // 2) or None], z[..., z.shape[-1] - m * (m - 1) // 2 :]
        if self.method == "foster":
            own = own.unflatten(-1, (2, m)).square().sum(-2)
            C = 8.0 / 30.0 * own + (3.0**-0.5 - 8.0 / 15.0)
            squares = 144.0 / 28.0 * K * K
            variance = 3.0 / 28.0 * (C[..., :, None] * C[..., None, :]) + (
                squares[..., :, None] + squares[..., None, :]
            )
            return mean + 12.0 * antisymmetric(K, H) + variance.sqrt() * matrix(_sub_gaussian(pairs), m)
        n = self.terms
        k = [1.0 / (i + 1) for i in range(n)]
        a = math.sqrt(2.0 * (math.pi**2 / 6.0 - sum(1.0 / (i + 1) ** 2 for i in range(n))))
        X, Y = own[..., : 2 * m * n].unflatten(-1, (n, 2, m)).unbind(-2)
        tail = own[..., 2 * m * n :]
        # sum_k X_k / k with what lies beyond n has to be sqrt 2 pi H; its variance is pi^2 / 6.
        given = math.sqrt(2.0) * math.pi * H
        excess = given - sum((c * X[..., i, :] for i, c in enumerate(k)), a / math.sqrt(2.0) * tail)
        area = a * matrix(pairs, m)
        for i, c in enumerate(k):
            area = area + c * antisymmetric(X[..., i, :] + 6.0 / math.pi**2 * c * excess, Y[..., i, :])
        return mean + area / (2.0 * math.pi)


def antisymmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a_l b_k - a_k b_l``: ``(..., m, m)``."""
    return a[..., :, None] * b[..., None, :] - a[..., None, :] * b[..., :, None]


def matrix(pairs: Tensor, m: int) -> Tensor:
    """The antisymmetric matrix with these entries above its diagonal, row by row."""
    zero = torch.zeros_like(pairs[..., :1]) if m > 1 else pairs.new_zeros(*pairs.shape[:-1], 1)
    place = {pair: i for i, pair in enumerate((l, k) for l in range(m) for k in range(l + 1, m))}  # noqa: E741
    columns = [
        pairs[..., i : i + 1] if (i := place.get((l, k))) is not None else
        -pairs[..., place[k, l] : place[k, l] + 1] if l != k else zero
        for l in range(m) for k in range(m)  # noqa: E741
    ]  # fmt: skip
    return torch.cat(columns, -1).unflatten(-1, (m, m))


def _sub_gaussian(z: Tensor) -> Tensor:
    """From normals: uniform on ``(-sqrt 3, sqrt 3)`` with chance 21130/25621, else +-1."""
    u, p = torch.erf(z * 0.5**0.5), 21130.0 / 25621.0
    return torch.where(u.abs() < p, 3.0**0.5 / p * u, torch.sign(u))


@functools.lru_cache(64)
def composition(part: str, r: int) -> dict[str, list[float]]:
    """A part of a step of length ``r`` from those of its ``r`` pieces of unit length: for each part, its weights.

    From ``h H = sum_i [h_i H_i + (T - t_{i + 1/2}) W_i] - h W / 2`` and the like for ``K``.
    """
    c = [r / 2 - i - 1 / 2 for i in range(r)]  # from the middle of a piece to that of the step
    if part == "W":
        return {"W": [1.0] * r}
    if part == "H":
        return {"W": [c[i] / r for i in range(r)], "H": [1 / r] * r}
    later = [(i + 1) * (i - r + 1) / 2 for i in range(r)]  # sum of c_j over j > i
    W = [(c[i] / 2 - 1 / 12 + later[i] + r * r / 12) / r**2 for i in range(r)]
    return {"W": W, "H": [x / r**2 for x in c], "K": [1 / r**2] * r}


def composed_area(areas: Callable[[int], Tensor], W: Callable[[int], Tensor], r: int) -> Tensor:
    """The area of a step from the areas and increments of its ``r`` pieces, by Chen's relation."""
    total, before = areas(0), W(0)
    for i in range(1, r):
        total = total + areas(i) + 0.5 * antisymmetric(before, W(i))
        before = before + W(i)
    return total


def weighted_sum(weights: Sequence[float], terms: Callable[[int], Tensor]) -> Tensor:
    """``sum_i weights_i terms(i)``, one after another, so that the order of the sum is the same everywhere."""
    total = None
    for i, w in enumerate(weights):
        term = terms(i) if w == 1.0 else w * terms(i)
        total = term if total is None else total + term
    assert total is not None
    return total
