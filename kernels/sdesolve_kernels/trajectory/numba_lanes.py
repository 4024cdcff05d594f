"""Loops over the lanes of a block that compute expressions, for `numba_source`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from sdesolve_kernels.trajectory.expressions import Expression, Graph
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.printing import Writer, indented, needed
from sdesolve_kernels.trajectory.rolling import Mapped, Rolled, roll

__all__ = ["Lanes"]

Target = tuple[int, Expression]


@final
class Lanes:
    """Rows of scratch memory with an entry per lane, and the loops that fill them.

    Args:
        graph: makes expressions.
        lanes: of a block.
        columns: of the table.
        writer: writes expressions over the names that `place` reads.
        place: where a ``state``, ``noise`` or ``invariant`` leaf lies: its name, and the text of its row, a number or
            an expression of the step.
    """

    def __init__(
        self,
        graph: Graph,
        lanes: int,
        columns: int,
        writer: Writer,
        place: Callable[[Expression], tuple[str, str]],
    ) -> None:
        self.lanes, self.count = lanes, 0
        self._graph, self._columns, self._writer, self._place = graph, columns, writer, place

    def rows(self, count: int) -> int:
        """The first of so many new rows."""
        self.count += count
        return self.count - count

    def at(self, row: int) -> str:
        """Entry of this lane in a row."""
        return f"s[{row * self.lanes} + l]" if row else "s[l]"

    def compute(self, targets: Sequence[Target]) -> list[str]:
        """Lines that assign expressions to rows, all of them computed before any row that they read is written.

        One loop over lanes, if there is neither a matrix product nor a long sum of terms that are alike. Otherwise one
        up to each depth of those, which leaves in rows of their own whatever later loops need.
        """
        schedule = _Schedule(self._graph, [e for _, e in targets])
        kept: dict[int, int] = {}  # expression -> row
        lines: list[str] = []
        for level in range(schedule.last + 1):
            here: list[Target] = []
            after: list[str] = []
            stores = schedule.stores(level)
            for e in stores:
                kept[e.number] = self.rows(1)
                here.append((kept[e.number], e))
            for e in schedule.barriers(level):
                result = self.rows(e.data.rows if e.op == "product" else 1)
                rolled = schedule.rolled.get(e.number)
                if e.op == "sum":
                    assert rolled is not None
                    after += self._sum(rolled, result, kept)
                    kept[e.number] = result
                    continue
                vector = self.rows(len(e.args))
                if rolled is not None:
                    after += self._loop(rolled, vector, kept)
                else:
                    here += [(vector + i, a) for i, a in enumerate(e.args)]
                after.append(self._product(e.data, vector, result))
                kept |= {self._graph.element(e, i).number: result + i for i in range(e.data.rows)}
                kept[e.number] = result
            here += targets if level == schedule.last else []
            new = {e.number for e in stores}
            there = {n: row for n, row in kept.items() if n not in new}
            lines += self._assign([(self.at(row), e) for row, e in here], there)
            lines += after
        return lines

    def _assign(self, targets: Sequence[tuple[str, Expression]], kept: dict[int, int]) -> list[str]:
        """One loop over lanes."""
        if not targets:
            return []
        known = {n: f"y{row}" for n, row in kept.items()}
        roots = [e for _, e in targets]
        body = self._reads(roots, known, kept) + self._writer.lines(targets, known)
        return ["for l in range(used):", *indented(body, 1)]

    def _reads(self, roots: Sequence[Expression], known: dict[int, str], kept: dict[int, int]) -> list[str]:
        """Lines that read what some expressions start from."""
        lines: dict[str, str] = {}
        for e in needed(roots, known):
            if e.number in known:
                lines[known[e.number]] = self.at(kept[e.number])
            elif e.op in ("state", "noise", "invariant"):
                name, row = self._place(e)
                lines[name] = f"s[{row} + l]" if row != "0" else "s[l]"
        return [f"{name} = {place}" for name, place in sorted(lines.items(), key=_natural)]

    def _loop(self, rolled: Rolled, first: int, kept: dict[int, int], accumulate: bool = False) -> list[str]:
        """A loop over ``j`` that fills rows from ``first`` on, or adds all terms up in that row."""
        outer: list[str] = []
        inner: dict[str, str] = {}
        names: dict[int, str] = {}
        for i, m in enumerate(rolled.mapped):
            leaf = self._graph.leaf("mapped", i, rolled.template.dtype)
            names[leaf.number] = f"m{i}"
            if m.kind in ("column", "uniform"):
                array = f"table[k * {self._columns} + " if m.kind == "column" else "uniforms["
                outer.append(f"m{i} = {array}{m.start} + j * {m.stride}]")
            else:
                outer.append(f"r{i} = {self._row_of(m, kept)}")
                inner[f"m{i}"] = f"s[r{i} + l]"
        known = {e.number: f"y{kept[e.number]}" for e in rolled.common} | names
        held = {e.number: kept[e.number] for e in rolled.common}
        commons = self._reads([rolled.template], {n: t for n, t in known.items() if n in held}, held)
        target = f"s[{first * self.lanes} + l]" if accumulate else "s[row + l]"
        body = [*(f"{n} = {t}" for n, t in inner.items()), *commons]
        if accumulate:
            *before, term = self._writer.lines([("", rolled.template)], known)
            body += [*before, f"{target} = {target} + ({term.removeprefix(' = ')})"]
        else:
            outer.append(f"row = ({first} + j) * LANES")
            body += self._writer.lines([(target, rolled.template)], known)
        return [
            f"for j in range({rolled.count}):",
            *indented([*outer, "for l in range(used):", *indented(body, 1)], 1),
        ]

    def _row_of(self, m: Mapped, kept: dict[int, int]) -> str:
        """Where the row of a mapped leaf begins, as an expression of ``j``."""
        if m.product is not None:
            base = str((kept[m.product.number] + m.start) * self.lanes)
        else:
            start = (0, m.start) if m.kind in ("state", "noise") else m.start
            base = self._place(self._graph.leaf(m.kind, start, "float32"))[1]
        return f"{base} + j * {m.stride * self.lanes}"

    def _sum(self, rolled: Rolled, row: int, kept: dict[int, int]) -> list[str]:
        clear = ["for l in range(used):", f"    {self.at(row)} = REAL(0)"]
        return clear + self._loop(rolled, row, kept, accumulate=True)

    def _product(self, m: Matrix, vector: int, result: int) -> str:
        return (
            f"product(s, {vector * self.lanes}, {result * self.lanes}, p{m.parameter}, {m.offset}, {m.rows}, "
            f"{m.columns}, {m.down}, {m.across}, used, LANES)"
        )


@final
class _Schedule:
    """In which loop each expression is computed.

    A barrier is a product or a rolled sum: a loop of its own, run when what it needs is there, whose result is there
    for loops after it.
    """

    def __init__(self, graph: Graph, roots: Sequence[Expression]) -> None:
        self.rolled: dict[int, Rolled] = {}
        self._graph = graph
        self._tried: dict[int, Rolled | None] = {}
        self.order = self._live(roots)
        self._there: dict[int, int] = {}
        self._run: dict[int, int] = {}
        for e in self.order:
            ready = max((self._there[k.number] for k in self._kids(e)), default=0)
            if self._is_barrier(e):
                self._run[e.number] = ready
                ready += 1
            self._there[e.number] = ready
        self.last = max((self._there[e.number] for e in roots), default=0)
        self._stores = self._find_stores()

    def barriers(self, level: int) -> list[Expression]:
        """Those that run after the loop of a level."""
        return [e for e in self.order if self._run.get(e.number) == level]

    def stores(self, level: int) -> list[Expression]:
        """Operations computed in the loop of a level that later loops, or a barrier after it, read."""
        return [e for e in self.order if e.number in self._stores and self._there[e.number] == level]

    def _is_barrier(self, e: Expression) -> bool:
        return e.op == "product" or (e.op == "sum" and e.number in self.rolled)

    def _kids(self, e: Expression) -> Sequence[Expression]:
        rolled = self.rolled.get(e.number)
        if rolled is None:
            return e.args
        return [*rolled.common, *(m.product for m in rolled.mapped if m.product is not None)]

    def _live(self, roots: Sequence[Expression]) -> list[Expression]:
        """What must be computed, in order; a rolled list is computed as such, not its members one by one."""
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
                    rolled = roll(self._graph, e.args) if e.op in ("sum", "product") else None
                    if rolled is not None:
                        self.rolled[e.number] = rolled
                    stack.append((e, True))
                    stack.extend((k, False) for k in reversed(self._kids(e)) if k.number not in seen)
        return order

    def _find_stores(self) -> set[int]:
        found: set[int] = set()
        for e in self.order:
            level = self._run[e.number] if self._is_barrier(e) else self._there[e.number]
            for k in self._kids(e):
                if not k.args or k.op == "element" or self._is_barrier(k):
                    continue
                common = e.number in self.rolled
                if self._there[k.number] < level or common:
                    found.add(k.number)
        return found


def _natural(item: tuple[str, str]) -> tuple[str, int]:
    return item[0][0], int(item[0][1:])
