"""Launcher of the Langevin corrector: one pass for a step of fixed size, else norms, size and update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import bits, coefficient, launch, prepare, result, state
from .geometry import grid, row_grid, splits_of
from .langevin import BATCH, DIMENSION, SAMPLE, langevin_kernel, norms_kernel, size_kernel, total_size_kernel
from .launch import Index, tile_of

__all__ = ["chi_mean", "langevin_size", "langevin_step"]

_MODES = {"sample": SAMPLE.value, "batch": BATCH.value, "dimension": DIMENSION.value}
GROUP = 1024  # rows that one program of the small kernels sums


def chi_mean(m: int) -> float:
    """``E|z|`` of ``m`` standard normals."""
    return math.sqrt(2.0) * math.exp(math.lgamma((m + 1) / 2) - math.lgamma(m / 2))


def langevin_size(
    score: Tensor, *, mode: str, snr: Tensor | float, seed: Index, stream: int, first_path: Index, step: Index
) -> Tensor:
    """``2 (snr n / s)^2`` from norms of score and noise: ``(batch,)`` in mode "sample", else ``()``."""
    m, tile = tile_of(score)
    batch, kind = score.shape[0], _MODES[mode]
    per_split, splits = splits_of(tile)
    groups = -(-batch // GROUP)
    compute = torch.float64 if score.dtype == torch.float64 else torch.float32
    partial = torch.empty((2, splits, batch), dtype=compute, device=score.device)
    size = torch.empty((batch,) if mode == "sample" else (), dtype=compute, device=score.device)
    own = {
        "s_ptr": score, "partial_ptr": partial, "batch": batch, "m": m, "splits": splits, "chunks": tile.chunks,
        "WITH_NOISE": mode != "dimension", "CHUNKS": per_split,
    }  # fmt: skip
    shared = prepare(score, tile, {"seed": seed, "first_path": first_path, "step": step}, stream)
    launch(norms_kernel, row_grid(batch, tile, splits), score.device, own | shared)
    snr_c, snr_kind = coefficient("size", snr, score)
    finish = {
        "size_ptr": size, "size_c": snr_c, "expected_c": bits(chi_mean(m)), "batch": batch, "groups": groups,
        "MODE": kind, "SIZE": snr_kind, "GROUP": GROUP,
    }  # fmt: skip
    sums = partial if groups == 1 else torch.empty((2, groups), dtype=torch.float64, device=score.device)
    own = {"partial_ptr": partial, "sums_ptr": sums, "splits": splits, "ONE_GROUP": groups == 1}
    launch(size_kernel, (groups, 1, 1), score.device, own | finish)
    if mode != "sample" and groups > 1:
        launch(total_size_kernel, (1, 1, 1), score.device, {"sums_ptr": sums} | finish)
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
    dense, out = result(x, out)
    if x.numel() == 0:
        return out
    m, tile = tile_of(x)
    score = state("score", score, x)
    where = {"seed": seed, "first_path": first_path, "step": step}
    if mode != "fixed":
        size = langevin_size(score, mode=mode, snr=size, stream=stream, **where)
    alpha_c, alpha_kind = coefficient("alpha", alpha, x)
    size_c, size_kind = coefficient("size", size, x)
    own = {
        "x_ptr": x.resolve_neg().contiguous(), "s_ptr": score, "alpha_c": alpha_c, "size_c": size_c, "out_ptr": dense,
        "batch": x.shape[0], "m": m, "ALPHA": alpha_kind, "SIZE": size_kind,
    }  # fmt: skip
    launch(langevin_kernel, grid(x.shape[0], tile), x.device, own | prepare(x, tile, where, stream))
    return out if dense is out else out.copy_(dense)
