"""Solvers: one scheme a file."""

from sdesolve.solvers.adams import DEIS as DEIS
from sdesolve.solvers.adams import LinearMultistep as LinearMultistep
from sdesolve.solvers.ancestral import Ancestral as Ancestral
from sdesolve.solvers.base import AbstractOneStep as AbstractOneStep
from sdesolve.solvers.base import AbstractSolver as AbstractSolver
from sdesolve.solvers.base import Span as Span
from sdesolve.solvers.controller import StepController as StepController
from sdesolve.solvers.ddim import DDIM as DDIM
from sdesolve.solvers.dormand_prince import DormandPrince as DormandPrince
from sdesolve.solvers.dpm_solver import DPMSolver as DPMSolver
from sdesolve.solvers.dpm_solver_pp import DPMSolverPP as DPMSolverPP
from sdesolve.solvers.dpm_solver_pp import SDEDPMSolverPP as SDEDPMSolverPP
from sdesolve.solvers.dpm_solver_pp_single import DPMSolverPP2S as DPMSolverPP2S
from sdesolve.solvers.dpm_solver_pp_single import SDEDPMSolverPP2S as SDEDPMSolverPP2S
from sdesolve.solvers.edm import DPM2 as DPM2
from sdesolve.solvers.edm import EDMHeun as EDMHeun
from sdesolve.solvers.embedded import AbstractEmbedded as AbstractEmbedded
from sdesolve.solvers.euler_maruyama import EulerMaruyama as EulerMaruyama
from sdesolve.solvers.heun import Heun as Heun
from sdesolve.solvers.milstein import Milstein as Milstein
from sdesolve.solvers.predictor_corrector import PredictorCorrector as PredictorCorrector
from sdesolve.solvers.reverse_diffusion import ReverseDiffusion as ReverseDiffusion
from sdesolve.solvers.rk4 import RK4 as RK4
from sdesolve.solvers.sa_solver import SASolver as SASolver
from sdesolve.solvers.tabulated import AbstractTabulated as AbstractTabulated
from sdesolve.solvers.unipc import UniPC as UniPC
