"""Splitting a range of independent work over threads.

Numba's own threading layers are not used: ``workqueue``, the only one always there, aborts the process when two Python
threads enter it at once, and GNU OpenMP, which torch loads, does not survive a fork. Kernels here release the GIL, so a
few plain threads do. Handing a piece to a waiting thread and hearing back takes 35 to 50 us, so small work stays on
the caller's.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["split"]

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="sdesolve")
        return _pools[workers]


def _forget_pools() -> None:
    """A forked child has the pools but not their threads, and perhaps a lock that nobody will release."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pools)


def split(work: Callable[[int, int], object], total: int, grain: int) -> None:
    """Run ``work(start, stop)`` over pieces that together cover ``range(total)``.

    Uses at most ``torch.get_num_threads()`` threads, the caller's among them, and fewer where pieces would be smaller
    than `grain`. What `work` writes must not depend on how the range is cut.
    """
    pieces = max(1, min(torch.get_num_threads(), total // max(grain, 1)))
    cuts = [total * i // pieces for i in range(pieces + 1)]
    futures = [_pool(pieces - 1).submit(work, a, b) for a, b in itertools.pairwise(cuts[1:])]
    try:
        work(cuts[0], cuts[1])
    finally:
        for future in futures:
            future.result()
