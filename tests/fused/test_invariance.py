"""The same bits whatever is around an element: batch split, threads, layout, in place or not, how integers come."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sdesolve_kernels as k
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TABLE = torch.tensor([[0.9, 0.3, -0.2, 0.5], [0.8, 0.1, 0.7, 0.4]], dtype=torch.float64)

# Everything of which a part of the batch can be had alone.
OPS: dict[str, Callable[..., Tensor]] = {
    "euler": lambda x, s, r, c, **where: k.euler_maruyama_step(x, s, r, 0.1, **where),
    "euler, per sample": lambda x, s, r, c, **where: k.euler_maruyama_step(x, s, c, c, **where),
    "linear": lambda x, s, r, c, **where: k.linear_step(x, [s, r], TABLE, 1, **where),
    "linear, per sample": lambda x, s, r, c, **where: k.linear_step(x, [s], torch.stack([c, c, c])[None], 0, **where),
    "perturb": lambda x, s, r, c, **where: k.perturb(x, c, 0.3, **where),
    "langevin": lambda x, s, r, c, **where: k.langevin_step(x, s, size=c.abs(), **where),
    "langevin, own norms": lambda x, s, r, c, **where: k.langevin_step(x, s, mode="sample", size=0.2, **where),
}
LOSS: dict[str, Callable[..., Tensor]] = {
    "dsm": lambda x, s, r, c, **where: k.dsm_loss(x, s, c, 0.5, c, reduction="none", **where),
    "dsm, noise": lambda x, s, r, c, **where: k.dsm_loss(x, None, 0.0, 1.0, 1.0, reduction="none", **where),
}
COUPLED: dict[str, Callable[..., Tensor]] = {
    "langevin, batch": lambda x, s, r, c, **where: k.langevin_step(x, s, mode="batch", size=0.2, **where),
    "langevin, dimension": lambda x, s, r, c, **where: k.langevin_step(x, s, mode="dimension", size=0.2, **where),
    "dsm, mean": lambda x, s, r, c, **where: k.dsm_loss(x, s, 0.1, 0.5, c, **where)[None],
}


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def states(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    full = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3))
    return *full, torch.rand(shape[0], generator=generator).to(torch.float32 if dtype != torch.float64 else dtype)


@pytest.mark.parametrize("name", [*OPS, *LOSS])
@given(data=st.data())
@settings(max_examples=10)
def test_a_part_of_the_batch(name: str, data: st.DataObject) -> None:
    op = (OPS | LOSS)[name]
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from([(90,), (300, 2), (90, 3), (40, 5), (90, 17), (20, 70), (4, 2048), (4, 5001)]))
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    inputs = states(shape, dtype)
    step = data.draw(st.integers(0, 9))
    whole = op(*inputs, seed=1, first_path=2**32 - 30, step=step)
    part = op(*(t[start:stop] for t in inputs), seed=1, first_path=2**32 - 30 + start, step=step)
    assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("name", [*OPS, *LOSS, *COUPLED])
@pytest.mark.parametrize("shape", [(350_001, 1), (150_001, 3), (30_011, 17), (1, 600_001), (7, 70_003)], ids=str)
def test_thread_count(name: str, shape: tuple[int, int], threads: Any) -> None:
    """Sums included: dsm_loss and the norms of the corrector are added in an order that m alone decides."""
    inputs, made = states(shape, torch.float32), []
    for n in (1, 2, 3, 5):
        threads(n)
        made.append((OPS | LOSS | COUPLED)[name](*inputs, seed=8, step=1))
    assert all(torch.equal(m, made[0]) for m in made[1:])


@pytest.mark.parametrize("name", [*OPS, *COUPLED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(name: str, dtype: torch.dtype) -> None:
    if name == "dsm, mean":
        return
    op = (OPS | COUPLED)[name]
    for shape in ((50, 3), (9, 40), (2, 3000)):
        inputs = states(shape, dtype)
        expected = op(*inputs, seed=4)
        for which in range(3):  # over the state, or over what is added to it
            work = [t.clone() for t in inputs]
            returned = op(*work, seed=4, out=work[which])
            assert returned is work[which]
            assert torch.equal(returned, expected)
        fresh = torch.full(shape, math.nan, dtype=dtype)
        assert torch.equal(op(*inputs, seed=4, out=fresh), expected)


def test_out_that_overlaps_an_input_elsewhere() -> None:
    """Reading an element after it was written would be wrong; a copy is made. Large enough for several tiles."""
    for shift in (-3, 1, 40, 5000):
        memory = torch.arange(20_000, dtype=torch.float64)
        x, out = memory[50:10_050].view(100, 100), memory[50 + shift : 10_050 + shift].view(100, 100)
        if shift == -3:
            x, out = out, x
        apart = torch.randn(100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = [k.euler_maruyama_step(*v, 0.1, seed=0) for v in ((x, apart, apart), (apart, apart, x))]
        before = memory.clone()
        assert torch.equal(k.euler_maruyama_step(x, apart, apart, 0.1, seed=0, out=out), expected[0])
        memory.copy_(before)
        assert torch.equal(k.euler_maruyama_step(apart, apart, x, 0.1, seed=0, out=out), expected[1])


@pytest.mark.parametrize("where", [130, 9_000, -30], ids=["in the first tile", "in the last", "across the start"])
@pytest.mark.parametrize("op", ["signal", "noise", "transposed", "norms"])
def test_out_that_overlaps_coefficients(op: str, where: int) -> None:
    """The first tile would overwrite what the later ones still read."""
    memory = torch.linspace(1.0, 2.0, 20_001)
    c, out = memory[5_000 + where : 5_100 + where], memory[5_000:15_000].view(100, 100)
    x = torch.linspace(-1.0, 1.0, 10_000).view(100, 100)
    calls: dict[str, Callable[..., Tensor]] = {
        "signal": lambda c, **out: k.perturb(x, c, 0.5, seed=0, **out),
        "noise": lambda c, **out: k.perturb(x, 1.0, c, seed=0, **out),
        "transposed": lambda c, **out: k.euler_maruyama_step(x.T, x.T, c, c, seed=0, **out),
        "norms": lambda c, **out: k.langevin_step(x, x, mode="batch", size=0.2, alpha=c, seed=0, **out),
    }
    expected = calls[op](c.clone())
    assert torch.equal(calls[op](c, out=out), expected)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values, lying differently."""
    batch, a, b = t.shape
    wide = torch.full((batch + 2, 2 * a, b + 3), math.nan, dtype=t.dtype)
    wide[1:-1, ::2, 2:-1] = t
    shifted = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return {
        "plain": t.clone(),
        "transposed": t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels last": t.transpose(1, 2).contiguous().transpose(1, 2),
        "inside a larger one": wide[1:-1, ::2, 2:-1],
        "unaligned": shifted.copy_(t),
    }


@pytest.mark.parametrize("name", [*OPS, *LOSS, *COUPLED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layout(name: str, dtype: torch.dtype) -> None:
    op = (OPS | LOSS | COUPLED)[name]
    x, s, r, c = states((12, 3, 5), dtype)
    expected = op(x, s, r, c, seed=4)
    spread = torch.stack([c, c], dim=1)[:, 0]
    for how in layouts(x):
        inputs = [layouts(t)[how] for t in (x, s, r)]
        assert torch.equal(op(*inputs, spread, seed=4), expected), how
        if not name.startswith("dsm"):
            outside = inputs[0]._base
            before = None if outside is None else outside.isnan().sum()
            op(*inputs, spread, seed=4, out=inputs[0])
            assert torch.equal(inputs[0], expected), how
            assert outside is None or outside.isnan().sum() == before, how
    assert torch.equal(
        op(x[:, :, :1].expand(12, 3, 5), s, r, c, seed=4), op(x[:, :, :1].repeat(1, 1, 5), s, r, c, seed=4)
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_integers_in_tensors(backend: str) -> None:
    x, f, _, _ = states((6, 5), torch.float64)
    for seed, path, step in ((0, 0, 0), (2**62 + 3, 2**40, 2**33), (2**64 - 1, 2**63 + 9, 5)):
        at = [torch.tensor(v - 2**64 if v >= 2**63 else v) for v in (seed, path, step)]
        with k.use_backend(backend):
            expected = k.euler_maruyama_step(x, f, 1.0, 0.1, seed=seed, first_path=path, step=step)
            got = k.euler_maruyama_step(x, f, 1.0, 0.1, seed=at[0], first_path=at[1], step=at[2])
            assert torch.equal(got, expected)
            expected = k.linear_step(x, [f, f], TABLE, 1, seed=seed, step=step)
            assert torch.equal(k.linear_step(x, [f, f], TABLE, torch.tensor(1), seed=seed, step=at[2]), expected)


def test_a_float32_table_is_read_as_it_is() -> None:
    x, f, g, _ = states((6, 5), torch.float32)
    for table in (TABLE.float(), TABLE.repeat(2, 2)[:, :4], TABLE.T.contiguous().T):
        torch.testing.assert_close(k.linear_step(x, [f, g], table, 1), k.linear_step(x, [f, g], TABLE, 1))


@pytest.mark.parametrize("name", ["euler", "euler, per sample", "perturb", "linear"])
def test_gradients_have_the_same_noise_on_every_split(name: str, threads: Any) -> None:
    """What backward makes again is what forward made."""
    inputs = states((300, 7), torch.float32)
    whole = [t.clone().requires_grad_() for t in inputs]
    weights = torch.linspace(-1, 1, 2100).view(300, 7)

    def total(parts: list[Tensor], first: int) -> Tensor:
        n = parts[0].shape[0]
        x, s, r, c = parts
        made = (
            k.euler_maruyama_step(x, s, c, 0.1, seed=1, first_path=first)
            if name == "euler, per sample"
            else OPS[name](x, s, r, c, seed=1, first_path=first)
        )
        return (made * weights[first : first + n]).sum()

    total(whole, 0).backward()
    halves = [t.clone().requires_grad_() for t in inputs]
    for start, stop in ((0, 111), (111, 300)):
        total([t[start:stop] for t in halves], start).backward()
    for a, b in zip(whole, halves, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def test_no_python_thread_sees_the_scratch_of_another() -> None:
    from concurrent.futures import ThreadPoolExecutor

    x, s, r, c = states((300, 300), torch.float32)
    expected = k.euler_maruyama_step(x, s, r, 0.1, seed=4), k.dsm_loss(x, s, c, 0.5, c, seed=4)
    with ThreadPoolExecutor(6) as pool:
        steps = list(pool.map(lambda _: k.euler_maruyama_step(x, s, r, 0.1, seed=4), range(30)))
        losses = list(pool.map(lambda _: k.dsm_loss(x, s, c, 0.5, c, seed=4), range(30)))
    assert all(torch.equal(step, expected[0]) for step in steps)
    assert all(torch.equal(loss, expected[1]) for loss in losses)
