"""Every aten operation that the tracer handles, on tensors of 0 to 4 axes, fused and eager."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from sdesolve_kernels.trajectory.program import _HANDLERS

import sdesolve as sds

A = torch.ops.aten
SHAPES = [(), (4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)]
UNARY = """
abs acos acosh asin asinh atan atanh ceil cos cosh erf erfc exp exp2 expm1 floor isfinite isinf isnan log log10
log1p log2 logical_not neg positive reciprocal relu round rsqrt sigmoid sign signbit silu sin sinh sqrt square
special_erfcx tan tanh trunc alias clone detach contiguous all any sum mean prod amax amin max min std var t squeeze
empty_like zeros_like ones_like softplus gelu tril triu zero
"""
BINARY = """
add sub mul div true_divide atan2 fmod remainder hypot maximum minimum fmax fmin pow rsub eq ne lt le gt ge
logical_and logical_or logical_xor copy dot vdot
"""
# By operation, what calls it on a float ``a``, another ``b`` of its shape, and a mask ``m``.
CALLS = {
    **{name: f"A.{name}(a)" for name in UNARY.split()},
    **{name: f"A.{name}(a, b)" for name in BINARY.split()},
    "empty_like": "A.empty_like(a).fill_(2.0)",
    "lift_fresh": "torch.tensor([1.0, 2.0]).to(a)",
    "lift_fresh_copy": "torch.tensor(2.0).to(a) * a",
    "_reshape_alias": "A._reshape_alias(a, [a.numel()], [1])",
    "_unsafe_view": "A._unsafe_view(a, [a.numel()])",
    "_log_softmax": "A._log_softmax(a, -1, False)",
    "_softmax": "A._softmax(a, -1, False)",
    "log_softmax": "a.log_softmax(0)",
    "softmax": "a.softmax(-1)",
    "_to_copy": "A._to_copy(a, dtype=torch.float32)",
    "addbmm": "A.addbmm(b[0, :, :1] + a[0, :1, :2], a, b.mT[..., :2], beta=0.5, alpha=2)",
    "addmm": "A.addmm(b[:, :1], a, b.T, beta=0, alpha=2)",
    "addmv": "A.addmv(a[:, 0], a, b[0], beta=2)",
    "baddbmm": "A.baddbmm(a[:, :, :1], a, b.mT, alpha=3)",
    "bitwise_and": "m & (b > 0)",
    "bitwise_or": "m | (b > 0)",
    "bitwise_xor": "m ^ (b > 0)",
    "bitwise_not": "~m",
    "mm": "A.mm(a, b.T)",
    "bmm": "A.bmm(a, b.mT)",
    "mv": "A.mv(a, b[0])",
    "linear": "A.linear(a, b, b[:, 0])",
    "bucketize": "torch.bucketize(a, EDGES.to(a)) + torch.bucketize(b, EDGES.to(a), out_int32=True, right=True)",
    "searchsorted": "torch.searchsorted(EDGES.to(a), a, side='right')",
    "cat": "torch.cat([a, b], -1)",
    "stack": "torch.stack([a, b], -1)",
    "clamp": "a.clamp(-0.5, 0.5) + a.clamp(max=b)",
    "clip": "A.clip(a, 0.1)",
    "hardtanh": "A.hardtanh(a, -0.5, 0.25) + A.hardtanh(b)",
    "hardswish": "A.hardswish(2.0 * a) + A.hardswish(b)",
    "clamp_max": "A.clamp_max(a, 0.1) + A.clamp_max(a, b)",
    "clamp_min": "A.clamp_min(a, 0.1) + A.clamp_min(a, b)",
    "constant_pad_nd": "A.constant_pad_nd(a, [1, 2], 3.0)",
    "copy_": "torch.zeros_like(a).copy_(b)",
    "cumprod": "a.cumprod(-1) + m.cumprod(0)",
    "cumsum": "a.cumsum(0) + m.long().cumsum(-1)",
    "diag_embed": "a.diag_embed() + a.diag_embed(-1)[..., 1:, 1:]",
    "diagonal": "a.diagonal(1, -1, 0)",
    "expand": "a.expand(2, *a.shape)",
    "fill": "A.fill(a, 2.0)",
    "flip": "a.flip(-1)",
    "full_like": "A.full_like(a, 2.0)",
    "gather": "a.gather(-1, torch.zeros(a.shape, dtype=torch.int64))",
    "index": "a[..., torch.tensor([1, 0])]",
    "index_put": "A.index_put(a, [torch.tensor([1, 0])], b[:2])",
    "index_select": "a.index_select(-1, torch.tensor([0]))",
    "is_same_size": "a + A.is_same_size(a, b)",
    "linalg_vector_norm": "torch.linalg.vector_norm(a, 3) + torch.linalg.vector_norm(a, dim=-1)",
    "logsumexp": "a.logsumexp(-1) + a.logsumexp(0, True)",
    "masked_fill": "a.masked_fill(m, 2.0)",
    "native_layer_norm": "torch.nn.functional.layer_norm(a, a.shape[-1:], b.reshape(-1)[: a.shape[-1]])",
    "new_empty": "a.new_empty(2).fill_(1.0)",
    "new_empty_strided": "a.new_empty_strided((2,), (1,)).fill_(1.0)",
    "new_full": "a.new_full((2,), 3.0)",
    "new_ones": "a.new_ones(2)",
    "new_zeros": "a.new_zeros(2)",
    "permute": "a.permute(*range(a.ndim)[::-1])",
    "repeat": "a.repeat(2, *a.shape)",
    "reshape": "A.reshape(a.mT, [-1])",
    "roll": "a.roll(1, -1) + a.roll(2)",
    "select": "a.select(-1, -1)",
    "slice": "a[..., 1:3]",
    "split": "torch.cat(a.split(3, -1)[::-1], -1)",
    "split_with_sizes": "torch.cat(a.split([1, a.shape[-1] - 1], -1)[::-1], -1)",
    "std_mean": "torch.std_mean(a, -1)[1]",
    "var_mean": "torch.var_mean(a, 0, correction=a.shape[0])[0]",
    "transpose": "a.transpose(0, -1)",
    "unbind": "a.unbind(-1)[0]",
    "unsqueeze": "a.unsqueeze(-1)",
    "view": "a.contiguous().view(-1)",
    "view_of": "torch.ops.prims.view_of(a)",
    "where": "torch.where(m, a, 0.5)",
}  # fmt: skip
# They return numbers of Python, which only constants have.
ON_THE_HOST = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "_has_same_storage_numel"
}  # fmt: skip
EDGES = torch.tensor([-1.0, -0.2, 0.3, 1.1])


def test_every_operation_is_called_below():
    assert set(_HANDLERS) - ON_THE_HOST == set(CALLS)


def function(text):
    return eval(f"lambda a, b, m: {text}", globals())


def fused_and_eager(f, x):
    """What ``f`` makes of ``x`` in a fused run, and in torch."""
    sol = sds.solve(
        sds.ODE(lambda x, t: -x), x, 0.0, 1.0, 1, solver=sds.EulerMaruyama(), save_at="grid", backend="fused",
        observable=f,
    )  # fmt: skip
    return sol.xs[0], f(x)


def outside(text, a, b):
    """The operation on tensors that all paths share, of any rank."""
    made = function(text)
    return lambda x: x[:, :1] * 0 + made(a, b, a > 0).reshape(1, -1)


@pytest.mark.parametrize("name", list(CALLS))
def test_ranks(name, interpreted, difference, normals):
    """Torch's answer where it has one; where it has none, the run is refused."""
    dtype = torch.float64
    x, done = normals(3, 2, dtype=dtype, seed=1), 0
    few = name in UNARY.split() and os.environ.get("HYPOTHESIS_PROFILE") != "thorough"  # every other rank
    for rank, shape in list(enumerate(SHAPES))[:: 2 if few else 1]:
        a, b = normals(*shape, dtype=dtype, seed=5 + rank), normals(*shape, dtype=dtype, seed=9)
        f = outside(CALLS[name], a, b)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                expected = f(x)
            except (RuntimeError, IndexError, TypeError, NotImplementedError):
                with pytest.raises(ValueError, match="cannot be fused"):
                    fused_and_eager(f, x)
                continue
            if not expected.numel():
                continue
            fused, eager = fused_and_eager(f, x)
        done += 1
        assert difference(fused, eager.to(dtype)) < 40 * torch.finfo(dtype).eps, (rank, fused[0], eager[0])
    assert done
