"""torchsde by its own names: ``from sdesolve.compat import torchsde`` in place of ``import torchsde``.

`sdeint` and `sdeint_adjoint` take its arguments and its equations, and step by `sdesolve.solve`: fused where that is,
with exact gradients, on noise that is a function of its coordinates. ``docs/coming_from_torchsde.md`` has what differs.
"""

from sdesolve.compat.torchsde import settings
from sdesolve.compat.torchsde.base_sde import BaseSDE, SDEIto, SDEStratonovich
from sdesolve.compat.torchsde.brownian import (
    BaseBrownian,
    BrownianInterval,
    BrownianPath,
    BrownianTree,
    ReverseBrownian,
    brownian_interval_like,
)
from sdesolve.compat.torchsde.sdeint import sdeint, sdeint_adjoint

__all__ = [
    "BaseBrownian", "BaseSDE", "BrownianInterval", "BrownianPath", "BrownianTree", "ReverseBrownian", "SDEIto",
    "SDEStratonovich", "brownian_interval_like", "sdeint", "sdeint_adjoint", "settings",
]  # fmt: skip
