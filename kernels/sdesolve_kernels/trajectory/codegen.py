"""Expressions as lines of source, the same for every target: what differs is in an `AbstractDialect`."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from sdesolve_kernels.trajectory.expressions import I64, Expression, topological
from sdesolve_kernels.trajectory.leaves import (
    Accumulated,
    Column,
    Cotangent,
    LoopInvariant,
    NoiseLeaf,
    PathInvariant,
    State,
)
from sdesolve_kernels.trajectory.operations import OPERATIONS, OpSpec

__all__ = ["LOCALS", "AbstractDialect", "Writer", "indented", "local", "needed"]

# What the local variable of a leaf begins with, in every target; its number follows.
LOCALS: dict[type[Any], str] = {
    State: "x", NoiseLeaf: "z", Column: "c", LoopInvariant: "u", PathInvariant: "i", Cotangent: "g", Accumulated: "q",
}  # fmt: skip

_LONGEST = 60  # characters of a subexpression written where it is used


class AbstractDialect(abc.ABC):
    """How a target spells what an expression needs."""

    @abc.abstractmethod
    def constant(self, value: float | bool, dtype: str) -> str:
        """A literal of the given type."""

    @abc.abstractmethod
    def call(self, operation: OpSpec, args: Sequence[str], dtype: str) -> str:
        """An operation on arguments of type ``dtype``."""

    @abc.abstractmethod
    def cast(self, value: str, source: str, target: str) -> str:
        """A conversion."""


@final
class Writer:
    """Writes expressions as assignments, each shared one once; one used once goes where it is used if it is short.

    Args:
        dialect: spelling.
        leaf: the text of a leaf.
        fusing: whether a product that a sum adds becomes a fused multiply-add.
    """

    def __init__(self, dialect: AbstractDialect, leaf: Callable[[Expression], str], fusing: bool = True) -> None:
        self._dialect, self._leaf, self._fusing = dialect, leaf, fusing
        self._count = 0

    def lines(self, roots: Sequence[tuple[str, Expression]], known: dict[int, str] | None = None) -> list[str]:
        """Lines that assign each root to its target; all are computed before any target is written.

        Args:
            roots: pairs of target and expression.
            known: names of expressions that have been computed already; grows.
        """
        known = {} if known is None else known
        order = needed([e for _, e in roots], known)
        uses = Counter(a.id for e in order for a in e.args)
        uses.update(e.id for _, e in roots)
        text: dict[int, str] = {}
        fused = self._fused(order, uses) - known.keys()
        out: list[str] = []
        finals = {e.id for _, e in roots}
        for e in order:
            if e.id in fused:
                continue
            if e.op == "sum" and e.id not in known:
                out += self._sum(e, text, known)
                continue
            words = self._text(e, text, fused, known)
            # A leaf that is a target as well must be read before anything is written.
            if (e.args and ((uses[e.id] > 1 and e.op != "neg") or len(words) > _LONGEST)) or (
                not e.args and e.id in finals and e.op != "const"
            ):
                name = self._name()
                out.append(f"{name} = {words}")
                known[e.id] = words = name
            text[e.id] = words
        targets = [f"{target} = {_stripped(text[e.id])}" for target, e in roots]
        return out + targets

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _sum(self, e: Expression, text: dict[int, str], known: dict[int, str]) -> list[str]:
        """A long sum, a line for each term."""
        name = known[e.id] = text[e.id] = self._name()
        first, *rest = (_stripped(text[a.id]) for a in e.args)
        return [f"{name} = {first}", *(f"{name} = {name} + {_bracketed(term)}" for term in rest)]

    def _fused(self, order: Sequence[Expression], uses: Counter[int]) -> set[int]:
        """Products that are used once, by a sum, and go into a fused multiply-add."""
        fused: set[int] = set()
        for e in order if self._fusing else ():
            if e.op in ("add", "sub") and e.dtype != I64:
                for a in e.args:
                    if a.op == "mul" and uses[a.id] == 1:
                        fused.add(a.id)
                        break
        return fused

    def _text(self, e: Expression, text: dict[int, str], fused: set[int], known: dict[int, str]) -> str:
        if e.id in known:
            return known[e.id]
        if e.op == "const":
            return self._dialect.constant(e.data, e.dtype)
        if not e.args:
            return self._leaf(e)
        if e.op in ("add", "sub") and any(a.id in fused for a in e.args):
            return self._multiply_add(e, text, fused)
        if e.op == "cast":
            return self._dialect.cast(text[e.args[0].id], e.args[0].dtype, e.dtype)
        operation = OPERATIONS[e.op]
        args = sorted(e.args, key=lambda a: a.id) if operation.unordered else e.args
        words = [text[a.id] if operation.operator else _stripped(text[a.id]) for a in args]
        return self._dialect.call(operation, words, e.args[-1].dtype)

    def _multiply_add(self, e: Expression, text: dict[int, str], fused: set[int]) -> str:
        a, b = e.args
        left = a.id in fused
        product, other = (a, b) if left else (b, a)
        x, y = (text[f.id] for f in product.args)
        z = text[other.id]
        if e.op == "sub":
            x, z = (x, f"-{z}") if left else (f"-{x}", z)
        return self._dialect.call(OPERATIONS["fma"], [_stripped(x), _stripped(y), _stripped(z)], e.dtype)


def local(leaf: Any) -> str:
    """The local variable of a leaf."""
    return f"{LOCALS[type(leaf)]}{leaf.i}"


def needed(roots: Iterable[Expression], known: dict[int, str]) -> list[Expression]:
    """Topological order that stops at what is known."""
    return topological(roots, (lambda e: () if e.id in known else e.args) if known else None)


def _bracketed(text: str) -> str:
    return text if text.isidentifier() else f"({text})"


def _stripped(text: str) -> str:
    """Without a pair of brackets round the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text


def indented(lines: Iterable[str], levels: int) -> list[str]:
    """Lines moved right."""
    return ["    " * levels + line if line else "" for line in lines]
