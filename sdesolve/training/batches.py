"""AbstractBatches for training whose order is a function of the seed, so that a run can be taken up anywhere."""

from __future__ import annotations

import abc
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple, final

import torch
from sdesolve_kernels import Stream, uniform
from torch import Tensor

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve._internal.generators import seeded

_AT_ONCE = 1 << 22  # numbers whose checksum is taken at a time


class Position(NamedTuple):
    """How far a run has come: samples seen in all, epoch, and batches taken from that epoch."""

    samples: int = 0
    epoch: int = 0
    batch: int = 0


class Batch(NamedTuple):
    """Data ``(batch, *state)``, their classes ``(batch,)`` if they have any, and the position behind them."""

    x0: Tensor
    label: Tensor | None
    position: Position


class AbstractBatches(abc.ABC):
    """An endless sequence of batches that can start at any position."""

    @abc.abstractmethod
    def after(self, position: Position) -> Iterator[Batch]:
        """AbstractBatches from ``position`` on."""

    @abc.abstractmethod
    def __repr__(self) -> str:
        """Tells data sets apart in a checkpoint."""


@final
class TensorBatches(AbstractBatches):
    """Rows of a tensor, every epoch in a new order that depends on the seed and the epoch's number alone.

    AbstractBatches run on across the end of an epoch, so that all have the same size.

    Raises:
        TypeError: the data is not floating-point, or the labels are no tensor.
        ValueError: it is empty, or has no batch axis; there are not as many labels as samples.
    """

    def __init__(self, data: Tensor, batch_size: int, seed: int, labels: Tensor | None = None) -> None:
        if not data.is_floating_point():
            raise TypeError(f"training data must be float32 or float64, got {data.dtype}; convert it with .float()")
        if data.ndim == 0 or not data.numel():
            raise ValueError(
                f"training data must be (samples, *state) with at least one sample, got {tuple(data.shape)}"
            )
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor ({len(data)},) of integers, got {kind_of(labels)}; use torch.tensor(labels)"
            )
        if labels is not None and labels.shape != data.shape[:1]:
            raise ValueError(
                f"labels must have one entry for each of the {len(data)} samples, got shape {tuple(labels.shape)}"
            )
        self._data, self._labels, self._seed = data.detach(), labels, seed
        self._size = whole_number(batch_size, "batch_size", 1)

    def after(self, position: Position) -> Iterator[Batch]:
        n, k = len(self._data), position.samples
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        while True:
            rows, end = [], k + self._size
            while k < end:
                if k // n != epoch:
                    epoch, order = k // n, self._order(k // n)
                rows.append(order[k % n : k % n + end - k])
                k += len(rows[-1])
            row = torch.cat(rows)
            label = None if self._labels is None else self._labels[row.to(self._labels.device)]
            yield Batch(self._data[row.to(self._data.device)], label, Position(k, k // n))

    def __repr__(self) -> str:
        text = f"tensor {list(self._data.shape)} {self._data.dtype}, checksum {_checksum(self._data)}"
        return text if self._labels is None else f"{text}, labels with checksum {_checksum(self._labels.long())}"

    def _order(self, epoch: int) -> Tensor:
        u = uniform(
            1, len(self._data), seed=self._seed, stream=Stream.DATA_ORDER, first_path=epoch, dtype=torch.float64
        )
        return u.squeeze(0).argsort(stable=True)


@final
class LoaderBatches(AbstractBatches):
    """AbstractBatches of a ``DataLoader`` or another iterable, gone through again in every epoch.

    torch's global generator is seeded from the seed, the epoch and the batch's number while a batch is made, so that a
    shuffling loader and random augmentations repeat themselves; a loader's own ``generator`` is its owner's affair. A
    start within an epoch skips the batches before it. With ``labelled`` every batch is a pair of data and labels.
    """

    def __init__(self, loader: Iterable[object], seed: int, *, labelled: bool = False) -> None:
        self._loader, self._seed, self._labelled = loader, seed, labelled

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
                if count > skip:
                    x0 = _state_of(batch)
                    label = _label_of(batch, len(x0)) if self._labelled else None
                    samples += len(x0)
                    yield Batch(x0, label, Position(samples, epoch, count))
            if not count:
                raise ValueError(
                    f"the loader gave no batch in epoch {epoch}; it must hold data, and give it again each time it is "
                    "iterated over (a generator does not: pass a list, a DataLoader or an object with __iter__)"
                )
            epoch, skip = epoch + 1, 0

    def __repr__(self) -> str:
        return type(self._loader).__name__


def batches_of(
    data: Tensor | Iterable[object],
    batch_size: int | None,
    seed: int,
    labels: Tensor | None = None,
    *,
    labelled: bool = False,
) -> AbstractBatches:
    """AbstractBatches from whatever `train` was given, with labels if ``labelled``.

    Raises:
        TypeError: ``data`` is neither a tensor nor an iterable; integer data.
        ValueError: ``batch_size`` or ``labels`` for data that is already in batches; none for a tensor that needs
            them; empty data.
    """
    if isinstance(data, Tensor):
        if labelled and labels is None:
            raise ValueError("label_dropout is for data with classes; give them as labels=")
        return TensorBatches(data, 256 if batch_size is None else batch_size, seed, labels)
    if not isinstance(data, Iterable):
        raise TypeError(
            f"data must be a tensor (samples, *state) or an iterable of batches, got {kind_of(data)}; a Dataset goes "
            "into a DataLoader, which makes batches"
        )
    if batch_size is not None:
        raise ValueError("batch_size is for a tensor of samples; a loader already decides the size of its batches")
    if labels is not None:
        raise ValueError("labels is for a tensor of samples; a loader gives pairs (data, labels), with label_dropout=")
    return LoaderBatches(data, seed, labelled=labelled)


def _checksum(data: Tensor) -> int:
    """Of every row: one that changed would change what a resumed run learns. A gigabyte takes a second."""
    total = 0
    for rows in data.split(max(1, _AT_ONCE * len(data) // max(data.numel(), 1))):
        total = zlib.crc32(rows.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _state_of(batch: object) -> Tensor:
    x0 = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(x0, Tensor):
        raise TypeError(
            f"a loader must give tensors, or tuples whose first entry is one; got {type(batch).__name__}"
            f"{'' if batch is x0 else f' starting with {type(x0).__name__}'}. An array of samples is made a "
            "tensor with torch.as_tensor(data)"
        )
    if not x0.is_floating_point():
        raise TypeError(f"training data must be float32 or float64, got {x0.dtype}; convert it with .float()")
    if x0.ndim == 0 or not x0.numel():
        raise ValueError(f"a loader must give batches (batch, *state) that are not empty, got {tuple(x0.shape)}")
    return x0


def _label_of(batch: object, count: int) -> Tensor:
    label = batch[1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    if not isinstance(label, Tensor) or label.shape != (count,):
        given = "nothing" if label is None else f"{type(label).__name__} {tuple(getattr(label, 'shape', ()))}"
        raise ValueError(f"a loader must give pairs of data and labels ({count},) for label_dropout, got {given}")
    return label
