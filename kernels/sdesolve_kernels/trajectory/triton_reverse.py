"""The reverse of a plan as the source of a Triton kernel: a tile of paths through steps, and back.

A program takes tiles of paths one after another. It takes a tile's steps in segments, and remembers where each began;
then, from the last to the first, it takes the steps of a segment again, with states left on a tape in scratch memory
that is small enough for the second-level cache, and walks back over the tape. Noise is made again from its counters:
on a GPU that is cheaper than to read it.

What is added up over steps is added up by each lane along a segment, in registers or, where that is much, in scratch
memory; over lanes and segments in float64, for each tile; over tiles by another kernel, in order. Cotangents of
matrices kept whole are products over the lanes of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.codegen import indented
from sdesolve_kernels.trajectory.expressions import Expression
from sdesolve_kernels.trajectory.leaves import Accumulated, Cotangent, LoopInvariant
from sdesolve_kernels.trajectory.reverse import Pulled, Reverse
from sdesolve_kernels.trajectory.tracing import Unsupported
from sdesolve_kernels.trajectory.triton_dialect import plus
from sdesolve_kernels.trajectory.triton_noise import Place
from sdesolve_kernels.trajectory.triton_source import AbstractPrinter, Results, Shape, TritonKernel, written_out

__all__ = ["reverse_kernel"]

_IN_REGISTERS = 24  # sums, or loop invariants, of a lane
_SIDE = 16  # of a tile that is multiplied, at least
_MOST_ROWS = 64  # of scratch memory: with twice as many, compiling takes half a minute


def reverse_kernel(reverse: Reverse, increments: Sequence[str], shape: Shape) -> TritonKernel:
    """Source for the reverse of a plan; arguments as `triton_source.triton_kernel`.

    Raises:
        Unsupported: none can be made.
    """
    for _, outer in (*reverse.step.outers, *reverse.observed.outers):
        if outer.product.dtype != reverse.plan.dtype:
            raise Unsupported("a matrix of another type than the state needs a gradient")
    printer = _Printer(reverse, increments, shape)
    if printer.scratch > _MOST_ROWS:
        raise Unsupported(
            f"its reverse keeps {printer.scratch} sums and entries of vectors for each path; kernels generated for a "
            f"GPU take up to {_MOST_ROWS}"
        )
    return printer.kernel(printer.scratch)


@final
class _Pull:
    """Cotangents of what an expression of the state reads.

    Attributes:
        states: by number of the state, what its cotangent becomes, unless it stays what it is.
        sums: by number of the sum, what is added to it, unless that is 0.
        outers: places of matrices, and the vectors whose outer product is added to their cotangent.
    """

    def __init__(self, reverse: Reverse, pulled: Pulled, *, added: bool) -> None:
        graph, dtype = reverse.plan.program.graph, reverse.plan.dtype
        sides = [(place, outer.pulled.args, outer.product.args) for place, outer in pulled.outers]
        flat = [
            *pulled.states,
            *pulled.sums,
            *pulled.path_sums,
            *(e for _, *both in sides for side in both for e in side),
        ]
        made = iter([graph.cast(e, dtype) for e in written_out(graph, flat)])
        own = [graph.leaf(Cotangent(i), dtype) for i in range(len(pulled.states))]
        states = [graph.op("add", g, next(made)) if added else next(made) for g in own]
        self.states = {i: e for i, (g, e) in enumerate(zip(own, states, strict=True)) if e is not g}
        zero, count = graph.const(0, dtype), len(pulled.sums) + len(pulled.path_sums)
        self.sums = {j: e for j, e in ((j, next(made)) for j in range(count)) if e is not zero}
        self.outers = [(place, [next(made) for _ in a], [next(made) for _ in b]) for place, a, b in sides]

    @property
    def vectors(self) -> list[Expression]:
        """All vectors, one after another."""
        return [e for _, left, right in self.outers for e in (*left, *right)]


@final
class _Printer(AbstractPrinter):
    about = "The reverse of a trajectory kernel, generated: states of a segment on a tape, and back over it."

    def __init__(self, reverse: Reverse, increments: Sequence[str], shape: Shape) -> None:
        self.reverse = reverse
        self.back, self.unsee = _Pull(reverse, reverse.step, added=False), _Pull(reverse, reverse.observed, added=True)
        pulls = (self.back, self.unsee) if shape.keep or shape.moments else (self.back,)
        pulled = [e for p in pulls for e in (*p.states.values(), *p.sums.values(), *p.vectors)]
        super().__init__(reverse.plan, increments, shape, pulled)
        self.by_step = len(reverse.columns) if shape.each_step else 0
        self.by_tile = len(reverse.columns) - self.by_step + len(reverse.loop_invariants)
        self.by_path = len(reverse.path_invariants)
        self.summed = self.by_tile + self.by_path
        if self.summed > _IN_REGISTERS:
            self.in_memory[Accumulated] = "own", " * LANES"
        if len(reverse.plan.loop_invariants) > _IN_REGISTERS:
            self.in_memory[LoopInvariant] = "uniforms", ""
        self.rows = self.summed if Accumulated in self.in_memory else 0
        self.scratch = self.rows + max(len(p.vectors) for p in pulls)

    @property
    def observing(self) -> bool:
        return self.shape.moments

    def functions(self) -> list[list[str]]:
        made = self.step_functions()
        for name, pull in (("back", self.back), ("unsee", self.unsee)):
            if name == "back" or self.saving:
                results, stores = self._results(pull)
                made.append(self.function(name, results, "Cotangents g and sums q, before and after", stores))
        return made

    def _results(self, pull: _Pull) -> tuple[Results, Results]:
        """What a function returns and what it stores: cotangents, sums, terms of sums over lanes alone, vectors."""
        dtype, first = self.dtype, self.by_step
        results = [(f"y{i}", e) for i, e in pull.states.items()]
        results += [(f"d{j}", e) for j, e in pull.sums.items() if j < first]
        sums = [(j - first, e) for j, e in pull.sums.items() if j >= first]
        sums = [(j, self.graph.op("add", self.graph.leaf(Accumulated(j), dtype), e)) for j, e in sums]
        vectors = [(f"own + {self.rows + i} * LANES", e) for i, e in enumerate(pull.vectors)]
        if Accumulated in self.in_memory:
            return results, [*((f"own + {j} * LANES", e) for j, e in sums), *vectors]
        return [*results, *((f"t{j}", e) for j, e in sums)], vectors

    def _pulled(self, name: str, pull: _Pull, passed: dict[str, str]) -> list[str]:
        """Lines that call such a function, and add products of vectors to matrices."""
        results, stores = self._results(pull)
        targets = [{"y": "g", "t": "q", "d": "d"}[target[0]] + target[1:] for target, _ in results]
        lines, at = self.call(name, results, targets, passed, stores), self.rows
        for place, left, right in pull.outers:
            lines.append(
                f"m{place} = outer(m{place}, base + {at} * LANES, base + {at + len(left)} * LANES, {len(left)}, "
                f"{len(right)}, count, LANES)"
            )
            at += len(left) + len(right)
        return lines

    def trajectory(self) -> list[str]:
        states = len(self.states)
        pointers = ["x_in", "cotangents", "table", "uniforms", "scratch", "parts"]
        if self.by_step:
            pointers.append("by_step")
        if self.by_path:
            pointers.append("path_sums")
        if self.saving:
            pointers += ["saves", "saved" if self.shape.keep else "moments"]
        integers = ["paths", "steps", "segment", *(["slots"] if self.saving else [])]
        tile = [
            "path = (lane + tile * LANES).to(tl.int64)",
            "inside, count = path < paths, tl.minimum(paths - tile * LANES, LANES)",
            "row = tl.minimum(path, paths - 1)  # lanes past the last path repeat it, and count nowhere",
            *self.begin("x_in"),
        ]
        for i in range(states):
            tile.append(f"g{i} = tl.load({plus(f'cotangents + row * {states}', i)}, mask=inside, other=0.0)")
        tile += self._cleared() + [f"m{i} = {self._zeros(*self._sides(i))}" for i in range(len(self.reverse.matrices))]
        if self.saving:
            tile += ["slot = slots", "due = tl.load(saves + slot)"]
        tile += ["for turn in range(0, 2 * segments - 1):", *indented(self._segment(), 1)]
        for i in range(states):
            tile.append(f"tl.store({plus(f'cotangents + path * {states}', i)}, g{i}, mask=inside)")
        body = [
            "lane, segments = tl.arange(0, LANES), (steps + segment - 1) // segment",
            f"size = ({self.scratch} + (segments + segment) * {states}) * LANES",
            "base = scratch + tl.program_id(0) * size",
            "own = base + lane",
            f"starts = own + {self.scratch} * LANES",
            f"tape = starts + segments * {states} * LANES",
            *self.constants(),
            "for tile in range(tl.program_id(0).to(tl.int64), (paths + LANES - 1) // LANES, tl.num_programs(0)):",
            *indented(tile, 1),
        ]
        return self.define(pointers, integers, body)

    def _zeros(self, *shape: int | str) -> str:
        return f"tl.zeros([{', '.join(map(str, shape))}], tl.{self.dtype})"

    def _sides(self, matrix: int) -> list[int]:
        m = self.reverse.matrices[matrix]
        return [max(_SIDE, 1 << (side - 1).bit_length()) for side in (m.rows, m.columns)]

    def _cleared(self) -> list[str]:
        """Sums of lanes, at 0."""
        if self.rows:
            return [f"for j in range(0, {self.rows}):", f"    tl.store(own + j * LANES, {self._zeros('LANES')})"]
        return [f"q{j} = {self._zeros('LANES')}" for j in range(self.summed)]

    def _segment(self) -> list[str]:
        """Forwards through all segments, the last of which stays on the tape; then backwards."""
        states = len(self.states)
        start = [f"starts + (part * {states} + {i}) * LANES" for i in range(states)]
        lines = [
            "# Forwards through all segments, the last of which stays on the tape; then backwards.",
            "part = tl.where(turn < segments, turn, 2 * segments - 2 - turn).to(tl.int64)",
            "begin = part * segment",
            "end = tl.minimum(begin + segment, steps)",
            "if turn < segments:",
            *(f"    tl.store({place}, x{i})" for i, place in enumerate(start)),
            "else:",
            *(f"    x{i} = tl.load({place})" for i, place in enumerate(start)),
            "k, stop = begin, end",
            *self.advance(),
            "if turn >= segments - 1:",
        ]
        back = ["stop = begin", *self._retreat()]
        if self.saving:
            seen = ["if due == k:", *indented(self._unseen(), 1), "stop = tl.maximum(due, begin)", *self._retreat()]
            back = ["while (k > begin) | ((due == k) & (part == 0)):", *indented(seen, 1)]
        return [*lines, *indented([*back, *self._flushed()], 1)]

    def enter(self) -> list[str]:
        return [*super().enter(), f"on = tape + (k - begin) * {len(self.states)} * LANES"]

    def turn(self, steps: int) -> list[str]:
        return [*super().turn(steps), f"on += {steps * len(self.states)} * LANES"]

    def before(self, group_step: int) -> list[str]:
        return [f"tl.store({self._on(group_step, i)}, x{i})" for i in range(len(self.states))]

    def _on(self, group_step: int, i: int) -> str:
        return f"on + {group_step * len(self.states) + i} * LANES"

    def _retreat(self) -> list[str]:
        """From the state after step ``k - 1`` to that before step ``stop``."""
        at_step = f"of_step = by_step + (tile * steps + k) * {self.by_step}"
        enter = [*self.enter(), *([at_step] if self.by_step else [])]
        single = ["k -= 1", *enter, *self._back(0, {s.index: s.single() for s in self.sources})]
        if self.group == 0:
            return ["while k > stop:", *indented(single, 1)]
        p = self.group
        group = [line for s in self.sources for line in s.turn(p, backwards=True)] + self.turn(-p)
        if self.by_step:
            group.append(f"of_step -= {p * self.by_step}")
        places = {s.index: s.group(p) for s in self.sources}
        for i in reversed(range(p)):
            group += self._back(i, places)
        return [
            "while k > stop:",
            *indented([*self.groups("k - stop", [s.enter(p, backwards=True) for s in self.sources]), *enter], 1),
            "    for _ in range(0, groups):",
            *indented(group, 2),
            f"    k -= groups * {p}",
            "    if k > stop:",
            *indented(single, 2),
        ]

    def _back(self, group_step: int, places: dict[int, Place]) -> list[str]:
        """Back through one step."""
        lines = [f"x{i} = tl.load({self._on(group_step, i)})" for i in range(len(self.states))]
        noise, passed = self.read(group_step, places)
        lines += [*noise, *self._pulled("back", self.back, passed)]
        for j in range(self.by_step):
            if j in self.back.sums:
                place = plus("of_step", group_step * self.by_step + j)
                lines.append(f"tl.store({place}, lane_sum(d{j}, inside))")
        return lines

    def _unseen(self) -> list[str]:
        """What the cotangent of what was saved of a state adds to that of the state."""
        width, first = self.plan.width, len(self.states)
        lines: list[str] = []
        if self.shape.keep:
            for j in range(width):
                place = plus(f"saved + ((slot - 1) * paths + row) * {width}", j)
                lines.append(f"g{first + j} = tl.load({place}, mask=inside, other=0.0)")
        else:
            lines, names = self.see()
            for j, name in enumerate(names):
                at = f"moments + ((slot - 1) * {width} + {j}) * 3"
                value = f"tl.load({at}) + tl.load({at} + 1) * ({name}.to(tl.float64) - tl.load({at} + 2))"
                lines.append(f"g{first + j} = tl.where(inside, {value}, 0.0).to(tl.{self.dtype})")
        return [*lines, *self._pulled("unsee", self.unsee, {}), "slot -= 1", "due = tl.load(saves + slot)"]

    def _flushed(self) -> list[str]:
        """Sums of lanes and matrices added to those of tile and paths, and cleared."""
        width = self.by_tile + sum(m.rows * m.columns for m in self.reverse.matrices)
        lines = [f"part_of_tile = parts + tile * {width}"]
        if self.rows:
            read = "tl.load(own + {} * LANES)"
            tile, path = f"add_sum(part_of_tile + j, {read.format('j')}, inside)", read.format(f"({self.by_tile} + j)")
            lines += [f"for j in range(0, {self.by_tile}):", f"    {tile}"] if self.by_tile else []
            path = f"add_rows(path_sums + path * {self.by_path} + j, {path}, inside)"
            lines += [f"for j in range(0, {self.by_path}):", f"    {path}"] if self.by_path else []
        else:
            lines += [f"add_sum({plus('part_of_tile', j)}, q{j}, inside)" for j in range(self.by_tile)]
            for j in range(self.by_path):
                place = plus(f"path_sums + path * {self.by_path}", j)
                lines.append(f"add_rows({place}, q{self.by_tile + j}, inside)")
        lines += self._cleared()
        at = self.by_tile
        for i, m in enumerate(self.reverse.matrices):
            lines.append(f"add_tile({plus('part_of_tile', at)}, m{i}, {m.rows}, {m.columns})")
            lines.append(f"m{i} = {self._zeros(*self._sides(i))}")
            at += m.rows * m.columns
        return lines
