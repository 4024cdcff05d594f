"""The step ops on CPU tensors: names and arguments of `reference_steps`, and the tensor to write.

What arrives here was validated. Coefficients are floats or tensors of shape ``()`` or ``(batch,)``, integers are
Python's, states have one shape and dtype.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reference_steps import chi_mean, compute_dtype
from .memory import COMPUTE
from .steps import combine
from .sums import finish_loss, finish_norms, norms, residual
from .threads import split
from .tile import SCRATCH, SUMS, TILE, unit_count

__all__ = ["dsm_loss", "euler_maruyama_step", "langevin_step", "linear_step", "noise_product", "perturb", "scaled"]

_GRAIN = 1 << 17  # elements a thread takes at least: 60 us of work, a little more than the handing over
_DOUBLES = {n: ctypes.c_double * n for n in range(2, 7)}
# Arguments of a `combine` kernel that does nothing: output, five states, their coefficients' addresses and values,
# gain, the noise's coefficient, whether there is noise, its place.
_NOTHING: list[Any] = [0] * 11 + [0.0] * 5 + [0, 0, 0.0, 0] + [0] * 4
_NAMES = {
    torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16",
}  # fmt: skip


def _place(where: dict[str, Any], m: int) -> tuple[int, int, int, int]:
    """Seed, stream, first path and offset, as int64 in two's complement."""
    return where["seed"], where["stream"], where["first_path"], where["step"] * m


class _Scratch(threading.local):
    """Memory of a thread's own, aligned to the lines of the cache."""

    def __init__(self) -> None:
        self.memory = np.empty(SCRATCH + 64, np.uint8)
        self.address = -(-self.memory.ctypes.data // 64) * 64


_scratch = _Scratch()


def _run(kernel: Callable[..., None], arguments: Sequence[Any], rows: int, m: int) -> None:
    units = unit_count(rows, m)
    if rows * m < 2 * _GRAIN:
        kernel(*arguments, rows, m, 0, units, _scratch.address)
        return
    split(
        lambda start, stop: kernel(*arguments, rows, m, start, stop, _scratch.address),
        units,
        -(-_GRAIN * units // (rows * m)),
    )


def _plain(c: Any) -> Any:
    """A coefficient as a number or a tensor of shape ``(batch,)``."""
    return c if type(c) is float or not isinstance(c, Tensor) or c.dim() else c.item()


def _scalar(c: Any) -> bool:
    return not isinstance(c, Tensor) or c.dim() == 0


def _rows(c: Any, x: Tensor) -> Tensor:
    """A coefficient in the compute dtype, to be multiplied by others of ``()`` or ``(batch,)``."""
    return torch.as_tensor(c, dtype=compute_dtype(x.dtype))


class _Operands:
    """Addresses of what a kernel reads; keeps temporary copies alive until it has run.

    A copy is made of what is not contiguous, and of what shares memory with the output other than element by element.
    """

    def __init__(self, out: Tensor) -> None:
        self.plain = self.out = out
        self.kept: list[Tensor] = []
        self.size = out.nbytes
        if not out.is_contiguous():
            self.plain = torch.empty_like(out, memory_format=torch.contiguous_format)
        self.begin = self.plain.data_ptr()
        self.end = self.begin + self.size

    def state(self, t: Tensor) -> int:
        """Address of a tensor like the output."""
        if t.is_contiguous():
            address: int = t.data_ptr()
            if address == self.begin or address >= self.end or address + self.size <= self.begin:
                return address
        return self._copy(t)

    def _copy(self, t: Tensor) -> int:
        self.kept.append(t.clone(memory_format=torch.contiguous_format))
        return self.kept[-1].data_ptr()

    def coefficient(self, c: Any) -> tuple[int, float]:
        """Address and value of a number, with an address of 0, or of a tensor ``(batch,)``."""
        if not isinstance(c, Tensor):
            return 0, c
        wide = c.to(compute_dtype(self.out.dtype))
        self.kept.append(wide)
        address = wide.data_ptr()
        if wide.is_contiguous() and (address >= self.end or address + wide.nbytes <= self.begin):
            return address, 0.0
        return self._copy(wide), 0.0

    def finish(self) -> Tensor:
        if self.plain is not self.out:
            self.out.copy_(self.plain)
        return self.out


def _simple(
    out: Tensor, terms: Sequence[tuple[Any, Tensor]], noise: Any, gain: Tensor | None, where: dict[str, Any] | None
) -> list[Any] | None:
    """Arguments of `combine` where everything lies as it should; else None.

    What `_Operands` does, in a third of its time.
    """
    if not out.is_contiguous():
        return None
    arguments = _NOTHING.copy()
    arguments[0] = begin = out.data_ptr()
    span, wide, rows = out.nbytes, compute_dtype(out.dtype), out.shape[0]
    i = 1
    for c, s in terms:
        arguments[i] = address = s.data_ptr()
        if not s.is_contiguous() or (address != begin and -span < address - begin < span):
            return None
        if type(c) is float:
            arguments[i + 10] = c
        else:
            arguments[i + 5] = address = c.data_ptr()
            if c.dtype is not wide or not c.is_contiguous() or -8 * rows < address - begin < span:
                return None
        i += 1
    if noise is not None:
        arguments[19] = 1
        if type(noise) is float:
            arguments[18] = noise
        else:
            arguments[17] = address = noise.data_ptr()
            if noise.dtype is not wide or not noise.is_contiguous() or -8 * rows < address - begin < span:
                return None
    if gain is not None:
        arguments[16] = address = gain.data_ptr()
        if not gain.is_contiguous() or (address != begin and -span < address - begin < span):
            return None
    if where is not None:
        arguments[20:24] = where["seed"], where["stream"], where["first_path"], where["step"] * (out.numel() // rows)
    return arguments


def _combine(
    out: Tensor,
    terms: Sequence[tuple[Any, Tensor]],
    noise: Any = None,
    gain: Tensor | None = None,
    where: dict[str, Any] | None = None,
) -> Tensor:
    """``sum c_k s_k + noise gain z`` for pairs ``(c_k, s_k)``; without `noise`, no noise."""
    rows = out.shape[0]
    m = out.numel() // rows
    arguments = _simple(out, terms, noise, gain, where)
    if arguments is not None:
        _run(combine(_NAMES[out.dtype]), arguments, rows, m)
        return out
    operands, arguments = _Operands(out), _NOTHING.copy()
    arguments[0] = operands.begin
    for i, (c, s) in enumerate(terms, 1):
        arguments[i] = operands.state(s)
        arguments[i + 5], arguments[i + 10] = operands.coefficient(c)
    if noise is not None:
        arguments[17:20] = *operands.coefficient(noise), 1
    if gain is not None:
        arguments[16] = operands.state(gain)
    if where is not None:
        arguments[20:24] = _place(where, m)
    _run(combine(_NAMES[out.dtype]), arguments, rows, m)
    return operands.finish()


def euler_maruyama_step(x: Tensor, f: Tensor, g: Any, dt: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.euler_maruyama_step`."""
    dt = _plain(dt)
    root = _rows(dt, x).abs().sqrt() if isinstance(dt, Tensor) else math.sqrt(abs(dt))
    terms = ((1.0, x), (dt, f))
    if isinstance(g, Tensor) and g.shape == x.shape and x.dim() > 1:
        return _combine(out, terms, root, g, where)
    g = _plain(g)
    if isinstance(g, Tensor):
        g = _rows(g, x)
    return _combine(out, terms, g * root, None, where)


def linear_step(
    x: Tensor,
    history: Sequence[Tensor],
    table: Tensor,
    row: int,
    *,
    stochastic: bool = True,
    out: Tensor,
    **where: Any,
) -> Tensor:
    """See `reference_steps.linear_step`."""
    if table.dim() == 3:
        coefficients: Any = table[row].to(compute_dtype(x.dtype)).contiguous().unbind(0)
    elif table.dtype == torch.float64 and table.is_contiguous():  # a third of the time of tolist
        n = len(history) + 2
        coefficients = _DOUBLES[n].from_address(table.data_ptr() + 8 * n * row)
    else:
        coefficients = table[row].tolist()
    a, *b, c = coefficients
    terms = ((a, x), *zip(b, history, strict=True)) if history else ((a, x),)
    return _combine(out, terms, c if stochastic else None, None, where)


def perturb(x0: Tensor, alpha: Any, sigma: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.perturb`."""
    return _combine(out, ((_plain(alpha), x0),), _plain(sigma), None, where)


def noise_product(v: Tensor, c: Any, *, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.noise_product`."""
    return _combine(out, (), _plain(c), v, where)


def scaled(v: Tensor, c: Any, *, out: Tensor) -> Tensor:
    """``c v``, rounded once."""
    return _combine(out, ((_plain(c), v),))


def langevin_step(x: Tensor, score: Tensor, *, mode: str, size: Any, alpha: Any, out: Tensor, **where: Any) -> Tensor:
    """See `reference_steps.langevin_step`."""
    if mode == "fixed":
        if _scalar(size) and _scalar(alpha):
            delta: Any = float(alpha) * float(size)
        else:
            delta = _rows(alpha, x) * _rows(size, x)
    else:
        delta = _size(score, mode, float(size), alpha, where)
    noise = (2.0 * delta).sqrt() if isinstance(delta, Tensor) else math.sqrt(2.0 * delta) if delta >= 0 else math.nan
    return _combine(out, ((1.0, x), (delta, score)), noise, None, where)


def _size(score: Tensor, mode: str, snr: float, alpha: Any, where: dict[str, Any]) -> Any:
    """Step size from norms in float64: a number, or ``(batch,)`` in the compute dtype."""
    score = score.contiguous()
    rows = score.shape[0]
    m = score.numel() // rows
    each = int(mode == "sample")
    partial = torch.empty(2, rows if each and m <= TILE else unit_count(rows, m), dtype=torch.float64)
    score_at, noise_at = partial.data_ptr(), 0 if mode == "dimension" else partial[1].data_ptr()
    _run(norms(_NAMES[score.dtype]), (score.data_ptr(), score_at, noise_at, each, *_place(where, m)), rows, m)
    s: Any = finish_norms(score_at, each, rows, m)
    n: Any = chi_mean(m) if noise_at == 0 else finish_norms(noise_at, each, rows, m)
    if each:
        s, n = partial[:, :rows].unbind(0)
    elif s == 0.0:  # what IEEE division gives, which Python's refuses
        return _scaled(math.inf if n > 0.0 else math.nan, snr, alpha, score)
    return _scaled(n / s, snr, alpha, score)


def _scaled(ratio: Any, snr: float, alpha: Any, x: Tensor) -> Any:
    alpha = float(alpha) if _scalar(alpha) else alpha.to(torch.float64)
    delta = 2.0 * alpha * (snr * ratio) ** 2
    return delta.to(compute_dtype(x.dtype)) if isinstance(delta, Tensor) else delta


def dsm_loss(
    output: Tensor,
    x0: Tensor | None,
    p: Any,
    q: Any,
    weight: Any,
    *,
    mean: bool,
    out: Tensor,
    residual: Tensor | None,
    **where: Any,
) -> Tensor:
    """See `reference_steps.dsm_loss`; the mean over the batch if `mean`, and the residual written to `residual`."""
    rows, size, name = output.shape[0], output.numel(), _NAMES[output.dtype]
    m = size // rows
    operands = _Operands(output if residual is None else residual)
    sums = rows * -(-m // TILE)
    # A thousand sums fit into the scratch memory, and an allocation costs 1 us.
    partial = torch.empty(sums, dtype=torch.float64) if sums > SUMS else None
    partial_at = _scratch.address + SCRATCH - 8 * SUMS if partial is None else partial.data_ptr()
    weights = operands.coefficient(_plain(weight))
    # A call that takes all units finishes; several calls leave that to one more.
    alone = size < 2 * _GRAIN
    arguments = (
        operands.state(output), 0 if x0 is None else operands.state(x0),
        0 if residual is None else operands.begin, partial_at,
        *operands.coefficient(_plain(p)), *operands.coefficient(_plain(q)),
        *weights, out.data_ptr() if alone else 0, int(mean), *_place(where, m),
    )  # fmt: skip
    _run(_residual(name), arguments, rows, m)
    if not alone:
        finish_loss(COMPUTE[name])(partial_at, *weights, out.data_ptr(), int(mean), rows, m, _scratch.address)
    return out


_residual = residual
