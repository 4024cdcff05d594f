"""Equations whose paths jump: SDEs with jumps at random times, and networks of reactions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import flag, kind_of, positional, short, whole_number
from sdesolve.sde import ODE, SDE, AbstractSDE, Calculus, CalculusName, Field, Noise, NoiseName

Mark = Literal["normal", "uniform"] | Callable[[Tensor], Tensor]


class AbstractJumping(AbstractSDE):
    """An equation whose paths jump. `solve` keeps to its jumps, whatever moves paths between them."""


def refuse_jumps(sde: object, what: str, instead: str) -> None:
    """Refuses an equation that jumps where its jumps would be left out.

    Raises:
        ValueError: it is one.
    """
    if isinstance(sde, AbstractJumping):
        raise ValueError(f"{what}, and {type(sde).__name__} jumps: {instead}")


@final
class JumpSDE(AbstractJumping):
    r"""``dX = f(X, t) dt + g(X, t) dW + c(X-, t, Z) dN``: an SDE, or an ODE, with jumps ``c`` at the points of ``N``.

    ``N`` has the intensity ``rate(X-, t)``, per unit of time in either direction. Jumps are not compensated: where the
    model says ``dN - rate dt``, subtract the mean in the drift.

    **When.** Candidates are the points of a Poisson process of the intensity ``bound``, and each is a jump with
    probability ``rate / bound`` (thinning: Lewis and Shedler 1979; Ogata 1981), which is exact. Candidate ``n`` of a
    path, and the mark of its jump ``j``, are functions of ``(seed, path, n)`` and ``(seed, path, j)``: not of the
    batch, of what others do, or, with a bound that is one number, of the grid.

    **How.** Steps are jump-adapted: one that holds a candidate ends there, on the Brownian motion of the very path (it
    is cut given its ``W``, ``H`` and ``K``), and another goes on from there. The solver keeps its order.
    Bruti-Liberati and Platen 2010, chapter 8. With ``adapted=False`` steps are those of the grid, and jumps are made at
    their ends: of weak order 1 and strong order 1/2 at most, for solvers that cannot take parts of a step.

    Gradients flow through states, and to whatever drift, diffusion and jumps are made of; jump times count as
    constants. Those of a rate that depends on what is differentiated are none, and it is refused: the law of the jumps
    depends on it too. ``rate=lambda x, t: a * x.detach()[:, 0]`` leaves that part out.

    Args:
        drift: ``f(x, t)``; or a whole SDE or ODE, for the part without jumps.
        diffusion: ``g(x, t)`` as for `SDE`, or ``None`` for none.
        noise: as for `SDE`.
        calculus: as for `SDE`; it matters between the jumps alone.
        rate: a number; or ``rate(x, t)``, ``(batch,)``, at ``t: (batch,)``, not negative, with a ``bound``.
        jump: ``c(x, t, z)``, or ``c(x, t)`` for jumps without marks, of the shape of ``x`` or what broadcasts to it;
            ``t`` is ``(batch, 1, ..., 1)``, with as many axes as ``x``. A number is one size for all.
        bound: of the rate: a number, or ``bound(x, t)``, ``(batch,)``, which holds from ``t`` until the next candidate
            or the end of the step, as one does that only falls in between. A rate that exceeds it is refused.
        mark: the law of ``z``, ``(batch, marks)``: ``normal``, standard; ``uniform``, in (0, 1), of 64 bits; or a
            function of such uniform numbers in float64, as the quantile function of another law.
        marks: how many numbers make a mark.
        adapted: whether steps end at jumps.
        max_jumps: candidates that a path may have before `solve` gives up.

    Raises:
        TypeError: something is no function, or a rate that is one has no bound.
        ValueError: a rate or bound that is negative or not finite; an unknown mark.

    Example:
        >>> merton = JumpSDE(lambda x, t: 0.05 * x, lambda x, t: 0.2 * x, rate=0.75,
        ...                  jump=lambda x, t, z: x * torch.expm1(-0.1 + 0.15 * z))
    """

    def __init__(
        self,
        drift: Field | AbstractSDE,
        diffusion: Field | None = None,
        noise: NoiseName | None = None,
        calculus: CalculusName = "ito",
        *,
        rate: float | Callable[..., Any],
        jump: float | Callable[..., Any],
        bound: float | Callable[..., Any] | None = None,
        mark: Mark = "normal",
        marks: int = 1,
        adapted: bool = True,
        max_jumps: int = 100_000,
    ) -> None:
        if isinstance(drift, AbstractSDE):
            if diffusion is not None or noise is not None:
                raise TypeError(f"{type(drift).__name__} has its own diffusion and noise; leave them out")
            if isinstance(drift, AbstractJumping):
                raise TypeError(
                    "the part without jumps has jumps; let one rate and one mark choose between their kinds"
                )
            self.between = drift
        else:
            self.between = ODE(drift) if diffusion is None else SDE(drift, diffusion, noise, calculus)
        self.noise, self.calculus = self.between.noise, self.between.calculus
        self.own_component, self.joint = self.between.own_component, self.between.joint
        self.has_diffusion = self.between.has_diffusion
        self.rate = rate if callable(rate) else _intensity(rate, "rate")
        if callable(rate) and bound is None:
            raise TypeError(
                "a rate that is a function needs bound=, what it never exceeds: a number, or bound(x, t) that holds "
                "until the next candidate or the end of the step"
            )
        self.bound = bound if callable(bound) else self.rate if bound is None else _intensity(bound, "bound")
        if isinstance(self.rate, float) and isinstance(self.bound, float) and self.rate > self.bound:
            raise ValueError(
                f"rate={self.rate:.6g} exceeds bound={self.bound:.6g}; leave bound out for a constant rate"
            )
        if not (callable(jump) or isinstance(jump, int | float)):
            raise TypeError(f"jump must be a function of (x, t, z) or (x, t), or a number, got {kind_of(jump)}")
        if not callable(mark) and (not isinstance(mark, str) or mark not in ("normal", "uniform")):
            raise ValueError(f"mark must be 'normal', 'uniform' or a function of uniform numbers, got {short(mark)}")
        self.jump, self.mark, self.marks = jump, mark, whole_number(marks, "marks", 1)
        self.adapted, self.max_jumps = flag(adapted, "adapted"), whole_number(max_jumps, "max_jumps", 1)

    def _with(self, between: AbstractSDE, **functions: Any) -> JumpSDE:
        made = copy.copy(self)
        made.between = between
        vars(made).update(functions)
        return made

    def with_params(self, params: Any) -> JumpSDE:
        """This equation with ``params`` as a last argument of drift, diffusion, rate, bound and jump."""
        if not isinstance(self.between, SDE | ODE):
            raise TypeError(
                f"params go to functions, and {type(self.between).__name__} has none; let it hold its parameters"
            )
        own = {
            name: _with_last(value, params, positional(value) if name == "jump" else 3)
            for name, value in (("rate", self.rate), ("bound", self.bound), ("jump", self.jump))
            if callable(value)
        }
        return self._with(self.between.with_params(params), **own)

    def directed(self, sign: float | Tensor) -> JumpSDE:
        return self._with(self.between.directed(sign))

    def channels(self, x: Tensor) -> tuple[int, ...] | None:
        return self.between.channels(x)

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.between.drift(x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.between.diffusion(x, t)

    def drift_and_diffusion(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.between.drift_and_diffusion(x, t)

    def diffusion_product(self, x: Tensor, t: Tensor, dW: Tensor) -> Tensor:
        return self.between.diffusion_product(x, t, dW)


@final
class Reactions(AbstractJumping):
    r"""Counts of species that reactions change: ``X -> X + nu_j`` at the rate ``a_j(X, t)``, for each reaction ``j``.

    `Gillespie` simulates it exactly, `TauLeap` in leaps over many reactions. Its approximations are equations of their
    own: `langevin`, `hybrid`, `mean_field`. States are counts: whole numbers that are not negative, ``(batch,
    species)``, in float64, or in float32 up to 2^24.

    Args:
        stoichiometry: ``nu``, ``(species, reactions)``: column ``j`` is what reaction ``j`` changes, in whole numbers.
        propensities: ``a(x, t)``, ``(batch, reactions)``, at ``t: (batch,)``, not negative, and 0 where a reaction
            would leave fewer than none of a species.

    Raises:
        TypeError: ``propensities`` is no function, ``stoichiometry`` no matrix of numbers.
        ValueError: ``stoichiometry`` is no matrix of whole numbers.

    Example:
        >>> dimers = Reactions([[-2, 2, -1], [1, -1, 0]], lambda x, t: torch.stack(
        ...     [0.002 * x[:, 0] * (x[:, 0] - 1) / 2, 0.5 * x[:, 1], x[:, 0]], dim=1))
        >>> sol = solve(dimers, x0, 0.0, 30.0, steps=300, solver=TauLeap(), seed=0)
    """

    noise = Noise.GENERAL
    calculus = Calculus.ITO

    def __init__(self, stoichiometry: Any, propensities: Callable[..., Tensor]) -> None:
        if not callable(propensities):
            raise TypeError(f"propensities must be a function of (x, t), got {kind_of(propensities)}")
        try:
            nu = torch.as_tensor(stoichiometry).detach().to(dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as problem:
            raise TypeError(
                f"stoichiometry must be a matrix of whole numbers, (species, reactions), got {kind_of(stoichiometry)}"
            ) from problem
        if nu.ndim != 2 or not nu.numel():
            raise ValueError(
                f"stoichiometry must be a matrix, (species, reactions), with a column for each reaction; got shape "
                f"{tuple(nu.shape)}"
            )
        if not bool((nu == nu.round()).all()):
            raise ValueError("stoichiometry must hold whole numbers: what one reaction changes each count by")
        self.stoichiometry, self._propensities = nu, propensities

    def with_params(self, params: Any) -> Reactions:
        """These reactions with ``params`` as a third argument of ``propensities``."""
        return Reactions(self.stoichiometry, _with_last(self._propensities, params))

    def propensities(self, x: Tensor, t: Tensor) -> Tensor:
        """``a(x, t)``, ``(batch, reactions)``.

        Raises:
            ValueError: it has another shape; ``x`` has another number of species.
            TypeError: it is no tensor.
        """
        species, reactions = self.stoichiometry.shape
        if x.ndim != 2 or x.shape[1] != species:
            raise ValueError(
                f"stoichiometry has {species} rows, so states are (batch, {species}); got shape {tuple(x.shape)}"
            )
        a = self._propensities(x, t)
        if not isinstance(a, Tensor):
            raise TypeError(f"propensities must return a tensor, (batch, {reactions}), got {type(a).__name__}")
        if a.shape != (len(x), reactions):
            raise ValueError(
                f"propensities must return a number for each of {reactions} reactions (columns of stoichiometry), "
                f"{(len(x), reactions)}, got {tuple(a.shape)}; torch.stack([...], dim=1) puts them together"
            )
        return a

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """``nu a(x, t)``."""
        return self._flow(x, t, slice(None))

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        """``nu diag(sqrt a(x, t))``, ``(batch, species, reactions)``."""
        return self._spread(x, t, slice(None))

    def _flow(self, x: Tensor, t: Tensor, which: Any) -> Tensor:
        return self.propensities(x, t)[:, which] @ self.stoichiometry[:, which].T.to(x)

    def _spread(self, x: Tensor, t: Tensor, which: Any) -> Tensor:
        return self.stoichiometry[:, which].to(x) * self.propensities(x, t)[:, which].clamp_min(0.0).sqrt()[:, None]

    def langevin(self) -> SDE:
        """The chemical Langevin equation ``dX = nu a dt + nu diag(sqrt a) dW``, an Ito SDE of general noise.

        For large counts. Propensities below 0 have no noise. Gillespie 2000, Journal of Chemical Physics 113.
        """
        return SDE(self.drift, self.diffusion, noise="general", calculus="ito")

    def mean_field(self) -> ODE:
        """The rate equations ``dX = nu a dt``."""
        return ODE(self.drift)

    def hybrid(self, fast: Iterable[int], bound: float | Callable[..., Tensor]) -> JumpSDE:
        """Langevin noise for reactions with large counts, jumps for the others, simulated exactly given the former.

        Haseltine and Rawlings 2002, Journal of Chemical Physics 117.

        Args:
            fast: numbers of the reactions that are part of the Langevin equation.
            bound: of the total propensity of the others, as for `JumpSDE`.
        """
        count = self.stoichiometry.shape[1]
        chosen = sorted({whole_number(j, "each of fast", 0) for j in fast})
        if not chosen or chosen[-1] >= count or len(chosen) == count:
            raise ValueError(
                f"fast must name some of the reactions 0 ... {count - 1}, and not all, got {short(chosen)}"
            )
        slow = [j for j in range(count) if j not in chosen]

        def jump(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
            parts = self.propensities(x, t.reshape(-1))[:, slow].cumsum(1)
            j = (parts <= u * parts[:, -1:]).sum(1).clamp_max(len(slow) - 1)
            return self.stoichiometry.T[slow].to(x)[j]

        return JumpSDE(
            lambda x, t: self._flow(x, t, chosen),
            lambda x, t: self._spread(x, t, chosen),
            noise="general",
            rate=lambda x, t: self.propensities(x, t)[:, slow].sum(1),
            bound=bound,
            jump=jump,
            mark="uniform",
        )


def _intensity(value: Any, name: str) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name} is a tensor that asks for gradients, and jump times have none: give float({name}), or detach it"
        )
    try:
        made = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number or a function of (x, t), got {short(value)}") from None
    if not 0.0 <= made < float("inf"):
        raise ValueError(f"{name} must be finite and not negative, got {short(value)}")
    return made


def _with_last(function: Callable[..., Any], params: Any, takes: int = 3) -> Callable[..., Any]:
    if takes > 3:
        return lambda x, t, z: function(x, t, z, params)
    return lambda x, t: function(x, t, params)
