"""Every problem, and the figures that the project set itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch

from benchmarks.adaptive import adaptive
from benchmarks.ensembles import ensembles
from benchmarks.figures import SAMPLERS_BESIDE_A_NETWORK
from benchmarks.generative import generative
from benchmarks.gradients import gradients
from benchmarks.latent import latent
from benchmarks.matrix_noise import matrix_problems
from benchmarks.ops import noise_problems, step_problems
from benchmarks.products import product_problems
from benchmarks.registry import Problem
from benchmarks.schemes import schemes

__all__ = ["GOALS", "Goal", "problems"]


@functools.cache
def problems(device: str = "cpu") -> Mapping[str, Problem]:
    """By name."""
    where = torch.device(device)
    makers = (
        *(noise_problems, step_problems, matrix_problems, product_problems, ensembles, schemes, adaptive),
        *(gradients, latent, generative),
    )
    found = [problem for make in makers for problem in make(where)]
    by_name = {problem.name: problem for problem in found}
    if len(by_name) != len(found):
        raise ValueError("two problems share a name")
    return by_name


class Goal(NamedTuple):
    """``least`` times as fast as a contender, or with ``figure`` at most ``most`` of that figure.

    Attributes:
        text: what is wanted.
        problem: name of a problem or of a figure.
        contender: of the problem; for a figure, whose.
        least: smallest ratio of the contender's time to ours.
        most: greatest value of the figure, or nanoseconds per unit of the problem.
        why: shown if it is missed.
    """

    text: str
    problem: str
    contender: str
    least: float | None = None
    most: float | None = None
    why: str = ""


_IN_PLACE = "of 8 us, 1.5 are the kernel and its call; the rest is Python that checks shapes, dtypes and who records"
_CHECKS = "a call spends most of its time on checks of its arguments, in Python, whatever the size"
_SCAN = "XLA fuses the scan's body and draws its noise on all cores; what is left between us is the cost of a normal"
_TRAINING = "eager keeps the noise of its perturbation, ours makes it twice; the gain is memory, 1 tensor instead of 6"
_NETWORK = "matrix products and tanh of the network alone are two thirds of torchsde's time, in any loop"
_CACHES = "Python that runs right after a network finds the caches full"
_NOISE = "our time is that of drawing the normals, the limit beside it"
_FEW = f"{_NOISE}; with few paths the states of peers fit into a cache"

_PRODUCTS = (
    "multiply-adds at the processor's rate, the normals and tanh alone leave no room for it beside one thread of XLA"
)


def _goals() -> tuple[Goal, ...]:
    found = []
    for case, why in (
        ("euler_maruyama_step", ""), ("euler_maruyama_step/diagonal", ""), ("linear_step", ""),
        ("linear_step/two terms", ""), ("langevin_step/batch", ""), ("dsm_loss/noise drawn", ""),
        ("dsm_loss/training", _TRAINING),
    ):  # fmt: skip
        name = f"{case}, 4M float32"
        found.append(Goal(f"{case}, 4M elements: 3 x eager torch", name, "torch", least=3.0, why=why))
    for case in (
        "euler_maruyama_step", "euler_maruyama_step/diagonal", "euler_maruyama_step/in place", "linear_step",
        "linear_step/two terms", "langevin_step/fixed", "langevin_step/batch", "perturb", "dsm_loss/noise drawn",
        "dsm_loss/training",
    ):  # fmt: skip
        why = _IN_PLACE if case.endswith("in place") else _CHECKS
        found.append(Goal(f"{case}, 1k elements: no more than eager", f"{case}, 1k float32", "torch", 1.0, why=why))
    found.append(Goal("dsm_loss and gradient: tensors held at the peak", "peak of dsm_loss", "sdesolve", most=2.0))
    for paths in (8192, 131_072):
        name, few = f"linear, {paths} x 256", _FEW if paths == 8192 else _NOISE
        for peer, least, why in (
            ("torch loop", 8.0, few), ("torchsde", 40.0, few),
            ("diffrax", 25.0, few), ("jax scan", 25.0, _SCAN),
        ):  # fmt: skip
            found.append(Goal(f"linear SDE, {paths} paths: {least:g} x {peer}", name, peer, least, why=why))
        found.append(Goal(f"linear SDE, {paths} paths: ns per component-step", name, "sdesolve", most=0.6,
                          why="a call costs 0.4 ms round its kernel"))  # fmt: skip
    for label, name in (
        ("bacterial stress response", "stress, 6720 x 200"), ("Heston", "heston, 6720 x 256"),
        ("Lotka-Volterra", "lotka-volterra, 6720 x 500"), ("Lorenz", "lorenz, 6720 x 500"),
        ("reverse SDE of a mixture", "mixture, 6720 x 256"),
    ):  # fmt: skip
        found.append(Goal(f"{label}: 5 x the eager loop", name, "sdesolve eager", least=5.0))
    for scheme, theirs, peer, least in (
        ("SRIW2", "srk", "torchsde", 15.0), ("ShARK", "ShARK", "diffrax", 10.0), ("SPaRK", "SPaRK", "diffrax", 10.0),
    ):  # fmt: skip
        found.append(Goal(f"{scheme}: {least:g} x {peer}", f"{scheme} beside {theirs}, 8192 x 64", peer, least))
    lotka, heston = "lotka-volterra gradient, 4096 x 500", "heston gradient, 4096 x 100"
    found.append(Goal("Lotka-Volterra, value and gradient: ns per path-step", lotka, "sdesolve", most=4.0))
    for peer, least in (("jax scan", 6.0), ("torch loop", 15.0), ("torchsde", 25.0), ("torchsde reversible", 45.0)):
        found.append(Goal(f"Lotka-Volterra, value and gradient: {least:g} x {peer}", lotka, peer, least))
    # A value alone is to take a share of the time: at least the 3.2nd part.
    found.append(Goal("Lotka-Volterra: the value alone over value and gradient", lotka, "value alone", 1 / 3.2))
    found.append(Goal("Heston, value and gradient: 4 x a JAX scan", heston, "jax scan", 4.0))
    share = "matrix products in kernels: share of the processor's multiply-adds"
    found.append(Goal(share, "x A alone, 64 dimensions, 4096 x 64", "limit: multiply-adds", least=0.6))
    for name, least in (
        ("x A, 64 dimensions, 4096 x 64", 4.0), ("network 4-64-4, 4096 x 128", 4.0),
        ("network 16-128-16, 4096 x 64", 2.5), ("24 particles with pair forces, 1024 x 32", 5.0),
    ):  # fmt: skip
        found.append(Goal(f"{name}: {least:g} x a JAX scan", name, "jax scan", least, why=_PRODUCTS))
    found.append(Goal("one path: ns a step, all told", "one path, 2 dimensions, 16384 steps", "sdesolve", most=40.0))
    trained = "latent SDE, 512 x 200"
    found.append(Goal("latent SDE of torchsde's example: 2 x torchsde", trained, "torchsde", 2.0, why=_NETWORK))
    return (
        *found,
        Goal("16 paths: us per step, all told", "16 paths, a step", "sdesolve", most=5.0),
        Goal("final-state run: tensors held at the peak", "peak of a run, 64 steps", "sdesolve", most=3.0),
        # A step in torch, on all rows, is what a kernel is compared with: eager runs hold 6.
        Goal("its first run for a size of batch", "peak of a first run, 64 steps", "sdesolve", most=9.0),
        Goal("first call: s", "first call", "sdesolve", most=5.0),
        Goal("first call of SRIW1: s", "first call", "SRIW1", most=5.0),
        Goal("first call of a later process: s", "first call", "sdesolve, kernel on disk", most=0.2),
        Goal("solve over its kernel, 1M paths", "solve over its kernel", "sdesolve", most=1.2),
        *(
            Goal(f"{who} over its network, 64 images", "sampler over its network", who, most=1.03, why=_CACHES)
            for who in SAMPLERS_BESIDE_A_NETWORK
        ),
        Goal("import sdesolve over import torch", "import over torch's", "sdesolve", most=1.2),
    )


GOALS = _goals()
