"""Scores: exact ones of data whose law is known, and learned ones."""

from sdesolve.scores.base import AbstractData as AbstractData
from sdesolve.scores.base import ExactScore as ExactScore
from sdesolve.scores.energy import EnergyScore as EnergyScore
from sdesolve.scores.gaussian import Gaussian as Gaussian
from sdesolve.scores.gaussian import GaussianFlow as GaussianFlow
from sdesolve.scores.gaussian import Moments as Moments
from sdesolve.scores.guidance import ClassifierFreeGuidance as ClassifierFreeGuidance
from sdesolve.scores.guidance import ClassifierGuidance as ClassifierGuidance
from sdesolve.scores.guidance import drop_labels as drop_labels
from sdesolve.scores.guidance import noised_cross_entropy as noised_cross_entropy
from sdesolve.scores.mixture import GaussianMixture as GaussianMixture
from sdesolve.scores.network import NetworkScore as NetworkScore
