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

_PIECES = 6  # for each thread
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

    There are a few pieces for each thread, and a thread that is done takes the next: with one each, a thread that had
    to share its core, or woke late, kept the others waiting (half the time on a busy machine).
    """
    most = total // max(grain, 1)
    threads = max(1, min(torch.get_num_threads(), most))
    if threads == 1:
        work(0, total)
        return
    pieces = min(_PIECES * threads, most)
    numbers = itertools.count()  # one number at a time, under Python's lock

    def run() -> None:
        for i in numbers:
            if i >= pieces:
                return
            work(total * i // pieces, total * (i + 1) // pieces)

    futures = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    try:
        run()
    finally:
        for future in futures:
            future.result()
