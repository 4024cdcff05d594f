"""Every kernel against the plain torch reference on a device: ``check_all("cuda")``, or on "cpu" in the interpreter.

The budget of a value is twice the error of eager torch at the same precision, both measured against the reference in
float64, plus the tolerance of the normals times their coefficient. What must agree to the bit has budget 0: words,
uniforms, and one result computed in other tiles, other batches, in place, from strided data, from device indices.
Outputs start as NaN inside a margin of NaN, so an element that is not written shows, and one written beside it too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, reference_steps
from . import launch as steps
from .geometry import tuned
from .launch_denoising import dsm_loss_parts
from .launch_langevin import langevin_step
from .launch_matrices import matrix_step
from .probe import corner_words, pairs

__all__ = ["NORMAL_TOLERANCE", "Check", "batch_checks", "check_all", "large_checks", "noise_checks", "step_checks"]

# Largest |z - z64|. float32: at radius r, sin and cos are off by 2^-20.5, the angle by 2.8e-7 and r by 3e-7 relative,
# together 1.3e-6 r <= 8.5e-6; close to u = 1 the logarithm adds 1.8e-6. float64: some units in the last place of 6.76.
NORMAL_TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-14}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((5, 1), (5, 2), (4, 3), (5, 4), (3, 5), (2, 7), (5, 8), (3, 33), (3, 2, 5, 4), (7,), (2, 4104))
_WHERE: dict[str, Any] = {"seed": 2**63 + 987654321, "stream": 3, "first_path": 2**32 - 2, "step": 2**31 + 7}
_MARGIN = 64  # elements: keeps 128-byte alignment in every dtype


class Check(NamedTuple):
    """One comparison; it holds if ``error <= budget``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    error: float
    budget: float

    @property
    def ok(self) -> bool:
        """Whether it holds; never with a NaN."""
        return self.error <= self.budget


class _Case(NamedTuple):
    """An op on a state like ``x``: the kernel, the same in the reference, and the largest coefficient of ``z``."""

    name: str
    kernel: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: tuple[Any, ...]  # tensors of the state's dtype are cast, others are passed on
    noise: float


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 2 * _MARGIN,), torch.nan, dtype=dtype, device=device)
    return buffer[_MARGIN : _MARGIN + count].view(shape), buffer


def _untouched(buffer: Tensor) -> bool:
    return bool(buffer[:_MARGIN].isnan().all()) and bool(buffer[-_MARGIN:].isnan().all())


def _cases(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[_Case]:
    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def row() -> Tensor:
        return torch.rand(batch, generator=generator) + 0.5

    batch, number = shape[0], torch.tensor(0.7)
    x, f, s = (normal(*shape) for _ in range(3))
    dt = torch.tensor(-0.01, dtype=torch.float64)
    em = (steps.euler_maruyama_step, reference_steps.euler_maruyama_step)
    yield _Case("euler_maruyama_step", *em, (x, f, number, dt), 0.07)
    yield _Case("euler_maruyama_step/diagonal", *em, (x, f, s, row()), 1.3 * float(s.abs().max()))
    yield _Case("euler_maruyama_step/per-sample", *em, (x, f, row(), -row()), 2.0)
    for one in (False, True):
        g = normal(1 if one else batch, *shape[1:], 6)
        largest = 1.5 * float(g.abs().sum(-1).max())
        matrix = (matrix_step, reference_steps.matrix_step)
        yield _Case(f"matrix_step/{'one' if one else 'each'}", *matrix, (x, f, g, -row()), largest)
    linear = (steps.linear_step, reference_steps.linear_step)
    for terms in range(5):
        table = torch.rand(6, terms + 2, generator=generator, dtype=torch.float64)
        yield _Case(f"linear_step/{terms}", *linear, (x, [f, s, x, f][:terms], table, 4), 1.0)
    yield _Case("linear_step/per-sample", *linear, (x, [f], normal(3, 3, batch), 2), 4.0)
    plain = [functools.partial(op, stochastic=False) for op in linear]
    yield _Case("linear_step/no-noise", plain[0], plain[1], (x, [f, s], normal(3, 4), -1), 0.0)
    perturb = (steps.perturb, reference_steps.perturb)
    yield _Case("perturb", *perturb, (x, row(), row()), 1.5)
    yield _Case("perturb/shared", *perturb, (x, number, number), 0.7)
    yield _Case(
        "noise_product", steps.noise_product, reference_steps.noise_product, (x, row()), 1.5 * float(x.abs().max())
    )
    yield _Case("scaled", _scaled, _scaled_reference, (x, row()), 0.0)
    for mode in ("fixed", "batch", "sample", "dimension"):
        ops = [_corrector(op, mode) for op in (langevin_step, reference_steps.langevin_step)]
        # sqrt(2 delta) = 2 sqrt(alpha) snr n / s; with one element a row, a single score can be close to 0
        largest = 0.0 if mode == "fixed" else _largest_step(s, mode)
        yield _Case(f"langevin_step/{mode}", ops[0], ops[1], (x, s, row()), 1.0 + largest)
    ops = [_gradient, _reference_gradient]
    yield _Case("dsm_loss/gradient", ops[0], ops[1], (x, None, number, row(), row()), 4.5 / (x.numel() / batch))
    yield _Case("dsm_loss/gradient/data", ops[0], ops[1], (x, s, row(), row(), number), 2.1 / (x.numel() / batch))
    # d loss = 2 weight |r| q dz, with |r| <= 6.8 + 6.8 * 1.5 + 5
    yield _Case("dsm_loss", _loss, reference_steps.dsm_loss, (x, None, number, row(), row()), 2 * 2.25 * 22)
    yield _Case("dsm_loss/data", _loss, reference_steps.dsm_loss, (x, s, row(), row(), number), 2 * 1.05 * 30)


def _largest_step(score: Tensor, mode: str) -> float:
    norms = score.double().reshape(score.shape[0], -1).norm(dim=1)
    m = score[0].numel()
    smallest = norms.min() if mode == "sample" else norms.mean()
    return 2 * 1.3 * 0.16 * (m**0.5 + 4) / float(smallest) * (1 + 7)  # the step's own relative error comes on top


def _corrector(op: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    size = torch.tensor(0.16, dtype=torch.float64)
    return lambda x, s, alpha, **where: op(x, s, mode=mode, size=size.to(x.device), alpha=alpha, **where)


def _scaled(v: Tensor, c: Tensor, *, out: Tensor | None = None, **where: Any) -> Tensor:
    return steps.scaled(v, c, out=out)


def _scaled_reference(v: Tensor, c: Tensor, **where: Any) -> Tensor:
    return (v.to(reference_steps.compute_dtype(v.dtype)) * c.reshape(-1, *(1,) * (v.ndim - 1)).to(v.device)).to(v.dtype)


def _gradient(*inputs: Any, **where: Any) -> Tensor:
    grad = dsm_loss_parts(*inputs, grad=True, loss=False, **where).grad
    assert grad is not None
    return grad


def _reference_gradient(output: Tensor, *inputs: Any, **where: Any) -> Tensor:
    output = output.detach().clone().requires_grad_()
    with torch.enable_grad():
        reference_steps.dsm_loss(output, *inputs, **where).sum().backward()
    assert output.grad is not None
    return output.grad


def _loss(*inputs: Any, out: Tensor | None = None, **where: Any) -> Tensor:
    loss = dsm_loss_parts(*inputs, **where).loss
    assert loss is not None
    return loss


def _cast(inputs: tuple[Any, ...], dtype: torch.dtype, shape: tuple[int, ...], device: Any) -> tuple[Any, ...]:
    """States in ``dtype``, as are coefficients of the same shape, on ``device``; the other coefficients as they are."""

    def one(v: Any) -> Any:
        if isinstance(v, list):
            return [one(entry) for entry in v]
        if not isinstance(v, Tensor):
            return v
        return v.to(device=device, dtype=dtype if v.shape == shape else v.dtype)

    return tuple(one(v) for v in inputs)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.cpu().double() - b.cpu().double()).abs().max()) if a.numel() else 0.0


def _differ(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() != b.cpu()).sum())


def _values(
    case: _Case, shape: tuple[int, ...], dtype: torch.dtype, device: Any, agreement: bool
) -> Iterator[tuple[str, float, float]]:
    """Value, then agreement to the bit of one result got in several ways."""
    inputs, host = _cast(case.inputs, dtype, shape, device), _cast(case.inputs, dtype, shape, "cpu")
    exact = case.reference(*_cast(host, torch.float64, shape, "cpu"), **_WHERE)
    eager = case.reference(*host, **_WHERE)
    compute = reference_steps.compute_dtype(dtype)
    tolerance = case.noise * NORMAL_TOLERANCE[compute] + 4 * torch.finfo(compute).eps * float(exact.abs().max())
    has_out = case.kernel is not _loss
    out, buffer = _poisoned(shape, dtype, device) if has_out else (None, torch.full((1,), torch.nan))
    made = case.kernel(*inputs, **_WHERE, **({"out": out} if has_out else {}))
    yield "value", _distance(made, exact), 2 * _distance(eager, exact) + tolerance
    yield "writes beside the output", 0.0 if _untouched(buffer) else 1.0, 0.0
    if not agreement:
        return

    again: dict[str, Callable[[], Tensor]] = {}
    index = {name: torch.tensor(v - 2**64 if v >= 2**63 else v, device=device)
             for name, v in _WHERE.items() if name != "stream"}  # fmt: skip
    again["device indices"] = lambda: case.kernel(*inputs, **{**_WHERE, **index})
    strided = (torch.stack([inputs[0], inputs[0]], dim=-1)[..., 0], *inputs[1:])
    again["strided"] = lambda: case.kernel(*strided, **_WHERE)
    shifted = torch.empty(inputs[0].numel() + 1, dtype=dtype, device=device)[1:].view(shape).copy_(inputs[0])
    again["misaligned"] = lambda: case.kernel(shifted, *inputs[1:], **_WHERE)
    if has_out:
        again["in place"] = lambda: (lambda x: case.kernel(x, *inputs[1:], **_WHERE, out=x))(inputs[0].clone())
    if "gradient" in case.name or case.name.split("/")[0] in ("euler_maruyama_step", "linear_step", "perturb"):
        for block, programs in ((16, 1), (64, 4736)):
            again[f"blocks of {block}"] = lambda b=block, p=programs: _in_tiles(case, inputs, b, p)  # type: ignore[misc]
    for how, call in again.items():
        yield how, _differ(call(), made), 0.0


def _in_tiles(case: _Case, inputs: tuple[Any, ...], block: int, programs: int) -> Tensor:
    with tuned(block=block, programs=programs):
        return case.kernel(*inputs, **_WHERE)


def noise_checks(device: Any, dtype: torch.dtype) -> Iterator[Check]:
    name = str(dtype).removeprefix("torch.")
    compute = reference_steps.compute_dtype(dtype)
    if dtype == compute:
        words = corner_words()
        exact = torch.stack(reference.box_muller(words[0], words[1]))
        made = pairs(words.to(device), dtype)
        yield Check("normal: corner words", name, tuple(words.shape), _distance(made, exact), NORMAL_TOLERANCE[dtype])
    offsets = (0, 1, 6, 2**35 + 2) if dtype == torch.float32 else (0, 2**35 + 2)
    for count in (1, 2, 3, 4, 5, 7, 8, 33, 1040):
        for offset in offsets:
            where: dict[str, Any] = {**_WHERE, "offset": offset}
            del where["step"]
            if dtype == torch.float32:
                words = steps.numbered_words(5, count, device=device, **where)
                yield Check(
                    "words", "int64", (5, count), _differ(words, reference.numbered_words(5, count, **where)), 0
                )
            out, buffer = _poisoned((5, count), dtype, device)
            uniform = steps.fill("uniform", out, **where)
            expected = reference.uniform(5, count, dtype=dtype, **where)
            yield Check("uniform", name, (5, count), _differ(uniform, expected), 0)
            out, buffer = _poisoned((5, count), dtype, device)
            made = steps.fill("normal", out, **where)
            budget = NORMAL_TOLERANCE[compute] + (0 if dtype == compute else 7 * torch.finfo(dtype).eps / 2)
            yield Check("normal", name, (5, count), _distance(made, reference.normal(5, count, **where)), budget)
            yield Check("normal: writes beside the output", name, (5, count), 0.0 if _untouched(buffer) else 1.0, 0)
            if not 7 <= count <= 33:  # more would be many launches' worth of programs in an interpreter
                continue
            with tuned(block=16, programs=1):
                yield Check(
                    "normal: blocks of 16", name, (5, count), _differ(steps.fill("normal", out, **where), made), 0
                )


def batch_checks(device: Any, dtype: torch.dtype) -> Iterator[Check]:
    """A row's result does not depend on the batch around it, also where rows are summed."""
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(1)
    for shape in ((9, 6), (5, 4104)):
        x, s = (torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
        calls: dict[str, Callable[..., Any]] = {
            "langevin_step/sample": lambda x, s, w: langevin_step(x, s, mode="sample", size=0.16, alpha=1.0, **w),
            "dsm_loss": lambda x, s, w: dsm_loss_parts(x, s, 0.5, 0.7, 1.0, **w).loss,
        }
        for label, call in calls.items():
            whole = call(x, s, _WHERE)
            rows = [call(x[i : i + 2], s[i : i + 2], {**_WHERE, "first_path": _WHERE["first_path"] + i})
                    for i in range(0, shape[0], 2)]  # fmt: skip
            yield Check(f"{label}: batch split", name, shape, _differ(torch.cat(rows), whole), 0)
    for shape in ((1500, 2), (1030, 4)):  # several groups of rows
        x, s = (torch.randn(shape, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
        corrector = _corrector(langevin_step, "batch")(x, s, 1.0, **_WHERE)
        plain, one = _corrector(reference_steps.langevin_step, "batch"), torch.tensor(1.0)
        exact, eager = (plain(v.cpu(), w.cpu(), one, **_WHERE) for v, w in ((x.double(), s.double()), (x, s)))
        yield Check("langevin_step/batch: groups", name, shape, _distance(corrector, exact),
                    2 * _distance(eager, exact) + 2e-5)  # fmt: skip
        losses, mean = (dsm_loss_parts(x, None, 0.0, 1.0, 1.0, mean=mean, **_WHERE).loss for mean in (False, True))
        assert losses is not None
        assert mean is not None
        yield Check("dsm_loss: mean", name, shape, _distance(mean, losses.double().mean()), 1e-6)
        yield from _upstream_checks(x, name, shape)


def _upstream_checks(x: Tensor, name: str, shape: tuple[int, ...]) -> Iterator[Check]:
    """A gradient that is there is left alone for an upstream of 1, and written again for any other."""

    def gradient(upstream: float, made: Tensor | None) -> Tensor:
        made = made if made is None else made.clone()
        parts = dsm_loss_parts(
            x, None, 0.0, 1.0, 0.5, mean=True, loss=False, grad=True, out=made, made=made is not None,
            upstream=torch.tensor(upstream, device=x.device), **_WHERE,
        )  # fmt: skip
        assert parts.grad is not None
        return parts.grad

    there = torch.full_like(x, 7.0)
    yield Check("dsm_loss: made, upstream 1", name, shape, _differ(gradient(1.0, there), there), 0)
    for upstream in (0.5, 0.0):
        error = _differ(gradient(upstream, there), gradient(upstream, None))
        yield Check(f"dsm_loss: made, upstream {upstream}", name, shape, error, 0)
    error = _differ(gradient(0.5, None), 0.5 * gradient(1.0, None))  # to the bit: a power of two
    yield Check("dsm_loss: upstream", name, shape, error, 0)


def large_checks(device: Any) -> Iterator[Check]:
    """Elements, and rows, past 2^31: the last rows against the reference. Needs 9 GB."""
    for shape in ((2**31 + 5, 1), (2**19 + 1, 4096 + 8)):
        x = torch.ones(shape, dtype=torch.bfloat16, device=device)
        where = {**_WHERE, "first_path": 5}
        made = steps.perturb(x, 0.5, 1.0, out=x, **where)[-3:].cpu()
        where["first_path"] += shape[0] - 3
        one = torch.ones((3, *shape[1:]), dtype=torch.bfloat16)
        exact = reference_steps.perturb(one, torch.tensor(0.5), torch.tensor(1.0), **where)
        yield Check("perturb: past 2^31", "bfloat16", shape, _distance(made, exact), 7.3 * 2**-8)


def step_checks(device: Any, dtype: torch.dtype, shape: tuple[int, ...], agreement: bool = True) -> Iterator[Check]:
    """All steps on one dtype and shape; with ``agreement``, each in several ways that must give the same bits."""
    generator = torch.Generator().manual_seed(0)
    for case in _cases(shape, generator):
        for how, error, budget in _values(case, shape, dtype, device, agreement):
            yield Check(f"{case.name}: {how}", str(dtype).removeprefix("torch."), shape, error, budget)


def check_all(device: torch.device | str, *, large: bool | None = None) -> list[Check]:
    """Every kernel, dtype and layout; results in order, those that fail included.

    Args:
        device: Where the kernels run: a GPU, or "cpu" if Triton interprets.
        large: Also what takes 9 GB of device memory; by default, on a GPU.
    """
    found: list[Check] = []
    for dtype in DTYPES:
        found += noise_checks(device, dtype)
        found += batch_checks(device, dtype)
        for shape in SHAPES:
            found += step_checks(device, dtype, shape)
    if torch.device(device).type == "cuda" if large is None else large:
        found += large_checks(device)
    return found
