"""One definition of an op, three ways to call it: at once, recorded by autograd, or through `torch.library`.

Compilers, fake tensors, function transforms and dispatch modes see the registered op. Plain eager calls skip the
dispatcher and the wrappers round a custom op in Python, which add 8 us to a step on a thousand elements that takes 14,
and 42 to the 21 that it takes when autograd records it. Both ways run the same implementation and the same gradient.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "PLACE",
    "Op",
    "Route",
    "define",
    "define_out",
    "has_tangent",
    "launch_place",
    "read",
    "recording",
    "route",
    "tensor_of",
]

# How every schema says where the noise is; see `checks.place`.
PLACE = (
    "SymInt seed, SymInt stream, SymInt first_path, SymInt step, "
    "Tensor? seed_at, Tensor? first_path_at, Tensor? step_at"
)


_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, type(None)})


class Route(enum.Enum):
    """Who looks on while an op is called."""

    PLAIN = "nobody but autograd"
    TRANSFORMED = "a function transform or forward-mode differentiation"
    REGISTERED = "a compiler, a dispatch mode or a subclass of Tensor"


def route(*tensors: Any) -> Route:
    """Which of an op's ways to call it is right for these arguments, here and now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return Route.REGISTERED
    for t in tensors:
        # Asking a float or None whether it is a tensor takes three times as long as looking its type up.
        if type(t) not in _PLAIN and isinstance(t, Tensor):
            return Route.REGISTERED
    if torch._C._functorch.peek_interpreter_stack() is not None or has_tangent(*tensors):
        return Route.TRANSFORMED
    return Route.PLAIN


def has_tangent(*tensors: Any) -> bool:
    """Whether one of these is differentiated forward. That somebody does so may be another thread's business."""
    level = forward_ad._current_level
    return level >= 0 and any(
        isinstance(t, Tensor) and forward_ad.unpack_dual(t, level=level).tangent is not None for t in tensors
    )


def launch_place(place: tuple[Any, ...]) -> dict[str, Any]:
    """The place of the noise as launchers take it, from its seven arguments in a schema: int64 in two's complement."""
    seed, stream, first_path, step, seed_at, first_path_at, step_at = place
    return {
        "seed": seed if seed_at is None else read(seed_at),
        "stream": stream,
        "first_path": first_path if first_path_at is None else read(first_path_at),
        "step": step if step_at is None else read(step_at),
    }


def read(index: Tensor) -> int | Tensor:
    """The value of an integer on the CPU; one on another device is left to the kernel, because reading it waits."""
    return int(index) if index.device.type == "cpu" else index


def recording(*tensors: Any) -> bool:
    """Whether autograd would record an op on these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if type(t) is not float and isinstance(t, Tensor) and t.requires_grad:
                return True
    return False


def tensor_of(c: Any) -> Tensor:
    """A coefficient as the schemas have it: a number becomes a 0-d float64 tensor, which loses nothing."""
    return c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64, device="cpu")


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
    """An op of namespace ``sdesolve``.

    Attributes:
        function: The implementation: numbers or tensors in the order of the schema; makes its outputs.
        recorded: The same under autograd.
        transformed: The same under function transforms.
        registered: The same through the dispatcher; coefficients must be tensors.
    """

    function: Callable[..., Any]
    recorded: Callable[..., Any]
    transformed: Callable[..., Any]
    registered: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call whichever way is right here; coefficients may be numbers."""
        return self.call(route(*args), recording(*args), *args)

    def call(self, way: Route, record: bool, *args: Any) -> Any:
        """The same for a caller that has found out the `route` and whether autograd is `recording`."""
        if way is Route.PLAIN:
            return self.recorded(*args) if record else self.function(*args)
        if way is Route.TRANSFORMED:
            return self.transformed(*args)
        return self.registered(*[tensor_of(c) if isinstance(c, float) else c for c in args])


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
        schema: Its arguments and results, as `torch.library` writes them.
        function: The implementation.
        fake: Results without values, for the same arguments.
        setup: ``setup(ctx, inputs, output)``, keeps what the gradient needs.
        backward: ``backward(ctx, *gradients)``, a gradient or None for each argument.
    """

    # The seven arguments of the place travel as one, because torch looks at each by itself.
    def forward(ctx: Any, *packed: Any) -> Any:
        args = (*packed[:-1], *packed[-1])
        output = function(*args)
        setup(ctx, args, output)
        return output

    def packed_backward(ctx: Any, *grads: Any) -> Any:
        return backward(ctx, *grads)[:-6]

    def record(*args: Any) -> Any:
        return recorded.apply(*args[:-7], args[-7:])

    # Two of them: function transforms demand a setup_context, for which torch binds the arguments to a signature in
    # each call, 12 us of 18.
    plain = {"forward": staticmethod(forward), "backward": staticmethod(packed_backward)}
    apart = {"forward": staticmethod(function), "backward": staticmethod(backward)}
    apart["setup_context"] = staticmethod(setup)
    refusals = {"vmap": staticmethod(_refuse_vmap(name)), "jvp": staticmethod(_refuse_jvp(name))}
    recorded: Any = type(f"_{name}", (torch.autograd.Function,), plain)
    transformed: Any = type(f"_{name}_transformed", (torch.autograd.Function,), apart | refusals)
    registered = _registered(name, function, schema, fake, ())
    registered.register_autograd(backward, setup_context=setup)
    return Op(function, record, transformed.apply, registered)


def define_out(name: str, schema: str, function: Callable[..., None]) -> Callable[..., None]:
    """Register the variant ``sdesolve::name_out`` that writes its first argument, ``out``, and returns nothing."""
    registered = _registered(f"{name}_out", function, schema, lambda *args: None, ("out",))

    def call(way: Route, out: Tensor, *args: Any) -> None:
        if way is Route.PLAIN:
            torch.autograd.graph.increment_version(out)
            function(out, *args)
        elif way is Route.TRANSFORMED:
            raise RuntimeError(f"{name} with out= cannot be transformed or differentiated forward; leave out= away")
        else:
            registered(out, *[tensor_of(c) if isinstance(c, float) else c for c in args])

    return call
