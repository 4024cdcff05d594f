"""A plan as the source of a Triton kernel: one lane per path, the state in registers, the loop over steps inside.

The step is a function of its own in the generated source. The kernel calls it for several steps in a row where a group
of them uses up whole blocks of the generator, so that no number is thrown away, and for a single step where a run
starts or ends inside such a group: then numbers are picked from their block by where in it the step starts.

Multiply-adds are written out and the compiler forms no others, so that a step gives the same bits in either place.
"""

from __future__ import annotations

import abc
import dataclasses
import re
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

__all__ = ["AbstractPrinter", "Results", "Shape", "Stores", "TritonKernel", "triton_kernel", "written_out"]

_MOST_ENTRIES = 4608  # of all matrices kept whole: each is a load and a multiply-add in the source


@final
@dataclasses.dataclass(frozen=True)
class Shape:
    """What a kernel is specialised for besides its plan.

    Attributes:
        lanes: paths in a program, a power of two.
        warps: of 32 threads, in a program.
        keep: store states (or what is observed of them) at the saving times; of a reverse, read their cotangents.
        moments: store their mean and sum of squared deviations over the paths of a program; likewise.
        steady: all steps have the same row of the table, which is read once.
        each_step: of a reverse, add up cotangents of the table for each step, not for all.
        ends: of a reverse with moments, store those as well, and the state at the end.
    """

    lanes: int
    warps: int
    keep: bool = False
    moments: bool = False
    steady: bool = False
    each_step: bool = False
    ends: bool = False


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
        scratch: of a reverse, numbers of scratch memory that each path takes besides states.
        parts: numbers that a tile adds up.
        entries: places among those, and the sums that they are terms of.
    """

    source: str
    shape: Shape
    width: int
    parameters: tuple[int, ...]
    sources: tuple[int, ...]
    group: int
    scratch: int = 0
    parts: int = 0
    entries: tuple[tuple[int, int], ...] = ()


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


Results = Sequence[tuple[str, Expression]]
# Places, which begin with the name of a pointer, and what goes there: a number of each lane, or four side by side.
Stores = Sequence[tuple[str, Sequence[Expression]]]


class AbstractPrinter(abc.ABC):
    """Writes kernels with a path in a lane: functions of a step, and loops that call them.

    Args:
        plan: what to compute.
        increments: as for `triton_kernel`.
        shape: likewise.
        others: what a turn of the innermost loop computes besides the step.
    """

    about: str

    def __init__(self, plan: Plan, increments: Sequence[str], shape: Shape, others: Sequence[Expression] = ()) -> None:
        self.plan, self.shape = plan, shape
        # Kinds of leaves that are read where they are used, not passed: from where, and how far apart they lie.
        self.in_memory: dict[type[Any], tuple[str, str]] = {}
        self.graph, self.dtype = plan.program.graph, plan.dtype
        entries = sum(m.rows * m.columns for m in plan.matrices)
        if entries > _MOST_ENTRIES:
            raise Unsupported(
                f"it multiplies by matrices of {entries} entries in all; kernels generated for a GPU keep a path in "
                f"one thread and take up to {_MOST_ENTRIES}"
            )
        counts = plan.noises
        swapped, kinds = plan.program.signature.swapped, zip(counts, increments, strict=True)
        sources = [Source(g, m, kind, swapped=swapped) for g, (m, kind) in enumerate(kinds) if m]
        self.states = written_out(self.graph, plan.states)
        self.observed = written_out(self.graph, plan.observed)
        self.path_invariants = written_out(self.graph, plan.path_invariants)
        used = topological([*self.states, *others])
        self.noise_numbers = {e.data.i for e in used if isinstance(e.data, NoiseLeaf)}
        starts = [sum(counts[:g]) for g in range(len(counts))]
        self.sources = [
            dataclasses.replace(s, start=starts[s.index]) for s in sources
            if any(starts[s.index] <= n < starts[s.index] + s.count for n in self.noise_numbers)
        ]  # fmt: skip
        self.group = period(self.sources, len(used))
        leaves = [e.data for e in topological([*used, *self.observed, *self.path_invariants])]
        self.parameters = tuple(sorted({a.parameter for a in leaves if isinstance(a, PathEntry | Shared)}))
        self.step = [(f"y{i}", e) for i, e in enumerate(self.states) if not _is_own(e, i)]
        self.observe = [(f"y{i}", e) for i, e in enumerate(self.observed)]

    @abc.abstractmethod
    def functions(self) -> list[list[str]]:
        """Functions that the kernel calls."""

    @abc.abstractmethod
    def trajectory(self) -> list[str]:
        """The kernel itself."""

    @final
    def kernel(self) -> TritonKernel:
        parts = [
            f'"""{self.about}"""',
            "",
            "from sdesolve_kernels._triton.paths import *",
            "",
            f"LANES = tl.constexpr({self.shape.lanes})  # paths in a program of {32 * self.shape.warps} threads",
            f"DOUBLE = tl.constexpr({self.dtype == 'float64'})",
            "",
            "",
        ]
        for function in self.functions():
            parts += [*function, "", ""]
        parts += self.trajectory()
        return TritonKernel(
            "\n".join(parts) + "\n", self.shape, self.plan.width, self.parameters,
            tuple(s.index for s in self.sources), self.group,
        )  # fmt: skip

    @property
    def saving(self) -> bool:
        return self.shape.keep or self.shape.moments

    @property
    def observing(self) -> bool:
        """Whether what is observed of a state is computed."""
        return self.saving

    @property
    def columns(self) -> int:
        """Numbers of the table that are read at each step."""
        return 0 if self.shape.steady else len(self.plan.columns)

    @final
    def step_functions(self) -> list[list[str]]:
        title = "The state after a step: x before it, z noise, c columns, u and i"
        made = [self.function("step", self.step, title)] if self.step else []
        if self.observing and self.plan.program.observed_shape is not None:
            made.append(self.function("observe", self.observe, "What is observed of a state"))
        return made

    @final
    def leaf(self, e: Expression) -> str:
        match e.data:
            case Shared(parameter, i):
                return f"tl.load({plus(f'p{parameter}', i)})"
            case PathEntry(_, parameter, i):
                return f"tl.load({plus(f'p{parameter} + row * {self.plan.row_length(parameter)}', i)})"
            case Column() | LoopInvariant():
                return self._from_table(self._local(e.data), e)
            case _:
                return self._local(e.data)

    def _local(self, leaf: Any) -> str:
        if type(leaf) not in self.in_memory:
            return local(leaf)
        start, distance = self.in_memory[type(leaf)]
        return f"tl.load({start} + {leaf.i}{distance})"

    def _from_table(self, name: str, e: Expression) -> str:
        """A number of the table's type as what was kept in it."""
        if e.dtype in (BOOL, I64):
            return f"({name} != 0)" if e.dtype == BOOL else f"{name}.to(tl.int64)"
        return name if e.dtype == self.dtype else f"{name}.to(tl.{e.dtype})"

    @final
    def inputs(self, results: Results, stores: Stores = ()) -> list[str]:
        """Names of what expressions read, in the order of a function's parameters."""
        roots = [*(e for _, e in results), *(e for _, values in stores for e in values)]
        leaves: list[Any] = [e.data for e in topological(roots) if not e.args]
        names = [
            f"{letter}{i}"
            for kind, letter in LOCALS.items()
            if kind not in self.in_memory
            for i in sorted({a.i for a in leaves if type(a) is kind})
        ]
        if not any(name.startswith("x") for name in names):
            names.insert(0, "x0")  # something that has the lanes' shape
        places = {self.in_memory[type(a)][0] for a in leaves if type(a) in self.in_memory}
        names += sorted(places | {place.split()[0] for place, _ in stores})
        return names + [f"p{i}" for i in sorted({a.parameter for a in leaves if isinstance(a, Shared)})]

    @final
    def function(self, name: str, results: Results, title: str, stores: Stores = ()) -> list[str]:
        """A device function that returns results, and stores others."""
        inputs = self.inputs(results, stores)
        model = next(i for i in inputs if i.startswith("x"))
        values = [("", e) for _, stored in stores for e in stored]
        body = Writer(Triton(), self.leaf).lines([*values, *results])
        body, ends = body[: len(body) - len(values) - len(results)], body[len(body) - len(values) - len(results) :]
        texts = iter([end.removeprefix(" = ") for end in ends[: len(values)]])
        for place, stored in stores:
            names = [next(texts) for _ in stored]
            if len(stored) == 1:
                line = f"tl.store({place}, {names[0]})"
            else:
                shape = f"tl.full({model}.shape, {{}}, {model}.dtype)"
                names = [
                    n if e.depends & (STATE | PATH) else shape.format(n) for n, e in zip(names, stored, strict=True)
                ]
                line = f"put({place}, {', '.join(names)}, LANES)"
            # As early as can be: registers are free then, and loads that follow are not all waited for at once.
            read = set(re.findall(r"\bv\d+\b", line))
            last = max((i for i, text in enumerate(body) if text.partition(" = ")[0] in read), default=-1)
            body.insert(last + 1, line)
        body += ends[len(values) :]
        for target, e in results:
            if not e.depends & (STATE | PATH):  # one number for all paths
                body.append(f"{target} = tl.full({model}.shape, {target}, {model}.dtype)")
        returned = wrapped("return ", [target for target, _ in results], "") if results else []
        return [
            "@triton.jit",
            *wrapped(f"def {name}(", inputs, "):"),
            *indented([f'"""{title}."""', *body, *returned], 1),
        ]

    @final
    def call(
        self, name: str, results: Results, targets: Sequence[str], passed: dict[str, str], stores: Stores = ()
    ) -> list[str]:
        """Lines that call such a function; ``passed``: what to pass for an input, if not what has its name."""
        if not (results or stores):
            return []
        start = f"{', '.join(targets)} = {name}(" if targets else f"{name}("
        return wrapped(start, [passed.get(i, i) for i in self.inputs(results, stores)], ")")

    @final
    def begin(self, x_in: str) -> list[str]:
        """Lines that read where a path begins and all that is constant along it."""
        body = [f"x{i} = tl.load({plus(f'{x_in} + row * {len(self.states)}', i)})" for i in range(len(self.states))]
        if self.path_invariants:
            body += Writer(Triton(), self.leaf).lines([(f"i{j}", e) for j, e in enumerate(self.path_invariants)])
        number = "row"
        if self.plan.program.signature.listed:
            body, number = [*body, "number = tl.load(numbers + row)"], "number"
        return [*body, *(f"path{s.index} = first_path{s.index} + {number}" for s in self.sources)]

    @final
    def constants(self) -> list[str]:
        """Lines that read what is the same for all paths and steps."""
        kept = () if LoopInvariant in self.in_memory else range(len(self.plan.loop_invariants))
        lines = [f"u{j} = tl.load({plus('uniforms', j)})" for j in kept]
        if self.shape.steady:
            lines += [f"c{j} = tl.load({plus('table', j)})" for j in range(len(self.plan.columns))]
        return lines

    @final
    def define(self, pointers: Sequence[str], integers: Sequence[str], body: Sequence[str]) -> list[str]:
        """The kernel, from what it takes and does; it takes parameters and places of noise besides."""
        pointers = [*pointers, *(f"p{i}" for i in self.parameters)]
        pointers += ["numbers"] if self.plan.program.signature.listed else []
        integers = list(integers)
        for s in self.sources:
            integers += [f"seed{s.index}", f"stream{s.index}", f"first_path{s.index}", f"first{s.index}"]
        names = ", ".join(f'"{n}"' for n in (*pointers, *integers))
        return [
            *wrapped("@triton.jit(do_not_specialize=[", names.split(", "), "])"),
            *wrapped("def trajectory(", [*pointers, *(f"{n}: tl.int64" for n in integers)], "):"),
            *indented(body, 1),
        ]

    def enter(self) -> list[str]:
        """Lines before steps that begin with step ``k``."""
        return [f"at = table + k * {self.columns}"] if self.columns else []

    def turn(self, steps: int) -> list[str]:
        """Lines after so many steps of a group."""
        return [f"at += {steps * self.columns}"] if self.columns else []

    def before(self, group_step: int) -> list[str]:
        """Lines before a step, which is so many after the last `enter` or `turn`."""
        return []

    @final
    def advance(self) -> list[str]:
        """From step ``k`` to step ``stop``."""
        single = [*self.enter(), *self._call_step(0, {s.index: s.single() for s in self.sources}), "k += 1"]
        if self.group == 0:
            return ["while k < stop:", *indented(single, 1)]
        p = self.group
        group: list[str] = []
        places = {s.index: s.group(p) for s in self.sources}
        for i in range(p):
            group += self._call_step(i, places)
        group += [line for s in self.sources for line in s.turn(p)]
        return [
            "while k < stop:",
            *indented([*self.groups("stop - k", [s.enter(p) for s in self.sources]), *self.enter()], 1),
            "    for _ in range(0, groups):",
            *indented([*group, *self.turn(p)], 2),
            f"    k += groups * {p}",
            "    if k < stop:",
            *indented(single, 2),
        ]

    @final
    def groups(self, steps: str, entries: Sequence[tuple[list[str], str, str]]) -> list[str]:
        """Lines that find how many groups of steps to take at once, out of so many steps."""
        lines = [line for start, _, _ in entries for line in start]
        lines.append(f"groups = tl.minimum(({steps}) // {self.group}, {2**30})")
        lines += [f"groups = tl.minimum(groups, {limit})" for _, _, limit in entries]
        if entries:
            lines.append(f"groups = tl.where({' & '.join(aligned for _, aligned, _ in entries)}, groups, 0)")
        return [*lines, "groups = groups.to(tl.int32)"]

    @final
    def read(self, group_step: int, places: dict[int, Place]) -> tuple[list[str], dict[str, str]]:
        """Lines that make a step's noise, and what to pass for what its functions read of noise and table."""
        passed = {f"c{j}": f"tl.load({plus('at', group_step * self.columns + j)})" for j in range(self.columns)}
        lines: list[str] = []
        for s in self.sources:
            for j in range(s.count):
                if s.start + j in self.noise_numbers:
                    before, name = places[s.index].number(group_step, j)
                    lines += before
                    passed[f"z{s.start + j}"] = name
        return lines, passed

    def _call_step(self, group_step: int, places: dict[int, Place]) -> list[str]:
        lines, passed = self.read(group_step, places)
        targets = [f"x{target[1:]}" for target, _ in self.step]
        return [*self.before(group_step), *lines, *self.call("step", self.step, targets, passed)]

    @final
    def see(self) -> tuple[list[str], list[str]]:
        """Lines that observe a state, and the names of what is seen."""
        if self.plan.program.observed_shape is None:
            return [], [f"x{i}" for i in range(self.plan.width)]
        names = [target for target, _ in self.observe]
        return self.call("observe", self.observe, names, {}), names


@final
class _Printer(AbstractPrinter):
    about = "A trajectory kernel, generated: one lane per path, its state in registers, every step inside."

    def functions(self) -> list[list[str]]:
        return self.step_functions()

    def trajectory(self) -> list[str]:
        pointers, integers = ["x_in", "x_out", "table", "uniforms"], ["paths", "steps"]
        body = [
            "path = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)",
            "row = tl.minimum(path, paths - 1)  # lanes past the last path repeat it and store nothing",
            *self.constants(),
            *self.begin("x_in"),
            "k = tl.full((), 0, tl.int64)",
        ]
        if self.saving:
            pointers += ["saves", "saved" if self.shape.keep else "moments"]
            integers.append("slots")
            advance = [
                "stop = steps",
                "if slot < slots:",
                "    stop = tl.load(saves + slot)",
                *self.advance(),
                "if slot < slots:",
                *indented(self._save(), 1),
            ]
            body += ["for slot in range(0, slots + 1):", *indented(advance, 1)]
        else:
            body += ["stop = steps", *self.advance()]
        for i in range(len(self.states)):
            body.append(f"tl.store({plus(f'x_out + path * {len(self.states)}', i)}, x{i}, mask=path < paths)")
        return self.define(pointers, integers, body)

    def _save(self) -> list[str]:
        width = self.plan.width
        lines, names = self.see()
        if self.shape.keep:
            for j, name in enumerate(names):
                place = plus(f"saved + (slot * paths + path) * {width}", j)
                lines.append(f"tl.store({place}, {name}, mask=path < paths)")
            return lines
        lines.append("count = tl.minimum(paths - tl.program_id(0).to(tl.int64) * LANES, LANES)")
        place = f"moments + (slot * tl.num_programs(0) + tl.program_id(0)) * {2 * width}"
        return [*lines, *stored_moments(names, place, "path < paths")]


def stored_moments(names: Sequence[str], place: str, inside: str) -> list[str]:
    """Lines that store means and sums of squared deviations over the ``count`` lanes of a tile that are inside."""
    lines = [f"seen = {place}"]
    for j, name in enumerate(names):
        lines += [
            f"mean, squares = spread({name}, {inside}, count)",
            f"tl.store({plus('seen', j)}, mean)",
            f"tl.store({plus('seen', len(names) + j)}, squares)",
        ]
    return lines


def _is_own(e: Expression, i: int) -> bool:
    """Whether component ``i`` of the state stays what it is."""
    return isinstance(e.data, State) and e.data.i == i


def written_out(graph: Graph, roots: Sequence[Expression]) -> tuple[Expression, ...]:
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
