"""Runs of fused integrations beside eager ones, with kernels and without.

A kernel takes most of a second to compile. What lies before it, from contents of functions to the plan of a kernel, is
checked with `Interpreted` in its place: the plan walked in torch, every expression in the dtype that it claims to have.
"""

from __future__ import annotations

import math

import pytest
import torch
from sdesolve_kernels.trajectory.evaluate import _FUNCTIONS
from sdesolve_kernels.trajectory.expressions import topological
from sdesolve_kernels.trajectory.launch import AbstractTrajectory, Moments, Saved, tables
from sdesolve_kernels.trajectory.plan import plan as plan_of

import sdesolve as sds
from sdesolve.integrate import fused as fusing

DTYPES = {"float32": torch.float32, "float64": torch.float64, "int64": torch.int64, "bool": torch.bool}


class Interpreted(AbstractTrajectory):
    """A program whose plan is walked in torch, path by path side by side."""

    source = "interpreted"
    made = 0

    def __init__(self, program, increments):
        self.plan, self.increments = plan_of(program), increments
        Interpreted.made += 1

    def run(self, launch):
        signature, x0 = self.plan.program.signature, launch.x0.detach()
        batch, steps = len(x0), len(launch.times) - 1
        columns, uniforms = tables(self.plan, launch)
        captured = [c.detach().to(DTYPES.get(str(c.dtype)[6:], torch.int64)) for c in launch.captured]
        leaves = {"uniform": uniforms, "captured": captured}
        leaves["invariant"] = self.values(self.plan.invariants, leaves, batch)
        width = sum(math.prod(s) for s in signature.states)
        state = torch.cat([x0.reshape(batch, -1), x0.new_zeros(batch, width - x0[0].numel())], dim=1)
        noise = [self.noise(place, math.prod(m), kind, steps, x0)
                 for place, m, kind in zip(launch.places, signature.noises, self.increments, strict=True)]  # fmt: skip
        saved = [self.observed(state, leaves, x0)] if 0 in launch.saves else []
        for k in range(steps):
            leaves["state"] = state.unbind(1)
            leaves["noise"] = torch.cat([z[k] for z in noise], 1).unbind(1) if noise else ()
            leaves["column"] = columns[k] if len(columns) else ()
            values = self.values(self.plan.states, leaves, batch)
            for e, value in zip(self.plan.states, values, strict=True):
                assert e.dtype == str(x0.dtype)[6:]
                assert value.dtype == x0.dtype
            state = torch.stack(values, 1)
            if k + 1 in launch.saves:
                saved.append(self.observed(state, leaves, x0))
        x1 = state[:, : x0[0].numel()].reshape(x0.shape)
        states = torch.stack(saved) if saved else None
        if launch.moments:
            return Saved(x1, None, Moments(states.double().mean(1), states.double().var(1)))
        return Saved(x1, states, None)

    @staticmethod
    def noise(place, m, kind, steps, x0):
        seed, stream, first_path, first = place
        path = sds.BrownianPath(seed, first_path=first_path, first_step=first, stream=stream, kind=kind)
        units = torch.arange(steps * m + 1, dtype=torch.float64)
        z = path.increments(units, (len(x0), 1), dtype=x0.dtype)
        return z.reshape(steps, m, len(x0)).transpose(1, 2)

    def observed(self, state, leaves, x0):
        if self.plan.program.observed_shape is None:
            return state[:, : x0[0].numel()]
        leaves["state"] = state.unbind(1)
        values = self.values(self.plan.observed, leaves, len(state))
        return torch.stack(values, 1) if values else state[:, :0]

    def values(self, roots, leaves, batch):
        value = {}
        for e in topological(roots):
            value[e.number] = self.value(e, [value[a.number] for a in e.args], leaves)
            assert value[e.number].dtype == DTYPES[e.dtype], e.op
        return [value[e.number].expand(batch) for e in roots]

    def value(self, e, args, leaves):
        match e.op:
            case "const":
                return torch.tensor(e.data, dtype=DTYPES[e.dtype])
            case "state" | "noise":
                return leaves[e.op][e.data[1]]
            case "column" | "uniform" | "invariant":
                return leaves[e.op][e.data].to(DTYPES[e.dtype])
            case "path":
                row = leaves["captured"][e.data[1]]
                return row.reshape(len(row), -1)[:, e.data[2]]
            case "cast":
                return args[0].to(DTYPES[e.dtype])
            case "sum":
                return sum(args[1:], args[0])
            case "product":
                m, entries = e.data, leaves["captured"][e.data.parameter].contiguous()
                places = [[m.offset + i * m.down + j * m.across for j in range(m.columns)] for i in range(m.rows)]
                return entries.reshape(-1)[torch.tensor(places)] @ torch.stack(torch.broadcast_tensors(*args))
            case "element":
                return args[0][e.data]
            case name:
                return _FUNCTIONS[name](*args)


@pytest.fixture(autouse=True)
def no_kernels_kept(monkeypatch):
    """Each test traces and compiles its own."""
    monkeypatch.setattr(fusing, "_kernels", type(fusing._kernels)())


@pytest.fixture
def interpreted(monkeypatch):
    """Fused runs without a kernel; ``interpreted.made`` counts what would have been compiled."""
    monkeypatch.setattr(fusing, "compile_trajectory", Interpreted)
    monkeypatch.setattr(Interpreted, "made", 0)
    return Interpreted


def difference(a, b):
    """The largest error of ``a`` in units of ``1 + |b|``; nan and infinities must be in the same places."""
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    same = (a == b) | a.isnan()
    return ((a - b).abs() / (1 + b.abs()))[~same].max().item() if not bool(same.all()) else 0.0


@pytest.fixture(name="difference")
def difference_fixture():
    return difference


@pytest.fixture
def both():
    """The same integration, fused and eager."""

    def run(sde, x0, t0=0.0, t1=1.0, steps=4, *, solver=None, **options):
        options = {"solver": solver or sds.EulerMaruyama(), "seed": 1, **options}
        if "noise" in options:
            del options["seed"]
        return [sds.solve(sde, x0, t0, t1, steps, backend=backend, **options) for backend in ("fused", "eager")]

    return run


@pytest.fixture
def normals():
    """Fixed standard normals, ``(*shape)``."""

    def make(*shape, dtype=torch.float64, seed=0):
        z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return z.to(dtype)

    return make


@pytest.fixture
def refused(both):
    """Says why a drift cannot be fused; ``auto`` must give the eager result then."""

    def why(drift, x0, **options):
        sde = sds.SDE(drift, lambda x, t, *p: 0.1 * x) if not isinstance(drift, sds.SDE | sds.ODE) else drift
        options = {"solver": sds.EulerMaruyama(), "seed": 1, **options}
        with pytest.raises(ValueError, match="cannot be fused") as error:
            sds.solve(sde, x0, 0.0, 1.0, 2, backend="fused", **options)
        return str(error.value)

    return why


@pytest.fixture
def both_interpreted(both, interpreted):
    """`both`, without kernels."""
    return both
