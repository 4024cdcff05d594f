"""The ops as the harness calls, checks and times them, each beside the torch code that it replaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sdesolve_kernels as k
import torch
from sdesolve_kernels import reference_steps as ref
from torch import Tensor

__all__ = ["CASES", "STREAM", "Case", "States", "spoil", "states"]

STREAM = 3
_DT, _G, _SNR, _ALPHA, _SIZE = 0.01, 0.3, 0.16, 0.9, 0.02
_BETA, _STEPS = 8.0, 100  # a time of a VP process and a number of steps, for the predictor
_ROW = 3
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class States:
    """Three states of one shape and dtype, and numbers a sample in float32."""

    x: Tensor
    f: Tensor
    g: Tensor
    a: Tensor
    b: Tensor
    one: Tensor  # (8, 3), float64: one history term
    two: Tensor  # (8, 4)

    def to(self, dtype: torch.dtype) -> States:
        """The same states in another dtype."""
        x, f, g = (v.detach().to(dtype) for v in (self.x, self.f, self.g))
        return replace(self, x=x, f=f, g=g)

    def rows(self, start: int, stop: int) -> States:
        """Some of the rows."""
        parts = {name: getattr(self, name)[start:stop] for name in ("x", "f", "g", "a", "b")}
        return replace(self, **parts)


def states(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0) -> States:
    """Fresh states; made where they are used, because the largest have a gibibyte each."""
    generator = torch.Generator(device).manual_seed(seed)
    # What is drawn in float32 and rounded in place of a draw in 16 bits is the same on every version of torch.
    x, f, g = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    a, b = (torch.rand(shape[0], generator=generator, device=device) + 0.5 for _ in range(2))
    step = _BETA / _STEPS
    one = torch.tensor([[1.0 + 0.5 * step, step, math.sqrt(step)]], dtype=torch.float64, device=device)
    two = torch.tensor([[0.9, 0.3, -0.2, 0.4]], dtype=torch.float64, device=device)
    return States(x, f, g, a, b, one.repeat(8, 1), two.repeat(8, 1))


@dataclass(frozen=True)
class Case:
    """One way to call an op.

    Attributes:
        name: Of the case; the part before "/" is the kernel.
        ours: ``ours(states, **where)``, with ``out=`` if `has_out`.
        exact: The same by `reference_steps` or `reference`, for states in any dtype.
        eager: Given ``torch.compile`` or nothing, the torch code, as ``call(states)``.
        passes: Tensors of the state's size that must at least be read or written.
        noise: Largest factor of a normal in the result.
        has_out: Takes ``out=``.
        places: Takes seed, first path and step as device tensors.
        rowwise: A row's result depends on its row alone.
        gradients: Names of the states that it is differentiable in.
        launcher: Calls below the op, where there is Triton; elsewhere the op stands in.
        timed: Is measured too, where the checks hold.
    """

    name: str
    ours: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    eager: Callable[[Wrap], Callable[[States], Tensor]]
    passes: int
    noise: Callable[[States, dict[str, Any]], float]
    has_out: bool = True
    places: bool = True
    rowwise: bool = True
    gradients: tuple[str, ...] = ()
    launcher: bool = False
    timed: bool = True

    @property
    def kernel(self) -> str:
        """The op that the case belongs to."""
        return self.name.split("/")[0]


def _rows(v: Tensor, x: Tensor) -> Tensor:
    """Numbers of samples, which is what our ops take, as eager code has to shape them."""
    return v.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def _plain(function: Callable[[States], Tensor]) -> Callable[[Wrap], Callable[[States], Tensor]]:
    return lambda wrap: wrap(function)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _constant(value: float) -> Callable[[States, dict[str, Any]], float]:
    return lambda s, where: value


def _normal(s: States, *, out: Tensor | None = None, step: int = 0, **where: Any) -> Tensor:
    m = math.prod(s.x.shape[1:])
    kind = {"dtype": s.x.dtype, "device": s.x.device} if out is None else {"out": out}
    return k.normal(s.x.shape[0], m, offset=step * m, **kind, **where).view(s.x.shape)


def _predictor(s: States) -> Tensor:
    """Euler-Maruyama on a reverse VP equation as the code of Song et al. (ICLR 2021) spells it; ``f`` is the score."""
    beta = _BETA * torch.ones_like(_rows(s.a, s.x))
    z = torch.randn_like(s.x)
    drift = -0.5 * beta * s.x
    diffusion = beta.sqrt()
    drift = drift - diffusion**2 * s.f * 1.0
    mean = s.x + drift * (-1.0 / _STEPS)
    return mean + diffusion * math.sqrt(1.0 / _STEPS) * z


def _corrector(mode: str) -> Callable[[States], Tensor]:
    def step(s: States) -> Tensor:
        z = torch.randn_like(s.x)
        rows = (-1, *(1,) * (s.x.ndim - 1))
        score = s.f.reshape(s.f.shape[0], -1).norm(dim=-1)
        noise = z.reshape(z.shape[0], -1).norm(dim=-1)
        if mode == "fixed":
            delta = torch.full_like(score, _SIZE * _ALPHA)
        elif mode == "sample":
            delta = 2 * _ALPHA * (_SNR * noise / score) ** 2
        elif mode == "batch":
            delta = 2 * _ALPHA * (_SNR * noise.mean() / score.mean()) ** 2 * torch.ones_like(score)
        else:
            expected = math.sqrt(s.x[0].numel())
            delta = 2 * _ALPHA * (_SNR * expected / score.mean()) ** 2 * torch.ones_like(score)
        mean = s.x + delta.view(rows) * s.f
        return mean + torch.sqrt(delta * 2).view(rows) * z

    def fixed(s: States) -> Tensor:
        return s.x + _SIZE * _ALPHA * s.f + math.sqrt(2 * _SIZE * _ALPHA) * torch.randn_like(s.x)

    return fixed if mode == "fixed" else step


def _langevin(mode: str) -> Case:
    size = _SIZE if mode == "fixed" else _SNR

    def noise(s: States, where: dict[str, Any]) -> float:
        if mode == "fixed":
            return math.sqrt(2 * _SIZE * _ALPHA)
        z = ref.noise_like(s.x, **where)
        delta = ref.langevin_size(s.f, z, mode=mode, snr=_SNR, alpha=_number(_ALPHA))
        return 8 * math.sqrt(2 * float(delta.max()))  # the step's own relative error comes on top

    return Case(
        f"langevin_step/{mode}",
        lambda s, **w: k.langevin_step(s.x, s.f, mode=mode, size=size, alpha=_ALPHA, **w),
        lambda s, **w: ref.langevin_step(s.x, s.f, mode=mode, size=size, alpha=_number(_ALPHA), **w),
        _plain(_corrector(mode)),
        3 if mode == "fixed" else 4,
        noise,
        rowwise=mode in ("fixed", "sample"),
        gradients=("x", "f") if mode == "fixed" else (),
    )


# The score parameterisation with likelihood weight sigma^2: |sigma s + z|^2, by the code of Song et al.


def _loss(output: Tensor, z: Tensor, std: Tensor) -> Tensor:
    return (output * std + z).square().reshape(output.shape[0], -1).mean(dim=-1).mean()


def _eager_value(wrap: Wrap) -> Callable[[States], Tensor]:
    loss = wrap(_loss)
    return lambda s: loss(s.x, s.g, _rows(s.b, s.x))


def _eager_gradient(wrap: Wrap) -> Callable[[States], Tensor]:
    loss = wrap(_loss)

    def call(s: States) -> Tensor:
        output = s.x.detach().requires_grad_()
        loss(output, s.g, _rows(s.b, s.x)).backward()
        assert output.grad is not None
        return output.grad

    return call


def _eager_training(wrap: Wrap) -> Callable[[States], Tensor]:
    perturb = wrap(lambda s: (_rows(s.a, s.f) * s.f + _rows(s.b, s.f) * (z := torch.randn_like(s.f)), z))
    gradient = _eager_gradient(wrap)

    def call(s: States) -> Tensor:
        _, z = perturb(s)
        return gradient(replace(s, g=z))

    return call


def _our_loss(s: States, **where: Any) -> Tensor:
    return k.dsm_loss(s.x, None, 0.0, -1.0 / s.b, s.b.square(), **where)


def _our_gradient(s: States, **where: Any) -> Tensor:
    output = s.x.detach().requires_grad_()
    _our_loss(replace(s, x=output), **where).backward()
    assert output.grad is not None
    return output.grad


def _our_per_sample(s: States, **where: Any) -> Tensor:
    """As a training loop calls it that looks at the losses of samples: the gradient is another pass."""
    output = s.x.detach().requires_grad_()
    k.dsm_loss(output, None, 0.0, -1.0 / s.b, s.b.square(), reduction="none", **where).mean().backward()
    assert output.grad is not None
    return output.grad


def _our_scaled(s: States, **where: Any) -> Tensor:
    """A gradient that was made for an upstream of 1, which is then another, twice."""
    output = s.x.detach().requires_grad_()
    loss = _our_loss(replace(s, x=output), **where)
    (first,) = torch.autograd.grad(0.75 * loss, output, retain_graph=True)
    (second,) = torch.autograd.grad(0.25 * loss, output)
    return first + second


def _our_training(s: States, **where: Any) -> Tensor:
    k.perturb(s.f, s.a, s.b, **where)
    return _our_gradient(s, **where)


def _launched_gradient(s: States, **where: Any) -> Tensor:
    """Loss and gradient by the launcher, in one pass: what the kernel can do, whatever the op round it adds."""
    if s.x.device.type != "cuda":
        return _our_gradient(s, **where)
    from sdesolve_kernels._triton.launch_denoising import dsm_loss_parts

    parts = dsm_loss_parts(
        s.x, None, 0.0, -1.0 / s.b, s.b.square(), mean=True, grad=True,
        **({"first_path": 0, "step": 0} | where),
    )  # fmt: skip
    assert parts.grad is not None
    return parts.grad


def _exact_loss(s: States, **where: Any) -> Tensor:
    return ref.dsm_loss(s.x, None, _number(0.0), -1.0 / s.b, s.b.square(), **where).mean()


def _exact_gradient(s: States, **where: Any) -> Tensor:
    output = s.x.detach().requires_grad_()
    with torch.enable_grad():
        _exact_loss(replace(s, x=output), **where).backward()
    assert output.grad is not None
    return output.grad


def _loss_noise(s: States, where: dict[str, Any]) -> float:
    del where
    return 2 * float(s.b.max()) * 40.0  # 2 w |r| |q|, with r <= 7 + 7 / 0.5 at the very most


def _gradient_noise(s: States, where: dict[str, Any]) -> float:
    del where
    return 2 * float(s.b.max()) / s.x.numel()


def _dsm(name: str, ours: Callable[..., Tensor], eager: Any, passes: int, **more: bool) -> Case:
    return Case(name, ours, _exact_gradient, eager, passes, _gradient_noise, has_out=False, rowwise=False, **more)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "normal", _normal, lambda s, **w: ref.noise_like(s.x, **w).to(s.x.dtype),
            _plain(lambda s: torch.randn_like(s.x)), 1, _constant(1.0), places=False,
        ),
        Case(
            "euler_maruyama_step",
            lambda s, **w: k.euler_maruyama_step(s.x, s.f, _G, _DT, **w),
            lambda s, **w: ref.euler_maruyama_step(s.x, s.f, _number(_G), _number(_DT), **w),
            _plain(lambda s: s.x + s.f * _DT + _G * math.sqrt(_DT) * torch.randn_like(s.x)),
            3, _constant(_G * math.sqrt(_DT)), gradients=("x", "f"),
        ),
        Case(
            "euler_maruyama_step/diagonal",
            lambda s, **w: k.euler_maruyama_step(s.x, s.f, s.g, -_DT, **w),
            lambda s, **w: ref.euler_maruyama_step(s.x, s.f, s.g, _number(-_DT), **w),
            _plain(lambda s: s.x - s.f * _DT + s.g * math.sqrt(_DT) * torch.randn_like(s.x)),
            4, lambda s, where: math.sqrt(_DT) * float(s.g.detach().abs().max()), gradients=("x", "f", "g"),
        ),
        Case(
            "linear_step",
            lambda s, **w: k.linear_step(s.x, [s.f], s.one, _ROW, **w),
            lambda s, **w: ref.linear_step(s.x, [s.f], s.one, _ROW, **w),
            _plain(_predictor), 3, _constant(math.sqrt(_BETA / _STEPS)), gradients=("x", "f"),
        ),
        Case(
            "linear_step/two terms",
            lambda s, **w: k.linear_step(s.x, [s.f, s.g], s.two, _ROW, **w),
            lambda s, **w: ref.linear_step(s.x, [s.f, s.g], s.two, _ROW, **w),
            _plain(lambda s: 0.9 * s.x + 0.3 * s.f - 0.2 * s.g + 0.4 * torch.randn_like(s.x)),
            4, _constant(0.4), gradients=("x", "f", "g"),
        ),
        Case(
            "perturb",
            lambda s, **w: k.perturb(s.x, s.a, s.b, **w),
            lambda s, **w: ref.perturb(s.x, s.a, s.b, **w),
            _plain(lambda s: _rows(s.a, s.x) * s.x + _rows(s.b, s.x) * torch.randn_like(s.x)),
            2, lambda s, where: float(s.b.max()), gradients=("x",),
        ),
        *(_langevin(mode) for mode in ("fixed", "batch", "sample", "dimension")),
        Case(
            "dsm_loss/value", _our_loss, _exact_loss, _eager_value, 1, _loss_noise, has_out=False, rowwise=False,
        ),
        _dsm("dsm_loss", _our_gradient, _eager_gradient, 2),
        _dsm("dsm_loss/one pass", _launched_gradient, _eager_gradient, 2, launcher=True),
        _dsm("dsm_loss/per sample", _our_per_sample, _eager_gradient, 3),
        _dsm("dsm_loss/scaled", _our_scaled, _eager_gradient, 6, timed=False),
        _dsm("dsm_loss/training", _our_training, _eager_training, 4),
    )
}  # fmt: skip


def spoil(kernel: str) -> None:
    """Makes every case of a kernel wrong by one, to see that its gate closes."""

    def spoiled(ours: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        made = ours(*args, **kwargs)
        with torch.no_grad():
            return made.add_(1.0)

    if kernel not in {case.kernel for case in CASES.values()}:
        raise SystemExit(f"--spoil {kernel}: no such kernel; there are {sorted({c.kernel for c in CASES.values()})}")
    for name, case in CASES.items():
        if case.kernel == kernel:
            CASES[name] = replace(case, ours=functools.partial(spoiled, case.ours))
