"""Splitting a range of independent work over threads, in pieces that an interrupt stops between.

Numba's own threading layers are not used: ``workqueue``, the only one always there, aborts the process when two Python
threads enter it at once, and GNU OpenMP, which torch loads, does not survive a fork. Kernels here release the GIL, so a
few plain threads do. Handing a piece to a waiting thread and hearing back takes 35 to 50 us, so small work stays on
the caller's.

An exception in the caller's thread, such as KeyboardInterrupt, leaves `split` when no thread works any more. Memory
that threads write must be owned by what `work` refers to: then it stays theirs even if the caller is interrupted again.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import numpy as np
import torch

__all__ = ["Job", "scratch", "single_threaded", "single_threaded_if_forked", "split", "survives_forks"]

_PIECES = 6  # for each thread, at least
_LARGEST = 512  # grains in a piece, at most: where a grain takes 60 us, an interrupt waits for 30 ms
_SCRATCH_KEPT = 5 << 18  # bytes that a thread keeps
_POLL = 0.1  # seconds between two reports of progress while the caller waits for others

P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


class Job:
    """One range of work, as its caller and its threads see it.

    Args:
        progress: called in the caller's thread with the amount of work done since the last call.

    Attributes:
        stopped: whether no more work is to be begun; long pieces look at it in between.
    """

    def __init__(self, progress: Callable[[int], None] | None = None) -> None:
        self.stopped = False
        self._progress, self._caller = progress, threading.get_ident()
        self._amounts: collections.deque[int] = collections.deque()

    def advance(self, amount: int) -> None:
        """Say, in any thread, that so much more is done."""
        if self._progress is not None:
            self._amounts.append(amount)
            if threading.get_ident() == self._caller:
                self.report()

    def report(self) -> None:
        """Pass on what was done; for the caller's thread."""
        amount = sum(self._amounts.popleft() for _ in range(len(self._amounts)))
        if amount and self._progress is not None:
            self._progress(amount)


def split(work: Callable[[int, int], object], total: int, grain: int, job: Job | None = None) -> None:
    """Run ``work(start, stop)`` over pieces that together cover ``range(total)``.

    Uses at most ``torch.get_num_threads()`` threads, the caller's among them, and fewer where pieces would be smaller
    than `grain`. What `work` writes must not depend on how the range is cut.

    There are a few pieces for each thread, and a thread that is done takes the next: with one each, a thread that had
    to share its core, or woke late, kept the others waiting (half the time on a busy machine).

    If `work` or `job`'s progress raises, or the caller is interrupted, pieces that were begun are finished, no others
    are begun, and the exception is raised.
    """
    most = max(1, total // max(grain, 1))
    threads = max(1, min(_alone.threads or torch.get_num_threads(), most))
    pieces = min(most, max(_PIECES * threads if threads > 1 else 1, -(-most // _LARGEST)))
    if pieces == 1:
        work(0, total)
        return
    shared = Job() if job is None else job
    numbers = itertools.count()  # one number at a time, under Python's lock

    def run() -> None:
        for i in numbers:
            if i >= pieces or shared.stopped:
                return
            try:
                work(total * i // pieces, total * (i + 1) // pieces)
            except BaseException:
                shared.stopped = True
                raise

    futures: list[Future[None]] = []
    try:
        for _ in range(threads - 1):
            futures.append(_pool(threads - 1).submit(run))
        run()
        while concurrent.futures.wait(futures, _POLL).not_done:
            shared.report()
    except BaseException:
        shared.stopped = True
        _wait(futures)
        raise
    for future in futures:
        future.result()
    shared.report()


def _wait(futures: Sequence[Future[None]]) -> None:
    """Wait until no thread works any more, whatever interrupts that."""
    while True:
        try:
            concurrent.futures.wait(futures)
            return
        except KeyboardInterrupt:
            continue


def _pool(workers: int) -> ThreadPoolExecutor:
    with _lock:
        if workers not in _pools:
            _pools[workers] = ThreadPoolExecutor(workers, thread_name_prefix="sdesolve")
        return _pools[workers]


class _Scratch(threading.local):
    """Memory of a thread's own."""

    size = 0
    address = 0
    memory = np.empty(0, np.uint8)


_scratch = _Scratch()


def scratch(size: int) -> tuple[np.ndarray, int]:
    """`size` bytes for the calling thread, and their address, a multiple of 64; the same again at the next call.

    Whoever uses the address holds on to the array.
    """
    if size <= _scratch.size:
        return _scratch.memory, _scratch.address
    memory = np.empty(size + 64, np.uint8)
    address = -(-memory.ctypes.data // 64) * 64
    if size <= _SCRATCH_KEPT:
        _scratch.size, _scratch.memory, _scratch.address = size, memory, address
    return memory, address


def single_threaded_if_forked() -> contextlib.AbstractContextManager[None]:
    """Keep torch's operations in this thread, in a process that was forked from one that had loaded this module.

    The child of a process that has used torch's OpenMP threads does not have them, and would wait for them for ever.
    Our own threads are made anew there, and `split` uses as many as ever.
    """
    return single_threaded() if _forked else contextlib.nullcontext()


def survives_forks(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs within `single_threaded_if_forked`."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _forked:
            return function(*args, **kwargs)
        with single_threaded():
            return function(*args, **kwargs)

    return call


class _Alone(threading.local):
    """How many threads there are to be, where torch has been told of one; 0 elsewhere."""

    threads = 0


_alone = _Alone()


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep torch's operations in this thread, whose sums then have one order."""
    if _alone.threads:
        yield
        return
    _alone.threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(_alone.threads)
        _alone.threads = 0


def _after_fork() -> None:
    """A forked child has the pools but not their threads, and perhaps a lock that nobody will release."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
