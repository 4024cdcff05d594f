"""Solvers: one scheme a file."""

from sdesolve.solvers.adams import DEIS, LinearMultistep
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.ancestral import Ancestral
from sdesolve.solvers.base import (
    AbstractEstimating,
    AbstractOneStep,
    AbstractRemembering,
    AbstractSolver,
    Span,
    supports,
)
from sdesolve.solvers.controller import StepController
from sdesolve.solvers.ddim import DDIM
from sdesolve.solvers.derivative_free import SRI2
from sdesolve.solvers.dormand_prince import DormandPrince
from sdesolve.solvers.dpm_solver import DPMSolver
from sdesolve.solvers.dpm_solver_pp import DPMSolverPP, SDEDPMSolverPP
from sdesolve.solvers.dpm_solver_pp_single import DPMSolverPP2S, SDEDPMSolverPP2S
from sdesolve.solvers.edm import DPM2, EDMHeun
from sdesolve.solvers.embedded import AbstractEmbedded
from sdesolve.solvers.euler_heun import EulerHeun
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.general_shark import GeneralShARK
from sdesolve.solvers.heun import Heun
from sdesolve.solvers.implicit import ImplicitEuler, SplitStepEuler
from sdesolve.solvers.langevin import ALIGN, BAOAB, OBABO, QUICSORT, UBU
from sdesolve.solvers.log_ode import LogODE
from sdesolve.solvers.midpoint import Midpoint
from sdesolve.solvers.milstein import Milstein
from sdesolve.solvers.non import NON
from sdesolve.solvers.predictor_corrector import PredictorCorrector
from sdesolve.solvers.reactions import AbstractReacting, Gillespie, TauLeap
from sdesolve.solvers.reverse_diffusion import ReverseDiffusion
from sdesolve.solvers.reversible_heun import ReversibleHeun
from sdesolve.solvers.ri import DRI1, RI6
from sdesolve.solvers.rk4 import RK4
from sdesolve.solvers.rosenbrock import Rodas4
from sdesolve.solvers.sa_solver import SASolver
from sdesolve.solvers.sea import SEA
from sdesolve.solvers.shark import ShARK
from sdesolve.solvers.skencarp import SKenCarp
from sdesolve.solvers.sksrock import SKSROCK
from sdesolve.solvers.slow_rk import SlowRK
from sdesolve.solvers.spark import SPaRK
from sdesolve.solvers.square_root import QE, ImplicitSquareRoot
from sdesolve.solvers.sra import SOSRA, SRA1, SRA3
from sdesolve.solvers.sri import SOSRI, SRIW1, SRIW2
from sdesolve.solvers.stochastic_table import AbstractStochasticTable, StochasticTable
from sdesolve.solvers.superlinear import Tamed, Truncated
from sdesolve.solvers.tabulated import AbstractTabulated, Row, Table
from sdesolve.solvers.tsitouras import Tsit5
from sdesolve.solvers.unipc import UniPC
from sdesolve.solvers.w2ito1 import W2Ito1
from sdesolve.solvers.weak_table import AbstractWeakTable, WeakTable

__all__ = [
    "ALIGN", "BAOAB", "DDIM", "DEIS", "DPM2", "DRI1", "NON", "OBABO", "QE", "QUICSORT", "RI6", "RK4", "SEA",
    "SKSROCK", "SOSRA", "SOSRI", "SRA1", "SRA3", "SRI2", "SRIW1", "SRIW2", "UBU", "AbstractEmbedded",
    "AbstractEstimating", "AbstractOneStep", "AbstractReacting", "AbstractRemembering", "AbstractSolver",
    "AbstractStochasticTable", "AbstractTabulated", "AbstractWeakTable", "Adaptive", "Ancestral", "DPMSolver",
    "DPMSolverPP", "DPMSolverPP2S", "DormandPrince", "EDMHeun", "EulerHeun", "EulerMaruyama", "GeneralShARK",
    "Gillespie", "Heun", "ImplicitEuler", "ImplicitSquareRoot", "LinearMultistep", "LogODE", "Midpoint", "Milstein",
    "PredictorCorrector", "ReverseDiffusion", "ReversibleHeun", "Rodas4", "Row", "SASolver", "SDEDPMSolverPP",
    "SDEDPMSolverPP2S", "SKenCarp", "SPaRK", "ShARK", "SlowRK", "Span", "SplitStepEuler", "StepController",
    "StochasticTable", "Table", "Tamed", "TauLeap", "Truncated", "Tsit5", "UniPC", "W2Ito1", "WeakTable",
    "supports",
]  # fmt: skip
