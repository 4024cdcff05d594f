"""The reverse of a plan as the source of a Triton kernel: a tile of paths through steps, and back.

A program takes tiles of paths one after another. It takes a tile's steps in segments, and remembers where each began;
then, from the last to the first, it takes the steps of a segment again, with states left on a tape in scratch memory
that is small enough for the second-level cache, and walks back over the tape. Noise is made again from its counters:
on a GPU that is cheaper than to read it.

What is added up over steps is added up by each lane along a segment, in registers or, where that is much, in scratch
memory; over lanes and segments in float64, for each tile; over tiles by another kernel, in order. Of networks, whose
sums are many, vectors go to scratch memory, and sums are products of them over the lanes of a tile (`products`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import final

from sdesolve_kernels.trajectory.codegen import indented
from sdesolve_kernels.trajectory.expressions import Expression
from sdesolve_kernels.trajectory.leaves import Accumulated, Cotangent, LoopInvariant
from sdesolve_kernels.trajectory.products import Block, blocks
from sdesolve_kernels.trajectory.reverse import Pulled, Reverse
from sdesolve_kernels.trajectory.tracing import Unsupported
from sdesolve_kernels.trajectory.triton_dialect import plus
from sdesolve_kernels.trajectory.triton_noise import Place
from sdesolve_kernels.trajectory.triton_source import (
    AbstractPrinter,
    Results,
    Shape,
    Stores,
    TritonKernel,
    stored_moments,
    written_out,
)

__all__ = ["reverse_kernel"]

_IN_REGISTERS = 24  # sums, or loop invariants, of a lane
_SIDE = 16  # of a tile that is multiplied, at least
_MOST_ROWS = 96  # of scratch memory: compiling takes a tenth of a second for each


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
    return dataclasses.replace(printer.kernel(), scratch=printer.scratch, parts=printer.width, entries=printer.entries)


@final
class _Pull:
    """Cotangents of what an expression of the state reads.

    Attributes:
        states: by number of the state, what its cotangent becomes, unless it stays what it is.
        sums: by number of the sum, what is added to it, unless that is 0.
        outers: numbers of the first entries of matrices, which count on from those of sums of all paths, and the
            vectors whose outer product is added to them.
    """

    def __init__(self, reverse: Reverse, pulled: Pulled, *, added: bool) -> None:
        graph, dtype = reverse.plan.program.graph, reverse.plan.dtype
        sizes = itertools.accumulate((m.rows * m.columns for m in reverse.matrices), initial=len(pulled.sums))
        first = list(sizes)
        sides = [(first[place], outer.pulled.args, outer.product.args) for place, outer in pulled.outers]
        ends = [e for _, left, right in sides for e in (*left, *right)]
        flat = [*pulled.states, *pulled.sums, *pulled.path_sums, *ends]
        made = iter([graph.cast(e, dtype) for e in written_out(graph, flat)])
        own = [graph.leaf(Cotangent(i), dtype) for i in range(len(pulled.states))]
        states = [graph.op("add", g, next(made)) if added else next(made) for g in own]
        self.states = {i: e for i, (g, e) in enumerate(zip(own, states, strict=True)) if e is not g}
        zero = graph.const(0, dtype)
        self.sums = {j: e for j, e in ((j, next(made)) for j in range(len(pulled.sums))) if e is not zero}
        self.path_sums = {j: e for j, e in ((j, next(made)) for j in range(len(pulled.path_sums))) if e is not zero}
        self.outers = [(j, [next(made) for _ in left], [next(made) for _ in right]) for j, left, right in sides]

    @property
    def expressions(self) -> list[Expression]:
        vectors = [e for _, left, right in self.outers for e in (*left, *right)]
        return [*self.states.values(), *self.sums.values(), *self.path_sums.values(), *vectors]


@final
class _Printer(AbstractPrinter):
    about = "The reverse of a trajectory kernel, generated: states of a segment on a tape, and back over it."

    def __init__(self, reverse: Reverse, increments: Sequence[str], shape: Shape) -> None:
        self.reverse = reverse
        self.back, self.unsee = _Pull(reverse, reverse.step, added=False), _Pull(reverse, reverse.observed, added=True)
        pulls = (self.back, self.unsee) if shape.keep or shape.moments else (self.back,)
        super().__init__(reverse.plan, increments, shape, [e for p in pulls for e in p.expressions])
        self.by_step = len(reverse.columns) if shape.each_step else 0
        self.by_tile = len(reverse.columns) - self.by_step + len(reverse.loop_invariants)
        self.by_path = len(reverse.path_invariants)
        self.blocks: dict[_Pull, list[Block]] = {p: [] for p in pulls}
        if reverse.matrices or self.by_tile > _IN_REGISTERS:
            for p in pulls:
                late = {j: e for j, e in p.sums.items() if j >= self.by_step}
                self.blocks[p] = blocks(self.graph, late, p.outers)
            self.by_tile = 0
        if self.by_path > _IN_REGISTERS:
            self.in_memory[Accumulated] = "own", " * LANES"
        if len(reverse.plan.loop_invariants) > _IN_REGISTERS:
            self.in_memory[LoopInvariant] = "uniforms", ""
        self.rows = self.by_path if Accumulated in self.in_memory else 0
        self.scratch = self.rows + max(sum(_rows(b.left) + _rows(b.right) for b in self.blocks[p]) for p in pulls)

    @property
    def width(self) -> int:
        """Numbers that a tile adds up."""
        return self.by_tile + sum(b.size for found in self.blocks.values() for b in found)

    @property
    def entries(self) -> tuple[tuple[int, int], ...]:
        """Places among a tile's numbers, and the sums that they are terms of."""
        found, at = [(j, j) for j in range(self.by_tile)], self.by_tile
        for block in itertools.chain(*self.blocks.values()):
            found += [(at + block.place(e), e.target - self.by_step) for e in block.entries]
            at += block.size
        return tuple(found)

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

    def _results(self, pull: _Pull) -> tuple[Results, Stores]:
        """What a function returns and what it stores: cotangents, sums, terms of sums over lanes alone, vectors."""
        results = [(f"y{i}", e) for i, e in pull.states.items()]
        results += [(f"d{j}", e) for j, e in pull.sums.items() if j < self.by_step]
        sums = [(j - self.by_step, e) for j, e in pull.sums.items() if j >= self.by_step and self.by_tile]
        sums += [(self.by_tile + j, e) for j, e in pull.path_sums.items()]
        sums = [(j, self.graph.op("add", self.graph.leaf(Accumulated(j), self.dtype), e)) for j, e in sums]
        zero, at, stores = self.graph.const(0, self.dtype), self.rows, list[tuple[str, Sequence[Expression]]]()
        for vector in (side for block in self.blocks[pull] for side in (block.left, block.right)):
            padded = [*vector, *[zero] * (_rows(vector) - len(vector))]
            for i in range(0, len(padded), 4):
                stores.append((f"base + {at + i} * LANES", padded[i : i + 4]))
            at += len(padded)
        if self.rows:
            stores += [(f"own + {j} * LANES", [e]) for j, e in sums if j >= self.by_tile]
            sums = [(j, e) for j, e in sums if j < self.by_tile]
        return [*results, *((f"t{j}", e) for j, e in sums)], stores

    def _pulled(self, name: str, pull: _Pull, passed: dict[str, str]) -> list[str]:
        """Lines that call such a function, and add products of vectors up."""
        results, stores = self._results(pull)
        targets = [{"y": "g", "t": "q", "d": "d"}[target[0]] + target[1:] for target, _ in results]
        lines, at = self.call(name, results, targets, passed, stores), self.rows
        if not self.blocks[pull]:
            return lines
        lines.append("tl.debug_barrier()  # threads read what others wrote")
        for i, block in self._numbered(pull):
            for letter, side in (("a", block.left), ("b", block.right)):
                if side:
                    rows = f"base + {at} * LANES, {_side(side)}, {len(side)}, count, LANES"
                    lines.append(f"{letter} = vectors({rows})")
                    at += _rows(side)
            if block.right:
                lines.append(f"m{i} += product(a, b, DOUBLE)")
            lines += [f"{o}{i} += tl.sum({a}, axis=1)" for o, a, left in _ENDS if block.sums(left)]
        return [*lines, "tl.debug_barrier()"]

    def _numbered(self, pull: _Pull | None = None) -> list[tuple[int, Block]]:
        """Blocks with their numbers; those of one function, or all."""
        found = [(p, b) for p, own in self.blocks.items() for b in own]
        return [(i, b) for i, (p, b) in enumerate(found) if pull in (p, None)]

    def _empty(self) -> list[str]:
        """Products and sums of vectors, at 0."""
        lines = []
        for i, b in self._numbered():
            if b.right:
                lines.append(f"m{i} = {self._zeros(_side(b.left), _side(b.right))}")
            lines += [
                f"{o}{i} = {self._zeros(_side(b.left if left else b.right))}" for o, _, left in _ENDS if b.sums(left)
            ]
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
        if self.shape.ends:
            pointers += ["ends", "values"]
        integers = ["paths", "steps", "segment", *(["slots"] if self.saving else [])]
        tile = [
            "path = (lane + tile * LANES).to(tl.int64)",
            "inside, count = path < paths, tl.minimum(paths - tile * LANES, LANES)",
            "row = tl.minimum(path, paths - 1)  # lanes past the last path repeat it, and count nowhere",
            *self.begin("x_in"),
        ]
        for i in range(states):
            tile.append(f"g{i} = tl.load({plus(f'cotangents + row * {states}', i)}, mask=inside, other=0.0)")
        tile += [*self._cleared(), *self._empty()]
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

    def _cleared(self) -> list[str]:
        """Sums of lanes, at 0."""
        in_registers = self.by_tile + (0 if self.rows else self.by_path)
        lines = [f"q{j} = {self._zeros('LANES')}" for j in range(in_registers)]
        if self.rows:
            lines += [f"for j in range(0, {self.rows}):", f"    tl.store(own + j * LANES, {self._zeros('LANES')})"]
        return lines

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
        ends = [f"tl.store({plus(f'ends + path * {states}', i)}, x{i}, mask=inside)" for i in range(states)]
        back = ["stop = begin", *self._retreat()]
        if self.saving:
            seen = ["if due == k:", *indented(self._unseen(), 1), "stop = tl.maximum(due, begin)", *self._retreat()]
            back = ["while (k > begin) | ((due == k) & (part == 0)):", *indented(seen, 1)]
        if self.shape.ends:
            back = ["if turn == segments - 1:", *indented(ends, 1), *back]
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
            if self.shape.ends:
                tiles = "(paths + LANES - 1) // LANES"
                place = f"values + ((slot - 1) * ({tiles}) + tile) * {2 * width}"
                lines += stored_moments(names, place, "inside")
            for j, name in enumerate(names):
                at = f"moments + ((slot - 1) * {width} + {j}) * 3"
                off = f"tl.load({at} + 1) * ({name}.to(tl.float64) - tl.load({at} + 2))"
                value = f"tl.load({at}) + tl.where(tl.load({at} + 1) == 0, 0.0, {off})"
                lines.append(f"g{first + j} = tl.where(inside, {value}, 0.0).to(tl.{self.dtype})")
        return [*lines, *self._pulled("unsee", self.unsee, {}), "slot -= 1", "due = tl.load(saves + slot)"]

    def _flushed(self) -> list[str]:
        """What lanes and products have added up, added to the numbers of tile and paths, and cleared."""
        lines = [f"of_tile = parts + tile * {self.width}"]
        lines += [f"add_sum({plus('of_tile', j)}, q{j}, inside)" for j in range(self.by_tile)]
        place = f"path_sums + path * {self.by_path}"
        if self.rows:
            row = "tl.load(own + j * LANES)"
            lines += [f"for j in range(0, {self.rows}):", f"    add_rows({place} + j, {row}, inside)"]
        else:
            lines += [f"add_rows({plus(place, j)}, q{self.by_tile + j}, inside)" for j in range(self.by_path)]
        at = self.by_tile
        for i, b in self._numbered():
            rows, columns = len(b.left), len(b.right)
            if b.right:
                lines.append(f"add_tile({plus('of_tile', at)}, m{i}, {rows}, {columns})")
            ends = {"l": (at + rows * columns, rows), "r": (at + rows * columns + rows, columns)}
            for o, _, left in _ENDS:
                if b.sums(left):
                    lines.append(f"add_tile({plus('of_tile', ends[o][0])}, {o}{i}[None, :], 1, {ends[o][1]})")
            at += b.size
        return [*lines, *self._cleared(), *self._empty()]


# Sums of vectors: what they are called, of which tile, whether of the left one.
_ENDS = (("l", "a", True), ("r", "b", False))


def _side(vector: Sequence[Expression]) -> int:
    """Of a tile that holds it."""
    return max(_SIDE, 1 << (len(vector) - 1).bit_length())


def _rows(vector: Sequence[Expression]) -> int:
    """Of scratch memory that it takes."""
    return -(-len(vector) // 4) * 4
