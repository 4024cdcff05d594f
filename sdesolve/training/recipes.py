"""How a score is made again: classes of this library and their arguments, as JSON."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdesolve import diffusions, nn
from sdesolve._internal.arguments import short
from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.diffusions.edm import EDM
from sdesolve.diffusions.table import TableBeta
from sdesolve.diffusions.vp import AbstractBetaSchedule
from sdesolve.nn.embeddings import FourierFeatures
from sdesolve.nn.normalizer import Normalizer
from sdesolve.nn.rebuilding import MADE_WITH
from sdesolve.scores.network import NetworkScore

_MOST = 1 << 16  # numbers of a tensor that is written out
_DTYPES = {str(d): d for d in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)}


def described(score: object) -> dict[str, Any] | None:
    """The recipe of a score, or ``None`` where one of its parts does not tell how it was made."""
    if not isinstance(score, NetworkScore):
        return None
    dtypes = {str(p.dtype) for p in score.net.parameters()} if isinstance(score.net, torch.nn.Module) else set()
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return None
    try:
        return {
            "net": _written(score.net), "process": _written(score.process), "predicts": score.predicts,
            "sigma_data": score.sigma_data, "normalizer": _written(score.normalizer),
            "dtype": next(iter(dtypes), str(torch.float32)),
        }  # fmt: skip
    except _Unknown:
        return None


def unknown_part(score: NetworkScore) -> str:
    """The class of the part that keeps a score from being described."""
    for part in (score.net, score.process, score.normalizer):
        try:
            _written(part)
        except _Unknown as problem:
            return str(problem)
    return "parameters of several dtypes"


def made(recipe: Any, networks: Sequence[type] = ()) -> NetworkScore:
    """The score of a recipe, with fresh weights.

    Args:
        recipe: what `described` gave.
        networks: classes besides those of this library that it may name.

    Raises:
        ValueError: it names another class, or is not a recipe.
    """
    classes = _classes() | {kind.__name__: kind for kind in networks}
    try:
        net = _read(recipe["net"], classes)
        net.to(_DTYPES[recipe["dtype"]])
        return NetworkScore(
            net,
            _read(recipe["process"], classes),
            recipe["predicts"],
            recipe["sigma_data"],
            normalizer=_read(recipe["normalizer"], classes),
        )
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as problem:
        raise ValueError(f"its recipe makes no score: {short(str(problem))}") from problem


class _Unknown(Exception):
    """A part that cannot be described."""


def _classes() -> dict[str, type]:
    """Classes that a file may name: networks, and processes and their schedules."""
    found = {name: getattr(package, name) for package in (nn, diffusions) for name in package.__all__}
    kinds = (torch.nn.Module, AbstractDiffusion, AbstractBetaSchedule)
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, kinds)}


def _written(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor) and value.numel() <= _MOST and str(value.dtype) in _DTYPES:
        return {"tensor": value.detach().tolist(), "dtype": str(value.dtype)}
    if isinstance(value, tuple):
        return {"tuple": [_written(entry) for entry in value]}
    if isinstance(value, list):
        return [_written(entry) for entry in value]
    arguments = _arguments(value)
    return {"class": type(value).__name__, "arguments": {name: _written(v) for name, v in arguments.items()}}


def _arguments(value: Any) -> Mapping[str, Any]:
    """What an object was made with, read off it."""
    kind = type(value)
    remembered = getattr(value, MADE_WITH, None)
    if remembered is not None:
        return remembered
    if isinstance(value, TableBeta):
        steps = torch.arange(1, value.steps + 1, dtype=torch.float64)
        return {"alphas_cumprod": (-value.integral(steps)).exp()}
    if isinstance(value, EDM):
        return {"sigma_min": value.t_min, "sigma_max": value.t_max, "rho": value.rho}
    own = isinstance(value, FourierFeatures | Normalizer | AbstractDiffusion | AbstractBetaSchedule)
    names = list(inspect.signature(kind).parameters) if own and _classes().get(kind.__name__) is kind else []
    if not names or not all(hasattr(value, name) for name in names):
        raise _Unknown(kind.__name__)
    held = {name: getattr(value, name) for name in names}
    if any(callable(v) and not isinstance(v, AbstractBetaSchedule | torch.nn.Module) for v in held.values()):
        raise _Unknown(kind.__name__)
    return held


def _read(written: Any, classes: Mapping[str, type]) -> Any:
    if isinstance(written, list):
        return [_read(entry, classes) for entry in written]
    if not isinstance(written, dict):
        return written
    if "float" in written:
        return float(written["float"])
    if "tensor" in written:
        return torch.tensor(written["tensor"], dtype=_DTYPES[written["dtype"]])
    if "tuple" in written:
        return tuple(_read(entry, classes) for entry in written["tuple"])
    kind = classes.get(written["class"])
    if kind is None:
        raise ValueError(
            f"it was made with {short(written['class'])}, which is no class of sdesolve: give it, "
            "load_score(path, networks=[...]), or make the score and load(score, path)"
        )
    return kind(**{name: _read(value, classes) for name, value in written["arguments"].items()})
