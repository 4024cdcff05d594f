"""Calls of all ops under `fake_gpu`: what the second launch of a kind passes is what Triton's own handling passes."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import torch
from fake_gpu import launches
from sdesolve_kernels import (
    dsm_loss,
    euler_maruyama_step,
    langevin_step,
    linear_step,
    matrix_product,
    matrix_step,
    normal,
    perturb,
    uniform,
    use_backend,
    words,
)
from sdesolve_kernels._triton import arguments

generator = torch.Generator().manual_seed(0)


def made(*shape: int, dtype: torch.dtype = torch.float32, shift: int = 0) -> torch.Tensor:
    """A tensor that begins `shift` elements after a multiple of 16 bytes."""
    count = 1
    for n in shape:
        count *= n
    whole = torch.randn(count + shift, generator=generator).to(dtype)
    return whole[shift:].view(shape)


def calls(all_of_them: bool) -> list[Callable[[], object]]:
    """Calls that differ in one thing each, of those that a compiled kernel depends on, or does not."""
    found: list[Callable[[], object]] = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if all_of_them else (torch.float32,):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        rows, one, table = made(4, dtype=wide), made(1, dtype=wide)[0], made(5, 3, dtype=torch.float64)
        for shift in (0, 1):
            x, f, out = (made(4, 16, dtype=dtype, shift=shift) for _ in range(3))
            # As integers, the bits of 0.0, of the smallest number and of 2.0 are kinds of their own to Triton.
            for g in (0.0, 0.1, 5e-324, 2.0, one, made(3, dtype=wide)[1], rows, f):
                found.append(lambda x=x, f=f, g=g, out=out: euler_maruyama_step(x, f, g, 0.5, seed=3, out=out))
            found.append(lambda x=x, f=f, out=out: euler_maruyama_step(x, f, 1.0, 0.5, seed=torch.tensor(5), out=out))
            for alpha, sigma in ((1.0, 0.0), (rows, 0.7)):
                found.append(lambda x=x, a=alpha, s=sigma, out=out: perturb(x, a, s, seed=2**64 - 1, out=out))
        for dt in (0.0, 0.1, one):
            found.append(lambda x=x, f=f, dt=dt, out=out: euler_maruyama_step(x, f, 0.3, dt, seed=3, out=out))
        found.append(lambda x=x, f=f, t=table, out=out: linear_step(x, [f], t, 2, seed=1, step=7, out=out))
        found.append(lambda x=x, f=f, out=out: langevin_step(x, f, mode="batch", size=0.1, seed=1, out=out))
        found.append(lambda out=out: normal(4, 16, seed=1, offset=4, out=out))
        found.append(lambda x=x, q=rows: dsm_loss(x, None, 0.0, q, 1.0, seed=1))
        if not all_of_them:
            continue
        for mode in ("fixed", "sample", "dimension"):
            found.append(lambda x=x, f=f, m=mode, out=out: langevin_step(x, f, mode=m, size=0.1, seed=1, out=out))
        for alpha, sigma in ((rows, rows), (0.5, one)):
            found.append(lambda x=x, a=alpha, s=sigma, out=out: perturb(x, a, s, seed=2**64 - 1, out=out))
        found.append(lambda x=x, t=table, out=out: linear_step(x, [], t[:, :2], 1, stochastic=False, out=out))
        found.append(lambda out=out: normal(4, 16, seed=1, offset=3, first_path=2**63, out=out))
        found.append(lambda out=out: uniform(4, 16, seed=1, stream=0, out=out))
        found.append(lambda x=x, f=f, q=rows: dsm_loss(x, f, q, q, q, reduction="none", seed=1))
        g = made(4, 16, 3, dtype=dtype)
        found.append(lambda x=x, f=f, g=g, out=out: matrix_step(x, f, g, 0.1, seed=1, out=out))
        found.append(lambda x=x, f=f, g=g, out=out: matrix_step(x, f, g[:1], 0.1, seed=1, out=out))
    small, large = made(2, 16), made(3000, 16)
    found += [lambda x=x: normal(len(x), 16, seed=1, out=x) for x in (small, large)]
    found.append(lambda: langevin_step(large, large.flip(0), mode="batch", size=0.1, seed=1))
    if all_of_them:
        found += [lambda: words(3, 8, seed=1, stream=0), lambda: matrix_product(made(4, 16, 3), made(4, 3))]
        found.append(lambda: dsm_loss(large, None, 0.0, 1.0, 1.0, seed=1))
    return found


def launched(call: Callable[[], object]) -> list[tuple[object, ...]]:
    """What a call launches, without the addresses of what it makes itself."""
    del launches[:]
    known = {v.data_ptr() for v in call.__defaults__ or () if isinstance(v, torch.Tensor)}
    call()
    return [
        (kernel, grid, [("a tensor", a[1]) if isinstance(a, tuple) and a[0] not in known else a for a in rest])
        for kernel, grid, rest in launches
    ]


def main(all_of_them: bool) -> None:
    every = calls(all_of_them)
    with use_backend("triton"):
        fresh = []
        for call in every:
            arguments._kept.clear()
            fresh.append(launched(call))
        assert all(fresh), "a call that launches nothing"
        order = list(range(len(every))) * 3
        random.Random(0).shuffle(order)
        arguments._kept.clear()
        anew = 0
        for number in order:
            before = len(arguments._kept)
            assert launched(every[number]) == fresh[number], f"call {number} launches something else"
            anew += len(arguments._kept) > before
        for _, _, passed in (item for found in fresh for item in found):
            assert all(-(2**63) <= n < 2**63 for n in passed if type(n) is int), "an integer that no launcher takes"
    print(len(every), "calls,", anew, "of", len(order), "anew")
    assert anew <= len(every)


main("all" in sys.argv)
