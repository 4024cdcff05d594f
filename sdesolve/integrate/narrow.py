"""Flows whose states have 16 bits: steps are made in float32, and functions and networks compute in 16."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from sdesolve._internal.precision import NARROW, networks_in_their_own
from sdesolve.integrate.solution import Solution
from sdesolve.reverse import ProbabilityFlow
from sdesolve.scores.network import NetworkScore
from sdesolve.sde import ODE, AbstractSDE, Noise

P = ParamSpec("P")
R = TypeVar("R")


def is_narrow(x: Any) -> bool:
    """Whether ``x`` is a tensor of float16 or bfloat16."""
    return isinstance(x, Tensor) and x.dtype in NARROW


def flows_in_16_bits(solve: Callable[P, R]) -> Callable[P, R]:
    """`solve`, with ODEs from 16-bit states as flows in float32; it refuses noise, small steps of which vanish."""

    @functools.wraps(solve)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x0 = args[1] if len(args) > 1 else kwargs.get("x0")
        if not is_narrow(x0):
            return solve(*args, **kwargs)
        sde = args[0] if args else kwargs.get("sde")
        if not isinstance(sde, AbstractSDE) or sde.noise is not Noise.NONE:
            return solve(*args, **kwargs)
        assert isinstance(x0, Tensor)
        rest: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in ("sde", "x0")}
        of_any: Callable[..., R] = solve
        with networks_in_their_own():
            return narrowed(of_any(_in(sde, x0.dtype), x0.float(), *args[2:], **rest), x0.dtype)

    return call


def narrowed(result: Any, dtype: torch.dtype) -> Any:
    """A result of floats, in 16 bits; what a run goes on from keeps the digits that it has."""
    if isinstance(result, Tensor):
        return result.to(dtype)
    if isinstance(result, Solution):
        return dataclasses.replace(result, x1=result.x1.to(dtype), xs=result.xs.to(dtype))
    return result


def function_in(function: Any, dtype: torch.dtype) -> Any:
    """A drift or score that is a plain function or module, called with states of 16 bits; others as they are."""
    plain = isinstance(function, types.FunctionType | types.MethodType | nn.Module)
    if not plain or isinstance(function, NetworkScore):
        return function

    def call(x: Tensor, t: Tensor, *more: Any) -> Any:
        value = function(x.to(dtype), t, *more)
        return value.to(x.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return call


def _in(sde: AbstractSDE, dtype: torch.dtype) -> AbstractSDE:
    if isinstance(sde, ProbabilityFlow):
        return ProbabilityFlow(sde.forward, function_in(sde.score, dtype))
    return ODE(function_in(sde._drift if isinstance(sde, ODE) else sde.drift, dtype))
