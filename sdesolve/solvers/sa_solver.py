"""SA-Solver."""

from __future__ import annotations

from typing import final

from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve.sde import Noise
from sdesolve.solvers.base import supports
from sdesolve.solvers.data_predictor_corrector import AbstractPredictorCorrectorMultistep, exact_weights
from sdesolve.solvers.schedule import Schedule, check_order


@final
class SASolver(AbstractPredictorCorrectorMultistep):
    """SA-Solver: stochastic Adams predictor-corrector in the denoised state, one evaluation a step.

    Interpolating polynomials in the log-SNR are integrated exactly against the reverse SDE of any stochasticity, or the
    flow. Order on the flow: ``min(predictor, corrector) + 1``, or ``predictor`` without corrector; on an SDE that weak
    order but at most 2, with an error that falls with the stochasticity. Without corrector, and on the flow,
    ``predictor=3`` is DPM-Solver++ of true third order. Xue et al. 2023, eq. 14 to 18 and algorithm 1.

    Polynomials extrapolate: take grids whose steps in the log-SNR are alike, as those of `grids.uniform_log_snr`. Even
    steps in ``t`` of VP triple there at the end, and 60 of them leave order 3 with an error of 0.6 standard deviations
    of normal data, order 2 with 0.08; 60 that are even in the log-SNR leave 0.0014 and 0.0036.

    The first steps have the order that the history allows: where they are not shorter than the others, the first one's
    error shows as order 3 in all, or 2 without corrector.

    Args:
        predictor: order of the predictor, the number of values that it looks at: 1 to 3, or 4 without corrector.
        corrector: likewise of the corrector, which looks at one more: 0 (no corrector) to 3.
    """

    supported = supports(ito=(Noise.NONE, Noise.ADDITIVE))
    strong_order = None
    evaluations = 1

    def __init__(self, predictor: int = 3, corrector: int = 3) -> None:
        name = type(self).__name__
        if whole_number(corrector, "corrector", 0) > 3:
            raise ValueError(f"{name} has correctors of order 0 (none) to 3, got {short(corrector)}")
        self.predictor = check_order(predictor, 3 if corrector else 4, f"{name} with corrector {corrector}")
        self.corrector = corrector

    @property
    def ode_order(self) -> int:
        return min(self.predictor, self.corrector) + 1 if self.corrector else self.predictor

    @property
    def weak_order(self) -> float:
        return min(2.0, self.ode_order)

    @property
    def memory(self) -> int:
        return max(self.predictor, self.corrector) if self.corrector else self.predictor - 1

    def predicting(self, p: Schedule) -> Tensor:
        return exact_weights(p, p.orders(self.predictor), corrects=False)

    def correcting(self, p: Schedule) -> Tensor | None:
        return exact_weights(p, p.orders(self.corrector), corrects=True) if self.corrector else None
