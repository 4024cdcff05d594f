"""What a chain samples from, and what one step of it is."""

from __future__ import annotations

import abc
import enum
import math
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.brownian import AbstractNoise
from sdesolve.integrate.checks import check_drift

Function = Callable[[Tensor], Tensor]


class Convention(enum.StrEnum):
    """What a step size ``eps`` of overdamped Langevin dynamics means; the literature has both.

    ``full``: ``x + eps s + sqrt(2 eps) z`` (Roberts and Tweedie 1996; Song et al. 2021, algorithms 4 and 5).
    ``half``: ``x + eps/2 s + sqrt(eps) z`` (Welling and Teh 2011; Song and Ermon 2019, eq. 4 and algorithm 1).
    """

    FULL = "full"
    HALF = "half"

    def step(self, size: float) -> float:
        """``delta`` of the step ``x + delta s + sqrt(2 delta) z``."""
        return size if self is Convention.FULL else 0.5 * size

    @classmethod
    def named(cls, name: str) -> Convention:
        """The convention of this name.

        Raises:
            ValueError: there is none.
        """
        try:
            return cls(name)
        except ValueError:
            raise ValueError(
                f"convention={short(name)} is unknown; choose 'full', x + eps s + sqrt(2 eps) z, or 'half', "
                "x + eps/2 s + sqrt(eps) z"
            ) from None


ConventionName = Literal["full", "half"]


@final
class Target:
    """A law ``p(x)`` known by its score, by its energy, or by both.

    Args:
        score: ``grad log p(x)``, of the shape of ``x: (batch, *state)``. By default it is taken from the energy by
            automatic differentiation.
        energy: ``-log p(x)`` up to a constant, ``(batch,)``; row ``i`` must depend on row ``i`` of ``x`` alone.

    Raises:
        ValueError: neither is given.
        TypeError: either cannot be called.
    """

    def __init__(self, score: Function | None = None, energy: Function | None = None) -> None:
        if score is None and energy is None:
            raise ValueError("give the score, grad log p(x), or the energy, -log p(x), of what to sample from")
        for name, function in (("score", score), ("energy", energy)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function of x, got {type(function).__name__}")
        self._score, self._energy = score, energy
        self.evaluations = 0

    @property
    def has_energy(self) -> bool:
        """Whether densities can be compared."""
        return self._energy is not None

    def score(self, x: Tensor) -> Tensor:
        """``grad log p(x)``."""
        self.evaluations += 1
        if self._score is not None:
            s = self._score(x)
        else:
            with torch.inference_mode(False), torch.enable_grad():
                leaf = (x.clone() if x.is_inference() else x).detach().requires_grad_()
                total = self._energies(leaf).sum()
                if not total.requires_grad:
                    raise ValueError("energy has no gradient with respect to the state: is it detached? Or give score=")
                (gradient,) = torch.autograd.grad(total, leaf)
            s = -gradient
        check_drift(s, x, x.new_zeros(()), "score")
        return s

    def log_density(self, x: Tensor) -> Tensor:
        """``log p(x)`` up to a constant, ``(batch,)``."""
        return -self._energies(x)

    def _energies(self, x: Tensor) -> Tensor:
        if self._energy is None:
            raise ValueError(
                "to accept or refuse a proposal, densities must be compared: give energy=, -log p(x) up to a constant, "
                "or use Langevin, which accepts all"
            )
        energy = self._energy(x)
        if not isinstance(energy, Tensor) or energy.shape != x.shape[:1]:
            got = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise ValueError(f"energy must return one number per sample, ({len(x)},), got {got}")
        return energy


class Walker(NamedTuple):
    """A batch of chains between two steps.

    Attributes:
        x: ``(batch, *state)``.
        score: ``grad log p(x)`` there.
        log_density: ``log p(x)``, ``(batch,)``, where the kernel compares densities.
        velocity: like ``x``, where the kernel has one.
        accepted: proposals accepted so far, ``(batch,)``, where the kernel makes any.
    """

    x: Tensor
    score: Tensor
    log_density: Tensor | None = None
    velocity: Tensor | None = None
    accepted: Tensor | None = None


class AbstractKernel(abc.ABC):
    """One step of a Markov chain, a function of where it stands and of the noise of that step.

    Attributes:
        needs_energy: whether it compares densities.
        has_velocity: whether its state has a velocity.
    """

    needs_energy: ClassVar[bool] = False
    has_velocity: ClassVar[bool] = False

    @abc.abstractmethod
    def start(self, target: Target, x: Tensor, velocity: Tensor | None, noise: AbstractNoise) -> Walker:
        """The walker before step 0."""

    @abc.abstractmethod
    def step(self, target: Target, walker: Walker, k: int, noise: AbstractNoise) -> Walker:
        """The walker after step ``k``, which takes draw ``k`` of ``noise``."""


def squared_norm(x: Tensor) -> Tensor:
    """``|x_i|^2`` for each sample, ``(batch,)``."""
    return x.reshape(len(x), math.prod(x.shape[1:])).square().sum(1)


def check_step_size(size: float, name: str = "step_size") -> float:
    """Refuses a step size that is not positive and finite."""
    if not (isinstance(size, int | float) and 0.0 < size < math.inf):
        raise ValueError(f"{name} must be a positive number, got {short(size)}")
    return float(size)
