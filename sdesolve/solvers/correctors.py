"""Correctors: steps of Langevin dynamics that leave a noised law alone, taken between the steps of a sampler."""

from __future__ import annotations

import abc
import enum
import math
import warnings
from collections.abc import Callable
from typing import Literal, final

import torch
from sdesolve_kernels import langevin_step
from sdesolve_kernels.library import has_tangent
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.brownian import AbstractNoise, BrownianPath, unit_normals
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.sde import Field, per_sample


class AbstractCorrector(abc.ABC):
    """A step that keeps the law ``p_t`` of a noised state, up to its own discretisation error.

    Attributes:
        affine: whether its step size is known beforehand, so that it is affine in state and noise if the score is.
    """

    affine: bool

    @abc.abstractmethod
    def scales(self, process: AbstractDiffusion, times: Tensor) -> Tensor:
        """What of the step size depends on time alone, at each of ``times``; float64, of their shape."""

    @abc.abstractmethod
    def correct(self, score: Field, x: Tensor, t: Tensor, scale: Tensor, noise: AbstractNoise, k: int) -> Tensor:
        """A state with the law of ``x: (batch, *state)`` at time ``t``, nearer to ``p_t``.

        Args:
            score: ``grad_x log p_t(x)``.
            x: state.
            t: ``()`` or ``(batch,)``.
            scale: of `scales`, in the dtype of ``x``.
            noise: of which draw ``k`` is for this step.
            k: index of the draw.
        """

    @abc.abstractmethod
    def check(self, x: Tensor) -> None:
        """Warns where the corrector is known to fail on states like ``x``."""


class Norms(enum.StrEnum):
    """Which norms a signal-to-noise ratio compares (`LangevinCorrector`)."""

    LEVEL = "level"
    BATCH = "batch"
    SAMPLE = "sample"
    DIMENSION = "dimension"


@final
class LangevinCorrector(AbstractCorrector):
    r"""``x' = x + delta s(x, t) + sqrt(2 delta) z``, with a step size ``delta`` from a signal-to-noise ratio or fixed.

    With ``snr = r`` the step is ``delta = 2 c(t) (r n / |s|)^2``, with ``n`` for the noise and ``|s|`` for the score:

    ============  ==========================  ======================  ==============================================
    norms         ``n``                       ``|s|``
    ============  ==========================  ======================  ==============================================
    level         ``sqrt(d)``                 ``sqrt(d) / sigma(t)``  ``delta = 2 c (r sigma)^2``, known beforehand
    batch         mean of ``|z_i|``           mean of ``|s_i|``       Song et al. 2021, algorithms 4, 5 and their code
    sample        ``|z_i|``                   ``|s_i|``               each sample's own
    dimension     ``E|z|``, about sqrt(d)     mean of ``|s_i|``
    ============  ==========================  ======================  ==============================================

    ``level`` puts in the size that the score of pure noise has. It is the step of the annealed Langevin corrector of
    that paper's code, and the only one that depends neither on who else is in the batch, nor on the noise: ``batch``
    and ``dimension`` shrink the steps of all when one score is large, and ``sample`` has steps without bound where a
    score comes near 0, which in one or two dimensions makes the chain diverge.

    With ``step_size`` instead, ``delta = c(t) step_size``.

    Args:
        snr: signal-to-noise ratio ``r``; 0.16 is the value of the paper for images.
        norms: ``level``, ``batch``, ``sample`` or ``dimension``.
        step_size: a fixed step size instead.
        scale: ``c(t)``, a function of float64 times, 1 by default. Song et al. take ``1 - beta_k`` of the step on VP,
            not the cumulated alpha.

    Raises:
        ValueError: both or neither of ``snr`` and ``step_size``, one that is not positive, norms for a fixed step size.

    Two correctors with the same settings are equal, as two solvers are.
    """

    def __init__(
        self,
        snr: float | None = None,
        norms: Literal["level", "batch", "sample", "dimension"] | None = None,
        *,
        step_size: float | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if (snr is None) == (step_size is None):
            raise ValueError("give snr, a signal-to-noise ratio such as 0.16, or step_size, a fixed one, and not both")
        if step_size is not None and norms is not None:
            raise ValueError(f"a fixed step size compares no norms, got norms={short(norms)}; give snr instead")
        for name, value in (("snr", snr), ("step_size", step_size)):
            if value is not None and not (isinstance(value, int | float) and 0.0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {short(value)}")
        self.snr, self.step_size, self.scale = snr, step_size, scale
        self.norms = None if snr is None else _norms("level" if norms is None else norms)
        fixed = self.norms in (None, Norms.LEVEL)
        self.affine = fixed
        self._mode = "fixed" if fixed else str(self.norms)
        self._size = float(step_size or 0.0) if snr is None else (2.0 * snr**2 if fixed else float(snr))

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self._settings().items() if value is not None)
        return f"LangevinCorrector({', '.join(given)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LangevinCorrector) and self._settings() == other._settings()

    def __hash__(self) -> int:
        return hash(tuple(self._settings().values()))

    def _settings(self) -> dict[str, object]:
        norms = None if self.norms is None else str(self.norms)
        return {"snr": self.snr, "norms": norms, "step_size": self.step_size, "scale": self.scale}

    def scales(self, process: AbstractDiffusion, times: Tensor) -> Tensor:
        c = torch.ones_like(times) if self.scale is None else torch.as_tensor(self.scale(times)).to(times)
        if c.shape != times.shape or not bool(((c >= 0) & c.isfinite()).all()):
            raise ValueError(
                f"scale must give one finite number that is not negative for each time, {tuple(times.shape)}, got "
                f"{tuple(c.shape)} from {float(c.min()):.3g} to {float(c.max()):.3g}"
            )
        return c * process.sigma(times).square() if self.norms is Norms.LEVEL else c

    def correct(self, score: Field, x: Tensor, t: Tensor, scale: Tensor, noise: AbstractNoise, k: int) -> Tensor:
        s = score(x, t)
        # The kernel has no forward-mode derivative and cannot be mapped; the formula below it, where it is one, can.
        transformed = self._mode == "fixed" and (is_transformed() or has_tangent(x, s))
        if isinstance(noise, BrownianPath) and not transformed and (noise.plain or self._mode != "fixed"):
            return langevin_step(x, s, mode=self._mode, size=self._size, alpha=scale, **noise.place(k))
        if self._mode != "fixed":
            raise ValueError(
                f"with norms='{self.norms}' the step size depends on the state and on the noise, so that the chain is "
                "not affine and no exact law is known; norms='level' and a fixed step_size= have one"
            )
        delta = per_sample(scale * self._size, x)
        return x + delta * s + (2.0 * delta).sqrt() * unit_normals(noise, k, x)

    def check(self, x: Tensor) -> None:
        d = math.prod(x.shape[1:])
        if self._mode == "fixed" or not x.numel():
            return
        numbers = d if self.norms is Norms.SAMPLE else d * len(x)
        if numbers <= 2:
            warnings.warn(
                f"an SNR corrector with norms='{self.norms}' on states of dimension {d} (batch of {len(x)}) divides by "
                f"the size of {numbers} number(s), which comes so near 0 that its mean step size is infinite: the "
                "chain diverges. norms='level', or a fixed step_size=, does not",
                stacklevel=2,
            )
        elif d == 1:
            warnings.warn(
                f"an SNR corrector with norms='{self.norms}' on states of dimension 1 takes its step from norms of "
                "single numbers, averaged over the batch: it diverges in small batches, and a sample depends on the "
                "batch. norms='level', or a fixed step_size=, does neither",
                stacklevel=2,
            )


def _norms(name: str) -> Norms:
    try:
        return Norms(name)
    except ValueError:
        raise ValueError(
            f"norms={short(name)} is unknown; choose one of {', '.join(repr(str(n)) for n in Norms)}"
        ) from None
