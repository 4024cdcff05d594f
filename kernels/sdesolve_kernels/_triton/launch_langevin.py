"""Launcher of the Langevin corrector: one pass for a step of fixed size, else norms, size and update."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from .arguments import coefficient, constants, launch_kept, places, result, state
from .geometry import Grid, grid, row_grid, splits_of, tree
from .langevin import BATCH, DIMENSION, SAMPLE, langevin_kernel, norms_kernel, size_kernel, total_size_kernel
from .launch import Index, tile_of

__all__ = ["chi_mean", "langevin_size", "langevin_step"]

_MODES = {"sample": SAMPLE.value, "batch": BATCH.value, "dimension": DIMENSION.value}
GROUP = 1024  # sums of groups of rows that the last kernel of a reduction takes at once


@functools.lru_cache
def chi_mean(m: int) -> float:
    """``E|z|`` of ``m`` standard normals."""
    return math.sqrt(2.0) * math.exp(math.lgamma((m + 1) / 2) - math.lgamma(m / 2))


def langevin_size(
    score: Tensor, *, mode: str, snr: Tensor | float, seed: Index, stream: int, first_path: Index, step: Index
) -> Tensor:
    """``2 (snr n / s)^2`` from norms of score and noise: ``(batch,)`` in mode "sample", else ``()``."""
    batch, device, dtype = score.shape[0], score.device, score.dtype
    m, tile = tile_of(score)
    per_split, splits = splits_of(tile)
    lanes, rows = tree(splits)
    groups = -(-batch // rows)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    partial = torch.empty((2, splits, batch), dtype=compute, device=device)
    size = torch.empty((batch,) if mode == "sample" else (), dtype=compute, device=device)
    integers, loaded = places(score, seed, first_path, step)

    def norms() -> tuple[Grid, dict[str, Any]]:
        own = {"WITH_NOISE": mode != "dimension", "CHUNKS": per_split}
        return row_grid(batch, tile, splits), constants(score, tile, loaded, **own)

    values = [score, partial, batch, m, splits, tile.chunks, integers[0], int(stream), *integers[1:]]
    launch_kept(norms_kernel, device, (mode, batch, m, dtype, loaded), values, norms)
    snr_c, snr_kind, snr_tag = coefficient("size", snr, score)
    expected_c, _, expected_tag = coefficient("E|z|", chi_mean(m), score)
    sums = partial if groups == 1 else torch.empty((2, groups), dtype=torch.float64, device=device)

    def sizes() -> tuple[Grid, dict[str, Any]]:
        own = {"ONE_GROUP": groups == 1, "ROWS": rows, "LANES": lanes}
        return (groups, 1, 1), {"MODE": _MODES[mode], "SIZE": snr_kind, **own}

    key = mode, batch, m, dtype, snr_kind, snr_tag, expected_tag
    launch_kept(size_kernel, device, key, [partial, size, sums, snr_c, expected_c, batch, splits, groups], sizes)
    if mode != "sample" and groups > 1:
        values = [sums, size, snr_c, expected_c, batch, groups]
        last = {"MODE": _MODES[mode], "SIZE": snr_kind, "GROUP": GROUP}
        launch_kept(total_size_kernel, device, key, values, lambda: ((1, 1, 1), last))
    return size


def langevin_step(
    x: Tensor, score: Tensor, *, mode: str, size: Tensor | float, alpha: Tensor | float,
    seed: Index, stream: int, first_path: Index, step: Index, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x + delta s + sqrt(2 delta) z``, ``delta = alpha size`` ("fixed") or ``2 alpha (size n / s)^2``.

    ``mode`` is "fixed", "batch", "sample" or "dimension" as in `reference_steps.langevin_size`; ``size`` is the
    signal-to-noise ratio, a number or ``()``, in all but the first, where it may be ``(batch,)`` too.
    """
    if mode not in ("fixed", *_MODES):
        raise ValueError(f"mode must be 'fixed', 'batch', 'sample' or 'dimension', got {mode!r}")
    if mode != "fixed" and isinstance(size, Tensor) and size.ndim > 0:
        raise ValueError(f"size is a signal-to-noise ratio in mode {mode!r}: one number, got {tuple(size.shape)}")
    dense, out = result(x, out, score, size, alpha)
    if x.numel() == 0:
        return out
    score = state("score", score, x)
    if mode != "fixed":
        where = {"seed": seed, "first_path": first_path, "step": step}
        size = langevin_size(score, mode=mode, snr=size, stream=stream, **where)
    alpha_c, alpha_kind, alpha_tag = coefficient("alpha", alpha, x)
    size_c, size_kind, size_tag = coefficient("size", size, x)
    integers, loaded = places(x, seed, first_path, step)

    def make() -> tuple[Grid, dict[str, Any]]:
        _, tile = tile_of(x)
        return grid(x.shape[0], tile), constants(x, tile, loaded, ALPHA=alpha_kind, SIZE=size_kind)

    values = [
        x.resolve_neg().contiguous(), score, alpha_c, size_c, dense,
        x.shape[0], math.prod(x.shape[1:]), integers[0], int(stream), *integers[1:],
    ]  # fmt: skip
    key = x.shape, x.dtype, score.dtype, alpha_kind, alpha_tag, size_kind, size_tag, loaded
    launch_kept(langevin_kernel, x.device, key, values, make)
    return out if dense is out else out.copy_(dense)
