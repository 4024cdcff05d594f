"""Networks that may be told more than state and time, such as a class, and what binds that to them."""

from __future__ import annotations

import abc
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import whole_number


class LabelledNetwork(nn.Module, abc.ABC):
    """A network ``net(x, t, label)``, class-conditional where ``classes > 0``.

    Labels run from 0 to ``classes - 1``; ``classes`` itself is the null class, which stands for not knowing and is what
    a missing label means. A network trained with some labels replaced by the null class is conditional and
    unconditional at once, as classifier-free guidance needs (Ho and Salimans 2022, algorithm 1).
    """

    classes: int

    @property
    def nulls(self) -> dict[str, Any]:
        """What stands for no condition, by name."""
        return {"label": self.classes} if self.classes else {}

    @abc.abstractmethod
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """``x: (batch, *state)``, ``t`` of shape ``()`` or ``(batch,)``, ``label: (batch,)`` to ``(batch, *state)``."""


@final
class LabelEmbedding(nn.Module):
    """A vector for each class and for the null class; with ``classes=0`` it adds nothing and takes no labels.

    Raises:
        TypeError: ``classes`` is not an integer.
        ValueError: ``classes`` is negative.
    """

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.classes = whole_number(classes, "classes", 0)
        self.table = nn.Embedding(classes + 1, size) if classes else None

    def forward(self, e: Tensor, label: Tensor | None) -> Tensor:
        """``e + vector(label)`` for an embedding ``e`` of shape ``(size,)`` or ``(batch, size)``."""
        if self.table is None:
            if label is not None:
                raise ValueError("this network was built without classes and takes no label; build it with classes=n")
            return e
        return e + (self.table.weight[self.classes] if label is None else self.table(label))


@final
class ValueEmbedding(nn.Module):
    """What a network makes of a continuous condition, ``count`` numbers a sample; with ``count=0`` it adds nothing.

    ``e + W silu(W values)``, or ``e`` and a learned vector for samples whose values hold a nan, and for all samples
    where none are given: nan stands for not known.

    Raises:
        TypeError: ``count`` is not an integer.
        ValueError: ``count`` is negative.
    """

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.count = whole_number(count, "values", 0)
        self.inner = nn.Sequential(nn.Linear(count, size), nn.SiLU(), nn.Linear(size, size)) if count else None
        if count:
            self.unknown = nn.Parameter(0.1 * torch.randn(size))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the condition: none with ``count=0``."""
        return ("values",) if self.count else ()

    @property
    def nulls(self) -> dict[str, Any]:
        """What stands for no condition, by name."""
        return dict.fromkeys(self.names, math.nan)

    def forward(self, e: Tensor, values: Tensor | None) -> Tensor:
        """``e`` with ``values: (batch, count)``, or ``(batch,)`` for one number, taken in."""
        if self.inner is None:
            if values is not None:
                raise ValueError("this network was built without values and takes none; build it with values=n")
            return e
        if values is None:
            return e + self.unknown
        if values.ndim == 1 and self.count == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] != self.count:
            raise ValueError(f"this network takes values (batch, {self.count}), got shape {tuple(values.shape)}")
        unknown = values.isnan().any(1, keepdim=True)
        return e + torch.where(unknown, self.unknown, self.inner(torch.where(unknown, 0.0, values)))


def place_mask(mask: Tensor | None, x: Tensor, sides: tuple[int, ...], name: str = "mask") -> Tensor | None:
    """A mask of the places of ``x`` as ``(batch, 1, *sides)``.

    Raises:
        TypeError: it is not of booleans.
        ValueError: it is not ``(batch, *sides)``.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} is true where there is something: it must be of torch.bool, got {mask.dtype}")
    if tuple(mask.shape) != (len(x), *sides):
        raise ValueError(f"{name} must be one of {(len(x), *sides)}, batch and places, got shape {tuple(mask.shape)}")
    return mask.unsqueeze(1)


@final
class Given(nn.Module):
    """``net(x, t)`` from ``net(x, t, **conditions)``: the network with its conditions decided.

    Args:
        net: a network that takes ``conditions`` by these names. It is shared, not copied.
        label: one class for all samples, or ``(batch,)``; for a `LabelledNetwork` integers, of which ``net.classes`` is
            the null class.
        conditions: tensors with a row for each sample, ``(batch, ...)``, or one row for all, ``(1, ...)``; numbers are
            one for all. None is as if not given. Those of floating point are given in the dtype of the state.

    Raises:
        TypeError: the network takes no such input; labels of a `LabelledNetwork` that are not integers; a condition
            that is neither a tensor nor a number.
        ValueError: a `LabelledNetwork` has no classes; a label outside them.
    """

    def __init__(
        self, net: Callable[..., Tensor], label: Tensor | int | None = None, **conditions: Tensor | float | None
    ) -> None:
        super().__init__()
        more: dict[str, Any] = {"label": label} | conditions
        given = {name: value for name, value in more.items() if value is not None}
        if isinstance(net, Given):
            given = net.conditions | given
            net = net.net
        check_inputs(net, given)
        self.net: Callable[..., Tensor] = net
        self._names = tuple(given)
        for name, value in given.items():
            if name == "label" and isinstance(net, LabelledNetwork):
                tensor = check_labels(value, net.classes)
            else:
                tensor = _condition(name, value)
            self.register_buffer(f"given_{name}", tensor, persistent=False)
        self.training = bool(getattr(net, "training", False))

    @property
    def conditions(self) -> dict[str, Tensor]:
        """What is given, by name."""
        return {name: self._buffers[f"given_{name}"] for name in self._names}  # type: ignore[misc]

    @property
    def wide_time(self) -> bool:
        """Whether the network wants times in float32 where its states have 16 bits."""
        return bool(getattr(self.net, "wide_time", False))

    @property
    def label(self) -> Tensor | None:
        """The label, if one is given."""
        return self.conditions.get("label")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As the network, with its conditions given.

        Raises:
            ValueError: there are not as many rows of a condition as samples.
        """
        return self.net(x, t, **{name: rows_for(name, value, x) for name, value in self.conditions.items()})


@final
class GivenTogether(nn.Module):
    """``net`` on the rows of several parts at once, each part under its own conditions.

    Args:
        net: a network that takes them.
        given: conditions of each part, by name. For what one lacks stands ``net.nulls[name]``. A number stands for a
            row of such numbers, where other parts have rows.

    Raises:
        ValueError: a part lacks a condition that has no null value, or rows of parts differ in shape.
    """

    def __init__(self, net: Callable[..., Tensor], given: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        nulls = nulls_of(net)
        self.net, self.count = net, len(given)
        self.values: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(name for part in given for name in part):
            if name not in nulls and any(name not in part for part in given):
                raise ValueError(
                    f"one_call needs a {name} in each part: give the part without one what stands for none, "
                    f"score.given({name}=...)"
                )
            values = [part[name] if name in part else torch.as_tensor(nulls[name]) for part in given]
            rows = {tuple(value.shape[1:]) for value in values if value.ndim}
            if len(rows) > 1:
                raise ValueError(
                    f"one_call needs rows of one shape in all parts, and those of {name} are "
                    f"{' and '.join(map(str, sorted(rows)))}; pad them, with a mask"
                )
            row = next(iter(rows), ())
            self.values[name] = [value if value.ndim or not row else value.expand(1, *row) for value in values]
        self.training = bool(getattr(net, "training", False))

    @property
    def wide_time(self) -> bool:
        """As the network has it."""
        return bool(getattr(self.net, "wide_time", False))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As the network, for ``x: (parts batch, *state)``."""
        part = x[: len(x) // self.count]
        more = {n: torch.cat([rows_for(n, value, part) for value in values]) for n, values in self.values.items()}
        return self.net(x, t, **more)


class Takes(NamedTuple):
    """What a network that wraps another one takes besides state and time, as its attribute ``takes``.

    Attributes:
        names: all of it.
        needed: what it cannot do without.
        masks: booleans that say what of the data, or of a condition, is there: all of it where they are not given.
    """

    names: tuple[str, ...]
    needed: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()


def masks_of(net: Any) -> tuple[str, ...]:
    """Names of the masks that a network takes, as far as it says."""
    takes = getattr(_bare(net), "takes", None)
    return takes.masks if isinstance(takes, Takes) else ()


def nulls_of(net: Any) -> dict[str, Any]:
    """What stands for no condition, by name, as far as a network says, by its attribute ``nulls``."""
    return dict(getattr(_bare(net), "nulls", None) or {})


def _bare(net: Any) -> Any:
    net = net.net if isinstance(net, Given) else net
    return getattr(net, "_orig_mod", net)  # of torch.compile


def inputs_of(net: Callable[..., Any]) -> tuple[list[str], list[str]] | None:
    """Names of what ``net(x, t, ...)`` takes besides, and those of them that it needs; None if it takes any."""
    net = getattr(net, "_orig_mod", net)  # of torch.compile
    if isinstance(own := getattr(net, "takes", None), Takes):
        return list(own.names), list(own.needed)
    function = net.forward if isinstance(net, nn.Module) else net
    if isinstance(function, types.MethodType):
        return _inputs(function.__func__, 3)
    return _inputs(function, 2)


@functools.lru_cache(256)
def _inputs(function: Callable[..., Any], known: int) -> tuple[list[str], list[str]] | None:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    named = [p for p in parameters[known:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [p.name for p in named], [p.name for p in named if p.default is p.empty]


def check_inputs(net: Callable[..., Any], names: Iterable[str]) -> None:
    """Refuses conditions that a network does not take.

    Raises:
        TypeError: naming the first, and what it takes.
    """
    found = inputs_of(net)
    unknown = [name for name in names if found is not None and name not in found[0]]
    if unknown:
        kind = type(net).__name__ if isinstance(net, nn.Module) else "network; this one is a function"
        if unknown[0] == "label":
            raise TypeError(f"a label needs a network net(x, t, label), a LabelledNetwork; got {kind}")
        takes = ", ".join(found[0]) if found and found[0] else "nothing"
        raise TypeError(f"this {kind} takes no {unknown[0]!r}: after x and t it takes {takes}")


def _condition(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name} must be a tensor with a row for each sample, or a number; got {type(value).__name__}. What is "
                "no number is made one before it, text by an encoder"
            ) from None
    return value


def check_rows(name: str, value: Tensor, samples: int) -> None:
    """Refuses a condition that has neither one row nor one for each sample; labels ``(1,)`` are for one sample."""
    if value.ndim and len(value) != samples and (len(value) != 1 or (name == "label" and value.ndim == 1)):
        if name == "label":
            raise ValueError(
                f"there are {len(value)} labels and {samples} samples; give one label for all, or one for each"
            )
        raise ValueError(
            f"{name} has {len(value)} rows and there are {samples} samples; give one row for all, (1, ...), or one for "
            "each"
        )


def rows_for(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A condition with a row for each sample of ``x``, on its device, and in its dtype if it has a floating-point one.

    Raises:
        ValueError: it has neither one row nor as many as ``x``.
    """
    check_rows(name, value, len(x))
    value = value.expand(len(x), *value.shape[1:])
    return value.to(x.device, x.dtype if value.is_floating_point() else value.dtype)


def check_labels(label: Tensor | int, classes: int | None = None, *, null: bool = True) -> Tensor:
    """Labels as int64, ``()`` or ``(batch,)``: not negative, and within ``classes`` where their number is known.

    Raises:
        TypeError: labels that are not integers.
        ValueError: ``classes`` is 0; labels of another rank than 0 or 1, or outside the classes.
    """
    if classes == 0:
        raise ValueError("this network was built without classes and takes no label; build it with classes=n")
    y = torch.as_tensor(label)
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(
            f"labels must be integers, got {y.dtype}; convert them with .long(), one-hot vectors with .argmax(-1)"
        )
    if y.ndim > 1:
        raise ValueError(f"labels must be one integer or have shape (batch,), got shape {tuple(y.shape)}")
    outside = y < 0 if classes is None else (y < 0) | (y > (classes if null else classes - 1))
    if bool(outside.any()):
        which = int(y.reshape(-1)[outside.reshape(-1)][0])
        if classes is None:
            raise ValueError(f"labels run from 0, got {which}")
        hint = f", or {classes} for no class" if null else ""
        raise ValueError(f"labels must be in 0 ... {classes - 1}{hint}; got {which}")
    return y.detach().long()


def labels_for(labels: Tensor, x: Tensor) -> Tensor:
    """One label for each sample of ``x``, ``(batch,)``, on its device.

    Raises:
        ValueError: there are not as many labels as samples.
    """
    check_rows("label", labels, len(x))
    return labels.to(x.device).expand(len(x))
