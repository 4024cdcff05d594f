"""torchdiffeq by its own names: ``from sdesolve.compat import torchdiffeq`` in place of ``import torchdiffeq``.

`odeint`, `odeint_adjoint` and `odeint_event` take its arguments, and step by `sdesolve.solve`, with gradients of the
steps that were taken. ``docs/coming_from_torchsde.md`` has what differs.
"""

from sdesolve.compat.torchdiffeq.odeint import odeint, odeint_adjoint, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]
