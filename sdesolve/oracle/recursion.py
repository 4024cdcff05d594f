"""A sampler written out as a recursion over the points where it asks for the score, read off runs on unit inputs."""

from __future__ import annotations

import itertools
from typing import NamedTuple, final

import torch
from torch import Tensor

from sdesolve.diffusions.base import AbstractDiffusion
from sdesolve.oracle.inputs import AbstractNumbers, OracleNoise, Silence, seeded
from sdesolve.oracle.samplers import EXPECTED, Look, Sampler, Step
from sdesolve.reverse import Score
from sdesolve.scores.mixture import GaussianMixture

_LONGEST = 8  # points that a point may be made of
_SAME, _NONE = 1e-8, 1e-10  # of the size of the numbers


class Point(NamedTuple):
    """``y = offset + sum_j (a_j y_j + b_j s(y_j, t_j)) + c z`` with ``z`` used nowhere else.

    Attributes:
        time: where the score is asked for at ``y``; ``None`` at the start and at the end.
        window: indices ``j`` of earlier points, increasing.
        a: coefficients of those points.
        b: coefficients of the scores there.
        c: size of the noise, 0 for none.
        offset: a constant.
    """

    time: float | None
    window: tuple[int, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: float
    offset: float


Known = dict[int, tuple[Tensor, Tensor]]  # values and scores of points


@final
class Recursion:
    """All points of a run: 0 is its start, the last one its end, and at those between it asks for the score.

    Attributes:
        points: in the order in which they are reached.
        kept: for each point, the earlier ones that later points are made of.
        drawn: for each point, the random ones that it depends on if those are held: itself if noise was added there.
    """

    def __init__(self, score: Score, points: list[Point]) -> None:
        self._score, self.points = score, points
        self.kept: list[frozenset[int]] = []
        needed: frozenset[int] = frozenset()
        for i in reversed(range(len(points))):
            self.kept.append(frozenset(j for j in needed if j < i))
            needed |= frozenset(points[i].window)
        self.kept.reverse()
        self.drawn: list[frozenset[int]] = []
        for i, p in enumerate(points):
            here = i == 0 or p.c > 0.0
            self.drawn.append(frozenset((i,)) if here else frozenset().union(*(self.drawn[j] for j in p.window)))

    def mean(self, i: int, known: Known) -> Tensor:
        """Point ``i`` without its noise."""
        p = self.points[i]
        terms = [a * known[j][0] + b * known[j][1] for j, a, b in zip(p.window, p.a, p.b, strict=True)]
        return torch.stack(terms).sum(0) + p.offset

    def score(self, i: int, y: Tensor) -> Tensor:
        """The score at point ``i``; 0 where it is not asked for."""
        t = self.points[i].time
        return torch.zeros_like(y) if t is None else self._score(y, torch.tensor(t, dtype=torch.float64))

    def held(self, i: int) -> frozenset[int]:
        """The random points that the future depends on beside point ``i``, when that is reached."""
        return frozenset().union(*(self.drawn[j] for j in self.kept[i])) - {i}

    @property
    def random(self) -> list[int]:
        """Points at which noise is added."""
        return [i for i, p in enumerate(self.points) if p.c > 0.0]

    def check_end(self) -> None:
        """Refuses an end that mixes several random points without noise of its own."""
        if self.drawn[-1] != {self.random[-1]}:
            raise ValueError(
                "the last step of this sampler remembers earlier ones and adds no noise, so no density can be followed "
                "through it: end the grid above zero noise"
            )

    def ahead(self, i: int, y: Tensor, stop: int) -> Tensor:
        """Point ``stop`` without its noise, from values ``(rows, *state)`` of point ``i`` on which alone it depends."""
        known: Known = {i: (y, self.score(i, y))}
        for j in range(i + 1, stop):
            x = self.mean(j, known)
            known[j] = (x, self.score(j, x))
        return y if stop == i else self.mean(stop, known)

    def looks(self) -> list[Look]:
        """The steps between random points, and what comes after them, for a sampler without memory."""
        stops = [0, *self.random]
        if stops[-1] != len(self.points) - 1:
            stops.append(len(self.points) - 1)

        def look(i: int, stop: int) -> Look:
            return lambda x: Step(self.ahead(i, x, stop), self.points[stop].c)

        return [look(*pair) for pair in itertools.pairwise(stops)]

    @property
    def memory(self) -> int:
        """Random points, beside the newest, that have to be known for the law of the next one."""
        return max((len(self.held(i)) for i in self.random), default=0)


@torch.no_grad()
def recursion(sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> Recursion:
    """``sampler`` as a recursion, by running it on unit inputs: its start, every score that it is given, every draw.

    Samplers take linear combinations of the state, of scores and of noise, with coefficients that depend on time alone.
    So a batch whose rows have one such input each shows all coefficients of all points where the score is asked for;
    what a point owes to the far past goes into the points just before it. A run on real inputs proves the table.

    Raises:
        ValueError: the sampler is no such combination, it mixes components, or it draws once and uses it twice.
    """
    table = _Table.of(sampler, process, data, grid)
    table.check(sampler, process, data, grid)
    return Recursion(data.score(process), _reduced(table))


class _Table(NamedTuple):
    """Coefficients ``(points, inputs)`` and constants of all points after the start; inputs are start, scores, draws.

    ``first`` is the index of the first draw of each stream among the inputs.
    """

    times: list[float]
    rows: Tensor
    constants: Tensor
    scales: Tensor
    first: dict[int, int]

    @staticmethod
    def of(sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> _Table:
        heard, times = Silence(), []

        def no_score(x: Tensor, t: Tensor) -> Tensor:
            times.append(float(torch.as_tensor(t).flatten()[0]))
            return torch.zeros_like(x)

        x = torch.zeros(1, *data.state_shape, dtype=torch.float64)
        sampler(process, no_score, x, grid, OracleNoise(heard, tuple(x.shape)))
        if any(shape != tuple(data.state_shape) for shape in heard.channels.values()):
            raise ValueError(f"the noise of this sampler has not the shape of the state; {EXPECTED}")
        first, inputs = {}, 1 + len(times)
        for stream, draws in heard.draws.items():
            first[stream], inputs = inputs, inputs + draws
        points: list[Tensor] = []

        def unit_score(x: Tensor, t: Tensor) -> Tensor:
            points.append(x.reshape(inputs + 1, -1)[:, 0])
            s = torch.zeros_like(x)
            if len(points) <= len(times):
                s[1 + len(points)] = 1.0
            return s

        x = torch.zeros(inputs + 1, *data.state_shape, dtype=torch.float64)
        x[1] = 1.0
        end = sampler(process, unit_score, x, grid, OracleNoise(_UnitDraws(first), tuple(x.shape)))
        if len(points) != len(times):
            raise ValueError(f"how often this sampler asks for the score depends on the state; {EXPECTED}")
        rows = torch.stack([*points, end.reshape(inputs + 1, -1)[:, 0]])
        sigma = process.sigma(torch.tensor(times, dtype=torch.float64))
        scales = torch.ones(inputs, dtype=torch.float64)
        scales[0], scales[1 : len(times) + 1] = float(process.prior.std), 1.0 / sigma
        return _Table(times, rows[:, 1:] - rows[:, :1], rows[:, 0], scales, first)

    def check(self, sampler: Sampler, process: AbstractDiffusion, data: GaussianMixture, grid: Tensor) -> None:
        """Compares a run on random inputs with what the table says of it."""
        exact, rows, shape = data.score(process), 3, tuple(data.state_shape)
        x = float(process.prior.std) * seeded(0, (rows, *shape))
        draws = seeded(1, (self.rows.shape[1], rows, *shape))
        inputs = [x]
        points: list[Tensor] = []

        def score(y: Tensor, t: Tensor) -> Tensor:
            points.append(y)
            inputs.append(exact(y, t))
            return inputs[-1]

        end = sampler(process, score, x, grid, OracleNoise(_Given(self.first, draws), (rows, *shape)))
        points.append(end)
        if len(points) == len(self.rows):
            taken = torch.cat([torch.stack(inputs), draws[len(inputs) :]])
            expected = torch.einsum("pi,i...->p...", self.rows, taken) + self.constants.reshape(-1, *(1,) * end.ndim)
            size = torch.einsum("pi,i...->p...", self.rows.abs(), taken.abs())
            if bool(((torch.stack(points) - expected).abs() <= _SAME * size).all()):
                return
        raise ValueError(f"the points of this sampler are no fixed combinations of scores and noise; {EXPECTED}")


def _reduced(table: _Table) -> list[Point]:
    """Each point by the fewest points before it, and noise that was not seen before."""
    first_draw = 1 + len(table.times)
    rows = table.rows * table.scales
    start = torch.zeros_like(rows[0])
    start[0] = table.scales[0]
    everything, constants = [start, *rows.unbind(0)], [0.0, *table.constants.tolist()]
    seen = torch.zeros(len(start), dtype=torch.bool)
    points = [Point(None, (), (), (), 0.0, 0.0)]
    for i, row in enumerate(everything[1:], 1):
        limit = _NONE * float(row.abs().max())
        new = (row.abs() > limit) & ~seen
        new[:first_draw] = False
        seen |= new
        time = table.times[i - 1] if i <= len(table.times) else None
        for length in range(1, min(i, _LONGEST) + 1):
            window = list(range(i - length, i))
            fixed = ~new
            fixed[[j for j in window if j]] = False  # the score at point j is input j
            basis = torch.stack([everything[j] for j in window], 1)
            a = torch.linalg.lstsq(basis[fixed], row[fixed][:, None], driver="gelsd").solution[:, 0]
            rest = row - basis @ a
            if float(rest[fixed].abs().max()) <= limit:
                break
        else:
            raise ValueError(f"point {i} of this sampler depends on points or noise of long before; {EXPECTED}")
        sizes = [float(everything[j].norm()) for j in window]
        terms = [
            (j, float(a_j), float(rest[j] / table.scales[j]) if j else 0.0)
            for j, a_j, size in zip(window, a, sizes, strict=True)
            if float(a_j.abs()) * size > limit or (j and float(rest[j].abs()) > limit)
        ]
        offset = constants[i] - sum(a_j * constants[j] for j, a_j, _ in terms)
        from_before, a_terms, b_terms = zip(*terms, strict=True) if terms else ((), (), ())
        points.append(Point(time, from_before, a_terms, b_terms, float(rest[new].norm()), offset))
    return points


@final
class _UnitDraws(AbstractNumbers):
    """Row ``1 + i`` has input ``i``, and no other; row 0 has none."""

    def __init__(self, first: dict[int, int]) -> None:
        self._first = first

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        z = torch.zeros(draws, *shape, dtype=torch.float64)
        for k in range(draws):
            z[k, 1 + self._first[stream] + first + k] = 1.0
        return z


@final
class _Given(AbstractNumbers):
    """Prepared numbers, ``(inputs, rows, *state)``."""

    def __init__(self, first: dict[int, int], numbers: Tensor) -> None:
        self._first, self._numbers = first, numbers

    def take(self, stream: int, first: int, draws: int, shape: tuple[int, ...]) -> Tensor:
        k = self._first[stream] + first
        return self._numbers[k : k + draws]
