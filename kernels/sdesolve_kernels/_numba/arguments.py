"""From tensors to the arguments of kernels: addresses, coefficients, scratch memory, threads.

What arrives here was validated. Coefficients are floats or tensors of shape ``()`` or ``(batch,)``, integers are
Python's, states have one shape and dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import NoiseOffset
from ..reference_steps import compute_dtype
from ..threads import scratch, split
from .tile import SCRATCH, unit_count

__all__ = [
    "ALONE", "NAMES", "Operands", "entries", "keep_entry", "noise_numbers", "number_or_rows", "rows_of", "run", "units",
]  # fmt: skip

units = functools.lru_cache(1024)(unit_count)

_GRAIN = 1 << 17  # elements a thread takes at least: 60 us of work, a little more than the handing over
ALONE = 2 * _GRAIN  # fewer elements than these are one call of a kernel
NAMES = {
    torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip


def noise_numbers(noise: NoiseOffset, m: int) -> tuple[Any, Any, Any, Any]:
    """Seed, stream, first path and index of the first number, for rows of `m` elements."""
    seed, stream, first_path, step = noise
    return seed, stream, first_path, step * m


# Kernels take integers and floats and have one signature each. Called by it, Numba need not look at the types of thirty
# arguments, 2 us of 3.5.
entries: dict[Any, Callable[..., None]] = {}


def keep_entry(kernel: Any) -> None:
    """Calls this kernel by its only signature from now on."""
    (compiled,) = kernel.overloads.values()
    entries[kernel] = compiled.entry_point


def run(kernel: Callable[..., None], arguments: tuple[Any, ...], rows: int, m: int, *memory: Any) -> None:
    """Run a kernel over all units of ``(rows, m)`` states, in threads where there is enough work for them.

    `memory` owns what the kernel's addresses point to, and lives as long as a thread works on it.
    """
    count = units(rows, m)
    if rows * m < ALONE:
        entry = entries.get(kernel, kernel)
        entry(*arguments, rows, m, 0, count, scratch(SCRATCH)[1])
        if entry is kernel:
            keep_entry(kernel)
        return

    def work(start: int, stop: int, memory: tuple[Any, ...] = memory) -> None:
        kernel(*arguments, rows, m, start, stop, scratch(SCRATCH)[1])

    split(work, count, -(-_GRAIN * count // (rows * m)))


def number_or_rows(c: Any) -> Any:
    """A coefficient as a number or a tensor of shape ``(batch,)``."""
    return c if type(c) is float or not isinstance(c, Tensor) or c.dim() else c.item()


def rows_of(c: Any, x: Tensor) -> Tensor:
    """A coefficient in the compute dtype, to be multiplied by others of ``()`` or ``(batch,)``."""
    return torch.as_tensor(c, dtype=compute_dtype(x.dtype), device=x.device)


class Operands:
    """Addresses of what a kernel reads; keeps temporary copies alive until it has run.

    A copy is made of what is not contiguous, of a view that torch negates when it is read, and of what shares memory
    with the output other than element by element.
    """

    def __init__(self, out: Tensor) -> None:
        self.plain = self.out = out
        self.kept: list[Tensor] = []
        self.size = out.nbytes
        if not out.is_contiguous() or out.is_neg():
            self.plain = torch.empty_like(out, memory_format=torch.contiguous_format)
        self.begin = self.plain.data_ptr()
        self.end = self.begin + self.size

    def state(self, t: Tensor) -> int:
        """Address of a tensor like the output."""
        if t.is_contiguous() and not t.is_neg():
            address: int = t.data_ptr()
            if address == self.begin or address >= self.end or address + self.size <= self.begin:
                return address
        return self._copy(t)

    def apart(self, t: Tensor) -> int:
        """Address of a tensor that is read in another order than the output is written in."""
        address: int = t.data_ptr()
        if t.is_contiguous() and not t.is_neg() and (address >= self.end or address + t.nbytes <= self.begin):
            return address
        return self._copy(t)

    def _copy(self, t: Tensor) -> int:
        self.kept.append(t.resolve_neg().clone(memory_format=torch.contiguous_format))
        return self.kept[-1].data_ptr()

    def coefficient(self, c: Any) -> tuple[int, float]:
        """Address and value of a number, with an address of 0, or of a tensor ``(batch,)``."""
        c = c if type(c) is float else number_or_rows(c)
        if not isinstance(c, Tensor):
            return 0, c
        if _fits(c, self.out, self.begin, self.size):
            return c.data_ptr(), 0.0
        return self._copy(c.to(compute_dtype(self.out.dtype))), 0.0

    def finish(self) -> Tensor:
        if self.plain is not self.out:
            self.out.copy_(self.plain)
        return self.out


def _fits(c: Tensor, out: Tensor, begin: int, span: int) -> bool:
    """Whether a kernel can read the coefficients ``(batch,)`` where they are, while it writes the output."""
    address = c.data_ptr()
    apart = address >= begin + span or address + c.nbytes <= begin
    return apart and c.dtype is compute_dtype(out.dtype) and c.is_contiguous() and not c.is_neg()
