"""Every op on a device against the plain torch reference in float64, before anything is timed.

The budget of a value is twice the error of the reference computed in the data's own dtype, plus the tolerance of the
normals times their largest factor. Whatever is the same result computed in another way has budget 0: other tiles, other
batches, in place, from strided or misaligned data, by indices in device memory, by a replayed graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference
from sdesolve_kernels import reference_steps as ref
from torch import Tensor

from benchmarks.gpu_device import Machine
from benchmarks.gpu_ops import CASES, STREAM, Case, States, states

__all__ = ["DTYPES", "Check", "check_case", "check_kernel", "check_large", "check_noise", "name_of", "value_check"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Largest |z - z64| that the approximations of the kernels allow; `_triton/selfcheck.py` derives it.
_NORMAL = {torch.float32: 1e-5, torch.float64: 2e-14}
_MARGIN = 64  # elements: keeps 128-byte alignment in every dtype
# Rows of one element, of odd lengths, of the lengths that are timed; a state without dimensions.
_SHAPES = ((5, 1), (7,), (4, 3), (3, 33), (3, 3, 32, 32), (5, 4, 32, 32), (2, 4104))
_THOROUGH = ((3, 33), (5, 4, 32, 32))
# The offset of the first normal lies past 2^32 for every shape, paths pass 2^32, and the seed needs 64 bits.
_FAR: dict[str, Any] = {"seed": 2**63 + 987654321, "stream": STREAM, "first_path": 2**32 - 2, "step": 2**33 + 7}
_NEAR: dict[str, Any] = {"seed": 5, "stream": STREAM, "first_path": 0, "step": 0}


def name_of(dtype: torch.dtype) -> str:
    """Such as float32."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Check:
    """One comparison; it holds if ``error <= budget``, so never with a NaN."""

    kernel: str
    dtype: str
    name: str
    shape: tuple[int, ...]
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return self.error <= self.budget

    def record(self) -> dict[str, Any]:
        """For a JSON line."""
        return {**self.__dict__, "shape": list(self.shape), "ok": self.ok}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _differ(a: Tensor, b: Tensor) -> float:
    """Number of entries whose bits differ; NaN counts as different from anything."""
    return float((a != b).sum()) if a.shape == b.shape else math.inf


def _budget(eager: Tensor, exact: Tensor, noise: float) -> float:
    compute = ref.compute_dtype(eager.dtype)
    slack = 4 * torch.finfo(compute).eps * float(exact.abs().max())
    return 2 * _distance(eager, exact) + noise * _NORMAL[compute] + slack


def value_check(case: Case, s: States, where: dict[str, Any], made: Tensor, name: str = "value") -> Check:
    """A result against float64."""
    wide = s.to(torch.float64)
    exact, eager = case.exact(wide, **where), case.exact(s, **where)
    budget = _budget(eager, exact, case.noise(wide, where))
    return Check(case.kernel, name_of(s.x.dtype), f"{case.name}: {name}", tuple(s.x.shape), _distance(made, exact),
                 budget)  # fmt: skip


def _poisoned(like: Tensor) -> tuple[Tensor, Tensor]:
    """A NaN tensor inside a margin of NaN."""
    buffer = torch.full((like.numel() + 2 * _MARGIN,), math.nan, dtype=like.dtype, device=like.device)
    return buffer[_MARGIN : _MARGIN + like.numel()].view(like.shape), buffer


@contextlib.contextmanager
def _cut(machine: Machine, block: int, programs: int) -> Iterator[None]:
    """Other tiles on a GPU; elsewhere, another number of threads stands in."""
    if machine.device.type == "cuda":
        from sdesolve_kernels._triton.geometry import tuned

        with tuned(block=block, programs=programs):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1 + programs % 2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _indices(where: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def index(value: int) -> Tensor:
        return torch.tensor(value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device)

    return {name: v if name == "stream" else index(v) for name, v in where.items()}


def _other_ways(case: Case, s: States, machine: Machine) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Ways to compute what must be the same bits."""

    def ours(states: States = s, **more: Any) -> Tensor:
        return case.ours(states, **(_FAR | more))

    def in_tiles(block: int, programs: int) -> Tensor:
        with _cut(machine, block, programs):
            return ours()

    def by_row() -> Tensor:
        pieces = range(0, s.x.shape[0], 2)
        first = _FAR["first_path"]
        return torch.cat([ours(s.rows(i, min(i + 2, s.x.shape[0])), first_path=first + i) for i in pieces])

    def in_place() -> Tensor:
        x = s.x.clone()
        return ours(replace(s, x=x), out=x)

    def shifted() -> Tensor:
        x = torch.empty(s.x.numel() + 1, dtype=s.x.dtype, device=s.x.device)[1:].view(s.x.shape)
        return ours(replace(s, x=x.copy_(s.x)))

    def strided_output() -> Tensor:
        out = torch.full((*s.x.shape, 2), math.nan, dtype=s.x.dtype, device=s.x.device)[..., 1]
        return ours(out=out)

    yield "again", ours
    if case.rowwise and not case.name.startswith("langevin_step/sample"):  # sums depend on the tile, by design
        for block, programs in ((16, 1), (64, 4736)):
            yield f"blocks of {block}", lambda b=block, p=programs: in_tiles(b, p)  # type: ignore[misc]
    if case.rowwise:
        yield "by rows", by_row
    yield "strided", lambda: ours(replace(s, x=torch.stack([s.x, s.x], dim=-1)[..., 0]))
    yield "misaligned", shifted
    if case.places:
        yield "device indices", lambda: ours(**_indices(_FAR, s.x.device))
    if case.has_out:
        yield "in place", in_place
        yield "strided output", strided_output


def _replays(case: Case, s: States, machine: Machine) -> Iterator[Check]:
    """A captured call follows the seed and step in device memory."""
    where = _indices(_FAR, s.x.device)
    replay = machine.graph(lambda: case.ours(s, **where))
    dtype, shape = name_of(s.x.dtype), tuple(s.x.shape)
    for seed, step in ((1, 0), (2**40 + 3, 9), (1, 0)):
        where["seed"].fill_(seed)
        where["step"].fill_(step)
        made = replay()
        assert isinstance(made, Tensor)
        expected = case.ours(s, **(_FAR | {"seed": seed, "step": step}))
        yield Check(case.kernel, dtype, f"{case.name}: replay", shape, _differ(made, expected), 0.0)


def _gradients(case: Case, s: States) -> Iterator[Check]:
    weights = torch.linspace(-1.0, 1.0, s.x.numel(), device=s.x.device).view(s.x.shape)

    def gradients(op: Callable[..., Tensor], of: States) -> tuple[Tensor, ...]:
        leaves = {name: getattr(of, name).detach().requires_grad_() for name in case.gradients}
        made = op(replace(of, **leaves), **_FAR)
        return torch.autograd.grad(made, list(leaves.values()), weights.to(made.dtype))

    made, eager = gradients(case.ours, s), gradients(case.exact, s)
    exact = gradients(case.exact, s.to(torch.float64))
    for name, got, plain, right in zip(case.gradients, made, eager, exact, strict=True):
        scale = float(right.abs().max())
        # The weights round to the dtype, and so does the gradient, once each.
        budget = _budget(plain, right, scale) + scale * torch.finfo(s.x.dtype).eps
        yield Check(case.kernel, name_of(s.x.dtype), f"{case.name}: gradient in {name}", tuple(s.x.shape),
                    _distance(got, right), budget)  # fmt: skip


def check_case(
    case: Case, dtype: torch.dtype, shape: tuple[int, ...], machine: Machine, thorough: bool
) -> Iterator[Check]:
    """One case on one dtype and shape."""
    s = states(shape, dtype, machine.device, seed=len(shape) + shape[0])
    for name, where in (("near", _NEAR), ("far", _FAR)):
        if not case.has_out:
            yield value_check(case, s, where, case.ours(s, **where), name)
            continue
        out, buffer = _poisoned(s.x)
        yield value_check(case, s, where, case.ours(s, out=out, **where), name)
        beside = torch.cat([buffer[:_MARGIN], buffer[-_MARGIN:]])
        yield Check(case.kernel, name_of(dtype), f"{case.name}: writes beside the output", shape,
                    float((~beside.isnan()).sum()), 0.0)  # fmt: skip
    if case.gradients:
        yield from _gradients(case, s)
    if not thorough:
        return
    made = case.ours(s, **_FAR)
    for name, call in _other_ways(case, s, machine):
        yield Check(case.kernel, name_of(dtype), f"{case.name}: {name}", shape, _differ(call(), made), 0.0)
    if case.places:
        yield from _replays(case, s, machine)


def check_noise(dtype: torch.dtype, machine: Machine) -> Iterator[Check]:
    """Words and uniforms to the bit; normals are cases like the steps."""
    for count in (1, 3, 4, 33, 1040):
        for offset in (0, 6, 2**31 - 3, 2**32 - 5, 2**35 + 2):
            where: dict[str, Any] = {"seed": _FAR["seed"], "stream": STREAM, "first_path": 2**32 - 2, "offset": offset}
            on = {**where, "device": machine.device}
            if dtype == torch.float32:
                words, right = k.words(5, count, **on), reference.numbered_words(5, count, **on)
                yield Check("normal", "float32", "words", (5, count), _differ(words, right), 0.0)
            uniform, right = k.uniform(5, count, dtype=dtype, **on), reference.uniform(5, count, dtype=dtype, **on)
            yield Check("normal", name_of(dtype), "uniform", (5, count), _differ(uniform, right), 0.0)


def check_kernel(kernel: str, dtype: torch.dtype, machine: Machine, quick: bool) -> Iterator[Check]:
    """All cases of one kernel in one dtype."""
    if kernel == "normal":
        yield from check_noise(dtype, machine)
    shapes = ((3, 33), (2, 4104)) if quick else _SHAPES
    main = dtype in (torch.float32, torch.bfloat16)
    for case in CASES.values():
        if case.kernel != kernel or (case.launcher and dtype == torch.float64 and quick):
            continue
        for shape in shapes if main or quick else _THOROUGH:
            yield from check_case(case, dtype, shape, machine, thorough=shape in _THOROUGH)


def check_large(kernel: str, dtype: torch.dtype, machine: Machine, quick: bool) -> Iterator[Check]:
    """More than 2^31 elements, in many rows and in one: first and last ones against the reference.

    Where there is no GPU, 2^31 shrinks to 2^11. Skips what does not fit into memory.
    """
    many = 2**11 if quick or machine.device.type == "cpu" else 2**31
    # Rows of one element; rows that end in part of a tile; one row, to which only `normal` and steps of one pass go.
    for shape in ((many + 5, 1), (many // 4096 + 1, 4104), (1, many + 8)):
        bytes_needed = 3 * math.prod(shape) * (4 if kernel == "normal" else dtype.itemsize)
        if machine.free_bytes() < bytes_needed:
            continue
        rows, last = min(3, shape[0]), math.prod(shape[1:]) - 8
        where: dict[str, Any] = {"seed": 3, "stream": STREAM, "first_path": 5}
        x = torch.ones(shape, dtype=dtype, device=machine.device)
        if kernel == "normal":
            made, scale, shift = k.normal(*shape, out=x, **where), 1.0, 0.0
        elif kernel == "perturb":
            made, scale, shift = k.perturb(x, 0.5, 2.0, out=x, **where), 2.0, 0.5
        else:
            made, scale, shift = k.euler_maruyama_step(x, x, 2.0, 0.25, out=x, **where), 1.0, 1.25
        for label, first in (("first", 0), ("last", shape[0] - rows)):
            place = {**where, "first_path": 5 + first, "device": machine.device}
            columns = (0, max(last, 0)) if shape[0] == 1 else (0,)
            for column in columns:
                count = 8 if shape[0] == 1 else shape[1]
                right = shift + scale * reference.normal(rows, count, offset=column, **place)
                got = made[first : first + rows, column : column + count]
                budget = scale * 1e-5 + torch.finfo(dtype).eps * (shift + 7 * scale)
                yield Check(kernel, name_of(dtype), f"past 2^{many.bit_length() - 1}: {label} rows, column {column}",
                            shape, _distance(got, right), budget)  # fmt: skip
        unwritten = float(made.isnan().sum())
        yield Check(kernel, name_of(dtype), f"past 2^{many.bit_length() - 1}: NaN", shape, unwritten, 0.0)
        del x, made
        machine.release()
