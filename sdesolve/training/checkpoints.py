"""Weights and training states on disk: safetensors with a JSON header, written atomically, never unpickled."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, number
from sdesolve.scores.network import NetworkScore

VERSION = 1
WEIGHTS, TRAINING = "weights", "training"
TRAINING_FILE = "checkpoint.safetensors"


def save(score: nn.Module, path: str | Path) -> None:
    """Writes the weights of ``score`` to one file; a file already there is replaced in one piece or not at all.

    Raises:
        TypeError: ``score`` is no module, or its state holds something else than tensors.
        OSError: the file could not be written; what was there before is intact.
    """
    _check_module(score, path)
    write(Path(path), named(score), {"kind": WEIGHTS, "fingerprint": fingerprint(score)})


def load(score: nn.Module, path: str | Path, *, ema: float | None = None) -> None:
    """Reads weights that `save` or a training run wrote into ``score``, in place, and puts it into evaluation mode.

    ``path`` is a file of `save`, or the folder or file of a training checkpoint, whose averaged weights are taken.

    Args:
        score: a score of the architecture and process that was saved.
        path: as above.
        ema: which average, by its decay, of a run that kept several; by default the first.

    Raises:
        TypeError: ``score`` is no module.
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file is damaged, not of this library, of a newer format, for another architecture or process, or
            has no such average.
    """
    _check_module(score, path)
    path = Path(path)
    path = path / TRAINING_FILE if path.is_dir() else path
    tensors, header = read(path)
    check_fingerprint(score, header, path)
    decays = decays_of(header["config"]["ema"]) if header["kind"] == TRAINING else []
    if ema is not None and ema not in decays:
        kept = f"averages with decays {', '.join(map(str, decays))}" if decays else "weights only, no averages"
        raise ValueError(f"{path} holds {kept}; ema={ema} is not there")
    load_named(score, part(tensors, average_prefix(0 if ema is None else decays.index(ema)) if decays else ""))
    score.eval()


def _check_module(score: nn.Module, path: object) -> None:
    if not isinstance(score, nn.Module):
        hint = "; the score comes first, then the path" if isinstance(path, nn.Module) else ""
        raise TypeError(f"score must be a module, such as a NetworkScore; got {kind_of(score)}{hint}")


def decays_of(ema: float | Sequence[float]) -> list[float]:
    """The decays of all averages that a run keeps, the one that it leaves in the score first."""
    decays = ema if isinstance(ema, Sequence) and not isinstance(ema, str) else [ema]
    return [number(d, "ema") for d in decays]


def average_prefix(k: int) -> str:
    """What the names of average number ``k`` begin with in the file of a training run."""
    return f"ema{k or ''}."


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, under the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def named(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as copies on the host, apart even where the module shares memory between names."""
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the state of {type(module).__name__} holds a {type(value).__name__} under {name!r}; only tensors can "
                "be saved without pickling, so keep other state in constructor arguments"
            )
    return {name: on_host(value) for name, value in state.items()}


def load_named(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors into the state of a module, whose names and shapes have been checked before."""
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(tensors[name])


def on_host(value: Tensor) -> Tensor:
    """A contiguous copy in host memory."""
    return value.detach().to("cpu", copy=True).contiguous()


def fingerprint(module: nn.Module) -> dict[str, str]:
    """What must agree for weights to mean the same: names, shapes, dtypes, and for a `NetworkScore` its reading.

    A process is known by what it does (`AbstractDiffusion.identity`), and a `Normalizer` by the range that it was told:
    its numbers come with the weights, so that another range than theirs would be checked from then on.
    """
    result = {name: f"{value.dtype} {list(value.shape)}" for name, value in module.state_dict().items()}
    if isinstance(module, NetworkScore):
        result["(predicts)"] = f"{module.predicts}, sigma_data={module.sigma_data:g}"
        result["(process)"] = module.process.identity()
        if module.normalizer is not None and module.normalizer.bounded:
            result["(range of data)"] = f"{module.normalizer.low:.6g} to {module.normalizer.high:.6g}"
    return result


def check_fingerprint(module: nn.Module, header: Mapping[str, Any], path: Path) -> None:
    """Refuses a checkpoint whose fingerprint is not that of ``module``.

    Raises:
        ValueError: naming up to four differences.
    """
    theirs, ours = header["fingerprint"], fingerprint(module)
    lines = [
        f"{name}: {theirs.get(name, 'absent')} in the file, {ours.get(name, 'absent')} here"
        for name in theirs | ours
        if theirs.get(name) != ours.get(name)
    ]
    if lines:
        more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
        raise ValueError(
            f"{path} belongs to another score than this {type(module).__name__}: {'; '.join(lines[:4])}{more}. Build "
            "the score as it was built for the checkpoint"
        )


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (on the host, contiguous) and a JSON ``header`` to ``path``, whole or not at all.

    The bytes go to a file beside ``path``, are flushed to the disk, and take its name in one rename: whatever goes
    wrong and whenever the power fails, ``path`` holds either the old content or the new.

    Raises:
        OSError: the disk refused; ``path`` is as it was.
    """
    full = {**header, "version": VERSION, "checksum": _checksum(tensors)}
    content = safetensors.torch.save(dict(tensors), metadata={"sdesolve": json.dumps(full)})
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _flush_folder(path.parent)
    except OSError as error:
        kept = "; the previous checkpoint is still there and whole" if path.is_file() else ""
        _remove(partial)
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error}){kept}") from error


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header that `write` put into ``path``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not of this library, or of a newer format.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: give the file that save wrote, or the folder that train was given"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it is damaged, cut short, or of another kind, such as "
            "one of torch.save, whose weights go into a network by load_state_dict. A checkpoint that is damaged must "
            "be deleted to start afresh"
        ) from error
    header = _header(metadata, path)
    if header["checksum"] != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its contents do not match their checksum. Delete it to start afresh")
    return tensors, header


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata["sdesolve"])
        version, kind = int(header["version"]), header["kind"]
        complete = isinstance(header["fingerprint"], dict) and "checksum" in header
    except (KeyError, TypeError, ValueError):
        complete, version, kind = False, 0, ""
    if complete and version > VERSION:
        raise ValueError(
            f"{path} has format {version}, and this version of sdesolve reads up to {VERSION}; update sdesolve"
        )
    if not complete or kind not in (WEIGHTS, TRAINING):
        raise ValueError(f"{path} is a safetensors file, but not one that sdesolve wrote")
    return header


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself may be what is broken; the error being raised says more
        return
