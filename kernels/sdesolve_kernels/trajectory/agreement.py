"""Whether a kernel does for the batch of a call what the functions do in torch.

A step is traced with two and with three rows. For the rows of a call it is run in torch as well, once for each size of
the batch: it must do the same operations, with arguments that follow from those of the traces, and its results must be
those of the kernel, on states whose rows all differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.operations import F32
from sdesolve_kernels.trajectory.program import Inputs, Observe, Program, Step
from sdesolve_kernels.trajectory.tracing import NOT_ALIKE, Call, Unsupported, facts_of

__all__ = ["agree", "coarsest", "distinct", "recorded", "same_operations"]

_ROWS_AT_ONCE = 1 << 16  # rows whose float64 copies are held at once
_ROUNDING = 64.0  # roundings of the state, and of what they grow to in a step
# Views do not compute; whether torch copies for one depends on the layout in memory, which a trace need not share.
_LAYOUT = frozenset(
    ("view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "clone", "contiguous", "alias", "detach", "t",
     "transpose", "permute", "as_strided", "unsqueeze", "squeeze", "select", "slice", "narrow", "unbind", "split",
     "split_with_sizes", "_to_copy", "copy", "empty", "empty_like", "new_empty", "empty_strided", "lift_fresh_copy")
)  # fmt: skip
_INDEXED = frozenset(("index", "index_put", "index_put_", "gather", "index_select"))
_SKIPPED = _LAYOUT - {"select", "slice", "narrow", "split", "split_with_sizes", "lift_fresh_copy"}


@final
class _Carrier(Tensor):
    """A tensor that torch takes for one of a subclass, as it does a traced one: some operations are others then."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> _Carrier:
        made = Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made.value = value
        return made

    __class__ = property(lambda self: Tensor)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Unsupported("it keeps what it computes in one call for the next")


@final
class _Recorder(TorchDispatchMode):
    """Carries out operations on what `_Carrier` tensors carry, and notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, spec = tree_flatten((args, kwargs or {}))
        name, facts = func.overloadpacket.__name__, facts_of(flat)
        if name in ("lift_fresh", "lift_fresh_copy") and args[0].numel():
            same = bool((args[0] == args[0].flatten()[0]).all())
            facts = (*facts, args[0].flatten()[0].item() if same else None)
        self.calls.append(Call(name, facts))
        carriers = {id(a.value): a for a in flat if type(a) is _Carrier}
        args, kwargs = tree_unflatten([a.value if type(a) is _Carrier else a for a in flat], spec)
        made = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:
            carrier = carriers[id(made)]
            with torch.utils._mode_utils.no_dispatch():
                return torch.Tensor.as_strided_(carrier, made.shape, made.stride())
        return tree_map(lambda a: self._carried(a, carriers) if isinstance(a, Tensor) else a, made)

    @staticmethod
    def _carried(made: Tensor, carriers: dict[int, _Carrier]) -> Tensor:
        if id(made) in carriers:
            return carriers[id(made)]
        return _Carrier(made.clone() if made._is_zerotensor() else made)


def recorded(step: Step, observe: Observe | None, inputs: Inputs, graded: bool = False) -> list[Call]:
    """The operations that a step, and an observable, do in torch; on states that need gradients if it is `graded`."""
    recorder = _Recorder()
    fields = [getattr(inputs, f.name) for f in dataclasses.fields(inputs)]
    carried = Inputs(*tree_map(lambda a: _Carrier(a.clone()), fields))  # no views, which some operations tell
    for state in carried.states if graded else ():
        state.requires_grad_()
    with recorder:
        step(carried)
        if observe is not None:
            observe(carried.states)
    return recorder.calls


def same_operations(program: Program, calls: Sequence[Call], rows: int) -> None:
    """Refuses a step that does other operations for a batch of ``rows`` than for the two and three of its traces.

    Raises:
        Unsupported: it does, or it tells rows apart by their place.
    """
    two, three = program.calls
    _refuse_places(two, three)
    traces = [[c for c in of if c.name not in _SKIPPED] for of in (two, three, calls)]
    if len({len(of) for of in traces}) > 1:
        raise Unsupported(NOT_ALIKE)
    for a, b, c in zip(*traces, strict=True):
        if not (a.name == b.name == c.name and _follows(a.facts, b.facts, c.facts, rows)):
            raise Unsupported(f"{NOT_ALIKE} ({c.name})")


def _follows(two: Any, three: Any, many: Any, rows: int) -> bool:
    """Whether a fact for many rows is the one that those for two and three rows lead to."""
    if isinstance(two, tuple | list) and isinstance(three, tuple | list) and isinstance(many, tuple | list):
        return len(two) == len(three) == len(many) and all(
            _follows(a, b, c, rows) for a, b, c in zip(two, three, many, strict=True)
        )
    if type(two) is int and type(three) is int and type(many) is int:
        return many == two + (three - two) * (rows - 2)
    return bool(two == three == many) or (two != two and three != three and many != many)


def _refuse_places(two: Sequence[Call], three: Sequence[Call]) -> None:
    """Refuses rows that are told apart by known values, unless those count rows to look up, and rows that are rolled.

    Two and three rows roll onto themselves where the rows of a call do not.
    """
    if len(two) != len(three):
        raise Unsupported(NOT_ALIKE)
    told: dict[int, bool] = {}  # calls with such values, and whether they count
    for k, (a, b) in enumerate(zip(two, three, strict=True)):
        by_row = [i for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=False)) if m != n]
        if a.name == "roll" and by_row:
            shifts, axes = a.facts[1 : 1 + len(a.facts) // 2], a.facts[1 + len(a.facts) // 2 :]
            if not axes or any(n and i % len(a.shape) in by_row for n, i in zip(shifts, axes, strict=True)):
                raise Unsupported(f"{NOT_ALIKE} (roll)")
        counting = a.name == "arange" or (a.name in _LAYOUT and all(told.get(i, True) for i in a.sources))
        if a.constant and any(i in a.varies or i in b.varies for i in by_row):
            told[k] = counting
        if told.keys().isdisjoint(a.sources):
            continue
        if a.constant or a.name in _LAYOUT:
            told[k] = counting
        elif a.name not in _INDEXED or not all(told.get(i, True) for i in a.sources) or a.sources[0] in told:
            raise Unsupported(f"{NOT_ALIKE} ({a.name})")


def distinct(x: Tensor, round_: int = 0) -> Tensor:
    """``x`` with every element moved by an amount of its own, up to a tenth of its size, or 0.1 where it is 0."""
    generator = torch.Generator().manual_seed(0x5DE + round_)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return u.sub_(0.5).mul_(0.2).mul_(x.abs().masked_fill_(x == 0, 1.0)).add_(x)


def coarsest(program: Program) -> float:
    """The rounding error of the least precise type that a program computes in."""
    used = {e.dtype for e in topological([*program.states, *program.observed])}
    return torch.finfo(torch.float32 if F32 in used else program.signature.dtype).eps


def agree(
    eager: Callable[[Tensor], Tensor], kernel: Callable[[Tensor], Tensor], x: Tensor, eps: float | None = None
) -> None:
    """Compares two forms of a step, or of any function of a batch, on states near ``x`` whose rows all differ.

    Args:
        eager: the function in torch.
        kernel: the other form.
        x: ``(batch, *state)``.
        eps: the rounding error of what they compute in (`coarsest`); that of ``x`` by default.

    The tolerance is what rounding amounts to: of the state, of the result, and what a rounding of the state grows to.
    Where a function jumps, rounding may decide; such rows are others in a second round.

    Raises:
        Unsupported: they differ; says where, and by how much.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    first = _differing(eager, kernel, distinct(x), eps)
    if not bool(first.any()):
        return
    both = first & _differing(eager, kernel, distinct(x, 1), eps)
    if bool(both.any()) or int(first.sum()) > max(1, len(x) // 100):
        row = int((both if bool(both.any()) else first).nonzero()[0])
        raise Unsupported(
            f"its kernel and its step in torch differ by more than rounding, first in row {row} of {len(x)}: it "
            "couples the paths of the batch, or depends on a path's place in it"
        )


def _differing(eager: Callable[[Tensor], Tensor], kernel: Callable[[Tensor], Tensor], x: Tensor, eps: float) -> Tensor:
    """Rows in which the two differ, ``(batch,)``."""
    wanted, given = eager(x), kernel(x)
    if given.shape != wanted.shape:
        raise Unsupported(f"its kernel returns {tuple(given.shape)} where torch returns {tuple(wanted.shape)}")
    largest = wanted.abs().nan_to_num_(0.0, 0.0, 0.0).amax(0).double()
    parts = zip(*(a.split(_ROWS_AT_ONCE) for a in (x, wanted, given)), strict=True)
    wrong = [_beyond_rounding(a.double(), b.double(), c.double(), largest, eps) for a, b, c in parts]
    if not any(bool(part.any()) for part in wrong):
        return torch.zeros(len(x), dtype=torch.bool, device=x.device)
    sign = torch.ones_like(x)
    sign.reshape(-1)[::2] = -1
    wanted, given = wanted.double(), given.double()
    grown = (eager(x * (1 + 4 * eps * sign)).double() - wanted).abs().nan_to_num(0.0, 0.0, 0.0)
    allowed = _ROUNDING * (_scale(x.double(), wanted, eps) + grown + grown.median(0).values)
    return (torch.cat(wrong) & ~((given - wanted).abs() <= allowed)).reshape(len(x), -1).any(1)


def _scale(x: Tensor, wanted: Tensor, eps: float) -> Tensor:
    """A rounding of the state and of the result."""
    state = x.abs().reshape(len(x), -1).amax(1).reshape(-1, *(1,) * (wanted.ndim - 1))
    return eps * (state + wanted.abs().nan_to_num(0.0, 0.0, 0.0))


def _beyond_rounding(x: Tensor, wanted: Tensor, given: Tensor, largest: Tensor, eps: float) -> Tensor:
    """Where results of some rows differ by more than rounding; ``largest`` are the sizes over all rows."""
    same = (given == wanted) | (given.isnan() & wanted.isnan())
    return ~same & ~((given - wanted).abs() <= _ROUNDING * (_scale(x, wanted, eps) + eps * largest))
