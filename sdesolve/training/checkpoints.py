"""Weights and training states on disk: safetensors with a JSON header, written atomically, never unpickled."""

from __future__ import annotations

import glob
import json
import os
import platform
import reprlib
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sdesolve._internal.arguments import kind_of, number, short
from sdesolve._internal.modes import modules_within
from sdesolve.flows.interpolant import FlowModel
from sdesolve.scores.network import NetworkScore
from sdesolve.training import recipes
from sdesolve.training.distillation import FlowMap

VERSION = 2
WEIGHTS, TRAINING, BLOCK = "weights", "training", "block"
TRAINING_FILE = "checkpoint.safetensors"


def save(score: nn.Module, path: str | Path) -> None:
    """Writes the weights of ``score`` to one file; a file already there is replaced in one piece or not at all.

    Args:
        score: a module with weights, such as a `NetworkScore`.
        path: of the file.

    Raises:
        TypeError: ``score`` is no module, or its state holds something else than tensors.
        ValueError: the score has no weights of its own, as one of a function.
        OSError: the file could not be written; what was there before is intact.
    """
    _check_module(score, path)
    tensors = named(score)
    write(Path(path), tensors, {"kind": WEIGHTS, "fingerprint": fingerprint(score)} | record_of(score))


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
    weights = part(tensors, average_prefix(0 if ema is None else decays.index(ema)) if decays else "")
    check_tensors(score.state_dict(), weights, path)
    load_named(score, weights)
    restore_record(score, header)
    score.eval()


def _check_module(score: nn.Module, path: object) -> None:
    if not isinstance(score, nn.Module):
        hint = "; the score comes first, then the path" if isinstance(path, nn.Module) else ""
        raise TypeError(f"score must be a module, such as a NetworkScore; got {kind_of(score)}{hint}")
    if all(name.startswith("normalizer.") for name in score.state_dict()):
        raise ValueError(f"this {type(score).__name__} has no weights to save or load{hidden_modules(score)}")


def hidden_modules(score: nn.Module) -> str:
    """Advice for a message, where a module calls others that are no part of it: by way of functions."""
    own = set(map(id, score.modules()))
    hidden = [m for m in modules_within([score]) if id(m) not in own and any(True for _ in m.parameters())]
    if not hidden:
        return (
            "; its network is a function without any"
            if callable(getattr(score, "net", None)) and not own - {id(score)}
            else ""
        )
    return (
        f"; its network is a function that calls a {type(hidden[0]).__name__}, which is no part of it: give the module "
        "itself, or make the function the forward of an nn.Module that holds it"
    )


def record_of(score: nn.Module) -> dict[str, Any]:
    """What a header says of the trainings of a score, and how to make it again."""
    always = score.always_given if isinstance(score, NetworkScore) else None
    made = recipes.described(score)
    return ({} if always is None else {"always_given": sorted(always)}) | ({} if made is None else {"recipe": made})


def restore_record(score: nn.Module, header: Mapping[str, Any]) -> None:
    """Tells a score what the header of its checkpoint says of its trainings."""
    if isinstance(score, NetworkScore):
        always = header.get("always_given")
        score.set_training(frozenset(map(str, always)) if isinstance(always, list) else None)


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
                f"the state of {type(module).__name__} holds a {type(value).__name__} under {short(name)}; only "
                "tensors can be saved without pickling, so keep other state in constructor arguments"
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
    if isinstance(module, FlowMap):
        result["(process of the map)"] = module.process.identity()
    if isinstance(module, FlowModel):
        result["(interpolant)"] = module.interpolant.identity()
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


def check_tensors(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path) -> None:
    """Refuses tensors that are not of the names and shapes of those that they are to be written into.

    Raises:
        ValueError: naming the first that differs.
    """
    ours, theirs = ({name: tuple(value.shape) for name, value in of.items()} for of in (expected, given))
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            what = f"{name} is {theirs.get(name, 'absent')} where {ours.get(name, 'nothing')} belongs"
            raise damaged(path, what)


def damaged(path: Path, what: str) -> ValueError:
    """The error about a file that is whole, and cannot be what `write` was given."""
    return ValueError(f"{path} is damaged: {what}. Delete it to start afresh")


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes ``tensors`` (on the host, contiguous) and a JSON ``header`` to ``path``, whole or not at all.

    The bytes go to a file beside ``path`` with a name of its own, are flushed to the disk, and take its name in one
    rename: whatever goes wrong, whenever the power fails and whoever else writes there, ``path`` holds either the old
    content or the new.

    Raises:
        OSError: the disk refused; ``path`` is as it was.
    """
    full = {**header, "version": VERSION}
    full["checksum"] = _checksum(full, tensors)
    content = safetensors.torch.save(dict(tensors), metadata={"sdesolve": json.dumps(full)})
    start = f".{path.name}.{platform.node()}-"
    partial = path.with_name(f"{start}{os.getpid()}-{threading.get_ident()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path.parent, start)
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
    content = path.read_bytes()  # at once: safetensors opens a file twice, and it may be replaced in between
    try:
        tensors = safetensors.torch.load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__", {})
    except Exception as error:  # a SafetensorError, or what torch says of a type that it does not have
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}): it is damaged, cut short, or of another kind, such as "
            "one of torch.save, whose weights go into a network by load_state_dict. A checkpoint that is damaged must "
            "be deleted to start afresh"
        ) from error
    header = _header(metadata, path)
    if header["checksum"] != _checksum(header, tensors):
        raise damaged(path, "its contents do not match their checksum")
    if header["kind"] == TRAINING:
        _check_run(header, path)
    return tensors, header


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        header = json.loads(metadata["sdesolve"])
        version, kind = header["version"], header["kind"]
        complete = is_count(version) and isinstance(header["fingerprint"], dict) and "checksum" in header
    except (KeyError, TypeError, ValueError, RecursionError):
        complete, version, kind = False, 0, ""
    if not complete or (version <= VERSION and kind not in (WEIGHTS, TRAINING, BLOCK)):
        raise ValueError(f"{path} is a safetensors file, but not one that sdesolve wrote")
    if version != VERSION:
        hint = (
            "update sdesolve" if version > VERSION else "it is from before the first release; delete it to start afresh"
        )
        raise ValueError(f"{path} has format {version}, and this version of sdesolve reads format {VERSION}; {hint}")
    return header


def is_count(value: object) -> bool:
    """Whether a value from a header is a number of something."""
    return type(value) is int and 0 <= value < 1 << 63


def _check_run(header: Mapping[str, Any], path: Path) -> None:
    """Refuses a header that no training run writes."""
    config, position, metrics = (header.get(name) for name in ("config", "position", "metrics"))
    ema = config.get("ema") if isinstance(config, dict) else None
    decays = ema if isinstance(ema, list) else [ema]
    good = {
        "config": bool(decays) and all(isinstance(d, float) and 0.0 <= d < 1.0 for d in decays),
        "step": is_count(header.get("step")),
        "updates": header.get("updates") == header.get("step"),
        "position": isinstance(position, list) and len(position) == 3 and all(map(is_count, position)),
        "metrics": isinstance(metrics, list) and all(map(_is_measurement, metrics)),
    }
    for name, fits in good.items():
        if not fits:
            raise damaged(path, f"its {name} is {reprlib.repr(header.get(name))}, which no run has")


def _is_measurement(entry: object) -> bool:
    if not (isinstance(entry, list) and len(entry) == 2 and is_count(entry[0]) and isinstance(entry[1], dict)):
        return False
    return all(isinstance(value, float | int) for value in entry[1].values())


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Of everything in a file but itself."""
    rest = {name: value for name, value in header.items() if name != "checksum"}
    # By way of JSON once more: what a file gives back has lists for tuples, and text for other keys.
    total = zlib.crc32(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode())
    for name in sorted(tensors):
        about = f"{name} {tensors[name].dtype} {list(tensors[name].shape)}"
        total = zlib.crc32(about.encode(), total)
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable without
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale(folder: Path, start: str) -> None:
    """Removes what processes of this machine that are gone had begun to write."""
    for partial in folder.glob(f"{glob.escape(start)}*.partial"):
        number = partial.name.removeprefix(start).partition("-")[0]
        if number.isdecimal() and not _is_alive(int(number)):
            _remove(partial)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # where signal 0 ends a process
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # the folder itself may be what is broken; the error being raised says more
        return
