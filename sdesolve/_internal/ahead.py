"""Times that a run will call its score at, so that numbers of all of them are made at once."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, final

from torch import Tensor

_ahead: contextvars.ContextVar[Ahead | None] = contextvars.ContextVar("_ahead", default=None)


@final
class Ahead:
    """Times of a run, of which a score makes its numbers once for all.

    Args:
        times: ``(n,)``.

    Attributes:
        each: the tensors ``()`` that the score is called with; it knows them by identity.
    """

    def __init__(self, times: Tensor) -> None:
        self.times, self.each = times, times.unbind(0)
        self._places = {id(t): i for i, t in enumerate(self.each)}
        self._made: dict[Hashable, tuple[object, Sequence[Any]]] = {}

    @contextlib.contextmanager
    def known(self) -> Iterator[None]:
        """Within, scores find these times by `numbers_ahead`."""
        before = _ahead.set(self)
        try:
            yield
        finally:
            _ahead.reset(before)


def numbers_ahead(t: Tensor, owner: object, key: Hashable, make: Callable[[Tensor], Sequence[Any]]) -> Any:
    """The entry for ``t`` of ``make(times)``; `None` where the run has not said that it would come to this time.

    Args:
        t: a time as the score is given it.
        owner: what the numbers are of; it is called once for each owner and key.
        key: what else they depend on.
        make: gives a number for each of the times, ``(n,)``, or an empty sequence where it cannot.
    """
    known = _ahead.get()
    place = None if known is None else known._places.get(id(t))
    if known is None or place is None:
        return None
    held = known._made.get((id(owner), key))
    if held is None:
        held = known._made[id(owner), key] = owner, make(known.times)
    return held[1][place] if held[1] else None
