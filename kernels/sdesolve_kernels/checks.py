"""What the ops accept: checks before any work, which say what was given, what was expected and how to mend it."""

from __future__ import annotations

import enum
import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .backend import NoiseOffset, int64_bits
from .streams import Stream

__all__ = [
    "FLOATS",
    "alike",
    "check_out",
    "check_output",
    "coefficient",
    "index",
    "integer",
    "no_gradient",
    "noise_offset",
    "same_as_state",
    "state",
]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_OF = ", ".join(map(str, FLOATS))


def integer(name: str, value: object, low: int, high: int, bound: str) -> int:
    """`value` as an int in [low, high); `bound` is how the message writes `high`."""
    if isinstance(value, int) and not isinstance(value, bool):
        # Neither index() nor int() of an enumeration's member goes through the tracer of torch.compile.
        number = value.value if isinstance(value, enum.Enum) else value
    else:
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            hint = "; convert it with int() if it is a whole number" if isinstance(value, float) else ""
            kind, text = type(value).__name__, "" if hasattr(value, "__len__") else f"{value!r:.60} of type "
            raise TypeError(f"{name} must be an integer, got {text}{kind}{hint}") from None
    if not low <= number < high:
        raise ValueError(f"{name} must be in [{low}, {bound}), got {number}")
    return number


def check_own_memory(out: Tensor) -> None:
    """Refuse an output that requires a gradient, or two entries of which lie at one place."""
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out requires a gradient and would be overwritten; pass out.detach()")
    if out.is_contiguous():
        return
    # Sorted by stride, each dimension must step over all of the smaller ones; a few exotic views that do not overlap
    # fail this too, and are refused with them.
    reach = 0
    for stride, size in sorted((s, n) for n, s in zip(out.shape, out.stride(), strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(
                f"entries of out share memory: shape {tuple(out.shape)} with strides {out.stride()}; "
                "pass a tensor of its own, such as torch.empty(shape)"
            )
        reach += (size - 1) * stride


def check_out(out: Tensor, paths: int, count: int, dtype: torch.dtype | None, device: object) -> None:
    """Refuse an `out` that cannot hold `count` numbers for each of `paths` paths."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dim() < 1 or out.shape[0] != paths or out.numel() != paths * count:
        raise ValueError(
            f"out must have shape (paths, ...) with count entries for each path, here ({paths}, {count}) or a finer "
            f"division of the last dimension; got {tuple(out.shape)}"
        )
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype={dtype} and out of {out.dtype} disagree; leave dtype out, or convert out")
    if device is not None and torch.empty(0, device=device).device != out.device:  # type: ignore[call-overload]
        raise ValueError(f"device={str(device)!r} and out on {str(out.device)!r} disagree; leave device out")
    check_own_memory(out)


def state(name: str, x: Tensor) -> None:
    """Refuse what is not a batch of states."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor of shape (batch, *state), got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a dtype among {_OF}, got {x.dtype}; convert it with {name}.to(...)")
    if x.dim() == 0:
        raise ValueError(f"{name} must have shape (batch, *state), got (); pass {name}[None] for a batch of one")


def alike(v: Any, x: Tensor) -> bool:
    """Whether `v` is a tensor of the shape, dtype and device of `x`."""
    return isinstance(v, Tensor) and v.shape == x.shape and v.dtype is x.dtype and v.device == x.device


def same_as_state(name: str, v: Tensor, x: Tensor, of: str = "x") -> None:
    """Refuse a tensor that differs from state `x` in shape, dtype or device."""
    if alike(v, x):
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor like {of}, got {type(v).__name__}")
    if v.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape of {of}, {tuple(x.shape)}, got {tuple(v.shape)}; "
            f"broadcast it with {name}.expand_as({of})"
        )
    if v.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {x.dtype}, got {v.dtype}; convert it with .to({x.dtype})")
    if v.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like {of}, got {v.device}; move it with .to({str(x.device)!r})")


def check_output(out: Tensor, x: Tensor, of: str = "x") -> None:
    """Refuse an `out` that the new state does not fit into."""
    if out is not x:
        same_as_state("out", out, x, of)
    check_own_memory(out)


def coefficient(name: str, c: Any, x: Tensor, or_like: str = "") -> float | Tensor:
    """A coefficient as a float or as a tensor of shape ``()`` or ``(batch,)``; `or_like` names what else would do."""
    if type(c) is float:
        return c
    if type(c) is Tensor and c.dtype is x.dtype and c.shape == x.shape[:1] and c.device == x.device:
        return c  # the usual case, in half the time
    if not isinstance(c, Tensor):
        if isinstance(c, bool) or not isinstance(c, numbers.Real):
            raise TypeError(f"{name} must be a number or a tensor of shape () or (batch,), got {type(c).__name__}")
        return float(c)
    if c.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a dtype among {_OF}, got {c.dtype}; convert it with {name}.to({x.dtype})")
    if c.dim() > 1 and c.dim() == x.dim() and c.shape[0] == x.shape[0] and c.numel() == c.shape[0]:
        c = c.reshape(-1)
    if c.dim() > 0 and c.shape != x.shape[:1]:
        raise ValueError(
            f"{name} must be a number or a tensor of shape () or (batch,) = ({x.shape[0]},)"
            f"{f', or like {or_like}, {tuple(x.shape)}' if or_like else ''}, got {tuple(c.shape)}"
        )
    if c.device != x.device and (c.dim() > 0 or c.device.type != "cpu"):
        raise ValueError(f"{name} must be on {x.device} like the state, got {c.device}; move it with .to(...)")
    return c


def no_gradient(op: str, why: str, **tensors: Any) -> None:
    """Refuse to drop a gradient that somebody asked for."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.requires_grad:
            raise ValueError(f"{op} has no gradient with respect to {name}: {why}; pass {name}.detach()")


def index(name: str, value: Any, high: int, bound: str, read: bool) -> int | Tensor:
    """An integer, or a 0-d int64 tensor that only the kernel reads."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.dtype != torch.int64:
            raise TypeError(
                f"{name} must be an integer or a 0-d int64 tensor, got {value.dtype} of shape {tuple(value.shape)}"
            )
        if not read or value.device.type != "cpu":
            return value
        value = int(value)
        if high == 1 << 64:
            value %= high  # two's complement, as the kernels read it
    return integer(name, value, 0, high, bound)


def noise_offset(
    x: Tensor, seed: Any, stream: Any, first_path: Any, step: Any, read: bool, count: int | None = None
) -> NoiseOffset:
    """Where the noise of a step starts, checked; integers are int64 in two's complement.

    Args:
        x: The state.
        seed, stream, first_path, step: As given.
        read: Whether tensors on the CPU are read now; what is not read is not checked either.
        count: Normals of a step for a row, where they are not the elements of the state.
    """
    # The usual case, in a third of the time: numbers so small that no bound can be met.
    if type(seed) is type(first_path) is type(step) is int and 0 <= first_path < 1 << 62 and 0 <= step < 1 << 15:
        small = 0 <= seed < 1 << 63 and x.numel() < 1 << 42 and (count is None or count < 1 << 42)
        if small and (type(stream) is Stream or (type(stream) is int and 0 <= stream < 256)):
            return NoiseOffset(seed, stream + 0, first_path, step)
    rows = x.shape[0]
    m = math.prod(x.shape[1:]) if count is None else count
    seed = index("seed", seed, 1 << 64, "2^64", read)
    stream = integer("stream", stream, 0, 256, "256")
    first_path = index("first_path", first_path, 1 << 64, "2^64", read)
    step = index("step", step, 1 << 58, "2^58", read)
    if not isinstance(first_path, Tensor) and first_path + rows > 1 << 64:
        raise ValueError(
            f"first_path + batch must be at most 2^64, got {first_path} + {rows}; path indices would wrap and repeat "
            "noise"
        )
    if not isinstance(step, Tensor) and (step + 1) * m > 1 << 58:
        numbers = "elements of a path" if count is None else "channels"
        raise ValueError(
            f"(step + 1) times the {m} {numbers} must be at most 2^58, got step {step}; use another stream or seed"
        )
    seed, first_path = (n if isinstance(n, Tensor) else int64_bits(n) for n in (seed, first_path))
    return NoiseOffset(seed, stream, first_path, step)
