"""Launchers of products of a matrix for each row, and of steps with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arguments import coefficient, constants, launch_kept, places, result, state
from .geometry import Geometry, Grid, grid
from .matrices import matrix_kernel

__all__ = ["matrix_product", "matrix_step"]

# Bytes of a tile's products, 32 registers a thread, and the most outputs or channels of one.
_BYTES, _WIDEST = 16384, 32


def matrix_step(
    x: Tensor, f: Tensor, g: Tensor, dt: Tensor | float,
    *, seed: int | Tensor, stream: int, first_path: int | Tensor, step: int | Tensor, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x + f dt + sqrt|dt| g z`` for ``g: (batch, *state, channels)``, or 1 for the batch."""
    dense, out = result(x, out, f, g, dt)
    if x.numel() == 0:
        return out
    dt_c, kind, tag = coefficient("dt", dt, x)
    inputs = [x.resolve_neg().contiguous(), state("f", f, x)]
    _launch(g, None, dense, inputs, dt_c, (kind, tag), places(x, seed, first_path, step), stream, step=True)
    return out if dense is out else out.copy_(dense)


def matrix_product(g: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
    """``g v`` of each row, for ``v: (batch, channels)``."""
    dense, out = result(out, out, g, v)
    _launch(g, v, dense, [dense, dense], 0, (2, None), ([0, 0, 0], 0), 0, step=False)
    return out if dense is out else out.copy_(dense)


def _power(n: int, most: int) -> int:
    return min(most, 1 << (n - 1).bit_length())


def _launch(
    g: Tensor, v: Tensor | None, out: Tensor, inputs: list[Tensor], dt: Any, kind: tuple[int, Any],
    place: tuple[list[int], int], stream: int, *, step: bool,
) -> None:  # fmt: skip
    batch, m = out.shape[0], g.shape[-1]
    d = out.numel() // batch
    one = batch > 1 and (g.shape[0] == 1 or g.stride(0) == 0)
    matrix = (g[:1] if one else g).resolve_neg().contiguous()
    vector = matrix if v is None else v.resolve_neg().contiguous()
    integers, loaded = place

    def make() -> tuple[Grid, dict[str, Any]]:
        aligned = m % 4 == 0
        outputs, channels = _power(d, _WIDEST), max(4, _power(m if aligned else m + 3, _WIDEST))
        rows = _BYTES // max(4, out.element_size()) // (outputs * channels)
        tile = Geometry(4, channels // 4, rows * outputs * channels // 4, aligned, -(-d // outputs))
        own = {"STEP": step, "ONE_MATRIX": one, "DT": kind[0], "OUTPUTS": outputs, "CHANNELS": channels}
        constant = constants(out, tile, loaded, **own)
        del constant["LANES"]
        _, y, z = grid(1, tile)
        return (-(-batch // rows), y, z), constant

    values = [
        *inputs, matrix, vector, dt, out, batch, d, m, integers[0], int(stream), *integers[1:],
    ]  # fmt: skip
    key = batch, d, m, out.dtype, *(t.dtype for t in (*inputs, matrix, vector)), one, step, kind, loaded
    launch_kept(matrix_kernel, out.device, key, values, make)
