"""One definition of an op, and the ways to call it: at once, recorded by autograd, or through `torch.library`.

Compilers, fake tensors, function transforms and dispatch modes see the registered op. Plain eager calls skip the
dispatcher and the wrappers round a custom op in Python, which add 8 us to a step on a thousand elements that takes 14,
and 42 to the 21 that it takes when autograd records it. All ways run the same implementation and the same gradient.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backend import Index, NoiseOffset
from .checks import FLOATS
from .dispatch import requested_backend, under

__all__ = [
    "NOISE",
    "CallContext",
    "Op",
    "call_context",
    "define",
    "define_out",
    "has_tangent",
    "keep",
    "kept",
    "read",
    "recording",
    "tensor_of",
    "usual",
]

# The last arguments of every schema: a `NoiseOffset`, its integers in int64's two's complement, with those that are
# tensors (and 0 in their place) at the end.
NOISE = (
    "SymInt seed, SymInt stream, SymInt first_path, SymInt step, "
    "Tensor? seed_at, Tensor? first_path_at, Tensor? step_at"
)
_FLAT = 7  # how many they are

_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, type(None)})


class CallContext(enum.Enum):
    """What an op is called under, which decides how it has to be called."""

    PLAIN = "eager torch, perhaps with autograd"
    TRANSFORMED = "a torch.func transform, or forward-mode differentiation"
    REGISTERED = "torch.compile, a dispatch mode, or a subclass of Tensor among the arguments"


def call_context(*tensors: Any) -> CallContext:
    """The context of a call with these arguments, here and now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return CallContext.REGISTERED
    for t in tensors:
        # Asking a float or None whether it is a tensor takes three times as long as looking its type up.
        if type(t) not in _PLAIN and isinstance(t, Tensor):
            return CallContext.REGISTERED
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return CallContext.TRANSFORMED
    if forward_ad._current_level >= 0 and has_tangent(*tensors):
        return CallContext.TRANSFORMED
    return CallContext.PLAIN


def usual(x: Any, alike: Sequence[Any], coefficients: Sequence[Any] = (), out: Any = None) -> bool:
    """Whether no check could refuse a state, tensors like it, coefficients and an output, and the context is plain.

    It takes a third of the time of the checks one by one, which is half of that of a step on a thousand elements.
    """
    if type(x) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    shape, dtype, device = x.shape, x.dtype, None if x.is_cpu else x.device
    if dtype not in FLOATS or not shape:
        return False
    for s in alike:
        if type(s) is not Tensor or s.dtype is not dtype or s.shape != shape:
            return False
        if not s.is_cpu if device is None else s.device != device:
            return False
    for c in coefficients:
        if type(c) is not float and (
            type(c) is not Tensor or c.dtype is not dtype or c.shape != shape[:1] or c.device != x.device
        ):
            return False
    if out is not None:
        if out is not x and (type(out) is not Tensor or out.dtype is not dtype or out.shape != shape):
            return False
        if not out.is_contiguous() or out.requires_grad or (out is not x and out.device != x.device):
            return False
    return torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0


def has_tangent(*tensors: Any) -> bool:
    """Whether one of these carries a forward-mode tangent. (Another thread may have entered forward mode.)"""
    level = forward_ad._current_level
    return level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t, level=level).tangent is not None for t in tensors
    )


def recording(*tensors: Any) -> bool:
    """Whether autograd would record an op on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if (type(t) is Tensor or isinstance(t, Tensor)) and t.requires_grad:
                return True
    return False


def read(index: Index) -> Index:
    """The value of an integer on the CPU; one on another device is left to the kernel, because reading it waits."""
    return int(index) if isinstance(index, Tensor) and index.device.type == "cpu" else index


def tensor_of(c: Any) -> Tensor:
    """A coefficient as the schemas have it: a number becomes a 0-d float64 tensor, which loses nothing."""
    return c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64, device="cpu")


def _flat(args: Sequence[Any]) -> list[Any]:
    """Arguments that end with a `NoiseOffset`, as a schema has them."""
    *inputs, noise = args
    numbers = [0 if isinstance(v, Tensor) else v for v in noise]
    at = [v if isinstance(v, Tensor) else None for v in (noise.seed, noise.first_path, noise.step)]
    return [*inputs, *numbers, *at]


def _nested(args: Sequence[Any], get: Callable[[Tensor], Index] = lambda at: at) -> tuple[Any, ...]:
    """The opposite of `_flat`."""
    seed, stream, first_path, step, *at = args[-_FLAT:]
    numbers = (n if t is None else get(t) for n, t in zip((seed, first_path, step), at, strict=True))
    seed, first_path, step = numbers
    return *args[:-_FLAT], NoiseOffset(seed, stream, first_path, step)


def keep(ctx: Any, *values: Any) -> None:
    """Save values for `kept`: tensors, others, and a `NoiseOffset`, which may hold tensors, at the end."""
    everything = (*values[:-1], *values[-1])
    saved = [v if isinstance(v, Tensor) else None for v in everything]
    ctx.others = [v if t is None else None for v, t in zip(everything, saved, strict=True)]
    ctx.save_for_backward(*saved)


def kept(ctx: Any) -> list[Any]:
    """What `keep` saved."""
    values = [other if v is None else v for v, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
    return [*values[:-4], NoiseOffset(*values[-4:])]


def _refuse_vmap(name: str) -> Callable[..., Any]:
    def refuse(info: Any, in_dims: Any, *args: Any) -> Any:
        raise RuntimeError(
            f"{name} cannot be vmapped: noise belongs to paths, and vmap hides which path a row is; pass the whole "
            "batch, with first_path set to the index of its first path"
        )

    return refuse


def _refuse_jvp(name: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative; use reverse mode: torch.func.vjp or backward"
        )

    return refuse


def _registered(name: str, function: Callable[..., Any], schema: str, fake: Callable[..., Any], mutates: Any) -> Any:
    op = torch.library.custom_op(f"sdesolve::{name}", function, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    op.register_vmap(_refuse_vmap(name))
    return op


@dataclasses.dataclass(frozen=True)
class Op:
    """An op of namespace ``sdesolve``. Arguments are those of its schema, with a `NoiseOffset` at the end.

    Attributes:
        function: The implementation; makes its outputs. Coefficients may be numbers.
        recorded: The same under autograd.
        transformed: The same under function transforms.
        registered: The same through the dispatcher.
    """

    function: Callable[..., Any]
    recorded: Callable[..., Any]
    transformed: Callable[..., Any]
    registered: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call it the way that is right here."""
        return self.call(call_context(*args[:-1]), recording(*args[:-1]), *args)

    def call(self, context: CallContext, record: bool, *args: Any) -> Any:
        """The same for a caller that knows its `call_context` and whether autograd is `recording`."""
        if context is CallContext.PLAIN:
            return self.recorded(*args) if record else self.function(*args)
        if context is CallContext.TRANSFORMED:
            return self.transformed(*_flat(args))
        return self.registered(*[tensor_of(c) if isinstance(c, float) else c for c in _flat(args)])


def define(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> Op:
    """Register op ``sdesolve::name``.

    Args:
        name: Its name.
        schema: Its arguments and results, as `torch.library` writes them; the arguments end with `NOISE`.
        function: The implementation. It takes a `NoiseOffset` in place of these, as do `fake` and `setup`.
        fake: Results without values, for the same arguments.
        setup: ``setup(ctx, *arguments)``, keeps what the gradient needs.
        backward: ``backward(ctx, *gradients)``, the gradients of the first arguments; those that follow have none.
    """

    def padded(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        made = under(ctx.backend, backward, ctx, *grads)
        return *made, *(None,) * (len(ctx.needs_input_grad) - len(made))

    def flat_function(*args: Any) -> Any:
        return function(*_nested(args, read))

    def flat_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = requested_backend()
        setup(ctx, *_nested(inputs))

    def forward(ctx: Any, *args: Any) -> Any:
        ctx.backend = requested_backend()
        setup(ctx, *args)
        return function(*args)

    # Two of them: function transforms demand flat arguments and a setup_context, for which torch binds the arguments to
    # a signature in each call, 12 us of 18.
    plain = {"forward": staticmethod(forward), "backward": staticmethod(padded)}
    apart = {
        "forward": staticmethod(flat_function),
        "setup_context": staticmethod(flat_setup),
        "backward": staticmethod(padded),
        "vmap": staticmethod(_refuse_vmap(name)),
        "jvp": staticmethod(_refuse_jvp(name)),
    }
    recorded: Any = type(f"_{name}", (torch.autograd.Function,), plain)
    transformed: Any = type(f"_{name}_transformed", (torch.autograd.Function,), apart)
    registered = _registered(name, flat_function, schema, lambda *args: fake(*_nested(args)), ())
    registered.register_autograd(padded, setup_context=flat_setup)
    return Op(function, recorded.apply, transformed.apply, registered)


def define_out(name: str, schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Register the variant ``sdesolve::name_out`` that writes its first argument, ``out``, and returns nothing."""

    def flat_function(*args: Any) -> None:
        function(*_nested(args, read))

    registered = _registered(f"{name}_out", flat_function, schema, lambda *args: None, ("out",))

    def call(context: CallContext, out: Tensor, *args: Any) -> None:
        if context is CallContext.PLAIN:
            torch.autograd.graph.increment_version(out)
            function(out, *args)
        elif context is CallContext.TRANSFORMED:
            raise RuntimeError(f"{name} with out= cannot be transformed or differentiated forward; leave out= away")
        else:
            registered(out, *[tensor_of(c) if isinstance(c, float) else c for c in _flat(args)])

    return call
