"""Scores: exact ones of data whose law is known, and learned ones."""

from sdesolve.scores.base import AbstractData as AbstractData
from sdesolve.scores.base import ExactScore as ExactScore
from sdesolve.scores.gaussian import Gaussian as Gaussian
from sdesolve.scores.gaussian import GaussianFlow as GaussianFlow
from sdesolve.scores.gaussian import Moments as Moments
from sdesolve.scores.mixture import GaussianMixture as GaussianMixture
from sdesolve.scores.network import NetworkScore as NetworkScore
