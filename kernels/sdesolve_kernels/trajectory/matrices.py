"""Matrix products of expressions: written out where they are small, kept whole where they are not.

A product of a row of the state with a matrix of shared parameters of more than 60 entries stays one
`Expression`, which generated code computes in a loop: written out, a network's layer would be thousands of lines.
"""

from __future__ import annotations

import dataclasses
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from sdesolve_kernels.trajectory.expressions import FLOATS, Expression, Graph
from sdesolve_kernels.trajectory.leaves import Shared
from sdesolve_kernels.trajectory.pointwise import HANDLERS, handles
from sdesolve_kernels.trajectory.tracing import Traced, Tracer, cast, dtype_name, mapped

__all__ = ["Matrix", "written_product"]

_WRITTEN_OUT = 60  # entries


@final
@dataclasses.dataclass(frozen=True, slots=True)
class Matrix:
    """A ``rows x columns`` matrix inside a shared parameter.

    Entry ``(i, j)`` lies at ``offset + i row_stride + j column_stride``.
    """

    parameter: int
    offset: int
    rows: int
    columns: int
    row_stride: int
    column_stride: int

    @property
    def transposed(self) -> Matrix:
        """The same entries, ``columns x rows``."""
        return Matrix(self.parameter, self.offset, self.columns, self.rows, self.column_stride, self.row_stride)

    def entry(self, i: Any, j: Any) -> Any:
        """Place of entry ``(i, j)``, or of many."""
        return self.offset + i * self.row_stride + j * self.column_stride

    def entries(self, device: torch.device | str) -> Tensor:
        """Places of all entries, ``(rows, columns)``, int64."""
        return self.entry(torch.arange(self.rows, device=device)[:, None], torch.arange(self.columns, device=device))


def shared_matrix(elements: np.ndarray) -> Matrix | None:
    """``elements: (rows, columns)`` as places in one shared parameter, if they lie regularly in one."""
    if elements.shape[0] < 2 or elements.shape[1] < 2:
        return None
    first, below, right = (e.data for e in (elements[0, 0], elements[1, 0], elements[0, 1]))
    if not all(isinstance(leaf, Shared) for leaf in (first, below, right)):
        return None
    rows, columns = elements.shape
    made = Matrix(first.parameter, first.i, rows, columns, below.i - first.i, right.i - first.i)
    for (i, j), e in np.ndenumerate(elements):
        if e.op != "shared" or e.data != (first.parameter, made.entry(i, j)):
            return None
    return made


def _dot(g: Graph, a: Any, b: Any, dtype: str) -> Expression:
    return g.sum([g.op("mul", x, y) for x, y in zip(a, b, strict=True)], dtype)


def matmul(g: Graph, a: np.ndarray, b: np.ndarray, dtype: str) -> np.ndarray:
    """``(m, k) @ (k, n)``."""
    out = np.empty((a.shape[0], b.shape[1]), dtype=object)
    whole = shared_matrix(b.T) if b.size > _WRITTEN_OUT and dtype in FLOATS else None
    if whole is None and a.size > _WRITTEN_OUT and dtype in FLOATS and shared_matrix(a) is not None:
        return matmul(g, b.T, a.T, dtype).T
    for i in range(a.shape[0]):
        if whole is not None and not all(e.op == "const" for e in a[i]):
            product = g.product(whole, list(a[i]), dtype)
            out[i] = [g.element(product, j) for j in range(b.shape[1])]
        else:
            out[i] = [_dot(g, a[i], b[:, j], dtype) for j in range(b.shape[1])]
    return out


def written_product(g: Graph, terms: np.ndarray, dtype: str) -> np.ndarray | None:
    """``terms: (paths, *rows, k)`` added along the last axis as products, if each is ``(M * v)`` of a large ``M``."""
    if terms.ndim < 3 or terms[0].size <= _WRITTEN_OUT or dtype not in FLOATS:
        return None
    made: np.ndarray = np.empty(terms.shape[:-1], dtype=object)
    for path, own in enumerate(terms.reshape(len(terms), -1, terms.shape[-1])):
        found = _factors(own)
        if found is None:
            return None
        product = g.product(*found, dtype)
        elements = np.empty(len(own), dtype=object)
        elements[:] = [g.element(product, i) for i in range(len(own))]
        made[path] = elements.reshape(terms.shape[1:-1])
    return made


def _factors(terms: np.ndarray) -> tuple[Matrix, list[Expression]] | None:
    """``M`` and ``v``, if ``terms: (rows, k)`` are ``M_ij v_j`` with ``M`` in one shared parameter."""
    factors: np.ndarray = np.empty(terms.shape, dtype=object)
    vector: list[Expression] = []
    for (i, j), e in np.ndenumerate(terms):
        if e.op != "mul":
            return None
        m, v = e.args if e.args[0].op == "shared" else e.args[::-1]
        if m.op != "shared" or v.op == "shared":
            return None
        if i == 0:
            vector.append(v)
        elif v is not vector[j]:
            return None
        factors[i, j] = m
    whole = shared_matrix(factors)
    return None if whole is None else (whole, vector)


def _operands(tracer: Tracer, a: Traced, b: Traced) -> tuple[np.ndarray, np.ndarray, str]:
    name = dtype_name(a.dtype)
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected both factors to have one dtype, got {a.dtype} and {b.dtype}")
    return cast(tracer.graph, a.elements, name), cast(tracer.graph, b.elements, name), name


@handles("mm")
def mm(tracer: Tracer, func: Any, a: Traced, b: Traced) -> Traced:
    x, y, name = _operands(tracer, a, b)
    _check(x.shape[1] == y.shape[0], a, b)
    return tracer.traced(matmul(tracer.graph, x, y, name), a.dtype)


@handles("bmm")
def bmm(tracer: Tracer, func: Any, a: Traced, b: Traced) -> Traced:
    x, y, name = _operands(tracer, a, b)
    _check(x.shape[0] == y.shape[0] and x.shape[2] == y.shape[1], a, b)
    out = np.empty((x.shape[0], x.shape[1], y.shape[2]), dtype=object)
    for i in range(x.shape[0]):
        out[i] = matmul(tracer.graph, x[i], y[i], name)
    return tracer.traced(out, a.dtype)


@handles("mv")
def mv(tracer: Tracer, func: Any, a: Traced, b: Traced) -> Traced:
    x, y, name = _operands(tracer, a, b)
    _check(x.shape[1] == y.shape[0], a, b)
    return tracer.traced(matmul(tracer.graph, y[None], x.T, name)[0], a.dtype)


@handles("dot", "vdot")
def dot(tracer: Tracer, func: Any, a: Traced, b: Traced) -> Traced:
    x, y, name = _operands(tracer, a, b)
    _check(x.shape == y.shape, a, b)
    return tracer.traced(matmul(tracer.graph, x[None], y[:, None], name).reshape(()), a.dtype)


def _scaled(tracer: Tracer, e: np.ndarray, scale: float, name: str) -> np.ndarray:
    factor = tracer.graph.const(scale, name)
    return e if scale == 1 else mapped(lambda x: tracer.graph.op("mul", x, factor), e)


@handles("addmm", "addmv", "baddbmm", "addbmm")
def addmm(tracer: Tracer, func: Any, c: Traced, a: Traced, b: Traced, *, beta: float = 1, alpha: float = 1) -> Traced:
    """``beta c + alpha a @ b``; `addbmm` adds the products of a batch up."""
    kind, name = func.overloadpacket.__name__, dtype_name(c.dtype)
    product = {"addmm": mm, "addmv": mv, "baddbmm": bmm, "addbmm": bmm}[kind](tracer, func, a, b)
    if kind == "addbmm":
        product = HANDLERS["sum"](tracer, func, product, [0])
    out = _scaled(tracer, product.elements, alpha, name)
    if beta != 0:  # else not even a nan of ``c`` counts
        out = mapped(lambda x, y: tracer.graph.op("add", x, y), out, _scaled(tracer, c.elements, beta, name))
    return tracer.traced(out, c.dtype)


@handles("linear")
def linear(tracer: Tracer, func: Any, a: Traced, weight: Traced, bias: Traced | None = None) -> Traced:
    x, w, name = _operands(tracer, a, weight)
    _check(x.shape[-1] == w.shape[1], a, weight)
    out = matmul(tracer.graph, x.reshape(-1, x.shape[-1]), w.T, name).reshape(*x.shape[:-1], w.shape[0])
    if bias is not None:
        out = mapped(lambda s, c: tracer.graph.op("add", s, c), out, bias.elements)
    return tracer.traced(out, a.dtype)


def _check(fits: bool, a: Traced, b: Traced) -> None:
    if not fits:
        raise RuntimeError(f"matrix shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit")
