"""Problems with known answers, by schemes found from what they say of themselves; `benchmarks.problems` runs them all.

Every problem and every scheme has its turn here: each problem is given to the scheme that applies and was least used so
far. 3000 paths leave standard errors of 1.8% of a standard deviation; along known solutions, of a percent of that.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

import sdesolve as sds
from benchmarks.problems import PROBLEMS, equation_for, label, measure, schemes

PATHS = 3000


def turns():
    """A scheme for each problem; and those that remain, each on the first problem that it applies to."""
    used: Counter[str] = Counter()
    for name, problem in PROBLEMS.items():
        solver = min((s for s in schemes() if equation_for(problem, s) is not None), key=lambda s: used[label(s)])
        used[label(solver)] += 1
        yield name, solver
    for solver in schemes():
        if not used[label(solver)]:
            yield next(name for name, problem in PROBLEMS.items() if equation_for(problem, solver) is not None), solver


@pytest.mark.parametrize(("name", "solver"), list(turns()), ids=lambda v: v if isinstance(v, str) else label(v))
def test_expectations(name, solver):
    """Within four standard errors and what the order allows, found from two step sizes on the same paths."""
    for found in measure(PROBLEMS[name], solver, PATHS):
        assert found.share <= 1.0, found


def test_a_wrong_coefficient_is_seen():
    """A drift that is 10% too strong is no error of the order."""
    problem = PROBLEMS["P1 geometric Brownian motion, ito"]
    wrong = sds.GeometricBrownianMotion(1.1 * 1.01, 0.87)
    for solver in (sds.EulerMaruyama(), sds.SRIW1()):
        found = measure(dataclasses.replace(problem, sde=wrong), solver, PATHS)
        assert max(f.share for f in found) > 1.5


@pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if not p.commutes])
def test_schemes_for_noise_that_commutes_are_refused(name):
    """What the table leaves out, `solve` refuses."""
    problem = PROBLEMS[name]
    x0 = torch.tensor([problem.x0], dtype=torch.float64)
    for solver in schemes():
        if solver.commutative_noise and (problem.sde.calculus, problem.sde.noise) in solver.supported:
            with pytest.raises(ValueError, match="commutes"):
                sds.solve(problem.sde, x0, 0.0, problem.t1, 4, solver=solver, seed=0)
