"""What the step ops compute, against the oracle in float64 and against eager torch in the same precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given
from hypothesis import strategies as st
from sdesolve_kernels import reference_steps
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NOISE = {torch.float64: 6e-15, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}
SHAPES = [
    (70,),
    (5, 1),
    (300, 2),
    (41, 3),
    (9, 4),
    (9, 5),
    (4, 7),
    (3, 8),
    (4, 33),
    (300, 17),
    (2, 3, 5, 7),
    (3, 4096),
    (2, 5003),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that starts uninitialised starts as NaN, so an element that nobody wrote shows."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def poisoned(*args: Any, real: Callable[..., Tensor] = real, **kwargs: Any) -> Tensor:
            made = real(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() and made.device.type != "meta" else made

        monkeypatch.setattr(torch, name, poisoned)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def per_row(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *(1,) * (x.dim() - 1)) if c.dim() else c


def cases(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]:
    """Name -> the op on states ``x, s, r``, and the expression that one would write in torch on ``x, s, r, z``."""
    batch = shape[0]
    table, each = random((5, 4), 7), random((5, 3, batch), 8)
    a, b, w = random((batch,), 9), random((batch,), 10).abs(), random((batch,), 11).abs()

    def row(c: Tensor, x: Tensor) -> Tensor:
        return per_row(c.to(x.dtype), x)

    def mean_square(r: Tensor) -> Tensor:
        return r.reshape(batch, -1).square().mean(1)

    made: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
        "euler": (
            lambda x, s, r, **where: k.euler_maruyama_step(x, s, r, -0.05, **where),
            lambda x, s, r, z: x + s * -0.05 + r * math.sqrt(0.05) * z,
        ),
        "euler, numbers": (
            lambda x, s, r, **where: k.euler_maruyama_step(x, s, 0.7, torch.tensor(0.3, dtype=torch.float64), **where),
            lambda x, s, r, z: x + s * 0.3 + 0.7 * math.sqrt(0.3) * z,
        ),
        "euler, per sample": (
            lambda x, s, r, **where: k.euler_maruyama_step(x, s, a, b, **where),
            lambda x, s, r, z: x + s * row(b, x) + row(a, x) * row(b, x).sqrt() * z,
        ),
        "linear": (
            lambda x, s, r, **where: k.linear_step(x, [s, r], table, 3, **where),
            lambda x, s, r, z: table[3, 0] * x + table[3, 1] * s + table[3, 2] * r + table[3, 3] * z,
        ),
        "linear, no history": (
            lambda x, s, r, **where: k.linear_step(x, [], table[:, ::3], 1, **where),
            lambda x, s, r, z: table[1, 0] * x + table[1, 3] * z,
        ),
        "linear, four terms, no noise": (
            lambda x, s, r, **where: k.linear_step(x, [s, r, s, r], random((2, 6), 5), 0, stochastic=False, **where),
            lambda x, s, r, z: sum((c * t for c, t in zip(random((2, 6), 5)[0], (x, s, r, s, r), strict=False)), 0 * x),
        ),
        "linear, per sample": (
            lambda x, s, r, **where: k.linear_step(x, [s], each, 4, **where),
            lambda x, s, r, z: row(each[4, 0], x) * x + row(each[4, 1], x) * s + row(each[4, 2], x) * z,
        ),
        "perturb": (
            lambda x, s, r, **where: k.perturb(x, a, b, **where),
            lambda x, s, r, z: row(a, x) * x + row(b, x) * z,
        ),
        "langevin, fixed": (
            lambda x, s, r, **where: k.langevin_step(x, s, size=0.1, alpha=b, **where),
            lambda x, s, r, z: x + row(0.1 * b, x) * s + row((0.2 * b).sqrt(), x) * z,
        ),
        "dsm": (
            lambda x, s, r, **where: k.dsm_loss(x, s, a, b, w, reduction="none", **where),
            lambda x, s, r, z: row(w, x).reshape(-1) * mean_square(x - row(a, x) * s - row(b, x) * z),
        ),
        "dsm, mean": (
            lambda x, s, r, **where: k.dsm_loss(x, None, 0.0, -2.0, 3.0, **where),
            lambda x, s, r, z: 3.0 * mean_square(x + 2.0 * z).mean(),
        ),
    }
    norms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "batch": lambda n, s: n.mean() / s.mean(),
        "sample": lambda n, s: n / s,
        "dimension": lambda n, s: reference_steps.chi_mean(math.prod(shape[1:])) / s.mean(),
    }
    for mode, ratio in norms.items():

        def eager(x: Tensor, s: Tensor, r: Tensor, z: Tensor, ratio: Callable[..., Tensor] = ratio) -> Tensor:
            sizes = [v.reshape(batch, -1).norm(dim=1) for v in (z, s)]
            delta = per_row(2 * 0.9 * (0.16 * ratio(*sizes)) ** 2, x)
            return x + delta * s + (2 * delta).sqrt() * z

        made[f"langevin, {mode}"] = (
            lambda x, s, r, mode=mode, **where: k.langevin_step(x, s, mode=mode, size=0.16, alpha=0.9, **where),
            eager,
        )
    return made


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, where: dict[str, Any]) -> None:
    """Within twice the error of eager torch in the same precision, and what the noise and one rounding may be off."""
    op, eager = cases(shape, dtype)[name]
    states = [random(shape, seed, dtype) for seed in (1, 2, 3)]
    z = reference_steps.noise_like(states[0].double(), **where)
    exact = eager(*(s.double() for s in states), z)
    got = op(*states, **where)
    loss = name.startswith("dsm")
    assert got.dtype == (reference_steps.compute_dtype(dtype) if loss else dtype)
    assert got.shape == exact.shape
    allowed = 2 * (eager(*states, z.to(dtype)).double() - exact).abs().max()
    scale = max(1.0, float(exact.abs().max()), float(z.abs().max())) * (10.0 if "langevin" in name or loss else 2.0)
    allowed = allowed + NOISE[dtype] * scale + torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= allowed


PLACE = {"seed": 2**63 + 5, "stream": 9, "first_path": 2**32 - 3, "step": 7}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases((2, 2), torch.float32))
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        check(name, shape, dtype, PLACE)


@given(
    name=st.sampled_from(list(cases((2, 2), torch.float32))),
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 80),
    m=st.integers(1, 70),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 255),
    first_path=st.integers(0, 2**64 - 100),
    step=st.integers(0, 2**51),
)
def test_anywhere(name: str, dtype: torch.dtype, batch: int, m: int, **where: Any) -> None:
    check(name, (batch, where.pop("m", m)), dtype, where)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 33, 2048, 2049, 4096, 5003])
def test_the_noise_is_that_of_normal(m: int, dtype: torch.dtype) -> None:
    """To the bit, whatever m, in every step; steps and paths past 2^32 included."""
    zero = torch.zeros(6, m, dtype=dtype)
    for first_path, step in ((0, 0), (2**32 - 2, 1), (5, 2**33 // m + 2), (2**63, 3)):
        where: dict[str, Any] = {"seed": 2**64 - 1, "stream": 200, "first_path": first_path}
        expected = k.normal(6, m, offset=step * m, dtype=dtype, **where)
        table = torch.tensor([[1.0, 1.0]])
        assert torch.equal(k.euler_maruyama_step(zero, zero, 1.0, 1.0, step=step, **where), expected)
        assert torch.equal(k.linear_step(zero, [], table, 0, step=step, **where), expected)
        assert torch.equal(k.perturb(zero, 1.0, 1.0, step=step, **where), expected)
        assert torch.equal(k.langevin_step(zero, zero, size=0.5, step=step, **where), expected)
        loss = k.dsm_loss(expected, None, 0.0, 1.0, 1.0, step=step, **where)
        assert loss == 0.0


def test_every_element_of_every_step_has_a_number_of_its_own() -> None:
    """An offset that wraps at 2^31 or 2^32 repeats noise."""
    zero = torch.zeros(4, 5, dtype=torch.float64)
    steps = [0, 1, 2, 2**31 // 5, 2**32 // 5, 2**33 // 5, 2**34 // 5, 2**40]
    draws = [
        k.euler_maruyama_step(zero, zero, 1.0, 1.0, seed=1, step=step, first_path=path)
        for step in steps
        for path in (0, 2**31, 2**32, 2**63)
    ]
    draws.append(k.euler_maruyama_step(zero, zero, 1.0, 1.0, seed=1, stream=k.Stream.CORRECTOR))
    assert torch.cat(draws).unique().numel() == 20 * len(draws)


def test_sixteen_bits_are_rounded_once() -> None:
    """The float32 step of the same inputs, rounded to nearest even; infinities and NaN included."""
    for dtype in (torch.bfloat16, torch.float16):
        x, f = (torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256) for _ in range(2))
        expected = k.euler_maruyama_step(x.float(), f.float(), 0.3, 0.25, seed=2).to(dtype)
        got = k.euler_maruyama_step(x, f, 0.3, 0.25, seed=2)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0.5), expected.nan_to_num(0.5))


def test_float16_gradients_do_not_underflow_before_the_loss_scale() -> None:
    output = random((512, 64), 1, torch.float16).requires_grad_()
    (k.dsm_loss(output, None, 0.0, 1.0, 1.0, seed=0) * 2.0**16).backward()
    wide = output.detach().double().requires_grad_()
    (k.dsm_loss(wide, None, 0.0, 1.0, 1.0, seed=0) * 2.0**16).backward()
    assert output.grad is not None
    assert wide.grad is not None
    error = (output.grad.double() - wide.grad).abs()
    assert (error <= 2**-10 * wide.grad.abs() + 1e-6).all()
    assert (output.grad != 0).double().mean() > 0.99


@pytest.mark.parametrize("upstream", [1.0, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 5), (3, 2, 1500)], ids=str)
def test_gradient_of_the_mean_loss(shape: tuple[int, ...], dtype: torch.dtype, upstream: float) -> None:
    """It is there before it is asked for, for a gradient of 1 from above; and right for every other."""
    x, s, w, q = random(shape, 1, dtype), random(shape, 2, dtype), random(shape[:1], 3).abs(), random(shape[:1], 4)

    def gradients(x: Tensor, s: Tensor, weight: Any, **where: Any) -> tuple[Tensor, ...]:
        x, s = x.requires_grad_(), s.requires_grad_()
        loss = k.dsm_loss(x, s, 0.4, q, weight, **where)
        return torch.autograd.grad(loss * upstream, (x, s))

    for weight in (w, 700.0):
        got = gradients(x.clone(), s.clone(), weight, **PLACE)
        with k.use_backend("reference"):
            exact = gradients(x.double(), s.double(), weight, **PLACE)
        for a, b in zip(got, exact, strict=True):
            eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
            atol = 1e-6 * float(b.abs().max()) + eps * least  # the last term: the spacing of subnormals
            torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_large_states(dtype: torch.dtype) -> None:
    """They are made by a kernel of ours; small ones, which gradcheck sees, by torch."""
    shape = (5, 40_000)
    x, s, w = random(shape, 1, dtype), random(shape, 2, dtype), random((5,), 3).abs()

    def gradients(x: Tensor, s: Tensor, w: Tensor) -> list[Tensor]:
        x, s = x.requires_grad_(), s.requires_grad_()
        loss = k.dsm_loss(x, s, w - 1.0, 0.3, w, reduction="none", seed=0).double() @ w
        step = k.euler_maruyama_step(x, s, 1.0, w, seed=0).double().square().sum() / 2
        return [*torch.autograd.grad(loss, (x, s)), *torch.autograd.grad(step, (x, s))]

    got = gradients(x.clone(), s.clone(), w)
    with k.use_backend("reference"):
        exact = gradients(x.double(), s.double(), w)
    for a, b in zip(got, exact, strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=4 * eps, atol=float(4 * eps * b.abs().max()) + 1e-9)


def test_the_mean_comes_from_the_clean_state() -> None:
    """A mean built from the state after its noise was added carries that noise."""
    x, s = random((64, 48), 1), random((64, 48), 2)
    noisy, clean = torch.tensor([[0.5, 0.25, 3.0]]), torch.tensor([[0.5, 0.25, 0.0]])
    mean = k.linear_step(x, [s], clean, 0, stochastic=False)
    torch.testing.assert_close(mean, 0.5 * x + 0.25 * s, rtol=0, atol=1e-15)
    work = x.clone()
    k.linear_step(work, [s], noisy, 0, seed=4, out=work)
    z = k.normal(64, 48, seed=4, dtype=torch.float64)
    torch.testing.assert_close(work - mean, 3.0 * z, rtol=0, atol=1e-14)


def test_the_last_column_is_not_read_without_noise() -> None:
    x = random((3, 4), 1)
    table = torch.tensor([[0.5, math.nan]])
    assert torch.equal(k.linear_step(x, [], table, 0, stochastic=False), 0.5 * x)


def test_denoising_by_tweedie() -> None:
    """The last step adds sigma^2 times the score, which gives the posterior mean, and no noise."""
    sigma, x0 = 0.7, random((20_000, 3), 1)
    xt = k.perturb(x0, 1.0, sigma, seed=5)
    score = -xt / (1.0 + sigma**2)
    denoised = k.linear_step(
        xt, [score], torch.tensor([[1.0, sigma**2, 0.0]], dtype=torch.float64), 0, stochastic=False
    )
    torch.testing.assert_close(denoised, xt / (1.0 + sigma**2), rtol=0, atol=1e-14)
    # Orthogonality of the posterior mean: what is left is uncorrelated with it, at five standard deviations.
    assert abs(float(((denoised - x0) * denoised).mean())) < 5 * 0.4 / math.sqrt(x0.numel())


@pytest.mark.parametrize(
    ("name", "p", "q"),
    [("noise", 0.0, 1.0), ("score", 0.0, -1 / 0.6), ("data", 1.0, 0.0), ("velocity", -0.6, 0.8), ("edm", None, None)],
)
def test_targets_of_all_parameterisations(name: str, p: float | None, q: float | None) -> None:
    """A network that gives the target has no loss; the EDM target is that of Karras et al., table 1."""
    alpha, sigma, x0 = 0.8, 0.6, random((7, 5), 1)
    xt = k.perturb(x0, alpha, sigma, seed=8, step=2)
    z = (xt - alpha * x0) / sigma
    if name == "edm":
        s, data = sigma / alpha, 0.5
        c_skip, c_out = data**2 / (s**2 + data**2), s * data / math.sqrt(s**2 + data**2)
        p, q = (1 - c_skip) / c_out, -c_skip * sigma / (alpha * c_out)
        target = (x0 - c_skip * xt / alpha) / c_out
    else:
        target = {"noise": z, "score": -z / sigma, "data": x0, "velocity": alpha * z - sigma * x0}[name]
    assert p is not None
    assert q is not None
    assert k.dsm_loss(target, x0, p, q, 1.0, seed=8, step=2) < 1e-28
    assert k.dsm_loss(target, x0, p, q, 1.0, seed=8, step=3) > 1e-3 or name == "data"


def test_langevin_keeps_a_gaussian() -> None:
    """N(0, 1) under steps of size delta has the variance 1 / (1 - delta / 2), exactly, in the limit."""
    delta, x = 0.1, k.normal(40_000, 4, seed=1, stream=k.Stream.INITIAL)
    for step in range(60):
        k.langevin_step(x, -x, size=delta, seed=1, step=step, out=x)
    n = x.numel()
    exact = 1 / (1 - delta / 2)
    assert abs(float(x.var()) - exact) < 5 * exact * math.sqrt(2 / n)


def test_empty() -> None:
    for shape in ((0, 3), (3, 0), (0,), (2, 0, 3)):
        x = torch.empty(shape)
        for backend in ("auto", "reference"):
            with k.use_backend(backend):
                assert k.euler_maruyama_step(x, x, 1.0, 0.1, seed=0).shape == shape
                assert k.linear_step(x, [x], torch.zeros(1, 3), 0).shape == shape
                assert k.perturb(x, 1.0, 0.1, seed=0).shape == shape
                assert k.langevin_step(x, x, mode="batch", size=0.1, seed=0).shape == shape
                assert k.dsm_loss(x, x, 1.0, 1.0, 1.0, seed=0).isnan()
                assert k.dsm_loss(x, x, 1.0, 1.0, 1.0, seed=0, reduction="none").shape == shape[:1]
        x = torch.zeros(shape, requires_grad=True)
        k.dsm_loss(x, None, 0.0, 1.0, 1.0, seed=0).backward()
