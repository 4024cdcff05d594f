"""What generated trajectory kernels are written with: noise for a block of paths, saving, moments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from .box_muller import normals32, normals64
from .compile import inline
from .functions import FUNCTIONS
from .intrinsics import as_float64 as as_float64
from .intrinsics import copysign as copysign
from .intrinsics import fabs as fabs
from .intrinsics import fma as fma
from .intrinsics import pointer
from .intrinsics import select as select
from .intrinsics import sqrt as sqrt
from .philox import philox
from .products import products

word64 = np.uint64
F32, F64, I64 = np.float32, np.float64, np.int64
INF, NAN = np.inf, np.nan
_U64, _2, _3 = np.uint64, np.uint64(2), np.uint64(3)


def _pointer(element: Any) -> Any:
    @inline
    def typed(address: Any) -> Any:
        return pointer(address, element)

    return typed


pointer_float32, pointer_float64 = _pointer(types.float32), _pointer(types.float64)
pointer_int64, pointer_bool = _pointer(types.int64), _pointer(types.boolean)
word = _pointer(types.uint32)


@inline
def _in_order(rows: Any, row: Any) -> Any:
    return _U64(row)


@inline
def _listed(rows: Any, row: Any) -> Any:
    return _U64(rows[row])


def _fill_with(numbers: Any, number_of: Any = _in_order) -> Any:
    """A function that makes numbers in pairs from words, for all lanes of a block, an entry of the sequence a row.

    ``number_of`` gives the number of a row's path, less that of the first path: the row, or an entry of a list.
    """

    @inline
    def fill(
        s: Any, base: Any, words: Any, noise: Any, source: Any, first: Any, index: Any, count: Any, used: Any,
        lanes: Any, rows: Any,
    ) -> Any:  # fmt: skip
        """Rows from ``base`` on, in `used` lanes; returns how many rows lie before the one for entry ``index``."""
        seed, stream = _U64(noise[4 * source]), _U64(noise[4 * source + 1])
        path = _U64(noise[4 * source + 2])
        q, skip = _U64(index) >> _2, index & 3
        for b in range((skip + count + 3) // 4):
            for l in range(used):  # noqa: E741
                w0, w1, w2, w3 = philox(seed, stream, path + number_of(rows, first + l), q + _U64(b))
                words[l] = np.uint32(w0)
                words[lanes + l] = np.uint32(w1)
                words[2 * lanes + l] = np.uint32(w2)
                words[3 * lanes + l] = np.uint32(w3)
            row = base + 4 * b * lanes
            for pair in range(2):
                for l in range(used):  # noqa: E741
                    z0, z1 = numbers(words[2 * pair * lanes + l], words[(2 * pair + 1) * lanes + l])
                    s[row + 2 * pair * lanes + l] = z0
                    s[row + (2 * pair + 1) * lanes + l] = z1
        return skip

    return fill


def _fill_one_with(numbers: Any, number_of: Any = _in_order) -> Any:
    """Likewise for a block of one path, whose rows lie side by side: vectors go along the sequence."""

    @inline
    def fill(
        s: Any, base: Any, words: Any, noise: Any, source: Any, first: Any, index: Any, count: Any, used: Any,
        lanes: Any, rows: Any,
    ) -> Any:  # fmt: skip
        seed, stream = _U64(noise[4 * source]), _U64(noise[4 * source + 1])
        path = _U64(noise[4 * source + 2]) + number_of(rows, first)
        q, skip, most = _U64(index) >> _2, index & 3, (count + 6) // 4
        blocks = (skip + count + 3) // 4
        for b in range(blocks):
            w0, w1, w2, w3 = philox(seed, stream, path, q + _U64(b))
            words[b] = np.uint32(w0)
            words[most + b] = np.uint32(w1)
            words[2 * most + b] = np.uint32(w2)
            words[3 * most + b] = np.uint32(w3)
        for b in range(blocks):
            z0, z1 = numbers(words[b], words[most + b])
            z2, z3 = numbers(words[2 * most + b], words[3 * most + b])
            s[base + 4 * b] = z0
            s[base + 4 * b + 1] = z1
            s[base + 4 * b + 2] = z2
            s[base + 4 * b + 3] = z3
        return skip

    return fill


def _three_points(kind: Any) -> Any:
    low, high = np.uint32(2**32 // 6), np.uint32(2**32 - 2**32 // 6)
    zero, up, down = kind(0.0), kind(3.0**0.5), kind(-(3.0**0.5))

    @inline
    def numbers(w0: Any, w1: Any) -> Any:
        a = select(w0 < low, down, select(w0 >= high, up, zero))
        b = select(w1 < low, down, select(w1 >= high, up, zero))
        return a, b

    return numbers


def _fills() -> dict[str, Any]:
    """By name: how numbers are made, for one path or for all lanes, of which paths, and of which type."""
    makers = {
        "normal": {"float32": normals32, "float64": normals64},
        "three_point": {"float32": _three_points(F32), "float64": _three_points(F64)},
    }
    return {
        f"{maker}_fill{lanes}{paths}_{dtype}": fill(numbers, number_of)
        for maker, by_type in makers.items()
        for lanes, fill in (("", _fill_with), ("_one", _fill_one_with))
        for paths, number_of in (("", _in_order), ("_listed", _listed))
        for dtype, numbers in by_type.items()
    }


def _signs(kind: Any, number_of: Any = _in_order) -> Any:
    one, two = kind(1.0), kind(2.0)

    @inline
    def fill(
        s: Any, base: Any, words: Any, noise: Any, source: Any, first: Any, index: Any, count: Any, fresh: Any,
        used: Any, lanes: Any, rows: Any,
    ) -> Any:  # fmt: skip
        """Rows of +-1, from one bit each; `words` is kept between calls, and made anew where 128 bits are used up."""
        seed, stream = _U64(noise[4 * source]), _U64(noise[4 * source + 1])
        path = _U64(noise[4 * source + 2])
        for j in range(count):
            bit = (index + j) & 127
            if bit == 0 or (fresh and j == 0):
                q = _U64((index + j) >> 7)
                for l in range(used):  # noqa: E741
                    w0, w1, w2, w3 = philox(seed, stream, path + number_of(rows, first + l), q)
                    words[l] = np.uint32(w0)
                    words[lanes + l] = np.uint32(w1)
                    words[2 * lanes + l] = np.uint32(w2)
                    words[3 * lanes + l] = np.uint32(w3)
            row, shift, word_row = base + j * lanes, np.uint32(bit & 31), (bit >> 5) * lanes
            for l in range(used):  # noqa: E741
                s[row + l] = kind((words[word_row + l] >> shift) & np.uint32(1)) * two - one
        return 0

    return fill


two_point_fill_float32, two_point_fill_float64 = _signs(F32), _signs(F64)
two_point_fill_listed_float32, two_point_fill_listed_float64 = _signs(F32, _listed), _signs(F64, _listed)


# What halves a cell of a Brownian motion: sqrt 2 times the coefficients of (W, H, K) and of three normals of a node, by
# the roots of the variances of W, H and K; a rotation of six standard normals.
_HALVING = (
    *(2**0.5 * 0.5, 2**0.5 * 1.5 / 12**0.5, 2**0.5 / 4),
    *(2**0.5 * 0.25, 24**0.5 / 8, 24**0.5 * 3.75 / 720**0.5, 24**0.5 / 768**0.5),
    *(2**0.5 * 0.125, 1440**0.5 * 0.5 / 768**0.5, 1440**0.5 / 2880**0.5),
)


def _tree_with(kind: Any, numbers: Any) -> tuple[Any, Any, Any]:
    c0, c1, c2, c3, c4, c5, c6, c7, c8, c9 = (kind(c) for c in _HALVING)

    @inline
    def halve(w: Any, eta: Any, kappa: Any, z: Any, x: Any, y: Any) -> Any:
        """Unit numbers of both halves of a cell from those of the cell and of its node."""
        a, b = c0 * w, fma(c1, eta, c2 * z)
        d, e = fma(-c4, z, c3 * eta), fma(c5, kappa, c6 * x)
        f, g = fma(-c8, x, c7 * kappa), c9 * y
        return a + b, d + e, f + g, a - b, d - e, f - g

    @inline
    def nodes(
        s: Any, base: Any, words: Any, noise: Any, w: Any, who: Any, at: Any, count: Any, blocks: Any, lanes: Any
    ) -> Any:
        """The normals of a list of nodes: of paths ``w[who]`` from number ``w[at]`` on, rounded down to a block."""
        seed, stream, first = _U64(noise[12]), _U64(noise[13]), _U64(noise[14])
        for b in range(blocks):
            for l in range(count):  # noqa: E741
                path, q = first + _U64(w[who + l]), (_U64(w[at + l]) >> _2) + _U64(b)
                w0, w1, w2, w3 = philox(seed, stream, path, q)
                words[l] = np.uint32(w0)
                words[lanes + l] = np.uint32(w1)
                words[2 * lanes + l] = np.uint32(w2)
                words[3 * lanes + l] = np.uint32(w3)
            row = base + 4 * b * lanes
            for pair in range(2):
                for l in range(count):  # noqa: E741
                    z0, z1 = numbers(words[2 * pair * lanes + l], words[(2 * pair + 1) * lanes + l])
                    s[row + 2 * pair * lanes + l] = z0
                    s[row + (2 * pair + 1) * lanes + l] = z1

    @inline
    def roots(s: Any, base: Any, noise: Any, path: Any, root: Any, m: Any, lanes: Any) -> Any:
        """``W``, ``H`` and ``K`` of a step of the grid, unit numbers in rows of one lane."""
        for part in range(3):
            seed, stream = _U64(noise[4 * part]), _U64(noise[4 * part + 1])
            first = _U64(noise[4 * part + 2]) + _U64(path)
            for j in range(m):
                at = noise[4 * part + 3] + root * m + j
                w0, w1, w2, w3 = philox(seed, stream, first, _U64(at) >> _2)
                late = (at & 2) != 0
                z0, z1 = numbers(np.uint32(select(late, w2, w0)), np.uint32(select(late, w3, w1)))
                s[base + (part * m + j) * lanes] = select((at & 1) != 0, z1, z0)

    return halve, nodes, roots


halved_float32, node_normals_float32, root_normals_float32 = _tree_with(F32, normals32)
halved_float64, node_normals_float64, root_normals_float64 = _tree_with(F64, normals64)


_LOG, _ONE, _ZERO = FUNCTIONS["log", "float64"], F64(1.0), F64(0.0)
_TOP, _ALL = np.uint64(1 << 31), np.uint64((1 << 32) - 1)


@inline
def _tail(high: Any, low: Any) -> tuple[Any, Any]:
    """`counts.tail`."""
    upper = high >= _TOP
    high, low = select(upper, _ALL - high, high), select(upper, _ALL - low, low)
    return (F64(I64(high)) * 2.0**32 + (F64(I64(low)) + 0.5)) * 2.0**-64, upper


@inline
def events(out: Any, seed: Any, stream: Any, path: Any, first: Any, count: Any) -> Any:
    """Of events from one on, uniform numbers that say which they are, then exponential ones that they wait for."""
    for l in range(count):  # noqa: E741
        w0, w1, w2, w3 = philox(seed, _U64(stream), path, _U64(first + l))
        chance, upper = _tail(w0, w1)
        z = select(upper, _ONE - chance, chance)
        lost = select(upper, (_ONE - z) - chance, _ZERO)  # by rounding
        u, above = _tail(w2, w3)
        out[l] = select(above, _ONE - u, u)
        out[count + l] = -(_LOG(z) + lost / z)


@inline
def keep(out: Any, offset: Any, s: Any, start: Any, width: Any, count: Any, lanes: Any) -> Any:
    """Rows from ``start`` on, of the first ``count`` lanes, to ``(count, width)`` numbers."""
    for j in range(width):
        for l in range(count):  # noqa: E741
            out[offset + l * width + j] = s[start + j * lanes + l]


@inline
def accumulate(out: Any, offset: Any, s: Any, start: Any, width: Any, count: Any, lanes: Any) -> Any:
    """Mean, and sum of squared distances to it, of the first ``count`` lanes of each row, in float64."""
    for j in range(width):
        mean, squares = 0.0, 0.0
        for l in range(count):  # noqa: E741
            mean += F64(s[start + j * lanes + l])
        mean /= count
        for l in range(count):  # noqa: E741
            d = F64(s[start + j * lanes + l]) - mean
            squares += d * d
        out[offset + j] = mean
        out[offset + width + j] = squares


@inline
def copy(s: Any, start: Any, to: Any, count: Any) -> Any:
    """``count`` numbers to another place; the two do not overlap."""
    for l in range(count):  # noqa: E741
        s[to + l] = s[start + l]


@inline
def add_sums(
    out: Any, offset: Any, s: Any, start: Any, count: Any, lanes: Any, used: Any, width: Any, zero: Any
) -> Any:  # fmt: skip
    """Adds to each of ``count`` numbers the sum of the first `lanes` lanes of a row, and clears the row.

    In float64, as eight sums that are added up as a tree: an order that depends on nothing but the block.
    """
    eights = lanes // 8 * 8
    for j in range(count):
        row = start + j * width
        t0, t1, t2, t3, t4, t5, t6, t7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        for l in range(row, row + eights, 8):  # noqa: E741
            t0 += F64(s[l])
            t1 += F64(s[l + 1])
            t2 += F64(s[l + 2])
            t3 += F64(s[l + 3])
            t4 += F64(s[l + 4])
            t5 += F64(s[l + 5])
            t6 += F64(s[l + 6])
            t7 += F64(s[l + 7])
        for l in range(row + eights, row + lanes):  # noqa: E741
            t0 += F64(s[l])
        out[offset + j] += ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7))
        for l in range(row, row + used):  # noqa: E741
            s[l] = zero


@inline
def add_rows(
    out: Any, offset: Any, s: Any, start: Any, count: Any, lanes: Any, used: Any, width: Any, zero: Any
) -> Any:  # fmt: skip
    """Adds rows to ``count`` numbers of each path, and clears them."""
    for j in range(count):
        row = start + j * width
        for l in range(lanes):  # noqa: E741
            out[offset + l * count + j] += F64(s[row + l])
        for l in range(row, row + used):  # noqa: E741
            s[l] = zero


@inline
def add_entries(
    out: Any, offset: Any, s: Any, start: Any, rows: Any, columns: Any, down: Any, across: Any, zero: Any
) -> Any:  # fmt: skip
    """Adds a matrix whose entry (i, j) lies at ``start + i down + j across``, and clears it."""
    for i in range(rows):
        for j in range(columns):
            at = start + i * down + j * across
            out[offset + i * columns + j] += F64(s[at])
            s[at] = zero


def namespace() -> dict[str, Any]:
    """The names that generated code uses: those of this module, and elementary functions such as ``exp_float32``."""
    own = {name: value for name, value in globals().items() if not name.startswith("_")}
    return own | _fills() | products() | {f"{name}_{dtype}": function for (name, dtype), function in FUNCTIONS.items()}
