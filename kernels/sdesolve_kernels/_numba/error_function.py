r"""erf: a polynomial near 0; further out $1 - e^{Q(x)}$ with a polynomial for the logarithm of what is missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .exponentials import EXPONENTIALS
from .intrinsics import copysign, fma, polynomial, select
from .precision import FLOAT32, FLOAT64, Precision

__all__ = ["ERROR_FUNCTION"]

# erf x = x + x P(x^2) for |x| <= 1, largest relative error 1.2e-9 and 7.3e-18
_ERF = {
    "float32": polynomial(
        *(0.128379166, -0.376126258, 0.112835851, -0.0268538120, 0.00518832775, -0.000801019414, 7.85386291e-5)
    ),
    "float64": polynomial(
        *(0.12837916709551256567, -0.37612638903183519883, 0.11283791670944198427, -0.026866170643113587259),
        *(0.0052239776061351720003, -0.00085483259300770715687, 0.00012055293598501512225, -1.4924712693330846277e-5),
        *(1.6447136109911874855e-6, -1.6206346355458368456e-7, 1.3711112406519361068e-8, -7.7796989289713133495e-10),
    ),
}
# erf x = 1 - e^Q(x) for x >= 1, largest error 1.6e-8 and 6.6e-18; Q falls on beyond where erf rounds to 1
_ERFC = {
    "float32": polynomial(-0.00267106821, -1.11744017, -0.654487455, -0.0886345677, 0.0147780395, -0.00115038561),
    "float64": polynomial(
        *(-5.1335704433988336621e-7, -1.1283739905666142198, -0.63664406035674658099, -0.1027022749219466894),
        *(0.018988012996080523575, 0.00041357805951671428599, -0.0019189905497542432873, 0.00077308072743217749965),
        *(-0.0001365789021406455336, -1.9511032854937100486e-5, 2.2528055804555437963e-5, -8.5772410899212844424e-6),
        *(2.1144186112475389411e-6, -3.6949393831773189357e-7, 4.5923406393079587757e-8, -3.8890868171628656174e-9),
        *(2.0198046430420129644e-10, -4.8636539154974692736e-12),
    ),
}


def _error_function(precision: Precision) -> Callable[..., Any]:
    F = precision.real
    near, far, exp = _ERF[precision.name], _ERFC[precision.name], EXPONENTIALS["exp", precision.name]
    one = F(1.0)

    @precision.inline
    def erf(x: Any) -> Any:
        a = abs(x)
        return copysign(select(a < one, fma(near(a * a), a, a), one - exp(far(a))), x)

    return erf


ERROR_FUNCTION: dict[tuple[str, str], Callable[..., Any]] = {
    ("erf", p.name): _error_function(p) for p in (FLOAT32, FLOAT64)
}
