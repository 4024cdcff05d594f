"""The step ops by the Numba launchers."""

from __future__ import annotations

from ._numba.launch import euler_maruyama_step, linear_step, noise_product, perturb, scaled
from ._numba.launch_sums import dsm_gradient, dsm_loss, langevin_step

__all__ = [
    "dsm_gradient",
    "dsm_loss",
    "euler_maruyama_step",
    "langevin_step",
    "linear_step",
    "noise_product",
    "perturb",
    "scaled",
]
