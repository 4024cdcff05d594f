"""The reverse of a plan as the source of a Numba kernel: a block of paths through steps, and back.

A block takes some steps from a state that was kept. It goes through them in segments, and remembers where each began;
then, from the last to the first, it takes the steps of a segment again, with states and noise left on a tape in scratch
memory, and walks back over the tape. What is added up over steps is added up for each lane along a segment, and over
lanes and segments in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, final

from sdesolve_kernels.trajectory.codegen import indented, local
from sdesolve_kernels.trajectory.expressions import Expression
from sdesolve_kernels.trajectory.leaves import Accumulated, Column, Cotangent, NoiseLeaf, PathInvariant, State
from sdesolve_kernels.trajectory.matrices import Matrix
from sdesolve_kernels.trajectory.numba_lanes import tiles
from sdesolve_kernels.trajectory.numba_source import VECTOR, AbstractPrinter
from sdesolve_kernels.trajectory.reverse import Pulled, Reverse
from sdesolve_kernels.trajectory.tracing import Unsupported

__all__ = ["REVERSE_ARGUMENTS", "ReverseKernel", "reverse_kernel"]

# As `numba_source.ARGUMENTS`.
REVERSE_ARGUMENTS = {
    "x_in": "real",  # states before the first step, CARRIED numbers a path
    "cotangents": "real",  # of the states after the last step; then of those before the first
    "first_step": "",
    "last_step": "",  # not taken any more
    "segment": "",  # steps whose states lie on the tape
    "paths": "",
    "table": "real",  # what is or would be row 0 of the table
    "uniforms": "real",
    "first_slot": "",  # of the saves that count here
    "last_slot": "",
    "saves": "int64",
    "saved": "real",  # cotangents of saved states, or 0
    "moments": "float64",  # `launch.Sweep.moments`, or 0
    "ends": "real",  # where states after the last step go, or 0
    "values": "float64",  # as `numba_source.ARGUMENTS` has moments; only with those cotangents
    "noise": "int64",
    "pointers": "int64",
    "rows": "int64",
    "each_step": "",  # whether columns get a cotangent for each step, or one for all
    "columns": "float64",  # these three are added to, the first two of each group of blocks
    "sums": "float64",
    "path_sums": "float64",
    "blocks": "",  # in all
    "groups": "",  # that blocks are in
    "column_sums": "",  # of a group
}

_ARGUMENT = {name: i for i, name in enumerate(REVERSE_ARGUMENTS)}
_BLOCKS_CUT = 8  # rows for what the generator makes beyond the numbers of a segment, before and behind them


@final
@dataclasses.dataclass(frozen=True)
class ReverseKernel:
    """Generated source, and what a launch must know of it.

    Attributes:
        source: of a module as `numba_source.NumbaKernel.source`, with `REVERSE_ARGUMENTS`.
        lanes: paths in a block.
        rows: bytes of scratch memory besides the tape.
        start: bytes that each segment adds to that, to remember where it began.
        step: bytes on the tape for a step.
        spare: bytes of the tape besides.
    """

    source: str
    lanes: int
    rows: int
    start: int
    step: int
    spare: int


def reverse_kernel(reverse: Reverse, increments: Sequence[str]) -> ReverseKernel:
    """Source for the reverse of a plan; arguments as `numba_source.numba_kernel`.

    Raises:
        Unsupported: none can be made.
    """
    for pulled in (reverse.step, reverse.observed):
        for _, outer in pulled.outers:
            if outer.product.dtype != reverse.plan.dtype:
                raise Unsupported("a matrix of another type than the state needs a gradient")
    return _Printer(reverse, increments).kernel()


@final
class _Printer(AbstractPrinter):
    about = "The reverse of a trajectory kernel, generated: states and noise of a segment on a tape, and back over it."
    arguments = REVERSE_ARGUMENTS

    def __init__(self, reverse: Reverse, increments: Sequence[str]) -> None:
        super().__init__(reverse.plan, increments)
        self.reverse, plan, self.swapped = reverse, reverse.plan, reverse.plan.program.signature.swapped
        # What a step reads is copied here from the tape: rows at distances that LLVM does not know would have to be
        # told apart when the kernel runs, and from some dozens of them on it does not vectorise for that.
        self.state = self.rows.rows(len(plan.states))
        self.noise = self.rows.rows(sum(plan.noises))
        self.path_invariant = self.rows.rows(len(plan.path_invariants))
        self.cotangent = self.rows.rows(len(plan.states) + plan.width)
        self.observed = self.rows.rows(len(plan.observed))
        self.summed = len(reverse.columns) + len(reverse.loop_invariants)
        self.accumulated = self.rows.rows(self.summed + len(reverse.path_invariants))
        self.shapes = [_Shape.of(m) for m in reverse.matrices]
        self.matrices = [self.rows.rows(-(-shape.rows * shape.stride // self.lanes)) for shape in self.shapes]
        self.turned = self.rows.rows(max((shape.stride for shape in self.shapes), default=0))

    def place(self, e: Expression) -> tuple[str, str]:
        i = e.data.i
        match e.data:
            case State():
                row = self.state
            case NoiseLeaf():
                row = self.noise
            case PathInvariant():
                row = self.path_invariant
            case Cotangent():
                row = self.cotangent
            case _:
                row = self.accumulated
        return local(e.data), str((row + i) * self.lanes)

    def kernel(self) -> ReverseKernel:
        plan, lanes = self.plan, self.lanes
        turn = self._forwards() + self._backwards()
        block = [
            "count = (last_step - first_step + segment - 1) // segment",
            "tape = STARTS + count * CARRIED * LANES",
            "noise0 = tape + (segment + 1) * CARRIED * LANES",
        ]
        spare = len(plan.states)
        for g, m in enumerate(plan.noises):
            cut = _BLOCKS_CUT + 2 * m * self.swapped  # whole pairs of steps
            block.append(f"noise{g + 1} = noise{g} + (segment * {m} + {cut}) * LANES")
            spare += cut
        block += self._load()
        block += [
            "group = ((block + 1) * groups - 1) // blocks",
            f"columns_at, sums_at = group * column_sums, group * {self.reverse.totals}",
        ]
        block += ["slot = last_slot", "for turn in range(2 * count - 1):", *indented(turn, 1)]
        block += ["keep(cotangents, first * CARRIED, s, COTANGENTS, CARRIED, lanes, LANES)"]
        source = self.source(block)
        head = (
            f"STARTS = {self.scratch // self.itemsize}  # of segments: where what is remembered lies, then the tape\n"
        )
        head += f"COTANGENTS = {self.cotangent * lanes}  # where those of the state lie\n"
        source = source.replace("\n\n\ndef trajectory", f"\n{head}\n\ndef trajectory", 1)
        row = lanes * self.itemsize
        step = (len(plan.states) + sum(plan.noises)) * row
        return ReverseKernel(source, lanes, self.scratch, len(plan.states) * row, step, spare * row)

    def _load(self) -> list[str]:
        """Where the block begins, cotangents of where it ends, and what is constant along a path."""
        lines = [
            "for i in range(CARRIED):",
            "    for l in range(used):",
            "        path = min(first + l, paths - 1)",
            "        s[STARTS + i * LANES + l] = x_in[path * CARRIED + i]",
            "        s[COTANGENTS + i * LANES + l] = cotangents[path * CARRIED + i] if l < lanes else REAL(0)",
        ]
        lines += self.constant_along_a_path(self.path_invariant)
        first = self.accumulated * self.lanes
        last = (self.turned if self.matrices else self.accumulated + self.summed + self._paths) * self.lanes
        return [*lines, f"for l in range({first}, {last}):", "    s[l] = REAL(0)"] if last > first else lines

    @property
    def _paths(self) -> int:
        return len(self.reverse.path_invariants)

    def _noise(self, k: str) -> list[str]:
        """The noise of step `k`, from the tape to its rows."""
        lines, first = [], self.noise
        for g, m in enumerate(self.plan.noises):
            if m:
                skip = "" if self.increments[g] == "two-point" else f"skip{g} + "
                at = f"(({k} + odd{g}) ^ 1) - pair{g}" if self.swapped else f"{k} - begin"
                lines.append(f"copy(s, noise{g} + ({skip}({at}) * {m}) * LANES, {first * self.lanes}, {m} * LANES)")
                first += m
        return lines

    def _state(self, k: str, *, to_tape: bool = False) -> str:
        """The state before step `k`, from the tape to its rows or from there to the tape."""
        places = f"tape + ({k} - begin) * CARRIED * LANES", str(self.state * self.lanes)
        return f"copy(s, {', '.join(places[::-1] if to_tape else places)}, CARRIED * LANES)"

    def _forwards(self) -> list[str]:
        """One segment, onto the tape."""
        plan = self.plan
        lines = [
            "# Forwards through all segments, the last of which stays on the tape; then backwards.",
            "g = turn if turn < count else 2 * count - 2 - turn",
            "begin = first_step + g * segment",
            "end = min(begin + segment, last_step)",
            f"copy(s, STARTS + g * CARRIED * LANES, {self.state * self.lanes}, CARRIED * LANES)",
            self._state("begin", to_tape=True),
        ]
        for g, m in enumerate(plan.noises):
            if m == 0:
                continue
            maker = self.increments[g].replace("-", "_")
            index, count = f"noise[{4 * g + 3}] + begin * {m}", f"(end - begin) * {m}"
            if self.swapped:  # counted from the first of a pair, to the last of one
                lines.append(f"odd{g} = noise[{4 * g + 3}] // {m} % 2")
                lines.append(f"pair{g} = (begin + odd{g}) // 2 * 2")
                index = f"noise[{4 * g + 3}] + (pair{g} - odd{g}) * {m}"
                count = f"((end + odd{g} + 1) // 2 * 2 - pair{g}) * {m}"
            if maker == "two_point":
                call = f"word({self.words_of(g)}), noise, {g}, first, {index}, {count}, True, "
            else:
                call = f"words, noise, {g}, first, {index}, {count}, "
            call += f"used, LANES, {self.numbered}"
            lines.append(f"skip{g} = {self.fill(maker)}(s, noise{g}, {call})")
        computed = self.rows.update(self.state, [self._real(e) for e in plan.states])
        step = [*self._noise("k"), *(f"c{j} = table[k * {len(plan.columns)} + {j}]" for j in self.reads(Column))]
        return [
            *lines,
            "for k in range(begin, end):",
            *indented([*step, *computed, self._state("k + 1", to_tape=True)], 1),
            "if turn < count - 1:",
            f"    copy(s, {self.state * self.lanes}, STARTS + (g + 1) * CARRIED * LANES, CARRIED * LANES)",
            "    continue",
            f"if turn == count - 1 and a[{_ARGUMENT['ends']}] != 0:",
            f"    keep(ends, first * CARRIED, s, {self.state * self.lanes}, CARRIED, lanes, LANES)",
        ]

    def _backwards(self) -> list[str]:
        """Back over the tape, from the state after the last step of the segment."""
        columns = len(self.reverse.columns)
        seen, self.read = self.read, set()
        pulled = self._pulled(self.reverse.step)
        read = self.reads(Column)
        self.read |= seen
        body = [
            "if slot >= first_slot and saves[slot] == point:",
            *indented([self._state("point"), *self._observed()], 1),
            "if point == first_step:",
            "    break",
            "k = point - 1",
            self._state("k"),
            *self._noise("k"),
            *(f"c{j} = table[k * {len(self.plan.columns)} + {j}]" for j in read),
            *pulled,
        ]
        flush = []
        if columns:
            body += [
                "if each_step:",
                "    " + self._added("columns", f"columns_at + (k - first_step) * {columns}", 0, columns),
            ]
            flush = ["if not each_step:", "    " + self._added("columns", "columns_at", 0, columns)]
        loops = len(self.reverse.loop_invariants)
        if loops:
            flush.append(self._added("sums", "sums_at", columns, loops))
        at = loops
        for row, m, shape in zip(self.matrices, self.reverse.matrices, self.shapes, strict=True):
            steps = (1, shape.stride) if shape.transposed else (shape.stride, 1)
            flush.append(
                f"add_entries(sums, sums_at + {at}, s, {row * self.lanes}, {m.rows}, {m.columns}, {steps[0]}, "
                f"{steps[1]}, REAL(0))"
            )
            at += m.rows * m.columns
        if self._paths:
            row = (self.accumulated + self.summed) * self.lanes
            flush.append(
                f"add_rows(path_sums, first * {self._paths}, s, {row}, {self._paths}, lanes, used, LANES, REAL(0))"
            )
        return ["for point in range(end, begin - 1 if g == 0 else begin, -1):", *indented(body, 1), *flush]

    def _added(self, out: str, offset: str, first: int, count: int) -> str:
        row = (self.accumulated + first) * self.lanes
        return f"add_sums({out}, {offset}, s, {row}, {count}, lanes, used, LANES, REAL(0))"

    def _observed(self) -> list[str]:
        """What the cotangent of what was saved of a state adds to that of the state."""
        plan, width = self.plan, self.plan.width
        first = self.cotangent + len(plan.states)
        at = [(self.state + i) * self.lanes for i in range(plan.numbers)]
        observe: list[str] = []
        if plan.program.observed_shape is not None:
            observe = self.rows.compute([(self.observed + i, self._real(e)) for i, e in enumerate(plan.observed)])
            at = [(self.observed + i) * self.lanes for i in range(width)]
        lines = [f"if a[{_ARGUMENT['saved']}] != 0:", "    for l in range(used):"]
        lines.append(f"        from_ = (slot * paths + min(first + l, paths - 1)) * {width}")
        lines += [
            f"        {self.rows.at(first + j)} = saved[from_ + {j}] if l < lanes else REAL(0)" for j in range(width)
        ]
        lines += [
            f"if a[{_ARGUMENT['moments']}] != 0:",
            *indented(observe, 1),
            f"    if a[{_ARGUMENT['values']}] != 0:",
            f"        accumulate(values, (slot * blocks + block) * {2 * width}, s, {at[0]}, {width}, lanes, LANES)",
        ]
        for j in range(width):
            lines += [
                f"    m = (slot * {width} + {j}) * 3",
                "    slope = moments[m + 1]",
                "    for l in range(used):",
                f"        value = moments[m] + (slope * (F64(s[{at[j]} + l]) - moments[m + 2]) if slope != 0 else 0.0)",
                f"        {self.rows.at(first + j)} = REAL(value) if l < lanes else REAL(0)",
            ]
        return [*lines, *self._pulled(self.reverse.observed, added=True), "slot -= 1"]

    def _pulled(self, pulled: Pulled, added: bool = False) -> list[str]:
        """Cotangents to their rows; those of the state in place of those after the step, or `added` to them."""
        graph, dtype = self.plan.program.graph, self.dtype
        targets: list[tuple[int, Expression]] = []
        for i, e in enumerate(pulled.states):
            own = graph.leaf(Cotangent(i), dtype)
            e = self._real(e)
            e = graph.op("add", own, e) if added else e
            if e is not own:
                targets.append((self.cotangent + i, e))
        sums: list[tuple[int, Expression]] = []
        for j, e in enumerate((*pulled.sums, *pulled.path_sums)):
            sum_ = graph.leaf(Accumulated(j), dtype)
            e = graph.op("add", sum_, self._real(e))
            if e is not sum_:
                sums.append((self.accumulated + j, e))
        products = [p for _, outer in pulled.outers for p in (outer.pulled, outer.product)]
        lines, vectors = self.rows.accumulate(targets, sums, products)
        for i, (place, _) in enumerate(pulled.outers):
            shape, out = self.shapes[place], self.matrices[place] * self.lanes
            left, right = (row * self.lanes for row in vectors[2 * i : 2 * i + 2][:: -1 if shape.transposed else 1])
            turned = self.turned * self.lanes
            lines.append(f"turn_{dtype}(s, {right}, {shape.columns}, {turned}, {shape.stride}, lanes, LANES)")
            for height, count in tiles(shape.rows):
                lines.append(
                    f"add_outer_{height}_{dtype}(s, {left}, {turned}, {out}, {count}, {shape.stride}, lanes, LANES)"
                )
                left, out = left + height * count * self.lanes, out + height * count * shape.stride
        return lines


class _Shape(NamedTuple):
    """How the sum of outer products for a matrix is kept: the longer side in whole vectors, maybe transposed."""

    rows: int
    columns: int
    stride: int
    transposed: bool

    @classmethod
    def of(cls, m: Matrix) -> _Shape:
        transposed = m.columns < m.rows
        rows, columns = (m.columns, m.rows) if transposed else (m.rows, m.columns)
        return cls(rows, columns, -(-columns // VECTOR) * VECTOR, transposed)
