"""Box-Muller on chosen words: the corners that random words do not reach, for `selfcheck`."""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (the compiler types device code at each call)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import INTERPRETED, launch
from .noise import box_muller

__all__ = ["corner_words", "pairs"]

_BLOCK = 1024


@triton.jit
def pairs_kernel(w_ptr, out_ptr, count, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr, DOUBLE: tl.constexpr):
    """``out[2, count]``: the pairs of normals of words ``w[2, count]``."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = index < count
    w0 = tl.load(w_ptr + index, mask=there, other=0).to(tl.uint32)
    w1 = tl.load(w_ptr + count + index, mask=there, other=0).to(tl.uint32)
    z0, z1 = box_muller(w0, w1, INTERPRETED, DOUBLE)
    tl.store(out_ptr + index, z0, mask=there)
    tl.store(out_ptr + count + index, z1, mask=there)


def corner_words() -> Tensor:
    """int64 ``(2, count)``: ends of the range, where the formula for the radius changes, quarter turns, and others."""
    near_one = 0xFE000000
    edges = [0, 1, 2, 2**16, 2**24, 2**30, 2**31 - 1, 2**31, 3 * 2**30, near_one - 1, near_one, 2**32 - 2, 2**32 - 1]
    edges += [2**32 - 2**k for k in range(2, 31)] + [2**k for k in range(3, 30)]
    a, b = torch.meshgrid(torch.tensor(edges), torch.tensor(edges), indexing="ij")
    rest = torch.randint(2**32, (2, 4096), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.stack([a.flatten(), b.flatten()]), rest], dim=1)


def pairs(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Normals of int64 words ``(2, count)`` on their device, in float32 or float64."""
    out = torch.empty(words.shape, dtype=dtype, device=words.device)
    count = words.shape[1]
    launch(
        pairs_kernel,
        (-(-count // _BLOCK), 1, 1),
        words.device,
        {"w_ptr": words, "out_ptr": out, "count": count, "BLOCK": _BLOCK, "INTERPRETED": INTERPRETED,
         "DOUBLE": dtype == torch.float64},
    )  # fmt: skip
    return out
