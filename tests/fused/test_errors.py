"""What the step ops refuse, and how they say so; and which backend runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference_steps
from torch import Tensor

X = torch.zeros(4, 3)

EULER: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor of shape \(batch, \*state\), got list"),
    ({"x": X.long()}, TypeError, r"x must be of a dtype among torch.float32.*got torch.int64; convert it"),
    ({"x": torch.zeros(())}, ValueError, r"x must have shape \(batch, \*state\), got \(\); pass x\[None\]"),
    ({"f": 0.0}, TypeError, "f must be a tensor like x, got float"),
    ({"f": X[:, :2]}, ValueError, r"f must have the shape of x, \(4, 3\), got \(4, 2\); broadcast it with f.expand_as"),
    ({"f": X.double()}, TypeError, r"f must have the dtype of x, torch.float32, got torch.float64; convert it"),
    ({"f": X.to("meta")}, ValueError, "f must be on cpu like x, got meta"),
    ({"g": "1"}, TypeError, r"g must be a number or a tensor of shape \(\) or \(batch,\), got str"),
    ({"g": torch.zeros(3)}, ValueError, r"g must be .* = \(4,\), or like x, \(4, 3\), got \(3,\)"),
    ({"g": X.double()}, TypeError, "g must have the dtype of x"),
    ({"dt": torch.zeros(4, 2)}, ValueError, r"dt must be a number or a tensor of shape .* \(4,\), got \(4, 2\)"),
    ({"dt": torch.tensor(1)}, TypeError, r"dt must be of a dtype among .*got torch.int64; convert it with dt.to"),
    ({"dt": True}, TypeError, "dt must be a number or a tensor"),
    ({"dt": torch.zeros(4, device="meta")}, ValueError, "dt must be on cpu like the state, got meta"),
    ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
    ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\)"),
    ({"seed": 0.0}, TypeError, r"seed must be an integer, got 0.0 of type float; convert it with int\(\)"),
    ({"seed": True}, TypeError, "seed must be an integer, got True of type bool"),
    ({"seed": torch.tensor(0.0)}, TypeError, r"seed must be an integer or a 0-d int64 tensor, got torch.float32"),
    ({"seed": torch.tensor([0])}, TypeError, r"0-d int64 tensor, got torch.int64 of shape \(1,\)"),
    ({"stream": 256}, ValueError, r"stream must be in \[0, 256\), got 256"),
    ({"first_path": 2**64 - 3}, ValueError, r"first_path \+ batch must be at most 2\^64.*wrap and repeat noise"),
    ({"step": -1}, ValueError, r"step must be in \[0, 2\^58\), got -1"),
    ({"step": torch.tensor(-1)}, ValueError, r"step must be in \[0, 2\^58\), got -1"),
    ({"step": 2**57}, ValueError, r"\(step \+ 1\) times the 3 elements of a path must be at most 2\^58.*another str"),
    ({"out": X[:2]}, ValueError, "out must have the shape of x"),
    ({"out": X.half()}, TypeError, "out must have the dtype of x"),
    ({"out": torch.zeros(1, 3).expand(4, 3)}, ValueError, "entries of out share memory"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), EULER)
def test_euler_maruyama(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "f": X, "g": 1.0, "dt": 0.1, "seed": 0} | change
    with pytest.raises(error, match=message):
        k.euler_maruyama_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"history": [X] * 5}, ValueError, "history must have at most 4 terms, got 5; add two of them up"),
        ({"history": [X, X[:, :1]]}, ValueError, r"history\[1\] must have the shape of x"),
        ({"table": [[1.0, 2.0]]}, TypeError, r"table must be a floating tensor of shape \(rows, 3\).*got list"),
        ({"table": torch.zeros(2, 3).long()}, TypeError, "table must be a floating tensor.*got torch.int64"),
        (
            {"table": torch.zeros(2, 4)},
            ValueError,
            r"table must have shape \(rows, 3\) or \(rows, 3, 4\).*got \(2, 4\)",
        ),
        ({"table": torch.zeros(2, 3, 5)}, ValueError, r"got \(2, 3, 5\)"),
        ({"table": torch.zeros(2, 3, device="meta")}, ValueError, "table must be on cpu like x, got meta"),
        ({"row": 2}, ValueError, r"row must be in \[0, 2\), got 2"),
        ({"row": -1}, ValueError, r"row must be in \[0, 2\), got -1"),
        ({"row": torch.tensor(7)}, ValueError, r"row must be in \[0, 2\), got 7"),
        ({"row": 0.5}, TypeError, "row must be an integer"),
    ],
)
def test_linear(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "history": [X], "table": torch.zeros(2, 3), "row": 0} | change
    with pytest.raises(error, match=message):
        k.linear_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "norm"}, ValueError, "mode must be one of 'fixed', 'batch', 'sample', 'dimension', got 'norm'"),
        ({"score": X[0]}, ValueError, "score must have the shape of x"),
        ({"size": -0.1}, ValueError, "size must not be negative, got -0.1"),
        ({"alpha": -1}, ValueError, "alpha must not be negative, got -1"),
        ({"size": torch.zeros(4)}, ValueError, r"size is a signal-to-noise ratio in mode 'batch'.*put .* into alpha"),
    ],
)
def test_langevin(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "score": X, "mode": "batch", "size": 0.1, "seed": 0} | change
    with pytest.raises(error, match=message):
        k.langevin_step(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": None}, ValueError, "x0 is None, which stands for p = 0, but p is 1.0; pass the clean data"),
        ({"x0": X[:2]}, ValueError, "x0 must have the shape of output"),
        ({"output": X.to(torch.int8)}, TypeError, "output must be of a dtype among"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be .* = \(4,\), got \(5,\)"),
        ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    ],
)
def test_dsm(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"output": X, "x0": X, "p": 1.0, "q": 1.0, "weight": 1.0, "seed": 0} | change
    with pytest.raises(error, match=message):
        k.dsm_loss(**arguments)


def test_nothing_is_written_before_an_error() -> None:
    out = torch.ones(4, 3)
    with pytest.raises(ValueError, match="dt must be"):
        k.euler_maruyama_step(X, X, 1.0, torch.zeros(9), seed=0, out=out)
    assert torch.equal(out, torch.ones(4, 3))


def test_numbers_of_any_make() -> None:
    expected = k.euler_maruyama_step(X, X, 2.0, 0.5, seed=5, stream=5, first_path=5, step=5)
    for two, five in ((2, np.int32(5)), (np.float32(2), np.uint64(5)), (torch.tensor(2.0), torch.tensor(5))):
        stream = 5 if isinstance(five, Tensor) else five
        assert torch.equal(
            k.euler_maruyama_step(X, X, two, 0.5, seed=five, stream=stream, first_path=five, step=five), expected
        )


def test_backends_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = reference_steps.noise_like

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(reference_steps, "noise_like", counted)
    for backend, ran in (("auto", 0), ("numba", 0), ("reference", 1)):
        with k.use_backend(backend):
            for op in (
                lambda: k.euler_maruyama_step(X, X, 1.0, 0.1, seed=0),
                lambda: k.linear_step(X, [], torch.ones(1, 2), 0),
                lambda: k.perturb(X, 1.0, 0.1, seed=0),
                lambda: k.langevin_step(X, X, size=0.1, seed=0),
                lambda: k.dsm_loss(X, None, 0.0, 1.0, 1.0, seed=0),
            ):
                calls.clear()
                op()
                assert len(calls) == ran


def test_backend_requests_never_fall_back() -> None:
    x = X.to("meta")
    with k.use_backend("numba"), pytest.raises(ValueError, match=r"perturb: backend 'numba'.*'meta'.*runs on cpu only"):
        k.perturb(x, 1.0, 0.1, seed=0)
    with k.use_backend("triton"), pytest.raises(ValueError, match=r"perturb: backend 'triton'.*'cpu'.*on cuda only"):
        k.perturb(X, 1.0, 0.1, seed=0)
