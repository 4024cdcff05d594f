"""A GPU that compiles for sm_90 and runs nothing: all that the host does, but the launch itself, on tensors of the CPU.

Import it in a process of its own, before anything launches: Triton has one driver, and so has torch.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import torch
import triton
from sdesolve_kernels import dispatch
from sdesolve_kernels._triton.backend import TritonBackend
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

__all__ = ["launches"]

# Kernel, grid and arguments of each launch; tensors are their addresses and dtypes.
launches: list[tuple[Any, ...]] = []
_LIMIT = () if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4) else (1024,)


class _Utilities:
    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return 1, (name, hashlib.sha256(binary).hexdigest()), 32, 0, *_LIMIT

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def unload_module(self, module: Any) -> None:
        pass


class _Driver:
    utils = _Utilities()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, function: Any, metadata: Any, described: Any, *rest: Any) -> None:
            arguments = (a for a in rest[2:])  # two hooks come first
            launches.append(
                (
                    function,
                    (x, y, z),
                    [(a.data_ptr(), a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments],
                )
            )

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


driver.set_active(_Driver())
TritonBackend.devices = frozenset({"cpu", "cuda"})
dispatch._chosen.cache_clear()
dispatch._ops.cache_clear()
dispatch._implementation.cache_clear()
torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
torch.cuda.current_device = lambda: 0
