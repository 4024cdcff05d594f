"""What expressions start from: the inputs of a program, and the places that a plan gives to what it computes early."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "KINDS", "PATH", "STATE", "TIME", "Accumulated", "Column", "Cotangent", "LoopInvariant", "NoiseLeaf", "PathEntry",
    "PathInvariant", "Shared", "State", "Strided", "TableColumn", "Time",
]  # fmt: skip

# What an expression depends on, besides shared parameters and constants: bits of `Expression.depends`.
TIME, PATH, STATE = 1, 2, 4


class State(NamedTuple):
    """Component ``i`` of everything carried from step to step; ``batch_row`` is 0 in a finished program."""

    batch_row: int
    i: int


class NoiseLeaf(NamedTuple):
    """Number ``i`` of the step's standard normals (or other numbers of unit variance), over all sources."""

    batch_row: int
    i: int


class PathEntry(NamedTuple):
    """Entry ``i`` of a path's row of a parameter."""

    batch_row: int
    parameter: int
    i: int


class Shared(NamedTuple):
    """Entry ``i`` of a parameter that all paths share."""

    parameter: int
    i: int


class Time(NamedTuple):
    """A time of the step: ``t0``, ``t1``, ``dt`` or ``scale``, the root of ``|dt|``."""

    name: str


class TableColumn(NamedTuple):
    """Number ``j`` of the solver's own row for the step."""

    j: int


class Column(NamedTuple):
    """What `plan` computes for each step before the launch, number ``i`` of it."""

    i: int


class LoopInvariant(NamedTuple):
    """What `plan` computes once before the launch."""

    i: int


class PathInvariant(NamedTuple):
    """What a kernel computes once for each path, before its first step."""

    i: int


class Cotangent(NamedTuple):
    """The derivative of what is differentiated in number ``i`` of the state after a step; then of an observation."""

    i: int


class Accumulated(NamedTuple):
    """What steps have added so far to sum ``i`` of a reverse sweep."""

    i: int


class Strided(NamedTuple):
    """What changes from turn to turn of a loop that `rerolling` found: `rerolling.Rerolled.strided` number ``i``."""

    i: int


# By class, the name that is `Expression.op`, and what such a leaf depends on.
KINDS: dict[type, tuple[str, int]] = {
    State: ("state", STATE),
    NoiseLeaf: ("noise", STATE),
    PathEntry: ("path_entry", PATH),
    Shared: ("shared", 0),
    Time: ("time", TIME),
    TableColumn: ("table_column", TIME),
    Column: ("column", TIME),
    LoopInvariant: ("loop_invariant", 0),
    PathInvariant: ("path_invariant", PATH),
    Strided: ("strided", STATE),
    Cotangent: ("cotangent", STATE),
    Accumulated: ("accumulated", STATE),
}
