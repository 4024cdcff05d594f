"""Launchers of products of a matrix for each row, and of steps with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arguments import coefficient, launch, prepare, result, state
from .geometry import Geometry, grid
from .matrices import matrix_kernel

__all__ = ["matrix_product", "matrix_step"]

# Bytes of a tile's products, 32 registers a thread, and the most outputs or channels of one.
_BYTES, _WIDEST = 16384, 32


def matrix_step(
    x: Tensor, f: Tensor, g: Tensor, dt: Tensor | float,
    *, seed: int | Tensor, stream: int, first_path: int | Tensor, step: int | Tensor, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x + f dt + sqrt|dt| g z`` for ``g: (batch, *state, channels)``, or 1 for the batch."""
    dense, out = result(x, out)
    if x.numel() == 0:
        return out
    dt_c, kind = coefficient("dt", dt, x)
    own = {"x_ptr": x.resolve_neg().contiguous(), "f_ptr": state("f", f, x), "dt_c": dt_c, "DT": kind, "STEP": True}
    _launch(g, None, dense, own, {"seed": seed, "first_path": first_path, "step": step}, stream)
    return out if dense is out else out.copy_(dense)


def matrix_product(g: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
    """``g v`` of each row, for ``v: (batch, channels)``."""
    dense, out = result(out, out)
    own = {"x_ptr": dense, "f_ptr": dense, "dt_c": 0, "DT": 2, "STEP": False}
    _launch(g, v, dense, own, {"seed": 0, "first_path": 0, "step": 0}, 0)
    return out if dense is out else out.copy_(dense)


def _power(n: int, most: int) -> int:
    return min(most, 1 << (n - 1).bit_length())


def _launch(g: Tensor, v: Tensor | None, out: Tensor, own: dict[str, Any], integers: Any, stream: int) -> None:
    batch, m = out.shape[0], g.shape[-1]
    d = out.numel() // batch
    one = batch > 1 and (g.shape[0] == 1 or g.stride(0) == 0)
    aligned = m % 4 == 0
    outputs, channels = _power(d, _WIDEST), max(4, _power(m if aligned else m + 3, _WIDEST))
    rows = _BYTES // max(4, out.element_size()) // (outputs * channels)
    tile = Geometry(4, channels // 4, rows * outputs * channels // 4, aligned, -(-d // outputs))
    shared = prepare(out, tile, integers, stream)
    del shared["LANES"]
    matrix = (g[:1] if one else g).resolve_neg().contiguous()
    vector = matrix if v is None else v.resolve_neg().contiguous()
    arguments = {
        "g_ptr": matrix, "v_ptr": vector, "out_ptr": out, "batch": batch, "d": d, "m": m, "ONE_MATRIX": one,
        "OUTPUTS": outputs, "CHANNELS": channels,
    }  # fmt: skip
    _, y, z = grid(1, tile)
    launch(matrix_kernel, (-(-batch // rows), y, z), out.device, own | arguments | shared)
