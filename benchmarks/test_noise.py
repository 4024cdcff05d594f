"""Normals: this library's against torch's, by type, layout and number of threads.

``python -m pytest benchmarks/test_noise.py``; the speedups over ``torch.randn``, timed in the same rounds, are in
``extra_info`` and on the terminal with ``-s``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference
from torch import Tensor

# Benchmarks are not a package: the helper beside this file is loaded by its path.
_spec = importlib.util.spec_from_file_location("sdesolve_interleave", Path(__file__).with_name("interleave.py"))
assert _spec is not None
assert _spec.loader is not None
_helper = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _helper
_spec.loader.exec_module(_helper)

LAYOUTS = {
    "1 x 4194304": (1, 1 << 22),
    "1 x 65536": (1, 1 << 16),
    "4096 x 1024": (4096, 1024),
    "131072 x 3": (131072, 3),
    "65536 x 1": (65536, 1),
    "65536 x 16": (65536, 16),
    "64 x 3072": (64, 3072),
    "1024 x 2": (1024, 2),
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(z: Tensor, paths: int, count: int) -> None:
    """Correct before fast: the corner that the oracle makes quickly, and the moments of all."""
    rows, columns = min(paths, 257), min(count, 1031)
    exact = reference.normal(rows, columns, seed=3, stream=k.Stream.DRIVING, offset=6)
    torch.testing.assert_close(z[:rows, :columns].double(), exact, rtol=4e-7, atol=1e-14)
    n = z.numel()
    assert abs(z.double().mean()) < 5 / n**0.5
    assert abs(z.double().var() - 1) < 5 * (2 / n) ** 0.5


def report(benchmark: Any, ours: Any, theirs: Any, normals: int) -> None:
    benchmark.extra_info |= ours.summary() | {
        "ns_per_normal": float(f"{ours.median / normals * 1e9:.3g}"),
        "torch_randn_median_us": float(f"{theirs.median * 1e6:.4g}"),
        "torch_randn_ns_per_normal": float(f"{theirs.median / normals * 1e9:.3g}"),
    }
    print(
        f"\n{benchmark.name}: {ours.median * 1e6:.1f} us, {ours.median / normals * 1e9:.2f} ns a normal, "
        f"{ours.speedup:.1f} x torch.randn (quartiles {ours.speedup_lower:.1f} to {ours.speedup_upper:.1f})"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normal(benchmark: Any, layout: str, dtype: torch.dtype, threads: int) -> None:
    shape = LAYOUTS[layout]

    def ours() -> Tensor:
        return k.normal(*shape, seed=3, offset=6, dtype=dtype)

    check(ours(), *shape)
    timings = _helper.interleave(
        {"ours": ours, "torch": lambda: torch.randn(shape, dtype=dtype)}, baseline="torch", rounds=20
    )
    report(benchmark, timings["ours"], timings["torch"], shape[0] * shape[1])
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_normal_in_place(benchmark: Any, dtype: torch.dtype, threads: int) -> None:
    """Without the allocation, which for 32 MiB of fresh pages costs more than the numbers."""
    shape = LAYOUTS["1 x 4194304"]
    out, theirs = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def ours() -> Tensor:
        return k.normal(*shape, seed=3, offset=6, out=out)

    check(ours(), *shape)
    timings = _helper.interleave({"ours": ours, "torch": theirs.normal_}, baseline="torch", rounds=20)
    report(benchmark, timings["ours"], timings["torch"], out.numel())
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("m", [1, 2, 16])
def test_normal_for_a_chunk_of_steps(benchmark: Any, m: int, threads: int) -> None:
    """What a solver asks for: 16 steps of m channels for 65536 paths, steps first."""
    paths, steps = 65536, 16
    buffer = torch.empty(steps, paths, m)

    def ours() -> Tensor:
        return k.normal(paths, steps * m, seed=3, offset=6, out=buffer.transpose(0, 1))

    check(ours().reshape(paths, steps * m), paths, steps * m)
    theirs = torch.empty_like(buffer)
    timings = _helper.interleave({"ours": ours, "torch": theirs.normal_}, baseline="torch", rounds=10)
    report(benchmark, timings["ours"], timings["torch"], buffer.numel())
    benchmark.pedantic(ours, rounds=10, warmup_rounds=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_uniform(benchmark: Any, dtype: torch.dtype, threads: int) -> None:
    shape = (1, 1 << 22)

    def ours() -> Tensor:
        return k.uniform(*shape, seed=3, stream=k.Stream.TIMES, dtype=dtype)

    assert torch.equal(ours()[:, :1000], reference.uniform(1, 1000, seed=3, stream=k.Stream.TIMES, dtype=dtype))
    timings = _helper.interleave(
        {"ours": ours, "torch": lambda: torch.rand(shape, dtype=dtype)}, baseline="torch", rounds=20
    )
    benchmark.extra_info |= timings["ours"].summary()
    benchmark.pedantic(ours, rounds=20, warmup_rounds=2)
