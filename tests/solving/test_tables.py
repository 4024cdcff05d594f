"""Order conditions of the tables of stochastic Runge-Kutta schemes: a mistyped digit breaks one of them."""

from __future__ import annotations

import numpy as np
import pytest

import sdesolve as sds

ADDITIVE = [sds.SRA1(), sds.SRA3(), sds.SOSRA()]
ELEMENTWISE = [sds.SRIW1(), sds.SRIW2(), sds.SOSRI()]


def lower(rows, stages):
    made = np.zeros((stages, stages))
    for i, row in enumerate(rows):
        made[i, : len(row)] = row
    return made


def drift_conditions(table):
    A0, B0 = lower(table.A0, table.stages), lower(table.B0, table.stages)
    a, e = np.array(table.alpha), np.ones(table.stages)
    return [a @ e - 1, a @ A0 @ e - 1 / 2, a @ B0 @ e - 1, a @ (B0 @ e) ** 2 - 3 / 2], A0 @ e


@pytest.mark.parametrize("solver", [*ADDITIVE, *ELEMENTWISE], ids=repr)
def test_conditions_for_additive_noise(solver):
    """Roessler 2010, theorem 5.1: strong order 3/2; and order 3 on ODEs where that is claimed."""
    table = solver.table
    conditions, c0 = drift_conditions(table)
    a, c1 = np.array(table.alpha), np.array(table.diffusion_times)
    b1, b3 = np.array(table.beta1), np.array(table.beta3)
    conditions += [b1.sum() - 1, b3.sum(), b1 @ c1 - 1, b3 @ c1 + 1]
    if solver.ode_order == 3:
        conditions += [a @ c0**2 - 1 / 3, a @ lower(table.A0, table.stages) @ c0 - 1 / 6]
    assert np.abs(conditions).max() < 1e-13
    assert np.allclose(c0, table.drift_times, atol=1e-15)


@pytest.mark.parametrize("solver", ELEMENTWISE, ids=repr)
def test_conditions_for_diagonal_and_scalar_noise(solver):
    """Roessler 2010, theorem 6.1: strong order 3/2."""
    table = solver.table
    conditions, _ = drift_conditions(table)
    A1, B1, B0 = (lower(rows, table.stages) for rows in (table.A1, table.B1, table.B0))
    e = np.ones(table.stages)
    b = [np.array(row) for row in (table.beta1, table.beta2, table.beta3, table.beta4)]
    for vector, expected in (
        (e, (1, 0, 0, 0)),
        (B1 @ e, (0, 1, 0, 0)),
        (A1 @ e, (1, 0, -1, 0)),
        ((B1 @ e) ** 2, (1, 0, -1, 2)),
        (B1 @ B1 @ e, (0, 0, 0, 1)),
    ):
        conditions += [row @ vector - value for row, value in zip(b, expected, strict=True)]
    conditions.append(b[0] @ A1 @ B0 @ e / 2 + b[2] @ A1 @ B0 @ e / 3)
    assert len(conditions) == 25
    assert np.abs(conditions).max() < 1e-13
