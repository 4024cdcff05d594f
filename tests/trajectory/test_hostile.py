"""Functions that no path's kernel can be made of: refused with what they do and where, and run eagerly under auto."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import batch_norm

import sdesolve as sds

X0 = torch.linspace(-2.0, 2.0, 36, dtype=torch.float64).reshape(12, 3)


def diffusion(x, t):
    return 0.1 * torch.ones_like(x)


def solve(f, backend, x0=X0, solver=None, **options):
    sde = f if isinstance(f, sds.SDE | sds.ODE) else sds.SDE(f, diffusion)
    return sds.solve(sde, x0, 0.0, 1.0, 3, solver=solver or sds.EulerMaruyama(), seed=1, backend=backend, **options)


def refused(f, reason, x0=X0):
    """The message of ``fused``; ``auto`` says the same, and gives what eager gives."""
    with pytest.raises(ValueError, match=r"cannot be fused") as error:
        solve(f, "fused", x0)
    assert reason in str(error.value), str(error.value)
    auto, eager = solve(f, "auto", x0), solve(f, "eager", x0)
    assert auto.stats.backend != "fused"
    assert reason in auto.stats.reason
    torch.testing.assert_close(auto.x1, eager.x1)
    return str(error.value)


READING = {
    "if": lambda x, t: x if x.sum() > 0 else -x,
    "if on time": lambda x, t: x if t < 0.5 else -x,
    "while": lambda x, t: next(x / 2**n for n in itertools.count() if (x / 2**n).abs().max() < 1),
    "float": lambda x, t: x * float(t),
    "int": lambda x, t: x * int(t * 2),
    "item": lambda x, t: x * x.mean().item(),
    "tolist": lambda x, t: x * sum(x[:, 0].tolist()),
    "numpy": lambda x, t: torch.from_numpy(np.tanh(x.numpy())),
    "array": lambda x, t: torch.tensor(np.asarray(x)).tanh(),
    "format": lambda x, t: x * float(f"{t:.2f}"),
    "bool": lambda x, t: x * bool((x > 0).all()),
    "in": lambda x, t: x * (0.0 in x),
    "equal": lambda x, t: x * torch.equal(x, x),
    "allclose": lambda x, t: x * torch.allclose(x, x),
    "max": lambda x, t: x / max(x[:, 0].abs()),
    "range": lambda x, t: sum(x / 8 for _ in range(int(t * 4) + 1)),
}


@pytest.mark.parametrize("f", list(READING.values()), ids=list(READING))
def test_values_read_in_python(f, interpreted):
    assert "test_hostile.py" in refused(f, "reads the value of a tensor")


def halved_in_place(x, t):
    y = x * 2
    y[:5] = 0
    return y


def one_in_place(x, t):
    y = x * 2
    y += (torch.arange(len(x)) == 5)[:, None]
    return y


def part_in_place(x, t):
    y = (x * 2).T
    y.narrow(1, 0, min(5, len(x))).zero_()
    return y.T


COUPLED = {
    "mean": lambda x, t: x - x.mean(0),
    "mean, kept": lambda x, t: x - x.mean(0, keepdim=True),
    "sort": lambda x, t: x.sort(0)[0],
    "first row": lambda x, t: x - x[0],
    "last row": lambda x, t: x - x[-1],
    "roll": lambda x, t: x.roll(1, 0),
    "flip": lambda x, t: x.flip(0),
    "cumulative": lambda x, t: x.cumsum(0) / 10,
    "product": lambda x, t: x @ (x.T @ x) / 100,
    "softmax": lambda x, t: x.softmax(0),
    "interaction": lambda x, t: (x[:, None] - x[None]).tanh().mean(1),
    "batch norm": lambda x, t: batch_norm(x, None, None, training=True),
    "spread": lambda x, t: x / x.std(0),
    "largest": lambda x, t: x - x.amax(0),
    "norm of all": lambda x, t: x / x.norm(),
    "shuffled": lambda x, t: x[torch.arange(len(x) - 1, -1, -1)],
}
PLACED = {
    "size": lambda x, t: x / len(x),
    "threshold of size": lambda x, t: x if len(x) > 4 else -x,
    "place": lambda x, t: x * torch.arange(len(x))[:, None],
    "first few": lambda x, t: torch.where(torch.arange(len(x))[:, None] < 5, x, -x),
    "all but a few": lambda x, t: x - x[5:].sum(0),
    "one of the first": lambda x, t: torch.cat([x[:5], -x[5:]]),
    "eye": lambda x, t: x * torch.eye(len(x))[0][:, None],
    "first few in place": halved_in_place,
    "one in place": one_in_place,
    "first few of a transpose in place": part_in_place,
}


@pytest.mark.parametrize("f", [*COUPLED.values(), *PLACED.values()], ids=[*COUPLED, *PLACED])
def test_paths_that_are_coupled_or_told_apart(f, interpreted):
    """By what the others are, by place in the batch, or by its size; the kernel of another size does not pass."""
    with pytest.raises(ValueError, match=r"couples the paths|not treated alike|in place|no kernel is generated"):
        solve(f, "fused")
    auto, eager = solve(f, "auto"), solve(f, "eager")
    assert auto.stats.backend != "fused"
    torch.testing.assert_close(auto.x1, eager.x1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 100, 1500])
def test_a_step_that_changes_with_the_size_of_the_batch_is_right_for_every_size(size, interpreted):
    """One kernel may serve many sizes, and none that it was not traced for."""
    f = sds.SDE(lambda x, t: x if len(x) > 4 else -x, diffusion)
    for n in (2, size, 3, size):
        x0 = torch.ones(n, 2, dtype=torch.float64)
        torch.testing.assert_close(solve(f, "auto", x0).x1, solve(f, "eager", x0).x1)


FAR = {
    "place": lambda n: lambda x, t: torch.where(torch.arange(len(x))[:, None] < n, x, -x),
    "parts": lambda n: lambda x, t: torch.cat([x[:n], -x[n:]]),
    "size": lambda n: lambda x, t: x if len(x) > n else -x,
}


@pytest.mark.parametrize(("shape", "n"), [((4001, 2), 2000), ((1021, 300), 500)])
@pytest.mark.parametrize("f", list(FAR.values()), ids=list(FAR))
def test_places_far_into_a_batch(f, shape, n, interpreted):
    """Also where the rows that are told apart are too many, or too long, to be done one by one."""
    refused(f(n), "not treated alike", torch.linspace(-1.0, 1.0, math.prod(shape), dtype=torch.float64).reshape(shape))


WRONG = {
    "shape": lambda x, t: x[:, :2],
    "shape that would broadcast": lambda x, t: x[:, :1],
    "shapes that disagree": lambda x, t: x + torch.zeros(5, dtype=x.dtype),
    "dtype": lambda x, t: x.float(),
    "number": lambda x, t: 1.0,
    "nothing": lambda x, t: None,
    "tuple": lambda x, t: (x,),
    "error of its own": lambda x, t: {}["missing"],
}


@pytest.mark.parametrize("f", list(WRONG.values()), ids=list(WRONG))
def test_wrong_results_give_the_errors_of_eager(f, interpreted):
    with pytest.raises(Exception) as expected:  # whichever it is  # noqa: PT011
        solve(f, "eager")
    with pytest.raises(type(expected.value)) as given:
        solve(f, "auto")
    assert str(given.value) == str(expected.value)
    with pytest.raises(ValueError, match="cannot be fused"):
        solve(f, "fused")


def test_infinities_appear_where_eager_has_them(both, difference, interpreted):
    x0 = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 1e-20], [-3.0, 5.0, 0.5]])
    functions = [
        lambda x, t: 1 / x, lambda x, t: x / 0, lambda x, t: torch.log(x), lambda x, t: x.sqrt(),
        lambda x, t: x * 1e38 * 10,
        lambda x, t: x * 3e38 + x * 3e38, lambda x, t: x / t, lambda x, t: torch.exp(100 * x), lambda x, t: x.pow(-1.5),
        lambda x, t: x / (x - x), lambda x, t: x * float("inf"), lambda x, t: x + float("nan"), lambda x, t: 1e39 * x,
        lambda x, t: torch.atan2(x, 0 * x) / x.sign(), lambda x, t: torch.softmax(x / 0, 1),
        lambda x, t: torch.tan(x) / 1e-40,
    ]  # fmt: skip
    for f in functions:
        for solver in (sds.EulerMaruyama(), sds.Heun()):
            fused, eager = both(sds.ODE(f), x0, steps=1, solver=solver, check_finite=False)
            assert torch.equal(fused.x1.isfinite(), eager.x1.isfinite())
            finite = eager.x1.isfinite()
            assert difference(fused.x1[finite], eager.x1[finite]) < 64 * torch.finfo(torch.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_switches_in_time_fall_into_the_steps_that_eager_puts_them(dtype, both, difference, interpreted):
    """A time that is a grid point only up to rounding, in the precision of the state."""
    x0 = torch.ones(2, 1, dtype=dtype)
    for end, steps in itertools.product((0.3, 0.7, 0.9, 1.1), (3, 7, 9, 10)):
        for k in range(1, steps, 2):
            at, h = end * k / steps, end / steps

            def f(x, t, at=at, h=h):
                return torch.where(t < at, x, -x) + torch.where(t == at, x, 0 * x) + torch.floor(t / h) * x

            def g(x, t, at=at, h=h):
                waves = t % h + t // h + torch.fmod(t, at) + torch.floor((t - at) / h) + ((t / h) % 2 < 1)
                return x * (waves + torch.where(t - h > at - h, 1.0, 0.0) + (t * 3 - at * 3 >= 0)).to(x.dtype)

            for drift in (f, g):
                fused, eager = both(sds.ODE(drift), x0, 0.0, end, steps)
                assert difference(fused.x1, eager.x1) < 1e-5, (end, steps, k)
        fused, eager = both(
            sds.ODE(lambda x, t, end=end: torch.sqrt(end - t) * x), x0, 0.0, end, steps, solver=sds.RK4()
        )
        assert difference(fused.x1, eager.x1) < 1e-5


def test_compiled_and_scripted_functions(interpreted):
    @torch.jit.script
    def scripted(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 2.0

    for f in (lambda x, t: scripted(x), torch.no_grad()(lambda x, t: -x)):
        auto, eager = solve(f, "auto"), solve(f, "eager")
        torch.testing.assert_close(auto.x1, eager.x1)


def test_what_is_too_large_is_refused_and_remembered(interpreted):
    """By its inputs before anything else is done, so that a network on images pays next to nothing for the attempt."""
    large = torch.ones(300, 300, dtype=torch.float64) / 300
    calls = []

    class Net(torch.nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return -x

    net = Net()
    for f, x0, reason in (
        (lambda x, t: x @ large, torch.ones(2, 300, dtype=torch.float64), "too many entries"),
        (lambda x, t: net(x), torch.ones(2, 3, 64, 64), "12288 numbers"),
        (lambda x, t: torch.sin(x[:, None] - x[:, :, None]).mean(-1), torch.ones(2, 160), "operations"),
    ):
        assert reason in solve(sds.ODE(f), "auto", x0).stats.reason
        assert reason in solve(sds.ODE(f), "auto", x0).stats.reason
    assert calls == [2] * 6
    assert interpreted.made == 0


@pytest.mark.parametrize("backend", ["fused", "kernel", "eager"])
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"first_path": 2**64 - 11}, r"at most 2\^64, got 18446744073709551605 \+ 12"),
        ({"first_step": 2**58 // 3 - 2}, r"2\^58"),
    ],
    ids=["paths", "steps"],
)
def test_noise_beyond_the_last_coordinate_is_refused(where, message, backend):
    """The kernel's 64-bit integers would wrap and repeat the noise of other paths and steps."""
    last = {name: value - 1 for name, value in where.items()}
    run = functools.partial(sds.solve, sds.SDE(lambda x, t: x, diffusion), X0, 0.0, 1.0, 3, solver=sds.EulerMaruyama())
    run(noise=sds.BrownianPath(1, **last), backend=backend)
    with pytest.raises(ValueError, match=message):
        run(noise=sds.BrownianPath(1, **where), backend=backend)
