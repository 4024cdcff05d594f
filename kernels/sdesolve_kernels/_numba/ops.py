"""The ops of the Numba back end, by the names of `sdesolve_kernels.backend.Ops`."""

from .fill import fill as fill
from .launch import euler_maruyama_step as euler_maruyama_step
from .launch import linear_step as linear_step
from .launch import noise_product as noise_product
from .launch import perturb as perturb
from .launch import scaled as scaled
from .launch_matrices import matrix_product as matrix_product
from .launch_matrices import matrix_step as matrix_step
from .launch_sums import dsm_gradient as dsm_gradient
from .launch_sums import dsm_loss as dsm_loss
from .launch_sums import langevin_step as langevin_step
