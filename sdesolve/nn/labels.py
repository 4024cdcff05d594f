"""Networks that may be told a class, and what binds a class to one."""

from __future__ import annotations

import abc
from typing import final

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
class Given(nn.Module):
    """``net(x, t)`` from ``net(x, t, label)``: the network with its label decided.

    Args:
        net: a class-conditional network. It is shared, not copied.
        label: one class for all samples, or ``(batch,)`` integers; ``net.classes`` is the null class.

    Raises:
        TypeError: ``net`` is not a `LabelledNetwork`; labels that are not integers.
        ValueError: ``net`` has no classes; a label outside them.
    """

    label: Tensor

    def __init__(self, net: nn.Module, label: Tensor | int) -> None:
        super().__init__()
        if not isinstance(net, LabelledNetwork):
            raise TypeError(f"a label needs a network net(x, t, label), a LabelledNetwork; got {type(net).__name__}")
        checked = check_labels(label, net.classes)
        self.net = net
        self.register_buffer("label", checked, persistent=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """As the network, with the label given.

        Raises:
            ValueError: there are not as many labels as samples.
        """
        return self.net(x, t, labels_for(self.label, x))


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
    if labels.ndim == 1 and len(labels) != len(x):
        raise ValueError(
            f"there are {len(labels)} labels and {len(x)} samples; give one label for all, or one for each"
        )
    return labels.to(x.device).expand(len(x))
