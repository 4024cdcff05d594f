"""What samplers read off a linear diffusion: alpha, sigma and log-SNR on a grid, in float64."""

from __future__ import annotations

import dataclasses
from typing import final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve.diffusions.base import AbstractDiffusion, implicit_time
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractSemilinear
from sdesolve.solvers.base import AbstractSolver

# The log-SNR is infinite without noise. e^-700 is the last power that is not 0, and the half log-SNR of no process gets
# there by itself, so steps to zero noise have this length: finite, and every exponential of it is right.
_LONGEST = 700.0


@final
@dataclasses.dataclass(frozen=True)
class Schedule:
    """A linear diffusion on a decreasing or increasing grid; all tensors are ``(steps + 1)`` or ``(steps + 1, batch)``.

    Attributes:
        process: the forward diffusion.
        stochasticity: ``c`` of the reverse SDE (`ReverseSDE`); 0 for the probability flow.
        times: the grid.
        alpha: scale of the data.
        sigma: standard deviation of the noise; 0 at the last time of a grid that ends at clean data.
        rho: ``sigma / alpha``.
        lam: half the log-SNR, ``log(alpha / sigma)``.
    """

    process: AbstractDiffusion
    stochasticity: float
    times: Tensor
    alpha: Tensor
    sigma: Tensor
    rho: Tensor
    lam: Tensor

    @classmethod
    def of(
        cls, solver: AbstractSolver, sde: AbstractSemilinear, times: Tensor, *, from_noise: bool = False
    ) -> Schedule:
        """What ``solver`` needs of ``sde`` on a grid; `from_noise` where that may start at ``alpha = 0``.

        Raises:
            ValueError: ``sde`` is not the reversal of a linear diffusion; ``alpha`` is 0 on the grid; the grid starts
                at zero noise, or ends there for some samples and not for others; the log-SNR does not change over a
                step; a reverse SDE is integrated towards noise.
        """
        name = type(solver).__name__
        if not isinstance(sde, ReverseSDE | ProbabilityFlow) or not isinstance(sde.forward, AbstractDiffusion):
            raise ValueError(
                f"{name} needs the alpha(t) and sigma(t) of a linear diffusion: integrate process.reverse(score) or "
                f"process.probability_flow(score) of one such as VP() or LinearDiffusion(...), got {type(sde).__name__}"
            )
        process = sde.forward
        log_alpha, sigma = process.log_alpha(times), process.sigma(times)
        alpha, lam = log_alpha.exp(), log_alpha - sigma.log()
        if from_noise:  # a step of infinite length, of which exponentials leave nothing
            lam = torch.cat([lam[:1].clamp(min=lam[1:2] - _LONGEST), lam[1:]])
        if bool((alpha[1 if from_noise else 0 :] == 0).any()):
            k = int((alpha == 0).reshape(len(times), -1).any(1).nonzero()[-1])
            raise ValueError(
                f"{name} cannot pass t = {float(times[k].flatten()[0]):.6g}, where {type(process).__name__} has alpha "
                "= 0 and nothing is left of the data; leave that time out of the grid"
            )
        stochasticity = sde.stochasticity if isinstance(sde, ReverseSDE) else 0.0
        if solver.stochasticity is not None and solver.stochasticity != stochasticity:
            raise ValueError(
                f"{short(solver)} is made for stochasticity {solver.stochasticity:g}, and this equation has "
                f"{stochasticity:g}: give the same to both, or leave it out"
            )
        schedule = cls(process, stochasticity, times, alpha, sigma, sigma / alpha, lam)
        schedule._check(name)
        return schedule

    def at(self, times: Tensor) -> Schedule:
        """The same process at other times."""
        log_alpha, sigma = self.process.log_alpha(times), self.process.sigma(times)
        alpha = log_alpha.exp()
        return dataclasses.replace(
            self, times=times, alpha=alpha, sigma=sigma, rho=sigma / alpha, lam=log_alpha - sigma.log()
        )

    @property
    def h(self) -> Tensor:
        """``lam`` at the end of each step less that at its start; finite also where a step ends at zero noise."""
        return self.lam.diff(dim=0).clamp(max=_LONGEST)

    @property
    def ends_clean(self) -> bool:
        """Whether the last step ends at zero noise. It is then Tweedie's formula, whatever the sampler."""
        return bool((self.sigma[-1] == 0).any())

    def orders(self, order: int) -> Tensor:
        """Order of a multistep scheme in each step, ``(steps,)``: as many values as there are, and 1 to zero noise."""
        orders = torch.arange(1, len(self.times), device="cpu").clamp(max=order)
        if self.ends_clean:
            orders[-1] = 1
        return orders

    def time_of(self, lam: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The times between ``start`` and ``end`` with half log-SNR ``lam``, by bisection to the last bit or so."""
        with torch.no_grad():
            noisy, clean = torch.maximum(start, end).detach(), torch.minimum(start, end).detach()
            for _ in range(80):
                middle = 0.5 * (noisy + clean)
                too_clean = (self.process.log_alpha(middle) - self.process.sigma(middle).log() > lam).detach()
                clean, noisy = torch.where(too_clean, middle, clean), torch.where(too_clean, noisy, middle)
        return implicit_time(self.process, (0.5 * (noisy + clean)).detach(), lam)

    def _check(self, name: str) -> None:
        clean = self.sigma == 0
        if bool(clean[:-1].any()) or bool(clean[-1].any() != clean[-1].all()):
            raise ValueError(
                f"{name} may end at zero noise, for all samples or for none, and cannot start or pass there, where the "
                f"score of data does not exist: let the grid start at a positive time such as t_min = "
                f"{self.process.t_min}"
            )
        flat = self.h == 0
        if bool(flat.any()):
            k = int(flat.flatten(1).any(1).nonzero()[0]) if flat.ndim > 1 else int(flat.nonzero()[0])
            raise ValueError(
                f"the log-SNR does not change from t = {self.times[k].tolist()} to {self.times[k + 1].tolist()}, and "
                f"{name} steps in the log-SNR; leave such times out of the grid"
            )
        if self.stochasticity and bool((self.h < 0).any()):
            raise ValueError(
                f"{name} integrates a reverse SDE from noise to data, so its grid must decrease; to add noise to "
                "samples integrate the process itself, or take the probability flow, which goes both ways"
            )


def deviation(variance: Tensor) -> Tensor:
    """Its square root, and 0 without a derivative where there is no noise: torch's derivative there is infinite."""
    noisy = variance > 0
    return torch.where(noisy, variance, 1.0).sqrt() * noisy


def check_order(order: int, most: int, name: str) -> int:
    """Refuses an order that is not 1 ... ``most``."""
    whole_number(order, "order", 1)
    if order > most:
        raise ValueError(f"{name} has orders 1 to {most}, got {short(order)}: no more values than that are kept")
    return order
