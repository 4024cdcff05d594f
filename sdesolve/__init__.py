"""sdesolve: SDE solvers for PyTorch, built around score-based generative modelling."""

from types import ModuleType as _ModuleType

from sdesolve import adapters as adapters
from sdesolve import grids as grids
from sdesolve import inverse as inverse
from sdesolve import mcmc as mcmc
from sdesolve import metrics as metrics
from sdesolve import nn as nn
from sdesolve import oracle as oracle
from sdesolve.brownian import BrownianPath as BrownianPath
from sdesolve.chains import DDPM as DDPM
from sdesolve.chains import SMLD as SMLD
from sdesolve.chains import ChainScore as ChainScore
from sdesolve.chains import variational_bound as variational_bound
from sdesolve.diffusions import EDM as EDM
from sdesolve.diffusions import OU as OU
from sdesolve.diffusions import VE as VE
from sdesolve.diffusions import VP as VP
from sdesolve.diffusions import CosineBeta as CosineBeta
from sdesolve.diffusions import LinearBeta as LinearBeta
from sdesolve.diffusions import LinearDiffusion as LinearDiffusion
from sdesolve.diffusions import SubVP as SubVP
from sdesolve.integrate.solution import DivergenceError as DivergenceError
from sdesolve.integrate.solution import Solution as Solution
from sdesolve.integrate.solve import solve as solve
from sdesolve.inverse import operators as operators
from sdesolve.likelihood.likelihood import Likelihood as Likelihood
from sdesolve.likelihood.likelihood import decode as decode
from sdesolve.likelihood.likelihood import encode as encode
from sdesolve.likelihood.likelihood import estimate_likelihood as estimate_likelihood
from sdesolve.likelihood.likelihood import log_likelihood as log_likelihood
from sdesolve.likelihood.quantisation import Quantisation as Quantisation
from sdesolve.likelihood.trace_estimators import ExactTrace as ExactTrace
from sdesolve.likelihood.trace_estimators import Hutchinson as Hutchinson
from sdesolve.likelihood.trace_estimators import HutchPP as HutchPP
from sdesolve.mcmc import AnnealedLangevin as AnnealedLangevin
from sdesolve.mcmc import run_chain as run_chain
from sdesolve.reverse import ProbabilityFlow as ProbabilityFlow
from sdesolve.reverse import ReverseSDE as ReverseSDE
from sdesolve.sampling import sample as sample
from sdesolve.sampling import tweedie as tweedie
from sdesolve.scores import ClassifierFreeGuidance as ClassifierFreeGuidance
from sdesolve.scores import ClassifierGuidance as ClassifierGuidance
from sdesolve.scores import EnergyScore as EnergyScore
from sdesolve.scores import Gaussian as Gaussian
from sdesolve.scores import GaussianMixture as GaussianMixture
from sdesolve.scores import drop_labels as drop_labels
from sdesolve.scores import noised_cross_entropy as noised_cross_entropy
from sdesolve.scores.network import NetworkScore as NetworkScore
from sdesolve.sde import ODE as ODE
from sdesolve.sde import SDE as SDE
from sdesolve.solvers import DDIM as DDIM
from sdesolve.solvers import DEIS as DEIS
from sdesolve.solvers import DPM2 as DPM2
from sdesolve.solvers import RK4 as RK4
from sdesolve.solvers import Ancestral as Ancestral
from sdesolve.solvers import DormandPrince as DormandPrince
from sdesolve.solvers import DPMSolver as DPMSolver
from sdesolve.solvers import DPMSolverPP as DPMSolverPP
from sdesolve.solvers import DPMSolverPP2S as DPMSolverPP2S
from sdesolve.solvers import EDMHeun as EDMHeun
from sdesolve.solvers import EulerMaruyama as EulerMaruyama
from sdesolve.solvers import Heun as Heun
from sdesolve.solvers import LinearMultistep as LinearMultistep
from sdesolve.solvers import Milstein as Milstein
from sdesolve.solvers import PredictorCorrector as PredictorCorrector
from sdesolve.solvers import ReverseDiffusion as ReverseDiffusion
from sdesolve.solvers import SASolver as SASolver
from sdesolve.solvers import SDEDPMSolverPP as SDEDPMSolverPP
from sdesolve.solvers import SDEDPMSolverPP2S as SDEDPMSolverPP2S
from sdesolve.solvers import UniPC as UniPC
from sdesolve.solvers.correctors import LangevinCorrector as LangevinCorrector
from sdesolve.training.chain_objectives import ChainBound as ChainBound
from sdesolve.training.chain_objectives import SimpleChainLoss as SimpleChainLoss
from sdesolve.training.checkpoints import load as load
from sdesolve.training.checkpoints import save as save
from sdesolve.training.losses import DenoisingScoreMatching as DenoisingScoreMatching
from sdesolve.training.score_matching import ExplicitScoreMatching as ExplicitScoreMatching
from sdesolve.training.score_matching import ImplicitScoreMatching as ImplicitScoreMatching
from sdesolve.training.score_matching import PlainScore as PlainScore
from sdesolve.training.score_matching import SlicedScoreMatching as SlicedScoreMatching
from sdesolve.training.times import LogNormalNoise as LogNormalNoise
from sdesolve.training.times import NoiseLadder as NoiseLadder
from sdesolve.training.times import TrainingTimes as TrainingTimes
from sdesolve.training.times import UniformLogSNR as UniformLogSNR
from sdesolve.training.times import UniformTime as UniformTime
from sdesolve.training.train import train as train

_NAMESPACES = ("adapters", "grids", "inverse", "mcmc", "metrics", "nn", "operators", "oracle")


def __dir__() -> list[str]:
    # Every module that was imported is an attribute too; completion would bury the public names among them.
    return [
        n for n, value in globals().items() if n in _NAMESPACES or not (n[0] == "_" or isinstance(value, _ModuleType))
    ]
