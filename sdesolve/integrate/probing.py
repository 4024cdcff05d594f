"""Calls of the user's functions that are no part of an integration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_MOST_WEIGHTS = 1 << 16


@contextlib.contextmanager
def unnoticed(*functions: object) -> Iterator[None]:
    """Calls inside the ``with`` block leave what the functions hold, and random generators, as they were.

    What cannot be looked into, and a large network, is not put back.
    """
    from sdesolve_kernels.trajectory import Unsupported, look_into  # the compiler is a third of the package's import
    from sdesolve_kernels.trajectory.snapshots import random_states

    with contextlib.ExitStack() as stack:
        try:
            held = look_into(*functions, most_weights=_MOST_WEIGHTS)
            stack.enter_context(contextlib.suppress(Unsupported))  # something did change, and was put back
            stack.enter_context(held.preserved(watched=False))
        except Exception:  # objects of the user may answer anything with an exception
            stack.callback(random_states())
        yield
