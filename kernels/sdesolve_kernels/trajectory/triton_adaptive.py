"""Adaptive steps as a Triton kernel: one lane a path, each with its own clock, masks in place of branches.

A pass attempts a step of every lane: halve cells that are longer than wanted, evaluate, accept or reject, and turn to
the next cell. What a lane is lies in memory between launches, so that a run of unknown length goes in launches of a
bounded number of passes. Halves that wait are kept in memory by level; a lane reads only what it wrote.

**Divergence.** A program ends when its slowest lane does, so it costs ``max_l n_l`` passes over its lanes where paths
need ``n_l`` attempts, and ``mean n_l / E max n_l`` of the work counts: for counts of relative spread ``s``, about
``1 / (1 + 2.1 s)`` with 32 lanes, the expected largest of 32 normals being 2.1 deviations. Programs are one warp, so
that no warp waits for another. Turns of the inner loops, over halves and marks, are those of the lane with most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch

from sdesolve_kernels._triton import arguments as triton
from sdesolve_kernels.threads import Job
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
from sdesolve_kernels.trajectory.expressions import Expression, topological
from sdesolve_kernels.trajectory.launch import Launch, Tables, contiguous
from sdesolve_kernels.trajectory.leaves import LoopInvariant, NoiseLeaf, PathEntry, PathInvariant, Shared, State, Time
from sdesolve_kernels.trajectory.operations import BOOL, F64, I64
from sdesolve_kernels.trajectory.plan import Plan
from sdesolve_kernels.trajectory.tracing import Unsupported
from sdesolve_kernels.trajectory.triton_dialect import Triton, plus, wrapped
from sdesolve_kernels.trajectory.triton_generated import Generated
from sdesolve_kernels.trajectory.triton_source import Shape, TritonKernel, written_out

__all__ = ["TritonAdaptive"]

_LANES = 32
_FIRST, _MOST = 256, 1 << 14  # passes of the first launch, and of any
_POINTERS = ("x", "cell", "lane", "clock", "waiting", "grid", "marks", "kept", "kept_steps", "uniforms", "reals")
_COUNTS = ("root", "level", "index", "accepted", "rejected", "held", "slot", "status")  # of a lane, int64
_CLOCKS = ("wanted", "previous", "time", "error")  # float64


@final
class _Printer:
    def __init__(self, plan: Plan, rule: Rule) -> None:
        self.plan, self.columns = clocked(plan)
        self.rule, self.n, self.m, self.dtype = rule, plan.numbers, rule.channels, plan.dtype
        graph = plan.program.graph
        self.states = written_out(graph, self.plan.states)
        self.invariants = written_out(graph, self.plan.path_invariants)
        leaves = [e.data for e in topological([*self.states, *self.invariants, *self.columns])]
        self.parameters = tuple(sorted({a.parameter for a in leaves if isinstance(a, PathEntry | Shared)}))
        self.blocks = (3 * self.m + 6) // 4

    def source(self) -> str:
        return "\n".join([
            '"""An adaptive kernel, generated: one lane per path, each with its own clock."""',
            "",
            "from sdesolve_kernels._triton.paths import *",
            "",
            f"LANES = tl.constexpr({_LANES})",
            f"DOUBLE = tl.constexpr({self.dtype == F64})",
            f"REAL = tl.constexpr(tl.{self.dtype})",
            "",
            "",
            *self._attempt(),
            "",
            "",
            *self._kernel(),
            "",
        ])  # fmt: skip

    # A step ------------------------------------------------------------------------------------------------------

    def _inputs(self) -> list[str]:
        leaves = [e.data for e in topological(self.states) if not e.args]
        names = [f"x{i}" for i in range(self.n if self.rule.nested else 2 * self.n)]
        names += [f"z{i}" for i in sorted({a.i for a in leaves if isinstance(a, NoiseLeaf)})]
        known = len(self.plan.path_invariants)
        names += [f"i{i}" for i in sorted({a.i for a in leaves if isinstance(a, PathInvariant) and a.i < known})]
        both = [e.data for e in topological([*self.states, *self.columns]) if not e.args]
        names += [f"u{i}" for i in sorted({a.i for a in both if isinstance(a, LoopInvariant)})]
        return names + [f"p{i}" for i in sorted({a.parameter for a in both if isinstance(a, Shared)})]

    def _leaf(self, e: Expression) -> str:
        match e.data:
            case Shared(parameter, i):
                return f"tl.load({plus(f'p{parameter}', i)})"
            case PathEntry(_, parameter, i):
                return f"tl.load({plus(f'p{parameter} + row * {self.plan.row_length(parameter)}', i)})"
            case PathInvariant(i):
                return self._typed(f"i{i}" if i < len(self.plan.path_invariants) else f"c{i - len(self.invariants)}", e)
            case LoopInvariant(i):
                return self._typed(f"u{i}", e)
            case State(_, i):
                return f"x{i}"
            case NoiseLeaf(_, i):
                return f"z{i}"
            case Time(name):
                return f"t_{name}"
        raise Unsupported(f"an adaptive kernel has no {e.op}")

    def _typed(self, name: str, e: Expression) -> str:
        if e.dtype in (BOOL, I64):
            return f"({name} != 0)" if e.dtype == BOOL else f"{name}.to(tl.int64)"
        return name if e.dtype == self.dtype else f"{name}.to(tl.{e.dtype})"

    def _attempt(self) -> list[str]:
        graph = self.plan.program.graph
        clock = Writer(Triton(), self._leaf, fusing=False)
        columns = clock.lines([(f"c{j}", graph.cast(e, self.dtype)) for j, e in enumerate(self.columns)])
        writer = Writer(Triton(), self._leaf)
        writer._count = 1000  # names of its own
        body = writer.lines([(f"y{i}", e) for i, e in enumerate(self.states)])
        results = [f"y{i} + tl.zeros_like(x0)" for i in range(len(self.states))]
        return [
            "@triton.jit",
            *wrapped("def attempt(", ["t_t0", "t_t1", *self._inputs()], "):"),
            *indented(
                [
                    '"""The state after a step of each lane between its two times, and what is carried beside it."""',
                    "t_dt = t_t1 - t_t0",
                    "t_scale = tl.sqrt(tl.abs(t_dt))",
                    *columns,
                    *body,
                    *wrapped("return ", results, ""),
                ],
                1,
            ),
        ]

    def _call(self, start: str, end: str, passed: dict[str, str], results: Sequence[str]) -> list[str]:
        given = [start, end, *(passed.get(name, name) for name in self._inputs())]
        return wrapped(f"{', '.join(results)} = attempt(", given, ")")

    # The kernel --------------------------------------------------------------------------------------------------

    def _kernel(self) -> list[str]:
        rule, n, cells = self.rule, self.n, 3 * self.m
        carried = n if rule.nested else 2 * n
        pointers = [*_POINTERS, *(f"p{i}" for i in self.parameters)]
        integers = ["paths", "steps", "passes", "max_steps", "fresh"]
        for part in ("w", "h", "k", "b") if rule.nested else ():
            integers += [f"seed_{part}", f"stream_{part}", f"first_path_{part}", f"first_{part}"]
        reals = [f"{name} = tl.load(reals + {j})" for j, name in enumerate(("rtol", "atol", "ki", "kp", "whole"))]
        body = [
            "path = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)",
            "row = tl.minimum(path, paths - 1)  # lanes past the last path repeat it and store nothing",
            "inside = path < paths",
            *reals,
        ]
        body += [f"x{i} = tl.load({plus(f'x + row * {carried}', i)})" for i in range(carried)]
        body += [f"{name} = tl.load(lane + {j} * paths + row)" for j, name in enumerate(_COUNTS)]
        body += [f"{name} = tl.load(clock + {j} * paths + row)" for j, name in enumerate(_CLOCKS)]
        body += [f"u{j} = tl.load({plus('uniforms', j)})" for j in range(len(self.plan.loop_invariants))]
        body += Writer(Triton(), self._leaf).lines([(f"i{j}", e) for j, e in enumerate(self.invariants)])
        if rule.nested:
            body += [f"z{i} = tl.load(cell + {i} * paths + row)" for i in range(cells)]
            body += ["if fresh != 0:", *indented(self._roots("row == row"), 1)]
        body += ["going = inside & (status < 0)", "turn = tl.full((), 0, tl.int64)"]
        once = self._nested() if rule.nested else self._free()
        body += [
            "while (turn < passes) & (tl.max(going.to(tl.int32), axis=0) > 0):",
            *indented([*once, "turn += 1"], 1),
        ]
        body += [f"tl.store({plus(f'x + path * {carried}', i)}, x{i}, mask=inside)" for i in range(carried)]
        body += [f"tl.store(lane + {j} * paths + path, {name}, mask=inside)" for j, name in enumerate(_COUNTS)]
        body += [f"tl.store(clock + {j} * paths + path, {name}, mask=inside)" for j, name in enumerate(_CLOCKS)]
        if rule.nested:
            body += [f"tl.store(cell + {i} * paths + path, z{i}, mask=inside)" for i in range(cells)]
        names = ", ".join(f'"{name}"' for name in (*pointers, *integers))
        typed = [*pointers, *(f"{name}: tl.int64" for name in integers)]
        return [
            *wrapped("@triton.jit(do_not_specialize=[", names.split(", "), "])"),
            *wrapped("def trajectory(", typed, "):"),
            *indented(body, 1),
        ]

    def _roots(self, where: str) -> list[str]:
        """Unit numbers over a step of the grid, in lanes where that holds."""
        lines: list[str] = []
        for part, name in enumerate("whk"):
            lines.append(f"at = first_{name} + root * {self.m}")
            lines += self._normals(name, "at", -(-(self.m + 3) // 4))
            for j in range(self.m):
                lines.append(
                    f"z{part * self.m + j} = tl.where({where}, {self._picked(j, self.m, 1)}, z{part * self.m + j})"
                )
        return lines

    def _normals(self, part: str, at: str, blocks: int) -> list[str]:
        lines = [f"q, skip = {at} >> 2, {at} & 3"]
        for b in range(blocks):
            names = ", ".join(f"n{4 * b + i}" for i in range(4))
            lines.append(
                f"{names} = normals(seed_{part}, first_path_{part} + row, (q + {b}).to(tl.uint32), "
                f"(stream_{part} + 256 * ((q + {b}) >> 32)).to(tl.uint32), DOUBLE)"
            )
        return lines

    def _picked(self, i: int, width: int, step: int) -> str:
        """Number ``i`` of those that begin ``skip`` behind a block's first."""
        skips = sorted({(width * k) % 4 for k in range(4)}) if step != 1 else [0, 1, 2, 3]
        text = f"n{skips[-1] + i}"
        for s in reversed(skips[:-1]):
            text = f"tl.where(skip == {s}, n{s + i}, {text})"
        return text

    def _node(self) -> list[str]:
        """The halves of every lane's cell, ``a...`` and ``b...``."""
        m, lines = (
            self.m,
            [f"at = (((first_b + root) << 21) + (tl.full((LANES,), 1, tl.int64) << level) + index) * {3 * self.m}"],
        )
        lines += self._normals("b", "at", self.blocks)
        for j in range(m):
            zs = [self._picked(part * m + j, 3 * m, 0) for part in range(3)]
            first = ", ".join(f"a{part * m + j}" for part in range(3))
            second = ", ".join(f"b{part * m + j}" for part in range(3))
            cell = ", ".join(f"z{part * m + j}" for part in range(3))
            lines.append(f"{first}, {second} = halved({cell}, {', '.join(zs)})")
        return lines

    def _part(self) -> str:
        return "part = ((1023 - level) << 52).to(tl.float64, bitcast=True)"

    def _nested(self) -> list[str]:
        rule, n, cells = self.rule, self.n, 3 * self.m
        deepest = rule.deepest - rule.doubling
        lines = [
            "left = tl.load(grid + tl.minimum(root, steps - 1))",
            "right = tl.load(grid + tl.minimum(root, steps - 1) + 1)",
            self._part(),
            "length = tl.abs(right - left) * part",
            f"need = going & (length > wanted) & (level < {deepest})",
            "while tl.max(need.to(tl.int32), axis=0) > 0:",
            *indented(self._node(), 1),
        ]
        for i in range(cells):
            lines += [
                f"    tl.store(waiting + ((level + 1) * {cells} + {i}) * paths + path, b{i}, mask=need)",
                f"    z{i} = tl.where(need, a{i}, z{i})",
            ]
        lines += [
            "    index = tl.where(need, 2 * index, index)",
            "    level = level + need.to(tl.int64)",
            "    length = tl.where(need, 0.5 * length, length)",
            f"    need = need & (length > wanted) & (level < {deepest})",
            self._part(),
            "start = left + (right - left) * (index.to(tl.float64) * part)",
            "last = (index + 1).to(tl.float64) * part",
            "end = tl.where(last == 1.0, right, left + (right - left) * last)",
            "end = tl.where(going, end, start)",
        ]
        ys = [f"y{i}" for i in range(len(self.states))]
        errors = ys[-n:]
        if rule.doubling:
            lines += self._node()
            lines.append("middle = left + (right - left) * ((index.to(tl.float64) + 0.5) * part)")
            lines.append("middle = tl.where(going, middle, start)")
            passed = [{f"z{i}": f"{c}{i}" for i in range(cells)} for c in "ab"]
            halves = {f"x{i}": f"h{i}" for i in range(n)}
            lines += self._call("start", "end", {}, [f"v{i}" for i in range(n)])
            lines += self._call("start", "middle", passed[0], [f"h{i}" for i in range(n)])
            lines += self._call("middle", "end", passed[1] | halves, ys)
            errors = [f"(y{i} - v{i})" for i in range(n)]
        else:
            lines += self._call("start", "end", {}, ys)
        lines += self._error(errors)
        taken = [f"tl.where(whole != 0.0, v{i}, y{i})" if rule.doubling else f"y{i}" for i in range(n)]
        kept = "mask=held_now"
        lines += [
            "small = tl.maximum(error, 1e-4)",
            "log = tl.log(small.to(REAL)).to(tl.float64)",
            "growth = 0.9 * tl.exp((kp * previous - ki * log).to(REAL)).to(tl.float64)",
            "growth = tl.maximum(tl.where(error == error, growth, 0.25), 0.25)",
            "good = going & (error < 1.0)",
            *(f"good = good & (tl.abs(y{i}) < float('inf'))" for i in range(n)),
            "bad = going & (good == 0)",
            "more = tl.where(held != 0, tl.minimum(growth, 1.0), tl.minimum(growth, 2.0))",
            "wanted = tl.where(good, length * more, tl.where(bad, length * tl.minimum(growth, 0.9), wanted))",
            "previous = tl.where(good, log, previous)",
            "accepted += good.to(tl.int64)",
            "rejected += bad.to(tl.int64)",
            "held = bad.to(tl.int64)",
            "at_end = root.to(tl.float64) + last",
            "mark = tl.load(marks + slot)",
            "while tl.max((good & (mark <= at_end)).to(tl.int32), axis=0) > 0:",
            "    held_now = good & (mark <= at_end)",
            "    place = slot * paths + path",
            *(
                f"    tl.store(kept + place * {n} + {i}, tl.where(mark == at_end, y{i}, x{i}), {kept})"
                for i in range(n)
            ),
            f"    tl.store(kept_steps + 2 * place, tl.where(mark == at_end, -1.0, level.to(tl.float64)), {kept})",
            "    slot += held_now.to(tl.int64)",
            "    mark = tl.load(marks + slot)",
            *(f"x{i} = tl.where(good, {value}, x{i})" for i, value in enumerate(taken)),
            # Up over ends of second halves: as many levels as the index has ones at its end.
            "ones = (((index + 1) & ~index).to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023",
            "ones = tl.where(good, tl.minimum(ones, level), 0)",
            "level = level - ones",
            "index = index >> ones",
            "done = good & (level == 0)",
            "beside = good & (level > 0)",
            "index = tl.where(beside, index + 1, tl.where(done, 0, index))",
            "root = root + done.to(tl.int64)",
        ]
        for i in range(cells):
            place = f"waiting + (level * {cells} + {i}) * paths + row"
            lines.append(f"z{i} = tl.where(beside, tl.load({place}, mask=beside, other=0.0), z{i})")
        lines += [
            "arrived = done & (root >= steps)",
            "fresh_now = done & (root < steps)",
            "if tl.max(fresh_now.to(tl.int32), axis=0) > 0:",
            *indented(self._roots("fresh_now"), 1),
            f"short = bad & (level >= {deepest})",
            "late = going & (arrived == 0) & (accepted + rejected >= max_steps)",
            "status = tl.where(arrived, 0, tl.where(short, 2, tl.where(late, 1, status)))",
            *self._coarse("wanted", "start"),
            self._part(),
            "left = tl.load(grid + tl.minimum(root, steps))",
            "right = tl.load(grid + tl.minimum(root + 1, steps))",
            "time = tl.where(going, left + (right - left) * (index.to(tl.float64) * part), time)",
            "going = going & (status < 0)",
        ]
        return lines

    def _coarse(self, length: str, time: str) -> list[str]:
        """Ends paths whose steps have come near the rounding of a time that functions are given in float32."""
        if not rounds_clock(self.columns):
            return []
        coarse = f"going & (arrived == 0) & ({length} < {COARSE!r} * tl.abs({time}))"
        return [f"status = tl.where({coarse}, 3, status)"]

    def _error(self, errors: Sequence[str]) -> list[str]:
        n, lines = self.n, ["total = tl.zeros_like(wanted)", "rt, at_ = rtol.to(REAL), atol.to(REAL)"]
        for i, e in enumerate(errors):
            size = (
                f"tl.fma(tl.zeros_like(x{i}) + rt, tl.maximum(tl.abs(x{i}), tl.abs(y{i})), tl.zeros_like(x{i}) + at_)"
            )
            lines += [f"part_of = ({e} / {size}).to(tl.float64)", "total = total + part_of * part_of"]
        return [*lines, f"error = tl.where(going, tl.sqrt(total * {1.0 / max(n, 1)!r}), error)"]

    def _free(self) -> list[str]:
        n = self.n
        eps = 1.1920928955078125e-07 if self.dtype == "float32" else 2.220446049250313e-16
        ys = [f"y{i}" for i in range(3 * n)]
        return [
            "final = tl.load(grid + steps)",
            "begin = tl.load(grid)",
            "way = tl.where(final >= begin, 1.0, -1.0).to(tl.float64)",
            "end = tl.where(tl.abs(final - time) <= wanted, final, time + way * wanted)",
            "end = tl.where(going, end, time)",
            *self._call("time", "end", {}, ys),
            *self._error(ys[-n:]),
            "log = tl.log(tl.maximum(error, 1e-30).to(REAL)).to(tl.float64)",
            "growth = 0.9 * tl.exp((-ki * log).to(REAL)).to(tl.float64)",
            "growth = tl.where(error == error, growth, 0.2)",
            "growth = tl.minimum(tl.maximum(growth, 0.2), 10.0)",
            "good = going & (error < 1.0)",
            "bad = going & (good == 0)",
            "growth = tl.where(bad | (held != 0), tl.minimum(growth, 1.0), growth)",
            "length = tl.abs(end - time) * growth",
            "mark = tl.load(marks + slot)",
            "while tl.max((good & (mark <= way * end)).to(tl.int32), axis=0) > 0:",
            "    held_now = good & (mark <= way * end)",
            "    place = slot * paths + path",
            *(f"    tl.store(kept + place * {n} + {i}, x{i}, mask=held_now)" for i in range(n)),
            "    tl.store(kept_steps + 2 * place, time, mask=held_now)",
            "    tl.store(kept_steps + 2 * place + 1, end - time, mask=held_now)",
            "    slot += held_now.to(tl.int64)",
            "    mark = tl.load(marks + slot)",
            *(f"x{i} = tl.where(good, y{i}, x{i})" for i in range(2 * n)),
            "time = tl.where(good, end, time)",
            "accepted += good.to(tl.int64)",
            "rejected += bad.to(tl.int64)",
            "held = bad.to(tl.int64)",
            f"short = bad & (length < {10 * eps!r} * tl.abs(time))",
            "arrived = going & (time == final)",
            "late = going & (arrived == 0) & (accepted + rejected >= max_steps)",
            "status = tl.where(arrived, 0, tl.where(short, 2, tl.where(late, 1, status)))",
            *self._coarse("length", "time"),
            "wanted = tl.where(going, tl.maximum(length, 1e-15 * tl.abs(time)), wanted)",
            "going = going & (status < 0)",
        ]


@final
class TritonAdaptive(AbstractAdaptive):
    """A generated Triton kernel, launched for a number of passes again and again until every path is done."""

    def __init__(self, plan: Plan, rule: Rule) -> None:
        printer = _Printer(plan, rule)
        self.plan, self.rule, self._n = plan, rule, plan.numbers
        self.source = printer.source()
        sources = (0, 1, 2, 3) if rule.nested else ()
        self._kernel = TritonKernel(self.source, Shape(_LANES, 1), self._n, printer.parameters, sources, 0)
        self._tables = Tables(printer.plan)
        self._generated = Generated()

    def adapt(self, launch: AdaptiveLaunch) -> AdaptiveSaved:
        rule, n, job = self.rule, self._n, Job(launch.progress)
        x0 = launch.x0.detach().resolve_neg().contiguous()
        batch, device, dtype, slots = len(x0), x0.device, x0.dtype, len(launch.marks)
        captured = [contiguous(c, self.plan.program.captured[i].dtype) for i, c in enumerate(launch.captured)]
        table = Launch(x0, launch.times[:2], None, (), (), False, captured)
        uniforms = self._tables(table, 0, 1)[1].to(device)
        x = x0.reshape(batch, n)
        if launch.carried is not None:
            x = torch.cat([x, launch.carried.detach().reshape(batch, n)], 1)
        x = x.clone().contiguous()
        lane = torch.zeros(len(_COUNTS), batch, dtype=torch.int64, device=device)
        lane[-1] = -1
        clock = torch.zeros(len(_CLOCKS), batch, dtype=torch.float64, device=device)
        clock[0], clock[2] = launch.lengths, float(launch.times[0])
        cells = 3 * rule.channels
        cell = torch.zeros(max(cells, 1), batch, dtype=dtype, device=device)
        waiting = torch.empty((rule.deepest + 1) * cells if rule.nested else 1, batch, dtype=dtype, device=device)
        grid = launch.times.to(device=device, dtype=torch.float64)
        marks = torch.tensor([*launch.marks, torch.inf], dtype=torch.float64, device=device)
        kept = torch.zeros(slots, batch, n, dtype=dtype, device=device)
        kept_steps = torch.zeros(slots, batch, 2, dtype=torch.float64, device=device)
        k, steps, done, passes, fresh = rule.order, len(grid) - 1, 0, _FIRST, 1
        reals = [launch.rtol, launch.atol, (0.4 if rule.nested else 1.0) / k, 0.1 / k, float(launch.whole)]
        numbers = torch.tensor(reals, dtype=torch.float64, device=device)
        pointers = [x, cell, lane, clock, waiting, grid, marks, kept, kept_steps, uniforms, numbers]
        while True:
            integers = [batch, steps, passes, launch.max_steps, fresh]
            self._generated.launch(self._kernel, -(-batch // _LANES), pointers, integers, captured, launch.places)
            fresh, passes = 0, min(2 * passes, _MOST)
            tries = int(lane[3:5].sum())
            job.advance(tries - done)
            done = tries
            if not bool((lane[-1] < 0).any()) or triton.is_recording():
                break
        state = x[:, :n].reshape(x0.shape).clone()
        counts = torch.stack([lane[3], lane[4], lane[7]], 1)
        shape = (slots, batch, *x0.shape[1:])
        return AdaptiveSaved(state, clock[2].clone(), counts, clock[3].clone(), kept.reshape(shape), kept_steps)
