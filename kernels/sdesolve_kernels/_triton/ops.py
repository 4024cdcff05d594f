"""The ops of the Triton back end, by the names of `sdesolve_kernels.backend.Ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..backend import Coefficient, NoiseOffset, Residual
from . import launch, launch_langevin, launch_matrices
from .launch import fill as fill
from .launch import scaled as scaled
from .launch_denoising import dsm_loss_parts
from .launch_matrices import matrix_product as matrix_product


def _with_offset(launcher: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A launcher, which takes the parts of a `NoiseOffset` as keywords, as an op."""

    def op(*args: Any, noise: NoiseOffset, **options: Any) -> Tensor:
        seed, stream, first_path, step = noise
        return launcher(*args, seed=seed, stream=stream, first_path=first_path, step=step, **options)

    return op


euler_maruyama_step = _with_offset(launch.euler_maruyama_step)
linear_step = _with_offset(launch.linear_step)
matrix_step = _with_offset(launch_matrices.matrix_step)
perturb = _with_offset(launch.perturb)
noise_product = _with_offset(launch.noise_product)
langevin_step = _with_offset(launch_langevin.langevin_step)


def dsm_loss(r: Residual, *, mean: bool, out: Tensor, gradient: Tensor | None, noise: NoiseOffset) -> Tensor:
    """See `reference_steps.dsm_loss`."""
    keep = gradient is not None
    dsm_loss_parts(*r, mean=mean, loss_out=out, grad=keep, out=gradient, **noise._asdict())
    return out


def dsm_gradient(
    r: Residual, upstream: Coefficient, *, mean: bool, out: Tensor, made: bool, noise: NoiseOffset
) -> Tensor:
    """The gradient of `dsm_loss`."""
    dsm_loss_parts(*r, mean=mean, loss=False, grad=True, out=out, upstream=upstream, made=made, **noise._asdict())
    return out
