"""Traces of Jacobians of scores: exact, or estimated from random probes several times over, which tells the error."""

from __future__ import annotations

import abc
from typing import Annotated, Literal, final

import torch
from sdesolve_kernels import Stream
from torch import Tensor

from sdesolve._internal.arguments import short, whole_number
from sdesolve.brownian import BrownianPath, Increments

ProbeLaw = Literal["rademacher", "gaussian"]
_KINDS: dict[str, Increments] = {"rademacher": "two-point", "gaussian": "normal"}


class AbstractDivergence(abc.ABC):
    """Estimates ``div s(x) = tr(ds/dx)`` of a vector field of which each sample sees its own state alone.

    Fields are differentiated backwards, which every torch module supports. A field that mixes the samples of a batch,
    as batch normalisation does in training mode, has another divergence than the one found here.
    """

    @abc.abstractmethod
    def estimates(self, dimension: int) -> int:
        """How many independent estimates each sample gets."""

    @abc.abstractmethod
    def probes(self, x: Tensor, *, seed: int, first_path: int = 0) -> Annotated[Tensor, "probes batch d"]:
        """The probes for states ``x: (batch, *state)``; row ``i`` is a function of ``(seed, first_path + i)`` alone.

        They come from ``Stream.PROBES``, so that any estimate can be made again.
        """

    @abc.abstractmethod
    def __call__(self, s: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool = False) -> Tensor:
        """Unbiased estimates of the divergence of ``s = s(x)``, ``(batch, estimates)``.

        Args:
            s: ``(batch, *state)``, computed from ``x`` under autograd.
            x: ``(batch, *state)``, requires gradients.
            probes: what `probes` gave.
            create_graph: whether the result is to be differentiated.
        """


@final
class ExactTrace(AbstractDivergence):
    """The trace itself, from one backward pass a dimension: for states of up to some 64 dimensions."""

    def estimates(self, dimension: int) -> int:
        return 1

    def probes(self, x: Tensor, *, seed: int, first_path: int = 0) -> Tensor:
        return x.new_empty(0, len(x), _dimension(x))

    def __call__(self, s: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool = False) -> Tensor:
        trace = x.new_zeros(len(x))
        for v in torch.eye(_dimension(x), dtype=x.dtype, device=x.device):
            trace = trace + (_transposed(s, x, v.expand(len(x), -1), create_graph) * v).sum(1)
        return trace.unsqueeze(1)

    def __repr__(self) -> str:
        return "ExactTrace()"


@final
class Hutchinson(AbstractDivergence):
    """``v^T (ds/dx) v`` for probes ``v`` of unit covariance (Hutchinson 1990; Grathwohl et al. 2019, eq. 8).

    An estimate has the variance ``2 |J|_F^2`` with Gaussian probes and ``2 (|J|_F^2 - sum_i J_ii^2)`` with Rademacher
    ones, ``J`` the symmetric part of the Jacobian: Rademacher probes are never worse, and exact where it is diagonal.

    Args:
        probes: independent estimates for each sample, one backward pass each.
        law: ``"rademacher"``, entries +-1 with equal chances, or ``"gaussian"``.

    Raises:
        ValueError: fewer than one probe, or an unknown law.
        TypeError: ``probes`` is not an integer.
    """

    def __init__(self, probes: int = 8, law: ProbeLaw = "rademacher") -> None:
        self.count, self.law = whole_number(probes, "probes", 1), _law(law)

    def estimates(self, dimension: int) -> int:
        return self.count

    def probes(self, x: Tensor, *, seed: int, first_path: int = 0) -> Tensor:
        return _draw(self.count, self.law, x, seed, first_path)

    def __call__(self, s: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool = False) -> Tensor:
        return torch.stack([(_transposed(s, x, v, create_graph) * v).sum(1) for v in probes], dim=1)

    def __repr__(self) -> str:
        return f"Hutchinson(probes={self.count}, law={self.law!r})"


@final
class HutchPP(AbstractDivergence):
    """Hutch++ (Meyer et al. 2021, algorithm 1): the trace on a random subspace exactly, on the rest by probes.

    With ``Q`` an orthonormal basis of ``J^T S``, ``S`` of ``rank`` Gaussian columns, and ``w = (1 - Q Q^T) v`` for a
    Gaussian ``v``, an estimate is ``tr(Q^T J^T Q) + (d - rank) w^T J^T w / |w|^2``. The length of ``w`` tells nothing
    (Epperly et al. 2024): without it, a multiple of the identity, which the Jacobian of a score is at high noise, has
    no variance left, and neither has what the leading directions contribute. The basis follows the Jacobian, so each
    call takes ``2 rank + probes`` backward passes.

    Args:
        probes: independent estimates for each sample.
        rank: dimension of the subspace; with that of the state, or one less, the trace is exact.

    Raises:
        ValueError: fewer than one probe, or a rank below one.
        TypeError: ``probes`` or ``rank`` is not an integer.
    """

    def __init__(self, probes: int = 8, rank: int = 8) -> None:
        self.count, self.rank = whole_number(probes, "probes", 1), whole_number(rank, "rank", 1)

    def estimates(self, dimension: int) -> int:
        return self.count

    def probes(self, x: Tensor, *, seed: int, first_path: int = 0) -> Tensor:
        return _draw(self.count + min(self.rank, _dimension(x)), "gaussian", x, seed, first_path)

    def __call__(self, s: Tensor, x: Tensor, probes: Tensor, *, create_graph: bool = False) -> Tensor:
        v, S = probes[: self.count], probes[self.count :]
        if not len(S):  # a state without numbers
            return x.new_zeros(len(x), self.count)
        sketch = torch.stack([_transposed(s, x, column, create_graph) for column in S], dim=2)
        # The estimate is unbiased whatever the basis: no gradient need go through the decomposition.
        Q = torch.linalg.qr(sketch.detach()).Q
        captured = sum(
            ((_transposed(s, x, q, create_graph) * q).sum(1) for q in Q.unbind(2)), start=x.new_zeros(len(x))
        )
        left = _dimension(x) - len(S)
        if left == 0:
            return captured.unsqueeze(1).expand(-1, self.count)
        rest = []
        for probe in v:
            w = probe - (Q @ (Q.mT @ probe.unsqueeze(2))).squeeze(2)
            w = w * (left**0.5 / w.norm(dim=1, keepdim=True))
            rest.append((_transposed(s, x, w, create_graph) * w).sum(1))
        return captured.unsqueeze(1) + torch.stack(rest, dim=1)

    def __repr__(self) -> str:
        return f"HutchPP(probes={self.count}, rank={self.rank})"


def _transposed(s: Tensor, x: Tensor, v: Tensor, create_graph: bool) -> Tensor:
    """``(ds/dx)^T v``, ``(batch, d)``."""
    if not s.requires_grad:  # a field that does not depend on its state
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(
        s, x, v.reshape(s.shape), retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return product.reshape(v.shape)


def _draw(count: int, law: str, x: Tensor, seed: int, first_path: int) -> Tensor:
    times = torch.arange(count + 1, dtype=torch.float64, device="cpu")
    source = BrownianPath(seed, first_path, stream=Stream.PROBES, kind=_KINDS[law])
    return source.increments(times, (len(x), _dimension(x)), dtype=x.dtype, device=x.device)


def _dimension(x: Tensor) -> int:
    return x.shape[1:].numel()


def _law(law: str) -> str:
    if law not in _KINDS:
        raise ValueError(f"law={short(law)} of probes is unknown; choose one of {', '.join(map(repr, _KINDS))}")
    return law
