"""``python -m sdesolve``: runs of a specification file, and whether this installation is sound."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

import sdesolve
from sdesolve import diagnostics
from sdesolve._internal.arguments import short

_TASKS = {"solve": None, "draws": "Draws", "chains": "Chains"}
_EXAMPLE = (
    '{"solve": {"sde": {"Heston": {"rate": 0.02, ...}}, "x0": [[1.0, 0.04]], "t0": 0, "t1": 1, "steps": 250, '
    '"solver": {"EulerMaruyama": {}}, "seed": 0}, "paths": 100000, "block": 65536, "reduce": "moments", "out": "run/"}'
)


def built(value: Any) -> Any:
    """What a value of a specification stands for.

    ``{"Name": {argument: value}}``, with the name of a public class, is an object of it; a list of numbers, or of lists
    of numbers, a tensor where an argument is one; all else is itself. Nothing else is looked up, and nothing is run.

    Args:
        value: from JSON.

    Raises:
        ValueError: no public class has that name, or it refuses the arguments.
    """
    if isinstance(value, list):
        return [built(v) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value))[:1].isupper():
        return {name: built(v) for name, v in value.items()}
    ((name, arguments),) = value.items()
    found = (getattr(module, name, None) for module in (sdesolve, sdesolve.models, sdesolve.mcmc))
    kind = next(filter(inspect.isclass, found), None)
    if kind is None:
        names = [n for n in (*sdesolve.__all__, *sdesolve.models.__all__) if n[:1].isupper()]
        near = difflib.get_close_matches(name, names, 3)
        raise ValueError(f"{name} is no public class of sdesolve{'; did you mean ' + ', '.join(near) if near else ''}")
    try:
        if isinstance(arguments, dict):
            return kind(**{n: built(v) for n, v in arguments.items()})
        return kind(*map(built, arguments if isinstance(arguments, list) else [arguments]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None


def ensemble_of(said: Any, out: str | None = None) -> sdesolve.Ensemble:
    """The run that a specification says.

    Args:
        said: the content of the file.
        out: where blocks are kept, in place of what it says.

    Raises:
        ValueError: it says something else than a run.
    """
    tasks = [name for name in _TASKS if isinstance(said, dict) and name in said]
    if len(tasks) != 1:
        raise ValueError(f"a specification has one of {', '.join(_TASKS)}, such as {_EXAMPLE}; got {short(said)}")
    rest = {name: value for name, value in said.items() if name not in _TASKS}
    arguments = {name: built(value) for name, value in said[tasks[0]].items()}
    dtype = getattr(torch, str(arguments.pop("dtype", "float32")), None)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError('dtype must be "float32" or "float64"')
    for name in ("x0", "params"):
        if isinstance(arguments.get(name), list | float | int):
            arguments[name] = torch.tensor(arguments[name], dtype=dtype)
    options = {"paths": rest.pop("paths", None), "out": out or rest.pop("out", None)}
    rest.pop("out", None)
    options |= {name: rest.pop(name) for name in ("block", "segments") if name in rest}
    if "reduce" in rest:
        options["reduce"] = built(rest.pop("reduce"))
    if rest:
        raise ValueError(
            f"a specification has no {', '.join(sorted(rest))}; it has {', '.join(options)}, block, reduce"
        )
    try:
        if tasks[0] == "solve":
            return sdesolve.ensemble(arguments.pop("sde", None), **arguments, **options)
        kind = getattr(sdesolve, str(_TASKS[tasks[0]]))
        law = arguments.pop("data", None)
        if law is not None:
            arguments["score"] = law.score(arguments["process"])
        if isinstance(arguments.get("score"), str):
            arguments["score"] = sdesolve.load_score(arguments["score"])
        if isinstance(arguments.get("shape"), list):
            arguments["shape"] = tuple(arguments["shape"])
        return sdesolve.ensemble(kind(**arguments), **options)
    except TypeError as error:
        raise ValueError(str(error)) from None


def run(file: str, out: str | None) -> int:
    """Does what is missing of the run of a file, and prints what it has left."""
    try:
        ensemble = ensemble_of(json.loads(Path(file).read_text()), out)
    except (OSError, ValueError, ImportError) as error:
        print(f"{file}: {error}", file=sys.stderr)
        return 2
    print(ensemble)
    ensemble(progress=sys.stderr.isatty())
    left = ensemble.missing()
    if left:
        print(f"{len(left)} of {ensemble.blocks} blocks are left to other processes")
        return 0
    result = ensemble.result()
    if isinstance(result, sdesolve.ensembles.Blocks):
        for array in result.values():
            print(array)
    else:
        print(result)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sdesolve", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="do what is missing of the run of a specification file")
    runs.add_argument("file", help=f"JSON such as {_EXAMPLE}".replace("%", "%%"))
    runs.add_argument("--out", help="where blocks are kept, in place of what the file says")
    commands.add_parser("doctor", help="versions, caches, and whether kernels agree with plain torch")
    given = parser.parse_args(arguments)
    return run(given.file, given.out) if given.command == "run" else diagnostics.doctor()


if __name__ == "__main__":
    sys.exit(main())
