"""What torch does to the functions it is given: compiles them, differentiates them, maps them over an axis."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from sdesolve_kernels.threads import single_threaded_if_forked
from sdesolve_kernels.transforms import is_mapped, is_transformed

P = ParamSpec("P")
R = TypeVar("R")


def runs_as_it_is(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which torch.compile calls without compiling it, with a break in the graph of its caller.

    It makes kernels of its own. ``torch.compiler.disable`` does this too, but loads the compiler, 3 s, for everybody.
    Calls under a `FakeTensorMode`, which has no values, are refused with a ValueError. In forked processes
    torch keeps to one thread, since others would not come.
    """
    as_it_is: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._len_torch_dispatch_stack() and torch._guards.detect_fake_mode() is not None:
            raise ValueError(
                f"{function.__name__} needs values, and FakeTensorMode holds shapes alone; call it outside of the mode"
            )
        with single_threaded_if_forked():
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not as_it_is:
                as_it_is.append(torch.compiler.disable(function))
            return as_it_is[0](*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = "sdesolve makes kernels of its own"  # type: ignore[attr-defined]
    return call


def refuse_vmap(what: str) -> None:
    """Refuses a call under `torch.func.vmap` of what decides by values.

    Raises:
        ValueError: it is one. ``what`` says who decides on what.
    """
    if is_mapped():
        raise ValueError(
            f"{what}, which torch.func.vmap hides (jacfwd and hessian use it too); give all samples as one batch, and "
            "take jacrev for derivatives"
        )


def refuse_transforms(what: str, remedy: str, why: str = "nothing in it is differentiated") -> None:
    """Refuses a call under any transform of ``torch.func``.

    Raises:
        ValueError: it is one. ``what`` has no derivatives there; ``why``, and ``remedy`` says what has.
    """
    if is_transformed():
        raise ValueError(f"{what} runs under no transform of torch.func: {why}; {remedy}")
