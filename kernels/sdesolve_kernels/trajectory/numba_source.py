"""A plan as the source of a Numba kernel: blocks of paths, one step after another, lanes of a block side by side.

Everything a block carries lies in one piece of scratch memory, in rows with an entry per lane, and stays in the
first-level cache; each loop over lanes has a constant length and only contiguous accesses at constant distances, which
is what LLVM needs to vectorise it. Normals are made for a few steps at a time.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, final

from sdesolve_kernels._numba.trajectory import Entry, is_kept, load
from sdesolve_kernels.trajectory.codegen import AbstractDialect, Writer, indented, local
from sdesolve_kernels.trajectory.expressions import Expression, topological
from sdesolve_kernels.trajectory.leaves import Column, LoopInvariant, PathEntry, PathInvariant, State
from sdesolve_kernels.trajectory.numba_lanes import Lanes, kind, typed
from sdesolve_kernels.trajectory.operations import BOOL, FLOATS, I64, OPERATIONS, OpSpec
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.tracing import TooCostly, Unsupported, dtype_name

__all__ = [
    "ARGUMENTS",
    "VECTOR",
    "AbstractPrinter",
    "Numba",
    "NumbaKernel",
    "compiled",
    "numba_kernel",
    "seconds_to_compile",
]

# What a kernel is called with: the address of these, as int64; and which of them are addresses, of what.
ARGUMENTS = {
    "x_in": "real",  # states to start from, in_width numbers a path; what is carried beyond them starts at 0
    "in_width": "",
    "x_out": "real",  # where the first out_width numbers of each path's state go; may be x_in
    "out_width": "",
    "first_step": "",
    "last_step": "",  # not taken any more
    "paths": "",
    "blocks": "",
    "table": "real",  # what is or would be row 0 of the table
    "uniforms": "real",
    "first_slot": "",  # the first of the saves that is made
    "saves": "int64",  # steps to save after, with a -1 behind the last
    "saved": "real",  # saved states, or 0
    "moments": "float64",  # saved moments, or 0
    "noise": "int64",  # seed, stream, first path and index of the first number of each source
    "pointers": "int64",  # addresses of captured tensors
    "rows": "int64",  # numbers of the rows' paths, less that of the first path; only where they are listed
}

_SECONDS_A_LINE, _SECONDS_A_CALL = 0.009, 0.018
# Functions of tens of operations, which are compiled into the loop wherever they are called.
_INLINED = [
    f"{s.numba.partition('_')[0]}_{dtype}(" for s in OPERATIONS.values() if "_{dtype}(" in s.numba
    and not (s.jump or s.exact) for dtype in FLOATS
]  # fmt: skip
_LANES = {"float32": 128, "float64": 64}
VECTOR = 16  # lanes that are computed at least, and a multiple of which is
_CHUNK, _CHUNK_ALONE = 12, 256  # normals a path that are made at a time, at least


@final
@dataclasses.dataclass(frozen=True)
class NumbaKernel:
    """Generated source, and what a launch must know of it.

    Attributes:
        source: of a module that defines ``trajectory(arguments, scratch, start, stop)``: it carries blocks ``start`` to
            ``stop`` through the steps that the `ARGUMENTS` say.
        lanes: paths in a block.
        scratch: bytes of scratch memory.
        width: numbers saved for each path at a saving time.
    """

    source: str
    lanes: int
    scratch: int
    width: int


def seconds_to_compile(source: str) -> float:
    """What compiling a kernel is expected to take; within a factor of 2 on six programs that took 3 to 15 s."""
    calls = sum(source.count(text) for text in _INLINED)
    return 1.0 + _SECONDS_A_LINE * source.count("\n") + _SECONDS_A_CALL * calls


def compiled(source: str, seconds: float, what: str = "kernel") -> Entry:
    """The machine code of a generated source.

    Args:
        source: of the kernel.
        seconds: what compiling it may take, unless it is on disk.
        what: it is called in a message.

    Raises:
        TooCostly: it would take longer.
        Unsupported: it does not compile.
    """
    expected = seconds_to_compile(source)
    if expected > seconds and not is_kept(source):
        raise TooCostly(f"its {what} would take about {expected:.0f} s to compile; backend='fused' does it")
    try:
        return load(source)
    except Exception as problem:
        text = str(problem).strip().partition("\n")[0]
        raise Unsupported(f"its {what} does not compile, a fault of sdesolve ({text})") from problem


@final
class Numba(AbstractDialect):
    """Numba's language."""

    def constant(self, value: float | bool, dtype: str) -> str:
        if dtype in (BOOL, I64):
            return repr(value)
        text = repr(value) if math.isfinite(value) else {math.inf: "INF", -math.inf: "-INF"}.get(value, "NAN")
        return f"{kind(dtype)}({text})"

    def call(self, operation: OpSpec, args: Sequence[str], dtype: str) -> str:
        return operation.numba.format(*args, dtype=dtype)

    def cast(self, value: str, source: str, target: str) -> str:
        return f"{kind(target)}({value})"


def numba_kernel(plan: Plan, increments: Sequence[str], alone: bool = False) -> NumbaKernel:
    """Source for a plan.

    Args:
        plan: what to compute.
        increments: for each source of noise how its numbers are made: ``normal``, ``two-point`` or ``three-point``.
        alone: for blocks of one path, of a plan without matrices: a step computes one number at a time, and numbers of
            the noise are made for many steps at once, with the bits of other blocks.
    """
    return _Printer(plan, increments, alone).kernel()


class AbstractPrinter(abc.ABC):
    """Writes kernels over blocks of lanes."""

    about: str
    arguments: Mapping[str, str]

    def __init__(self, plan: Plan, increments: Sequence[str], alone: bool = False) -> None:
        self.plan, self.dtype = plan, plan.dtype
        self.increments, self.alone = increments, alone
        self.lanes = 1 if alone else _LANES[self.dtype] // (2 if plan.matrices else 1)
        self.generated = 4 * self.lanes  # words that the generator makes at a time
        self.itemsize = 4 if self.dtype == "float32" else 8
        self.read: set[Expression] = set()
        self.writer = Writer(Numba(), self._leaf)
        self.rows = Lanes(plan.program.graph, self.dtype, self.lanes, len(plan.columns), self.writer, self.place)

    @abc.abstractmethod
    def place(self, e: Expression) -> tuple[str, str]:
        """Name and row of what a lane starts from."""

    def _leaf(self, e: Expression) -> str:
        if isinstance(e.data, PathEntry):
            return f"p{e.data.parameter}[path * {self.plan.row_length(e.data.parameter)} + {e.data.i}]"
        self.read.add(e)
        return typed(local(e.data), e.dtype, self.dtype)

    @final
    def reads(self, kind: type[Any]) -> list[int]:
        """Which leaves of a kind the lines written so far read."""
        return sorted(e.data.i for e in self.read if type(e.data) is kind)

    @final
    def source(self, block: Sequence[str]) -> str:
        """The module, from what is done for each block."""
        plan = self.plan
        first = ["first = block * LANES", "lanes = min(paths - first, LANES)"]
        # Those that are computed: whole vectors, so that the last block need not be computed whole.
        computed = f"min((lanes + {VECTOR - 1}) // {VECTOR} * {VECTOR}, LANES)"
        first.append(f"used = {1 if self.alone else computed}")
        body = [f"u{j} = uniforms[{j}]" for j in self.reads(LoopInvariant)]
        body += ["for block in range(start, stop):", *indented([*first, *block], 1)]
        head = [
            f'"""{self.about}"""',
            "",
            "# Runs with the names of sdesolve_kernels._numba.paths.namespace().",
            "",
            f"REAL = {kind(self.dtype)}",
            f"LANES = {self.lanes}  # paths in a block",
            f"WORDS = {self.words}  # bytes before the generator's words",
            f"CARRIED = {len(plan.states)}  # numbers carried from step to step",
            "",
            "",
            "def trajectory(arguments, scratch, start, stop):",
            "    a = pointer_int64(arguments)",
            *(f"    {name} = {self._unpacked(i, kind)}" for i, (name, kind) in enumerate(self.arguments.items())),
            f"    s, words = pointer_{self.dtype}(scratch), word(scratch + WORDS)",
            *(f"    {name} = pointer_{dtype}(scratch)" for dtype, name in sorted(self.rows.arrays.items())),
        ]
        entries = {e.data for e in topological(plan.path_invariants) if isinstance(e.data, PathEntry)}
        used = sorted({e.parameter for e in entries} | {m.parameter for m in plan.matrices})
        for i in used:
            head.append(f"    p{i} = pointer_{dtype_name(plan.program.captured[i].dtype)}(pointers[{i}])")
        return "\n".join([*head, *indented(body, 1)]) + "\n"

    @property
    def words(self) -> int:
        """Bytes of all rows."""
        return self.rows.count * self.lanes * self.itemsize

    @property
    def scratch(self) -> int:
        """Bytes of all rows, and of the generator's words behind them."""
        kept = len(self.plan.noises) if "two-point" in self.increments else 0
        return self.words + 4 * (self.generated + kept * 4 * self.lanes)

    def _unpacked(self, i: int, kind: str) -> str:
        return f"pointer_{self.dtype if kind == 'real' else kind}(a[{i}])" if kind else f"a[{i}]"

    @final
    def constant_along_a_path(self, first: int) -> list[str]:
        """Path invariants to rows from ``first`` on."""
        if not self.plan.path_invariants:
            return []
        targets = [(self.rows.at(first + i), self._real(e)) for i, e in enumerate(self.plan.path_invariants)]
        lines = ["for l in range(used):", "    path = min(first + l, paths - 1)"]
        return lines + indented(self.writer.lines(targets), 1)

    def _real(self, e: Expression) -> Expression:
        """As it is kept in a row."""
        return self.plan.program.graph.cast(e, self.dtype)

    @final
    def source_of(self, noise: int) -> tuple[int, int]:
        """The source of a number of the step's noise, and its place among that source's."""
        for source, count in enumerate(self.plan.noises):
            if noise < count:
                return source, noise
            noise -= count
        raise AssertionError("a noise leaf beyond the signature")

    @property
    def numbered(self) -> str:
        """What the numbers of paths are read from, where they are listed."""
        return "rows" if self.plan.program.signature.listed else "noise"

    @final
    def fill(self, maker: str) -> str:
        """The function that makes numbers of a kind."""
        one = "one_" if self.alone and maker != "two_point" else ""
        return f"{maker}_fill_{one}{'listed_' if self.plan.program.signature.listed else ''}{self.dtype}"

    @final
    def words_of(self, source: int) -> str:
        """Address of the words that a source of signs keeps."""
        return f"scratch + WORDS + {4 * (self.generated + source * 4 * self.lanes)}"


@final
class _Printer(AbstractPrinter):
    about = "A trajectory kernel, generated: state in rows of s, one column per path of a block."
    arguments = ARGUMENTS

    def __init__(self, plan: Plan, increments: Sequence[str], alone: bool) -> None:
        super().__init__(plan, increments, alone)
        self.state = self.rows.rows(len(plan.states))
        self.path_invariant = self.rows.rows(len(plan.path_invariants))
        self.observed = self.rows.rows(len(plan.observed))
        pair = 1 + plan.program.signature.swapped
        chunk = _CHUNK_ALONE if alone else _CHUNK
        self.per_fill = [_steps_a_fill(m, kind, pair, chunk) for m, kind in zip(plan.noises, increments, strict=True)]
        made = zip(plan.noises, self.per_fill, increments, strict=True)
        counts = [_rows_a_fill(m * n, kind) for m, n, kind in made]
        self.noise = [self.rows.rows(count) for count in counts]
        self.generated = max(counts, default=0) if alone else self.generated

    def kernel(self) -> NumbaKernel:
        block = self._load()
        block += ["slot = first_slot", "for k in range(first_step, last_step + 1):", *indented(self._step(), 1)]
        block += self._store()
        return NumbaKernel(self.source(block), self.lanes, self.scratch, self.plan.width)

    def _load(self) -> list[str]:
        """First state into its rows (what is carried besides it starts at 0), and what is constant along a path."""
        lines = [
            f"for i in range({len(self.plan.states)}):",
            "    for l in range(used):",
            "        path = min(first + l, paths - 1)",
            f"        s[({self.state} + i) * LANES + l] = x_in[path * in_width + i] if i < in_width else REAL(0)",
        ]
        return lines + self.constant_along_a_path(self.path_invariant)

    def place(self, e: Expression) -> tuple[str, str]:
        i = e.data.i
        if isinstance(e.data, State):
            return local(e.data), str((self.state + i) * self.lanes)
        if isinstance(e.data, PathInvariant):
            return local(e.data), str((self.path_invariant + i) * self.lanes)
        source, j = self.source_of(i)
        return local(e.data), f"n{source} + {j * self.lanes}" if j else f"n{source}"

    def _step(self) -> list[str]:
        plan, swapped = self.plan, self.plan.program.signature.swapped
        lines = ["if saves[slot] == k:", *indented(self._save(), 1), "if k == last_step:", "    break"]
        for g, (m, n, base) in enumerate(zip(plan.noises, self.per_fill, self.noise, strict=True)):
            maker = self.increments[g].replace("-", "_")
            if m == 0:
                continue
            fill, index = self.fill(maker), f"noise[{4 * g + 3}] + k * {m}"
            if maker == "two_point":
                lines += [
                    f"{fill}(s, {base * self.lanes}, word({self.words_of(g)}), noise, {g}, first, {index}, {m}, "
                    f"k == first_step, used, LANES, {self.numbered})",
                    f"n{g} = {base * self.lanes}",
                ]
                continue
            # A run that begins between two fills starts with the one that it begins in.
            i, at = ("k", f"k % {n}") if not swapped else (f"k{g}", f"(k{g} % {n} ^ 1)")
            if swapped:  # counted from the first of a pair
                lines += [f"odd{g} = noise[{4 * g + 3}] // {m} % 2", f"k{g} = k + odd{g}"]
            index = f"noise[{4 * g + 3}] + ({i} - {i} % {n}{f' - odd{g}' if swapped else ''}) * {m}"
            lines += [
                f"if {i} % {n} == 0 or k == first_step:",
                f"    skip{g} = {fill}(s, {base * self.lanes}, words, noise, {g}, first, {index}, {n * m}, "
                f"used, LANES, {self.numbered})",
                f"n{g} = {base * self.lanes} + (skip{g} + {at} * {m}) * LANES",
            ]
        computed = self.rows.update(self.state, plan.states)
        lines += [f"c{j} = table[k * {len(plan.columns)} + {j}]" for j in self.reads(Column)]
        return lines + computed

    def _save(self) -> list[str]:
        """The state, or what is observed of it, to its place or into the moments."""
        lines: list[str] = []
        row, width = self.state, self.plan.width
        if self.plan.program.observed_shape is not None:
            row = self.observed
            lines += self.rows.compute(list(enumerate(self.plan.observed, row)))
        start, names = row * self.lanes, list(ARGUMENTS)
        lines += [
            f"if a[{names.index('saved')}] != 0:",
            f"    keep(saved, (slot * paths + first) * {width}, s, {start}, {width}, lanes, LANES)",
            f"if a[{names.index('moments')}] != 0:",
            f"    accumulate(moments, (slot * blocks + block) * {2 * width}, s, {start}, {width}, lanes, LANES)",
            "slot += 1",
        ]
        return lines

    def _store(self) -> list[str]:
        return ["keep(x_out, first * out_width, s, 0, out_width, lanes, LANES)"]


def _steps_a_fill(m: int, kind: str, least: int, chunk: int) -> int:
    """Steps whose numbers are made at once: whole blocks of the generator if the first one starts a block."""
    if m == 0 or kind == "two-point":
        return 1
    whole = math.lcm(4 // math.gcd(4, m), least)
    return whole * max(1, chunk // (whole * m))


def _rows_a_fill(count: int, kind: str) -> int:
    """Rows that ``count`` numbers need wherever in a block the first of them lies."""
    return count if kind == "two-point" else -(-(count + 3) // 4) * 4
