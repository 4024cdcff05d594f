"""Where blocks are kept: in memory, as safetensors in a folder, or as a zarr group."""

from __future__ import annotations

import abc
import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sdesolve._internal.arguments import short
from sdesolve.training import checkpoints

Entry = tuple[dict[str, Tensor], dict[str, Any]]
"""The arrays of a block, and what is said of it."""

SPECIFICATION = "run.json"


class AbstractStore(abc.ABC):
    """A place for the blocks of one run. What `keep` has returned from is there whatever happens afterwards.

    A block is written whole or not at all, by anyone, as often as they like; whoever reads sees one or none.
    """

    shared: bool = True
    """Whether other processes see it."""

    @abc.abstractmethod
    def open(self, specification: Mapping[str, Any]) -> Mapping[str, Any]:
        """Begins, and gives the specification of the run that is there: this one if there was none."""

    @abc.abstractmethod
    def has(self, k: int) -> bool:
        """Whether block ``k`` is there."""

    @abc.abstractmethod
    def keep(self, k: int, arrays: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        """Keeps block ``k``."""

    @abc.abstractmethod
    def read(self, k: int) -> Entry:
        """Block ``k``."""

    @abc.abstractmethod
    def decided(self) -> str | None:
        """Which executor all blocks take, if that is decided."""

    @abc.abstractmethod
    def decide(self, execution: str) -> str:
        """Decides it, and gives what whoever was first has decided."""

    def keep_part(self, k: int, mark: str, tensors: dict[str, Tensor]) -> None:
        """Keeps how far block ``k`` has come; a store that cannot keeps nothing."""
        del k, mark, tensors

    def read_part(self, k: int) -> tuple[str, dict[str, Tensor]] | None:
        """How far block ``k`` has come."""
        del k
        return None


@final
class Memory(AbstractStore):
    """The memory of this process."""

    shared = False

    def __init__(self) -> None:
        self._blocks: dict[int, Entry] = {}
        self._decided: dict[str, str] = {}

    def decided(self) -> str | None:
        return self._decided.get("execution")

    def decide(self, execution: str) -> str:
        return self._decided.setdefault("execution", execution)

    def open(self, specification: Mapping[str, Any]) -> Mapping[str, Any]:
        return specification

    def has(self, k: int) -> bool:
        return k in self._blocks

    def keep(self, k: int, arrays: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        self._blocks[k] = (arrays, dict(about))

    def read(self, k: int) -> Entry:
        return self._blocks[k]


class AbstractFolder(AbstractStore):
    """A folder with the specification of its run."""

    _file_of_run = SPECIFICATION

    def __init__(self, path: Path) -> None:
        self.path = path
        self._run = ""

    def _decision(self) -> Path:
        return self.path / "execution.json"

    def decided(self) -> str | None:
        if not self._decision().is_file():
            return None
        return str(self._specification(json.loads(self._decision().read_text()))["execution"])

    def decide(self, execution: str) -> str:
        if self.decided() is None:
            write_text(self._decision(), self._written({"execution": execution}), replace=False)
        return self.decided() or execution

    def _written(self, content: Mapping[str, Any]) -> str:
        return json.dumps(content, indent=1)

    def _begin(self, file: Path, specification: Mapping[str, Any]) -> None:
        write_text(file, self._written(specification), replace=False)

    def _specification(self, content: Any) -> Any:
        return content

    def open(self, specification: Mapping[str, Any]) -> Mapping[str, Any]:
        self._run = str(specification["digest"])
        file = self.path / self._file_of_run
        if not file.exists():
            if self.path.exists() and not self.path.is_dir():
                raise ValueError(f"out={str(self.path)!r} is a file; give a folder, new or of this very run")
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"out={str(self.path)!r} is a folder with other files; give one of its own to the run")
            self._begin(file, specification)
        try:
            found = self._specification(json.loads(file.read_text()))
            found["digest"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not the specification of a run; give another folder as out") from None
        return found

    def _check(self, k: int, run: object, path: Path) -> None:
        if run != self._run:
            raise ValueError(
                f"{path} is block {k} of another run, or was made by another version of it; delete it and call "
                f"run.do({k}), with workers that have the same code"
            )


@final
class Folder(AbstractFolder):
    """A safetensors file for each block, which gets its name when its bytes are on the disk."""

    def _file(self, k: int) -> Path:
        return self.path / f"block-{k:08d}.safetensors"

    def _part(self, k: int) -> Path:
        return self.path / f"part-{k:08d}.safetensors"

    def has(self, k: int) -> bool:
        return self._file(k).is_file()

    def keep(self, k: int, arrays: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        self._write(self._file(k), arrays, {"about": about, "block": k})
        self._part(k).unlink(missing_ok=True)

    def _write(self, path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        host = {name: checkpoints.on_host(value) for name, value in tensors.items()}
        checkpoints.write(path, host, {"kind": checkpoints.BLOCK, "fingerprint": {}, "run": self._run, **header})

    def read(self, k: int) -> Entry:
        tensors, header = checkpoints.read(self._file(k))
        self._check(k, header.get("run"), self._file(k))
        return tensors, header["about"]

    def keep_part(self, k: int, mark: str, tensors: dict[str, Tensor]) -> None:
        self._write(self._part(k), tensors, {"mark": mark})

    def read_part(self, k: int) -> tuple[str, dict[str, Tensor]] | None:
        if not self._part(k).is_file():
            return None
        try:
            tensors, header = checkpoints.read(self._part(k))
            self._check(k, header.get("run"), self._part(k))
        except ValueError:  # of another run, or damaged: begin the block again
            return None
        return header["mark"], tensors


@final
class Zarr(AbstractFolder):
    """A zarr group of arrays over paths, a chunk for each block.

    The specification of the run is an attribute of the group. A block is there when its marker is, which is written
    after its chunks are on the disk: an empty group in ``blocks`` whose attributes have their checksums.
    """

    _file_of_run = "zarr.json"

    def __init__(self, path: Path, paths: int, block: int) -> None:
        super().__init__(path)
        self._paths, self._block = paths, block
        try:
            import zarr  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
        except ImportError:
            raise ImportError(
                f"out={str(path)!r} is a zarr store, which needs zarr: pip install 'sdesolve[arrays]', or give a "
                "folder of another name, which is kept as safetensors"
            ) from None

    def _marker(self, k: int) -> Path:
        return self.path / "blocks" / f"{k:08d}" / "zarr.json"

    def _begin(self, file: Path, specification: Mapping[str, Any]) -> None:
        write_text(self.path / "blocks" / "zarr.json", _group({}))
        write_text(file, self._written(specification), replace=False)

    def _decision(self) -> Path:
        return self.path / "blocks" / "execution" / "zarr.json"

    def _written(self, content: Mapping[str, Any]) -> str:
        return _group({"sdesolve": content})

    def _specification(self, content: Any) -> Any:
        return content["attributes"]["sdesolve"]

    def has(self, k: int) -> bool:
        return self._marker(k).is_file()

    def keep(self, k: int, arrays: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        try:
            self._keep(k, arrays, about)
        except OSError as error:
            raise OSError(
                error.errno, f"could not write block {k} to {self.path} ({error.strerror or error}); zarr needs a file "
                "system with renames and hard links",
            ) from error  # fmt: skip

    def _keep(self, k: int, arrays: dict[str, Tensor], about: Mapping[str, Any]) -> None:
        group, sums = self._opened("a"), dict[str, int]()
        for name, value in arrays.items():
            if value.dtype == torch.bfloat16:
                raise TypeError(f"zarr keeps no bfloat16, and {name} is; give a folder of another name as out")
            rows = value.detach().cpu().numpy()
            whole = name.startswith("summary.")  # one for a block, in place of one for a path
            rows, first, axis = (rows[None], k, "block") if whole else (rows, k * self._block, "path")
            array = group.require_array(
                name,
                shape=(-(-self._paths // self._block) if whole else self._paths, *rows.shape[1:]),
                chunks=(1 if whole else self._block, *(max(n, 1) for n in rows.shape[1:])),
                dtype=rows.dtype,
                dimension_names=(axis, *(f"{name}_{axis}" for axis in range(1, rows.ndim))),
            )
            array[first : first + len(rows)] = rows
            sums[name] = zlib.crc32(rows.tobytes())
            self._flush(name, k)
        write_text(self._marker(k), _group({"about": about, "run": self._run, "checksums": sums}))

    def _flush(self, name: str, k: int) -> None:
        for folder, _, files in os.walk(self.path / name / "c" / str(k)):
            for file in files:
                with open(Path(folder) / file, "rb") as opened:
                    os.fsync(opened.fileno())

    def _opened(self, mode: Any) -> Any:
        import zarr

        return zarr.open_group(self.path, mode=mode)

    def read(self, k: int) -> Entry:
        try:
            marker = json.loads(self._marker(k).read_text())["attributes"]
        except (ValueError, KeyError, TypeError):
            raise checkpoints.damaged(self._marker(k), "it is no marker of a block") from None
        self._check(k, marker.get("run"), self._marker(k))
        group, tensors = self._opened("r"), dict[str, Tensor]()
        for name, checksum in marker["checksums"].items():
            rows, cause, whole, first = None, None, name.startswith("summary."), k * self._block
            try:
                rows = group[name][k : k + 1] if whole else group[name][first : min(first + self._block, self._paths)]
            except Exception as error:  # of whichever decoder finds out first
                cause = error
            if rows is None or zlib.crc32(rows.tobytes()) != checksum:
                raise ValueError(
                    f"block {k} of {name} in {self.path} is damaged: it does not match its checksum; run.do({k}) makes "
                    "it again"
                ) from cause
            tensors[name] = torch.from_numpy(rows).squeeze(0) if whole else torch.from_numpy(rows)
        return tensors, marker["about"]


def _group(attributes: Mapping[str, Any]) -> str:
    """What the file of a zarr group holds."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def store_of(out: str | os.PathLike[str] | None, paths: int, block: int) -> AbstractStore:
    """The store that ``out`` names."""
    if out is None:
        return Memory()
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out must be the path of a folder, or None for memory; got {short(out)}")
    path = Path(out)
    return Zarr(path, paths, block) if path.suffix == ".zarr" else Folder(path)


def write_text(path: Path, text: str, *, replace: bool = True) -> None:
    """Writes a file whole or not at all, and returns when it is on the disk; what is there stays, unless replaced."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _place(partial, path)
            partial.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {path} ({error.strerror or error})") from error


def _place(partial: Path, path: Path) -> None:
    """Gives a file its name unless there is one of that name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        if not path.exists():  # on a file system without links
            os.replace(partial, path)


@final
class BlockArray:
    """An array over all paths of a run that lies in blocks, and is read a block at a time.

    ``a[5]``, ``a[1000:2000]`` and ``a[index]`` read the blocks that they need; ``a.tensor()`` reads all.

    Args:
        blocks: of the run.
        name: of the array.

    Attributes:
        name: likewise.
        shape: ``(paths, ...)``.
        dtype: of its numbers.
    """

    def __init__(self, blocks: Blocks, name: str) -> None:
        self._blocks, self.name = blocks, name
        first = blocks.first[name]
        self.shape, self.dtype = (blocks.paths, *first.shape[1:]), first.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"BlockArray({self.name!r}, shape={self.shape}, dtype={self.dtype})"

    def __iter__(self) -> Iterator[Tensor]:
        for _, rows in self.blocks():
            yield from rows

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The number of the first path of each block that is there, and its rows."""
        for k in self._blocks.complete:
            yield k * self._blocks.block, self._blocks.read(k)[self.name]

    def tensor(self) -> Tensor:
        """All rows, in memory; only of a run whose blocks are all there."""
        return self[:]

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"path {index} of {len(self)}")
            return self[torch.tensor([index % len(self)])][0]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        if (
            not isinstance(index, Tensor)
            or index.ndim != 1
            or index.dtype not in (torch.bool, torch.int64, torch.int32)
        ):
            raise TypeError(f"rows are given by a number, a slice or a tensor of numbers, got {short(index)}")
        if index.dtype == torch.bool and len(index) != len(self):
            raise IndexError(f"a mask of {len(index)} for {len(self)} paths")
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        if index.numel() and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"paths {int(index.min())} to {int(index.max())} of {len(self)}")
        index = torch.where(index < 0, index + len(self), index)
        size = self._blocks.block
        made = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for k in (index // size).unique().tolist():
            here = index // size == k
            made[here] = self._blocks.read(k)[self.name][index[here] - k * size]
        return made


@final
class Blocks(Mapping[str, BlockArray]):
    """What a run has left: arrays by name, read from its blocks when they are asked for.

    Args:
        store: where they are.
        paths: as below, as are ``block`` and ``complete``.

    Attributes:
        paths: how many the run has.
        block: paths of a block.
        complete: numbers of the blocks that are there.
        ts: times of ``xs``, float64, where all paths have the same.
    """

    def __init__(self, store: AbstractStore, paths: int, block: int, complete: list[int]) -> None:
        self._store, self.paths, self.block, self.complete = store, paths, block, complete
        self.first, about = store.read(complete[0])
        ts = about.get("ts")
        self.ts = None if ts is None else torch.tensor(ts, dtype=torch.float64)
        self._last: tuple[int, dict[str, Tensor]] = (complete[0], self.first)

    def read(self, k: int) -> dict[str, Tensor]:
        """The arrays of a block."""
        if k not in self.complete:
            raise ValueError(f"block {k} is not there yet, with paths {k * self.block} and on; run() makes it")
        if self._last[0] != k:
            self._last = k, self._store.read(k)[0]
        return self._last[1]

    def __getitem__(self, name: str) -> BlockArray:
        if name not in self.first:
            raise KeyError(f"{name}; there are {', '.join(sorted(self.first))}")
        return BlockArray(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.first)

    def __len__(self) -> int:
        return len(self.first)
