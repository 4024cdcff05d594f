"""Normals and uniforms against the float64 oracle, at the tolerance that kernels/README.md states."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sdesolve_kernels import reference

RELATIVE32 = 4e-7  # of the normal itself; measured 3.2e-7
ABSOLUTE64 = 6e-15  # measured 4.0e-15, most of it the oracle's own rounding
SPLIT = 0xB504F333


def bound(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float64:
        return torch.full_like(exact, ABSOLUTE64)
    return RELATIVE32 * exact.abs() + 1e-14  # the second term is the oracle's error where cos or sin is near zero


@pytest.fixture(scope="module")
def pairs() -> Any:
    """The kernels' Box-Muller on chosen words: a loop that vectorises, so body and tail are both there."""
    import numba
    from sdesolve_kernels._numba.box_muller import normals32, normals64

    def loop(function: Any) -> Any:
        @numba.njit
        def run(w0: Any, w1: Any, x: Any, y: Any) -> None:
            for i in range(w0.size):
                a, b = function(w0[i], w1[i])
                x[i] = a
                y[i] = b

        def call(w0: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
            dtype = np.float32 if function is normals32 else np.float64
            x, y = np.full(w0.numel(), np.nan, dtype), np.full(w0.numel(), np.nan, dtype)
            run(w0.numpy().astype(np.uint32), w1.numpy().astype(np.uint32), x, y)
            return torch.from_numpy(np.stack([x, y]))

        return call

    return {torch.float32: loop(normals32), torch.float64: loop(normals64)}


def edges() -> torch.Tensor:
    centres = [0, 2**23, 2**24, 2**25, 2**29, 2**30, 3 * 2**29, 2**31, 3 * 2**30, SPLIT, 2**32 - 2**24, 2**32 - 1]
    near = torch.arange(-3, 4)
    return torch.cat([c + near for c in centres]).clamp(0, 2**32 - 1).unique()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adversarial_words(pairs: Any, dtype: torch.dtype) -> None:
    w0, w1 = (w.reshape(-1) for w in torch.meshgrid(edges(), edges(), indexing="ij"))
    exact = torch.stack(reference.box_muller(w0, w1))
    got = pairs[dtype](w0, w1).double()
    assert torch.isfinite(got).all()
    assert ((got - exact).abs() <= bound(exact, dtype)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", [0, SPLIT - 2**17, 2**32 - 2**18], ids=["u near 0", "at the split", "u near 1"])
def test_runs_of_consecutive_words(pairs: Any, dtype: torch.dtype, first: int) -> None:
    w0 = torch.arange(first, first + 2**18)
    w1 = torch.randint(2**32, w0.shape, generator=torch.Generator().manual_seed(0))
    exact = torch.stack(reference.box_muller(w0, w1))
    assert ((pairs[dtype](w0, w1).double() - exact).abs() <= bound(exact, dtype)).all()


def test_ends_in_closed_form(pairs: Any) -> None:
    """w0 = 0 is the largest radius, w0 = 2^32 - 1 the smallest; the four axes are exact."""
    w0, w1 = torch.tensor([0, 0, 0, 0, 2**32 - 1]), torch.tensor([0, 2**30, 2**31, 3 * 2**30, 0])
    large, small = math.sqrt(66 * math.log(2)), math.sqrt(-2 * math.log1p(-(2.0**-33)))
    expected = torch.tensor([[large, 0, -large, 0, small], [0, large, 0, -large, 0]], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(pairs[dtype](w0, w1).double(), expected, rtol=RELATIVE32, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 200_001), (60_000, 5)], ids=["rows", "columns"])
def test_normals_against_the_oracle(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    place: dict[str, Any] = {"seed": 2**63 + 11, "stream": 4, "first_path": 2**32 - 2, "offset": 2**34 - 3}
    exact = reference.normal(*shape, **place)
    got = k.normal(*shape, **place, dtype=dtype)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= bound(exact, dtype)).all()


@given(
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 255),
    first_path=st.integers(0, 2**64 - 100),
    offset=st.integers(0, 2**58 - 200),
    paths=st.integers(0, 70),
    count=st.integers(0, 90),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, derandomize=True, max_examples=80)
def test_backends_agree_anywhere(paths: int, count: int, dtype: torch.dtype, **place: Any) -> None:
    with k.use_backend("reference"):
        exact = k.normal(paths, count, dtype=torch.float64, **place)
    got = k.normal(paths, count, dtype=dtype, **place)
    assert got.shape == (paths, count)
    assert ((got.double() - exact).abs() <= bound(exact, dtype)).all()


@pytest.mark.parametrize(
    ("path", "n", "z"), [(4, 2014319, -6.161199588545876), (65, 3610955, 5.703227053884984)], ids=["6.2", "5.7"]
)
def test_tails_beyond_a_clamp_at_1e_minus_7(path: int, n: int, z: float) -> None:
    """Generators that clamp u at 1e-7 stop at 5.68; found by looking through 3e9 of our normals."""
    for dtype in (torch.float32, torch.float64):
        got = k.normal(1, 1, seed=0, first_path=path, offset=n, dtype=dtype)
        assert got.item() == pytest.approx(z, rel=RELATIVE32)
    with k.use_backend("reference"):
        assert k.normal(1, 1, seed=0, first_path=path, offset=n, dtype=torch.float64).item() == pytest.approx(z)


def test_float32_and_float64_are_one_stream() -> None:
    """`torch.randn` gives unrelated numbers in the two."""
    single, double = (k.normal(50, 41, seed=5, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert ((single.double() - double).abs() <= bound(double, torch.float32)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", [k.normal, k.uniform])
def test_16_bit_types_are_the_rounded_float32(dtype: torch.dtype, op: Any) -> None:
    single = op(33, 17, seed=5, stream=6)
    assert torch.equal(op(33, 17, seed=5, stream=6, dtype=dtype), single.to(dtype))
    out = torch.full((17, 33), math.nan, dtype=dtype).T
    assert torch.equal(op(33, 17, seed=5, stream=6, out=out), single.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3001), (3001, 3)])
def test_uniforms_are_the_rounded_words(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    place: dict[str, Any] = {"seed": 3, "stream": 5, "first_path": 2**40, "offset": 7}
    got = k.uniform(*shape, **place, dtype=dtype)
    exact = (k.words(*shape, **place).double() + 0.5) * 2.0**-32
    assert torch.equal(got, exact.to(dtype))
    assert torch.equal(got, reference.uniform(*shape, **place, dtype=dtype))
    assert (exact > 0).all()
    assert (exact < 1).all()
