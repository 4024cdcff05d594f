"""The kernels' main variants as launches, recorded from the launchers themselves on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import launch as steps
from .arguments import Launch, recording
from .launch_denoising import dsm_loss_parts
from .launch_langevin import langevin_step
from .launch_matrices import matrix_product, matrix_step

__all__ = ["DTYPES", "variants"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Images in a batch, rows of odd length, scalars: one for each layout of `tiles`; and rows too short to fill a program.
_SHAPES = {"image": (64, 3, 32, 32), "odd": (4096, 33), "scalar": (1 << 20, 1), "short": (1 << 18, 8)}
_WHERE: dict[str, Any] = {"seed": 1, "stream": 0, "first_path": 0, "step": 0}


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls(x: Tensor) -> dict[str, Callable[[], object]]:
    """Each kernel's main case for a state like ``x``."""
    batch, number, rows = x.shape[0], _empty(), _empty(x.shape[0])
    table = _empty(10, 4, dtype=torch.float64)
    return {
        "normal": lambda: steps.fill("normal", x, seed=1, stream=0),
        "euler_maruyama_step": lambda: steps.euler_maruyama_step(x, x, number, number, **_WHERE),
        "euler_maruyama_step/diagonal": lambda: steps.euler_maruyama_step(x, x, x, number, **_WHERE),
        "euler_maruyama_step/per-sample": lambda: steps.euler_maruyama_step(x, x, rows, rows, **_WHERE),
        "linear_step": lambda: steps.linear_step(x, [x], table[:, :3], 0, **_WHERE),
        "linear_step/4-terms": lambda: steps.linear_step(x, [x] * 4, _empty(10, 6), 0, **_WHERE),
        "linear_step/no-noise": lambda: steps.linear_step(x, [x, x], table, 0, stochastic=False),
        "linear_step/per-sample": lambda: steps.linear_step(x, [x], _empty(10, 3, batch), 0, **_WHERE),
        "perturb": lambda: steps.perturb(x, rows, rows, **_WHERE),
        "noise_product/number": lambda: steps.noise_product(x, 1.0, **_WHERE),
        "scaled/per-sample": lambda: steps.scaled(x, rows),
        "langevin_step": lambda: langevin_step(x, x, mode="batch", size=0.16, alpha=1.0, **_WHERE),
        "dsm_loss": lambda: dsm_loss_parts(x, None, 0.0, rows, rows, grad=True, mean=True, **_WHERE),
        "dsm_loss/value": lambda: dsm_loss_parts(x, None, 0.0, rows, rows, **_WHERE),
        "dsm_loss/data": lambda: dsm_loss_parts(x, x, rows, rows, rows, grad=True, **_WHERE),
    }


def _matrices(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Cases of a matrix for each row, and of one for all."""
    x, g, v = _empty(1 << 14, 16, dtype=dtype), _empty(1 << 14, 16, 8, dtype=dtype), _empty(1 << 14, 8, dtype=dtype)
    y, h, number = _empty(1 << 14, 3, dtype=dtype), _empty(1, 3, 5, dtype=dtype), _empty()
    return {
        "matrix_step": lambda: matrix_step(x, x, g, number, **_WHERE),
        "matrix_step/shared": lambda: matrix_step(x, x, g[:1], _empty(1 << 14), **_WHERE),
        "matrix_step/odd": lambda: matrix_step(y, y, h, number, **_WHERE),
        "matrix_product": lambda: matrix_product(g, v, out=x),
    }


def _extra(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Cases that need one dtype only."""
    x, big = _empty(*_SHAPES["image"], dtype=dtype), _empty(1 << 12, 4, dtype=dtype)
    index, rows = _empty(dtype=torch.int64), _empty(x.shape[0])
    device: dict[str, Any] = {"seed": index, "stream": 0, "first_path": 0, "step": index}
    return {
        "uniform": lambda: steps.fill("uniform", x, seed=1, stream=0),
        "words": lambda: steps.fill("words", _empty(64, 3072, dtype=torch.int64), seed=1, stream=0),
        "euler_maruyama_step/device-index": lambda: steps.euler_maruyama_step(x, x, _empty(), _empty(), **device),
        "linear_step/device-index": lambda: steps.linear_step(x, [x], _empty(10, 3), index, **device),
        "dsm_loss/made": lambda: dsm_loss_parts(
            x, None, 0.0, rows, rows, loss=False, grad=True, mean=True, upstream=_empty(), made=True, **_WHERE
        ),
        "dsm_loss/gradient": lambda: dsm_loss_parts(
            x, None, 0.0, rows, rows, loss=False, grad=True, upstream=rows, **_WHERE
        ),
        "dsm_loss/groups": lambda: dsm_loss_parts(big, None, 0.0, 1.0, 1.0, mean=True, **_WHERE),
        "langevin_step/dimension": lambda: langevin_step(x, x, mode="dimension", size=0.16, alpha=1.0, **_WHERE),
        "langevin_step/sample": lambda: langevin_step(x, x, mode="sample", size=0.16, alpha=1.0, **_WHERE),
        "langevin_step/groups": lambda: langevin_step(big, big, mode="batch", size=0.16, alpha=1.0, **_WHERE),
    }


def variants() -> Iterator[tuple[str, str, int, Launch]]:
    """Name, dtype, bytes of an element and launch of everything in the report; each compiled kernel once."""
    seen = set()
    for dtype_name, dtype in DTYPES.items():
        cases = {f"{name} {kind}": (call, kind) for kind, shape in _SHAPES.items()
                 for name, call in _calls(_empty(*shape, dtype=dtype)).items()
                 if "/" not in name or (kind == "image" and dtype_name in ("float32", "bfloat16"))
                 if kind == "image" or dtype_name == "float32"}  # fmt: skip
        cases |= {f"{name} matrix": (call, "matrix") for name, call in _matrices(dtype).items()}
        if dtype_name == "float32":
            cases |= {f"{name} image": (call, "image") for name, call in _extra(dtype).items()}
        for name, (call, kind) in cases.items():
            with recording() as launches:
                call()
            for launch in launches:
                kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                key = (kernel, *((k, v.dtype if isinstance(v, Tensor) else v)
                                 for k, v in launch.arguments.items()
                                 if k.isupper() or isinstance(v, Tensor)))  # fmt: skip
                if key in seen:
                    continue
                seen.add(key)
                op = name.split(" ")[0]
                label = op if len(launches) == 1 else f"{op}:{kernel}"
                itemsize = 8 if op == "words" else dtype.itemsize
                yield f"{label} {kind}", dtype_name, itemsize, launch
