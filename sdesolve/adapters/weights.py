"""Weights of other packages' checkpoints, read without running anything that a file holds."""

from __future__ import annotations

import collections
import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, final

import safetensors.torch
import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import short
from sdesolve.nn.labels import LabelledNetwork


def read_weights(path: str | Path, part: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint by dotted names: safetensors, files of ``torch.save``, and pickles of EDM.

    Nothing in a file is run: safetensors hold no code, files of ``torch.save`` are read with ``weights_only=True``, and
    in a pickle every class and function that a file names is an inert record but for those that tensors are made of.
    Of a module in a pickle its parameters and buffers are taken, by the names of its ``state_dict``.

    Args:
        path: of the file.
        part: a name within: ``"ema"`` of EDM's, ``"model"`` or ``"ema"`` of score_sde's. A list, such as score_sde's
            averages, has the names ``"0"``, ``"1"``, ...

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is none of these, is damaged, holds no tensor, or has no such part.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(2)
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        elif start == b"PK" or path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with path.open("rb") as file:
                content = _Inert(file).load()
    except MemoryError:
        raise
    except Exception as problem:
        told = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise ValueError(f"{path} could not be read as weights alone: {told[:200]}") from problem
    for name in part.split(".") if part else ():
        inside = _entries(content)
        if name not in inside:
            known = ", ".join(sorted(inside)[:8]) or "nothing"
            raise ValueError(f"{path} has no part {part!r}; it has {known}")
        content = inside[name]
    tensors = dict(_tensors(content, ""))
    if not tensors:
        raise ValueError(f"{path} holds no tensors{f' in {part!r}' if part else ''}")
    return tensors


def load_weights(net: nn.Module, path: str | Path, part: str | None = None) -> None:
    """Reads weights of another package's checkpoint into a network of that architecture, in place.

    Names may begin with ``module.``, as data parallel training leaves them. A checkpoint of score_sde with averaged
    weights keeps these as a list in the order of ``net.parameters()``: ``part="ema"`` takes the averages, and buffers
    from the model beside them.

    Args:
        net: the network.
        path, part: as for `read_weights`.

    Raises:
        ValueError: names or shapes are not those of ``net``, which is then as it was; otherwise as `read_weights`.
        FileNotFoundError: there is no file.
    """
    given = read_weights(path, part)
    shadow = {name.removeprefix("shadow_params."): v for name, v in given.items() if name.startswith("shadow_params.")}
    expected = net.state_dict()
    if shadow:
        trained = [name for name, p in net.named_parameters() if p.requires_grad]
        if len(trained) != len(shadow):
            raise ValueError(f"{path} has averages of {len(shadow)} parameters, and the network has {len(trained)}")
        base = {name.removeprefix("module."): v for name, v in read_weights(path, "model").items()}
        given = base | {name: shadow[str(i)] for i, name in enumerate(trained)}
    else:
        given = {name.removeprefix("module."): value for name, value in given.items()}
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is not in the network" for name in given if name not in expected]
    wrong += [
        f"{name} is {list(given[name].shape)} in the file, {list(value.shape)} here"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} is for another network: {'; '.join(wrong[:3])}{more}. Is there another part= of it?")
    with torch.no_grad():
        for name, value in expected.items():
            value.copy_(given[name])


@final
class EDMNet(LabelledNetwork):
    """A preconditioned network of EDM, ``D(x, sigma, class_labels)``, for ``NetworkScore(net, EDM(), "data")``.

    On `EDM` time is ``sigma``. Labels become one-hot rows, and the null class a row of zeros, as there
    (Karras et al. 2022). On another process than `EDM` ``D`` is asked at ``x / alpha`` with ``sigma / alpha``: give
    ``scale`` and ``level`` of its times.

    Args:
        model: a module called as above, such as an ``EDMPrecond``.
        classes: number of classes, 0 for none.
        level: of a time, ``sigma / alpha``; the time itself by default.
        scale: of a time, ``alpha``; 1 by default.

    Raises:
        TypeError: ``model`` is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int = 0,
        level: Callable[[Tensor], Tensor] | None = None,
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, such as an EDMPrecond; got {type(model).__name__}")
        self.model, self.classes, self._level, self._scale = model, classes, level, scale

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """The denoised state, shape of ``x: (batch, *state)``.

        Raises:
            ValueError: a label for a network without classes.
        """
        t = t.expand(len(x))
        sigma = t if self._level is None else self._level(t)
        if self._scale is not None:
            x = x / self._scale(t).reshape(-1, *(1,) * (x.ndim - 1))
        if not self.classes:
            if label is not None:
                raise ValueError("this network was wrapped without classes and takes no label; give EDMNet classes=n")
            return self.model(x, sigma)
        rows = x.new_zeros(len(x), self.classes + 1)
        rows[:, self.classes] = 1.0
        if label is not None:
            rows = nn.functional.one_hot(label, self.classes + 1).to(x)
        return self.model(x, sigma, rows[:, : self.classes])


@final
class ScoreSDENet(nn.Module):
    """A network of score_sde, ``model(x, labels)``, as it is called for its continuous SDEs (Song et al. 2021).

    ``"vp"`` and ``"subvp"``: labels ``999 t``, and the output is the noise: ``NetworkScore(net, VP(), "noise")``.
    ``"ve"``: labels ``sigma(t)`` of `VE`, at least ``sigma_min``, which it was never trained below, and the output is
    the score: ``NetworkScore(net, VE(), "score")``.

    Args:
        model: a module called as above, such as an ``NCSNpp``.
        kind: of the SDE that it was trained on.
        sigma_min, sigma_max: of ``"ve"``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: an unknown kind.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["vp", "subvp", "ve"],
        *,
        sigma_min: float = 0.01,
        sigma_max: float = 50.0,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, such as an NCSNpp; got {type(model).__name__}")
        if kind not in ("vp", "subvp", "ve"):
            raise ValueError(f"kind must be 'vp', 'subvp' or 've', got {short(kind)}")
        self.model, self.kind, self.sigma_min, self.sigma_max = model, kind, sigma_min, sigma_max

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """``model(x, labels)``, shape of ``x: (batch, *state)``."""
        t = t.expand(len(x))
        labels = 999.0 * t
        if self.kind == "ve":
            exponent = 2.0 * math.log(self.sigma_max / self.sigma_min) * t
            labels = self.sigma_min * torch.expm1(exponent).sqrt().clamp(min=1.0)
        return self.model(x, labels)


class _Record:
    """What stands for an object of a file's own class: what it was made with, and its state."""

    arguments: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *arguments: Any, **named: Any) -> _Record:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, named
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"state": state}

    def __setitem__(self, name: Any, value: Any) -> None:
        self.state[str(name)] = value

    def append(self, value: Any) -> None:
        self[len(self.state)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    def add(self, value: Any) -> None:
        self.append(value)


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage | torch.UntypedStorage):
        raise pickle.UnpicklingError("a tensor without a storage")
    dtype = storage.dtype if isinstance(storage, torch.storage.TypedStorage) else torch.uint8
    # As a view of numbers that were read, which torch refuses where it would reach beyond them.
    whole = torch.empty(0, dtype=dtype).set_(storage)
    return whole.as_strided(tuple(size), tuple(stride), offset).clone()


def _encoded(text: str, encoding: str) -> bytes:
    """Bytes as old protocols of pickle write them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {short(encoding)}")
    return text.encode("latin1")


def _parameter(data: Any, *_: Any) -> Any:
    return data


class _Inert(pickle.Unpickler):
    """Reads a pickle in which names stand for records: no class or function of a file is looked up."""

    _KNOWN: Mapping[tuple[str, str], Any] = {
        ("torch.storage", "_load_from_bytes"): _storage,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("_codecs", "encode"): _encoded,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self._KNOWN.get((module, name)) or type(name, (_Record,), {})

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to other files")


def _entries(content: Any) -> dict[str, Any]:
    """Parts of a mapping, a list, or a record."""
    if isinstance(content, Mapping):
        return {str(name): value for name, value in content.items()}
    if isinstance(content, list | tuple):
        return {str(i): value for i, value in enumerate(content)}
    return {name: value for name, value, _ in _inside(content)} if isinstance(content, _Record) else {}


def _inside(record: _Record) -> Iterator[tuple[str, Any, bool]]:
    """Entries of a record, and whether each is one of a module: its own state, or that which it was rebuilt from."""
    state = dict(record.state)
    for argument in record.arguments:  # EDM's modules are rebuilt from a record with their state
        inner = argument.state if isinstance(argument, _Record) else argument
        if isinstance(inner, Mapping) and isinstance(inner.get("state"), Mapping):
            state = {**inner["state"], **state}
    module = "_parameters" in state and "_modules" in state
    if not module:
        yield from ((str(name), value, False) for name, value in state.items())
        return
    transient = state.get("_non_persistent_buffers_set") or ()
    absent = set(transient.arguments[0] if isinstance(transient, _Record) and transient.arguments else transient)
    for group in ("_parameters", "_buffers", "_modules"):
        for name, value in _entries(state.get(group)).items():
            if not (group == "_buffers" and name in absent):
                yield name, value, True


def _tensors(content: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield prefix.removesuffix("."), content
    elif depth < 100:
        for name, value in _entries(content).items():
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)
