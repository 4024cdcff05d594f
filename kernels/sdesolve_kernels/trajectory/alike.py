"""Arrays of expressions whose rows are all the same, so that a batch of any size costs what one row does.

A step is traced with batches of two and three rows; whether it means the same for the batch of a call, thousands of
rows, shows when it is traced with as many. All rows then hold the same expressions, and work is done on one of them.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

__all__ = ["TooMuchWork", "alike_rows", "mapped", "overwritten", "repeated", "spread", "thin", "thin_axis"]

Axes = tuple[tuple[int, int], ...]  # from the last, and their lengths
_FEW = 8  # rows that are done one by one
_MOST_WORK = 200_000  # operations on single elements
_rows: contextvars.ContextVar[int] = contextvars.ContextVar("rows", default=0)
_work: contextvars.ContextVar[list[int]] = contextvars.ContextVar("work")


class TooMuchWork(Exception):
    """There are too many elements to do one by one.

    Attributes:
        told_apart: whether rows turned out not to be alike, rather than to be hidden in a longer axis.
    """

    def __init__(self, told_apart: bool) -> None:
        super().__init__()
        self.told_apart = told_apart


@contextlib.contextmanager
def alike_rows(rows: int) -> Iterator[None]:
    """Axes of this length hold the same in every place, until shown otherwise."""
    token, work = _rows.set(rows if rows > _FEW else 0), _work.set([0])
    try:
        yield
    finally:
        _rows.reset(token)
        _work.reset(work)


def repeated(row: np.ndarray, rows: int) -> np.ndarray:
    """``(rows, *row.shape)`` in the memory of one."""
    return np.lib.stride_tricks.as_strided(row, (rows, *row.shape), (0, *row.strides))


def _same_along(a: np.ndarray, axis: int) -> bool:
    if a.strides[axis] == 0:
        return True
    first = a.take([0], axis)
    return bool((a == first).all())


def overwritten(target: np.ndarray, value: np.ndarray) -> bool:
    """Whether rows in the memory of one are all given the same: other changes in place would reach them all."""
    rows = _rows.get()
    value = np.broadcast_to(value, target.shape)
    return not rows or all(
        n < 2 or stride or (n == rows and _same_along(value, axis))
        for axis, (n, stride) in enumerate(zip(target.shape, target.strides, strict=True))
    )


def thin(*arrays: np.ndarray) -> tuple[tuple[np.ndarray, ...], Axes]:
    """The arrays with one row for those that are alike in all of them; the axes (from the last) of such rows."""
    rows = _rows.get()
    if not rows:
        return arrays, ()
    axes = []
    for axis in range(-max(a.ndim for a in arrays), 0):
        wide = [a for a in arrays if a.ndim >= -axis and a.shape[axis] > 1]
        # Part of the rows, too, may lie in the memory of one.
        if wide and all(a.strides[axis] == 0 or (a.shape[axis] == rows and _same_along(a, axis)) for a in wide):
            axes.append((axis, wide[0].shape[axis]))
    for axis, _ in axes:
        arrays = tuple(a.take([0], axis) if a.ndim >= -axis and a.shape[axis] > 1 else a for a in arrays)
    return arrays, tuple(axes)


def spread(a: np.ndarray, axes: Axes) -> np.ndarray:
    """Undoes `thin`, in the memory of one row."""
    if not axes:
        return a
    shape, strides = list(a.shape), list(a.strides)
    for axis, n in axes:
        shape[axis], strides[axis] = n, 0
    return np.lib.stride_tricks.as_strided(a, shape, strides)


def thin_axis(axis: int, *arrays: np.ndarray) -> tuple[tuple[np.ndarray, ...], Axes]:
    """`thin` along one axis from the last, which all of the arrays have."""
    if all(a.shape[axis] == _rows.get() and _same_along(a, axis) for a in arrays):
        return tuple(a.take([0], axis) for a in arrays), ((axis, _rows.get()),)
    return arrays, ()


def mapped(function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
    """``function`` elementwise, with broadcasting; always an array."""
    small, axes = thin(*arrays)
    out = np.frompyfunc(function, len(small), 1)(*small)
    if not isinstance(out, np.ndarray):
        made = np.empty((), dtype=object)
        made[()] = out
        return made
    if _rows.get():
        work = _work.get()
        work[0] += out.size
        if work[0] > _MOST_WORK:
            raise TooMuchWork(told_apart=any(_rows.get() in a.shape for a in small))
    return spread(out, axes)
