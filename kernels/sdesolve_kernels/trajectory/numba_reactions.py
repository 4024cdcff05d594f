"""Reactions one by one as a Numba kernel: paths one after another, each through all steps of the grid.

Propensities are a program, traced as a step is: of a state and a time. The loop around them is written here, with one
block of the generator's words a reaction: half of it says which one it is, the other half how long the next one waits.
"""

from __future__ import annotations

import ctypes
import math
from typing import final

import torch
from torch import Tensor

from sdesolve_kernels.threads import Job, single_threaded_if_forked, split
from sdesolve_kernels.trajectory.adaptive import clocked
from sdesolve_kernels.trajectory.codegen import Writer, indented, local
from sdesolve_kernels.trajectory.expressions import F64, Expression, topological
from sdesolve_kernels.trajectory.launch import Launch, Saved, Tables, contiguous
from sdesolve_kernels.trajectory.leaves import LoopInvariant, PathEntry, Shared, Time
from sdesolve_kernels.trajectory.numba_lanes import kind, typed
from sdesolve_kernels.trajectory.numba_source import Numba, compiled
from sdesolve_kernels.trajectory.operations import OPERATIONS
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.reactions import AbstractReactions, ReactionLaunch, ReactionRule
from sdesolve_kernels.trajectory.tracing import Unsupported, dtype_name

__all__ = ["NumbaReactions"]

ARGUMENTS = {
    "x_in": "real", "x_out": "real", "kept": "real", "slots": "int64", "rates": "float64", "clock": "float64",
    "grid": "float64", "first_step": "", "steps": "", "paths": "", "uniforms": "real", "numbers": "int64",
    "stream": "", "first_number": "", "pointers": "int64", "status": "int64", "most": "",
}  # fmt: skip
_AHEAD = 16  # reactions whose numbers are made at once
_WRITTEN = ("const", "cast", "sum")


@final
class _Printer:
    """Writes the kernel of a plan."""

    def __init__(self, plan: Plan, rule: ReactionRule) -> None:
        self.plan, self.columns = clocked(plan)
        self.rule, self.dtype = rule, plan.dtype
        self.n = len(rule.stoichiometry)
        self.rates = self.plan.states[self.n :]
        roots = [*self.rates, *self.columns, *self.plan.path_invariants]
        for e in topological(roots):
            if e.args and e.op not in OPERATIONS and e.op not in _WRITTEN:
                raise Unsupported("a product with a matrix is kept whole, and kernels of reactions have none")
            if isinstance(e.data, Time) and e.data.name != "t0":
                raise Unsupported("it reads more than the time of a state")
        self.read: set[Expression] = set()
        self.writer = Writer(Numba(), self._leaf)

    def _leaf(self, e: Expression) -> str:
        leaf = e.data
        if isinstance(leaf, Time):
            return "at"
        if isinstance(leaf, PathEntry):
            return f"p{leaf.parameter}[path * {self.plan.row_length(leaf.parameter)} + {leaf.i}]"
        if isinstance(leaf, Shared):
            return f"p{leaf.parameter}[{leaf.i}]"
        self.read.add(e)
        return typed(local(leaf), e.dtype, self.dtype)

    def source(self) -> str:
        known, graph, real = len(self.plan.path_invariants), self.plan.program.graph, kind(self.dtype)
        cast, lines = lambda e: graph.cast(e, self.dtype), self.writer.lines
        before = lines([(f"i{j}", cast(e)) for j, e in enumerate(self.plan.path_invariants)])
        timed = lines([(f"i{known + j}", cast(e)) for j, e in enumerate(self.columns)])
        rates = [*timed, *lines([(f"a{j}", graph.cast(e, F64)) for j, e in enumerate(self.rates)])]
        loop = [*rates, *self._total(), *self._reaction()]
        step = [
            "at, end, taken, largest = grid[k], grid[k + 1], 0, 0.0",
            *(f"largest = max(largest, y{i})" for i in range(self.n)),
            f"bad = largest > {2.0**24 if self.dtype != F64 else 2.0**53}",
            "while at < end or probed:",
            *indented(loop, 1),
            "if bad:",
            "    status[path] = 1",
            "    break",
            "slot = slots[k + 1]",
            "if slot >= 0:",
            *(f"    kept[(slot * paths + path) * {self.n} + {i}] = {real}(y{i})" for i in range(self.n)),
        ]
        body = [
            *(f"y{i} = F64(x_in[path * {self.n} + {i}])" for i in range(self.n)),
            *(f"x{i} = {real}(y{i})" for i in range(self.n)),
            *before,
            "seed, number = word64(numbers[2 * path]), word64(numbers[2 * path + 1])",
            "waiting, tried, jumps = clock[3 * path], I64(clock[3 * path + 1]), I64(clock[3 * path + 2])",
            "first, l = tried + first_number, 0",
            f"events(d, seed, stream, number, first, {_AHEAD})",
            "for k in range(first_step, steps):",
            *indented(step, 1),
            *(f"x_out[path * {self.n} + {i}] = {real}(y{i})" for i in range(self.n)),
            "clock[3 * path] = waiting",
            "clock[3 * path + 1] = F64(first + l - first_number)",
            "clock[3 * path + 2] = F64(first + l - first_number - tried + jumps)",
        ]
        uniforms = sorted({e.data.i for e in self.read if isinstance(e.data, LoopInvariant)})
        captured = self.plan.program.captured
        parameters = {e.data.parameter for e in topological([*self.rates, *self.columns, *self.plan.path_invariants])
                      if isinstance(e.data, PathEntry | Shared)}  # fmt: skip
        head = [
            '"""Reactions, generated: counts of species in y, propensities in a."""',
            "",
            "# Runs with the names of sdesolve_kernels._numba.paths.namespace().",
            "",
            "",
            "def trajectory(arguments, scratch, start, stop):",
            "    arguments = pointer_int64(arguments)",
            *(f"    {name} = {self._unpacked(i, of)}" for i, (name, of) in enumerate(ARGUMENTS.items())),
            *(f"    p{i} = pointer_{dtype_name(captured[i].dtype)}(pointers[{i}])" for i in sorted(parameters)),
            *(f"    u{j} = uniforms[{j}]" for j in uniforms),
            "    probed, d = most < 0, pointer_float64(scratch)",
            "    for path in range(start, stop):",
        ]
        return "\n".join([*head, *indented(body, 2)]) + "\n"

    def _unpacked(self, i: int, of: str) -> str:
        return f"pointer_{self.dtype if of == 'real' else of}(arguments[{i}])" if of else f"arguments[{i}]"

    def _total(self) -> list[str]:
        """Sums of propensities, and whether they are such."""
        m = len(self.rates)
        lines = ["if probed:", *(f"    rates[path * {m} + {j}] = a{j}" for j in range(m)), "    break"]
        lines += [f"bad = bad | ((a{j} >= 0.0) & (a{j} < INF) != True)" for j in range(m)]
        lines += ["s0 = a0", *(f"s{j} = s{j - 1} + a{j}" for j in range(1, m))]
        for j in range(m):
            short = [f"(y{i} < {-row[j]:.1f})" for i, row in enumerate(self.rule.stoichiometry) if row[j] < 0]
            if short:
                lines.append(f"bad = bad | ((a{j} > 0.0) & ({' | '.join(short)}))")
        return [*lines, "if bad:", "    break"]

    def _reaction(self) -> list[str]:
        m, real = len(self.rates), kind(self.dtype)
        lines = [
            f"total, left = s{m - 1}, end - at",
            "gap = waiting / total if total > 0.0 else INF",
            "if not gap < left:",
            "    waiting = max(waiting - total * left, 0.0)",
            "    break",
            "share = d[l] * total",
            *self._moved(),
            "at += gap",
            "l += 1",
            f"if l == {_AHEAD}:",
            f"    first, l = first + {_AHEAD}, 0",
            f"    events(d, seed, stream, number, first, {_AHEAD})",
            f"waiting = d[{_AHEAD} + l]",
            "taken += 1",
            "if taken > most:",
            "    bad = True",
            "    break",
        ]
        return [*lines, *(f"x{i} = {real}(y{i})" for i in range(self.n))]

    def _moved(self) -> list[str]:
        """Counts after the reaction in whose part of the total the share is: no branches, which nothing predicts.

        A share that was rounded up to the total leaves the last reaction that there can be.
        """
        m, lines = len(self.rates), []
        for j in reversed(range(m - 1)):
            last = f"(a{j + 1} <= 0.0)" + (f" & e{j + 1}" if j < m - 2 else "")
            lines.append(f"e{j} = {last}")
        lines += [f"c{j} = (share < s{j}) | e{j}" for j in range(m - 1)]
        for i, row in enumerate(self.rule.stoichiometry):
            text = f"{row[m - 1]:.1f}"
            for j in reversed(range(m - 1)):
                text = text if text == f"{row[j]:.1f}" else f"select(c{j}, {row[j]:.1f}, {text})"
            lines += [f"y{i} += {text}"] if any(row) else []
        return lines


class _Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ARGUMENTS]


@final
class NumbaReactions(AbstractReactions):
    """A generated Numba kernel."""

    def __init__(self, plan: Plan, rule: ReactionRule, seconds: float = math.inf) -> None:
        printer = _Printer(plan, rule)
        self.rule, self.plan, self.source = rule, plan, printer.source()
        self._tables = Tables(printer.plan)
        self._entry = compiled(self.source, seconds)

    def react(self, launch: ReactionLaunch) -> Tensor:
        return self._called(launch, launch.most)[0]

    def _called(self, launch: ReactionLaunch, most: int) -> tuple[Tensor, Tensor]:
        x0, batch = launch.x.detach().resolve_neg().contiguous(), len(launch.x)
        program, times = self.plan.program, launch.times.to(torch.float64).contiguous()
        captured = [contiguous(c, program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        uniforms = self._tables(Launch(x0, times[:2], None, (), (), False, captured), 0, 1)[1]
        rates = torch.empty(batch, len(self.rule.stoichiometry[0]), dtype=torch.float64, device="cpu")
        status, job = torch.zeros(batch, dtype=torch.int64, device="cpu"), Job(launch.progress)
        pointers = (ctypes.c_int64 * (len(captured) + 1))(*(c.data_ptr() for c in captured), 0)
        arguments = _Arguments(
            x_in=x0.data_ptr(), x_out=launch.out.data_ptr(), kept=launch.kept.data_ptr(),
            slots=launch.slots.data_ptr(), rates=rates.data_ptr(), clock=launch.clock.data_ptr(),
            grid=times.data_ptr(), first_step=launch.first_step, steps=len(times) - 1, paths=batch,
            uniforms=uniforms.data_ptr(), numbers=launch.numbers.data_ptr(), stream=launch.stream,
            first_number=launch.first_number, pointers=ctypes.addressof(pointers), status=status.data_ptr(), most=most,
        )  # fmt: skip
        address = ctypes.addressof(arguments)

        def work(first: int, last: int) -> None:
            scratch = (ctypes.c_double * (2 * _AHEAD))()
            for path in range(first, last, launch.at_once):
                if job.stopped:
                    return
                end = min(path + launch.at_once, last)
                self._entry(address, ctypes.addressof(scratch), path, end)
                job.advance(end - path)

        with single_threaded_if_forked():
            split(work, batch, 16, job)
        return status, rates

    def run(self, launch: Launch) -> Saved:
        """Propensities at the start, beside the state: what the program says."""
        x, times = launch.x0, launch.times[:2]
        clock = torch.zeros(len(x), 3, dtype=torch.float64, device="cpu")
        nobody, slots = (
            torch.zeros(len(x), 2, dtype=torch.int64, device="cpu"),
            torch.full((2,), -1, dtype=torch.int64, device="cpu"),
        )
        made = ReactionLaunch(
            x, times, launch.captured, nobody, 0, 0, clock, 0, slots,
            x.new_empty(0), torch.empty_like(x), 0,
        )  # fmt: skip
        return Saved(x, None, None, self._called(made, -1)[1].to(x.dtype))
