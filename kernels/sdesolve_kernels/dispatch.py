"""Which implementation of an op runs: one place for all ops."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

__all__ = ["backend_for", "backend_module", "requested_backend", "step_function", "use_backend"]


@dataclass(frozen=True)
class _Backend:
    """Where a backend's entry points are. Modules are imported at first use, so that importing this package imports
    neither numba nor triton.
    """

    noise: str  # module with the noise ops
    steps: str  # module with the step ops: the names of `reference_steps`, writing ``out``
    devices: frozenset[str] | None  # kinds of device it runs on; None: any
    package: str  # what must be installed


_BACKENDS = {
    "reference": _Backend("sdesolve_kernels.reference", "sdesolve_kernels.fallback", None, "torch"),
    "numba": _Backend("sdesolve_kernels._numba.fill", "sdesolve_kernels.cpu", frozenset({"cpu"}), "numba"),
    "triton": _Backend("sdesolve_kernels.gpu", "sdesolve_kernels.gpu", frozenset({"cuda"}), "triton"),
}
# What "auto" tries, in order: the first that runs on the device.
_PREFERENCE = ("numba", "triton", "reference")

_requested: contextvars.ContextVar[str] = contextvars.ContextVar("sdesolve_backend", default="auto")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the ``with`` block on one backend.

    The choice is local to the calling thread or task. A backend that cannot run where the data is raises; it never
    falls back to another.

    Args:
        name: "auto" (the fastest that runs on the device), "reference" (plain torch, any device), "numba" (CPU) or
            "triton" (CUDA).

    Raises:
        ValueError: The name is unknown; from ops inside the block: the backend does not run on their device.
    """
    if name != "auto" and name not in _BACKENDS:
        known = ", ".join(repr(known) for known in ("auto", *_BACKENDS))
        raise ValueError(f"unknown backend {name!r}; expected one of {known}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _choose(requested: str, op: str, device_type: str) -> str:
    for name in _PREFERENCE if requested == "auto" else (requested,):
        backend = _BACKENDS[name]
        if backend.devices is not None and device_type not in backend.devices:
            continue
        if _installed(backend.package):
            return name
        if requested != "auto":
            raise ValueError(
                f"{op}: backend {requested!r} was asked for by use_backend, but {backend.package} is missing"
            )
    runs_on = ", ".join(sorted(_BACKENDS[requested].devices or ()))
    raise ValueError(
        f"{op}: backend {requested!r} was asked for by use_backend, but the data is on {device_type!r} and it runs on "
        f"{runs_on} only; move the data there, or use_backend('auto')"
    )


def requested_backend() -> str:
    """What `use_backend` asked for; "auto" outside of it."""
    return _requested.get()


def backend_for(op: str, device: torch.device) -> str:
    """Name of the backend on which `op` runs for tensors on `device`.

    Raises:
        ValueError: `use_backend` asked for a backend that does not run on `device`.
    """
    return _choose(_requested.get(), op, device.type)


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module of a backend's noise ops, imported now if it was not yet."""
    return importlib.import_module(_BACKENDS[name].noise)


@functools.cache
def _step_function(requested: str, op: str, device_type: str) -> Callable[..., Any]:
    name = _choose(requested, op, device_type)
    function: Callable[..., Any] = getattr(importlib.import_module(_BACKENDS[name].steps), op)
    return function


def step_function(op: str, device: torch.device) -> Callable[..., Any]:
    """The implementation of a step op for tensors on `device`.

    Raises:
        ValueError: As for `backend_for`.
    """
    return _step_function(_requested.get(), op, device.type)
