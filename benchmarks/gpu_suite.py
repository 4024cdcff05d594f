"""The suite's problems, and its scaling, on a GPU: ensembles against peers, flows, likelihoods, samplers, training.

Noise and step kernels have sections of their own. Times are the host's, from an idle device to an idle device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.ensembles import ensemble, ensembles
from benchmarks.generative import generative
from benchmarks.gpu_device import Machine
from benchmarks.registry import BASELINE, Problem, compete, row
from benchmarks.scaling import memory, sweep

__all__ = ["contest", "contests", "scaling"]

Record = dict[str, Any]
_MANY = 1 << 23  # of the published runs


def contests(machine: Machine, quick: bool, tiny: bool) -> Iterator[tuple[Problem, set[str]]]:
    """Problems, and those of their contenders that take part."""
    device = machine.device
    if tiny:
        yield ensemble("linear", 256, 8, device), {"sdesolve eager", "torch loop"}
        return
    if quick:  # of each kind one, and of its contenders those that compile nothing
        some = (p for p in generative(device) if p.name.startswith(("likelihood", "DDIM", "training")))
        for problem in (ensemble("linear", 256, 8, device), *some):
            yield problem, set(problem.contenders) - {"torch.compile", "jax scan", "diffrax"}
        return
    yield ensemble("linear", _MANY, 256, device), {"torch loop", "limit: noise"}
    for problem in (*ensembles(device), *generative(device)):
        compiled = problem.name.startswith(("linear, 131072", "training"))  # half a minute each
        yield problem, set(problem.contenders) - (set() if compiled else {"torch.compile"})


def contest(
    machine: Machine, problem: Problem, names: set[str], quick: bool, missing: dict[str, str],
    refused: list[Record],
) -> Iterator[Record]:  # fmt: skip
    """A record for each contender that is there and right; the others go to `missing` and `refused`."""
    pace: dict[str, float] = {"rounds": 2, "most": 3, "seconds": 0.1} if quick else {"rounds": 4, "seconds": 2.0}
    outcomes = compete(problem, names, machine.synchronize, **pace, settle=0.0, lead=0.0, min_seconds=5e-3)
    for name, outcome in outcomes.items():
        if outcome.missing is not None:
            missing[name] = outcome.missing
        elif outcome.timing is None:
            refused.append({"case": problem.name, "problem": problem.name, "contender": name, "dtype": "float32",
                            "why": outcome.refused})  # fmt: skip
        else:
            found = row(problem, name, outcome.timing)
            yield {"section": "problems", "row": found, "stand_in": machine.stand_in or None}
    machine.release()


def scaling(machine: Machine, quick: bool, tiny: bool) -> Iterator[Record]:
    """Cost and peak memory against paths, steps and dimension."""
    contenders = (BASELINE,) if quick else (BASELINE, "torch loop")
    axes = ("paths",) if tiny else ("paths", "steps", "dimension")
    for record in sweep(machine.device, quick, machine.synchronize, contenders, axes):
        yield {"section": "scaling", **record}

    def peak(paths: int, width: int, steps: int) -> float:
        call = ensemble("ou", paths, steps, machine.device, width=width).contenders[BASELINE]()
        return 4.0 * paths * width + (machine.peak(call) or 0)

    if not machine.stand_in:
        for record in memory(quick, peak):
            yield {"section": "scaling", "of": "memory", **record}
