"""Normal laws given a linear observation: the arithmetic that `Gaussian` and `GaussianMixture` share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdesolve.inverse.operators import AbstractOperator, as_operator, check_noise_std, check_observation


class Conditioned(NamedTuple):
    """Normal laws ``N(mean_k, cov_k)`` given ``y``, float64.

    Attributes:
        mean: ``(K, d)``.
        cov: ``(K, d, d)``, symmetric.
        log_evidence: ``log N(y; A mean_k, A cov_k A^T + s^2 I)``, ``(K,)``, over the directions in which ``y`` varies.
        regular: whether that law of ``y`` has a density, ``(K,)``.
    """

    mean: Tensor
    cov: Tensor
    log_evidence: Tensor
    regular: Tensor


def condition(
    mean: Tensor,
    cov: Tensor,
    operator: AbstractOperator | Tensor,
    y: Tensor,
    noise_std: float,
    state_shape: tuple[int, ...],
) -> Conditioned:
    """The laws of ``x`` given ``y = A x + noise_std z``, for ``x ~ N(mean_k, cov_k)``: ``(K, d)`` and ``(K, d, d)``.

    ``mean + K (y - A mean)`` with the gain ``K = C A^T (A C A^T + s^2 I)^-1``, and the covariance as
    ``(I - K A) C (I - K A)^T + s^2 K K^T``, which stays positive where ``C - K A C`` would cancel.

    Raises:
        TypeError: no operator, no real tensor, no number.
        ValueError: what does not fit; an observation that no state could have led to.
    """
    A = as_operator(operator, state_shape).matrix()
    y = check_observation(as_operator(operator, state_shape), y, single=True).reshape(-1).cpu().double()
    s = check_noise_std(noise_std)
    S = A @ cov @ A.mT + s**2 * torch.eye(len(A), dtype=torch.float64)
    values, U = torch.linalg.eigh(S)
    positive = values > 10 * max(A.shape) * torch.finfo(torch.float64).eps * values.amax(-1, keepdim=True)
    residual = y - mean @ A.mT
    z = (U.mT @ residual[..., None])[..., 0]
    _check_possible(z, positive, float(y.abs().max()) + float((mean @ A.mT).abs().max()))
    inverse = torch.where(positive, 1.0 / torch.where(positive, values, 1.0), 0.0)
    gain = cov @ A.mT @ (U * inverse[:, None, :]) @ U.mT
    rest = torch.eye(A.shape[1], dtype=torch.float64) - gain @ A
    posterior = rest @ cov @ rest.mT + s**2 * gain @ gain.mT
    log_det = torch.where(positive, values, 1.0).log().sum(-1)
    log_evidence = -0.5 * ((z.square() * inverse).sum(-1) + log_det + positive.sum(-1) * math.log(2.0 * math.pi))
    return Conditioned(
        mean + (gain @ residual[..., None])[..., 0],
        0.5 * (posterior + posterior.mT),
        log_evidence,
        positive.all(-1),
    )


def _check_possible(z: Tensor, positive: Tensor, size: float) -> None:
    off = float(torch.where(positive, 0.0, z.abs()).max())
    if off > 1e-6 * size:
        raise ValueError(
            f"without noise this observation is impossible: it is off by {off:.3g} in a direction in which A x cannot "
            "vary; give a positive noise_std, or leave out rows that depend on others"
        )
