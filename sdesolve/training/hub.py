"""Scores from files alone, and folders of them on a hub."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sdesolve._internal.arguments import kind_of, short
from sdesolve.scores.network import NetworkScore
from sdesolve.training import checkpoints, recipes

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def save_pretrained(score: NetworkScore, folder: str | Path) -> None:
    """Writes a score to a folder as hubs keep models: weights and a recipe, ``model.safetensors`` and ``config.json``.

    Args:
        score: whose network is of `sdesolve.nn`, or `nn.rebuildable`.
        folder: made if it is not there.

    Raises:
        TypeError: ``score`` is no `NetworkScore`.
        ValueError: its network or process does not tell how it was made.
        OSError: it could not be written.
    """
    if not isinstance(score, NetworkScore):
        raise TypeError(f"score must be a NetworkScore, got {kind_of(score)}")
    recipe = recipes.described(score)
    if recipe is None:
        raise ValueError(
            f"this score has {recipes.unknown_part(score)}, which does not tell how it was made: decorate the class of "
            "a network with sdesolve.nn.rebuildable, or save(score, path) to load into a score that you make"
        )
    folder = Path(folder)
    checkpoints.save(score, folder / _WEIGHTS)
    text = json.dumps({"library_name": "sdesolve", "recipe": recipe}, indent=2, sort_keys=True)
    (folder / _CONFIG).write_text(text + "\n")


def load_score(
    path: str | Path, *, ema: float | None = None, networks: Sequence[type[nn.Module]] = (), **options: Any
) -> NetworkScore:
    """Makes the score that a file describes, with its weights, in evaluation mode.

    Args:
        path: a file of `save`, the folder or file of a training checkpoint, a folder of `save_pretrained`, or the name
            ``owner/model`` of one on a hub, for which huggingface_hub has to be installed.
        ema: which average, as for `load`.
        networks: classes of networks besides those of `sdesolve.nn` that the file may name (`nn.rebuildable`). Nothing
            else is looked up or run.
        options: for a name on a hub: what ``snapshot_download`` takes, such as ``revision``.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: the file does not say how its score was made, or names a class that is not known here; otherwise as
            `load`.
        ImportError: a name on a hub, without huggingface_hub.
    """
    given = str(path)
    path = Path(path)
    if not path.exists() and given.count("/") == 1 and not given.startswith((".", "/", "~")) and not path.suffix:
        hub = importlib.import_module("huggingface_hub")
        path = Path(hub.snapshot_download(given, allow_patterns=[_WEIGHTS, _CONFIG], **options))
    elif options:
        raise TypeError(f"load_score takes no {short(next(iter(options)))} for a file; it is for names on a hub")
    if path.is_dir():
        path = path / (_WEIGHTS if (path / _WEIGHTS).is_file() else checkpoints.TRAINING_FILE)
    _, header = checkpoints.read(path)
    if "recipe" not in header:
        raise ValueError(
            f"{path} does not say how its score was made: its network is none of sdesolve.nn nor decorated with "
            "nn.rebuildable, or its process is made of functions. Make the score as it was made, and load(score, path)"
        )
    try:
        score = recipes.made(header["recipe"], networks)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
    checkpoints.load(score, path, ema=ema)
    return score


def push_to_hub(score: NetworkScore, name: str, **options: Any) -> Any:
    """Uploads the folder of `save_pretrained` to ``owner/model`` on a hub; `load_score` takes that name.

    Args:
        score: as for `save_pretrained`.
        name: ``owner/model``; it is made if it is not there.
        options: what ``upload_folder`` takes, such as ``commit_message`` and ``token``; ``private`` for a new one.

    Raises:
        ImportError: huggingface_hub is not installed.
        TypeError, ValueError: as `save_pretrained`, before anything is sent.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(score, folder)
        hub = importlib.import_module("huggingface_hub")
        token = options.pop("token", None)
        hub.create_repo(name, exist_ok=True, private=options.pop("private", None), token=token)
        return hub.upload_folder(repo_id=name, folder_path=folder, token=token, **options)
