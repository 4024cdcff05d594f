"""Schroedinger bridges between two samples, by iterative Markovian fitting."""

from __future__ import annotations

from typing import Any

import torch
from sdesolve_kernels import Stream, words
from torch import Tensor

from sdesolve._internal.arguments import kind_of, whole_number
from sdesolve.flows.interpolant import FlowModel
from sdesolve.flows.sde import FlowSDE
from sdesolve.integrate.solve import solve
from sdesolve.solvers.heun import Heun
from sdesolve.training.flow_matching import FlowMatching, Pairing
from sdesolve.training.losses import check_data
from sdesolve.training.train import TrainingResult, train


def fit_bridge(
    model: FlowModel,
    source: Tensor,
    target: Tensor,
    *,
    rounds: int,
    steps: int,
    pairing: Pairing = "independent",
    solver_steps: int = 50,
    seed: int = 0,
    **options: Any,
) -> list[TrainingResult]:
    r"""Trains ``model`` to be the Schroedinger bridge between two samples, in place.

    The bridge, nearest to ``noise W`` of all processes from source to target, is the one that is a mixture of Brownian
    bridges and a Markov process at once. Each round makes the mixture for its pairs of ends Markov (`FlowMatching`),
    and pairs the ends anew by what the SDE ``FlowSDE(model, noise)`` makes of the source forwards and of the target
    backwards: iterative Markovian fitting (Shi et al. 2023, DSBM; Peluchetti 2023). One model gives both directions,
    and half of the pairs come from either, so that neither end drifts.

    Args:
        model: along ``StochasticInterpolant(noise)``, with ``noise`` the volatility of the reference process.
        source: samples ``(n, *state)`` of the law at ``t = 0``.
        target: samples ``(m, *state)`` of the law at ``t = 1``.
        rounds: how often ends are paired, at least 1. The first pairs are those of ``pairing``.
        steps: of training in each round.
        pairing: ``"independent"``, or ``"entropic"`` to begin near the bridge.
        solver_steps: of the SDE between the rounds, by `Heun`.
        seed: of all randomness.
        **options: of `train`, such as ``lr`` and ``batch_size``.

    Returns:
        The result of each round's training.

    Raises:
        TypeError: an argument of another type.
        ValueError: an interpolant of another kind, pairs of another kind; what `train` refuses.
    """
    if not isinstance(model, FlowModel):
        raise TypeError(f"model must be a FlowModel, got {kind_of(model)}")
    noise = model.interpolant.noise
    if not noise or not model.interpolant.is_bridge:
        raise ValueError(
            "a Schroedinger bridge is made of Brownian bridges: train along StochasticInterpolant(noise), with noise "
            "above 0 and the alpha and beta that it has by default"
        )
    if pairing not in ("independent", "entropic"):
        raise ValueError(f"pairing must be 'independent' or 'entropic', got {pairing!r}: rounds make the other pairs")
    check_data(source)
    check_data(target)
    source = source.to(target)
    rounds, solver_steps = whole_number(rounds, "rounds", 1), whole_number(solver_steps, "solver_steps", 1)
    results = [train(model, target, loss=FlowMatching(source, pairing), steps=steps, seed=seed, **options)]
    for k in range(1, rounds):
        ahead, back, own = words(1, 3, seed=seed, stream=Stream.PAIRING, offset=_SEEDS_AT + 4 * k, device="cpu")[
            0
        ].tolist()
        run: dict[str, Any] = {"steps": solver_steps, "solver": Heun(), "backend": "eager"}
        with torch.no_grad():
            end = solve(FlowSDE(model, noise), source, 0.0, 1.0, seed=ahead, **run).x1
            start = solve(FlowSDE(model, noise), target, 1.0, 0.0, seed=back, **run).x1
        pairs = torch.cat([torch.stack([source, end], 1), torch.stack([start, target], 1)])
        results.append(train(model, pairs, loss=FlowMatching(pairing="given"), steps=steps, seed=own, **options))
    return results


_SEEDS_AT = 1 << 21  # in the sequence of path 0, beyond what pairs and sources take
