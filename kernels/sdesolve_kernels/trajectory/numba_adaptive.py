"""Adaptive steps as a Numba kernel: lanes side by side, each with its own clock, and refilled when its path is done.

An attempt of all lanes is one pass of vectorised loops, as a step of a grid is in `numba_source`; what follows, one
lane after another, is cheap: accept or reject, turn to the next cell, keep states, take the next path. Lanes whose cell
is to be halved are listed, and the normals of a node are made for the list, vectorised again.

All that a lane is lies in memory that belongs to one worker between calls, so that a run of unknown length can be
interrupted and watched; which lane a path goes through, and beside which others, changes no bit of it.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import time
from typing import final

import numpy as np
import torch

from sdesolve_kernels.backend import int64_bits
from sdesolve_kernels.threads import Job, single_threaded_if_forked, split
from sdesolve_kernels.trajectory.adaptive import (
    COARSE,
    AbstractAdaptive,
    AdaptiveLaunch,
    AdaptiveSaved,
    Rule,
    clocked,
    rounds_clock,
)
from sdesolve_kernels.trajectory.codegen import Writer, indented
from sdesolve_kernels.trajectory.expressions import F64, I64, Expression, topological
from sdesolve_kernels.trajectory.launch import Launch, Tables, contiguous
from sdesolve_kernels.trajectory.leaves import LoopInvariant, NoiseLeaf, PathEntry, PathInvariant, Shared, State, Time
from sdesolve_kernels.trajectory.numba_lanes import kind
from sdesolve_kernels.trajectory.numba_source import AbstractPrinter, Numba, compiled
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.tracing import Unsupported, dtype_name

__all__ = ["NumbaAdaptive"]

ARGUMENTS = {
    "x_in": "real", "carried_in": "real", "lengths": "float64", "x_out": "real", "t_out": "float64",
    "counts": "int64", "errors": "float64", "grid": "float64", "steps": "", "paths": "", "marks": "float64",
    "kept": "real", "kept_steps": "float64", "uniforms": "real", "noise": "int64", "pointers": "int64",
    "tolerances": "float64", "max_steps": "",
}  # fmt: skip
_LANES = {"float32": 64, "float64": 32}
_VECTOR = 16
_BUDGET = 30_000_000.0  # nanoseconds in a call, which an interrupt waits for
_FIRST, _MOST = 64, 1 << 16  # passes of the first call, and of any
_CHUNK = 16  # paths for each lane that a worker takes at a time, at most


@final
class _Printer(AbstractPrinter):
    about = "An adaptive kernel, generated: state in rows of s, one column per path that is under way."
    arguments = ARGUMENTS

    def __init__(self, plan: Plan, rule: Rule) -> None:
        plan, self.columns = clocked(plan)
        super().__init__(plan, ())
        if plan.matrices:
            raise Unsupported("a product with a matrix is kept whole, and adaptive kernels write products out")
        self.rule, self.n, self.rounds = rule, plan.numbers, rounds_clock(self.columns)
        self.lanes = self.rows.lanes = _LANES[self.dtype]
        m, rows = rule.channels, self.rows
        self.m = m
        # Rows that last, by type; what a pass computes on the way comes behind them.
        self.x = rows.rows(self.n)
        self.slope = self.x if rule.nested else rows.rows(self.n)
        self.path_invariant = rows.rows(len(plan.path_invariants))
        self.cell = rows.rows(3 * m)
        self.halves = [rows.rows(3 * m) for _ in range(2)] if rule.doubling else []
        self.waiting = rows.rows(3 * m * (rule.deepest + 1)) if rule.nested else 0
        self.lasting = rows.count
        names = ["T0", "T1", "END", "WANTED", "PREVIOUS", "LOG", "GROWTH", "ERROR", "TM"]
        self.floats = {name: rows.rows(1, F64) for name in names}
        self.integers = {
            name: rows.rows(1, I64)
            for name in ("PATH", "ROOT", "LEVEL", "INDEX", "ACCEPTED", "REJECTED", "HELD", "SLOT", "HALVED", "STUCK")
        }
        self.lists = {name: rows.rows(1, I64) for name in ("LIST", "AT", "WHO")}
        self.blocks = (3 * m + 6) // 4
        self.normals = rows.rows(4 * self.blocks) if rule.nested else 0
        self.clock = rows.rows(len(self.columns))
        self.after = [rows.rows(len(plan.states)) for _ in range(3 if rule.doubling else 1)]
        self.reading = (self.x, self.cell)

    def place(self, e: Expression) -> tuple[str, str]:
        i, name = e.data.i, f"{'xzi'[[State, NoiseLeaf, PathInvariant].index(type(e.data))]}{e.data.i}"
        if isinstance(e.data, State):
            state = self.reading[0]
            row = state + i if i < self.n else self.slope + i - self.n
        elif isinstance(e.data, NoiseLeaf):
            row = self.reading[1] + i
        else:
            known = len(self.plan.path_invariants)
            row = self.path_invariant + i if i < known else self.clock + i - known
        return name, str(row * self.lanes)

    def at(self, name: str, lane: str = "l") -> str:
        """Entry of a lane in a row of its own name."""
        row, array = (self.floats[name], "d") if name in self.floats else ({**self.integers, **self.lists}[name], "w")
        return f"{array}[{row * self.lanes} + {lane}]"

    def entry(self, row: int, lane: str = "l") -> str:
        return f"s[{row * self.lanes} + {lane}]"

    def kernel(self) -> str:
        rule = self.rule
        self.rows.arrays |= {F64: "d", I64: "w"}
        single = self.dtype == F64
        if single:
            self.rows.arrays.pop(F64)
        body = [*self._refill(), "if q[3] == 0:", "    break", "q[4] += q[3]"]
        body += self._halve() if rule.nested else []
        body += self._ends()
        body += self._attempts()
        body += self._error()
        body += self._nested_control() if rule.nested else self._free_control()
        lines = [f"u{j} = uniforms[{j}]" for j in self.reads(LoopInvariant)]
        lines += ["rtol, atol, ki, kp = tolerances[0], tolerances[1], tolerances[2], tolerances[3]"]
        lines += ["whole = tolerances[4] != 0.0"]
        lines += ["used = q[2]", "for turn in range(stop):", *indented(body, 1), "q[2] = used"]
        head = [
            f'"""{self.about}"""',
            "",
            "# Runs with the names of sdesolve_kernels._numba.paths.namespace().",
            "",
            f"REAL = {kind(self.dtype)}",
            f"LANES = {self.lanes}  # paths under way",
            f"WORDS = {self.words}  # bytes before the generator's words",
            "",
            "",
            "def trajectory(arguments, scratch, start, stop):",
            "    a = pointer_int64(arguments)",
            *(f"    {name} = {self._unpacked(i, kind)}" for i, (name, kind) in enumerate(self.arguments.items())),
            f"    q, s, words = pointer_int64(start), pointer_{self.dtype}(scratch), word(scratch + WORDS)",
            "    w, d = pointer_int64(scratch), pointer_float64(scratch)",
            *(f"    {name} = pointer_{dtype}(scratch)" for dtype, name in sorted(self.rows.arrays.items())),
        ]
        entries = {e.data.parameter for e in topological(self.plan.path_invariants) if isinstance(e.data, PathEntry)}
        entries |= {e.data.parameter for e in topological(self.columns) if isinstance(e.data, Shared)}
        for i in sorted(entries):
            head.append(f"    p{i} = pointer_{dtype_name(self.plan.program.captured[i].dtype)}(pointers[{i}])")
        return "\n".join([*head, *indented(lines, 1)]) + "\n"

    # Lanes and paths ---------------------------------------------------------------------------------------------

    def _refill(self) -> list[str]:
        """Paths that wait into lanes that are idle; when none waits, lanes that are left move together."""
        n, at = self.n, self.at
        lines = ["path = q[0]", f"{at('PATH')} = path + 1", "q[0] += 1", "q[3] += 1"]
        lines += [f"{self.entry(self.x + i)} = x_in[path * {n} + {i}]" for i in range(n)]
        if not self.rule.nested:
            lines += [f"{self.entry(self.slope + i)} = carried_in[path * {n} + {i}]" for i in range(n)]
        lines += [f"{at(name)} = 0" for name in self.integers if name != "PATH"]
        lines += [f"{at('WANTED')} = lengths[path]", f"{at('PREVIOUS')} = 0.0"]
        lines += [f"{at('T0')} = grid[0]", f"{at('END')} = grid[steps]"]
        if self.rule.nested:
            lines += [self._root("0", "path")]
        constant = []
        if self.plan.path_invariants:
            targets = [
                (self.entry(self.path_invariant + i), self._real(e)) for i, e in enumerate(self.plan.path_invariants)
            ]
            constant = ["for l in range(LANES):", f"    path = max({at('PATH')} - 1, 0)"]
            constant += indented(self.writer.lines(targets), 1)
        rows = ["s[r * LANES + k] = s[r * LANES + l]"]
        move = [f"for r in range({self.lasting}):", *indented(rows, 1)]
        for name in (*self.floats, *self.integers):
            move.append(f"{at(name, 'k')} = {at(name)}")
        move += [f"{at('PATH')} = 0", f"{at('T0')} = {at('END')}"]
        return [
            f"if q[0] < q[1] and LANES - q[3] >= {max(1, self.lanes // 16)}:",
            "    for l in range(LANES):",
            f"        if {at('PATH')} == 0 and q[0] < q[1]:",
            *indented(lines, 3),
            *indented(constant, 1),
            "    used = LANES",
            f"if q[0] >= q[1] and used > {_VECTOR} and 2 * q[3] <= used:",
            f"    fewer = (q[3] + {_VECTOR - 1}) // {_VECTOR} * {_VECTOR}",
            "    k = 0",
            "    for l in range(fewer, used):",
            f"        if {at('PATH')} != 0:",
            f"            while {at('PATH', 'k')} != 0:",
            "                k += 1",
            *indented(move, 3),
            f"    used = max(fewer, {_VECTOR})",
        ]

    def _root(self, root: str, path: str) -> str:
        return f"root_normals_{self.dtype}(s, {self.cell * self.lanes} + l, noise, {path}, {root}, {self.m}, LANES)"

    def _retire(self, status: str, time: str) -> list[str]:
        n, at = self.n, self.at
        return [
            "path = " + at("PATH") + " - 1",
            *(f"x_out[path * {n} + {i}] = {self.entry(self.x + i)}" for i in range(n)),
            f"t_out[path] = {time}",
            f"counts[path * 3] = {at('ACCEPTED')}",
            f"counts[path * 3 + 1] = {at('REJECTED')}",
            f"counts[path * 3 + 2] = {status}",
            f"errors[path] = {at('ERROR')}",
            f"{at('PATH')} = 0",
            f"{at('ROOT')} = 0",
            f"{at('T0')} = {at('END')}",
            "q[3] -= 1",
        ]

    # Cells and ends of steps -------------------------------------------------------------------------------------

    def _length(self) -> list[str]:
        at = self.at
        return [
            f"root, level = {at('ROOT')}, {at('LEVEL')}",
            "length = fabs(grid[root + 1] - grid[root]) * as_float64((I64(1023) - level) << I64(52))",
        ]

    def _halve(self) -> list[str]:
        """Halves of cells until none is longer than wanted; with two half steps, of every cell once more."""
        at, m, rule = self.at, self.m, self.rule
        want = f"length > {at('WANTED')} and level < {rule.deepest - rule.doubling}"
        listed = [f"{at('LIST', 'count')} = l", "count += 1"]
        if rule.doubling:
            swap = [f"{self.entry(self.cell + i)} = {self.entry(self.halves[0] + i)}" for i in range(3 * m)]
            swap += [
                f"s[{self.waiting * self.lanes} + ((level + 1) * {3 * m} + {i}) * LANES + l] = "
                f"{self.entry(self.halves[1] + i)}"
                for i in range(3 * m)
            ]
            swap += [f"{at('LEVEL')} += 1", f"{at('INDEX')} *= 2", f"{at('HALVED')} = 0"]
            choose = [
                f"if {at('HALVED')} == 1 and {want}:", *indented(swap, 1), f"if {at('HALVED')} == 0:",
                *indented(listed, 1),
            ]  # fmt: skip
        else:
            choose = [f"if {want}:", *indented(listed, 1)]
        index = f"(((noise[15] + {at('ROOT')}) << I64(21)) + (I64(1) << {at('LEVEL')}) + {at('INDEX')}) * {3 * m}"
        z = [f"s[{self.normals * self.lanes} + (skip + {i}) * LANES + e]" for i in range(3 * m)]
        targets = self.halves if rule.doubling else [self.cell, None]
        apply = []
        for j in range(m):
            rows = [f"{self.entry(self.cell + part * m + j)}" for part in range(3)]
            apply.append(
                f"w0, h0, k0, w1, h1, k1 = halved_{self.dtype}({', '.join(rows)}, {z[j]}, {z[m + j]}, {z[2 * m + j]})"
            )
            for half, row in enumerate(targets):
                for part, name in enumerate("whk"):
                    i = part * m + j
                    place = (
                        self.entry(row + i)
                        if row is not None
                        else f"s[{self.waiting * self.lanes} + ((level + 1) * {3 * m} + {i}) * LANES + l]"
                    )
                    apply.append(f"{place} = {name}{half}")
        done = [f"{at('HALVED')} = 1"] if rule.doubling else [f"{at('LEVEL')} += 1", f"{at('INDEX')} *= 2"]
        return [
            "while True:",
            "    count = 0",
            "    for l in range(used):",
            f"        if {at('PATH')} != 0:",
            *indented([*self._length(), *choose], 3),
            "    if count == 0:",
            "        break",
            "    for e in range(count):",
            f"        l = {at('LIST', 'e')}",
            f"        {at('AT', 'e')} = {index}",
            f"        {at('WHO', 'e')} = {at('PATH')} - 1",
            f"    node_normals_{self.dtype}(s, {self.normals * self.lanes}, words, noise, w, "
            f"{self.lists['WHO'] * self.lanes}, {self.lists['AT'] * self.lanes}, count, {self.blocks}, LANES)",
            "    for e in range(count):",
            f"        l, skip = {at('LIST', 'e')}, {at('AT', 'e')} & I64(3)",
            f"        level = {at('LEVEL')}",
            *indented([*apply, *done], 2),
        ]

    def _ends(self) -> list[str]:
        at = self.at
        if not self.rule.nested:
            return [
                "for l in range(used):",
                f"    t, end, h = {at('T0')}, {at('END')}, {at('WANTED')}",
                f"    {at('T1')} = select(fabs(end - t) <= h, end, t + copysign(h, end - t))",
            ]
        middle = [f"{at('TM')} = t0 + (t1 - t0) * ((index + F64(0.5)) * part)"] if self.rule.doubling else []
        return [
            "for l in range(used):",
            f"    root, index = {at('ROOT')}, F64({at('INDEX')})",
            "    t0, t1 = grid[root], grid[root + 1]",
            f"    part = as_float64((I64(1023) - {at('LEVEL')}) << I64(52))",
            f"    {at('T0')} = t0 + (t1 - t0) * (index * part)",
            "    last = (index + F64(1.0)) * part",
            f"    {at('T1')} = select(last == F64(1.0), t1, t0 + (t1 - t0) * last)",
            *indented(middle, 1),
        ]

    # One attempt -------------------------------------------------------------------------------------------------

    def _evaluation(self, start: str, end: str, state: int, noise: int, after: int) -> list[str]:
        """A step of all lanes between two rows of times."""
        lines: list[str] = []
        if self.columns:
            graph = self.plan.program.graph
            writer = Writer(Numba(), self._of_time, fusing=False)
            targets = [(self.entry(self.clock + j), graph.cast(e, self.dtype)) for j, e in enumerate(self.columns)]
            lines += [
                "for l in range(used):",
                f"    t_t0, t_t1 = {self.at(start)}, {self.at(end)}",
                "    t_dt = t_t1 - t_t0",
                "    t_scale = sqrt(fabs(t_dt))",
                *indented(writer.lines(targets), 1),
            ]
        self.reading = (state, noise)
        return lines + self.rows.compute([(after + i, e) for i, e in enumerate(self.plan.states)])

    def _of_time(self, e: Expression) -> str:
        if isinstance(e.data, Time):
            return f"t_{e.data.name}"
        if isinstance(e.data, Shared):
            return f"p{e.data.parameter}[{e.data.i}]"
        return self._leaf(e)

    def _attempts(self) -> list[str]:
        if not self.rule.doubling:
            return self._evaluation("T0", "T1", self.x, self.cell, self.after[0])
        whole, half, after = self.after[1], self.after[2], self.after[0]
        return [
            *self._evaluation("T0", "T1", self.x, self.cell, whole),
            *self._evaluation("T0", "TM", self.x, self.halves[0], half),
            *self._evaluation("TM", "T1", half, self.halves[1], after),
        ]

    def _taken(self, i: int) -> str:
        """The state of an attempt; of a cell as one step where that is compared with others."""
        after = self.entry(self.after[0] + i)
        return f"select(whole, {self.entry(self.after[1] + i)}, {after})" if self.rule.doubling else after

    def _error(self) -> list[str]:
        """Root mean square of the error in units of the tolerance, and by what factor the step should change."""
        n, after = self.n, self.after[0]
        last = after + len(self.plan.states) - n
        at, lines = self.at, ["rt, at = REAL(rtol), REAL(atol)", "for l in range(used):", "    total = F64(0.0)"]
        for i in range(n):
            error = f"{self.entry(last + i)}"
            if self.rule.doubling:
                error = f"({self.entry(after + i)} - {self.entry(self.after[1] + i)})"
            x, y = self.entry(self.x + i), self.entry(after + i)
            lines += [
                f"    a0, a1 = fabs({x}), fabs({y})",
                f"    e0 = F64({error} / fma(rt, select(a0 > a1, a0, a1), at))",
                "    total = fma(e0, e0, total)",
            ]
        lines += [f"    {at('ERROR')} = sqrt(total * F64({1.0 / max(n, 1)!r}))"]
        lines += ["for l in range(used):", f"    error = {at('ERROR')}"]
        if self.rule.nested:
            lines += [
                "    log = log_float64(select(error > F64(1e-4), error, select(error == error, F64(1e-4), error)))",
                f"    {at('LOG')} = log",
                f"    {at('GROWTH')} = F64(0.9) * exp_float64(kp * {at('PREVIOUS')} - ki * log)",
            ]
        else:
            lines += [f"    {at('GROWTH')} = F64(0.9) * exp_float64(-ki * log_float64(error))"]
        return lines

    # What follows ------------------------------------------------------------------------------------------------

    def _nested_control(self) -> list[str]:
        n, m, at, rule = self.n, self.m, self.at, self.rule
        finite = [f"ok = {at('ERROR')} < F64(1.0)"]
        for i in range(n):
            finite.append(f"ok = ok and fabs({self.entry(self.after[0] + i)}) < REAL(INF)")
        kept = [f"kept[place * {n} + {i}] = {{}}" for i in range(n)]
        before = [line.format(self.entry(self.x + i)) for i, line in enumerate(kept)]
        after = [line.format(self.entry(self.after[0] + i)) for i, line in enumerate(kept)]
        keep = [
            "last = F64(root) + F64(index + I64(1)) * as_float64((I64(1023) - level) << I64(52))",
            f"while marks[{at('SLOT')}] <= last:",
            f"    place = {at('SLOT')} * paths + {at('PATH')} - 1",
            f"    if marks[{at('SLOT')}] == last:",
            *indented([*after, "kept_steps[2 * place] = F64(-1.0)"], 2),
            "    else:",
            *indented([*before, "kept_steps[2 * place] = F64(level)"], 2),
            f"    {at('SLOT')} += 1",
        ]
        pop = [
            "while level > 0 and (index & I64(1)) == 1:",
            "    index >>= I64(1)",
            "    level -= I64(1)",
            f"{at('LEVEL')} = level",
            f"{at('HALVED')} = 0",
            "if level == 0:",
            "    root += 1",
            f"    {at('ROOT')} = root",
            f"    {at('INDEX')} = 0",
            "    if root == steps:",
            *indented(self._retire("0", "grid[steps]"), 2),
            "        continue",
            f"    {self._root('root', at('PATH') + ' - 1')}",
            "else:",
            f"    {at('INDEX')} = index + I64(1)",
            f"    for r in range({3 * m}):",
            f"        s[{self.cell * self.lanes} + r * LANES + l] = "
            f"s[{self.waiting * self.lanes} + (level * {3 * m} + r) * LANES + l]",
        ]
        good = [
            f"{at('ACCEPTED')} += 1",
            *keep,
            *(f"{self.entry(self.x + i)} = {self._taken(i)}" for i in range(n)),
            f"{at('PREVIOUS')} = {at('LOG')}",
            "growth = select(growth > F64(2.0), F64(2.0), growth)",
            f"growth = select({at('HELD')} == 1, select(growth > F64(1.0), F64(1.0), growth), growth)",
            f"{at('HELD')} = 0",
            f"{at('WANTED')} = length * growth",
            *pop,
        ]
        bad = [
            f"{at('REJECTED')} += 1",
            f"{at('HELD')} = 1",
            "growth = select(growth > F64(0.9), F64(0.9), growth)",
            f"{at('WANTED')} = length * growth",
            f"if level >= {rule.deepest - rule.doubling}:",
            *indented(self._retire("2", at("T0")), 1),
            "    continue",
        ]
        again = [
            f"if {at('ACCEPTED')} + {at('REJECTED')} >= max_steps:",
            "    t0, t1 = grid[" + at("ROOT") + "], grid[" + at("ROOT") + " + 1]",
            f"    part = as_float64((I64(1023) - {at('LEVEL')}) << I64(52))",
            *indented(self._retire("1", f"t0 + (t1 - t0) * (F64({at('INDEX')}) * part)"), 1),
        ]
        if self.rounds:
            again += [
                f"elif {at('WANTED')} < F64({COARSE!r}) * fabs({at('T0')}):",
                *indented(self._retire("3", at("T0")), 1),
            ]
        return [
            "for l in range(used):",
            f"    if {at('PATH')} == 0:",
            "        continue",
            *indented(self._length(), 1),
            f"    index, growth = {at('INDEX')}, {at('GROWTH')}",
            "    growth = select(growth > F64(0.25), growth, F64(0.25))",
            *indented(finite, 1),
            "    if ok:",
            *indented(good, 2),
            "    else:",
            *indented(bad, 2),
            *indented(again, 1),
        ]

    def _free_control(self) -> list[str]:
        n, at = self.n, self.at
        eps = 1.1920928955078125e-07 if self.dtype == "float32" else 2.220446049250313e-16
        kept = [f"kept[place * {n} + {i}] = {self.entry(self.x + i)}" for i in range(n)]
        keep = [
            "if marks[0] < INF:",
            "    for l in range(used):",
            f"        if {at('PATH')} != 0 and {at('ERROR')} < F64(1.0):",
            "            way = copysign(F64(1.0), grid[steps] - grid[0])",
            f"            while marks[{at('SLOT')}] <= way * {at('T1')}:",
            f"                place = {at('SLOT')} * paths + {at('PATH')} - 1",
            *indented(kept, 4),
            f"                kept_steps[2 * place] = {at('T0')}",
            f"                kept_steps[2 * place + 1] = {at('T1')} - {at('T0')}",
            f"                {at('SLOT')} += 1",
        ]
        after = self.after[0]
        chosen = [
            f"{self.entry(row + i)} = select(good, {self.entry(after + k * n + i)}, {self.entry(row + i)})"
            for k, row in enumerate((self.x, self.slope)) for i in range(n)
        ]  # fmt: skip
        control = [
            f"t, t1, end, error, growth = {at('T0')}, {at('T1')}, {at('END')}, {at('ERROR')}, {at('GROWTH')}",
            "active = t != end",
            "good = active and error < F64(1.0)",
            "growth = select(growth > F64(0.2), growth, F64(0.2))",
            "growth = select(growth < F64(10.0), growth, F64(10.0))",
            f"held = (good == False) or ({at('HELD')} != 0)",
            "growth = select(held, select(growth > F64(1.0), F64(1.0), growth), growth)",
            "bad = active and not good",
            f"{at('HELD')} = I64(bad)",
            f"{at('ACCEPTED')} += I64(good)",
            f"{at('REJECTED')} += I64(bad)",
            f"h = select(active, fabs(t1 - t) * growth, {at('WANTED')})",
            "t = select(good, t1, t)",
            f"{at('T0')} = t",
            f"short = bad and h < F64({10 * eps!r}) * fabs(t)",
            f"late = t != end and {at('ACCEPTED')} + {at('REJECTED')} >= max_steps",
            f"{at('STUCK')} = select(short, I64(2), select(late, I64(1), I64(0)))",
            f"{at('WANTED')} = max(h, F64(1e-15) * fabs(t))",
            *chosen,
        ]
        if self.rounds:
            coarse = f"t != end and h < F64({COARSE!r}) * fabs(t)"
            control.append(f"{at('STUCK')} = select({coarse}, I64(3), {at('STUCK')})")
        ended = f"{at('PATH')} != 0 and ({at('T0')} == {at('END')} or {at('STUCK')} != 0)"
        control.append(f"done += I64({ended})")
        retire = [
            "if done > 0:",
            "    for l in range(used):",
            f"        if {ended}:",
            *indented(self._retire(at("STUCK"), at("T0")), 3),
        ]
        return [*keep, "done = I64(0)", "for l in range(used):", *indented(control, 1), *retire]


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ARGUMENTS]


@final
class NumbaAdaptive(AbstractAdaptive):
    """A generated Numba kernel."""

    def __init__(self, plan: Plan, rule: Rule, seconds: float = math.inf) -> None:
        printer = _Printer(plan, rule)
        self.rule, self.plan = rule, plan
        self.source = printer.kernel()
        self.lanes, self._scratch, self._n = printer.lanes, printer.scratch, printer.n
        self._tables = Tables(printer.plan)
        self._entry = compiled(self.source, seconds)

    def adapt(self, launch: AdaptiveLaunch) -> AdaptiveSaved:
        with single_threaded_if_forked():
            return _Run(self, launch).finished()


@final
class _Run:
    """One run, and the memory that its threads read and write: both live as long as one of them works on it."""

    def __init__(self, kernel: NumbaAdaptive, launch: AdaptiveLaunch) -> None:
        self.kernel, self.launch, self.job = kernel, launch, Job(launch.progress)
        x0 = launch.x0.detach().resolve_neg().contiguous()
        batch, n, slots = len(x0), kernel._n, len(launch.marks)
        self.batch, dtype = batch, x0.dtype
        self.x, self.t = torch.empty_like(x0), torch.empty(batch, dtype=torch.float64)
        self.counts, self.errors = torch.zeros(batch, 3, dtype=torch.int64), torch.zeros(batch, dtype=torch.float64)
        self.kept = torch.zeros(slots, batch, n, dtype=dtype)
        self.kept_steps = torch.zeros(slots, batch, 2, dtype=torch.float64)
        program = kernel.plan.program
        captured = [contiguous(c, program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        times = launch.times.to(torch.float64).contiguous()
        table = Launch(x0, times[:2], None, (), (), False, captured)
        uniforms = kernel._tables(table, 0, 1)[1]
        noise = [int64_bits(number) for place in launch.places for number in place]
        k = kernel.rule.order
        nested = kernel.rule.nested
        tolerances = torch.tensor(
            [launch.rtol, launch.atol, (0.4 if nested else 1.0) / k, 0.1 / k, launch.whole], dtype=torch.float64
        )
        marks = torch.tensor([*launch.marks, math.inf], dtype=torch.float64)
        lengths = launch.lengths.to(torch.float64).contiguous()
        carried = x0 if launch.carried is None else launch.carried.detach().contiguous()
        lists = [
            (ctypes.c_int64 * (len(noise) + 1))(*noise, 0),
            (ctypes.c_int64 * (len(captured) + 1))(*(c.data_ptr() for c in captured), 0),
        ]
        self.memory = (x0, carried, lengths, times, marks, tolerances, captured, uniforms, lists)
        self.arguments = _Arguments(
            x_in=x0.data_ptr(), carried_in=carried.data_ptr(), lengths=lengths.data_ptr(), x_out=self.x.data_ptr(),
            t_out=self.t.data_ptr(), counts=self.counts.data_ptr(), errors=self.errors.data_ptr(),
            grid=times.data_ptr(), steps=len(times) - 1, paths=batch, marks=marks.data_ptr(),
            kept=self.kept.data_ptr(), kept_steps=self.kept_steps.data_ptr(), uniforms=uniforms.data_ptr(),
            noise=ctypes.addressof(lists[0]), pointers=ctypes.addressof(lists[1]), tolerances=tolerances.data_ptr(),
            max_steps=launch.max_steps,
        )  # fmt: skip

    def finished(self) -> AdaptiveSaved:
        threads = min(torch.get_num_threads(), -(-self.batch // self.kernel.lanes))
        chunk = min(_CHUNK * self.kernel.lanes, max(self.kernel.lanes, -(-self.batch // (4 * threads))))
        chunk = self.batch if threads == 1 else chunk
        starts = itertools.count(0, chunk)

        def work(first: int, last: int) -> None:
            memory = np.zeros(self.kernel._scratch + 64, np.uint8)
            address = -(-memory.ctypes.data // 64) * 64
            queue = (ctypes.c_int64 * 8)(0, 0, self.kernel.lanes, 0, 0)
            turns, done = _FIRST, 0
            while not self.job.stopped:
                if queue[0] >= queue[1]:
                    start = next(starts)
                    if start < self.batch:
                        queue[0], queue[1] = start, min(start + chunk, self.batch)
                    elif queue[3] == 0:
                        return
                begin = time.perf_counter_ns()
                self.kernel._entry(ctypes.addressof(self.arguments), address, ctypes.addressof(queue), turns)
                took = time.perf_counter_ns() - begin
                self.job.advance(queue[4] - done)
                done = queue[4]
                turns = max(1, min(8 * turns, int(turns * _BUDGET / max(took, 1)), _MOST))

        split(work, threads, 1, self.job)
        shape = (*self.kept.shape[:2], *self.x.shape[1:])
        return AdaptiveSaved(self.x, self.t, self.counts, self.errors, self.kept.reshape(shape), self.kept_steps)
