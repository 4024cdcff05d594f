"""SDEs and noise of torchsde, in both directions. The package is not imported: what is its is known by its calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short
from sdesolve.brownian import AbstractNoise, Part
from sdesolve.integrate.checks import check_diffusion, check_drift, check_state
from sdesolve.jumps import refuse_jumps
from sdesolve.sde import AbstractSDE, Calculus, Noise, is_matrix


class TorchSDEEquation(Protocol):
    """What torchsde calls an SDE with two fields of ``(t, y)`` for ``y: (batch, size)``."""

    noise_type: str
    sde_type: str

    def f(self, t: Tensor, y: Tensor, /) -> Tensor: ...

    def g(self, t: Tensor, y: Tensor, /) -> Tensor: ...


METHODS_OF_SDE = {
    "drift": "f",
    "diffusion": "g",
    "prior_drift": "h",
    "diffusion_prod": "g_prod",
    "drift_and_diffusion": "f_and_g",
    "drift_and_diffusion_prod": "f_and_g_prod",
}


@final
class FromTorchSDE(AbstractSDE):
    """An SDE written for torchsde, ``dY = f(t, Y) dt + g(t, Y) dW``, as one that `solve` integrates.

    States are ``(batch, size)``. The diffusion of scalar noise, ``(batch, size, 1)`` there, is ``(batch, size)`` here;
    additive and general noise keep their matrices ``(batch, size, channels)``. In place of ``f`` and ``g`` an SDE may
    have ``f_and_g``, and where its diffusion is known by products alone, ``g_prod`` or ``f_and_g_prod``.

    Args:
        sde: an object with ``f``, ``g``, ``noise_type`` and ``sde_type``.
        names: its own names of these methods, by torchsde's keys: ``{"drift": "h"}`` integrates its prior.
        channels: of the Brownian motion, where no method tells: with ``g_prod`` or ``f_and_g_prod`` alone.

    Raises:
        TypeError: a method or one of the two texts is missing.
        ValueError: an unknown noise or SDE type.
    """

    def __init__(
        self, sde: TorchSDEEquation, names: Mapping[str, str] | None = None, channels: int | None = None
    ) -> None:
        named = METHODS_OF_SDE | dict(names or {})
        has: dict[str, Any] = {own: getattr(sde, named[role], None) for role, own in METHODS_OF_SDE.items()}
        ways = {"f": ("f", "f_and_g", "f_and_g_prod"), "g": ("g", "f_and_g", "g_prod", "f_and_g_prod")}
        missing = [own for own, methods in ways.items() if not any(callable(has[name]) for name in methods)]
        missing += [name for name in ("noise_type", "sde_type") if not isinstance(getattr(sde, name, None), str)]
        if missing:
            raise TypeError(
                f"an SDE of torchsde has methods f and g and texts noise_type and sde_type; this {type(sde).__name__} "
                f"lacks {', '.join(missing)}"
            )
        if sde.noise_type not in _NOISE_TYPES or sde.sde_type not in tuple(Calculus):
            raise ValueError(
                f"noise_type must be one of {', '.join(_NOISE_TYPES)} and sde_type ito or stratonovich, got "
                f"{short(sde.noise_type)} and {short(sde.sde_type)}"
            )
        self.noise, self.calculus = Noise(sde.noise_type), Calculus(sde.sde_type)
        # What a trace may call is found among what is held.
        self._f, self._g, self._both = has["f"], has["g"], has["f_and_g"]
        self._product, self._both_by_product = has["g_prod"], has["f_and_g_prod"]
        self.joint, self.has_diffusion = self._both is not None, self._g is not None or self._both is not None
        self._channels = channels

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        t = _one_time(t)
        if self._f is not None:
            f: Tensor = self._f(t, x)
        elif self._both is not None:
            f = self._both(t, x)[0]
        else:
            f = self._both_by_product(t, x, x.new_zeros(len(x), *(self.channels(x) or x.shape[1:])))[0]
        return f

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self._vector(self._both(_one_time(t), x)[1] if self._g is None else self._g(_one_time(t), x), x)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._both is None:
            return self.drift(x, t), self.diffusion(x, t)
        f, g = self._both(_one_time(t), x)
        return f, self._vector(g, x)

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        if self.has_diffusion:
            return super().diffusion_product(x, t, dW)
        if self._product is not None:
            product: Tensor = self._product(_one_time(t), x, dW)
        else:
            product = self._both_by_product(_one_time(t), x, dW)[1]
        return product

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        return None if self.has_diffusion or self._channels is None else (self._channels,)

    def _vector(self, g: Tensor, x: Tensor) -> Tensor:
        return g.squeeze(-1) if self.noise is Noise.SCALAR and g.ndim == x.ndim + 1 else g


@final
class ToTorchSDE(nn.Module):
    r"""One of our SDEs as torchsde wants it: ``f(t, y)``, ``g(t, y)`` on flat states, with time growing.

    torchsde's times increase. Where ours decrease, as in a reverse SDE, the equation is handed over in ``s = -t``:
    ``dY = -f(Y, -s) ds + g(Y, -s) dW``. `times` and `states` translate there and back::

        theirs = ToTorchSDE(process.reverse(score), x, 1.0, 1e-3)
        ys = torchsde.sdeint(theirs, theirs.y0, theirs.times([1.0, 1e-3]), dt=1e-3, method="euler")
        samples = theirs.states(ys)[-1]

    Additive noise that acts on each entry by itself is declared diagonal, which it is too: torchsde would want it as a
    matrix ``(batch, size, size)``. A method of torchsde's ``additive`` class is then not available for it.

    Gradients flow to a network through ``sdeint``. ``sdeint_adjoint`` has to be told of its parameters:
    ``adjoint_params=tuple(score.parameters())``.

    Args:
        sde: an SDE.
        x0: a state ``(batch, *state)`` to start from.
        t0: time of the start.
        t1: a later time of the same integration, which tells the direction.

    Raises:
        TypeError: ``sde`` is not an SDE; a state in another dtype than float32 or float64; a field of another dtype.
        ValueError: an ODE; ``t0 == t1``; a field that does not fit the state.
    """

    def __init__(self, sde: AbstractSDE, x0: Tensor, t0: float, t1: float) -> None:
        super().__init__()
        refuse_jumps(sde, "torchsde integrates drift and diffusion", "give the part between jumps")
        if not isinstance(sde, AbstractSDE):
            raise TypeError(f"sde must be an SDE or process of sdesolve, got {type(sde).__name__}")
        if sde.noise is Noise.NONE:
            raise ValueError("torchsde integrates equations with noise, and this is an ODE; sdesolve.solve takes it")
        if t0 == t1 or not math.isfinite(t0) or not math.isfinite(t1):
            raise ValueError(f"t0 and t1 must be different finite times, got {short(t0)} and {t1}")
        check_state(x0)
        self._sde, self._shape, self._sign = sde, tuple(x0.shape[1:]), 1.0 if t1 > t0 else -1.0
        t = torch.tensor(t0, dtype=x0.dtype, device=x0.device)
        check_drift(sde.drift(x0, t), x0, t)
        g = sde.diffusion(x0, t)
        check_diffusion(g, x0, sde.noise)
        by_entry = sde.noise is Noise.ADDITIVE and not is_matrix(g, x0)
        self.noise_type = str(Noise.DIAGONAL if by_entry else sde.noise)
        self.sde_type = str(sde.calculus)
        self.y0 = x0.flatten(1) if x0.ndim > 1 else x0[:, None]

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """The drift in torchsde's time, ``(batch, size)``."""
        x = self._unflattened(y)
        return self._sign * self._sde.drift(x, self._sign * t).reshape(y.shape)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """The diffusion: ``(batch, size)`` if diagonal, else ``(batch, size, channels)``."""
        x = self._unflattened(y)
        g = self._sde.diffusion(x, self._sign * t)
        if is_matrix(g, x):
            return g.expand(*x.shape, g.shape[-1]).reshape(*y.shape, g.shape[-1])
        flat = g.expand(x.shape).reshape(y.shape)
        return flat if self.noise_type == Noise.DIAGONAL else flat.unsqueeze(-1)

    def times(self, ts: Sequence[float] | Tensor) -> Tensor:
        """Our times ``(n,)``, running from ``t0`` towards ``t1``, as torchsde's, which increase."""
        return self._sign * torch.as_tensor(ts, dtype=self.y0.dtype, device=self.y0.device)

    def states(self, ys: Tensor) -> Tensor:
        """What ``sdeint`` returned, ``(n, batch, size)``, as states ``(n, batch, *state)``."""
        return ys.reshape(*ys.shape[:2], *self._shape)

    def _unflattened(self, y: Tensor) -> Tensor:
        return y.reshape(len(y), *self._shape)


@final
class TorchSDENoise(AbstractNoise):
    """Brownian increments from a torchsde ``BrownianInterval``, to integrate along the very path that torchsde takes.

    On grids whose times decrease the interval is asked in ``s = -t``, as by `ToTorchSDE`.

    Args:
        interval: ``interval(ta, tb) = W(tb) - W(ta)``, ``(batch, channels)``, for ``ta <= tb``.

    Raises:
        TypeError: ``interval`` cannot be called.
    """

    timeless = False

    def __init__(self, interval: Callable[..., Any]) -> None:
        if not callable(interval):
            raise TypeError(f"interval must be a BrownianInterval of torchsde, got {type(interval).__name__}")
        self._interval = interval

    def increments(
        self,
        times: Tensor,
        shape: tuple[int, ...],
        *,
        step: int = 0,
        of: Part = "W",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        if times.ndim != 1:
            raise ValueError(f"torchsde has one time for all samples; this grid has shape {tuple(times.shape)}")
        sign = 1.0 if len(times) < 2 or times[1] > times[0] else -1.0
        made = [torch.as_tensor(self._interval(sign * a, sign * b)) for a, b in itertools.pairwise(times)]
        size = math.prod(shape[1:])
        for dW in made:
            if tuple(dW.shape) != (shape[0], size):
                raise ValueError(
                    f"the integration needs increments of shape {(shape[0], size)}, and the interval has "
                    f"{tuple(dW.shape)}; build it with size={(shape[0], size)}"
                )
        return torch.stack(made).to(dtype=dtype, device=device).reshape(len(made), *shape)


_NOISE_TYPES = tuple(str(noise) for noise in Noise if noise is not Noise.NONE)


def _one_time(t: Tensor) -> Tensor:
    if t.ndim:
        raise ValueError("torchsde has one time for all samples, and this grid has a time for each; use a shared grid")
    return t
