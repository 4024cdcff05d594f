"""Replacement: the observed part of the state is steered as if nothing else were known of it."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve.inverse.base import AbstractPosteriorScore
from sdesolve.reverse import evaluated
from sdesolve.sde import per_sample


@final
class Replacement(AbstractPosteriorScore):
    r"""``(I - A^+ A) score + A^T (sigma^2 A A^T + alpha^2 noise_std^2 I)^-1 (alpha y - A x)``.

    Within the observed subspace, the score of ``A x_t = alpha y + N(0, sigma^2 A A^T + alpha^2 noise_std^2 I)``, what a
    noised observation is if the prior says nothing of it; outside, the prior's score at the state with that observed
    part. So the observed part follows a noising path of ``y`` backwards, as when it is overwritten with one (Song et
    al. 2021, appendix I.2; that draws an independent ``y_t`` for every step, here it is one path, and any solver can
    follow it). Exact if ``noise_std = 0`` and observed and unobserved part are independent; biased where they are not,
    since the past of the unobserved part was never corrected for what the observation says of it.

    The denoised state of this score, with which `sample` ends, has the observation itself as its observed part when
    ``noise_std = 0``, and in the unobserved part no noise either.

    Args:
        score: ``grad_x log p_t(x)`` of the prior.
        process: the forward process.
        operator: ``A``.
        y: ``(*observation)`` or ``(batch, *observation)``.
        noise_std: of the observation; may be 0.

    Raises:
        TypeError, ValueError: as `AbstractPosteriorScore`.
    """

    def combine(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        A = self.operator
        alpha, sigma = self.coefficients(x, t)
        s = evaluated(self.score, x, t)
        residual = per_sample(alpha, y) * y - A(x)
        noise = alpha.square() * self.noise_std**2
        pull = A.adjoint(A.solve_gram(residual, sigma.square(), noise.expand_as(sigma)))
        return s - A.pseudo_inverse(A(s)) + pull
