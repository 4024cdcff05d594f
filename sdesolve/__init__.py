"""sdesolve: SDE solvers for PyTorch, built around score-based generative modelling."""

from sdesolve import adapters, grids, inverse, mcmc, metrics, models, nn, oracle
from sdesolve._internal.levy_area import LevyArea
from sdesolve._internal.version import __version__ as __version__
from sdesolve.brownian import AbstractNoise, AbstractPath, BrownianPath, BrownianRows, Increment
from sdesolve.carry import (
    AbstractCarry,
    Carry,
    Discount,
    Discounted,
    Histogram,
    Integral,
    Occupation,
    RunningMaximum,
    RunningMinimum,
    TimeAverage,
)
from sdesolve.chains import DDPM, SMLD, ChainScore, variational_bound
from sdesolve.control import ControlPath
from sdesolve.conversions import correlated, to_ito, to_stratonovich
from sdesolve.crossing import Crossing, Reflection
from sdesolve.delays import DelaySDE
from sdesolve.diagnostics import show_versions
from sdesolve.diffusions import (
    EDM,
    OU,
    VE,
    VP,
    AbstractDiffusion,
    AbstractInterpolant,
    CosineBeta,
    LinearBeta,
    LinearDiffusion,
    LinearInterpolant,
    Rectified,
    SubVP,
    TableBeta,
)
from sdesolve.ensembles import (
    Chains,
    Draws,
    Ensemble,
    FeatureMoments,
    Likelihoods,
    MergedMoments,
    Moments,
    QuantileSketch,
    ValueHistogram,
    ensemble,
)
from sdesolve.flows import ExactInterpolant, FlowModel, FlowSDE, StochasticInterpolant, gaussian_bridge
from sdesolve.integrate.hooks import SamplingStep
from sdesolve.integrate.solution import DivergenceError, RateError, Solution, Stats, StepLimitError
from sdesolve.integrate.solve import solve
from sdesolve.integrate.transitions import Transitions, transitions
from sdesolve.inverse import operators
from sdesolve.jumps import JumpSDE, Reactions
from sdesolve.likelihood.likelihood import Likelihood, decode, encode, estimate_likelihood, log_likelihood
from sdesolve.likelihood.quantisation import Quantisation
from sdesolve.likelihood.trace_estimators import ExactTrace, Hutchinson, HutchPP
from sdesolve.mcmc import AnnealedLangevin, run_chain
from sdesolve.models import (
    CIR,
    DoubleWell,
    GeometricBrownianMotion,
    Heston,
    Jacobi,
    LotkaVolterra,
    OrnsteinUhlenbeck,
    UnderdampedLangevin,
)
from sdesolve.montecarlo.annealing import annealed_importance_sampling
from sdesolve.montecarlo.euler_law import EulerLaw, euler_law, pseudo_log_likelihood
from sdesolve.montecarlo.multilevel import MultilevelEstimate, multilevel
from sdesolve.montecarlo.quasi import QuasiEstimate, quasi_monte_carlo
from sdesolve.montecarlo.sensitivity import Sensitivity, sensitivity
from sdesolve.montecarlo.sequential import Particles, sequential_monte_carlo
from sdesolve.parallel import ParallelSample, sample_in_parallel
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sampling import sample, tweedie
from sdesolve.scores import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    Clip,
    DynamicThreshold,
    EnergyScore,
    Gaussian,
    GaussianMixture,
    ThresholdedScore,
    drop_labels,
    noised_cross_entropy,
)
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import ODE, SDE, AbstractSDE, AbstractSemilinear, Calculus, Noise, Rates
from sdesolve.solvers import (
    ALIGN,
    BAOAB,
    DDIM,
    DEIS,
    DPM2,
    DRI1,
    NON,
    OBABO,
    QE,
    QUICSORT,
    RI6,
    RK4,
    SEA,
    SKSROCK,
    SOSRA,
    SOSRI,
    SRA1,
    SRA3,
    SRI2,
    SRIW1,
    SRIW2,
    UBU,
    AbstractEstimating,
    AbstractOneStep,
    AbstractRemembering,
    AbstractStochasticTable,
    AbstractTabulated,
    AbstractWeakTable,
    Adaptive,
    Ancestral,
    DormandPrince,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPP2S,
    EDMHeun,
    EulerHeun,
    EulerMaruyama,
    GeneralShARK,
    Gillespie,
    Heun,
    ImplicitEuler,
    ImplicitSquareRoot,
    LinearMultistep,
    LogODE,
    Midpoint,
    Milstein,
    PredictorCorrector,
    ReverseDiffusion,
    ReversibleHeun,
    Rodas4,
    Row,
    SASolver,
    SDEDPMSolverPP,
    SDEDPMSolverPP2S,
    ShARK,
    SKenCarp,
    SlowRK,
    Span,
    SPaRK,
    SplitStepEuler,
    StochasticTable,
    Table,
    Tamed,
    TauLeap,
    Truncated,
    Tsit5,
    UniPC,
    W2Ito1,
    WeakTable,
    supports,
)
from sdesolve.solvers.correctors import LangevinCorrector
from sdesolve.sums import Sums
from sdesolve.training.bridges import fit_bridge
from sdesolve.training.chain_objectives import ChainBound, SimpleChainLoss
from sdesolve.training.checkpoints import load, save
from sdesolve.training.distillation import FlowMap, FlowMapDistillation
from sdesolve.training.flow_matching import FlowMatching
from sdesolve.training.hub import load_score, push_to_hub, save_pretrained
from sdesolve.training.losses import DenoisingScoreMatching, Objective
from sdesolve.training.score_matching import (
    ExplicitScoreMatching,
    ImplicitScoreMatching,
    PlainScore,
    SlicedScoreMatching,
)
from sdesolve.training.times import LogNormalNoise, NoiseLadder, TrainingTimes, UniformLogSNR, UniformTime
from sdesolve.training.train import train

__all__ = [
    "ALIGN", "BAOAB", "CIR", "DDIM", "DDPM", "DEIS", "DPM2", "DRI1", "EDM", "NON", "OBABO", "ODE", "OU", "QE",
    "QUICSORT", "RI6", "RK4", "SDE", "SEA", "SKSROCK", "SMLD", "SOSRA", "SOSRI", "SRA1", "SRA3", "SRI2", "SRIW1",
    "SRIW2", "UBU", "VE", "VP", "AbstractCarry", "AbstractDiffusion", "AbstractEstimating", "AbstractInterpolant",
    "AbstractNoise", "AbstractOneStep", "AbstractPath", "AbstractRemembering", "AbstractSDE", "AbstractSemilinear",
    "AbstractStochasticTable", "AbstractTabulated", "AbstractWeakTable", "Adaptive", "Ancestral", "AnnealedLangevin",
    "BrownianPath", "BrownianRows", "Calculus", "Carry", "ChainBound", "ChainScore", "Chains",
    "ClassifierFreeGuidance", "ClassifierGuidance", "Clip", "ControlPath", "CosineBeta", "Crossing", "DPMSolver",
    "DPMSolverPP", "DPMSolverPP2S", "DelaySDE", "DenoisingScoreMatching", "Discount", "Discounted", "DivergenceError",
    "DormandPrince", "DoubleWell", "Draws", "DynamicThreshold", "EDMHeun", "EnergyScore", "Ensemble", "EulerHeun",
    "EulerLaw", "EulerMaruyama", "ExactInterpolant", "ExactTrace", "ExplicitScoreMatching", "FeatureMoments",
    "FlowMap", "FlowMapDistillation", "FlowMatching", "FlowModel", "FlowSDE", "Gaussian", "GaussianMixture",
    "GeneralShARK", "GeometricBrownianMotion", "Gillespie", "Heston", "Heun", "Histogram", "HutchPP", "Hutchinson",
    "ImplicitEuler", "ImplicitScoreMatching", "ImplicitSquareRoot", "Increment", "Integral", "Jacobi", "JumpSDE",
    "LangevinCorrector", "LevyArea", "Likelihood", "Likelihoods", "LinearBeta", "LinearDiffusion",
    "LinearInterpolant", "LinearMultistep", "LogNormalNoise", "LogODE", "LotkaVolterra", "MergedMoments", "Midpoint",
    "Milstein", "Moments", "MultilevelEstimate", "NetworkScore", "Noise", "NoiseLadder", "Objective", "Occupation",
    "OrnsteinUhlenbeck", "ParallelSample", "Particles", "PlainScore", "PredictorCorrector", "ProbabilityFlow",
    "QuantileSketch", "Quantisation", "QuasiEstimate", "RateError", "Rates", "Reactions", "Rectified", "Reflection",
    "ReverseDiffusion", "ReverseSDE", "ReversibleHeun", "Rodas4", "Row", "RunningMaximum", "RunningMinimum",
    "SASolver", "SDEDPMSolverPP", "SDEDPMSolverPP2S", "SKenCarp", "SPaRK", "SamplingStep", "Sensitivity", "ShARK",
    "SimpleChainLoss", "SlicedScoreMatching", "SlowRK", "Solution", "Span", "SplitStepEuler", "Stats",
    "StepLimitError", "StochasticInterpolant", "StochasticTable", "SubVP", "Sums", "Table", "TableBeta", "Tamed",
    "TauLeap", "ThresholdedScore", "TimeAverage", "TrainingTimes", "Transitions", "Truncated", "Tsit5",
    "UnderdampedLangevin", "UniPC", "UniformLogSNR", "UniformTime", "ValueHistogram", "W2Ito1", "WeakTable",
    "adapters", "annealed_importance_sampling", "correlated", "decode", "drop_labels", "encode", "ensemble",
    "estimate_likelihood", "euler_law", "fit_bridge", "gaussian_bridge", "grids", "inverse", "load", "load_score",
    "log_likelihood", "mcmc", "metrics", "models", "multilevel", "nn", "noised_cross_entropy", "operators", "oracle",
    "pseudo_log_likelihood", "push_to_hub", "quasi_monte_carlo", "run_chain", "sample", "sample_in_parallel", "save",
    "save_pretrained", "sensitivity", "sequential_monte_carlo", "show_versions", "solve", "supports", "to_ito",
    "to_stratonovich", "train", "transitions", "tweedie", "variational_bound",
]  # fmt: skip


def __dir__() -> list[str]:
    # Every module that was imported is an attribute too; completion would bury the public names among them.
    return __all__
