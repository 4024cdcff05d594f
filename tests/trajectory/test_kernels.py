"""Compiled kernels: to the bit whatever the batch, the split, the threads and what is saved; random expressions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdesolve as sds

SDE = sds.SDE(
    lambda x, t: torch.sin(x).roll(1, 1) - x,
    lambda x, t: 0.3 + 0.1 * torch.cos(x * t),
    noise="diagonal",
    calculus="ito",
)


def run(x0, t0=0.0, t1=1.0, steps=11, *, noise=None, sde=SDE, **options):
    options = {"solver": sds.EulerMaruyama(), "backend": "fused", **options}
    return sds.solve(sde, x0, t0, t1, steps, noise=noise or sds.BrownianPath(5), **options)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "normal"), (torch.float64, "normal"),
                                             (torch.float32, "two-point"), (torch.float32, "three-point")])  # fmt: skip
def test_a_batch_split_by_paths_gives_the_same_bits(dtype, kind, normals):
    """Around the lanes of a block, whole and at its ends."""
    x0, noise = normals(1000, 3, dtype=dtype), sds.BrownianPath(2**63 + 11, first_path=2**32 - 300, kind=kind)
    whole = run(x0, noise=noise).x1
    for first, count in ((0, 1), (0, 127), (0, 128), (1, 129), (37, 128), (999, 1), (500, 500)):
        part = run(x0[first : first + count], noise=noise.rows(first)).x1
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize(("channels", "kind"), [(1, "normal"), (5, "normal"), (3, "two-point"), (3, "three-point")])
def test_an_integration_split_in_time_gives_the_same_bits(channels, kind, normals):
    """``first_step channels`` takes every remainder of a generator's block of 4 numbers, or 128."""
    x0, noise = normals(7, channels, dtype=torch.float32), sds.BrownianPath(3, kind=kind)
    grid = sds.grids.uniform(0.0, 1.0, 50)
    whole = run(x0, None, None, None, grid=grid, noise=noise, save_at="grid").xs
    for k in (1, 2, 3, 5, 30, 45):
        rest = run(whole[k], None, None, None, grid=grid[k:], noise=noise.after(k), save_at="grid").xs
        assert torch.equal(rest, whole[k:]), k


def test_threads_calls_and_saving_change_no_bit(normals):
    x0 = normals(3000, 3, dtype=torch.float32)
    once = run(x0, steps=64).x1
    assert torch.equal(run(x0, steps=64).x1, once)
    for save_at in ("grid", [0.5, 1.0], [0.123, 0.5, 0.77]):
        assert torch.equal(run(x0, steps=64, save_at=save_at).x1, once)
    moments = run(x0, steps=64, save_at="grid", reduce="moments")
    assert torch.equal(moments.x1, once)
    counts = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(run(x0, steps=64).x1, once)
            again = run(x0, steps=64, save_at="grid", reduce="moments")
            assert torch.equal(again.mean, moments.mean)
            assert torch.equal(again.variance, moments.variance)
    finally:
        torch.set_num_threads(counts)


def test_strides_of_the_start_do_not_matter(normals):
    x0 = normals(130, 6, dtype=torch.float32)
    expected = run(x0[:, ::2].contiguous()).x1
    assert torch.equal(run(x0[:, ::2]).x1, expected)
    assert torch.equal(run(x0[:, ::2].T.contiguous().T).x1, expected)
    assert torch.equal(x0, normals(130, 6, dtype=torch.float32))


def test_one_step_and_very_many(normals, difference):
    """``x' = (1 - h) x + 0.5 dW`` a hundred thousand times, against the sum it stands for."""
    x0, noise = normals(3, 1, dtype=torch.float64), sds.BrownianPath(5)
    sde = sds.SDE(lambda x, t: -x, lambda x, t: 0.5, noise="additive")
    for steps in (1, 100_000):
        dW = noise.increments(sds.grids.uniform(0.0, 1.0, steps), (3, 1), dtype=torch.float64)
        left = (1 - 1 / steps) ** torch.arange(steps, -1, -1, dtype=torch.float64)
        exact = left[0] * x0 + 0.5 * (left[1:, None, None] * dW).sum(0)
        assert (
            difference(run(x0, steps=steps, sde=sde).x1, exact) < 0.1 * steps * torch.finfo(torch.float64).eps + 1e-15
        )


# Random expressions ----------------------------------------------------------------------------------------------
C = torch.linspace(0.5, 2.0, 4, dtype=torch.float64)
P = torch.linspace(-1.0, 1.0, 44, dtype=torch.float64).reshape(11, 4)
UNARY = {
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": lambda a: torch.exp(-a.abs()),
    "log": lambda a: torch.log1p(a.abs()),
    "sqrt": lambda a: (a * a + 1).sqrt(),
    "erf": torch.erf,
    "square": lambda a: torch.tanh(a) ** 2,
    "cube": lambda a: torch.sin(a) ** 3,
    "flip": lambda a: a.flip(1),
    "roll": lambda a: a.roll(1, 1),
    "mean": lambda a: a.mean(1, keepdim=True) + a,
    "softmax": lambda a: a.softmax(1),
    "max": lambda a: a - a.amax(1, keepdim=True),
    "norm": lambda a: a / (1 + a.norm(dim=1, keepdim=True)),
    "scale": lambda a: a * C,
    "clamp": lambda a: a.clamp(max=C).clamp(-0.7),
    "paths": lambda a: a + P,
    "cumsum": lambda a: a.cumsum(1) / 4,
    "cat": lambda a: torch.cat([a[:, 2:], a[:, :2] * 2], 1),
    "outer": lambda a: torch.einsum("bi,bj->bj", a, torch.sin(a)),
    "softplus": torch.nn.functional.softplus,
    "half": lambda a: 0.5 * a,
    "in place": lambda a: a.clone().mul_(2).sub_(1),
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: torch.tanh(a) * b,
    "div": lambda a, b: a / (1 + b * b),
    "max": torch.maximum,
    "min": torch.minimum,
    "where": lambda a, b: torch.where(a > b, a, 0.5 * b),
    "rsub": lambda a, b: torch.rsub(a, b),
    "atan2": lambda a, b: torch.atan2(a, 2 + b * b),
    "lerp": lambda a, b: torch.lerp(a, b, 0.25),
    "hypot": torch.hypot,
    "pow": lambda a, b: (1 + a.abs()) ** torch.tanh(b),
    "fma": lambda a, b: torch.addcmul(a, a, torch.sin(b), value=0.5),
}


def expressions():
    leaves = st.sampled_from(["x", "t", "y"])
    return st.recursive(
        leaves,
        lambda parts: (
            st.tuples(st.sampled_from(sorted(UNARY)), parts) | st.tuples(st.sampled_from(sorted(BINARY)), parts, parts)
        ),
        max_leaves=12,
    )


def evaluated(tree, x, t):
    if isinstance(tree, str):
        return {"x": x, "t": torch.cos(3 * t) * torch.ones_like(x), "y": x * C.to(x.dtype) - t}[tree]
    name, *parts = tree
    values = [evaluated(part, x, t) for part in parts]
    return (UNARY if len(values) == 1 else BINARY)[name](*values).to(x.dtype)


def condition(tree):
    """How often a rounding error may have been doubled on the way."""
    return 0 if isinstance(tree, str) else 1 + max(condition(part) for part in tree[1:])


def compare(tree, both, difference, normals):
    """Functions above stretch errors by at most 4; three steps and both sums add up."""
    sde = sds.SDE(lambda x, t: evaluated(tree, x, t), lambda x, t: 0.1 + 0.1 * torch.sin(x), noise="diagonal")
    fused, eager = both(sde, normals(11, 4), steps=3, check_finite=False)
    assert difference(fused.x1, eager.x1) < 4.0 ** condition(tree) * 64 * torch.finfo(torch.float64).eps


@pytest.mark.slow
@given(tree=expressions())
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_random_expressions(tree, both_interpreted, difference, normals):
    compare(tree, both_interpreted, difference, normals)


@pytest.mark.slow
@given(tree=expressions())
@settings(max_examples=3, suppress_health_check=list(HealthCheck))
def test_random_expressions_in_kernels(tree, both, difference, normals):
    compare(tree, both, difference, normals)
