from __future__ import annotations

import pytest
import torch
from sdesolve_kernels._triton import geometry, launch, selfcheck
from sdesolve_kernels._triton.arguments import recording
from sdesolve_kernels._triton.launch_denoising import dsm_loss_parts
from sdesolve_kernels._triton.launch_langevin import langevin_size, langevin_step
from sdesolve_kernels._triton.launch_matrices import matrix_step

F32, F64, BF16, F16 = selfcheck.DTYPES
# One shape for each layout of the tiles gets every check.
THOROUGH = [(4, 3), (3, 2, 5, 4)]
VALUES = [(F32, s) for s in selfcheck.SHAPES if s not in THOROUGH][::2]
VALUES += [(F64, (5, 2)), (F64, (2, 7)), (BF16, (5, 8)), (BF16, (2, 7)), (F16, (5, 2))]


def name(v):
    return str(v).removeprefix("torch.").replace(" ", "") if isinstance(v, (torch.dtype, tuple)) else None


def assert_ok(checks):
    found = list(checks)
    assert found
    wrong = [check for check in found if not check.ok]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("dtype", [F32, F64], ids=name)
def test_noise(dtype):
    assert_ok(selfcheck.noise_checks("cpu", dtype))


@pytest.mark.parametrize("shape", THOROUGH, ids=name)
def test_steps_in_every_way(shape):
    assert_ok(selfcheck.step_checks("cpu", F32, shape))


@pytest.mark.parametrize(("dtype", "shape"), VALUES, ids=name)
def test_step_values(dtype, shape):
    assert_ok(selfcheck.step_checks("cpu", dtype, shape, agreement=False))


def test_batches():
    assert_ok(selfcheck.batch_checks("cpu", F32))


WHERE = {"seed": 1, "stream": 0, "first_path": 0, "step": 0}


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=name)
def test_empty(shape):
    x = torch.empty(shape)
    results = [
        launch.euler_maruyama_step(x, x, 0.1, 0.1, **WHERE),
        launch.linear_step(x, [x], torch.ones(1, 3), 0, **WHERE),
        launch.perturb(x, 1.0, 1.0, **WHERE),
        langevin_step(x, x, mode="batch", size=0.1, alpha=1.0, **WHERE),
        launch.fill("normal", x, seed=1, stream=0),
        dsm_loss_parts(x, None, 0.0, 1.0, 1.0, grad=True, mean=True, **WHERE).grad,
    ]
    assert all(r.shape == shape for r in results)


def test_numbers_are_not_rounded_to_float32():
    x = torch.ones(2, 4, dtype=torch.float64)
    made = launch.euler_maruyama_step(x, x, 0.0, 0.1, **WHERE)
    assert torch.equal(made, torch.full_like(x, 1.0 + 0.1))


def test_noise_does_not_wrap():
    """Indices that an int32 product of step and row would confuse give different words."""
    word = [
        launch.numbered_words(1, 4, device="cpu", seed=0, stream=0, first_path=path, offset=offset)
        for path, offset in [(0, 0), (0, 2**32), (0, 2**34), (2**31, 0), (2**32, 0), (2**63, 0)]
    ]
    assert len({tuple(w[0].tolist()) for w in word}) == len(word)


def test_inputs_are_left_alone():
    x, s = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.ones(3, 5)
    before = x.clone(), s.clone()
    launch.linear_step(x, [s], torch.ones(2, 3), 1, **WHERE)
    langevin_step(x, s, mode="batch", size=0.1, alpha=1.0, **WHERE)
    dsm_loss_parts(x, s, 1.0, 1.0, 1.0, grad=True, **WHERE)
    assert torch.equal(x, before[0])
    assert torch.equal(s, before[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: launch.linear_step(x, [x] * 5, torch.ones(1, 7), 0, **WHERE), "at most 4"),
        (lambda x: launch.linear_step(x, [x], torch.ones(1, 4), 0, **WHERE), "table must be"),
        (lambda x: launch.linear_step(x, [x], torch.ones(1, 3), 1, **WHERE), "row must index"),
        (lambda x: launch.perturb(x, torch.ones(2), 1.0, **WHERE), "alpha must be"),
        (lambda x: launch.perturb(x, 1.0, 1.0, **WHERE, out=torch.empty(3, 6)), "out must be like x"),
        (
            lambda x: launch.perturb(x, 1.0, 1.0, **{**WHERE, "step": torch.tensor(1.0)}),
            "step as a tensor must be int64",
        ),
        (lambda x: langevin_step(x, x, mode="other", size=0.1, alpha=1.0, **WHERE), "mode must be"),
        (lambda x: langevin_step(x, x, mode="batch", size=torch.ones(3), alpha=1.0, **WHERE), "one number"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 5))


def test_a_gradient_that_is_there_stays_in_an_output_of_any_strides():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    one, two = torch.ones(()), torch.full((), 2.0)
    made = dsm_loss_parts(x, None, 0.0, 1.0, 1.0, grad=True, mean=True, **WHERE).grad
    gradient = {"loss": False, "grad": True, "mean": True, "made": True, **WHERE}
    for out in (torch.empty(3, 8), torch.empty(8, 3).t(), torch.empty(3, 16)[:, ::2]):
        for upstream, expected in ((one, made), (two, 2.0 * made)):
            out.copy_(made)
            dsm_loss_parts(x, None, 0.0, 1.0, 1.0, upstream=upstream, out=out, **gradient)
            assert torch.equal(out, expected)


def test_the_splits_of_a_row_are_added_in_lanes(monkeypatch):
    """More splits than lanes, more groups of rows than one."""
    monkeypatch.setattr(geometry, "_CHUNKS_PER_SPLIT", 1)
    monkeypatch.setattr(geometry, "_MOST_LANES", 2)
    monkeypatch.setattr(geometry, "_IN_SECOND_PASS", 4)
    x, s = (torch.randn(3, 40, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    with geometry.tuned(block=4):
        splits = geometry.splits_of(launch.tile_of(x)[1])[1]
        size = langevin_size(s, mode="batch", snr=0.1, **WHERE)
        each = langevin_size(s, mode="sample", snr=0.1, **WHERE)
        loss = dsm_loss_parts(x, s, 1.0, 0.0, 1.0, **WHERE).loss
        mean = dsm_loss_parts(x, s, 1.0, 0.0, 1.0, mean=True, **WHERE).loss
    assert (splits, geometry.tree(splits)) == (3, (2, 2))
    z = launch.fill("normal", torch.empty(3, 40), seed=1, stream=0).double()
    norms = s.double().norm(dim=1)
    torch.testing.assert_close(size.double(), 2 * (0.1 * z.norm(dim=1).mean() / norms.mean()) ** 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(each.double(), 2 * (0.1 * z.norm(dim=1) / norms) ** 2, rtol=1e-5, atol=0)
    expected = (x - s).double().square().mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), expected.mean(), rtol=1e-5, atol=0)


def test_an_output_over_a_part_of_what_is_read():
    """On a GPU, programs that run later would read what others have written."""
    memory = torch.randn(9 * 8, generator=torch.Generator().manual_seed(2))
    x, later, apart = memory[:64].view(8, 8), memory[8:].view(8, 8), torch.zeros(8, 8)
    table, g = torch.tensor([[1.0, 0.5, 0.1]], dtype=torch.float64), torch.ones(8, 8, 2)
    kept = memory.clone()
    calls = [
        lambda out: launch.euler_maruyama_step(x, apart, 0.1, 0.1, **WHERE, out=out),
        lambda out: launch.euler_maruyama_step(apart, x, 0.1, 0.1, **WHERE, out=out),
        lambda out: launch.euler_maruyama_step(apart, apart, x, 0.1, **WHERE, out=out),
        lambda out: launch.linear_step(apart, [x], table, 0, **WHERE, out=out),
        lambda out: langevin_step(apart, x, mode="fixed", size=0.1, alpha=1.0, **WHERE, out=out),
        lambda out: matrix_step(x, apart, g, 0.1, **WHERE, out=out),
        lambda out: launch.perturb(apart, memory[8:16], 0.1, **WHERE, out=out),
        lambda out: dsm_loss_parts(x, None, 0.0, 1.0, 1.0, grad=True, **WHERE, out=out).grad,
    ]
    for k, call in enumerate(calls):
        with recording() as launches:
            call(later)
        assert launches[0].arguments.get("grad_ptr", launches[0].arguments.get("out_ptr")) is not later, k
        memory.copy_(kept)
        expected = call(torch.zeros(8, 8))
        assert torch.equal(call(later), expected), k
        memory.copy_(kept)
    with recording() as launches:
        launch.euler_maruyama_step(x, apart, 0.1, 0.1, **WHERE, out=x)
    assert launches[0].arguments["out_ptr"] is x  # the very tensor that is read
