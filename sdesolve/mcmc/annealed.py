"""Langevin dynamics through a sequence of noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import flag, kind_of, short, whole_number
from sdesolve._internal.modes import in_evaluation
from sdesolve._internal.transforms import refuse_transforms
from sdesolve.brownian import AbstractStreams, BrownianPath, drawn_seed
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.checks import all_finite, check_drift, check_state
from sdesolve.integrate.solution import DivergenceError
from sdesolve.mcmc.base import Convention, ConventionName, check_step_size
from sdesolve.mcmc.overdamped import langevin_update
from sdesolve.reverse import Score


@final
class AnnealedLangevin:
    r"""Annealed Langevin dynamics: ``inner_steps`` steps towards each of the noised laws, from most noise to least.

    At noise level ``sigma_i`` the step size is ``eps_i = step_size sigma_i^2 / sigma_L^2``, with ``sigma_L`` the lowest
    level, and each step ``x + eps_i/2 s + sqrt(eps_i) z`` (``convention="half"``, as in the paper) or
    ``x + eps_i s + sqrt(2 eps_i) z`` (``"full"``, as in its sequel and in correctors: ``delta`` is twice as large for
    the same ``step_size``). Song and Ermon 2019, algorithm 1; Song and Ermon 2020, algorithm 1, which also ends with a
    denoising step.

    Args:
        sigmas: noise levels, decreasing, ``(L,)``.
        step_size: step size at the lowest level.
        inner_steps: steps at each level.
        convention: ``half`` or ``full`` (`Convention`).

    Raises:
        ValueError: levels that are not positive and decreasing, a step size that is not positive, no inner steps, an
            unknown convention.
        TypeError: ``inner_steps`` is not an integer.

    Example:
        >>> sampler = AnnealedLangevin(torch.logspace(0, -2, 10), 2e-5, 100)
        >>> x = sampler(VE(), score, VE().sample_prior((64, 2), seed=0), seed=0)
    """

    def __init__(
        self,
        sigmas: Sequence[float] | Tensor,
        step_size: float,
        inner_steps: int,
        *,
        convention: ConventionName = "half",
    ) -> None:
        self.sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
        if self.sigmas.ndim != 1 or len(self.sigmas) == 0 or not bool((self.sigmas > 0).all()):
            raise ValueError(f"sigmas must be noise levels, (L,) positive numbers, got {short(sigmas)}")
        if not bool((self.sigmas.diff() < 0).all()):
            raise ValueError(f"sigmas must decrease, from most noise to least, got {short(sigmas)}")
        self.convention = Convention.named(convention)
        self.step_size = check_step_size(step_size)
        self.inner_steps = whole_number(inner_steps, "inner_steps", 1)

    @property
    def step_sizes(self) -> Tensor:
        """``eps_i``, ``(L,)``, float64."""
        return self.step_size * (self.sigmas / self.sigmas[-1]).square()

    @torch.no_grad()
    @in_evaluation
    def __call__(
        self,
        process: AbstractDiffusion,
        score: Score,
        x0: Tensor,
        *,
        seed: int | None = None,
        noise: AbstractStreams | None = None,
        denoise: bool = False,
    ) -> Tensor:
        """Samples ``(batch, *state)`` from start states ``x0`` of that shape.

        Row ``i`` is a function of ``(seed, i)``; inner step ``j`` at level ``i`` takes draw ``i inner_steps + j`` of
        the corrector stream.

        Args:
            process: a diffusion with ``alpha = 1``, such as `VE` or `EDM`; it says at which time a level is met.
            score: ``grad_x log p_t(x)``.
            x0: start states; the paper's are uniform, `AbstractDiffusion.sample_prior` has the law of the top level.
            seed: of the noise; drawn from torch's default generator if not given.
            noise: paths instead of ``seed``.
            denoise: end with ``x + sigma_L^2 s``.

        Raises:
            ValueError: ``process`` scales data, or does not have all the levels; bad shapes.
            TypeError: bad types or dtypes.
            DivergenceError: a state stopped being finite.
        """
        refuse_transforms("AnnealedLangevin", "integrate process.reverse(score) with solve")
        check_state(x0)
        denoise = flag(denoise, "denoise")
        times = self._times(process).to(x0)
        if noise is None:
            noise = BrownianPath(drawn_seed() if seed is None else seed)
        elif seed is not None:
            raise ValueError("seed is short for noise=BrownianPath(seed); give one of them")
        elif not isinstance(noise, AbstractStreams):
            raise TypeError(f"noise must be a BrownianPath, got {kind_of(noise)}; a number goes to seed=")
        draws = noise.correctors(1)
        x, k = x0, 0
        for t, size in zip(times, self.step_sizes.tolist(), strict=True):
            for _ in range(self.inner_steps):
                s = score(x, t)
                if k == 0:
                    check_drift(s, x, t, "score")
                    _check_first(s, float(t))
                x = langevin_update(x, s, self.convention.step(size), draws, k)
                k += 1
            if not bool(x.isfinite().all()):
                raise DivergenceError(
                    f"a state stopped being finite at the noise level of t = {float(t):.6g}, where the step size is "
                    f"{size:.3g}; take a smaller one",
                    step=k - 1,
                    time=float(t),
                    path=int((~x.flatten(1).isfinite().all(1) if x.ndim > 1 else ~x.isfinite()).nonzero()[0]),
                )
        return x + self.sigmas[-1].square().to(x) * score(x, times[-1]) if denoise else x

    def _times(self, process: AbstractDiffusion) -> Tensor:
        if not isinstance(process, AbstractDiffusion):
            raise TypeError(f"process must be a diffusion such as VE(), got {type(process).__name__}")
        times = process.time_at_log_snr(-2.0 * self.sigmas.log())
        if not bool((process.alpha(times) == 1).all()):
            raise ValueError(
                f"annealed Langevin dynamics needs a process that leaves data unscaled, such as VE() or EDM(), and "
                f"{type(process).__name__} scales it; take a PredictorCorrector there"
            )
        if float(times[0]) > process.t_max * (1 + 1e-9):
            raise ValueError(
                f"{type(process).__name__} has noise levels up to {float(process.sigma(process.t_max)):.6g}, sigmas "
                f"starts at {float(self.sigmas[0]):.6g}"
            )
        return times


def _check_first(s: Tensor, t: float) -> None:
    if not all_finite(s):
        row = int((~s.isfinite()).reshape(len(s), math.prod(s.shape[1:])).any(1).nonzero()[0])
        message = f"the score is not finite at the start, t = {t:.6g}, for sample {row}"
        raise DivergenceError(message, step=0, time=t, path=row)
