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

from .arguments import coefficient, launch, prepare, result, state
from .fill import NORMAL, UNIFORM, WORDS, fill_kernel
from .geometry import Geometry, geometry, grid
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
    # Nothing is loaded, so registers are left for two lanes a thread in 8-byte types too.
    two = 256 if aligned and out.element_size() == 8 else None
    tile = geometry(m, out.element_size(), aligned, two)
    shared = prepare(out, tile, {"seed": seed, "first_path": first_path, "step": offset}, stream)
    own = {"out_ptr": dense, "batch": batch, "m": m, "stride": stride, "OP": _OPS[op]}
    launch(fill_kernel, grid(batch, tile), out.device, own | shared)
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
    dense, out = result(x, out)
    if x.numel() == 0:
        return out
    m, tile = tile_of(x)
    if isinstance(g, Tensor) and g.shape == x.shape and g.ndim > 0:
        g_c, g_kind = state("g", g, x), _FULL
    else:
        g_c, g_kind = coefficient("g", g, x)
    dt_c, dt_kind = coefficient("dt", dt, x)
    own = {
        "x_ptr": x.resolve_neg().contiguous(), "f_ptr": state("f", f, x), "g_c": g_c, "dt_c": dt_c, "out_ptr": dense,
        "batch": x.shape[0], "m": m, "G": g_kind, "DT": dt_kind,
    }  # fmt: skip
    shared = prepare(x, tile, {"seed": seed, "first_path": first_path, "step": step}, stream)
    launch(euler_maruyama_kernel, grid(x.shape[0], tile), x.device, own | shared)
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
    dense, out = result(x, out)
    if x.numel() == 0:
        return out
    m, tile = tile_of(x)
    x_dense = x.resolve_neg().contiguous()
    terms_dense = [state(f"history[{i}]", s, x) for i, s in enumerate(history)]
    own = {
        "x_ptr": x_dense,
        **{f"s{i}_ptr": terms_dense[i] if i < terms else x_dense for i in range(4)},
        "table_ptr": table.resolve_neg().contiguous(), "out_ptr": dense, "batch": x.shape[0], "m": m,
        "TERMS": terms, "STOCHASTIC": stochastic, "KIND": PER_SAMPLE.value if table.ndim == 3 else SHARED.value,
    }  # fmt: skip
    shared = prepare(x, tile, {"seed": seed, "first_path": first_path, "step": step, "row": row}, stream)
    launch(linear_kernel, grid(x.shape[0], tile), x.device, own | shared)
    return out if dense is out else out.copy_(dense)


def _perturbed(
    x: Tensor, alpha: Tensor | float, sigma: Tensor | float, noise: int, out: Tensor | None, where: dict[str, Any]
) -> Tensor:
    dense, out = result(x, out)
    if x.numel() == 0:
        return out
    m, tile = tile_of(x)
    alpha_c, alpha_kind = coefficient("alpha", alpha, x)
    sigma_c, sigma_kind = coefficient("sigma", sigma, x)
    own = {
        "x_ptr": x.resolve_neg().contiguous(), "alpha_c": alpha_c, "sigma_c": sigma_c, "out_ptr": dense,
        "batch": x.shape[0], "m": m, "ALPHA": alpha_kind, "SIGMA": sigma_kind, "NOISE": noise,
    }  # fmt: skip
    integers = {name: where[name] for name in ("seed", "first_path", "step")}
    launch(perturb_kernel, grid(x.shape[0], tile), x.device, own | prepare(x, tile, integers, where["stream"]))
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
