"""What differs between a GPU and the CPU that stands in for it: clocks, caches, graphs, memory, waiting.

Everything else in the harness is the same code on both, so that what a GPU will run has run here before.
"""

from __future__ import annotations

import abc
import contextlib
import gc
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.registry import versions

__all__ = ["Cpu", "Cuda", "Machine", "machine"]

_WARM_UPS = 3
_FLUSH_BYTES = 256 << 20  # five times the second-level cache of an H100
_CYCLES_A_SECOND = 2.0e9  # upper end of the clocks of the chips in question: a spin is then not too short
_LONGEST_SPIN = 20e-3
_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,temperature.gpu,pstate"


class Machine(abc.ABC):
    """A device and how to measure on it."""

    device: torch.device
    stand_in: bool

    @abc.abstractmethod
    def hardware(self) -> dict[str, Any]:
        """The device's own properties."""

    @abc.abstractmethod
    def clocks(self) -> dict[str, str]:
        """Clocks, power and temperature now; empty if nothing tells."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Waits until the device is idle."""

    @abc.abstractmethod
    def timer(self, call: Callable[[], object]) -> Callable[[], float]:
        """Warms `call` up; the result runs it once with cold caches and returns the device's seconds."""

    @abc.abstractmethod
    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """What replays `call` with one launch, on the memory that it has now."""

    @abc.abstractmethod
    def peak(self, call: Callable[[], object]) -> int | None:
        """Most bytes allocated during `call` beyond those before; None if nothing counts them."""

    @abc.abstractmethod
    def forbid_waiting(self) -> contextlib.AbstractContextManager[object]:
        """Inside, whatever makes the host wait for the device raises."""

    @abc.abstractmethod
    def free_bytes(self) -> int:
        """Memory that is free."""

    def describe(self) -> dict[str, Any]:
        """Versions, hardware and clocks, for the report's head."""
        return {
            "stand_in": self.stand_in,
            **self.hardware(),
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "versions": versions(),
            "clocks": self.clocks(),
        }

    def per_call(self, call: Callable[[], object], repeats: int) -> tuple[float, float]:
        """Seconds a call: until the host is free again, and until the device is done, for `repeats` calls in a row."""
        call()
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        free = time.perf_counter()
        self.synchronize()
        return (free - start) / repeats, (time.perf_counter() - start) / repeats

    def release(self) -> None:
        """Gives unused memory back."""
        gc.collect()


class Cuda(Machine):
    """An NVIDIA GPU through torch."""

    stand_in = False

    def __init__(self, device: str) -> None:
        self.device = torch.device(device, torch.cuda.current_device())
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device=self.device)

    def hardware(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }

    def clocks(self) -> dict[str, str]:
        command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader", "-i", str(self.device.index)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return {}
        values = done.stdout.splitlines()[0].split(", ")
        return dict(zip(_SMI.split(","), values, strict=False))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def timer(self, call: Callable[[], object]) -> Callable[[], float]:
        hosts = []
        for _ in range(_WARM_UPS):
            self.synchronize()
            start = time.perf_counter()
            call()
            hosts.append(time.perf_counter() - start)
        self.synchronize()
        # The device spins while the host enqueues the call, so that no gap between launches is measured.
        spin = int(min(1.5 * min(hosts) + 50e-6, _LONGEST_SPIN) * _CYCLES_A_SECOND)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def once() -> float:
            # Read, not written: dirty lines in the cache would be written back during what is measured.
            self._flush.sum()
            torch.cuda._sleep(spin)
            first.record()
            call()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) * 1e-3

        return once

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            result = call()

        def replay() -> object:
            captured.replay()
            return result

        return replay

    def peak(self, call: Callable[[], object]) -> int | None:
        call()
        self.release()
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return int(torch.cuda.max_memory_allocated(self.device)) - before

    @contextlib.contextmanager
    def forbid_waiting(self) -> Iterator[object]:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield None
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def free_bytes(self) -> int:
        self.release()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class _NoReads(TorchDispatchMode):
    """Raises where a tensor's value would have to come to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Cpu(Machine):
    """Stands in for a GPU: the host's clock, no flush, a graph that calls again, no count of memory."""

    device = torch.device("cpu")
    stand_in = True

    def hardware(self) -> dict[str, Any]:
        return {"device": f"{platform.processor() or platform.machine()} (CPU stand-in)", "cuda": None}

    def clocks(self) -> dict[str, str]:
        return {}

    def synchronize(self) -> None:
        pass

    def timer(self, call: Callable[[], object]) -> Callable[[], float]:
        call()

        def once() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return once

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        return call

    def peak(self, call: Callable[[], object]) -> int | None:
        call()
        return None

    def forbid_waiting(self) -> contextlib.AbstractContextManager[object]:
        return _NoReads()

    def free_bytes(self) -> int:
        return 1 << 30


def machine(device: str) -> Machine:
    """The machine of a device's name.

    Raises:
        SystemExit: There is no such device; the message says what is missing.
    """
    if device == "cpu":
        return Cpu()
    if not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch {torch.__version__} sees no CUDA device; --device cpu --quick runs")
    return Cuda(device)
