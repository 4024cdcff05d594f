"""Batches for training whose order is a function of the seed, so that a run can be taken up anywhere."""

from __future__ import annotations

import abc
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sdesolve._internal.arguments import kind_of, short, whole_number
from sdesolve._internal.generators import seeded
from sdesolve.training.identity import identity

STATE = "x"
Fields = Sequence[str | None] | Mapping[str, str | None]


class Position(NamedTuple):
    """How far a run has come: samples seen in all, epoch, and batches taken from that epoch."""

    samples: int = 0
    epoch: int = 0
    batch: int = 0


class Batch(NamedTuple):
    """Data ``(batch, *state)``, what the network is told of them by name, and the position behind them."""

    x0: Tensor
    conditions: dict[str, Tensor]
    position: Position


class AbstractBatches(abc.ABC):
    """An endless sequence of batches that can start at any position."""

    @abc.abstractmethod
    def after(self, position: Position) -> Iterator[Batch]:
        """Batches from ``position`` on."""

    @abc.abstractmethod
    def identity(self) -> str:
        """Tells data sets apart in a checkpoint. Reads all of a tensor."""

    size: int | None = None
    """Samples in a batch, where it is the same for all."""
    expected = ""
    """`begun` of the run that is taken up, to be compared."""

    def begun(self, position: Position) -> str:
        """What the epoch of ``position`` began with, where its identity does not tell all."""
        return ""


@final
class TensorBatches(AbstractBatches):
    """Rows of a tensor, every epoch in a new order that depends on the seed and the epoch's number alone.

    Batches run on across the end of an epoch, so that all have the same size.

    Raises:
        TypeError: the data is not floating-point, or a condition is no tensor.
        ValueError: it is empty, or has no batch axis; there are not as many rows of a condition as samples.
    """

    def __init__(
        self, data: Tensor, batch_size: int, seed: int, conditions: Mapping[str, Tensor] | None = None
    ) -> None:
        check_samples(data)
        self.conditions = dict(conditions or {})
        for name, value in self.conditions.items():
            plural = "labels" if name == "label" else name
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{plural} must be a tensor ({len(data)},) of integers, got {kind_of(value)}; use "
                    f"torch.tensor({plural})"
                )
            if value.shape[:1] != data.shape[:1]:
                raise ValueError(
                    f"{plural} must have one entry for each of the {len(data)} samples, got shape {tuple(value.shape)}"
                )
        self.data, self._seed = data.detach(), seed
        self.size: int = whole_number(batch_size, "batch_size", 1)

    def after(self, position: Position) -> Iterator[Batch]:
        n, k = len(self.data), position.samples
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            rows, end = [], k + self.size
            while k < end:
                if k // n != epoch:
                    epoch, order = k // n, self._order(k // n)
                rows.append(order[k % n : k % n + end - k])
                k += len(rows[-1])
            row = torch.cat(rows)
            told = {name: value[row.to(value.device)] for name, value in self.conditions.items()}
            yield Batch(self.data[row.to(self.data.device)], told, Position(k, k // n))

    def identity(self) -> str:
        return f"tensor {list(self.data.shape)} {self.data.dtype}, {identity([self.data, self.conditions])}"

    def _order(self, epoch: int) -> Tensor:
        u = uniform(1, len(self.data), seed=self._seed, stream=Stream.DATA_ORDER, first_path=epoch, dtype=torch.float64)
        return u.squeeze(0).argsort(stable=True)


@final
class LoaderBatches(AbstractBatches):
    """Batches of a ``DataLoader`` or another iterable, gone through again in every epoch.

    torch's global generator is seeded from the seed, the epoch and the batch's number while a batch is made, so that a
    shuffling loader and random augmentations repeat themselves; a loader's own ``generator`` is its owner's affair. A
    start within an epoch skips the batches before it.

    Args:
        loader: the batches.
        seed: of their order.
        fields: as for `named`.
        labelled: likewise.
    """

    def __init__(
        self, loader: Iterable[object], seed: int, fields: Fields | None = None, *, labelled: bool = False
    ) -> None:
        self._loader, self._seed, self._fields, self._labelled = loader, seed, fields, labelled
        self._begun: tuple[int, str] = (-1, "")

    def after(self, position: Position) -> Iterator[Batch]:
        samples, epoch, skip = position
        while True:
            count = 0
            with seeded("epoch", self._seed, epoch):
                batches = iter(self._loader)
            while True:
                try:
                    with seeded("batch", self._seed, epoch, count):
                        batch = next(batches)
                except StopIteration:
                    break
                count += 1
                if count > 1 and count <= skip:
                    continue
                held = named(batch, self._fields, labelled=self._labelled)
                x0 = held.pop(STATE)
                if count == 1:
                    self._begun = epoch, identity(x0)
                    self._compare(self.expected if skip else "")
                if count > skip:
                    samples += len(x0)
                    yield Batch(x0, held, Position(samples, epoch, count))
            if not count:
                raise ValueError(
                    f"the loader gave no batch in epoch {epoch}; it must hold data, and give it again each time it is "
                    "iterated over (a generator does not: pass a list, a DataLoader or an object with __iter__)"
                )
            epoch, skip = epoch + 1, 0

    def identity(self) -> str:
        return identity(self._loader)

    def begun(self, position: Position) -> str:
        return self._begun[1] if self._begun[0] == position.epoch else ""

    def _compare(self, expected: str) -> None:
        if expected and expected != self._begun[1]:
            warnings.warn(
                f"the loader began epoch {self._begun[0]} with another batch than in the run that is taken up: it "
                "holds other data, or does not repeat itself. Give it no generator of its own to have torch's seeded",
                stacklevel=4,
            )


def named(entry: Any, fields: Fields | None, *, labelled: bool = False) -> dict[str, Tensor]:
    """What a batch, or a whole data set, holds by name, checked: ``"x"`` and the network's other inputs.

    Args:
        entry: a tensor, a tuple or list that starts with one, or a dictionary.
        fields: a name for each entry of a tuple, or a name by key; None for what is not used.
        labelled: a pair without names is one of data and labels.

    Raises:
        TypeError: what should be a tensor is none; integer data.
        ValueError: entries without a name, names that fit nothing, or another number of rows than of samples.
    """
    pairs = _by_key(entry, fields) if isinstance(entry, Mapping) else _by_place(entry, fields, labelled)
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError(f"each name is for one entry of the data, got {_listed(name for name, _ in pairs)}")
    if STATE not in held:
        raise ValueError(
            f"nothing here is called {STATE!r}, the data: there is {_listed(held)}. Say what is what by fields=, such "
            f"as fields={{key: {STATE!r}}} for a dictionary"
        )
    check_samples(held[STATE], of_batch=True)
    for name, value in held.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor with a row for each sample, got {kind_of(value)}; fields= leaves an entry "
                "out that has None for its name"
            )
        if value.shape[:1] != held[STATE].shape[:1]:
            raise ValueError(
                f"{name} must have a row for each of the {len(held[STATE])} samples, got Tensor {tuple(value.shape)}"
            )
    return held


def _by_key(entry: Mapping[Any, Any], fields: Fields | None) -> list[tuple[Any, Any]]:
    names = {} if fields is None else fields
    if not isinstance(names, Mapping) or any(key not in entry for key in names):
        raise ValueError(
            f"fields must map keys of the data ({_listed(entry)}) to names, as in {{key: {STATE!r}}}; got "
            f"{short(fields)}"
        )
    return [(names.get(key, key), value) for key, value in entry.items() if names.get(key, key) is not None]


def _by_place(entry: Any, fields: Fields | None, labelled: bool) -> list[tuple[Any, Any]]:
    entries = [entry] if isinstance(entry, Tensor) else entry
    if fields is None and STATE in getattr(entry, "_fields", ()):
        fields = entry._fields
    if not isinstance(entries, list | tuple) or not entries or (fields is None and not isinstance(entries[0], Tensor)):
        start = f" starting with {type(entries[0]).__name__}" if isinstance(entries, list | tuple) and entries else ""
        raise TypeError(
            "a loader must give tensors, or tuples whose first entry is one; got "
            f"{type(entry).__name__}{start}. Dictionaries that call the data {STATE!r} are taken too, and an array of "
            "samples is made a tensor with torch.as_tensor(data)"
        )
    if fields is None and labelled and len(entries) == 1:
        raise ValueError(
            f"label_dropout needs data and labels ({len(entries[0])},) in each batch, got nothing besides data"
        )
    if fields is None and len(entries) > (2 if labelled else 1):
        raise ValueError(
            f"there are {len(entries)} entries, and all but the first would be lost: name them as the network does, "
            f"as in fields=({STATE!r}, 'label'), or leave them out by None, fields=({STATE!r}, None)"
        )
    names = (STATE, "label")[: len(entries)] if fields is None else fields
    if isinstance(names, Mapping | str) or len(names) != len(entries):
        raise ValueError(
            f"fields must have a name, or None, for each of the {len(entries)} entries of the data; got {short(fields)}"
        )
    return [(name, value) for name, value in zip(names, entries, strict=True) if name is not None]


def batches_of(
    data: Any,
    batch_size: int | None,
    seed: int,
    labels: Tensor | None = None,
    *,
    labelled: bool = False,
    fields: Fields | None = None,
) -> AbstractBatches:
    """Batches from whatever `train` was given, with labels if ``labelled``.

    Raises:
        TypeError: ``data`` is none of the kinds that `train` takes; integer data.
        ValueError: ``batch_size`` or ``labels`` for data that is already in batches; entries without names; empty data.
    """
    if isinstance(data, TensorDataset):
        data = tuple(data.tensors)
    if isinstance(data, Tensor) and labelled and labels is None:
        raise ValueError("label_dropout is for data with classes; give them as labels=")
    columns = isinstance(data, tuple) and data and all(isinstance(column, Tensor) for column in data)
    if isinstance(data, Tensor | Mapping) or columns:
        plain = isinstance(data, Tensor) and fields is None
        told = {STATE: data} if plain else named(data, fields, labelled=labelled and labels is None)
        if labels is not None and "label" in told:
            raise ValueError("there are labels= and labels in the data; give them once")
        told |= {} if labels is None else {"label": labels}
        return TensorBatches(told.pop(STATE), 256 if batch_size is None else batch_size, seed, told)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if labels is not None:
            raise ValueError("labels is for a tensor of samples; a Dataset gives pairs, named by fields=('x', 'label')")
        data, batch_size = DataLoader(data, 256 if batch_size is None else batch_size, shuffle=True), None
    if not isinstance(data, Iterable):
        raise TypeError(
            "data must be a tensor (samples, *state), a dictionary or tuple of tensors, a Dataset or an iterable of "
            f"batches, got {kind_of(data)}"
        )
    if batch_size is not None:
        raise ValueError("batch_size is for a tensor of samples; a loader already decides the size of its batches")
    if labels is not None:
        raise ValueError("labels is for a tensor of samples; a loader gives pairs (data, labels), with label_dropout=")
    return LoaderBatches(data, seed, fields, labelled=labelled)


def check_samples(x0: Tensor, *, of_batch: bool = False) -> None:
    """Refuses what is no floating-point tensor of at least one sample."""
    if not isinstance(x0, Tensor):
        raise TypeError(f"the data must be a tensor (samples, *state), got {kind_of(x0)}; use torch.as_tensor(data)")
    if not x0.is_floating_point():
        raise TypeError(f"training data must be float32 or float64, got {x0.dtype}; convert it with .float()")
    if x0.layout != torch.strided or x0.is_meta:
        raise TypeError(f"training data must be dense tensors with values, got layout {x0.layout} on {x0.device}")
    if x0.ndim == 0 or not x0.numel():
        what = "a loader must give batches (batch, *state) that are not empty" if of_batch else (
            "training data must be (samples, *state) with at least one sample"
        )  # fmt: skip
        raise ValueError(f"{what}, got {tuple(x0.shape)}")


def _listed(names: Iterable[object]) -> str:
    few = list(itertools.islice(names, 7))
    return ", ".join(map(short, few[:6])) + (", ..." if len(few) > 6 else "")
