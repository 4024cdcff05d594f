"""Kernels of sdesolve: ops on tensors, each with a plain torch reference and hand-written implementations."""

from ._reference.backend import ReferenceBackend as ReferenceBackend
from .backend import Backend as Backend
from .backend import NoiseOffset as NoiseOffset
from .backend import Ops as Ops
from .backend import Residual as Residual
from .denoising import dsm_loss as dsm_loss
from .dispatch import register_backend as register_backend
from .dispatch import use_backend as use_backend
from .langevin import langevin_step as langevin_step
from .matrices import matrix_product as matrix_product
from .matrices import matrix_step as matrix_step
from .ops import normal as normal
from .ops import uniform as uniform
from .ops import words as words
from .steps import euler_maruyama_step as euler_maruyama_step
from .steps import linear_step as linear_step
from .steps import perturb as perturb
from .streams import Stream as Stream
