"""Random drifts in the style of research code on the reference back end, against eager torch.

Masks, dtypes, layers, indexing, cumulative operations, loops, changes of temporaries in place. A program is text, so
that a failure can be read and run.
"""

from __future__ import annotations

import random
import warnings

import pytest
import torch

import sdesolve as sds

F = torch.nn.functional
UNARY = """
torch.tanh(A); torch.sin(A); A.cos(); torch.exp(-A.abs()); torch.log1p(A.abs()); (A * A + 1).sqrt(); A.erf(); -A
A.abs(); A.sigmoid(); F.silu(A); F.relu(A); F.softplus(A); A ** 2; A ** 3; A.sign() * A; torch.nan_to_num(A)
A.square(); A.clamp(-0.7, 0.9); A.clamp(min=0.1); A.clamp_max(v); F.gelu(A); F.elu(A); F.hardtanh(A); A.atan()
1 / (1 + A.abs())
"""
BINARY = """
A + B; A - B; A * B; A / (1 + B * B); torch.maximum(A, B); torch.minimum(A, B); torch.atan2(A, 1 + B * B)
torch.hypot(A, B); torch.lerp(A, B, 0.3); torch.addcmul(A, A, B, value=0.5); A + 2 * B; torch.add(A, B, alpha=-1.5)
torch.where(A > 0.123, A, B); torch.where(m, A, B); torch.where(M, A, B); A.masked_fill(B > 0.321, 0.5)
(A > 0.2) * B; torch.where((A > 0.1) & ~(B < -0.2) | m, A, 0.0); torch.sub(A, B); torch.logaddexp(A, B)
(A.abs() + 0.1) ** torch.tanh(B)
"""
VECTOR = """
A @ W; A @ W.T + v; F.linear(A, W, v); (W @ A[..., None])[..., 0]; torch.einsum('bi,ij->bj', A, W); A[:, P]; A * v
A + v; A.flip(1); A.roll(1, 1); A.roll(-2, -1); A - A.mean(1, keepdim=True); A.cumsum(1); A.tanh().cumprod(1)
A * A.sum(1, keepdim=True).tanh(); A.softmax(1); A / (1 + A.norm(dim=1, keepdim=True)); A - A.amax(1, keepdim=True)
A * torch.logsumexp(A, 1, True).sin(); A.masked_fill(m, 0); A.masked_fill(m, 0) @ W; torch.where(m, A, -A) @ W
F.layer_norm(A, A.shape[-1:], v); A * A.var(1, keepdim=True).tanh(); torch.cat([A[:, 1:], A[:, :1]], 1)
torch.stack(A.unbind(1)[::-1], 1); A.index_select(1, P); A.gather(1, P.expand_as(A)); A * v.cumsum(0)
A * v.cumprod(0)[-1]; A * torch.bucketize(A, E.to(A)); A[:, :1] * v; A * (A > 0.05).sum(1, keepdim=True)
torch.where(M, A @ W, A); (A[:, None, :] * W).sum(-1); (A[:, :, None] - A[:, None, :]).tanh().mean(-1); A * w[0]
A - w.max(); A.T.contiguous().T * v; A.reshape(len(A), -1, 1).expand(-1, -1, 2).sum(-1); A[..., -1:] * A
A.triu() if A.ndim > 2 else A; F.pad(A, (1, 0))[:, 1:]
"""
TYPES = """
(A.double() * d).to(A); (A.double() @ W.double()).to(A); ((3 * A).long() * 2 + 1).to(A); (A > 0.1).to(A)
A.float().to(A); ((5 * A).int() * 3 - (A > 0).int()).to(A); (A > 0.1).double().cumsum(1).to(A)
(A.double() + 1e4).sum(1, True).sub(1e4).tanh().to(A) * A; A * (2 * A).floor().clamp(-3, 3)
(3 * A).round().to(torch.int64).float().to(A); A * (A.long() == 0); A.bool().to(A) * A
(torch.where(A > 0, A, -A).double() @ W.double()).to(A); A * (1e3 * A).long().sum(1, True).double().sin().to(A)
"""
PLACES = """
C.mul_(B).add_(0.1); C[:, 0] = B[:, -1]; C[:, 1:] += B[:, :-1]; C[:, ::2] = 0.3; C.clamp_(-1, 1); C[:, m] = 0.25
C.tanh_(); C.masked_fill_(B > 0.2, 0.4); C -= B.mean(1, keepdim=True); C[B > 0.3] = 0.1; C.copy_(B.double())
C[:, P[:1]] = B[:, P[-1:]]; C.sub_(B, alpha=0.5).neg_(); C[..., -1] *= 2; C[:, 0] = (C[:, 0] > 0.1).to(C); C.zero_()
C.fill_(0.2); C.index_fill_(1, P[:1], 0.5)
"""
CHOICES = [(UNARY, 3), (BINARY, 3), (VECTOR, 4), (TYPES, 2), (PLACES, 2)]


def program(seed):
    """Text of a drift, and the size and dtype of its state."""
    pick = random.Random(seed)
    size = pick.choice([2, 3, 4, 9, 12])
    names, lines = ["x"], []
    for i in range(pick.randrange(2, 12)):
        (choices,) = pick.choices([c for c, _ in CHOICES], [n for _, n in CHOICES])
        text = pick.choice([line.strip() for line in choices.replace("\n", ";").split(";") if line.strip()])
        a, b = pick.choice(names), pick.choice(names)
        if choices is PLACES:
            lines += [f"C = {a}.clone()", text.replace("B", b)]
            text = "C"
        else:
            text = _with(text, {"A": a, "B": b})
            if pick.random() < 0.05:
                lines += [f"y{i} = {a}", f"for _ in range({pick.choice([2, 7, 40])}):"]
                lines.append(f"    y{i} = torch.tanh(y{i} + 0.1 * ({_with(text, {a: f'y{i}'})}))")
                text = f"y{i}"
        lines.append(f"y{i} = torch.tanh({text}) if {pick.random() < 0.5} else {text}")
        names.append(f"y{i}")
    lines.append(f"return torch.tanh({names[-1]} + {pick.choice(names)} * torch.cos(3 * t)).to(x.dtype)")
    return lines, size, pick.choice([torch.float32, torch.float64])


def _with(text, new):
    """Text with some names replaced."""
    out, word = "", ""
    for c in [*text, ""]:
        if c and (c.isalnum() or c == "_"):
            word += c
            continue
        out += (new.get(word, word) if not out.endswith((".", "'")) else word) + c
        word = ""
    return out


def drift(lines, size, dtype):
    generator = torch.Generator().manual_seed(size)
    W, M = torch.randn(size, size, generator=generator).to(dtype) / 2, torch.rand(6, size, generator=generator) > 0.5
    names = {
        "torch": torch, "F": F, "W": W, "M": M, "v": torch.randn(size, generator=generator).to(dtype),
        "w": torch.randn(3, generator=generator).to(dtype), "d": torch.rand(size, generator=generator).double(),
        "m": torch.arange(size) % 3 == 1, "P": torch.randperm(size, generator=generator),
        "E": torch.tensor([-0.7, 0.013, 0.31]),
    }  # fmt: skip
    exec("def drift(x, t):\n    " + "\n    ".join(lines), names)
    return names["drift"]


def compare(seed, difference):
    """The largest error of a run of two steps, in units of what rounding can do; ``None`` if it was refused."""
    lines, size, dtype = program(seed)
    f = drift(lines, size, dtype)
    x0 = torch.randn(6, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    options = {"solver": sds.EulerMaruyama(), "seed": seed, "check_finite": False}
    sde = sds.SDE(f, lambda x, t: 0.1 + 0.1 * torch.sin(x), noise="diagonal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = sds.solve(sde, x0, 0.0, 0.5, 2, backend="eager", **options).x1
        except (RuntimeError, IndexError, ValueError):
            return None
        try:
            fused = sds.solve(sde, x0, 0.0, 0.5, 2, backend="fused", **options).x1
        except ValueError as error:
            if "fails while it is traced" in str(error) or "cannot be fused" not in str(error):
                raise
            return None
    # Whatever passes through float32 is good to that alone.
    narrow = dtype == torch.float32 or any("float" in line or "E.to" in line for line in lines)
    return difference(fused, eager) / (2e-4 if narrow else 1e-10)


# All of them take as long as everything else in this folder: three quarters are left for the thorough profile.
TRIED = [pytest.param(first, marks=pytest.mark.thorough if first >= 40 else ()) for first in range(0, 160, 20)]


@pytest.mark.parametrize("first", TRIED)
def test_random_programs(first, interpreted, difference):
    """Results are at most about 1 in size; errors grow by a factor of a few a line."""
    ran = 0
    for seed in range(first, first + 20):
        error = compare(seed, difference)
        ran += error is not None
        assert error is None or error < 1, "\n".join(program(seed)[0])
    assert ran > 10
