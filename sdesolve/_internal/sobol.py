"""Scrambled Sobol points as increments of Brownian paths, their first dimensions where a path varies most.

Point ``n`` has the digits ``x_n = shift + sum_b n_b v_b`` over GF(2), ``n_b`` being the bits of ``n``, with the
direction numbers of Joe and Kuo 2008 (SIAM Journal on Scientific Computing 30) as torch has them. They are scrambled by
a random lower triangular matrix and a random shift for each dimension (Matousek 1998, Journal of Complexity 14): each
point is uniform, points of one scrambling keep their balance, and variances are of the order of those of Owen's nested
scrambling (Owen 2003, ACM Transactions on Modeling and Computer Simulation 13). All random bits are words of the
generator, by coordinates: nothing depends on what else is asked for.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from sdesolve_kernels import Stream, normal, words
from torch import Tensor
from torch.quasirandom import SobolEngine

DIMENSIONS, POINTS = SobolEngine.MAXDIM, 1 << SobolEngine.MAXBIT
_INPUT, _OUTPUT = SobolEngine.MAXBIT, 52  # digits
_MOST_NUMBERS, _AT_ONCE = 1 << 21, 1 << 9


class _Level(NamedTuple):
    """Nodes of one level of a bridge: places in a list of times, and how values there are made."""

    first: int
    middle: Tensor
    left: Tensor
    right: Tensor
    weights: Tensor


def bridged_normals(
    seed: int, stream: int, first_path: int, batch: int, horizon: int, first: int, count: int, m: int, like: Tensor
) -> Tensor:
    """Unit increments of steps ``first ... first + count - 1`` of ``horizon``: ``(count, batch, m)``.

    The end of a path, for all ``m`` channels, takes the first dimensions; then its middle, given both ends, and so on,
    level by level: node ``i`` takes dimensions ``i m ... i m + m - 1`` (Caflisch, Morokoff and Owen 1997, Journal of
    Computational Finance 1). Dimensions that the table does not have are ordinary normals.

    Args:
        seed: of the scrambling.
        stream: of ordinary normals.
        first_path: the point of row 0.
        batch: rows.
        horizon: steps of the whole path.
        first: step.
        count: steps.
        m: channels.
        like: has the dtype and device of the result.

    Raises:
        ValueError: points beyond the last.
    """
    if first_path + batch > POINTS:
        raise ValueError(f"a Sobol sequence has 2^{_INPUT} points, got first_path={first_path} for {batch} rows")
    made = torch.empty(count, batch, m, dtype=like.dtype, device=like.device)
    times, levels = _bridge(horizon, first, count)
    rows = max(1, _MOST_NUMBERS // (len(times) * max(m, 1)))
    for row in range(0, batch, rows):
        n = min(rows, batch - row)
        W = torch.zeros(n, len(times), m, dtype=torch.float64, device=like.device)
        for level in levels:
            z = _normals(seed, stream, first_path + row, n, level.first * m, len(level.middle) * m, like.device)
            left, right, own = level.weights.to(like.device)[:, :, None]
            middle, *ends = (part.to(like.device) for part in level[1:4])
            W[:, middle] = left * W[:, ends[0]] + right * W[:, ends[1]] + own * z.unflatten(1, (-1, m))
        start = int(np.searchsorted(times, first))
        made[:, row : row + n] = W[:, start : start + count + 1].diff(dim=1).transpose(0, 1).to(like.dtype)
    return made


@functools.lru_cache(64)
def _bridge(horizon: int, first: int, count: int) -> tuple[np.ndarray, list[_Level]]:
    """Times that increments of some steps need, and the levels that give their values, the end of the path first."""
    found = [(0, np.array([horizon]), np.array([0]), np.array([0]), np.array([[0.0], [0.0], [horizon**0.5]]))]
    left, right, node = np.array([0]), np.array([horizon]), 1
    while True:
        split = right - left > 1
        left, right = left[split], right[split]
        if not len(left):
            break
        middle = (left + right) // 2
        kept = (left < first + count) & (right > first)
        l, c, r = left[kept], middle[kept], right[kept]  # noqa: E741
        if len(c):
            a, b = (r - c) / (r - l), (c - l) / (r - l)
            found.append((node + int(kept.argmax()), c, l, r, np.stack([a, b, np.sqrt(a * (c - l))])))
        node += len(middle)
        left, right = np.stack([left, middle], 1).ravel(), np.stack([middle, right], 1).ravel()
    times = np.unique(np.concatenate([[0], *(level[1] for level in found)]))

    def place(ends: np.ndarray) -> Tensor:
        return torch.from_numpy(np.searchsorted(times, ends))

    return times, [_Level(i, place(c), place(l), place(r), torch.from_numpy(w)) for i, c, l, r, w in found]  # noqa: E741


def _normals(
    seed: int, stream: int, first_path: int, batch: int, first: int, count: int, device: torch.device
) -> Tensor:
    """Dimensions ``first ... first + count - 1`` of some points as normals: ``(batch, count)``, float64."""
    of_points = max(0, min(count, DIMENSIONS - first))
    parts = []
    if of_points:
        x = _points(seed, first_path, batch, first, of_points, device)
        parts.append(torch.special.ndtri((x.double() + 0.5) * 2.0**-_OUTPUT))
    if of_points < count:
        parts.append(
            normal(
                batch, count - of_points, seed=seed, stream=stream, first_path=first_path, offset=first + of_points,
                dtype=torch.float64, device=device,
            )
        )  # fmt: skip
    return torch.cat(parts, 1)


def _points(seed: int, first_path: int, batch: int, first: int, count: int, device: torch.device) -> Tensor:
    """Digits of points as whole numbers below ``2^52``: ``(batch, count)``."""
    until = 1 << max(4, (first + count - 1).bit_length())  # tables of few sizes
    columns, shift = (part[..., first : first + count].to(device) for part in _scrambled(seed, min(until, DIMENSIONS)))
    bits = max(batch - 1, 0).bit_length()
    block = shift[None]
    for column in columns[:bits]:  # points 0 ... 2^bits - 1
        block = torch.cat([block, block ^ column])
    above, start = first_path >> bits, first_path & ((1 << bits) - 1)
    parts = []
    while batch > 0:  # one block, or two
        part = block[start : start + batch]
        for b in range(bits, _INPUT):
            if above >> (b - bits) & 1:
                part = part ^ columns[b]
        parts.append(part)
        batch, start, above = batch - len(part), 0, above + 1
    return torch.cat(parts) if parts else block[:0]


@functools.lru_cache(32)
def _scrambled(seed: int, dimensions: int) -> tuple[Tensor, Tensor]:
    """Scrambled direction numbers ``(30, dimensions)``, and the shift ``(dimensions,)``."""
    with torch.device("cpu"):
        numbers = SobolEngine(dimensions, scramble=False).sobolstate.T.contiguous()
        random = words(dimensions, _OUTPUT + 2, seed=seed, stream=Stream.SCRAMBLING)
        digit = torch.arange(_OUTPUT)  # from the first, of one half
        after = (_INPUT - digit).clamp(min=0)  # digits of a direction number from this one on
        rows = (random[:, :_OUTPUT] & ((1 << _INPUT) - (1 << after))) | (1 << after >> 1)
        parts = zip(numbers.split(_AT_ONCE, 1), rows.split(_AT_ONCE), strict=True)
        made = torch.cat([_product(*part) for part in parts], 1)
        shift = ((random[:, _OUTPUT] << 32) | random[:, _OUTPUT + 1]) & ((1 << _OUTPUT) - 1)
    return made, shift


def _product(numbers: Tensor, rows: Tensor) -> Tensor:
    """Matrices over GF(2), ``(dimensions, 52)`` rows of 30 bits, times vectors ``(30, dimensions)``."""
    parity = numbers & rows.T[:, None]
    for fold in (16, 8, 4, 2, 1):
        parity = parity ^ (parity >> fold)
    return ((parity & 1) << (_OUTPUT - 1 - torch.arange(_OUTPUT))[:, None, None]).sum(0)
