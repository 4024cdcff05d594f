"""A plan as the source of a Triton kernel: one lane per path, the state in registers, the loop over steps inside.

The step is a function of its own in the generated source. The kernel calls it for several steps in a row where a group
of them uses up whole blocks of the generator, so that no number is thrown away, and for a single step where a run
starts or ends inside such a group: then numbers are picked from their block by where in it the step starts.

Multiply-adds are written out and the compiler forms no others, so that a step gives the same bits in either place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, final

from sdesolve_kernels.trajectory.codegen import LOCALS, Writer, indented, local
from sdesolve_kernels.trajectory.expressions import Expression, Graph, topological
from sdesolve_kernels.trajectory.leaves import PATH, STATE, Column, LoopInvariant, NoiseLeaf, PathEntry, Shared, State
from sdesolve_kernels.trajectory.operations import BOOL, I64
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.tracing import Unsupported
from sdesolve_kernels.trajectory.triton_dialect import Triton, plus, wrapped
from sdesolve_kernels.trajectory.triton_noise import Place, Source, period

__all__ = ["Shape", "TritonKernel", "triton_kernel"]

_MOST_ENTRIES = 4608  # of all matrices kept whole: each is a load and a multiply-add in the source


@final
@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is specialised for besides its plan.

    Attributes:
        lanes: paths in a program, a power of two.
        warps: of 32 threads, in a program.
        keep: store states (or what is observed of them) at the saving times.
        moments: store their mean and sum of squared deviations over the paths of a program.
        steady: all steps have the same row of the table, which is read once.
    """

    lanes: int
    warps: int
    keep: bool = False
    moments: bool = False
    steady: bool = False


@final
@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """Generated source, and what a launch must know of it.

    Attributes:
        source: of a module that defines ``trajectory``, a kernel.
        shape: what it was made for.
        width: numbers saved for each path at a saving time.
        parameters: captured tensors that it reads, in the order in which it takes them.
        sources: sources of noise that it reads, likewise.
        group: steps in a turn of the innermost loop, or 0: it takes single ones.
    """

    source: str
    shape: Shape
    width: int
    parameters: tuple[int, ...]
    sources: tuple[int, ...]
    group: int


def triton_kernel(plan: Plan, increments: Sequence[str], shape: Shape) -> TritonKernel:
    """Source for a plan.

    Args:
        plan: what to compute.
        increments: for each source of noise how its numbers are made: ``normal``, ``two-point`` or ``three-point``.
        shape: what else to make it for.

    Raises:
        Unsupported: its matrices are too large to be written out.
    """
    return _Printer(plan, increments, shape).kernel()


@final
class _Printer:
    def __init__(self, plan: Plan, increments: Sequence[str], shape: Shape) -> None:
        self.plan, self.shape = plan, shape
        program = plan.program
        self.dtype = plan.dtype
        entries = sum(m.rows * m.columns for m in plan.matrices)
        if entries > _MOST_ENTRIES:
            raise Unsupported(
                f"it multiplies by matrices of {entries} entries in all; kernels generated for a GPU keep a path in "
                f"one thread and take up to {_MOST_ENTRIES}"
            )
        counts = plan.noises
        swapped, kinds = program.signature.swapped, zip(counts, increments, strict=True)
        sources = [Source(g, m, kind, swapped=swapped) for g, (m, kind) in enumerate(kinds) if m]
        self.states = _written_out(program.graph, plan.states)
        self.observed = _written_out(program.graph, plan.observed)
        self.path_invariants = _written_out(program.graph, plan.path_invariants)
        used = topological(self.states)
        self.noise_numbers = {e.data.i for e in used if isinstance(e.data, NoiseLeaf)}
        starts = [sum(counts[:g]) for g in range(len(counts))]
        self.sources = [
            dataclasses.replace(s, start=starts[s.index]) for s in sources
            if any(starts[s.index] <= n < starts[s.index] + s.count for n in self.noise_numbers)
        ]  # fmt: skip
        self.group = period(self.sources, len(used))
        roots = [*self.states, *self.observed, *self.path_invariants]
        leaves = [e.data for e in topological(roots)]
        self.parameters = tuple(sorted({a.parameter for a in leaves if isinstance(a, PathEntry | Shared)}))

    def kernel(self) -> TritonKernel:
        parts = [
            '"""A trajectory kernel, generated: one lane per path, its state in registers, every step inside."""',
            "",
            "from sdesolve_kernels._triton.paths import *",
            "",
            f"LANES = tl.constexpr({self.shape.lanes})  # paths in a program of {32 * self.shape.warps} threads",
            f"DOUBLE = tl.constexpr({self.dtype == 'float64'})",
            "",
            "",
            *self._function("step", self.states, "The state after a step: x before it, z noise, c columns, u and i"),
            "",
            "",
        ]
        if self._saving and self.plan.program.observed_shape is not None:
            parts += [*self._function("observe", self.observed, "What is observed of a state"), "", ""]
        parts += self._trajectory()
        return TritonKernel(
            "\n".join(parts) + "\n", self.shape, self.plan.width, self.parameters,
            tuple(s.index for s in self.sources), self.group,
        )  # fmt: skip

    @property
    def _saving(self) -> bool:
        return self.shape.keep or self.shape.moments

    @property
    def _columns(self) -> int:
        """Numbers of the table that are read at each step."""
        return 0 if self.shape.steady else len(self.plan.columns)

    def _leaf(self, e: Expression) -> str:
        match e.data:
            case Shared(parameter, i):
                return f"tl.load({plus(f'p{parameter}', i)})"
            case PathEntry(_, parameter, i):
                return f"tl.load({plus(f'p{parameter} + row * {self.plan.row_length(parameter)}', i)})"
            case Column(i) | LoopInvariant(i):
                return self._from_table(local(e.data), e)
            case _:
                return local(e.data)

    def _from_table(self, name: str, e: Expression) -> str:
        """A number of the table's type as what was kept in it."""
        if e.dtype in (BOOL, I64):
            return f"({name} != 0)" if e.dtype == BOOL else f"{name}.to(tl.int64)"
        return name if e.dtype == self.dtype else f"{name}.to(tl.{e.dtype})"

    def _inputs(self, roots: Sequence[Expression]) -> list[str]:
        """Names of what expressions read, in the order of a function's parameters."""
        leaves: list[Any] = [e.data for e in topological(roots) if not e.args]
        names = [
            f"{letter}{i}" for kind, letter in LOCALS.items() for i in sorted({a.i for a in leaves if type(a) is kind})
        ]
        return names + [f"p{i}" for i in sorted({a.parameter for a in leaves if isinstance(a, Shared)})]

    def _function(self, name: str, roots: Sequence[Expression], title: str) -> list[str]:
        """A device function of what ``roots`` read, with one result each."""
        inputs = self._inputs(roots)
        if not any(i.startswith("x") for i in inputs):
            inputs.insert(0, "x0")  # something that has the lanes' shape
        model = next(i for i in inputs if i.startswith("x"))
        writer = Writer(Triton(), self._leaf)
        changed = [(f"y{i}", e) for i, e in enumerate(roots) if not _is_own(e, i) or name == "observe"]
        body = writer.lines(changed)
        for target, e in changed:
            if not e.depends & (STATE | PATH):  # one number for all paths
                body.append(f"{target} = tl.full({model}.shape, {target}, {model}.dtype)")
        results = ", ".join(target for target, _ in changed)
        return [
            "@triton.jit",
            *wrapped(f"def {name}(", inputs, "):"),
            *indented([f'"""{title}."""', *body, *wrapped("return ", results.split(", "), "")], 1),
        ]

    def _call(self, name: str, roots: Sequence[Expression], targets: Sequence[str], leaf: dict[str, str]) -> list[str]:
        """Lines that call such a function; ``leaf``: what to pass for an input, if not what has its name."""
        changed = [t for (i, e), t in zip(enumerate(roots), targets, strict=True)
                   if not _is_own(e, i) or name == "observe"]  # fmt: skip
        inputs = self._inputs(roots)
        if not any(i.startswith("x") for i in inputs):
            inputs.insert(0, "x0")
        if not changed:
            return []
        return wrapped(f"{', '.join(changed)} = {name}(", [leaf.get(i, i) for i in inputs], ")")

    def _trajectory(self) -> list[str]:
        pointers = ["x_in", "x_out", "table", "uniforms", *(f"p{i}" for i in self.parameters)]
        integers = ["paths", "steps"]
        for s in self.sources:
            integers += [f"seed{s.index}", f"stream{s.index}", f"first_path{s.index}", f"first{s.index}"]
        if self._saving:
            pointers += ["saves", "saved" if self.shape.keep else "moments"]
            integers.append("slots")
        body = [
            "path = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)",
            "row = tl.minimum(path, paths - 1)  # lanes past the last path repeat it and store nothing",
        ]
        for i in range(len(self.states)):
            body.append(f"x{i} = tl.load({plus(f'x_in + row * {len(self.states)}', i)})")
        for j in range(len(self.plan.loop_invariants)):
            body.append(f"u{j} = tl.load({plus('uniforms', j)})")
        if self.shape.steady:
            for j in range(len(self.plan.columns)):
                body.append(f"c{j} = tl.load({plus('table', j)})")
        if self.path_invariants:
            writer = Writer(Triton(), self._leaf)
            body += writer.lines([(f"i{j}", e) for j, e in enumerate(self.path_invariants)])
        body += [f"path{s.index} = first_path{s.index} + row" for s in self.sources]
        body.append("k = tl.full((), 0, tl.int64)")
        if self._saving:
            advance = [
                "stop = steps",
                "if slot < slots:",
                "    stop = tl.load(saves + slot)",
                *self._advance(),
                "if slot < slots:",
                *indented(self._save(), 1),
            ]
            body += ["for slot in range(0, slots + 1):", *indented(advance, 1)]
        else:
            body += ["stop = steps", *self._advance()]
        for i in range(len(self.states)):
            body.append(f"tl.store({plus(f'x_out + path * {len(self.states)}', i)}, x{i}, mask=path < paths)")
        names = ", ".join(f'"{n}"' for n in (*pointers, *integers))
        return [
            *wrapped("@triton.jit(do_not_specialize=[", names.split(", "), "])"),
            *wrapped("def trajectory(", [*pointers, *(f"{n}: tl.int64" for n in integers)], "):"),
            *indented(body, 1),
        ]

    def _advance(self) -> list[str]:
        """From step ``k`` to step ``stop``."""
        if self.group == 0:
            body = [*self._single(), "k += 1"]
            return ["while k < stop:", *indented(body, 1)]
        p, columns = self.group, self._columns
        limits = [f"tl.minimum((stop - k) // {p}, {2**30})"]
        start: list[str] = []
        aligned: list[str] = []
        for s in self.sources:
            lines, condition, limit = s.enter(p)
            start += lines
            aligned.append(condition)
            limits.append(limit)
        start.append(f"groups = {limits[0]}")
        start += [f"groups = tl.minimum(groups, {limit})" for limit in limits[1:]]
        if aligned:
            start.append(f"groups = tl.where({' & '.join(aligned)}, groups, 0)")
        start.append("groups = groups.to(tl.int32)")
        if columns:
            start.append(f"at = table + k * {columns}")
        group: list[str] = []
        places = {s.index: s.group(p) for s in self.sources}
        for i in range(p):
            group += self._call_step(group_step=i, places=places)
        group += [line for s in self.sources for line in s.turn(p)]
        if columns:
            group.append(f"at += {p * columns}")
        return [
            "while k < stop:",
            *indented(start, 1),
            "    for _ in range(0, groups):",
            *indented(group, 2),
            f"    k += groups * {p}",
            "    if k < stop:",
            *indented([*self._single(), "k += 1"], 2),
        ]

    def _single(self) -> list[str]:
        """One step, wherever in a block its numbers start."""
        lines = [f"at = table + k * {self._columns}"] if self._columns else []
        return lines + self._call_step(0, {s.index: s.single() for s in self.sources})

    def _call_step(self, group_step: int, places: dict[int, Place]) -> list[str]:
        columns = self._columns
        passed = {f"c{j}": f"tl.load({plus('at', group_step * columns + j)})" for j in range(columns)}
        lines: list[str] = []
        for s in self.sources:
            for j in range(s.count):
                if s.start + j in self.noise_numbers:
                    before, name = places[s.index].number(group_step, j)
                    lines += before
                    passed[f"z{s.start + j}"] = name
        targets = [f"x{i}" for i in range(len(self.states))]
        return lines + self._call("step", self.states, targets, passed)

    def _save(self) -> list[str]:
        names, width = [f"x{i}" for i in range(self.plan.width)], self.plan.width
        lines: list[str] = []
        if self.plan.program.observed_shape is not None:
            names = [f"y{i}" for i in range(width)]
            lines += self._call("observe", self.observed, names, {})
        if self.shape.keep:
            for j, name in enumerate(names):
                place = plus(f"saved + (slot * paths + path) * {width}", j)
                lines.append(f"tl.store({place}, {name}, mask=path < paths)")
            return lines
        lines.append(f"part = moments + (slot * tl.num_programs(0) + tl.program_id(0)) * {2 * width}")
        for j, name in enumerate(names):
            lines += [
                f"mean, squares = spread({name}, path < paths, paths)",
                f"tl.store({plus('part', j)}, mean)",
                f"tl.store({plus('part', width + j)}, squares)",
            ]
        return lines


def _is_own(e: Expression, i: int) -> bool:
    """Whether component ``i`` of the state stays what it is."""
    return isinstance(e.data, State) and e.data.i == i


def _written_out(graph: Graph, roots: Sequence[Expression]) -> tuple[Expression, ...]:
    """The same expressions with matrix products as sums of products of entries."""
    new: dict[int, Expression] = {}
    for e in topological(roots):
        if e.op == "product":
            continue
        if e.op != "element":
            new[e.id] = graph.with_args(e, [new[a.id] for a in e.args]) if e.args else e
            continue
        product = e.args[0]
        matrix = product.data
        total: Expression | None = None
        for j, a in enumerate(product.args):
            entry = graph.leaf(Shared(matrix.parameter, matrix.entry(e.data, j)), e.dtype)
            term = graph.op("mul", entry, new[a.id])
            total = term if total is None else graph.op("add", total, term)
        assert total is not None
        new[e.id] = total
    return tuple(new[e.id] for e in roots)
