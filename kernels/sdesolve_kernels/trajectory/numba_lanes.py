"""Loops over the lanes of a block that compute expressions, for `numba_source`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

from sdesolve_kernels.trajectory.codegen import Writer, indented, needed
from sdesolve_kernels.trajectory.expressions import BOOL, F32, F64, I64, Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import (
    Accumulated,
    Column,
    Cotangent,
    LoopInvariant,
    NoiseLeaf,
    PathInvariant,
    State,
    Strided,
)
from sdesolve_kernels.trajectory.rerolling import FEWEST, Rerolled, StridedInput, alike, reroll, with_vectors

__all__ = ["Lanes", "kind", "tiles", "typed"]

Target = tuple[int, Expression]
_IN_ROWS = (State, NoiseLeaf, PathInvariant, Cotangent, Accumulated)
_KINDS = {F32: "F32", F64: "F64", I64: "I64", BOOL: "bool"}
_SIZES = {F32: 4, F64: 8, I64: 8}
_ARRAYS = {F32: "f", F64: "d", I64: "w"}  # views of the scratch memory for types other than the state's


class Row(NamedTuple):
    """Where a value is kept: which row of those of its type."""

    place: int
    dtype: str


def kind(dtype: str) -> str:
    """The name of a type in generated source."""
    return _KINDS[dtype]


def typed(name: str, dtype: str, state: str) -> str:
    """A number of the state's type as what was kept in it."""
    if dtype == BOOL:
        return f"({name} != 0)"
    return name if dtype == state else f"{kind(dtype)}({name})"


@final
class Lanes:
    """Rows of scratch memory with an entry per lane, and the loops that fill them.

    Rows of the state's type are entries of ``s``; what has another type lies in the same memory, and its rows are
    counted in units of its own size.

    Attributes:
        count: rows of the state's type that are needed.
        arrays: names of the views for other types that are used, by type.
        vectors: for each product that was computed, the first row of the vector.

    Args:
        graph: makes expressions.
        dtype: of the state.
        lanes: of a block.
        columns: of the table.
        writer: writes expressions over the names that `place` reads.
        place: where a leaf with a number per path lies (`_IN_ROWS`): its name, and the text of its row, a number or an
            expression of the step.
    """

    def __init__(
        self,
        graph: Graph,
        dtype: str,
        lanes: int,
        columns: int,
        writer: Writer,
        place: Callable[[Expression], tuple[str, str]],
    ) -> None:
        self.lanes, self.count, self.dtype = lanes, 0, dtype
        self.arrays: dict[str, str] = {}
        self.vectors: dict[int, int] = {}
        self._graph, self._columns, self._writer, self._place = graph, columns, writer, place

    def rows(self, count: int, dtype: str = "") -> int:
        """The first of so many new rows."""
        size, own = _SIZES[self._held(dtype or self.dtype)], _SIZES[self.dtype]
        first = -(-self.count * own // size)
        self.count = -(-(first + count) * size // own)
        return first

    def at(self, row: int, dtype: str = "") -> str:
        """Entry of this lane in a row."""
        array = self._array(dtype or self.dtype)
        return f"{array}[{row * self.lanes} + l]" if row else f"{array}[l]"

    def _held(self, dtype: str) -> str:
        """The type in which values of a type are kept: truth values as numbers."""
        return self.dtype if dtype == BOOL else dtype

    def _array(self, dtype: str) -> str:
        held = self._held(dtype)
        return "s" if held == self.dtype else self.arrays.setdefault(held, _ARRAYS[held])

    def _name(self, row: Row) -> str:
        array = self._array(row.dtype)
        return f"{'y' if array == 's' else array}{row.place}"

    def accumulate(
        self, targets: Sequence[Target], sums: Sequence[tuple[int, Expression]], products: Sequence[Expression]
    ) -> tuple[list[str], list[int]]:
        """As `compute`, but what is alike among the rows of `sums`, which nothing else reads, is written in loops.

        Returns:
            The lines, and the first row of the vector of each product.
        """
        expressions, vectors = dict(sums), []
        left = set(expressions)
        for places in alike(list(expressions.values())):
            for rows in _evenly_spaced([sums[i][0] for i in places]):
                made = self._graph.vector([expressions[row] for row in rows], (rows[0], rows[1] - rows[0]))
                if reroll(self._graph, made.args) is not None:
                    vectors.append(made)
                    left -= set(rows)
        plain = [t for t in sums if t[0] in left]
        rows_of = [row for row, _ in (*targets, *plain)]
        roots = with_vectors(self._graph, [*(e for _, e in (*targets, *plain)), *vectors, *products])
        n, last = len(rows_of), len(roots) - len(products)
        lines = self._compute(list(zip(rows_of, roots[:n], strict=True)), roots[n:])
        return lines, [self.vectors[p.id] for p in roots[last:]]

    def update(self, first: int, expressions: Sequence[Expression]) -> list[str]:
        """Lines that give a state its next values, all computed before any row that they read is written.

        One loop over the numbers of the state, where they are alike and each reads its own number alone.
        """
        rerolled = reroll(self._graph, expressions)
        if rerolled is not None and not _reads_others(rerolled):
            return self._compute([], with_vectors(self._graph, [self._graph.vector(expressions, (first, 1))]))
        targets = list(enumerate(expressions, first))
        return self.compute([t for t in targets if not (isinstance(t[1].data, State) and first + t[1].data.i == t[0])])

    def compute(self, targets: Sequence[Target]) -> list[str]:
        """Lines that assign expressions to rows, all of them computed before any row that they read is written."""
        made = with_vectors(self._graph, [e for _, e in targets])
        return self._compute([(row, e) for (row, _), e in zip(targets, made, strict=True)])

    def _compute(self, targets: Sequence[Target], others: Sequence[Expression] = ()) -> list[str]:
        """As `compute`; products and vectors among `others` are computed too, and their vectors stay in rows.

        One loop over lanes, if there is neither a matrix product nor a long sum of terms that are alike. Otherwise one
        up to each depth of those, which leaves in rows of their own whatever later loops need.
        """
        schedule = _Schedule(self._graph, [*(e for _, e in targets), *others])
        kept: dict[int, Row] = {}
        lines: list[str] = []
        for level in range(schedule.last + 1):
            here: list[tuple[str, Expression]] = []
            after: list[str] = []
            made: dict[int, Row] = {}  # of vectors, in rows when the level is done
            stores = schedule.stores(level)
            for e in stores:
                kept[e.id] = Row(self.rows(1, e.dtype), e.dtype)
                here.append((self.at(*kept[e.id]), self._graph.cast(e, self._held(e.dtype))))
            for e in schedule.barriers(level):
                rerolled = schedule.rerolled.get(e.id)
                if e.op == "sum":
                    assert rerolled is not None
                    row = kept[e.id] = Row(self.rows(1, e.dtype), e.dtype)
                    zero = f"{'REAL' if e.dtype == self.dtype else kind(e.dtype)}(0)"
                    after += ["for l in range(used):", f"    {self.at(*row)} = {zero}"]
                    after += self._loop(rerolled, row, kept, accumulate=True)
                    continue
                if e.op == "vector" and e.data is not None:
                    assert rerolled is not None
                    after += self._loop(rerolled, Row(e.data[0], e.dtype), kept, stride=e.data[1])
                    continue
                result = self.rows(e.data.rows, e.dtype) if e.op == "product" else 0
                vector = self.rows(len(e.args), e.dtype)
                if rerolled is not None:
                    after += self._loop(rerolled, Row(vector, e.dtype), kept)
                else:
                    here += [(self.at(vector + i, e.dtype), a) for i, a in enumerate(e.args)]
                if e.op == "vector":
                    made |= {self._graph.element(e, i).id: Row(vector + i, e.dtype) for i in range(len(e.args))}
                    made[e.id] = Row(vector, e.dtype)
                    continue
                after += self._product(e, vector, result)
                self.vectors[e.id] = vector
                made |= {a.id: Row(vector + i, e.dtype) for i, a in enumerate(e.args) if a.args}
                kept |= {self._graph.element(e, i).id: Row(result + i, e.dtype) for i in range(e.data.rows)}
                kept[e.id] = Row(result, e.dtype)
            here += [(self.at(row), e) for row, e in targets] if level == schedule.last else []
            new = {e.id for e in stores}
            lines += self._assign(here, {n: row for n, row in kept.items() if n not in new})
            lines += after
            kept |= made
        return lines

    def _assign(self, targets: Sequence[tuple[str, Expression]], kept: dict[int, Row]) -> list[str]:
        """One loop over lanes."""
        if not targets:
            return []
        known = {n: self._name(row) for n, row in kept.items()}
        body = self._reads([e for _, e in targets], known, kept) + self._writer.lines(targets, known)
        return ["for l in range(used):", *indented(body, 1)]

    def _reads(self, roots: Sequence[Expression], known: dict[int, str], kept: dict[int, Row]) -> list[str]:
        """Lines that read what some expressions start from."""
        lines: dict[str, str] = {}
        for e in needed(roots, known):
            if e.id in known:
                lines[known[e.id]] = self.at(*kept[e.id]) + (" != 0" if e.dtype == BOOL else "")
            elif isinstance(e.data, _IN_ROWS):
                name, row = self._place(e)
                lines[name] = f"s[{row} + l]" if row != "0" else "s[l]"
        return [f"{name} = {place}" for name, place in sorted(lines.items(), key=_natural)]

    def _loop(
        self, rerolled: Rerolled, first: Row, kept: dict[int, Row], accumulate: bool = False, stride: int = 1
    ) -> list[str]:
        """A loop over ``j`` that fills rows from ``first`` on, or adds all terms up in that row."""
        outer: list[str] = []
        inner: dict[str, str] = {}
        names: dict[int, str] = {}
        for i, m in enumerate(rerolled.strided):
            leaf = self._graph.leaf(Strided(i), m.dtype)
            names[leaf.id] = f"m{i}" if m.product is not None else typed(f"m{i}", m.dtype, self.dtype)
            if m.kind in (Column, LoopInvariant):
                array = f"table[k * {self._columns} + " if m.kind is Column else "uniforms["
                outer.append(f"m{i} = {array}{m.start} + j * {m.stride}]")
            else:
                outer.append(f"r{i} = {self._row_of(m, kept)}")
                inner[f"m{i}"] = f"{'s' if m.product is None else self._array(m.dtype)}[r{i} + l]"
        known = {e.id: self._name(kept[e.id]) for e in rerolled.common} | names
        held = {e.id: kept[e.id] for e in rerolled.common}
        commons = self._reads([rerolled.template], {n: t for n, t in known.items() if n in held}, held)
        array = self._array(first.dtype)
        target = f"{array}[{first.place * self.lanes} + l]" if accumulate else f"{array}[row + l]"
        body = [*(f"{n} = {t}" for n, t in inner.items()), *commons]
        if accumulate:
            *before, term = self._writer.lines([("", rerolled.template)], known)
            body += [*before, f"{target} = {target} + ({term.removeprefix(' = ')})"]
        else:
            outer.append(f"row = ({first.place} + {'j' if stride == 1 else f'j * {stride}'}) * LANES")
            body += self._writer.lines([(target, rerolled.template)], known)
        return [
            f"for j in range({rerolled.count}):",
            *indented([*outer, "for l in range(used):", *indented(body, 1)], 1),
        ]

    def _row_of(self, m: StridedInput, kept: dict[int, Row]) -> str:
        """Where the row of a strided input begins, as an expression of ``j``."""
        if m.product is not None:
            base = str((kept[m.product.id].place + m.start) * self.lanes)
        else:
            assert m.kind is not None
            leaf = m.kind(0, m.start) if m.kind in (State, NoiseLeaf) else m.kind(m.start)
            base = self._place(self._graph.leaf(leaf, m.dtype))[1]
        return f"{base} + j * {m.stride * self.lanes}"

    def _product(self, e: Expression, vector: int, result: int) -> list[str]:
        m, array, lines, row = e.data, self._array(e.dtype), [], 0
        for height, count in tiles(m.rows):
            lines.append(
                f"product_{height}_{e.dtype}({array}, {vector * self.lanes}, {(result + row) * self.lanes}, "
                f"p{m.parameter}, {m.offset + row * m.row_stride}, {count}, {m.columns}, {m.row_stride}, "
                f"{m.column_stride}, used, LANES)"
            )
            row += height * count
        return lines


@final
class _Schedule:
    """In which loop each expression is computed.

    A barrier is a product or a rolled sum: a loop of its own, run when what it needs is there, whose result is there
    for loops after it.
    """

    def __init__(self, graph: Graph, roots: Sequence[Expression]) -> None:
        self.rerolled: dict[int, Rerolled] = {}
        self._graph = graph
        self._tried: set[int] = set()
        self.order = topological(roots, self._needs)
        self._there: dict[int, int] = {}
        self._run: dict[int, int] = {}
        for e in self.order:
            ready = max((self._there[k.id] for k in self._needs(e)), default=0)
            if self._is_barrier(e):
                self._run[e.id] = ready
                ready += 1
            self._there[e.id] = ready
        self.last = max((self._there[e.id] for e in roots), default=0)
        self._stores = self._find_stores()

    def barriers(self, level: int) -> list[Expression]:
        """Those that run after the loop of a level."""
        return [e for e in self.order if self._run.get(e.id) == level]

    def stores(self, level: int) -> list[Expression]:
        """Operations computed in the loop of a level that later loops, or a barrier after it, read."""
        return [e for e in self.order if e.id in self._stores and self._there[e.id] == level]

    def _is_barrier(self, e: Expression) -> bool:
        return e.op in ("product", "vector") or (e.op == "sum" and e.id in self.rerolled)

    def _needs(self, e: Expression) -> Sequence[Expression]:
        """What must be there before an expression; a rerolled list is computed as such, not its members one by one."""
        if e.op in ("sum", "product", "vector") and e.id not in self._tried:
            self._tried.add(e.id)
            rerolled = reroll(self._graph, e.args)
            if rerolled is not None:
                self.rerolled[e.id] = rerolled
        found = self.rerolled.get(e.id)
        if found is None:
            return e.args
        return [*found.common, *(m.product for m in found.strided if m.product is not None)]

    def _find_stores(self) -> set[int]:
        found: set[int] = set()
        for e in self.order:
            level = self._run[e.id] if self._is_barrier(e) else self._there[e.id]
            for k in self._needs(e):
                if not k.args or k.op == "element" or self._is_barrier(k):
                    continue
                common = e.id in self.rerolled
                if self._there[k.id] < level or common:
                    found.add(k.id)
        return found


def _reads_others(rerolled: Rerolled) -> bool:
    """Whether entry ``j`` reads any number of the state but number ``j``, or what is computed beside the loop does."""
    if any(m.kind is State and (m.start, m.stride) != (0, 1) for m in rerolled.strided):
        return True
    return any(isinstance(e.data, State) for e in topological([rerolled.template]))


_TALLEST = 6  # rows of a tile, `_numba.products`


def tiles(rows: int) -> list[tuple[int, int]]:
    """Rows as tiles that are nearly alike: the height, and how many of it."""
    count = -(-rows // _TALLEST)
    height, higher = divmod(rows, count)
    return [(h, n) for h, n in ((height + 1, higher), (height, count - higher)) if n]


def _evenly_spaced(rows: Sequence[int]) -> list[list[int]]:
    """Increasing numbers, cut where the distance from one to the next changes; without what is too short for a loop."""
    runs: list[list[int]] = []
    for row in rows:
        run = runs[-1] if runs else []
        if len(run) > 1 and row - run[-1] != run[1] - run[0]:
            run = []
        if not run:
            runs.append(run)
        run.append(row)
    return [run for run in runs if len(run) >= FEWEST]


def _natural(item: tuple[str, str]) -> tuple[str, int]:
    return item[0][0], int(item[0][1:])
