"""Linear operators of inverse problems: what of a state was observed."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import number, real, short
from sdesolve._internal.copies import Copies


class _Basis(NamedTuple):
    """``A A^T = U diag(values) U^T``."""

    values: Copies
    vectors: Copies


class AbstractOperator(abc.ABC):
    """A linear map ``A`` from states ``(batch, *state_shape)`` to observations ``(batch, *observation_shape)``.

    Subclasses give the map, its adjoint and a solver for ``c A A^T + s I``; all three are linear, act on each row alone
    and are differentiable.

    Attributes:
        state_shape: shape of one state.
        observation_shape: shape of one observation.
        rows: how many states it is for, where each has a map of its own; ``None`` for one map and any number of them.
    """

    state_shape: tuple[int, ...]
    observation_shape: tuple[int, ...]
    rows: int | None = None

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``A x``, ``(batch, *observation_shape)``."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``, ``(batch, *state_shape)``."""

    @abc.abstractmethod
    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        """``(c A A^T + s I)^-1 r``, the pseudo-inverse where ``s = 0`` and ``A A^T`` is singular.

        Args:
            r: ``(batch, *observation_shape)``.
            c: positive, ``()`` or ``(batch,)``.
            s: not negative, of the shape of ``c``.
        """

    @final
    def __call__(self, x: Tensor) -> Tensor:
        """``A x``.

        Raises:
            TypeError: ``x`` is no floating-point tensor.
            ValueError: ``x`` is not ``(batch, *state_shape)``.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim == 0 or tuple(x.shape[1:]) != self.state_shape:
            hint = "; for a single state pass x[None]" if tuple(x.shape) == self.state_shape else ""
            raise ValueError(
                f"this operator takes states of shape (batch, *{self.state_shape}), got {tuple(x.shape)}{hint}"
            )
        self.check_rows(len(x))
        return self.forward(x)

    @final
    def check_rows(self, count: int) -> None:
        """Refuses another number of states than there are maps.

        Raises:
            ValueError: it is another.
        """
        if self.rows not in (None, count):
            raise ValueError(f"this operator has a map for each of {self.rows} states, and there are {count} states")

    @final
    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """``A^+ y = A^T (A A^T)^+ y``, ``(batch, *state_shape)``."""
        return self.adjoint(self.solve_gram(y, y.new_ones(()), y.new_zeros(())))

    @final
    def matrix(self) -> Tensor:
        """``A`` over flattened states and observations, ``(m, d)``, float64; costs ``d`` applications.

        Raises:
            ValueError: each state has a map of its own.
        """
        if self.rows is not None:
            raise ValueError(
                f"this operator has a map for each of {self.rows} states and no single matrix; ask each of its rows"
            )
        d = math.prod(self.state_shape)
        columns = self.forward(torch.eye(d, dtype=torch.float64).reshape(d, *self.state_shape))
        return columns.reshape(d, -1).mT.contiguous()


@final
class Matrix(AbstractOperator):
    """``y = A x`` for a matrix over the flattened state.

    Args:
        matrix: ``(m, d)``.
        state_shape: shape of one state, ``(d,)`` by default.

    Raises:
        ValueError: no matrix, columns that are not as many as elements of the state, values that are not finite.
    """

    def __init__(self, matrix: Tensor, state_shape: tuple[int, ...] | None = None) -> None:
        A = _real_matrix(matrix, "matrix")
        m, d = A.shape
        self.state_shape = (d,) if state_shape is None else tuple(state_shape)
        self.observation_shape = (m,)
        if math.prod(self.state_shape) != d:
            raise ValueError(
                f"the matrix has {d} columns and a state of shape {self.state_shape} has "
                f"{math.prod(self.state_shape)} elements; they must agree"
            )
        self._A, self._basis = Copies(A), _gram_basis(A)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), math.prod(self.state_shape)) @ self._A.like(x).mT

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self._A.like(y)).reshape(len(y), *self.state_shape)

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        values, U = (part.like(r) for part in self._basis)
        return _divide(r @ U, values, c, s) @ U.mT


@final
class Mask(AbstractOperator):
    """``y = x[mask]``: some elements are seen as they are, the others not at all (inpainting).

    Args:
        mask: booleans of the shape of the state, true where it is observed. Observations are vectors of the observed
            elements, in the order of ``x[:, mask]``.

    Raises:
        TypeError: ``mask`` is not boolean.
        ValueError: nothing is observed.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask must be boolean, true where the state is observed; got {mask.dtype}, use mask.bool()"
            )
        if not bool(mask.any()):
            raise ValueError(f"the mask of shape {tuple(mask.shape)} observes nothing")
        seen = mask.detach().cpu().reshape(-1).nonzero()[:, 0]
        self.state_shape = tuple(mask.shape)
        self.observation_shape = (len(seen),)
        self._seen = Copies(seen)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), math.prod(self.state_shape)).index_select(1, self._seen.like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        zero = y.new_zeros(len(y), math.prod(self.state_shape))
        return zero.index_copy(1, self._seen.like(y), y).reshape(len(y), *self.state_shape)

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        v = c + s
        return r / (v.unsqueeze(-1) if v.ndim else v)  # a single number may stay on the host


@final
class Masks(AbstractOperator):
    """``y = mask * x`` with a mask for each state of a batch: inpainting with holes that differ from image to image.

    Observations have the shape of the state. What they hold where nothing is observed does not matter.

    Args:
        masks: booleans ``(batch, *state)``, true where a state is observed.

    Raises:
        TypeError: ``masks`` is not boolean.
        ValueError: no batch axis, or a mask that observes nothing.
    """

    def __init__(self, masks: Tensor) -> None:
        masks = torch.as_tensor(masks)
        if masks.dtype != torch.bool:
            raise TypeError(
                f"masks must be boolean, true where states are observed; got {masks.dtype}, use masks.bool()"
            )
        if masks.ndim == 0 or not bool(masks.reshape(len(masks), -1).any(1).all()):
            raise ValueError(
                f"masks must be (batch, *state) and observe something of every state, got shape {tuple(masks.shape)}"
            )
        self.rows, self.state_shape = len(masks), tuple(masks.shape[1:])
        self.observation_shape = self.state_shape
        self._masks = Copies(masks.detach().cpu().double())

    def forward(self, x: Tensor) -> Tensor:
        return self._masks.like(x) * x

    def adjoint(self, y: Tensor) -> Tensor:
        return self._masks.like(y) * y

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return _divide(r, self._masks.like(r), c, s)


@final
class PerSample(AbstractOperator):
    """An operator for each state of a batch: ``y_i = A_i x_i``.

    They are applied one after another. For masks of different sizes, and for many, there is `Masks`.

    Args:
        operators: as many as states, each of states and observations of the same shapes.

    Raises:
        TypeError: one of them is no operator.
        ValueError: none, or shapes that differ.
    """

    def __init__(self, operators: Sequence[AbstractOperator]) -> None:
        self._operators = tuple(operators)
        if not self._operators:
            raise ValueError("PerSample needs an operator for each state, got none")
        for A in self._operators:
            if not isinstance(A, AbstractOperator):
                raise TypeError(f"operators must be some of sdesolve.operators, got {type(A).__name__}")
        shapes = {(A.state_shape, A.observation_shape) for A in self._operators}
        if len(shapes) > 1 or any(A.rows not in (None, 1) for A in self._operators):
            raise ValueError(
                f"each operator is for one state, with observations of one shape; got {len(shapes)} different shapes. "
                "For masks that observe different numbers of elements take operators.Masks"
            )
        ((self.state_shape, self.observation_shape),) = shapes
        self.rows = len(self._operators)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([A.forward(row) for A, row in zip(self._operators, x.split(1), strict=True)])

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([A.adjoint(row) for A, row in zip(self._operators, y.split(1), strict=True)])

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        c, s = (v.expand(len(r)).split(1) for v in (c, s))
        parts = zip(self._operators, r.split(1), c, s, strict=True)
        return torch.cat([A.solve_gram(row, c_row, s_row) for A, row, c_row, s_row in parts])


@final
class ChannelMixing(AbstractOperator):
    """``y_jp = sum_c M_jc x_cp`` at every place ``p``: channels are mixed, as when colours become grey.

    Args:
        mixing: ``M``, ``(observed channels, channels)``; ``torch.full((1, 3), 1 / 3)`` for grey.
        state_shape: ``(channels, *places)``.

    Raises:
        ValueError: no matrix, or one that does not fit the channels; values that are not finite.
    """

    def __init__(self, mixing: Tensor, state_shape: tuple[int, ...]) -> None:
        M = _real_matrix(mixing, "mixing")
        self.state_shape = tuple(state_shape)
        rows, channels = M.shape
        if not self.state_shape or self.state_shape[0] != channels:
            raise ValueError(
                f"mixing has {channels} columns and takes states (channels, *places) with as many channels, got "
                f"state_shape={self.state_shape}"
            )
        self.observation_shape = (rows, *self.state_shape[1:])
        self._M, self._basis = Copies(M), _gram_basis(M)

    def forward(self, x: Tensor) -> Tensor:
        return _mix(self._M.like(x), x)

    def adjoint(self, y: Tensor) -> Tensor:
        return _mix(self._M.like(y).mT, y)

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        values, U = (part.like(r) for part in self._basis)
        y = _mix(U.mT, r)
        return _mix(U, _divide(y.movedim(1, -1), values, c, s).movedim(-1, 1))


@final
class Blur(AbstractOperator):
    """Circular convolution with a kernel over the last axes of the state, by FFT (deblurring).

    ``y_p = sum_q k_q x_{p - q + centre}``, indices wrapping around, ``centre = size // 2`` along each axis; every
    channel is blurred alike.

    Args:
        kernel: any rank from 1 to that of the state, at most as large as the state along each of its axes.
        state_shape: shape of one state.

    Raises:
        ValueError: a kernel with more axes than the state or larger than it; values that are not finite.
    """

    def __init__(self, kernel: Tensor, state_shape: tuple[int, ...]) -> None:
        k = real(kernel, "kernel")
        self.state_shape = self.observation_shape = tuple(state_shape)
        places = self.state_shape[len(self.state_shape) - k.ndim :]
        if k.ndim == 0 or k.ndim > len(self.state_shape) or any(a > b for a, b in zip(k.shape, places, strict=True)):
            raise ValueError(
                f"a kernel of shape {tuple(k.shape)} does not fit into a state of shape {self.state_shape}; it needs "
                "at least one axis, and none longer than the state's"
            )
        padded = torch.zeros(places, dtype=torch.float64)
        padded[tuple(slice(0, n) for n in k.shape)] = k
        padded = padded.roll([-(n // 2) for n in k.shape], list(range(k.ndim)))
        self._places, self._axes = places, tuple(range(-k.ndim, 0))
        response = torch.fft.rfftn(padded)
        power = response.abs().square()
        self._response, self._conjugate = Copies(response), Copies(response.conj().resolve_conj())
        self._power = Copies(torch.where(power > _rounding(power, math.prod(places)), power, 0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self._response.like(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self._multiply(y, self._conjugate.like(y))

    def solve_gram(self, r: Tensor, c: Tensor, s: Tensor) -> Tensor:
        shape = (*c.shape, *(1,) * (r.ndim - 1)) if c.ndim else ()
        v = c.reshape(shape) * self._power.like(r) + s.reshape(shape)
        R = torch.fft.rfftn(r, dim=self._axes)
        return torch.fft.irfftn(torch.where(v > 0, R / v, 0.0), s=self._places, dim=self._axes)

    def _multiply(self, x: Tensor, response: Tensor) -> Tensor:
        return torch.fft.irfftn(response * torch.fft.rfftn(x, dim=self._axes), s=self._places, dim=self._axes)


def as_operator(operator: AbstractOperator | Tensor, state_shape: tuple[int, ...]) -> AbstractOperator:
    """``operator`` itself, or a matrix ``(m, d)`` over the flattened state as one, for states of this shape.

    Raises:
        TypeError: neither an operator nor a tensor.
        ValueError: it takes states of another shape.
    """
    if isinstance(operator, Tensor):
        return Matrix(operator, state_shape)
    if not isinstance(operator, AbstractOperator):
        raise TypeError(f"operator must be one of sdesolve.operators or a matrix, got {type(operator).__name__}")
    if operator.state_shape != tuple(state_shape):
        raise ValueError(f"the operator takes states of shape {operator.state_shape}, these are {tuple(state_shape)}")
    return operator


def check_observation(operator: AbstractOperator, y: Tensor, *, single: bool = False) -> Tensor:
    """``y`` as ``(batch, *observation_shape)``; ``(1, *observation_shape)`` if it is a single one; 0 where masked.

    Raises:
        TypeError: not a real tensor.
        ValueError: another shape; values that are not finite.
    """
    y = torch.as_tensor(y).detach()
    if y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y must be real, got {y.dtype}")
    shape = operator.observation_shape
    if tuple(y.shape) == shape:
        y = y[None]
    elif single or tuple(y.shape[1:]) != shape or y.ndim == 0:
        batched = "" if single else f" for all samples, or (batch, *{shape}) for one each"
        raise ValueError(f"y must have shape {shape}{batched}, to fit the operator; got {tuple(y.shape)}")
    if not bool(y.isfinite().all()):
        raise ValueError("y must be finite, it holds nan or inf")
    y = y if y.is_floating_point() else y.double()
    return operator.forward(y.expand(operator.rows or 1, *shape)) if isinstance(operator, Masks) else y


def check_noise_std(noise_std: float, *, positive: bool = False) -> float:
    """Refuses a standard deviation that is negative or not finite, or 0 where it must be positive."""
    if isinstance(noise_std, bool):
        raise TypeError("noise_std must be a number, got bool")
    noise_std = number(noise_std, "noise_std")
    if not (0.0 <= noise_std < math.inf):
        raise ValueError(f"noise_std is a standard deviation, finite and not negative; got {short(noise_std)}")
    if positive and noise_std == 0:
        raise ValueError(
            "this method divides by the variance of the observation noise, so noise_std cannot be 0; give a small "
            "positive one, or take PiGDM or MMPS"
        )
    return float(noise_std)


def _divide(y: Tensor, values: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """``y / (c values + s)`` along the last axis, 0 where that divides by 0."""
    shape = (*c.shape, *(1,) * (y.ndim - 1)) if c.ndim else ()
    v = c.reshape(shape) * values + s.reshape(shape)
    return torch.where(v > 0, y / torch.where(v > 0, v, 1.0), 0.0)


def _mix(M: Tensor, x: Tensor) -> Tensor:
    return (M @ x.flatten(2)).reshape(len(x), len(M), *x.shape[2:]) if x.ndim > 2 else x @ M.mT


def _gram_basis(A: Tensor) -> _Basis:
    values, vectors = torch.linalg.eigh(A @ A.mT)
    positive = torch.where(values > _rounding(values, max(A.shape)), values, 0.0)
    return _Basis(Copies(positive), Copies(vectors))


def _rounding(values: Tensor, size: int) -> Tensor:
    """Below this, an eigenvalue computed in float64 cannot be told from 0."""
    return size * torch.finfo(torch.float64).eps * values.max()


def _real_matrix(value: Tensor, name: str) -> Tensor:
    matrix = real(value, name)
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a matrix with at least one row and column, got shape {tuple(matrix.shape)}")
    return matrix
