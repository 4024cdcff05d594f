"""A whole sampler as one function without host synchronisation, and its capture as a CUDA graph.

A network at batch 64 on a fast GPU spends more time being launched than running. Captured, the sampler is one launch;
seed and first path live in device memory, so that each replay draws new samples.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import final

import torch
from sdesolve_kernels import Stream, perturb
from sdesolve_kernels.dispatch import requested_backend
from torch import Tensor

from sdesolve.brownian import BrownianPath, Place
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.integrate.executors import KernelContext
from sdesolve.integrate.lowering import lower
from sdesolve.integrate.problem import Problem, Watched
from sdesolve.integrate.save_at import SavePlan
from sdesolve.reverse import Score
from sdesolve.sde import AbstractSemilinear, per_sample
from sdesolve.solvers.base import AbstractSolver

_CAPTURED_AT_ONCE = 4


@final
class _DeviceSeed(KernelContext):
    """Rows by kernel with seed and first path in device memory."""

    seed: int | Tensor = 0
    first_path: int | Tensor = 0

    def offset(self, draw: int) -> Place:
        return {"seed": self.seed, "stream": Stream.DRIVING, "first_path": self.first_path, "step": draw}


@final
class StraightSampler:
    """Prior, steps of rows ``a x + sum_i b_i y_i + c z``, and Tweedie's formula, as a function of a seed.

    All coefficients and times are on the device before the first step, and nothing in a call reads a tensor on the host
    if ``seed`` and ``first_path`` are integers, or if they are tensors on a device that is not the host.

    Args:
        process: the forward diffusion.
        score: ``grad_x log p_t(x)``.
        backward: the reverse SDE or probability flow of both.
        solver: one whose steps are rows of coefficients (`AbstractTabulated`).
        times: decreasing grid, float64.
        shape: ``(batch, *state)``.
        denoise: end with Tweedie's formula.
        dtype: of the samples.
        device: of the samples.

    Raises:
        ValueError: the steps of ``solver`` are no rows of coefficients on this equation.
    """

    def __init__(
        self,
        process: AbstractDiffusion,
        score: Score,
        backward: AbstractSemilinear,
        solver: AbstractSolver,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        denoise: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._zeros = torch.zeros(shape, dtype=dtype, device=device)
        noise = BrownianPath(0)
        problem = Problem(solver, backward, Watched(backward, times), noise, times, self._zeros, SavePlan(times, None))
        problem.watched.checking = False  # a check of values would wait for the device
        self._lowered = lower(problem)
        if self._lowered.one_step is not None or self._lowered.correcting is not None:
            raise ValueError(
                f"a sampler is captured whole only if its steps are rows of coefficients, and {type(solver).__name__} "
                f"on {type(backward).__name__} is not; use EulerMaruyama(), or leave cuda_graph out"
            )
        self._context = _DeviceSeed(self._lowered, dtype, device)
        self._spans = problem.spans(0, problem.steps)
        self._score = score
        self._end = times[-1].to(dtype=dtype, device=device)
        self._prior = process.prior_at(float(times[0])).std
        last = times[-1]
        self._alpha, self._sigma2 = (
            c.to(dtype=dtype, device=device) for c in (process.alpha(last), process.sigma(last).square())
        )
        self._denoise = denoise
        self._backward = backward  # kept alive: captured samplers are told apart by the identity of what they run

    @torch.no_grad()
    def __call__(self, seed: int | Tensor, first_path: int | Tensor = 0) -> Tensor:
        """Draws the batch of rows ``first_path ...`` for a seed: the same as `sample` draws."""
        x = perturb(self._zeros, 0.0, self._prior, seed=seed, stream=Stream.INITIAL, first_path=first_path)
        self._context.seed, self._context.first_path = seed, first_path
        states = self._lowered.start(x)
        for k, span in enumerate(self._spans):
            self._context.begin(k, span)
            states = self._lowered.step(self._context, states)
        x = states[0]
        if not self._denoise:
            return x
        s = self._score(x, self._end)
        return (x + per_sample(self._sigma2, x) * s) / per_sample(self._alpha, x)


@final
class CapturedSampler:
    """A `StraightSampler` captured as a CUDA graph; calling it replays the graph.

    The score must run the same kernels at every call, and its weights must stay where they are (updating them in place
    is seen by the next replay).
    """

    def __init__(self, sampler: StraightSampler, device: torch.device) -> None:
        self._device = device
        # Memory that is made in inference mode could not be written to outside of it. A capture takes place on one
        # stream of the device that it is for: torch's own is made on the device of its first capture.
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            self._seed = torch.zeros((), dtype=torch.int64, device=device)
            self._first_path = torch.zeros((), dtype=torch.int64, device=device)
            # Kernels compile and libraries set themselves up on the first calls, which a capture must not see.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(2):
                    sampler(self._seed, self._first_path)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=side):
                self._result = sampler(self._seed, self._first_path)
        self._sampler = sampler
        self._replaying = threading.Lock()

    def __call__(self, seed: int, first_path: int = 0) -> Tensor:
        """Draws the batch of rows ``first_path ...`` for a seed."""
        # Two threads would write one seed, and read one result.
        with self._replaying, torch.cuda.device(self._device):
            self._seed.fill_(_signed(seed))
            self._first_path.fill_(_signed(first_path))
            self._graph.replay()
            return self._result.clone()


_captured: OrderedDict[object, CapturedSampler] = OrderedDict()


def settings_of(device: torch.device) -> tuple[object, ...]:
    """What is set outside of a sampler and decides which kernels it runs: part of the key of a capture."""
    autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    precision = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return (requested_backend(), *autocast, *precision)


def captured(key: object, build: Callable[[], StraightSampler], device: torch.device) -> CapturedSampler:
    """The captured form of what ``build`` makes, kept for the last few keys: a capture costs several samplings.

    Raises:
        ValueError: ``device`` is not a CUDA device.
    """
    if key not in _captured:
        sampler = build()
        if device.type != "cuda":
            raise ValueError(
                f"cuda_graph=True needs device='cuda', got {str(device)!r}; elsewhere a sampler runs step by step"
            )
        _captured[key] = CapturedSampler(sampler, device)
        while len(_captured) > _CAPTURED_AT_ONCE:
            _captured.popitem(last=False)
    _captured.move_to_end(key)
    return _captured[key]


def _signed(value: int) -> int:
    """The int64 with the bits of the uint64 ``value``."""
    return value - 2**64 if value >= 2**63 else value
