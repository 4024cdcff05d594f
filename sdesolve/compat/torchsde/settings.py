"""Names that torchsde gives to methods, noise types and the like."""

from __future__ import annotations


class _Names(type):
    """A class whose attributes are texts, which can be asked for and listed."""

    def all(cls) -> list[str]:
        """The texts in alphabetical order."""
        return sorted(value for name, value in vars(cls).items() if not name.startswith("_"))

    def __contains__(cls, item: object) -> bool:
        return item in cls.all()

    def __str__(cls) -> str:
        return ", ".join(cls.all())


class METHODS(metaclass=_Names):
    """Of `sdeint` and `sdeint_adjoint`; the last of them is for ``adjoint_method`` alone."""

    euler = "euler"
    milstein = "milstein"
    srk = "srk"
    midpoint = "midpoint"
    reversible_heun = "reversible_heun"
    heun = "heun"
    log_ode_midpoint = "log_ode"
    euler_heun = "euler_heun"
    adjoint_reversible_heun = "adjoint_reversible_heun"


class NOISE_TYPES(metaclass=_Names):
    """What ``noise_type`` may be."""

    general = "general"
    diagonal = "diagonal"
    scalar = "scalar"
    additive = "additive"


class SDE_TYPES(metaclass=_Names):
    """What ``sde_type`` may be."""

    ito = "ito"
    stratonovich = "stratonovich"


class LEVY_AREA_APPROXIMATIONS(metaclass=_Names):
    """What a `BrownianInterval` gives beside its increments: nothing, ``U``, or ``U`` and Levy areas."""

    none = "none"
    space_time = "space-time"
    davie = "davie"
    foster = "foster"


class METHOD_OPTIONS(metaclass=_Names):
    """Keys of ``options``."""

    grad_free = "grad_free"
