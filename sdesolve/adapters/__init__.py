"""Bridges to other packages: models and schedulers of diffusers, and SDEs and noise of torchsde in both directions.

None of them is needed: what comes from them is known by its calls. `DiffusersScheduler` is imported when it is first
asked for, with diffusers where that is installed.
"""

from typing import TYPE_CHECKING, Any

from sdesolve.adapters.diffusers import DiffusersNet, DiffusersSchedule
from sdesolve.adapters.torchsde import FromTorchSDE, TorchSDEEquation, TorchSDENoise, ToTorchSDE

if TYPE_CHECKING:
    from sdesolve.adapters.scheduler import DiffusersScheduler

__all__ = [
    "DiffusersNet", "DiffusersSchedule", "DiffusersScheduler", "FromTorchSDE", "ToTorchSDE", "TorchSDEEquation",
    "TorchSDENoise",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "DiffusersScheduler":
        from sdesolve.adapters.scheduler import DiffusersScheduler

        return DiffusersScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
