"""Interpolants between Gaussians and mixtures of them, in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, real, short
from sdesolve.diffusions.base import as_time
from sdesolve.flows.interpolant import Coefficients, StochasticInterpolant
from sdesolve.scores import Gaussian, GaussianMixture
from sdesolve.scores.base import check_state, flat
from sdesolve.sde import State, Time


class _Law(NamedTuple):
    weights: Tensor
    means: Tensor
    covs: Tensor


class _At(NamedTuple):
    """Components at some times: responsibilities ``(rows, K)``, ``S^-1 (x - m)`` as ``(rows, K, d)``, log densities."""

    share: Tensor
    y: Tensor
    log_prob: Tensor


@final
class ExactInterpolant:
    r"""Velocity, score and density of a `StochasticInterpolant` between two Gaussians or Gaussian mixtures.

    The ends of each pair ``(i, j)`` of components are jointly normal, so ``x_t`` is a mixture of normal laws of means
    ``m = alpha m_i + beta m_j`` and covariances ``S = alpha^2 C_i + beta^2 C_j + alpha beta (C_ij + C_ij^T) + gamma^2
    I``, under each of which ``E[x_0 | x_t] = m_i + (alpha C_i + beta C_ij) S^-1 (x - m)`` and the like. Everything is
    computed in float64 and has the dtype of ``x: (batch, *state)``; ``t`` is ``()`` or ``(batch,)``, the source at 0.
    What ``flow_and_score`` gives goes into `FlowSDE`.

    Args:
        interpolant: the coefficients.
        source: law of ``x_0``, a `Gaussian` or `GaussianMixture`.
        target: law of ``x_1``, likewise; independent of ``x_0`` unless there is ``cross``.
        cross: covariance ``(d, d)`` of ``x_0`` and ``x_1`` over the flattened state, of two Gaussians.

    Raises:
        TypeError: an argument of another type.
        ValueError: states of different shapes; a ``cross`` that no pair of these laws has, or with mixtures.
    """

    def __init__(
        self,
        interpolant: StochasticInterpolant,
        source: Gaussian | GaussianMixture,
        target: Gaussian | GaussianMixture,
        *,
        cross: Tensor | None = None,
    ) -> None:
        if not isinstance(interpolant, StochasticInterpolant):
            raise TypeError(f"interpolant must be a StochasticInterpolant, got {kind_of(interpolant)}")
        one, other = _law(source, "source"), _law(target, "target")
        if source.state_shape != target.state_shape:
            raise ValueError(
                f"source and target must have states of one shape, got {source.state_shape} and {target.state_shape}"
            )
        self.interpolant, self.source, self.target = interpolant, source, target
        K0, K1, d = len(one.means), len(other.means), one.means.shape[1]
        self._log_weights = (one.weights[:, None] * other.weights).flatten().log()
        self._m0, self._m1 = one.means.repeat_interleave(K1, 0), other.means.repeat(K0, 1)
        self._c00, self._c11 = one.covs.repeat_interleave(K1, 0), other.covs.repeat(K0, 1, 1)
        self._c01 = torch.zeros_like(self._c00)
        if cross is not None:
            cross = real(cross, "cross")
            if K0 * K1 != 1 or cross.shape != (d, d):
                raise ValueError(
                    f"cross is the covariance ({d}, {d}) between two Gaussians, got shape {tuple(cross.shape)} and "
                    f"{K0} and {K1} components"
                )
            joint = torch.cat([torch.cat([self._c00[0], cross], 1), torch.cat([cross.mT, self._c11[0]], 1)])
            least = float(torch.linalg.eigvalsh(joint).min())
            if least < -1e-8 * float(joint.abs().max()):
                raise ValueError(
                    f"no pair of these laws has this cross-covariance: an eigenvalue of theirs is {least:.4g}"
                )
            self._c01 = cross[None]

    @property
    def cross(self) -> Tensor:
        """The covariance of ``x_0`` and ``x_1`` within each pair of components; ``(d, d)`` for two Gaussians."""
        return self._c01[0] if len(self._c01) == 1 else self._c01

    def velocity(self, x: State, t: Time | float) -> Tensor:
        """``b(x, t) = E[alpha' x_0 + beta' x_1 + gamma' z | x_t = x]``, of the shape of ``x``."""
        return self.flow_and_score(x, t)[0]

    def score(self, x: State, t: Time | float) -> Tensor:
        """``grad log p_t(x)``, of the shape of ``x``."""
        return self.flow_and_score(x, t)[1]

    def log_prob(self, x: State, t: Time | float) -> Tensor:
        """``log p_t(x)`` in nats, ``(batch,)``."""
        return self._at(x, self._coefficients(x, t)).log_prob.to(x.dtype)

    def ends(self, x: State, t: Time | float) -> tuple[Tensor, Tensor]:
        """``E[x_0 | x_t = x]`` and ``E[x_1 | x_t = x]``, of the shape of ``x``."""
        c = self._coefficients(x, t)
        return tuple(e.reshape(x.shape).to(x.dtype) for e in self._ends(c, self._at(x, c)))  # type: ignore[return-value]

    def flow_and_score(self, x: State, t: Time | float) -> tuple[Tensor, Tensor]:
        """`velocity` and `score`."""
        c = self._coefficients(x, t)
        at = self._at(x, c)
        x0, x1 = self._ends(c, at)
        s = -(at.share[..., None] * at.y).sum(1)
        alpha_rate, beta_rate, product = (k.reshape(-1, 1) for k in (c.alpha_rate, c.beta_rate, c.gamma_product))
        b = alpha_rate * x0 + beta_rate * x1 - product * s
        return b.reshape(x.shape).to(x.dtype), s.reshape(x.shape).to(x.dtype)

    def _coefficients(self, x: Tensor, t: Tensor | float) -> Coefficients:
        check_state(x, self.source.state_shape)
        t = as_time(t)
        if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x)):
            raise ValueError(f"t must be a number or one time per sample, ({len(x)},), got shape {tuple(t.shape)}")
        return self.interpolant.coefficients(t.double().to(x.device))

    def _at(self, x: Tensor, c: Coefficients) -> _At:
        alpha, beta, gamma = (k.reshape(-1, 1, 1, 1) for k in c[:3])
        c00, c11, c01 = (k.to(x.device) for k in (self._c00, self._c11, self._c01))
        eye = torch.eye(c00.shape[-1], dtype=torch.float64, device=x.device)
        S = alpha**2 * c00 + beta**2 * c11 + alpha * beta * (c01 + c01.mT) + gamma**2 * eye
        L = torch.linalg.cholesky(S)
        m = alpha[..., 0] * self._m0.to(x.device) + beta[..., 0] * self._m1.to(x.device)
        r = flat(x).double()[:, None] - m
        P = torch.cholesky_inverse(L)
        y = torch.einsum("kij,rkj->rki", P[0], r) if len(P) == 1 else torch.einsum("rkij,rkj->rki", P, r)
        log_det = 2.0 * L.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        each = -0.5 * ((r * y).sum(-1) + log_det + r.shape[-1] * math.log(2.0 * math.pi))
        each = each + self._log_weights.to(x.device)
        return _At(each.softmax(1), y, each.logsumexp(1))

    def _ends(self, c: Coefficients, at: _At) -> tuple[Tensor, Tensor]:
        alpha, beta = (k.reshape(-1, 1, 1) for k in c[:2])
        m0, m1, c00, c11, c01 = (k.to(at.y.device) for k in (self._m0, self._m1, self._c00, self._c11, self._c01))

        def product(C: Tensor) -> Tensor:
            return torch.einsum("kij,rkj->rki", C, at.y)

        x0 = m0 + alpha * product(c00) + beta * product(c01)
        x1 = m1 + alpha * product(c01.mT) + beta * product(c11)
        return (at.share[..., None] * x0).sum(1), (at.share[..., None] * x1).sum(1)


def gaussian_bridge(source: Gaussian, target: Gaussian, noise: float) -> ExactInterpolant:
    r"""The Schroedinger bridge between two Gaussians for the reference process ``noise W``, in closed form.

    Of all processes that go from ``source`` at ``t = 0`` to ``target`` at ``t = 1``, the one nearest in relative
    entropy to Brownian motion of volatility ``noise``: a mixture of Brownian bridges whose ends have the covariance
    ``(A^(1/2) D A^(-1/2) - noise^2 I) / 2``, ``D = (4 A^(1/2) B A^(1/2) + noise^4 I)^(1/2)``, of the entropic optimal
    transport with the kernel ``exp(-|x - y|^2 / (2 noise^2))`` (Janati et al. 2020, theorem 1; Bunne et al. 2023,
    theorem 3). ``FlowSDE(gaussian_bridge(...), noise)`` is its SDE in both directions.

    Args:
        source: ``N(a, A)``, ``A`` positive definite.
        target: ``N(b, B)``.
        noise: volatility of the reference, positive.

    Raises:
        TypeError: a law that is no `Gaussian`.
        ValueError: states of different shapes, a singular ``A``, ``noise`` that is not positive and finite.
    """
    for name, law in (("source", source), ("target", target)):
        if not isinstance(law, Gaussian):
            raise TypeError(f"{name} must be a Gaussian, got {kind_of(law)}; the bridge of mixtures has no closed form")
    if not 0.0 < number(noise, "noise") < math.inf:
        raise ValueError(f"noise must be positive and finite, got {short(noise)}")
    if source.state_shape != target.state_shape:
        raise ValueError(
            f"source and target must have states of one shape, got {source.state_shape} and {target.state_shape}"
        )
    A, B = _law(source, "source").covs[0], _law(target, "target").covs[0]
    values, vectors = torch.linalg.eigh(A)
    if float(values.min()) <= 0.0:
        raise ValueError("the covariance of source is singular; add a small variance to it")
    root, inverse = ((vectors * p) @ vectors.mT for p in (values.sqrt(), values.rsqrt()))
    eye = torch.eye(len(A), dtype=torch.float64, device=A.device)
    inner, basis = torch.linalg.eigh(4.0 * root @ B @ root + noise**4 * eye)
    D = (basis * inner.clamp_min(0.0).sqrt()) @ basis.mT
    cross = 0.5 * (root @ D @ inverse - noise**2 * eye)
    return ExactInterpolant(StochasticInterpolant(noise), source, target, cross=cross)


def _law(law: Gaussian | GaussianMixture, name: str) -> _Law:
    if isinstance(law, GaussianMixture):
        return _Law(law.weights, law.means.reshape(len(law.means), -1), law.covs)
    if not isinstance(law, Gaussian):
        raise TypeError(f"{name} must be a Gaussian or a GaussianMixture, got {kind_of(law)}")
    d = law.mean.numel()
    return _Law(torch.ones(1, dtype=torch.float64, device=law.mean.device), law.mean.reshape(1, d), _matrix(law)[None])


def _matrix(law: Gaussian) -> Tensor:
    """The covariance ``(d, d)`` over the flattened state."""
    d, cov = law.mean.numel(), law.cov
    return cov if cov.shape == (d, d) else torch.diag(cov.flatten().expand(d))
