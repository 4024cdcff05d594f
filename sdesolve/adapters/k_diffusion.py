"""Noise for samplers of k-diffusion. The package is not imported: what it asks for is a function of two levels."""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number
from sdesolve.brownian import BrownianPath, BrownianRows, drawn_seed
from sdesolve.grids import check_grid


@final
class NoiseSampler:
    """``noise_sampler(sigma, sigma_next)``: unit normals for a step between two levels of noise, by coordinates.

    For the ``noise_sampler=`` of samplers of k-diffusion, in place of its Brownian tree. They are the increments of one
    Brownian path over ``sigma``, divided by their standard deviation: for a step of ``sigmas`` the normals that step
    ``k`` of an integration has, and for levels within a step those of the same path there, so that a finer schedule
    sees the same path. Row ``i`` is a function of the seed, ``i`` and the levels, whatever else is in the batch.

    Args:
        x: a state like those to be sampled, ``(batch, *state)``.
        sigmas: the levels of the run, ``(steps + 1,)``, decreasing, of which the last may be 0.
        seed: of all rows, or a list of one for each; drawn if left out.
        first_path: number of the path of row 0.

    Raises:
        TypeError: ``x`` is no tensor of floating point, or the seed no integer.
        ValueError: levels that do not decrease, or not as many seeds as rows.

    Example:
        >>> x = sample_dpmpp_2m_sde(model, x, sigmas, noise_sampler=NoiseSampler(x, sigmas, seed=0))
    """

    def __init__(self, x: Tensor, sigmas: Tensor, seed: int | list[int] | None = None, *, first_path: int = 0) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim == 0:
            raise TypeError("x must be a tensor (batch, *state) of floating point, like the states to be sampled")
        self._times = check_grid(torch.as_tensor(sigmas).detach().cpu().double())
        if self._times.ndim != 1 or not bool((self._times.diff() < 0).all()) or float(self._times[-1]) < 0:
            raise ValueError("sigmas must be (steps + 1,) and decrease to 0 or above")
        seed = drawn_seed() if seed is None else seed
        self._paths: BrownianPath | BrownianRows
        if isinstance(seed, int):
            self._paths = BrownianPath(seed, first_path)
            self._parts = [(self._paths, len(x))]
        else:
            self._paths = BrownianRows(seed, [first_path] * len(seed))
            self._paths.check_rows(len(x))
            self._parts = [(BrownianPath(own, first_path), 1) for own in seed]
        self._shape, self._dtype, self._device = tuple(x.shape), x.dtype, x.device
        self._known = {float(level): k for k, level in enumerate(torch.as_tensor(sigmas).tolist())}

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """Standard normals ``(batch, *state)`` for a step from ``sigma`` to ``sigma_next``.

        Raises:
            ValueError: a level outside the run's, or two that are one.
        """
        a, b = number(float(sigma), "sigma"), number(float(sigma_next), "sigma_next")
        low, high = float(self._times[-1]), float(self._times[0])
        if a == b or not all(low <= level * (1 + 1e-6) and level <= high * (1 + 1e-6) for level in (a, b)):
            raise ValueError(
                f"a step goes between two levels of {low:.6g} to {high:.6g}, got {a:.6g} and {b:.6g}; give "
                "NoiseSampler the sigmas of the run"
            )
        wide = torch.promote_types(self._dtype, torch.float32)
        k = self._known.get(a)
        if k is not None and self._known.get(b) == k + 1:
            unit = torch.arange(2, dtype=torch.float64, device="cpu")
            z = self._paths.increments(unit, self._shape, step=k, dtype=wide, device=self._device)[0]
            return z.to(self._dtype)
        a, b = (min(max(level, low), high) for level in (a, b))
        of_row: dict[str, Any] = {"times": self._times, "dtype": wide, "device": self._device}
        made = [path.increment(a, b, (rows, *self._shape[1:]), **of_row) for path, rows in self._parts]
        return (torch.cat(made) / math.sqrt(abs(b - a))).to(self._dtype)
