"""Which sample of the source goes with which of the target."""

from __future__ import annotations

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve.scores.base import flat

_SWEEPS, _TOLERANCE = 1000, 1e-3  # of the marginals of an entropic plan, relative


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2`` over the flattened states, ``(n, m)``, float64."""
    return torch.cdist(flat(x).double(), flat(y).double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def optimal(x0: Tensor, x1: Tensor) -> Tensor:
    """For each row of ``x1`` the row of ``x0`` that goes with it, by the assignment of least squared distance."""
    from scipy.optimize import linear_sum_assignment  # not with the package: importing scipy takes longer than the rest

    columns = linear_sum_assignment(squared_distances(x1, x0).cpu().numpy())[1]
    return torch.from_numpy(columns).to(x0.device)


def entropic_plan(x0: Tensor, x1: Tensor, noise: float) -> Tensor:
    """The entropic plan ``(n, m)`` of uniform marginals for the kernel ``exp(-|x - y|^2 / (2 noise^2))``, by Sinkhorn.

    Those of all steps are on a log scale (Cuturi 2013; Peyre and Cuturi 2019, eq. 4.44).

    Raises:
        ValueError: the marginals are more than a thousandth off after 1000 sweeps.
    """
    log_kernel = -squared_distances(x0, x1) / (2.0 * noise**2)
    n, m = log_kernel.shape
    g = torch.zeros(m, dtype=torch.float64, device=log_kernel.device)
    log_n, log_m = (torch.tensor(float(k), dtype=torch.float64, device="cpu").log() for k in (n, m))
    for sweep in range(_SWEEPS):
        f = -(log_kernel + g).logsumexp(1) - log_n
        g = -(log_kernel + f[:, None]).logsumexp(0) - log_m
        if sweep % 10 == 9:
            rows = (log_kernel + f[:, None] + g).exp().sum(1)
            if float((rows * n - 1.0).abs().max()) < _TOLERANCE:
                break
    else:
        raise ValueError(
            f"entropic pairing did not converge in {_SWEEPS} sweeps at noise={noise:g}: distances are many times as "
            "large; take more noise, or pairing='optimal'"
        )
    return (log_kernel + f[:, None] + g).exp()


def entropic(x0: Tensor, x1: Tensor, noise: float, *, seed: int, first: int) -> Tensor:
    """For each row of ``x1`` a row of ``x0``, drawn from its column of the entropic plan."""
    columns = entropic_plan(x0, x1, noise).cumsum(0)
    u = uniform(len(x1), 1, seed=seed, stream=Stream.PAIRING, first_path=first, offset=4, dtype=torch.float64)
    u = u.to(columns.device)[:, 0] * columns[-1]
    return torch.searchsorted(columns.mT.contiguous(), u[:, None], right=True)[:, 0].clamp(max=len(x0) - 1)
