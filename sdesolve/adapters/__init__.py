"""Bridges to other packages: diffusers, torchsde, k-diffusion, deepinv, and checkpoints of EDM and score_sde.

None of them is needed: what comes from them is known by its calls. `DiffusersScheduler` is imported when it is first
asked for, with diffusers where that is installed.
"""

from typing import TYPE_CHECKING, Any

from sdesolve.adapters.deepinv import DeepinvOperator
from sdesolve.adapters.diffusers import DiffusersNet, DiffusersSchedule
from sdesolve.adapters.k_diffusion import NoiseSampler
from sdesolve.adapters.torchsde import FromTorchSDE, TorchSDEEquation, TorchSDENoise, ToTorchSDE
from sdesolve.adapters.weights import EDMNet, ScoreSDENet, load_weights, read_weights

if TYPE_CHECKING:
    from sdesolve.adapters.scheduler import DiffusersScheduler

__all__ = [
    "DeepinvOperator", "DiffusersNet", "DiffusersSchedule", "DiffusersScheduler", "EDMNet", "FromTorchSDE",
    "NoiseSampler", "ScoreSDENet", "ToTorchSDE", "TorchSDEEquation", "TorchSDENoise", "load_weights", "read_weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "DiffusersScheduler":
        from sdesolve.adapters.scheduler import DiffusersScheduler

        return DiffusersScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
