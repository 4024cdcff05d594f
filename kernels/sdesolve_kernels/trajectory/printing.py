"""Expressions as lines of source, the same for every target: what differs is in a `Dialect`."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import Expression, topological

__all__ = ["AbstractDialect", "Writer", "indented", "needed"]

_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
    "ne": "!=", "and": "&", "or": "|",
}  # fmt: skip
_LONGEST = 60  # characters of a subexpression written where it is used


class AbstractDialect(abc.ABC):
    """How a target spells what an expression needs."""

    @abc.abstractmethod
    def constant(self, value: float | bool, dtype: str) -> str:
        """A literal of the given type."""

    @abc.abstractmethod
    def call(self, name: str, args: Sequence[str], dtype: str) -> str:
        """A function, `where`, `not` or fused multiply-add (`fma`) of operands of type ``dtype``."""

    @abc.abstractmethod
    def cast(self, value: str, source: str, target: str) -> str:
        """A conversion."""


@final
class Writer:
    """Writes expressions as assignments, each shared one once; one used once goes where it is used if it is short.

    Args:
        dialect: spelling.
        leaf: the text of a leaf.
    """

    def __init__(self, dialect: AbstractDialect, leaf: Callable[[Expression], str]) -> None:
        self._dialect, self._leaf = dialect, leaf
        self._count = 0

    def lines(self, roots: Sequence[tuple[str, Expression]], known: dict[int, str] | None = None) -> list[str]:
        """Lines that assign each root to its target; all are computed before any target is written.

        Args:
            roots: pairs of target and expression.
            known: names of expressions that have been computed already; grows.
        """
        known = {} if known is None else known
        order = needed([e for _, e in roots], known)
        uses = Counter(a.number for e in order for a in e.args)
        uses.update(e.number for _, e in roots)
        text: dict[int, str] = {}
        fused = self._fused(order, uses) - known.keys()
        out: list[str] = []
        finals = {e.number for _, e in roots}
        for e in order:
            if e.number in fused:
                continue
            if e.op == "sum" and e.number not in known:
                out += self._sum(e, text, known)
                continue
            words = self._text(e, text, fused, known)
            # A leaf that is a target as well must be read before anything is written.
            if (e.args and ((uses[e.number] > 1 and e.op != "neg") or len(words) > _LONGEST)) or (
                not e.args and e.number in finals and e.op != "const"
            ):
                name = self._name()
                out.append(f"{name} = {words}")
                known[e.number] = words = name
            text[e.number] = words
        targets = [f"{target} = {_stripped(text[e.number])}" for target, e in roots]
        return out + targets

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def _sum(self, e: Expression, text: dict[int, str], known: dict[int, str]) -> list[str]:
        """A long sum, a line for each term."""
        name = known[e.number] = text[e.number] = self._name()
        first, *rest = (_stripped(text[a.number]) for a in e.args)
        return [f"{name} = {first}", *(f"{name} = {name} + {_bracketed(term)}" for term in rest)]

    def _fused(self, order: Sequence[Expression], uses: Counter[int]) -> set[int]:
        """Products that are used once, by a sum, and go into a fused multiply-add."""
        fused: set[int] = set()
        for e in order:
            if e.op in ("add", "sub") and e.dtype != "int64":
                for a in e.args:
                    if a.op == "mul" and uses[a.number] == 1:
                        fused.add(a.number)
                        break
        return fused

    def _text(self, e: Expression, text: dict[int, str], fused: set[int], known: dict[int, str]) -> str:
        if e.number in known:
            return known[e.number]
        if e.op == "const":
            return self._dialect.constant(e.data, e.dtype)
        if not e.args:
            return self._leaf(e)
        if e.op in ("add", "sub") and any(a.number in fused for a in e.args):
            return self._multiply_add(e, text, fused)
        args = [text[a.number] for a in e.args]
        if e.op in _OPERATORS:
            return f"({args[0]} {_OPERATORS[e.op]} {args[1]})"
        if e.op == "neg":
            return f"(-{args[0]})"
        if e.op == "cast":
            return self._dialect.cast(args[0], e.args[0].dtype, e.dtype)
        return self._dialect.call(e.op, [_stripped(a) for a in args], e.args[-1].dtype)

    def _multiply_add(self, e: Expression, text: dict[int, str], fused: set[int]) -> str:
        a, b = e.args
        left = a.number in fused
        product, other = (a, b) if left else (b, a)
        x, y = (text[f.number] for f in product.args)
        z = text[other.number]
        if e.op == "sub":
            x, z = (x, f"-{z}") if left else (f"-{x}", z)
        return self._dialect.call("fma", [_stripped(x), _stripped(y), _stripped(z)], e.dtype)


def needed(roots: Iterable[Expression], known: dict[int, str]) -> list[Expression]:
    """Topological order that stops at what is known."""
    if not known:
        return topological(roots)
    seen: set[int] = set()
    order: list[Expression] = []
    for root in roots:
        stack = [(root, False)]
        while stack:
            e, ready = stack.pop()
            if ready:
                order.append(e)
            elif e.number not in seen:
                seen.add(e.number)
                stack.append((e, True))
                if e.number not in known:
                    stack.extend((a, False) for a in reversed(e.args))
    return order


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
