"""The elementary functions of generated kernels: error in ulp, special values, and that lanes are vectors."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import mpmath
import numba
import numpy as np
import pytest
import torch
from sdesolve_kernels._numba.functions import FUNCTIONS

# Largest error in ulp of the result, float32 and float64. What was seen lies up to a third below.
ULP = {
    "exp": (1.1, 1.1),
    "expm1": (1.3, 1.3),
    "log": (1.0, 1.2),
    "log1p": (1.5, 1.2),
    "sin": (1.55, 1.3),
    "cos": (1.55, 1.3),
    "tan": (2.6, 2.5),
    "sinh": (2.0, 1.9),
    "cosh": (1.7, 1.7),
    "tanh": (2.6, 1.6),
    "asinh": (2.0, 2.3),
    "asin": (1.3, 1.3),
    "acos": (1.3, 1.3),
    "atan": (1.4, 1.4),
    "atan2": (1.6, 1.7),
    "erf": (1.4, 1.2),
    "pow": (0.6, 1.3),
}
EXACT = ["floor", "ceil", "trunc", "round", "sign", "abs", "minimum", "maximum"]
BINARY = ["atan2", "pow", "minimum", "maximum"]
NAMES = [*ULP, *EXACT]
DTYPES = ["float32", "float64"]
# Up to here an argument of sin, cos and tan is reduced in full.
REDUCED = {"float32": 2.0**21, "float64": 2.0**50}


@functools.cache
def compiled(name: str, dtype: str) -> Any:
    """A loop over lanes of one function, with the options of the kernels."""
    function, lanes = FUNCTIONS[name, dtype], getattr(numba, dtype)[::1]

    def unary(x: Any, out: Any) -> None:
        for i in range(out.shape[0]):
            out[i] = function(x[i])

    def binary(x: Any, y: Any, out: Any) -> None:
        for i in range(out.shape[0]):
            out[i] = function(x[i], y[i])

    arguments, loop = ([lanes] * 3, binary) if name in BINARY else ([lanes] * 2, unary)
    # Not from the cache on disk: what comes from there shows no LLVM IR.
    return numba.njit(numba.void(*arguments), error_model="numpy", boundscheck=False)(loop)


def call(name: str, *arguments: Any) -> Any:
    out = np.empty_like(arguments[0])
    compiled(name, out.dtype.name)(*arguments, out)
    return out


def in_torch(name: str, *arguments: Any) -> Any:
    return getattr(torch, name)(*map(torch.from_numpy, arguments)).numpy()


def numbers(dtype: str, count: int, seed: int = 0) -> Any:
    """Random bits, so every exponent, infinities and NaN."""
    bits = np.random.default_rng(seed).integers(0, 2 ** (8 * np.dtype(dtype).itemsize), count, dtype=np.uint64)
    return bits.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)


def same(x: Any, y: Any) -> Any:
    """Equal as numbers, with the sign of zero, or both NaN."""
    return ((x == y) & (np.signbit(x) == np.signbit(y))) | (np.isnan(x) & np.isnan(y))


def arguments(name: str, dtype: str, count: int) -> tuple[Any, ...]:
    """Where each function is neither 0 nor infinite nor NaN, with more of them where the formulas change."""
    draw = np.random.default_rng(1)
    top = 127 if dtype == "float32" else 1022
    digits = 24 if dtype == "float32" else 53

    def between(low: float, high: float) -> Any:
        return draw.uniform(low, high, count)

    def sizes(low: float, high: float) -> Any:
        return draw.choice([-1.0, 1.0], count) * 2.0 ** between(low, high)

    if name == "pow":
        x = np.concatenate([2.0 ** between(-top, top), between(0.5, 2), between(0, 10), between(-10, 10)])
        y = between(-top, top) / np.log2(x[:count]), 100 * between(-1, 1), between(-5, 5), np.rint(between(-20, 20))
        return x.astype(dtype), np.concatenate(y).astype(dtype)
    if name == "atan2":
        points = [(between(-1, 1), between(-1, 1)), (sizes(-top, top), sizes(-top, top)), (sizes(-5, 5), sizes(-5, 5))]
        return tuple(np.concatenate(p).astype(dtype) for p in zip(*points, strict=True))
    largest = {"exp": 0.7 * top, "expm1": 0.69 * top, "sinh": 0.69 * (top + 1), "cosh": 0.69 * (top + 1), "tanh": 20}
    largest |= {"asin": 1.0, "acos": 1.0, "erf": 6.0, "sin": 1e5, "cos": 1e5, "tan": 1e5}
    bound = largest.get(name, 2.0**top)
    x = [sizes(-top - digits, math.log2(bound)), between(-1, 1) * min(bound, 1e300), between(-2, 2), between(-0.5, 0.5)]
    x += [draw.choice([-1, 1], count) * (1 - 2.0 ** between(-digits, 0)), draw.normal(size=count)]
    if name in ("sin", "cos", "tan"):
        x += [draw.integers(-(2**20), 2**20, count) * (math.pi / 2), between(-1, 1) * REDUCED[dtype]]
    x = np.concatenate(x).astype(dtype)
    if name == "log":
        x = abs(x)
    keep = np.isfinite(x) & (abs(x) <= bound) & (x >= -1 if name == "log1p" else True)
    return (x[keep & (x != 0)],)


def error(got: Any, want: Any) -> float:
    """Largest error in ulp of `want`, which has more digits."""
    form = np.finfo(got.dtype)
    worst = 0.0
    for g, w in zip(got.tolist(), want, strict=True):
        if not math.isfinite(g):
            assert math.copysign(abs(w), g) == w, (g, w)
            assert abs(w) > (1 - form.epsneg) * float(form.max), (g, w)
            continue
        exponent = max(math.frexp(float(w))[1], form.minexp + 1)
        worst = max(worst, float(mpmath.ldexp(abs(g - w), form.nmant + 1 - exponent)))
    return worst


@pytest.mark.parametrize("name", ULP)
def test_float32_is_within_its_ulp_of_float64(name):
    x = arguments(name, "float32", 8000)
    want = in_torch(name, *(a.astype(np.float64) for a in x))
    assert error(call(name, *x), want) <= ULP[name][0]


@pytest.mark.parametrize("name", ULP)
def test_float64_is_within_its_ulp_of_longer_arithmetic(name):
    x = arguments(name, "float64", 250)
    exact = mpmath.power if name == "pow" else getattr(mpmath, name)
    with mpmath.workprec(200):
        want = [exact(*map(mpmath.mpf, point)) for point in zip(*(a.tolist() for a in x), strict=True)]
        assert error(call(name, *x), want) <= ULP[name][1]


def special(dtype: str) -> Any:
    form = np.finfo(dtype)
    sizes = [0, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 20, 100, 1e4, 2**24, 2**24 + 2, 1e-20, 1e20, 87, 103, 104, 150, 708]
    sizes += [745, 746, math.inf, form.max, form.max / 2, form.tiny, form.tiny / 3, 7 * form.smallest_subnormal]
    sizes += [form.eps, form.eps / 8, 1 + form.eps, 1 - form.epsneg]
    x = np.array([*sizes, math.nan], dtype)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_special_values_are_those_of_torch(name, dtype):
    x = special(dtype)
    points = [p.ravel().copy() for p in np.meshgrid(x, x)] if name in BINARY else [x]
    if name in ("sin", "cos", "tan"):
        points = [x[~((abs(x) > REDUCED[dtype]) & np.isfinite(x))]]
    # torch in float64, rounded: its own float32 flushes some subnormal numbers to zero.
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = in_torch(name, *(p.astype(np.float64) for p in points)).astype(dtype)
        got = call(name, *points)
        close = abs(got - want) <= 4 * np.finfo(dtype).eps * abs(want) + np.finfo(dtype).smallest_subnormal
    close &= (np.signbit(got) == np.signbit(want)) & np.isfinite(want)
    if name in EXACT:
        close[:] = False
    if name in ("minimum", "maximum"):
        close |= (got == 0) & (want == 0)  # torch itself returns either zero, by the length of the tensor
    wrong = np.flatnonzero(~(same(got, want) | close))
    assert wrong.size == 0, [(*(p[i] for p in points), got[i], want[i]) for i in wrong[:9]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_exact_functions_are_those_of_torch(name, dtype):
    x = np.concatenate([numbers(dtype, 4000), np.arange(-300, 300, 0.25, dtype)])
    points = (x, x[::-1].copy()) if name in BINARY else (x,)
    assert same(call(name, *points), in_torch(name, *points)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_and_trivial_powers_are_exact(dtype):
    x, n = (p.ravel().astype(dtype) for p in np.meshgrid(np.arange(1, 21), np.arange(6)))
    assert (call("pow", x, n) == x.astype(np.float64) ** n).all()
    y = np.concatenate([special(dtype), numbers(dtype, 100)])
    one = np.ones_like(y)
    assert (call("pow", y, 0 * one) == 1).all()
    assert (call("pow", one, y) == 1).all()
    assert (call("pow", -one[:2], np.array([-math.inf, math.inf], dtype)) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_value_lies_beyond_its_bound(dtype):
    x = np.concatenate([numbers(dtype, 4000), np.linspace(-40, 40, 9001).astype(dtype)])
    for name in ("sin", "cos", "tanh", "erf"):
        y = call(name, x)
        assert abs(y[~np.isnan(y)]).max() <= 1
    assert (call("cosh", x)[~np.isnan(x)] >= 1).all()
    assert (call("tanh", np.array([math.inf, 40], dtype)) == 1).all()
    assert (call("erf", np.array([math.inf, 40], dtype)) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_too_long_to_reduce_count_as_multiples_of_two_pi(dtype):
    x = np.array([1.001 * REDUCED[dtype], 1e30, np.finfo(dtype).max], dtype)
    x = np.concatenate([x, -x])
    assert (call("sin", x) == 0).all()
    assert (call("cos", x) == 1).all()
    assert (call("tan", x) == 0).all()
    below = np.array([0.999 * REDUCED[dtype]], dtype)
    assert abs(call("sin", below)) > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_lane_alone_has_the_same_bits(name, dtype):
    """A vector body, its narrower remainder and the scalar tail agree."""
    x = np.concatenate([numbers(dtype, 300, seed=2), np.random.default_rng(2).normal(size=211).astype(dtype)])
    points = (x, x[::-1].copy()) if name in BINARY else (x,)
    together = call(name, *points)
    alone = np.concatenate([call(name, *(p[i : i + 1] for p in points)) for i in range(len(x))])
    assert same(together, alone).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_lanes_are_vectors(name, dtype):
    """The optimised loop stores vectors, and calls nothing that is not an instruction of its own."""
    (code,) = compiled(name, dtype).inspect_llvm().values()
    (loop,) = re.findall(r"^define [^\n]*@_ZN(?!7cpython).*?^}", code, re.DOTALL | re.MULTILINE)
    kind = {"float32": "float|i32", "float64": "double|i64"}[dtype]
    assert re.search(rf"store <\d+ x (?:{kind})>", loop)
    instructions = r"llvm\.(fma|fabs|copysign|sqrt|floor|ceil|trunc|rint|is.fpclass|[su]max|[su]min)\."
    called = re.findall(r"call [^@\n]*@\"?([\w.]+)", loop)
    assert not [c for c in called if not re.match(instructions, c)]


def test_every_function_is_tested_in_both_precisions():
    assert set(FUNCTIONS) == {(name, dtype) for name in NAMES for dtype in DTYPES}
    assert all(f.__name__ == f"{name}_{dtype}" for (name, dtype), f in FUNCTIONS.items())
