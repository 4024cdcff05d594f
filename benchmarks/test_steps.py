"""Step ops: this library's against the eager torch they replace, large and small, and the memory of a training step.

``python -m pytest benchmarks/test_steps.py``; the speedups over eager, timed in the same rounds, are in ``extra_info``
and on the terminal with ``-s``. Every timing follows a check against the float64 oracle.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sdesolve_kernels as k
import torch
from torch import Tensor

# Benchmarks are not a package: the helper beside this file is loaded by its path.
_spec = importlib.util.spec_from_file_location("sdesolve_interleave", Path(__file__).with_name("interleave.py"))
assert _spec is not None
assert _spec.loader is not None
_helper = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _helper
_spec.loader.exec_module(_helper)

SIZES = {"4M": (64, 65536), "1k": (64, 16)}
NARROW = {"4M x 1": (1 << 22, 1), "2M x 2": (1 << 21, 2), "1.4M x 3": (1398101, 3), "64k x 64": (1 << 16, 64)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Problem:
    """Tensors of one shape and dtype, and each op beside the expression that one would write in torch."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        x, s, r = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        table = torch.rand(8, 4, dtype=torch.float64, generator=generator)
        a, b, w = (torch.rand(shape[0], generator=generator) for _ in range(3))
        rows = (shape[0], *(1,) * (len(shape) - 1))
        where: dict[str, Any] = {"seed": 3, "step": 5}
        output = x.clone().requires_grad_()
        z = torch.randn_like(x)

        def corrector() -> Tensor:
            z = torch.randn_like(x)
            norms = [v.flatten(1).norm(dim=1).mean() for v in (z, s)]
            delta = 2.0 * (0.16 * norms[0] / norms[1]) ** 2
            return x + delta * s + torch.sqrt(2.0 * delta) * z

        def linear() -> Tensor:
            a, b, c, d = table[3].tolist()
            return a * x + b * s + c * r + d * torch.randn_like(x)

        def linear_alone() -> Tensor:
            a, d = table[3, ::3].tolist()
            return a * x + d * torch.randn_like(x)

        def ours() -> Tensor:
            output.grad = None
            k.dsm_loss(output, None, 0.0, 1.0, w, **where).backward()
            return output.grad  # type: ignore[return-value]

        def eager(z: Tensor | None) -> Tensor:
            output.grad = None
            z = torch.randn_like(x) if z is None else z
            (w.to(dtype) * (output - z).square().flatten(1).mean(1)).mean().backward()
            return output.grad  # type: ignore[return-value]

        def training() -> Tensor:
            k.perturb(x, a, b, **where)
            return ours()

        def eager_training() -> Tensor:
            z = torch.randn_like(x)
            a.to(dtype).view(rows) * x + b.to(dtype).view(rows) * z
            return eager(z)

        alone = table[:, ::3].contiguous()
        g = r.abs()
        y, v = x.clone(), x.clone()
        self.ops: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "euler_maruyama_step": (
                lambda: k.euler_maruyama_step(x, s, g, 0.01, **where),
                lambda: x + s * 0.01 + g * 0.1 * torch.randn_like(x),
            ),
            "euler_maruyama_step, scalar g": (
                lambda: k.euler_maruyama_step(x, s, 0.3, 0.01, **where),
                lambda: x + s * 0.01 + 0.03 * torch.randn_like(x),
            ),
            "euler_maruyama_step, in place": (
                lambda: k.euler_maruyama_step(y, s, g, 0.01, out=y, **where),
                lambda: v.add_(s, alpha=0.01).addcmul_(g, torch.randn_like(v), value=0.1),
            ),
            "linear_step, 2 terms": (lambda: k.linear_step(x, [s, r], table, 3, **where), linear),
            "linear_step, 0 terms": (lambda: k.linear_step(x, [], alone, 3, **where), linear_alone),
            "perturb": (
                lambda: k.perturb(x, a, b, **where),
                lambda: a.to(dtype).view(rows) * x + b.to(dtype).view(rows) * torch.randn_like(x),
            ),
            "langevin_step, fixed": (
                lambda: k.langevin_step(x, s, size=0.01, **where),
                lambda: x + 0.01 * s + 0.02**0.5 * torch.randn_like(x),
            ),
            "langevin_step, batch": (lambda: k.langevin_step(x, s, mode="batch", size=0.16, **where), corrector),
            "dsm_loss and gradient, noise drawn": (ours, lambda: eager(None)),
            "dsm_loss and gradient, noise given": (ours, lambda: eager(z)),
            "perturb, dsm_loss and gradient": (training, eager_training),
        }

    def check(self, name: str) -> None:
        """Correct before fast: the rows that the oracle makes quickly, to the tolerance of the dtype."""
        got = self.ops[name][0]().detach().clone()
        if "in place" in name:
            return  # the state moves with each call; out of place is the same kernel, and tests compare the two
        with k.use_backend("reference"):
            exact = self.ops[name][0]().detach()
        eps = torch.finfo(got.dtype).eps
        torch.testing.assert_close(got, exact, rtol=8 * eps, atol=8 * eps * float(exact.abs().max()))


def report(benchmark: Any, ours: Any, theirs: Any, elements: int) -> None:
    benchmark.extra_info |= ours.summary() | {
        "ns_per_element": float(f"{ours.median / elements * 1e9:.3g}"),
        "eager_median_us": float(f"{theirs.median * 1e6:.4g}"),
        "eager_ns_per_element": float(f"{theirs.median / elements * 1e9:.3g}"),
    }
    print(
        f"\n{benchmark.name}: {ours.median * 1e6:.1f} us, eager {theirs.median * 1e6:.1f} us, "
        f"{ours.speedup:.2f} x eager (quartiles {ours.speedup_lower:.2f} to {ours.speedup_upper:.2f})"
    )


def measure(benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, name: str, rounds: int) -> None:
    if shape[0] * shape[1] > 1 << 20:
        Problem((shape[0] // 64 or 1, shape[1]) if shape[1] < 4096 else (2, shape[1]), dtype).check(name)
    problem = Problem(shape, dtype)
    if shape[0] * shape[1] <= 1 << 20:
        problem.check(name)
    ours, eager = problem.ops[name]
    settle = 0.02 if shape[0] * shape[1] > 1 << 20 else 0.0
    timings = _helper.interleave({"ours": ours, "eager": eager}, baseline="eager", rounds=rounds, settle=settle)
    report(benchmark, timings["ours"], timings["eager"], shape[0] * shape[1])
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


NAMES = list(Problem((2, 2), torch.float32).ops)


@pytest.mark.parametrize("name", NAMES)
def test_large(benchmark: Any, name: str, threads: int) -> None:
    """float32, 4M elements: what the 3 x eager is about."""
    measure(benchmark, SIZES["4M"], torch.float32, name, rounds=12)


@pytest.mark.parametrize("name", NAMES)
def test_small(benchmark: Any, name: str) -> None:
    """1024 elements: what a call costs before the first of them."""
    measure(benchmark, SIZES["1k"], torch.float32, name, rounds=60)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["euler_maruyama_step", "dsm_loss and gradient, noise given"])
def test_other_types(benchmark: Any, name: str, dtype: torch.dtype) -> None:
    measure(benchmark, SIZES["4M"], dtype, name, rounds=8)


@pytest.mark.parametrize("shape", NARROW)
@pytest.mark.parametrize("name", ["euler_maruyama_step", "perturb", "langevin_step, batch"])
def test_short_paths(benchmark: Any, name: str, shape: str) -> None:
    """Few elements a path: a block of four normals is then made for fewer."""
    measure(benchmark, NARROW[shape], torch.float32, name, rounds=8)


_MEMORY = """
import pathlib, sys, torch, sdesolve_kernels as k
shape = (64, 1 << 20)
x, output = torch.ones(shape), torch.ones(shape, requires_grad=True)
def kib(what):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(what + ":")[1].split()[0])
def ours():
    k.dsm_loss(output, None, 0.0, 1.0, 1.0, seed=0).backward()
def eager():
    z = torch.randn_like(x)
    (output - z).square().flatten(1).mean(1).mean().backward()
k.dsm_loss(torch.zeros(600, 600, requires_grad=True), None, 0.0, 1.0, 1.0, seed=0).backward()
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = kib("VmRSS")
{"ours": ours, "eager": eager}[sys.argv[1]]()
print((kib("VmHWM") - before) * 1024 / (4 * x.numel()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(benchmark: Any) -> None:
    """Peak of a forward and backward pass of `dsm_loss`, in tensors of the batch's size, the gradient among them."""

    def tensors(who: str) -> float:
        environment = os.environ | {"PYTHONPATH": str(Path(k.__file__).parents[1])}
        command = [sys.executable, "-c", _MEMORY, who]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout)

    ours, eager = tensors("ours"), tensors("eager")
    benchmark.extra_info |= {"tensors": round(ours, 2), "eager_tensors": round(eager, 2)}
    print(f"\n{benchmark.name}: {ours:.2f} tensors of the batch's size with the gradient, eager {eager:.2f}")
    assert ours < 1.1
    benchmark.pedantic(lambda: None, rounds=1)
