"""The same place has the same bits, whatever was asked for around it and however it was computed."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64]


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_a_short_draw_is_the_start_of_a_long_one(dtype: torch.dtype) -> None:
    """`torch.randn(24)[:8]` is not `torch.randn(8)`."""
    long = k.normal(1, 24, seed=0, dtype=dtype)
    assert torch.equal(long[:, :8], k.normal(1, 8, seed=0, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_and_offset(dtype: torch.dtype) -> None:
    """Lengths up to 80 cover the vector body and the scalar tail of each loop, in every alignment to blocks."""
    long = k.normal(1, 100, seed=3, dtype=dtype)[0]
    wide = k.normal(400, 12, seed=3, dtype=dtype)
    for offset in range(9):
        for count in range(80):
            assert torch.equal(k.normal(1, count, seed=3, offset=offset, dtype=dtype)[0], long[offset : offset + count])
    for paths in range(32, 112):
        assert torch.equal(k.normal(paths, 5, seed=3, offset=3, dtype=dtype), wide[:paths, 3:8])
        assert torch.equal(k.normal(paths, 1, seed=3, first_path=200, dtype=dtype), wide[200 : 200 + paths, :1])


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=60)
def test_any_window_of_a_matrix(dtype: torch.dtype, data: st.DataObject) -> None:
    paths, count = data.draw(st.sampled_from([(90, 200), (1500, 24), (5, 3000)]))
    whole = k.normal(paths, count, seed=7, stream=2, first_path=11, offset=6, dtype=dtype)
    top, left = data.draw(st.integers(0, paths)), data.draw(st.integers(0, count))
    bottom, right = data.draw(st.integers(top, paths)), data.draw(st.integers(left, count))
    window = k.normal(bottom - top, right - left, seed=7, stream=2, first_path=11 + top, offset=6 + left, dtype=dtype)
    assert torch.equal(window, whole[top:bottom, left:right])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 700_001), (7, 100_003), (150_001, 3), (150_001, 1)])
def test_thread_count(dtype: torch.dtype, shape: tuple[int, int], threads: Any) -> None:
    draws = []
    for n in (1, 2, 3, 5):
        threads(n)
        draws.append(k.normal(*shape, seed=8, offset=2, dtype=dtype))
    assert all(torch.equal(draw, draws[0]) for draw in draws[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_kernels_in_any_tiles_and_pieces(dtype: torch.dtype) -> None:
    """Calls the kernels below the op, where the choice between them, tiles and cuts are ours."""
    from sdesolve_kernels._numba.noise import columns, rows

    paths, count, offset = 67, 61, 2**34 - 30
    expected = k.normal(paths, count, seed=1, first_path=5, offset=offset, dtype=dtype).numpy()
    counter = np.array((1, 0, 5, offset), np.uint64)
    blocks = (offset % 4 + count + 3) // 4
    for kernel, total in ((rows("normal"), paths * blocks), (columns("normal"), paths)):
        for tile in (1, 3, 16, 50, 512):
            for pieces in (1, 2, 7):
                flat = np.full(paths * count, np.nan, expected.dtype)
                cuts = [total * i // pieces for i in range(pieces + 1)]
                for start, stop in itertools.pairwise(cuts):
                    kernel(flat, (count, 0, 1), count, counter, count, start, stop, tile)
                assert (flat.reshape(paths, count) == expected).all()


def layouts(paths: int, steps: int, m: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of shape (paths, ...) holding steps * m entries a path, full of NaN."""

    def nan(*shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype)

    return {
        "plain": nan(paths, steps * m),
        "three-dimensional": nan(paths, steps, m),
        "steps first": nan(steps, paths, m).transpose(0, 1),
        "entries first": nan(steps * m, paths).T,
        "channels last": nan(paths, m, steps).permute(0, 2, 1),
        "all reversed": nan(m, steps, paths).permute(2, 1, 0),
        "every second": nan(2 * paths, 2 * steps * m)[::2, ::2],
        "inside a larger one": nan(paths + 3, steps + 2, m + 1)[1:-2, 1:-1, 1:],
        "four levels": nan(steps, 2, m, 3, paths, 2)[:, 0, :, 1, :, 1].permute(2, 0, 1),
        "with ones": nan(paths, 1, steps, 1, m),
        "not mergeable": nan(paths, 4, m + 1, 6)[:, :2, :m, : steps // 2].transpose(2, 3)
        if steps % 2 == 0 and steps <= 12
        else nan(paths, steps, m),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(700, 6, 3), (1, 90, 4), (40, 10, 30), (300, 4, 1), (3, 2, 500), (33, 1, 1)])
@pytest.mark.parametrize("offset", [0, 3])
def test_layout_of_out(dtype: torch.dtype, shape: tuple[int, int, int], offset: int) -> None:
    paths, steps, m = shape
    expected = k.normal(paths, steps * m, seed=2, first_path=9, offset=offset, dtype=dtype)
    for name, out in layouts(*shape, dtype).items():
        returned = k.normal(paths, steps * m, seed=2, first_path=9, offset=offset, out=out)
        assert returned is out
        assert torch.equal(out.reshape(paths, steps * m), expected), name


def test_out_leaves_the_rest_alone() -> None:
    for shape in ((60, 70, 5), (4, 300, 5), (200, 7, 9)):
        whole = torch.full(shape, math.nan)
        k.normal(shape[0] - 2, shape[1] - 4, seed=0, out=whole[1:-1, 2:-2, 3])
        written = torch.zeros(shape, dtype=torch.bool)
        written[1:-1, 2:-2, 3] = True
        assert torch.equal(whole.isfinite(), written)


def test_callers_in_many_threads(threads: Any) -> None:
    threads(2)
    expected = k.normal(1, 400_000, seed=4)
    with ThreadPoolExecutor(6) as pool:
        draws = list(pool.map(lambda _: k.normal(1, 400_000, seed=4), range(18)))
    assert all(torch.equal(draw, expected) for draw in draws)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork(threads: Any) -> None:
    """A data loader's worker is a fork; a pool of threads does not survive one, so the child must make its own."""
    threads(2)
    expected = k.normal(1, 400_000, seed=4).numpy()
    child = os.fork()
    if child == 0:
        same = False
        try:
            same = bool((k.normal(1, 400_000, seed=4).numpy() == expected).all())
        finally:
            os._exit(0 if same else 1)
    deadline = time.monotonic() + 20
    pid, status = os.waitpid(child, os.WNOHANG)
    while pid == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
        pid, status = os.waitpid(child, os.WNOHANG)
    if pid == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
