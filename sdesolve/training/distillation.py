"""Few steps: flow maps, distilled from a score."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import final

import torch
from sdesolve_kernels import Stream, normal, uniform
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve.diffusions.base import AbstractDiffusion, as_time
from sdesolve.reverse import Score
from sdesolve.sampling import tweedie
from sdesolve.scores.base import ExactScore, check_process
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import per_sample
from sdesolve.training.losses import Objective, check_data


@final
class FlowMap(nn.Module):
    r"""``x_t`` of the probability flow from ``x_s``, ``t <= s``, by one call of a network.

    ``x_t = sigma_t / sigma_s x_s + (alpha_t - alpha_s sigma_t / sigma_s) D(x_s, s, t)``, in which ``D`` is the mean of
    the denoised state along the way, over ``alpha / sigma``: of the scale of the data, and ``E[x_0 | x_s]`` at ``t =
    s``. At ``t = 0`` the map is ``D`` itself, a consistency model. Kim et al. 2024 (CTM), eq. 9, with another
    weighting; Song et al. 2023; Boffi, Albergo and Vanden-Eijnden 2024, definition 2.1.

    Args:
        net: ``D``, a function or module ``(x, s, t) -> (batch, *state)`` with times ``(batch,)`` of the process.
        process: the forward process of the flow.

    Raises:
        TypeError: an argument of another type.
    """

    no_score = "a FlowMap is no score, but the way of the flow from time to time: draw by model.sample(shape, seed=0)"

    def __init__(self, net: Callable[[Tensor, Tensor, Tensor], Tensor], process: AbstractDiffusion) -> None:
        super().__init__()
        check_process(process)
        if not callable(net):
            raise TypeError(f"net must be a function or module of (x, s, t), got {kind_of(net)}")
        self.net, self.process = net, process

    def forward(self, x: Tensor, s: Tensor | float, t: Tensor | float = 0.0) -> Tensor:
        """``x_t``, of the shape of ``x: (batch, *state)``, from ``s > 0`` to ``t <= s``, each ``()`` or ``(batch,)``.

        Raises:
            ValueError: ``t > s`` anywhere (checked where the times are on the host), or a network that returns another
                shape.
        """
        s, t = as_time(s), as_time(t)
        if s.device.type == t.device.type == "cpu" and bool((t > s).any()):
            raise ValueError(f"a flow map goes from s to t <= s; got s = {short(s.tolist())}, t = {short(t.tolist())}")
        D = self.denoised(x, s, t)
        ratio = self.process.sigma(t) / self.process.sigma(s)
        weight = self.process.alpha(t) - self.process.alpha(s) * ratio
        return per_sample(ratio.to(x.dtype), x) * x + per_sample(weight.to(x.dtype), x) * D

    def denoised(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """``D``: what the network returns."""
        D = self.net(x, s.to(x).expand(len(x)), t.to(x).expand(len(x)))
        if not isinstance(D, Tensor) or D.shape != x.shape:
            got = tuple(D.shape) if isinstance(D, Tensor) else type(D).__name__
            raise ValueError(f"the network must return the shape of its state, {tuple(x.shape)}, got {got}")
        return D

    @torch.no_grad()
    def sample(
        self,
        shape: tuple[int, ...],
        *,
        grid: Tensor | None = None,
        seed: int,
        first_path: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Samples ``(batch, *state)``: the map from each time of ``grid`` to the next, from a draw of the prior.

        Args:
            shape: of the samples.
            grid: decreasing times; by default one step, from ``t_max`` to 0.
            seed: of the start states, which `sdesolve.sample` has too.
            first_path: number of the first sample.
            dtype, device: of the samples.

        Raises:
            ValueError: times that do not decrease, or leave ``[0, t_max]``.
        """
        p = self.process
        times = [p.t_max, 0.0] if grid is None else [float(t) for t in grid]
        inside = len(times) > 1 and times[-1] >= 0 and times[0] <= p.t_max * (1 + 1e-6)
        if not inside or times != sorted(set(times), reverse=True):
            raise ValueError(f"grid must decrease within [0, t_max = {p.t_max}], got {short(times)}")
        x = p.prior_at(times[0]).sample(shape, seed=seed, first_path=first_path, dtype=dtype, device=device)
        for s, t in itertools.pairwise(times):
            x = self(x, s, t)
        return x


@final
class FlowMapDistillation(Objective):
    r"""``(D(x_s, s, t) - target)^2``, which makes a `FlowMap` the one of a score, for all ``t``; on data for ``x_s``.

    Between neighbours ``s > r`` of a grid, uniform in the log-SNR, the mean of the denoised state is the score's,
    ``D_r``, by a step of second order; from ``r`` on it is the map's own. So the target is
    ``w D_r + (1 - w) D(x_r, r, t)``, ``w = (q_r - q_s) / (q_t - q_s)``, ``q = alpha / sigma``, without gradient: for
    ``t = 0``, where ``w = 0``, consistency distillation (Song et al. 2023, algorithm 2), for others that of flow maps
    (Kim et al. 2024; Boffi et al. 2024). The last step, from ``t_min`` to 0, is the denoiser's.

    Args:
        teacher: the score, such as a trained `NetworkScore`; evaluated twice a sample, without gradient.
        steps: of the grid between ``t_max`` and ``t_min``.
        to_data: share of the samples with ``t = 0``; the others take a later time of the grid.

    Raises:
        TypeError: ``teacher`` is no score; a model that is no `FlowMap`.
        ValueError: fewer than one step, a share outside [0, 1]; a teacher of another process than the map's.
    """

    def __init__(self, teacher: Score, steps: int = 64, *, to_data: float = 0.5) -> None:
        if not callable(teacher):
            raise TypeError(f"teacher must be a score, got {kind_of(teacher)}")
        if not 0.0 <= to_data <= 1.0:
            raise ValueError(f"to_data must be a share, in [0, 1], got {short(to_data)}")
        self._teacher, self._steps, self._to_data = teacher, whole_number(steps, "steps", 1), float(to_data)
        if isinstance(teacher, FlowMap):
            raise TypeError("teacher must be a score, and a FlowMap is none; give the score that it was distilled from")

    def per_sample(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Tensor:
        """Losses ``(batch,)`` of the data ``x0: (batch, *state)`` for a `FlowMap`, each the mean over its elements."""
        model, p = self._model(score), self._process(score)
        check_data(x0)
        k, j, grid = self._draw(p, x0, seed, first_sample)
        s, r, t = grid[k], grid[k + 1], grid[j]
        z = normal(
            len(x0), x0[0].numel() if len(x0) else 1, seed=seed, stream=Stream.PERTURBATION, first_path=first_sample,
            dtype=x0.dtype, device=x0.device,
        ).reshape(x0.shape)  # fmt: skip

        def like(c: Tensor) -> Tensor:
            return per_sample(c.to(x0.dtype), x0)

        x = like(p.alpha(s)) * x0 + like(p.sigma(s)) * z
        with torch.no_grad():
            ratio = p.sigma(r) / p.sigma(s)
            first = self._denoised(p, x, s)
            x_r = like(ratio) * x + like(p.alpha(r) - p.alpha(s) * ratio) * first
            last = k == self._steps
            h = torch.where(last, 1.0, 0.5 * (p.log_snr(r.clamp_min(p.t_min)) - p.log_snr(s)).clamp_min(1e-12))
            # D linear in log q, weighted by q: int_0^h e^u u/h du / int_0^h e^u du.
            share = torch.where(last, 0.0, (h * h.exp() - h.expm1()) / (h * h.expm1()))
            mean = first + like(share) * (self._denoised(p, x_r, r.clamp_min(p.t_min)) - first)
            x_r = like(ratio) * x + like(p.alpha(r) - p.alpha(s) * ratio) * mean
            q_s, q_r, q_t = (p.alpha(u) / p.sigma(u) for u in (s, r, t))
            w = torch.where(j == k + 1, 1.0, torch.where(t == 0, 0.0, (q_r - q_s) / (q_t - q_s)))
            onward = model.denoised(x_r, r.clamp_min(p.t_min), t)
            target = like(w) * mean + (1.0 - like(w)) * onward
        return (model.denoised(x, s, t) - target).square().flatten(1).mean(1)

    def times(self, score: Score, x0: Tensor, *, seed: int, first_sample: int = 0) -> Tensor:
        """The times ``s`` that the map starts from."""
        k, _, grid = self._draw(self._process(score), x0, seed, first_sample)
        return grid[k].to(x0.dtype)

    def __repr__(self) -> str:
        return f"FlowMapDistillation({type(self._teacher).__name__}, steps={self._steps}, to_data={self._to_data:g})"

    def _draw(self, p: AbstractDiffusion, x0: Tensor, seed: int, first_sample: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places of ``s`` and of ``t`` on the grid, and the grid, which ends at ``t_min`` and 0."""
        high, low = (float(p.log_snr(t)) for t in (p.t_max, p.t_min))
        grid = p.time_at_log_snr(torch.linspace(high, low, self._steps + 1, dtype=torch.float64, device=x0.device))
        grid[0], grid[-1] = p.t_max, p.t_min
        grid = torch.cat([grid, grid.new_zeros(1)])
        first = whole_number(first_sample, "first_sample", 0)
        u = uniform(len(x0), 3, seed=seed, stream=Stream.TIMES, first_path=first, dtype=torch.float64, device=x0.device)
        k = (u[:, 0] * (self._steps + 1)).long().clamp(max=self._steps)
        j = k + 1 + (u[:, 1] * (self._steps + 1 - k)).long()
        return k, torch.where(u[:, 2] < self._to_data, self._steps + 1, j).clamp(max=self._steps + 1), grid

    def _denoised(self, p: AbstractDiffusion, x: Tensor, t: Tensor) -> Tensor:
        if isinstance(self._teacher, NetworkScore):
            return self._teacher.data(x, t)
        if isinstance(self._teacher, ExactScore):
            return self._teacher.denoise(x, t)
        return tweedie(p, self._teacher, x, t)

    def _model(self, score: object) -> FlowMap:
        if not isinstance(score, FlowMap):
            raise TypeError(f"distillation trains a FlowMap, got {kind_of(score)}")
        return score

    def _process(self, score: object) -> AbstractDiffusion:
        ours = self._model(score).process
        theirs = getattr(self._teacher, "process", ours)
        if theirs is not ours and theirs.identity() != ours.identity():
            raise ValueError(f"the teacher was made for {theirs} and the map for {ours}; make both for one process")
        return ours
