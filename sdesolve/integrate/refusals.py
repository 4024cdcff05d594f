"""Networks that no kernel was made of, so that a sampler does not search all that they hold in every call.

A refusal that is kept only ever costs speed: the run is then made step by step. It is asked for again as soon as what
is seen at a glance is another, and otherwise after 1, 2, 4, 8 and then every 16 calls, as a change may lie deeper.
"""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Hashable
from typing import Any, final

from torch import nn

from sdesolve.integrate.problem import Problem
from sdesolve.nn.labels import Given
from sdesolve.reverse import ProbabilityFlow, ReverseSDE
from sdesolve.scores.network import NetworkScore

_KEPT, _LONGEST = 64, 16


@final
@dataclasses.dataclass
class _Refusal:
    net: weakref.ref[Any]
    glance: Hashable
    reason: str
    left: int  # calls for which it stands
    wait: int

    def of(self, net: object) -> bool:
        """Whether it is of this network, and not of an earlier one in its place."""
        return self.net() is net


_refusals: dict[Hashable, _Refusal] = {}


def kept(problem: Problem) -> str:
    """Why no kernel was made for a call of this kind with this network; nothing, if that is to be asked again."""
    net = _network(problem)
    if net is None:
        return ""
    held = _refusals.get(_key(problem, net))
    if held is None or held.left == 0 or not held.of(net) or held.glance != _glance(net):
        return ""
    held.left -= 1
    return held.reason


def keep(problem: Problem, reason: str) -> None:
    """Has the next calls of this kind know that none was made."""
    net = _network(problem)
    if net is None:
        return
    key, glance = _key(problem, net), _glance(net)
    before = _refusals.get(key)
    same = before is not None and before.of(net) and before.glance == glance
    wait = min(2 * before.wait, _LONGEST) if before is not None and same else 1
    if before is None and len(_refusals) >= _KEPT:
        _refusals.clear()
    _refusals[key] = _Refusal(weakref.ref(net), glance, reason, wait, wait)


def _network(problem: Problem) -> nn.Module | types.FunctionType | None:
    """The network of a score, in a call of which everything else that matters is known by a key."""
    sde = problem.equation
    if problem.call is None or not isinstance(sde, ReverseSDE | ProbabilityFlow):
        return None
    net = sde.score.net if isinstance(sde.score, NetworkScore) else None
    net = net.net if isinstance(net, Given) else net
    return net if isinstance(net, nn.Module | types.FunctionType) else None


def _key(problem: Problem, net: object) -> Hashable:
    assert problem.call is not None
    return problem.call.key, id(net)


def _glance(net: nn.Module | types.FunctionType) -> Hashable:
    """Identities of what a network holds itself, and of what its own code names."""
    if isinstance(net, types.FunctionType):
        return _of_function(net)
    held = tuple((name, id(value)) for part in (vars(net), net._modules) for name, value in part.items())
    return type(net), held, _of_function(type(net).forward)


def _of_function(function: Any) -> Hashable:
    code = getattr(function, "__code__", None)
    if code is None:
        return id(function)
    cells = tuple(map(_content, function.__closure__ or ()))
    names = tuple(id(function.__globals__.get(name)) for name in code.co_names)
    return code, cells, names, id(function.__defaults__), id(function.__kwdefaults__)


def _content(cell: types.CellType) -> int:
    try:
        return id(cell.cell_contents)
    except ValueError:  # it has none yet
        return 0
