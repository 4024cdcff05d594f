"""What torch.library, autograd, compilers and function transforms make of the ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sdesolve_kernels as k
import torch
from torch import Tensor

OPS = torch.ops.sdesolve
PLACE = (2**62 + 1, 3, 2**32 - 1, 5, None, None, None)


def double(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    made = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(grad)


def positive(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    return (double(*shape, grad=False, seed=seed).abs() + 0.3).requires_grad_(grad)


def samples() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    number = torch.tensor(0.3, dtype=torch.float64)
    table = double(4, 4, grad=False)
    index = tuple(torch.tensor(i) for i in (7, 2**33, 3))
    return {
        "euler, g of the state": (OPS.euler_maruyama_step, (double(5, 3), double(5, 3), double(5, 3), number, *PLACE)),
        "euler, g per sample": (
            OPS.euler_maruyama_step,
            (double(5, 3), double(5, 3), double(5), positive(5, grad=False), *PLACE),
        ),
        "euler, integers in tensors": (
            OPS.euler_maruyama_step,
            (double(5), double(5), number, number, 0, 3, 0, 0, *index),
        ),
        "linear": (
            OPS.linear_step,
            (double(5, 3), table, 2, None, True, double(5, 3), double(5, 3), None, None, *PLACE),
        ),
        "linear, row in a tensor": (
            OPS.linear_step,
            (double(5, 3), double(4, 2, 5, grad=False), 0, index[2], True, None, None, None, None, *PLACE),
        ),
        "perturb": (OPS.perturb, (double(5, 3), double(5), positive(5), *PLACE)),
        "perturb by numbers": (OPS.perturb, (double(5, 3), positive(), positive(), *PLACE)),
        "langevin": (OPS.langevin_step, (double(5, 3), double(5, 3), "fixed", positive(5), positive(), *PLACE)),
        "langevin by norms": (
            OPS.langevin_step,
            (double(5, 3, grad=False), double(5, 3, grad=False), "batch", number, number, *PLACE),
        ),
        "noise product": (OPS.noise_product, (double(5, 3), positive(5, grad=False), *PLACE)),
        "dsm": (
            OPS.dsm_loss,
            (double(5, 3), double(5, 3), double(5, grad=False), number, positive(5, grad=False), True, *PLACE),
        ),
        "dsm gradient": (
            OPS.dsm_gradient,
            (double(5), double(5, 3), double(5, 3), double(5, grad=False), number, number, False, *PLACE),
        ),
        "dsm gradient of the mean": (
            OPS.dsm_gradient,
            (double(), double(5, 3), None, number, number, positive(5, grad=False), True, *PLACE),
        ),
        "dsm without data": (OPS.dsm_loss, (double(5, 3), None, number, number, number, False, *PLACE)),
    }


@pytest.mark.parametrize("name", samples())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_opcheck(name: str) -> None:
    op, arguments = samples()[name]
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", ["euler_maruyama_step", "linear_step", "perturb", "langevin_step"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_opcheck_of_the_variants_with_out(name: str) -> None:
    first = {"euler_maruyama_step": "euler, g of the state", "linear_step": "linear", "perturb": "perturb"}
    _, arguments = samples()[first.get(name, "langevin by norms")]
    arguments = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
    torch.library.opcheck(getattr(OPS, f"{name}_out").default, (torch.empty(5, 3, dtype=torch.float64), *arguments))


def calls() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    place: dict[str, Any] = {"seed": 2**63 + 1, "first_path": 2**32 - 2, "step": 3}
    table = double(4, 4, grad=False)
    per_sample = double(2, 3, 5, grad=False)
    return {
        "euler, full": (
            lambda x, f, g: k.euler_maruyama_step(x, f, g, -0.1, **place),
            (double(5, 3), double(5, 3), double(5, 3)),
        ),
        "euler, per sample": (
            lambda x, f, g: k.euler_maruyama_step(x, f, g, torch.linspace(0.1, 1, 5), **place),
            (double(5, 2, 2), double(5, 2, 2), double(5)),
        ),
        "euler, number": (
            lambda x, f, g: k.euler_maruyama_step(x, f, g, 0.1, **place),
            (double(5), double(5), double()),
        ),
        "euler, trailing ones": (
            lambda x, f, g: k.euler_maruyama_step(x, f, g, 0.1, **place),
            (double(5, 3), double(5, 3), double(5, 1)),
        ),
        "euler, stretched": (
            lambda x, f: k.euler_maruyama_step(x.T, f.expand(5, 3), 2, 0.1, **place),
            (double(3, 5), double(3)),
        ),
        "linear": (
            lambda x, s, r: k.linear_step(x, [s, r], table, 1, **place),
            (double(5, 3), double(5, 3), double(5, 3)),
        ),
        "linear, per sample": (
            lambda x, s: k.linear_step(x, [s], per_sample, 1, **place),
            (double(5, 3), double(5, 3)),
        ),
        "linear, alone": (lambda x: k.linear_step(x, [], table[:, :2], torch.tensor(2), **place), (double(5, 3),)),
        "perturb": (lambda x, a, s: k.perturb(x, a, s, **place), (double(5, 3), double(5), double(5))),
        "perturb by numbers": (lambda x, a, s: k.perturb(x, a, s, **place), (double(5, 3), double(), double())),
        "langevin": (
            lambda x, s, d, a: k.langevin_step(x, s, size=d, alpha=a, **place),
            (double(5, 3), double(5, 3), positive(), positive(5)),
        ),
        "langevin, other way round": (
            lambda x, s, d, a: k.langevin_step(x, s, size=d, alpha=a, **place),
            (double(5, 3), double(5, 3), positive(5), positive()),
        ),
        "dsm": (
            lambda o, x: k.dsm_loss(o, x, torch.linspace(-1, 1, 5), 0.4, torch.linspace(1, 2, 5), **place),
            (double(5, 3), double(5, 3, seed=1)),
        ),
        "dsm per sample": (
            lambda o, x: k.dsm_loss(o, x, 0.5, torch.linspace(-1, 1, 5), 2.0, reduction="none", **place),
            (double(5, 3), double(5, 3, seed=1)),
        ),
        "dsm, noise": (lambda o: k.dsm_loss(o, None, 0.0, 1.0, 1.0, **place), (double(5, 3),)),
    }


@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", calls())
def test_gradcheck(name: str, backend: str) -> None:
    function, inputs = calls()[name]
    with k.use_backend(backend):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", calls())
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_is_eager(name: str) -> None:
    """Through the tracer of torch.compile in one graph, and its autograd, with the same bits."""
    torch._dynamo.reset()
    function, inputs = calls()[name]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(*inputs)
    got = compiled(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    wanted = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), inputs), wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_with_steps_and_out() -> None:
    """The step is a changing integer, then a tensor; and the state is written in place."""
    torch._dynamo.reset()
    x, f = double(6, 4, grad=False), double(6, 4, grad=False, seed=1)

    def march(x: Tensor, step: Any) -> Tensor:
        x = x.clone()
        k.euler_maruyama_step(x, f, 0.5, 0.1, seed=3, step=step, out=x)
        return k.langevin_step(x, f, mode="batch", size=0.1, seed=3, step=step)

    compiled = torch.compile(march, fullgraph=True, backend="aot_eager")
    for step in range(4):
        assert torch.equal(compiled(x, step), march(x, step))
    for step in range(2):
        assert torch.equal(compiled(x, torch.tensor(step)), march(x, step))


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(7, 3, dtype=torch.bfloat16)
        made = k.euler_maruyama_step(x, x, 1.0, 0.1, seed=torch.tensor(0), step=torch.tensor(1))
        assert (made.shape, made.dtype) == (x.shape, x.dtype)
        loss = k.dsm_loss(x, None, 0.0, 1.0, 1.0, seed=0, reduction="none")
        assert (loss.shape, loss.dtype) == ((7,), torch.float32)


def test_function_transforms() -> None:
    """A gradient passes; vmap would give every row the noise of path 0, and is refused."""
    x, f = double(5, 3, grad=False), double(5, 3, grad=False, seed=1)

    def total(f: Tensor) -> Tensor:
        return k.euler_maruyama_step(x, f, 0.5, 0.1, seed=3).square().sum()

    expected = torch.autograd.grad(total(f.requires_grad_()), f)[0]
    torch.testing.assert_close(torch.func.grad(total)(f.detach()), expected)
    with pytest.raises(RuntimeError, match=r"euler_maruyama_step cannot be vmapped: .*pass the whole batch"):
        torch.vmap(lambda v: k.euler_maruyama_step(v, v, 0.5, 0.1, seed=3))(torch.zeros(4, 5, 3))


def test_forward_mode_is_refused() -> None:
    """Dropping the tangent would give a derivative of zero."""
    x = double(5, 3, grad=False)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda v: k.perturb(v, 0.5, 0.1, seed=3), (x,), (x,))
    import torch.autograd.forward_ad as forward

    with forward.dual_level(), pytest.raises((NotImplementedError, RuntimeError)):
        k.perturb(forward.make_dual(x, x), 0.5, 0.1, seed=3)


@pytest.mark.parametrize("mode", ["batch", "sample", "dimension"])
def test_no_gradient_through_norms(mode: str) -> None:
    x = double(5, 3)
    with pytest.raises(ValueError, match=rf"no gradient with respect to x: its step size in mode '{mode}'"):
        k.langevin_step(x, x.detach(), mode=mode, size=0.1, seed=0)
    number = torch.tensor(0.1)
    made = OPS.langevin_step(x, x.detach(), mode, number, number, *PLACE).sum()
    with pytest.raises(RuntimeError, match=f"no gradient in mode '{mode}'"):
        made.backward()


def test_no_gradient_for_numbers() -> None:
    x, c = double(5, 3), positive()
    with pytest.raises(ValueError, match=r"no gradient with respect to dt: .*dt.detach\(\)"):
        k.euler_maruyama_step(x, x, 1.0, c, seed=0)
    with pytest.raises(ValueError, match=r"no gradient with respect to table: .*table.detach\(\)"):
        k.linear_step(x, [], double(3, 2), 0)
    for name in ("p", "q", "weight"):
        arguments: dict[str, Any] = {"p": 0.0, "q": 1.0, "weight": 1.0} | {name: c}
        with pytest.raises(ValueError, match=f"no gradient with respect to {name}"):
            k.dsm_loss(x, x, **arguments, seed=0)
    with torch.no_grad():
        k.euler_maruyama_step(x, x, 1.0, c, seed=0)
        k.linear_step(x, [], double(3, 2), 0)


def test_out_is_not_recorded() -> None:
    x, out = double(5, 3), torch.empty(5, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="with out= has no gradient with respect to f: out is overwritten"):
        k.euler_maruyama_step(x.detach(), x, 1.0, 0.1, seed=0, out=out)
    with pytest.raises(ValueError, match=r"out requires a gradient.*out.detach\(\)"):
        k.perturb(x.detach(), 1.0, 0.1, seed=0, out=x)
    with torch.no_grad():
        k.perturb(x, 1.0, 0.1, seed=0, out=x)


@pytest.mark.parametrize("op", ["euler_maruyama_step", "perturb"])
def test_out_counts_as_changed_for_autograd(op: str) -> None:
    """Otherwise a backward pass would silently use the new state in place of what it saved."""
    weight, x = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    loss = (weight * x).sum()
    arguments = (x, 1.0, 0.1) if op == "euler_maruyama_step" else (1.0, 0.1)
    getattr(k, op)(x, *arguments, seed=0, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction: str) -> None:
    """Whoever gets a gradient may write to it: the next one is made anew."""
    output = double(5, 3)
    loss = k.dsm_loss(output, None, 0.0, 1.0, 1.0, reduction=reduction, seed=0)
    upstream = torch.ones_like(loss)
    (first,) = torch.autograd.grad(loss, output, upstream, retain_graph=True)
    first.mul_(3)
    (second,) = torch.autograd.grad(loss, output, upstream, retain_graph=True)
    (third,) = torch.autograd.grad(loss, output, 2 * upstream)
    torch.testing.assert_close(first, 3 * second)
    torch.testing.assert_close(third, 2 * second)


def test_the_loss_keeps_its_arguments_alone() -> None:
    """No residual, no noise: what autograd holds on to is what it was given."""
    output, x0, q = double(5, 3), double(5, 3, seed=1), positive(5, grad=False)
    for dtype, reduction in ((torch.float64, "none"), (torch.float64, "mean"), (torch.float16, "mean")):
        inputs = [t.detach().to(dtype) for t in (output, x0)]
        inputs[0].requires_grad_()
        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            k.dsm_loss(*inputs, 0.5, q, 1.0, reduction=reduction, seed=0)
        assert {t.data_ptr() for t in held} <= {t.data_ptr() for t in (*inputs, q)}
        assert len(held) == 3
