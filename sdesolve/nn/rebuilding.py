"""Networks that remember what they were made with, so that a checkpoint can say how to make them again."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
MADE_WITH = "_made_with"


def rebuildable(network: C) -> C:
    """A class decorator: instances remember the arguments of their constructor, and `save` writes these down.

    `load_score` then needs no network to load into. Arguments may be numbers, texts, tensors, lists and tuples of
    these, and rebuildable networks. Networks of `sdesolve.nn` are so already; of one's own classes `load_score` is told
    by ``networks=[MyNetwork]``, for a file cannot name what is to be imported.

    Args:
        network: the class, which is returned.

    Example:
        >>> @sds.nn.rebuildable
        ... class MyNetwork(nn.Module): ...
    """
    original = network.__init__  # type: ignore[misc]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is network:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            setattr(self, MADE_WITH, dict(list(bound.arguments.items())[1:]))

    network.__init__ = __init__  # type: ignore[misc]
    return network
