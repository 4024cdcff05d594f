"""The page "which solver" is made from what solvers say, and misses none."""

from __future__ import annotations

from pathlib import Path

import sdesolve as sds
from sdesolve.solvers.adaptive import Adaptive
from sdesolve.solvers.embedded import AbstractEmbedded
from sdesolve.solvers.guide import WHEN, guide
from sdesolve.solvers.superlinear import AbstractModified

PAGE = Path(__file__).parents[2] / "docs" / "which_solver.md"


def test_the_page_is_what_solvers_say_now():
    assert PAGE.read_text() == guide(), "run python -m sdesolve.solvers.guide > docs/which_solver.md"


def test_every_solver_for_any_sde_is_on_it():
    public = [sds.__dict__[name] for name in sds.__all__]
    schemes = [c for c in public if isinstance(c, type) and issubclass(c, sds.AbstractOneStep)]
    listed = {type(solver) for solver in WHEN}

    def is_for_any(scheme):  # a class that is made for some equations has them as an attribute
        wrapper = issubclass(scheme, AbstractModified | AbstractEmbedded | Adaptive) or scheme.__name__.startswith(
            "Abstract"
        )
        return isinstance(scheme.equations, property) and not wrapper

    assert {c for c in schemes if is_for_any(c)} == listed
