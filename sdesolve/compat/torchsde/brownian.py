"""Brownian motions that are asked for their increments over any interval, as torchsde has them."""

from __future__ import annotations

import abc
import bisect
import hashlib
import itertools
import math
import struct
import warnings
from collections import OrderedDict
from typing import Any, final

import torch
from sdesolve_kernels import Stream, normal
from torch import Tensor

from sdesolve._internal.arguments import kind_of, number, short, whole_number
from sdesolve._internal.levy_area import LevyArea
from sdesolve.brownian import AbstractNoise, Part, drawn_seed, joined
from sdesolve.brownian import BrownianPath as Path
from sdesolve.compat.grids import same_times, steps_of
from sdesolve.compat.torchsde.settings import LEVY_AREA_APPROXIMATIONS

_KEPT = 16  # pieces from the start of a step that are remembered
_PARTS: tuple[Part, ...] = ("W", "H", "K")
_AREA = LevyArea("foster")
Parts = tuple[Tensor, Tensor, Tensor]


class BaseBrownian(abc.ABC):
    """``bm(ta, tb) = W(tb) - W(ta)``, and what torchsde's solvers need besides.

    Attributes:
        shape: of an increment, ``(*batch, channels)``.
        dtype, device: likewise.
        levy_area_approximation: which areas it gives.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    levy_area_approximation: str

    @abc.abstractmethod
    def parts(self, ta: float, tb: float) -> Parts:
        """``W, H, K`` of an `Increment` over the interval, ``(batch, channels)`` each, float64."""

    @abc.abstractmethod
    def area(self, ta: float, tb: float) -> Tensor:
        """Levy areas over the interval, ``(batch, channels, channels)``, float64."""

    def clipped(self, t: float, name: str) -> float:
        """A time of a query, moved into the range of times, with a warning."""
        return t

    def noise(self, times: Tensor) -> AbstractNoise:
        """What drives a run over the grid ``times``."""
        return _Asked(self)

    def __call__(
        self, ta: float | Tensor, tb: float | Tensor | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """The increment over ``[ta, tb]``; of one time alone, that from the start to there.

        Args:
            ta, tb: times.
            return_U: also ``U = int_ta^tb (W(s) - W(ta)) ds``.
            return_A: also the Levy areas, ``(*batch, channels, channels)``; zeros of one channel, in its shape.

        Raises:
            ValueError: ``ta > tb``, or areas that this motion was not made with.
        """
        start, end = (self._start(), ta) if tb is None else (ta, tb)
        a, b = self.clipped(float(start), "ta"), self.clipped(float(end), "tb")
        if a > b:
            raise ValueError(f"an increment is over ta <= tb, got ta={a:.6g} and tb={b:.6g}")
        level = list(_LEVELS).index(self.levy_area_approximation)
        if (return_U and level < 1) or (return_A and level < 2):
            raise ValueError(
                f"levy_area_approximation={self.levy_area_approximation!r} has no {'A' if return_A else 'U'}: make the "
                f"motion with levy_area_approximation={'foster' if return_A else 'space-time'!r}"
            )
        W, H, _ = self.parts(a, b)
        made = [W]
        if return_U:
            made.append((b - a) * (0.5 * W + H))
        out = [v.to(self.dtype).reshape(self.shape) for v in made]
        if return_A:
            flat = len(self.shape) < 2
            out.append(
                torch.zeros(self.shape, dtype=self.dtype, device=self.device)
                if flat
                else self.area(a, b).to(self.dtype).reshape(*self.shape, self.shape[-1])
            )
        return out[0] if len(out) == 1 else tuple(out)

    def _start(self) -> float:
        raise ValueError("give both ends, ta and tb")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape})"


_LEVELS = {"none": 0, "space-time": 1, "davie": 2, "foster": 2}


class BrownianInterval(BaseBrownian):
    """A Brownian motion on ``[t0, t1]``: `sdesolve.BrownianPath` with the arguments of torchsde.

    Its law is exact at any times, in any order, at any distance. With ``halfway_tree`` it is a function of ``entropy``
    alone, and so it is with ``dt``, for each ``dt``. Otherwise it is one of ``entropy`` and of what it is used for
    first: the grid of the first `sdeint` becomes that of its steps, so that this call runs as one with ``seed=``,
    fused where that is; a query makes ``[t0, t1]`` one step. Whatever comes later sees the same path.

    Levy areas of its steps go with their increments and with each other; one over another interval is drawn for that
    interval alone, as every one is in torchsde. ``davie`` and ``foster`` are both by Foster's method.

    Args:
        t0, t1: where it begins and ends.
        size: shape of an increment, ``(batch, channels)``; other sizes are of one channel or more axes for the batch.
        dtype: torch's default unless ``W`` has another.
        device: the CPU unless ``W`` is elsewhere.
        entropy: the seed; drawn from torch's default generator if left out.
        dt: length of steps.
        tol: to what times are rounded; 0 for not at all.
        pool_size, cache_size: without effect.
        halfway_tree: make it a function of ``entropy``; needs ``tol > 0``.
        levy_area_approximation: ``none``, ``space-time``, ``davie`` or ``foster``.
        W, H: increment and space-time Levy area over all of ``[t0, t1]``.

    Raises:
        ValueError: as in torchsde: bad times, tolerances, sizes or names.
    """

    endless = False

    def __init__(
        self,
        t0: float | Tensor = 0.0,
        t1: float | Tensor = 1.0,
        size: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        entropy: int | None = None,
        dt: float | Tensor | None = None,
        tol: float | Tensor = 0.0,
        pool_size: int = 8,
        cache_size: int | None = 45,
        halfway_tree: bool = False,
        levy_area_approximation: str = "none",
        W: Tensor | None = None,
        H: Tensor | None = None,
    ) -> None:
        self._t0, self._t1, tol = _time(t0, "t0"), _time(t1, "t1"), _time(tol, "tol")
        if not self._t0 <= self._t1:
            raise ValueError(f"t0 must not be after t1, got {self._t0} and {self._t1}")
        if tol < 0.0 or (halfway_tree and tol == 0.0):
            raise ValueError(f"tol must {'be positive with halfway_tree' if halfway_tree else 'not be negative'}")
        if halfway_tree and dt is not None:
            raise ValueError("halfway_tree makes steps of its own: leave dt out")
        if levy_area_approximation not in LEVY_AREA_APPROXIMATIONS:
            raise ValueError(
                f"levy_area_approximation must be one of {LEVY_AREA_APPROXIMATIONS}, got "
                f"{short(levy_area_approximation)}"
            )
        given = {name: v for name, v in (("W", W), ("H", H)) if v is not None}
        for name, v in given.items():
            if not isinstance(v, Tensor) or not v.is_floating_point():
                raise ValueError(f"{name} must be a tensor of real numbers, got {kind_of(v)}")
        sizes = {tuple(v.shape) for v in given.values()} | ({tuple(size)} if size is not None else set())
        dtypes = {v.dtype for v in given.values()} | ({dtype} if dtype is not None else set())
        if len(sizes) != 1 or len(dtypes) > 1:
            raise ValueError(f"give one size and one dtype, by size= or dtype= or by W and H; got {short(sizes)}")
        self.shape, self.dtype = sizes.pop(), dtypes.pop() if dtypes else torch.get_default_dtype()
        like = next(iter(given.values())).device if given and device is None else device
        self.device = torch.device("cpu" if like is None else like)
        self.levy_area_approximation = levy_area_approximation
        self._batch = math.prod(self.shape[:-1] if len(self.shape) > 1 else self.shape)
        self._m = self.shape[-1] if len(self.shape) > 1 else 1
        seed = drawn_seed() if entropy is None else whole_number(entropy, "entropy", 0) % 2**64
        self._path, self._digits = Path(seed), -int(math.log10(tol)) if tol else None
        self._times: Tensor | None = None
        self._kept: OrderedDict[tuple[int, float], Parts] = OrderedDict()
        self._given = {name: v.detach().double().reshape(self._batch, self._m) for name, v in given.items()}
        if halfway_tree or given:
            self._times = torch.tensor([self._t0, self._t1], dtype=torch.float64)
        elif dt is not None:
            self._times = steps_of([self._t0, self._t1], _time(dt, "dt"))

    def noise(self, times: Tensor) -> AbstractNoise:
        near = 1e-6 * (self._t1 - self._t0)
        first, last = float(times[0]), float(times[-1])
        if first < self._t0 - near or (last > self._t1 + near and not self.endless):
            raise ValueError(
                f"the Brownian motion is known on [{self._t0:.6g}, {self._t1:.6g}], and the run is over [{first:.6g}, "
                f"{last:.6g}]: make it with the times of the run"
            )
        if self._times is None:
            before = [torch.tensor([self._t0], dtype=torch.float64)] if first > self._t0 + near else []
            after = [torch.tensor([self._t1], dtype=torch.float64)] if last < self._t1 - near else []
            self._times = torch.cat([*before, times, *after])
        if not self._given:
            k = int(torch.searchsorted(self._times, first, right=True)) - 1
            for start in (k, k + 1):
                if start >= 0 and same_times(self._times[start : start + len(times)], times):
                    return self._path.after(start)
        return _Asked(self)

    def _start(self) -> float:
        return self._t0

    def clipped(self, t: float, name: str) -> float:
        t = t if self._digits is None else round(t, self._digits)
        inside = max(t, self._t0) if self.endless else min(max(t, self._t0), self._t1)
        if inside != t:
            warnings.warn(f"{name}={t:.6g} is outside [{self._t0:.6g}, {self._t1:.6g}]", stacklevel=3)
        return inside

    @property
    def _grid(self) -> Tensor:
        if self._times is None:
            self._times = torch.tensor([self._t0, self._t1], dtype=torch.float64)
        return self._times

    def _located(self, t: float) -> tuple[int, float]:
        grid = self._grid.tolist()
        while self.endless and t > grid[-1]:
            grid.append(grid[-1] + 1.0)
        if len(grid) > len(self._grid):
            self._times = torch.tensor(grid, dtype=torch.float64)
        k = min(max(bisect.bisect_right(grid, t) - 1, 0), len(grid) - 2)
        if grid[k + 1] <= grid[k]:
            return k, 0.0
        theta, near = (t - grid[k]) / (grid[k + 1] - grid[k]), 2.0**-49 * max(abs(t), 1e-300) / (grid[k + 1] - grid[k])
        if theta > 1.0 - near:
            return (k + 1, 0.0) if k + 2 < len(grid) else (k, 1.0)
        return k, theta if theta > near else 0.0

    def parts(self, ta: float, tb: float) -> Parts:
        nothing = torch.zeros(self._batch, self._m, dtype=torch.float64, device=self.device)
        (k, a), (last, b) = self._located(ta), self._located(tb)
        if (k, a) >= (last, b):
            return nothing, nothing, nothing
        if k == last:
            return self._within(k, a, b)
        total, length = self._within(k, a, 1.0), self._length(k, 1.0 - a)
        if last > k + 1:
            for i, step in enumerate(zip(*(self._steps(k + 1, last, part) for part in _PARTS), strict=True)):
                h = self._length(k + 1 + i)
                total, length = joined(total, _tensor(length), step, h), length + h
        return joined(total, _tensor(length), self._within(last, 0.0, b), self._length(last, b)) if b else total

    def area(self, ta: float, tb: float) -> Tensor:
        (k, a), (last, b) = self._located(ta), self._located(tb)
        if (k, a) == (last, b) or self._m < 2:
            return torch.zeros(self._batch, self._m, self._m, dtype=torch.float64, device=self.device)
        whole_step = a == 0.0 and (last, b) in ((k + 1, 0.0), (k, 1.0))
        if whole_step and not self._given:
            return self._steps(k, k + 1, _AREA)[0]
        key = hashlib.blake2b(struct.pack("<Qdd", self._path.seed, ta, tb), digest_size=8).digest()
        z = normal(
            self._batch, _AREA.numbers(self._m), seed=int.from_bytes(key, "little"), stream=Stream.AREA,
            dtype=torch.float64, device=self.device,
        )  # fmt: skip
        root = math.sqrt(tb - ta)
        W, H, K = (v / root for v in self.parts(ta, tb))
        return (tb - ta) * _AREA.draw(W, H, K, z)

    def _length(self, k: int, theta: float = 1.0) -> float:
        return theta * float(self._grid[k + 1] - self._grid[k])

    def _steps(self, first: int, last: int, of: Part) -> Tensor:
        times, shape = self._grid[first : last + 1], (self._batch, self._m)
        return self._path.increments(times, shape, step=first, of=of, dtype=torch.float64, device=self.device)

    def _within(self, k: int, a: float, b: float) -> Parts:
        """Parts over the fractions from ``a`` to ``b`` of a step."""
        whole = self._beginning(k, b)
        return whole if a == 0.0 else later_piece(whole, self._beginning(k, a), self._length(k, a), self._length(k, b))

    def _beginning(self, k: int, theta: float) -> Parts:
        found = self._kept.get((k, theta))
        if found is None:
            found = self._kept[k, theta] = self._made(k, theta)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found

    def _made(self, k: int, theta: float) -> Parts:
        like, h = torch.empty(0, dtype=torch.float64, device=self.device), self._length(k)
        if theta == 1.0:
            W, H, K = (self._steps(k, k + 1, part)[0] for part in _PARTS)
        else:
            levels = torch.zeros(self._batch, dtype=torch.int64, device=self.device)
            W, H, K = (math.sqrt(h) * v for v in self._path.beginning(k, theta, levels, self._m, like))
        if not self._given:
            return W, H, K
        # The motion given its increment and area over all: less what these were, plus what they are.
        dW, dH = (
            self._given[str(part)] - self._steps(0, 1, part)[0] if part in self._given else torch.zeros_like(W)
            for part in _PARTS[:2]
        )
        W, H = W + theta * dW + 6.0 * theta * (1.0 - theta) * dH, H + theta * theta * dH
        return W, H, K


def later_piece(whole: Parts, first: Parts, a: float, h: float) -> Parts:
    """``W, H, K`` of the rest of a piece of length ``h`` after its first part of length ``a``: `joined`, undone."""
    (W, H, K), (W1, H1, K1), b = whole, first, h - a
    W2 = W - W1
    D = b * W1 - a * W2
    H2 = (h * H - a * H1 - 0.5 * D) / b
    K2 = (h * h * K - a * a * K1 - 0.5 * a * b * (H1 - H2) - (b - a) * D / 12.0) / (b * b)
    return W2, H2, K2


class _FromState(BrownianInterval):
    """A motion that is asked at times, and begins at a state."""

    _w0: Tensor

    def __call__(
        self, t: float | Tensor, tb: float | Tensor | None = None, return_U: bool = False, return_A: bool = False
    ) -> Any:
        """``w0 + W(t)``, or the increment over ``[t, tb]`` as of a `BrownianInterval`."""
        made = super().__call__(t, tb, return_U, return_A)
        return made + self._w0 if tb is None and not return_U and not return_A else made


@final
class BrownianPath(_FromState):
    """A Brownian motion from ``w0`` on, without an end: ``bm(t)`` is its state, ``bm(ta, tb)`` an increment.

    Args:
        t0: where it begins.
        w0: its state there.
        window_size: without effect.
    """

    endless = True

    def __init__(self, t0: float | Tensor, w0: Tensor, window_size: int = 8) -> None:
        super().__init__(t0, float(t0) + 1.0, size=tuple(w0.shape), dtype=w0.dtype, device=w0.device)
        self._w0 = w0


@final
class BrownianTree(_FromState):
    """A Brownian motion from ``w0`` that is a function of ``entropy`` alone.

    Args:
        t0: where it begins.
        w0: its state there.
        t1: where it ends, ``t0 + 1`` by default.
        w1: its state there; drawn unless given.
        entropy: as of a `BrownianInterval`.
        tol: to what times are rounded.
        pool_size, cache_depth, safety: without effect.
    """

    def __init__(
        self,
        t0: float | Tensor,
        w0: Tensor,
        t1: float | Tensor | None = None,
        w1: Tensor | None = None,
        entropy: int | None = None,
        tol: float = 1e-6,
        pool_size: int = 24,
        cache_depth: int = 9,
        safety: float | None = None,
    ) -> None:
        super().__init__(
            t0, float(t0) + 1.0 if t1 is None else t1, size=tuple(w0.shape), dtype=w0.dtype, device=w0.device,
            entropy=entropy, tol=tol, halfway_tree=True, W=None if w1 is None else w1 - w0,
        )  # fmt: skip
        self._w0 = w0


@final
class ReverseBrownian(BaseBrownian):
    """``bm(ta, tb) = W(-ta) - W(-tb)`` of another motion ``W``: for an equation whose time and signs are turned.

    Args:
        base_brownian: the other motion.
    """

    def __init__(self, base_brownian: BaseBrownian) -> None:
        if not isinstance(base_brownian, BaseBrownian):
            raise TypeError(f"base_brownian must be a Brownian motion of this module, got {kind_of(base_brownian)}")
        self.base = base_brownian
        self.shape, self.dtype, self.device = base_brownian.shape, base_brownian.dtype, base_brownian.device
        self.levy_area_approximation = base_brownian.levy_area_approximation

    def parts(self, ta: float, tb: float) -> Parts:
        W, H, K = self.base.parts(-tb, -ta)
        return W, -H, K

    def area(self, ta: float, tb: float) -> Tensor:
        return -self.base.area(-tb, -ta)

    def clipped(self, t: float, name: str) -> float:
        return -self.base.clipped(-t, name)


def brownian_interval_like(
    y: Tensor,
    t0: float | Tensor = 0.0,
    t1: float | Tensor = 1.0,
    size: tuple[int, ...] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> BrownianInterval:
    """A `BrownianInterval` of the size, dtype and device of a tensor.

    Args:
        y: the tensor.
        t0, t1, size, dtype, device: as of a `BrownianInterval`, as are all others.
    """
    size, dtype = tuple(y.shape) if size is None else size, y.dtype if dtype is None else dtype
    return BrownianInterval(t0, t1, size, dtype, y.device if device is None else device, **kwargs)


@final
class _Asked(AbstractNoise):
    """A motion that is asked for each step of a run."""

    timeless = False

    def __init__(self, motion: BaseBrownian) -> None:
        self._motion = motion

    @property
    def provides(self) -> frozenset[str]:
        return frozenset("WHKA")

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
        made = []
        for ta, tb in itertools.pairwise(times.tolist()):
            a, b = self._motion.clipped(ta, "ta"), self._motion.clipped(tb, "tb")
            if isinstance(of, LevyArea):
                made.append(self._motion.area(a, b))
            else:
                made.append(self._motion.parts(a, b)["WHK".index(of)].reshape(shape))
        return torch.stack(made).to(dtype=dtype, device=device)


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _time(value: float | Tensor, name: str) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
    return number(float(value) if isinstance(value, Tensor) else value, name)
