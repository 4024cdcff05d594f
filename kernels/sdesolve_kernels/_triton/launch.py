"""Launchers of the fills and of the one-pass steps: `sdesolve_kernels.reference_steps` on a GPU, plus ``out=``.

Inputs may have any strides (what is not dense in row-major order is copied first), any alignment (128-bit accesses
where the data allows) and any floating dtype; the result has that of ``x``. ``out`` may be ``x``. Seed, first path and
step may be device tensors, see `arguments`. Shapes are checked where a mistake would read out of bounds; the ops give
the friendlier errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import coefficient, constants, launch_kept, places, result, state
from .fill import NORMAL, UNIFORM, WORDS, fill_kernel
from .geometry import Geometry, Grid, geometry, grid
from .steps import ABSENT, ADDED, FACTOR, euler_maruyama_kernel, linear_kernel, perturb_kernel
from .tiles import PER_SAMPLE, SHARED

__all__ = [
    "euler_maruyama_step",
    "fill",
    "linear_step",
    "noise_product",
    "numbered_words",
    "perturb",
    "scaled",
]

Index = int | Tensor
_OPS = {"normal": NORMAL.value, "uniform": UNIFORM.value, "words": WORDS.value}
_FULL = 3  # G of euler_maruyama_kernel: a diffusion of the state's shape


def tile_of(x: Tensor) -> tuple[int, Geometry]:
    """Elements of a row of ``x``, and its tiling: steps start at multiples of a row, so rows of 4 k are aligned."""
    m = math.prod(x.shape[1:])
    return m, geometry(m, x.element_size(), True)


def fill(
    op: str, out: Tensor, *, seed: Index, stream: int, first_path: Index = 0, offset: Index = 0, stride: int = 1
) -> Tensor:
    """Fill ``out`` of shape ``(paths, ...)`` with "normal", "uniform" or "words" from entry ``offset stride`` on."""
    if out.numel() == 0:
        return out
    batch = out.shape[0]
    m = out.numel() // batch
    # Where the first entry stands in its Philox block is known only for an offset that is not in device memory.
    aligned = stride % 4 == 0 or (isinstance(offset, int) and offset * stride % 4 == 0)
    dense = (
        out if out.is_contiguous() and not out.is_neg() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    )
    integers, loaded = places(out, seed, first_path, offset)

    def make() -> tuple[Grid, dict[str, Any]]:
        # Nothing is loaded, so registers are left for two lanes a thread in 8-byte types too.
        two = 256 if aligned and out.element_size() == 8 else None
        tile = geometry(m, out.element_size(), aligned, two)
        return grid(batch, tile), constants(out, tile, loaded, OP=_OPS[op])

    values = [dense, batch, m, stride, integers[0], int(stream), *integers[1:]]
    launch_kept(fill_kernel, out.device, (op, batch, m, out.dtype, aligned, loaded), values, make)
    if dense is not out:
        out.copy_(dense)
    return out


def numbered_words(paths: int, count: int, *, device: torch.device | str = "cuda", **where: Any) -> Tensor:
    """The words themselves as int64, shape ``(paths, count)``."""
    return fill("words", torch.empty((paths, count), dtype=torch.int64, device=device), **where)


def euler_maruyama_step(
    x: Tensor, f: Tensor, g: Tensor | float, dt: Tensor | float,
    *, seed: Index, stream: int, first_path: Index, step: Index, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x + f dt + g sqrt|dt| z``; ``dt`` is a number, ``()`` or ``(batch,)``, and ``g`` any of these or like ``x``."""
    dense, out = result(x, out, f, g, dt)
    if x.numel() == 0:
        return out
    shape, dtype = x.shape, x.dtype
    if isinstance(g, Tensor) and g.shape == shape and len(shape) > 0 and g.ndim > 0:
        full, (g_c, g_kind, g_tag) = state("g", g, x), (0, _FULL, None)
    else:
        full, (g_c, g_kind, g_tag) = None, coefficient("g", g, x)
    dt_c, dt_kind, dt_tag = coefficient("dt", dt, x)
    integers, loaded = places(x, seed, first_path, step)

    def make() -> tuple[Grid, dict[str, Any]]:
        _, tile = tile_of(x)
        return grid(shape[0], tile), constants(x, tile, loaded, G=g_kind, DT=dt_kind)

    drift = state("f", f, x)
    full = drift if full is None else full
    values = [
        x.resolve_neg().contiguous(), drift, full, g_c, dt_c, dense,
        shape[0], math.prod(shape[1:]), integers[0], int(stream), *integers[1:],
    ]  # fmt: skip
    key = shape, dtype, drift.dtype, full.dtype, g_kind, g_tag, dt_kind, dt_tag, loaded
    launch_kept(euler_maruyama_kernel, x.device, key, values, make)
    return out if dense is out else out.copy_(dense)


def linear_step(
    x: Tensor, history: Sequence[Tensor], table: Tensor, row: Index,
    *, stochastic: bool = True, seed: Index = 0, stream: int = 0, first_path: Index = 0, step: Index = 0,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``a x + sum_i b_i history_i + c z`` with ``(a, b_1 ... b_K, c) = table[row]``, at most 4 terms.

    ``table`` is ``(rows, K + 2)``, or ``(rows, K + 2, batch)``, on the device. ``row`` may be in device memory too, and
    is not checked there.
    """
    terms = len(history)
    if terms > 4:
        raise ValueError(f"linear_step takes at most 4 history terms, got {terms}")
    if table.shape[1:] not in ((terms + 2,), (terms + 2, x.shape[0])):
        raise ValueError(
            f"table must be (rows, {terms + 2}) or (rows, {terms + 2}, {x.shape[0]}) for {terms} history terms and "
            f"{x.shape[0]} samples, got {tuple(table.shape)}"
        )
    if table.device != x.device:
        raise ValueError(f"table must be on {x.device} like the state, got {table.device}")
    if isinstance(row, int):
        if not -table.shape[0] <= row < table.shape[0]:
            raise ValueError(f"row must index the table's {table.shape[0]} rows, got {row}")
        row %= table.shape[0]
    dense, out = result(x, out, *history, table)
    if x.numel() == 0:
        return out
    x_dense = x.resolve_neg().contiguous()
    terms_dense = [state(f"history[{i}]", s, x) for i, s in enumerate(history)]
    integers, loaded = places(x, seed, first_path, step, row)

    def make() -> tuple[Grid, dict[str, Any]]:
        _, tile = tile_of(x)
        kind = PER_SAMPLE.value if table.ndim == 3 else SHARED.value
        return grid(x.shape[0], tile), constants(x, tile, loaded, TERMS=terms, STOCHASTIC=stochastic, KIND=kind)

    values = [
        x_dense, *terms_dense, *(4 - terms) * [x_dense], table.resolve_neg().contiguous(), dense,
        x.shape[0], math.prod(x.shape[1:]), integers[3], integers[0], int(stream), *integers[1:3],
    ]  # fmt: skip
    key = x.shape, x.dtype, *(s.dtype for s in terms_dense), table.dtype, terms, stochastic, table.ndim, loaded
    launch_kept(linear_kernel, x.device, key, values, make)
    return out if dense is out else out.copy_(dense)


def _perturbed(
    x: Tensor, alpha: Tensor | float, sigma: Tensor | float, noise: int, out: Tensor | None, where: dict[str, Any]
) -> Tensor:
    dense, out = result(x, out, alpha, sigma)
    if x.numel() == 0:
        return out
    alpha_c, alpha_kind, alpha_tag = coefficient("alpha", alpha, x)
    sigma_c, sigma_kind, sigma_tag = coefficient("sigma", sigma, x)
    integers, loaded = places(x, where["seed"], where["first_path"], where["step"])

    def make() -> tuple[Grid, dict[str, Any]]:
        _, tile = tile_of(x)
        return grid(x.shape[0], tile), constants(x, tile, loaded, ALPHA=alpha_kind, SIGMA=sigma_kind, NOISE=noise)

    values = [
        x.resolve_neg().contiguous(), alpha_c, sigma_c, dense,
        x.shape[0], math.prod(x.shape[1:]), integers[0], int(where["stream"]), *integers[1:],
    ]  # fmt: skip
    key = x.shape, x.dtype, alpha_kind, alpha_tag, sigma_kind, sigma_tag, noise, loaded
    launch_kept(perturb_kernel, x.device, key, values, make)
    return out if dense is out else out.copy_(dense)


def perturb(
    x0: Tensor, alpha: Tensor | float, sigma: Tensor | float, *, out: Tensor | None = None, **where: Any
) -> Tensor:
    """``alpha x0 + sigma z``; ``alpha`` and ``sigma`` are numbers, ``()`` or ``(batch,)``."""
    return _perturbed(x0, alpha, sigma, ADDED.value, out, where)


def noise_product(v: Tensor, c: Tensor | float, *, out: Tensor | None = None, **where: Any) -> Tensor:
    """``c v z``; ``c`` is a number, ``()`` or ``(batch,)``."""
    return _perturbed(v, c, 0.0, FACTOR.value, out, where)


def scaled(v: Tensor, c: Tensor | float, *, out: Tensor | None = None) -> Tensor:
    """``c v``, rounded once: torch makes a wide copy of 16-bit data for that."""
    return _perturbed(v, c, 0.0, ABSENT.value, out, {"seed": 0, "first_path": 0, "step": 0, "stream": 0})
