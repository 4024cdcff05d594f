"""Scores: exact ones of data whose law is known, and learned ones."""

from sdesolve.scores.base import AbstractData, ExactScore
from sdesolve.scores.energy import EnergyScore
from sdesolve.scores.gaussian import Gaussian, GaussianFlow, Moments
from sdesolve.scores.guidance import ClassifierFreeGuidance, ClassifierGuidance, drop_labels, noised_cross_entropy
from sdesolve.scores.mixture import GaussianMixture
from sdesolve.scores.network import NetworkScore
from sdesolve.scores.threshold import Clip, DynamicThreshold, ThresholdedScore

__all__ = [
    "AbstractData", "ClassifierFreeGuidance", "ClassifierGuidance", "Clip", "DynamicThreshold", "EnergyScore",
    "ExactScore", "Gaussian", "GaussianFlow", "GaussianMixture", "Moments", "NetworkScore", "ThresholdedScore",
    "drop_labels", "noised_cross_entropy",
]  # fmt: skip
