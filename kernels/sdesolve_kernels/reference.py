"""Counter-based noise in plain torch: the oracle that every kernel is compared with, and the fallback on any device.

Everything here is int64 and float64 arithmetic that torch has on every device; nothing is tuned. The generator is
Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the normals come
from it by Box and Muller ("A note on the generation of random normal deviates", 1958).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backend import int64_bits

__all__ = ["box_muller", "normal", "numbered_words", "philox4x32", "uniform", "words"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1: what each round adds to the key


def _multiply(m: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``m * x`` for 32-bit unsigned values, without leaving int64."""
    # m * x reaches 2^64; its two halves with x split at 16 bits stay below 2^49.
    low, high = m * (x & 0xFFFF), m * (x >> 16)
    carry = (low >> 16) + (high & 0xFFFF)
    return ((high >> 16) + (carry >> 16)) & _MASK, ((carry << 16) | (low & 0xFFFF)) & _MASK


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Philox4x32: four random 32-bit words from a 128-bit counter and a 64-bit key.

    One round maps $(c_0, c_1, c_2, c_3)$ to
    $(\mathrm{hi}(m_1 c_2) \oplus c_1 \oplus k_0,\ \mathrm{lo}(m_1 c_2),\
    \mathrm{hi}(m_0 c_0) \oplus c_3 \oplus k_1,\ \mathrm{lo}(m_0 c_0))$
    and adds a Weyl constant to each key word.

    Args:
        counter: Four int64 tensors that broadcast together, holding values in [0, 2^32).
        key: Two integers in [0, 2^32).
        rounds: Number of rounds; 10 is what this library uses.

    Returns:
        Four int64 tensors of the broadcast shape, holding values in [0, 2^32).

    Source: Salmon et al., SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: int, stream: int, path: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""The four words of block `q` of `path`: entries 4q to 4q + 3 of that path's sequence.

    The key is the seed, low word first; the counter is
    $(q \bmod 2^{32},\ path \bmod 2^{32},\ \lfloor path / 2^{32} \rfloor,\ stream + 256 \lfloor q / 2^{32} \rfloor)$.

    Args:
        seed: In [0, 2^64).
        stream: In [0, 256).
        path: int64 tensor; values from 2^63 on are written in two's complement.
        q: int64 tensor in [0, 2^56), broadcasting with `path`.

    Returns:
        Four int64 tensors of the broadcast shape, holding values in [0, 2^32).
    """
    counter = (q & _MASK, path & _MASK, (path >> 32) & _MASK, stream + 256 * (q >> 32))
    return philox4x32(counter, (seed & _MASK, seed >> 32))


def numbered_words(
    paths: int,
    count: int,
    *,
    seed: int,
    stream: int,
    first_path: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Words as int64 of shape ``(paths, count)``; [i, j] is word ``n mod 4`` of block ``n div 4``, n = offset + j."""
    q0, q1 = offset // 4, (offset + count + 3) // 4
    path = torch.arange(paths, dtype=torch.int64, device=device)[:, None] + int64_bits(first_path)
    q = torch.arange(q0, q1, dtype=torch.int64, device=device)[None, :]
    blocks = torch.stack(words(seed, stream, path, q), dim=-1)
    return blocks.reshape(paths, 4 * (q1 - q0))[:, offset - 4 * q0 : offset - 4 * q0 + count]


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    r"""Two independent float64 normals from two words: $(r \cos\theta, r \sin\theta)$.

    $u = (w_0 + \tfrac12) 2^{-32}$, $r = \sqrt{-2 \ln u}$, $\theta = 2\pi w_1 / 2^{32}$. The largest radius,
    at $w_0 = 0$, is 6.76.

    Source: Box and Muller, 1958.
    """
    u = (w0.double() + 0.5) * 2.0**-32
    # ln u = log1p(-(1 - u)) with an exact 1 - u: plain log is as good in float64, but this is the formula that keeps
    # its relative accuracy in any precision, and the kernels use it.
    one_minus_u = ((_MASK - w0).double() + 0.5) * 2.0**-32
    log_u = torch.where(u > math.sqrt(0.5), torch.log1p(-one_minus_u), torch.log(u))
    r, theta = (-2.0 * log_u).sqrt(), w1.double() * (2.0 * math.pi * 2.0**-32)
    return r * theta.cos(), r * theta.sin()


def normal(
    paths: int,
    count: int,
    *,
    seed: int,
    stream: int,
    first_path: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals ``Z(seed, stream, first_path + i, offset + j)``, shape ``(paths, count)``.

    Entry n of a path comes from block ``n div 4``: entries 0 and 1 are the Box-Muller pair of words (w0, w1), entries
    2 and 3 that of (w2, w3). Computed in float64 and rounded to `dtype` at the end.
    """
    skip = offset % 4
    padded = (skip + count + 3) // 4 * 4
    w = numbered_words(
        paths, padded, seed=seed, stream=stream, first_path=first_path, offset=offset - skip, device=device
    )
    z = torch.stack(box_muller(w[:, 0::2], w[:, 1::2]), dim=-1).reshape(paths, padded)
    return z[:, skip : skip + count].to(dtype)


def uniform(
    paths: int,
    count: int,
    *,
    seed: int,
    stream: int,
    first_path: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniforms ``(w + 1/2) 2^-32`` of the same words, shape ``(paths, count)``; strictly inside (0, 1) in float64.

    Computed in float64 and rounded to `dtype` at the end, so a narrower type can round up to 1.
    """
    w = numbered_words(paths, count, seed=seed, stream=stream, first_path=first_path, offset=offset, device=device)
    return ((w.double() + 0.5) * 2.0**-32).to(dtype)
