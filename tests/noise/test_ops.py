"""What the ops accept and refuse, and which backend runs."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\), got 18446744073709551616"),
        ({"seed": 1.0}, TypeError, r"seed must be an integer, got 1.0 of type float; convert it with int\(\)"),
        ({"seed": True}, TypeError, "seed must be an integer, got True of type bool"),
        ({"seed": np.bool_(True)}, TypeError, "seed must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer, got None of type NoneType"),
        ({"seed": "1"}, TypeError, "seed must be an integer, got str"),
        ({"stream": 256}, ValueError, r"stream must be in \[0, 256\), got 256"),
        ({"stream": -1}, ValueError, r"stream must be in \[0, 256\), got -1"),
        ({"paths": -1}, ValueError, r"paths must be in \[0, 2\^63\), got -1"),
        ({"paths": 2.0}, TypeError, "paths must be an integer, got 2.0"),
        ({"count": -3}, ValueError, r"count must be in \[0, 2\^58\), got -3"),
        ({"count": np.float64(3)}, TypeError, "count must be an integer"),
        ({"first_path": -1}, ValueError, r"first_path must be in \[0, 2\^64\), got -1"),
        ({"first_path": 2**64 - 1}, ValueError, r"first_path \+ paths must be at most 2\^64.*repeat noise"),
        ({"offset": -1}, ValueError, r"offset must be in \[0, 2\^58\), got -1"),
        ({"offset": 2**58 - 1}, ValueError, r"offset \+ count must be at most 2\^58.*another stream"),
        ({"dtype": torch.int32}, TypeError, r"dtype must be one of torch.float32, .*got torch.int32"),
        ({"dtype": torch.complex64}, TypeError, "got torch.complex64"),
        ({"out": np.zeros((2, 3))}, TypeError, "out must be a tensor, got ndarray"),
        ({"out": torch.zeros(3, 2)}, ValueError, r"out must have shape \(paths, ...\).*\(2, 3\).*got \(3, 2\)"),
        ({"out": torch.zeros(2, 4)}, ValueError, r"got \(2, 4\)"),
        ({"out": torch.zeros(())}, ValueError, r"got \(\)"),
        ({"out": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "out must be of a dtype among .*got torch.int64"),
        (
            {"out": torch.zeros(2, 3), "dtype": torch.float64},
            ValueError,
            "dtype=torch.float64 and out of torch.float32",
        ),
        ({"out": torch.zeros(2, 3), "device": "meta"}, ValueError, "device='meta' and out on 'cpu' disagree"),
        ({"out": torch.zeros(2, 3, requires_grad=True)}, ValueError, r"requires a gradient.*out.detach\(\)"),
        ({"out": torch.zeros(1, 3).expand(2, 3)}, ValueError, "entries of out share memory"),
        ({"out": torch.zeros(4).as_strided((2, 3), (1, 1))}, ValueError, "entries of out share memory"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"paths": 2, "count": 3, "seed": 0} | change
    with pytest.raises(error, match=message):
        k.normal(**arguments)
    if "out" not in change:
        with pytest.raises(error, match=message):
            k.uniform(**{"stream": 5} | arguments)


def test_integers_of_any_make() -> None:
    class Five(enum.IntEnum):
        FIVE = 5

    expected = k.normal(5, 5, seed=5, stream=5, first_path=5, offset=5)
    for five in (np.int32(5), np.uint64(5), Five.FIVE, torch.tensor(5)):
        got = k.normal(five, five, seed=five, stream=five, first_path=five, offset=five)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", ["auto", "reference", "numba"])
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_empty_and_tiny(backend: str, shape: tuple[int, int]) -> None:
    with k.use_backend(backend):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert k.normal(*shape, seed=1, dtype=dtype).shape == shape
        assert k.uniform(*shape, seed=1, stream=5).shape == shape
        assert k.words(*shape, seed=1, stream=5).dtype == torch.int64
    assert k.normal(shape[0], shape[1], seed=1, out=torch.zeros(shape[0], shape[1], 1)).shape == (*shape, 1)


def test_the_last_places_of_all() -> None:
    place: dict[str, Any] = {"seed": 2**64 - 1, "stream": 255, "first_path": 2**64 - 2, "offset": 2**58 - 5}
    got = k.normal(2, 5, **place, dtype=torch.float64)
    torch.testing.assert_close(got, reference.normal(2, 5, **place), rtol=0, atol=1e-14)
    assert torch.equal(k.words(2, 5, **place), reference.numbered_words(2, 5, **place))


def test_device(device: torch.device) -> None:
    """The device of ``--device``, through whatever "auto" runs there."""
    place: dict[str, Any] = {"seed": 6, "stream": 1, "first_path": 2**32 - 20, "offset": 2**34 - 2}
    assert torch.equal(k.words(40, 9, **place, device=device).cpu(), reference.numbered_words(40, 9, **place))
    got = k.normal(40, 9, **place, device=device)
    assert got.device.type == device.type
    torch.testing.assert_close(got.cpu().double(), reference.normal(40, 9, **place), rtol=4e-7, atol=1e-14)


def test_default_types() -> None:
    assert k.normal(2, 2, seed=0).dtype == torch.float32
    assert k.normal(2, 2, seed=0, out=torch.zeros(2, 2, dtype=torch.float64)).dtype == torch.float64
    assert torch.equal(k.normal(2, 2, seed=0), k.normal(2, 2, seed=0, stream=k.Stream.DRIVING, device="cpu"))


def test_out_counts_as_changed_for_autograd() -> None:
    """Otherwise a backward pass would silently use the noise in place of what it saved."""
    weight, x = torch.ones(3, requires_grad=True), torch.ones(1, 3)
    loss = (weight * x).sum()
    k.normal(1, 3, seed=0, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = reference.normal

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(reference, "normal", counted)
    k.normal(2, 2, seed=0)
    with k.use_backend("numba"):
        k.normal(2, 2, seed=0)
    assert not calls
    with k.use_backend("reference"):
        k.normal(2, 2, seed=0)
        with k.use_backend("auto"):
            k.normal(2, 2, seed=0)
        k.normal(2, 2, seed=0)
    k.normal(2, 2, seed=0)
    assert len(calls) == 2


def test_backend_requests_never_fall_back() -> None:
    with k.use_backend("numba"), pytest.raises(ValueError, match=r"normal: backend 'numba'.*'meta'.*runs on cpu only"):
        k.normal(2, 2, seed=0, device="meta")
    assert k.normal(2, 2, seed=0, device="meta").device.type == "meta"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="unknown backend 'cuda'; expected one of 'auto', 'reference', 'numba'"):
        k.use_backend("cuda").__enter__()


def test_backend_is_local_to_a_thread() -> None:
    seen = []

    def other() -> None:
        seen.append(k.normal(2, 2, seed=0, device="meta").shape)

    with k.use_backend("numba"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == [(2, 2)]


def test_streams_are_distinct_and_in_range() -> None:
    assert len({int(s) for s in k.Stream}) == len(k.Stream)
    assert all(0 <= s < 256 for s in k.Stream)
    assert (k.Stream.DRIVING, k.Stream.INITIAL, k.Stream.LEVY) == (0, 1, 11)


def test_kernels_compile_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdesolve_kernels._numba import compile as compiling

    real = compiling._njit

    def without_cache(**options: Any) -> Any:
        def decorate(function: Any) -> Any:
            if options.pop("cache", False):
                raise RuntimeError("cannot cache function 'f': no locator available for file 'x.py'")
            return real(**options)(function)

        return decorate

    monkeypatch.setattr(compiling, "_njit", without_cache)
    assert compiling.kernel(lambda x: x + 1)(2) == 3


def test_import_is_light() -> None:
    code = (
        "import sys, sdesolve_kernels; "
        "sys.exit(' '.join(m for m in ('numba', 'triton', 'sdesolve', 'matplotlib') if m in sys.modules) or 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(k.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
