"""Unit inputs of a chain: noise that is 0 but for one draw, and a random combination of all draws."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import final

import torch
from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve.brownian import AbstractNoise, AbstractStreams, Part

_DRIVING, _CORRECTORS = 0, 1


class AbstractNumbers(abc.ABC):
    """Standard normals by stream and draw, of a batch of rows."""

    @abc.abstractmethod
    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        """Draws ``first ... first + draws - 1``: ``(draws, *shape)``, float64, with ``shape = (rows, *channels)``."""


@final
class OracleNoise(AbstractStreams):
    """The noise that the oracle runs samplers with: of a Brownian motion, or one normal after another.

    A sampler of this library asks for increments. Any other calls it: each call gives the next standard normals, of the
    shape of the state that the sampler was given.

    Args:
        numbers: what noise is made from.
        shape: of the state, ``(batch, *state)``.
        stream: which independent sequence of numbers it draws.
    """

    def __init__(self, numbers: AbstractNumbers, shape: tuple[int, ...], stream: int = _DRIVING) -> None:
        self._numbers, self._shape, self._stream, self._next = numbers, shape, stream, 0

    def __call__(self) -> Tensor:
        """The next standard normals, ``(rows, *state)``, float64."""
        self._next += 1
        return self._numbers.take(self._stream, self._next - 1, 1, self._shape)[0]

    def correctors(self, draws: int) -> AbstractNoise:
        return OracleNoise(self._numbers, self._shape, _CORRECTORS)

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
        z = self._numbers.take(self._stream, step, len(times) - 1, shape)
        scale = times.diff().abs().sqrt().reshape(-1, *(1,) * len(shape))
        return (z * scale).to(dtype=dtype, device=device)


@final
class Silence(AbstractNumbers):
    """No noise. Keeps count of what was asked for."""

    def __init__(self) -> None:
        self.draws: dict[int, int] = {}
        self.channels: dict[int, tuple[int, ...]] = {}

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        self.draws[stream] = max(self.draws.get(stream, 0), first + draws)
        self.channels[stream] = shape[1:]
        return torch.zeros(draws, *shape, dtype=torch.float64)


@final
class Constant(AbstractNumbers):
    """The same number everywhere."""

    def __init__(self, value: float) -> None:
        self._value = value

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        return torch.full((draws, *shape), self._value, dtype=torch.float64)


@final
class Drawn(AbstractNumbers):
    """Fixed standard normals: rows are paths."""

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        m = math.prod(shape[1:])
        z = normal(
            shape[0],
            draws * m,
            seed=1 + stream,
            stream=Stream.PROBES,
            offset=first * m,
            dtype=torch.float64,
            device="cpu",
        )
        return z.reshape(shape[0], draws, *shape[1:]).transpose(0, 1)


@final
class UnitInputs:
    """All unit inputs of a chain, in blocks, and one random combination of them.

    Args:
        factor: displacements of the start, ``(rows, *state)``.
        heard: what a run without noise asked for.
        together: all channels of a draw share a row. Each then has random weights of its own, so that the combination
            shows an interaction of components as well.
    """

    def __init__(self, factor: Tensor, heard: Silence, together: bool) -> None:
        self._factor, self._together = factor, together
        weights = factor.shape if together else (len(factor), *(1,) * (factor.ndim - 1))
        self._start_weights = _random(0, math.prod(weights)).reshape(weights)
        self._weights = {
            stream: _random(1 + stream, draws * math.prod(heard.channels[stream])).reshape(
                draws, *heard.channels[stream]
            )
            for stream, draws in heard.draws.items()
        }

    def blocks(self, rows: int) -> Iterator[tuple[Tensor, OracleNoise, Tensor]]:
        """Displacements ``(rows, *state)``, noise, and weights in the combination, which broadcast to both."""
        state = self._factor.shape[1:]
        for first in range(0, len(self._factor), rows):
            part = self._factor[first : first + rows]
            yield part, OracleNoise(Silence(), tuple(part.shape)), self._start_weights[first : first + rows]
        for stream, weights in self._weights.items():
            each = weights if self._together else weights.reshape(-1, *(1,) * len(state))
            for first in range(0, len(each), rows):
                some = each[first : first + rows]
                numbers = _Units(stream, first, together=self._together)
                still = self._factor.new_zeros(len(some), *state)
                yield still, OracleNoise(numbers, tuple(still.shape)), some

    def combined(self) -> tuple[Tensor, OracleNoise]:
        """The random combination: a displacement of one row, and its noise."""
        start = (self._start_weights * self._factor).sum(0, keepdim=True)
        return start, OracleNoise(_Table(self._weights), tuple(start.shape))


@final
class _Units(AbstractNumbers):
    """One input of size 1 per row: row ``i`` has number ``first + i`` of all pairs of draw and channel of a stream.

    With ``together`` it has all channels of draw ``first + i``.
    """

    def __init__(self, stream: int, first: int, *, together: bool) -> None:
        self._stream, self._first, self._together = stream, first, together

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        rows, *channels = shape
        m = 1 if self._together else math.prod(channels)
        z = torch.zeros(draws, rows, m, dtype=torch.float64)
        if stream == self._stream:
            number = torch.arange(self._first, self._first + rows)
            k = number // m - first
            here = ((k >= 0) & (k < draws)).nonzero()[:, 0]
            z[k[here], here, number[here] % m] = 1.0
        if self._together:
            return z.reshape(draws, rows, *(1,) * len(channels)).expand(draws, *shape)
        return z.reshape(draws, *shape)


@final
class _Table(AbstractNumbers):
    """The same given numbers for every row."""

    def __init__(self, weights: dict[int, Tensor]) -> None:
        self._weights = weights

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        return self._weights[stream][first : first + draws].unsqueeze(1).expand(draws, *shape)


def seeded(path: int, shape: tuple[int, ...]) -> Tensor:
    """Fixed standard normals, float64."""
    return _random(path, math.prod(shape)).reshape(shape)


def _random(path: int, count: int) -> Tensor:
    return normal(1, count, seed=0, stream=Stream.PROBES, first_path=path, dtype=torch.float64)[0]
