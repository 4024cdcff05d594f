"""Any sampler with Langevin steps in between."""

from __future__ import annotations

from typing import final

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve.brownian import Part
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractSolver, Supported
from sdesolve.solvers.correctors import AbstractCorrector


@final
class PredictorCorrector(AbstractSolver):
    """A step of ``predictor``, then ``n`` steps of ``corrector`` at the time it has reached, and so on.

    Orders are those of the predictor, as far as the corrector's step size tends to 0 with the grid's. ``predictor`` may
    be any solver for reverse SDEs or probability flows; one that remembers evaluations remembers those it made before
    the correction. Correction ``i`` of step ``k`` takes draw ``k n + i`` of the corrector stream, so it is replayed by
    seed and path like everything else. Where a grid ends at zero noise no correction follows. Song et al. 2021,
    algorithm 1.

    Args:
        predictor: such as `EulerMaruyama`.
        corrector: such as ``LangevinCorrector(snr=0.16)``.
        n: corrections a step, one evaluation of the score each.

    Raises:
        TypeError: something else than a fixed-step solver, a corrector and an integer.
        ValueError: ``n`` is below 1.

    Example:
        >>> solver = PredictorCorrector(EulerMaruyama(), LangevinCorrector(snr=0.16))
        >>> x = sample(process, score, (64, 2), solver=solver, steps=50)
    """

    def __init__(self, predictor: AbstractSolver, corrector: AbstractCorrector, n: int = 1) -> None:
        fixed = isinstance(predictor, AbstractSolver) and predictor.controller is None
        if not fixed or isinstance(predictor, PredictorCorrector):
            raise TypeError(f"predictor must be a fixed-step solver such as EulerMaruyama(), got {kind_of(predictor)}")
        if not isinstance(corrector, AbstractCorrector):
            raise TypeError(f"corrector must be one such as LangevinCorrector(snr=0.16), got {kind_of(corrector)}")
        self.predictor, self.corrector, self.n = predictor, corrector, whole_number(n, "n", 1)

    @property
    def supported(self) -> Supported:
        return self.predictor.supported

    @property
    def strong_order(self) -> float | None:
        return self.predictor.strong_order

    @property
    def weak_order(self) -> float | None:
        return self.predictor.weak_order

    @property
    def ode_order(self) -> int | None:
        return self.predictor.ode_order

    @property
    def evaluations(self) -> int:
        return self.predictor.evaluations + self.n

    @property
    def own_component_diffusion(self) -> bool:
        return self.predictor.own_component_diffusion

    @property
    def commutative_noise(self) -> bool:
        return self.predictor.commutative_noise

    @property
    def stochasticity(self) -> float | None:
        return self.predictor.stochasticity

    @property
    def divisible(self) -> bool:
        return self.predictor.divisible

    @property
    def needs(self) -> tuple[Part, ...]:
        return self.predictor.needs


def reversed_diffusion(sde: AbstractSDE) -> AbstractDiffusion:
    """The forward process that ``sde`` is a reversal of.

    Raises:
        ValueError: ``sde`` is not the reversal of a linear diffusion.
    """
    if isinstance(sde, ReverseSDE | ProbabilityFlow) and isinstance(sde.forward, AbstractDiffusion):
        return sde.forward
    raise ValueError(
        "a corrector needs the score of a linear diffusion: integrate process.reverse(score) or "
        f"process.probability_flow(score) of one such as VP(), got {type(sde).__name__}"
    )
