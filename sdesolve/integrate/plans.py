"""Calls of `solve` that run as an earlier one did: from the arguments to the launch of its kernel.

A run that was fused leaves a `Plan`: what its arguments became, with what was checked on the way. The next call of the
same kind looks at what may differ, which is its state, its seed, and all that its functions hold, and launches.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any, final

import torch
from sdesolve_kernels.dispatch import requested_backend
from sdesolve_kernels.transforms import is_transformed
from torch import Tensor
from torch.autograd import forward_ad

from sdesolve._internal.modes import evaluation_mode, warn_of_training
from sdesolve.brownian import AbstractNoise, BrownianPath, drawn_seed
from sdesolve.integrate.checks import STATE_DTYPES, all_finite, check_pair, check_state
from sdesolve.integrate.solution import Solution, finished
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.sde import AbstractSDE
from sdesolve.solvers.base import AbstractRemembering, AbstractSolver

if TYPE_CHECKING:
    from sdesolve_kernels.trajectory import Guards

    from sdesolve.integrate.fused import Kernel, Layout
    from sdesolve.integrate.lowering import Lowered
    from sdesolve.integrate.problem import Problem

# Arguments of `solve` that a plan is for. With any other one, one that is new among them, a call is made in full.
PLANNED = frozenset(
    ("sde", "x0", "t0", "t1", "steps", "solver", "seed", "noise", "save_at", "observable", "reduce", "backend",
     "check_finite")
)  # fmt: skip
_planned_by = operator.itemgetter("t0", "t1", "steps", "seed", "save_at", "reduce", "backend", "check_finite")
_held = operator.itemgetter("sde", "x0", "solver", "noise")
_MOST_TIMES = 1 << 10  # of a grid that is compared by value
_MOST_STEPS = 1 << 13  # of a plan, which holds times and numbers of all of them
_of_path = operator.attrgetter(*(f.name for f in dataclasses.fields(BrownianPath) if f.name != "seed"))


@final
class Call:
    """A call of a kind that may have a plan.

    Args:
        sde, x0, solver, noise, seed, observable, check_finite: as `solve`.
        kind: what tells it from other calls, beside the state's kind, the noise but for its seed, and modes of torch.
        sign: the direction of time.

    Attributes:
        key: equal for calls that become the same, if what their functions hold is the same as well.
    """

    def __init__(
        self,
        sde: AbstractSDE,
        x0: Tensor,
        solver: AbstractSolver,
        noise: BrownianPath | None,
        seed: int | None,
        observable: Callable[..., Tensor] | None,
        check_finite: bool,
        sign: float,
        *kind: Hashable,
    ) -> None:
        self.sde, self.x0, self.solver, self.observable, self.sign = sde, x0, solver, observable, sign
        self.noise, self.seed, self.check_finite = noise, seed, check_finite
        self.key: Hashable = (
            type(sde), type(solver), sign, kind, x0.shape, x0.dtype, x0.device,
            noise and _of_path(noise), requested_backend(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x0.device.type),
        )  # fmt: skip

    @classmethod
    def of(cls, given: Mapping[str, Any], others: Mapping[str, Any]) -> Call | None:
        """The call of `solve` with these arguments, if a plan can be for it.

        Args:
            given: all arguments.
            others: what those have that are not `PLANNED` where they are left out.
        """
        t0, t1, steps, seed, save_at, reduce, backend, check_finite = _planned_by(given)
        if not (type(t0) in _NUMBERS and type(t1) in _NUMBERS and type(steps) is int and type(seed) in _SEEDS):
            return None
        if not (type(save_at) in _TEXTS and type(reduce) in _TEXTS and type(backend) is str):
            return None
        if type(check_finite) is not bool or not all(map(operator.is_, map(given.get, others), others.values())):
            return None
        kind = t0 or repr(t0), t1 or repr(t1), steps, save_at, reduce, backend  # -0.0 equals 0.0
        sign = 1.0 if t1 > t0 else -1.0
        return cls._plain(*_held(given), seed, given["observable"], check_finite, sign, *kind)

    @classmethod
    def on(
        cls, sde: AbstractSDE, x0: Tensor, times: Tensor, solver: AbstractSolver, noise: AbstractNoise, backend: str
    ) -> Call | None:
        """The call of `integrate` on a grid, ``(steps + 1,)``, from ``x0`` alone."""
        if is_transformed() or times.ndim != 1 or len(times) > _MOST_TIMES or not isinstance(noise, BrownianPath):
            return None
        sign = 1.0 if float(times[-1]) > float(times[0]) else -1.0
        return cls._plain(sde, x0, solver, noise, None, None, True, sign, times.numpy().tobytes(), backend)

    @classmethod
    def _plain(cls, sde: object, x0: object, solver: object, noise: object, *others: Any) -> Call | None:
        """A call of plain tensors, and outside all modes that see what is done with them."""
        if not isinstance(sde, AbstractSDE) or not isinstance(solver, AbstractSolver):
            return None
        if type(x0) is not Tensor or x0.dtype not in STATE_DTYPES or x0.layout != torch.strided:
            return None
        if x0.is_nested or x0.is_meta:
            return None
        if noise is not None and (type(noise) is not BrownianPath or others[0] is not None):
            return None
        if is_transformed() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return None
        if forward_ad._current_level >= 0 or (x0.requires_grad and torch.is_grad_enabled()):
            return None
        return cls(sde, x0, solver, noise, *others)

    def again(self) -> Solution | None:
        """The run that another call of this kind has planned; `None` if there is none.

        Nothing is changed then, but that a `seed` may have been drawn.

        Raises:
            ValueError, TypeError: as `solve`.
        """
        from sdesolve.integrate import fused  # not with the package, as in `solve`

        if not fused.is_planned(self.key):
            return None
        check_pair(self.solver, self.sde)
        check_state(self.x0)
        if not isinstance(self.sde, ReverseSDE | ProbabilityFlow):
            if not torch.is_grad_enabled():
                warn_of_training(self.sde)
            return self._planned()
        with evaluation_mode(self.sde.score):
            return self._planned()

    def _planned(self) -> Solution | None:
        from sdesolve.integrate import fused

        found = fused.planned(self.key, self.solver, self.sde.directed(self.sign), self.observable, None)
        return found and found[0].run(self, found[1])


@final
@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that can be made again from another state with another seed; it refers to nothing of the user.

    Attributes:
        kernel: what runs.
        layout: of what it leaves.
        times: the grid.
        ts: times of what is kept.
        table: numbers of steps.
        places: where the numbers of each source of noise begin, without their seed.
        random: whether there are any.
    """

    kernel: Kernel
    layout: Layout
    times: Tensor
    ts: Tensor
    table: Tensor | None
    places: tuple[tuple[int, int, int], ...]
    random: bool

    @classmethod
    def of(cls, problem: Problem, lowered: Lowered, kernel: Kernel) -> Plan | None:
        """The plan of a run, if nothing of it is to be made from the values of tensors or of the state again."""
        from sdesolve_kernels.trajectory import look_into

        from sdesolve.integrate import fused

        noise, sde, table = problem.noise, problem.equation, lowered.table
        if not (kernel.proved and kernel.adjoint is None and lowered.rule is None and lowered.rows is None):
            return None
        if lowered.extra or problem.save.inside or not isinstance(noise, BrownianPath) or problem.steps > _MOST_STEPS:
            return None
        places = fused.places_of(problem, kernel, lowered)
        if any(seed != noise.seed for seed, *_ in places):
            return None
        made_from = (sde.forward,) if isinstance(sde, ReverseSDE | ProbabilityFlow) else (sde,)
        if table is not None and look_into(problem.solver, *made_from).tensors:
            return None
        layout = fused.Layout.of(problem, kernel, lowered)
        return cls(kernel, layout, problem.times, problem.save.ts, table, tuple(p[1:] for p in places), problem.random)

    def run(self, call: Call, guards: Guards) -> Solution | None:
        """The run of a call; `None` where something is to be said of it that it takes the integration in full for."""
        from sdesolve_kernels.trajectory import Launch, Unsupported

        kernel, layout, noise = self.kernel, self.layout, call.noise
        if noise is None:
            call.seed = (drawn_seed() if self.random else 0) if call.seed is None else call.seed
            noise = BrownianPath(call.seed)
        launch = Launch(
            call.x0, self.times, self.table, [(noise.seed, *place) for place in self.places], layout.saves,
            layout.moments, [guards.tensors[i] for i in kernel.where],
        )  # fmt: skip
        try:
            run = kernel.trajectory.run(launch)
        except Unsupported:
            return None
        if call.check_finite and not all_finite(run.x1):
            return None
        saved, solver = layout.saved(run, *kernel.told(launch)), call.solver
        if call.check_finite and isinstance(solver, AbstractRemembering):
            solver.check_end(call.x0, saved.x1, saved.memory[: solver.memory])
        seed = noise.seed if self.random else None
        return finished(saved, saved.reason, solver, noise, seed, self.times, self.ts.clone(), saved.memory)


_NUMBERS, _SEEDS, _TEXTS = (float, int), (int, type(None)), (str, type(None))
