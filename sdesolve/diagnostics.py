"""What is installed, what runs here, and whether the kernels compute what plain torch computes."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from sdesolve_kernels.dispatch import backend_for, use_backend

from sdesolve._internal.version import __version__
from sdesolve.integrate.solve import solve
from sdesolve.sde import SDE
from sdesolve.solvers.euler_maruyama import EulerMaruyama
from sdesolve.solvers.heun import Heun

_PACKAGES = (
    *("torch", "numpy", "scipy", "numba", "triton", "safetensors"),
    *("matplotlib", "zarr", "xarray", "cloudpickle", "diffusers"),
)


def version_of(package: str) -> str:
    """The version that is installed, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions and devices by name: what a report of a fault should have."""
    found = {"sdesolve": __version__, "python": platform.python_version(), "platform": platform.platform()}
    found |= {name: version_of(name) for name in _PACKAGES}
    found["processors"] = f"{os.cpu_count()}, torch takes {torch.get_num_threads()} threads"
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return found | {"GPUs": ", ".join(gpus) or "none"}


def show_versions() -> None:
    """Prints the versions of this library and of what it runs on, for a report of a fault."""
    for name, value in versions().items():
        print(f"{name:>12}: {value}")


def cache_folder() -> str:
    """Where machine code of kernels is kept, and how much of it there is."""
    from sdesolve_kernels._numba.trajectory import cache_folder as folder

    found = folder()
    if found is None:
        return "none: set SDESOLVE_CACHE to a folder"
    files = [file for file in found.rglob("*") if file.is_file()] if found.is_dir() else []
    size = sum(file.stat().st_size for file in files) / 2**20
    return f"{found}, {len(files)} files, {size:.1f} MiB"


def check_kernels(device: str) -> tuple[bool, str]:
    """Whether a fused run has the numbers of an eager one, on a small nonlinear equation.

    Args:
        device: where.

    Returns:
        Whether it has, and what was found; without a compiler of kernels nothing can differ, and what to install.
    """
    if not backend_for("trajectory", torch.device(device)).compiles:
        extra = "cpu" if device == "cpu" else "gpu"
        return True, f"no kernels, runs go step by step in torch; for kernels pip install 'sdesolve[{extra}]'"
    sde = SDE(
        lambda x, t: x - x.pow(3) + torch.sin(t), lambda x, t: 0.3 * (1 + x.square()).sqrt(), noise="diagonal",
        calculus="stratonovich",
    )  # fmt: skip
    x0 = torch.linspace(-1.0, 1.0, 130, dtype=torch.float64, device=device).reshape(65, 2)
    begin = time.perf_counter()
    try:
        fused = solve(sde, x0, 0.0, 1.0, 20, solver=Heun(), seed=1, backend="fused").x1
    except Exception as raised:
        return False, f"fused: {type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - begin
    eager = solve(sde, x0, 0.0, 1.0, 20, solver=Heun(), seed=1, backend="eager").x1
    error = float((fused - eager).abs().max())
    ito = SDE(lambda x, t: -x, lambda x, t: 0.5 * torch.ones_like(x), noise="diagonal")
    kernel = solve(ito, x0, 0.0, 1.0, 20, solver=EulerMaruyama(), seed=1, backend="kernel").x1
    with use_backend("reference"):
        plain = solve(ito, x0, 0.0, 1.0, 20, solver=EulerMaruyama(), seed=1, backend="eager").x1
    error = max(error, float((kernel - plain).abs().max()))
    good = error < 1e-12
    return good, f"largest difference from plain torch {error:.1e}, first call {seconds:.2f} s"


def doctor() -> int:
    """Prints versions, caches, and whether kernels agree with plain torch; 0 if all do."""
    show_versions()
    print(f"{'cache':>12}: {cache_folder()}")
    bad = 0
    for device in ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]:
        good, said = check_kernels(device)
        bad += not good
        print(f"{device:>12}: {'good' if good else 'BAD'}, {said}")
    if bad:
        print("kernels that disagree are a fault: report it with these lines", file=sys.stderr)
    return bad
