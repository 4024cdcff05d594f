"""The registry of back ends, and which of them runs an op."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._numba.backend import NumbaBackend
from ._reference.backend import ReferenceBackend
from ._triton.backend import TritonBackend
from .backend import Backend, Ops

__all__ = ["backend_for", "implementation", "register_backend", "requested_backend", "under", "use_backend"]

_backends: dict[str, Backend] = {b.name: b for b in (ReferenceBackend(), NumbaBackend(), TritonBackend())}
_requested: contextvars.ContextVar[str] = contextvars.ContextVar("sdesolve_backend", default="auto")


def register_backend(backend: Backend, *, replace: bool = False) -> None:
    """Make a back end available to `use_backend` by its name, and to "auto" by its priority.

    Args:
        backend: An instance of a subclass of `Backend`.
        replace: Take the place of a back end of that name.

    Raises:
        TypeError: It is not an instance of `Backend`.
        ValueError: The name is taken, or is "auto".
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"backend must be an instance of a subclass of Backend, got {backend!r}")
    if backend.name == "auto" or (backend.name in _backends and not replace):
        raise ValueError(f"the name {backend.name!r} is taken; choose another, or pass replace=True for a back end's")
    _backends[backend.name] = backend
    _chosen.cache_clear()
    _ops.cache_clear()
    _implementation.cache_clear()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the ``with`` block on one backend.

    The choice is local to the calling thread or task. A backend that cannot run where the data is raises; it never
    falls back to another.

    Args:
        name: "auto" (the fastest that runs on the device), "reference" (plain torch, any device), "numba" (CPU),
            "triton" (CUDA), or the name of a back end that was registered.

    Raises:
        ValueError: The name is unknown; from ops inside the block: the backend does not run on their device.
    """
    if name != "auto" and name not in _backends:
        known = ", ".join(repr(known) for known in ("auto", *_backends))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def _choose(requested: str, op: str, device_type: str) -> Backend:
    if requested == "auto":
        for backend in sorted(_backends.values(), key=lambda b: -b.priority):
            if (backend.devices is None or device_type in backend.devices) and not backend.missing():
                return backend
    backend = _backends[requested]
    if backend.devices is not None and device_type not in backend.devices:
        raise ValueError(
            f"{op}: backend {requested!r} was asked for by use_backend, but the data is on {device_type!r} and it runs "
            f"on {', '.join(sorted(backend.devices))} only; move the data there, or use_backend('auto')"
        )
    if backend.missing():
        raise ValueError(
            f"{op}: backend {requested!r} was asked for by use_backend, but {backend.missing()} is missing"
        )
    return backend


_chosen = functools.cache(_choose)


def requested_backend() -> str:
    """What `use_backend` asked for; "auto" outside of it."""
    return _requested.get()


def under(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` where `name` is asked for: gradients on the back end of the value, in whichever thread."""
    if _requested.get() == name:
        return function(*args)
    with use_backend(name):
        return function(*args)


def backend_for(op: str, device: torch.device) -> Backend:
    """The back end on which `op` runs for tensors on `device`.

    Raises:
        ValueError: `use_backend` asked for a backend that does not run on `device`.
    """
    return _chosen(_requested.get(), op, device.type)


@functools.cache
def _ops(backend: Backend) -> Ops:
    return backend.ops()


@functools.cache
def _implementation(requested: str, op: str, device_type: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(_ops(_chosen(requested, op, device_type)), op)
    return function


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function of `Ops` named `op` that runs for tensors on `device`.

    Raises:
        ValueError: As for `backend_for`.
    """
    return _implementation(_requested.get(), op, device.type)
