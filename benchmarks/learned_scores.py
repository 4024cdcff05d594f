"""Learned scores against exact ones: ``PYTHONPATH=.:kernels python benchmarks/learned_scores.py``.

One recipe for all targets, in two and in sixteen dimensions: `learn` below. Its score ``s`` is compared with the exact
``s*`` of the same law of data,

- by the relative Fisher error ``E|s - s*|^2 / E|s*|^2`` at each time, averaged over times spread evenly between
  ``t_min`` and ``t_max``, and, harder, over times spread evenly in log-SNR, where low noise counts for more;
- by the sliced Wasserstein-2 distance between samples of 35 evaluations and data, beside what the same sampler reaches
  with the exact score from the same start, and beside the distance of two sets of data: the floor. All sets have
  ``SAMPLES`` entries; distances are root mean squares over ``DRAWS`` sets of samples, each against ``TRUTHS`` of data.

The last targets are of a continuous condition ``c``: states and conditions are jointly a mixture, the exact score is
that of the law of ``x`` given each row's ``c``, errors are means over ``c`` too, and distances those of pairs.

Another law of data is one entry in `targets`, or `measure(my_data, seed)`. A run that was stopped goes on from the rows
that it wrote; ``--fresh`` starts again. ``--quick`` is a smoke test: two targets, a tenth of the steps, no file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sdesolve_kernels import normal
from torch import Tensor

import sdesolve as sds
from sdesolve.scores.base import AbstractData
from sdesolve.training.losses import LogNormalNoise

RESULTS = Path(__file__).parent / "results"
PROCESS = sds.VP()
STEPS, PAIRS, TRAINING_SAMPLES = 8000, 256, 1 << 20
SEEDS = (0, 1)
SAMPLES, DRAWS, TRUTHS, EVALUATIONS = 10_000, 3, 8, 35
TIMES, STATES = 50, 1000
FISHER_LIMIT, CONDITIONAL_LIMIT, DISTANCE_LIMIT = 0.02, 0.01, 1.5


@dataclasses.dataclass(frozen=True)
class Conditional:
    """``x`` given ``c``, where ``(x, c)`` are jointly a Gaussian mixture; ``c`` are the last ``conditions`` numbers."""

    joint: sds.GaussianMixture
    conditions: int

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.joint.state_shape[0] - self.conditions,)

    def sample(self, n: int, **options: Any) -> Tensor:
        return self.joint.sample(n, **options)

    def score(self, c: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact ``grad_x log p_t(x | c)``: noise in ``x`` alone, so that of component ``k`` has blocks of both."""
        d, joint, eye = self.state_shape[0], self.joint, torch.eye(self.state_shape[0], dtype=torch.float64)
        means, covs = joint.means.double(), joint.covs.double()

        def score(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = float(PROCESS.alpha(t)), float(PROCESS.sigma(t))
            scale = torch.tensor([alpha] * d + [1.0] * self.conditions, dtype=torch.float64)
            C = covs * scale[:, None] * scale
            C[:, :d, :d] += sigma**2 * eye
            r = torch.cat([x, c], 1).double() - scale * means[:, None]  # (components, batch, d + conditions)
            solved = torch.linalg.solve(C, r.mT).mT
            log_p = joint.weights.log()[:, None] - 0.5 * (torch.logdet(C)[:, None] + (r * solved).sum(2))
            return -(log_p.softmax(0)[..., None] * solved[..., :d]).sum(0).to(x.dtype)

        return score


def targets() -> dict[str, AbstractData | Conditional]:
    angle = torch.arange(8) * (math.pi / 4)
    ring = 2.0 * torch.stack([angle.cos(), angle.sin()], dim=1)
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    needles = torch.stack([_spread(turn, 0.5, 0.01), _spread(turn.mT, 0.3, 0.02), 0.2 * torch.eye(2)])
    places = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.5, -1.5]])
    frames = [torch.linalg.qr(_draws(k, 16, 16)).Q for k in range(7)]
    wide = torch.exp(torch.linspace(math.log(0.04), math.log(0.6), 16))
    clouds = torch.stack([_spread(frame, *wide.tolist()) for frame in frames[1:]])
    return {
        "2-d Gaussian, variances 1.5 and 0.02": sds.Gaussian(torch.tensor([1.0, -1.0]), _spread(turn, 1.5, 0.02)),
        "2-d mixture, 8 unequal modes on a ring": sds.GaussianMixture(ring, 0.15, weights=torch.arange(1.0, 9.0)),
        "2-d mixture, 3 ellipses of different shapes": sds.GaussianMixture(places, covs=needles),
        "16-d Gaussian, spectrum k^-1.5": sds.Gaussian(
            0.5 * _draws(8, 16), _spread(frames[0], *torch.arange(1.0, 17.0).pow(-1.5).tolist())
        ),
        "16-d mixture, 6 correlated modes": sds.GaussianMixture(
            1.2 * _draws(7, 6, 16), covs=clouds, weights=torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        ),
        "2-d mixture of 4 modes, given 1 number": conditional(1),
        "2-d mixture of 4 modes, given 2 numbers": conditional(2),
    }


def conditional(conditions: int) -> Conditional:
    """Modes that move, tilt and change their weights with the condition."""
    means = torch.cat([1.2 * _draws(9, 4, 2), 0.7 * _draws(10, 4, conditions)], 1)
    frames = torch.linalg.qr(_draws(11, 4, 2 + conditions, 2 + conditions)).Q
    variances = torch.tensor([0.6, 0.05, 0.3, 0.15][: 2 + conditions])
    covs = frames @ torch.diag(variances) @ frames.mT
    return Conditional(sds.GaussianMixture(means, covs=covs, weights=torch.tensor([1.0, 2.0, 2.0, 3.0])), conditions)


def _spread(axes: Tensor, *variances: float) -> Tensor:
    return axes @ torch.diag(torch.tensor(variances)).to(axes) @ axes.mT


def _draws(seed: int, *shape: int) -> Tensor:
    return normal(1, math.prod(shape), seed=seed, stream=221, dtype=torch.float32).reshape(shape)


def learn(
    data: AbstractData | Conditional, seed: int, steps: int = STEPS
) -> tuple[sds.NetworkScore, sds.TrainingResult]:
    """The recipe: `MLP` under EDM preconditioning, mirrored noise, cosine decay, averaged weights."""
    x, c = split(data, data.sample(TRAINING_SAMPLES, seed=1000 + seed))
    torch.manual_seed(seed)
    phi = sds.nn.FourierFeatures.log_spaced(32, 0.5, 16.0)
    net = sds.nn.MLP(data.state_shape, width=128, depth=3, embedding=phi, values=c.shape[1])
    score = sds.NetworkScore(net, PROCESS, "edm", sigma_data=float((x - x.mean(0)).square().mean().sqrt()))
    loss = sds.DenoisingScoreMatching("simple", times="stratified", law=LogNormalNoise(-1.2, 1.6), antithetic=True)
    options: dict[str, Any] = {"batch_size": PAIRS, "lr": 4e-3, "decay": "cosine", "ema": 0.997}
    pairs = {"x": x, "values": c} if c.numel() else x
    return score, sds.train(score, pairs, loss=loss, steps=steps, seed=seed, progress=False, **options)


def split(data: AbstractData | Conditional, x: Tensor) -> tuple[Tensor, Tensor]:
    """States, and conditions (none of them for laws without)."""
    states = data.state_shape[0]
    return x[:, :states], x[:, states:]


def both(score: Any, data: AbstractData | Conditional, c: Tensor) -> tuple[Any, Any]:
    """The score under the conditions, and the exact one."""
    if isinstance(data, Conditional):
        return score.given(values=c.float()), data.score(c)
    return score, data.score(PROCESS)


def fisher_errors(score: Any, data: AbstractData | Conditional, times: Tensor) -> Tensor:
    """Relative Fisher errors at ``times``, each from `STATES` noised samples, ``(times,)``."""
    errors = []
    with torch.no_grad():
        for k, t in enumerate(times):
            x0, c = split(data, data.sample(STATES, seed=2000 + k, dtype=torch.float64))
            learned, exact = both(score, data, c)
            z = normal(STATES, x0[0].numel(), seed=3000 + k, stream=222, dtype=torch.float64).reshape(x0.shape)
            x = PROCESS.alpha(t) * x0 + PROCESS.sigma(t) * z
            truth = exact(x, t)
            errors.append((learned(x.float(), t).double() - truth).square().sum() / truth.square().sum())
    return torch.stack(errors)


def distances(score: Any, data: AbstractData | Conditional) -> dict[str, float]:
    """Sliced Wasserstein-2 distances to data: of samples by both scores, and of data, the floor."""
    grid = sds.grids.karras_sigma(PROCESS, EVALUATIONS - 1)  # the denoising at its end is one evaluation more
    shape = (SAMPLES, *data.state_shape)
    truths = [data.sample(SAMPLES, seed=4000 + k) for k in range(TRUTHS)]
    squares: dict[str, list[float]] = {"learned": [], "exact": [], "floor": []}
    for k in range(DRAWS):
        drawn = {"floor": data.sample(SAMPLES, seed=5000 + k)}
        c = split(data, data.sample(SAMPLES, seed=7000 + k))[1]
        for name, s in zip(("learned", "exact"), both(score, data, c), strict=True):
            x = sds.sample(PROCESS, s, shape, solver=sds.DPMSolverPP(order=2), grid=grid, seed=6000 + k)
            drawn[name] = torch.cat([x, c], 1)
        for name, x in drawn.items():
            squares[name] += [float(sds.metrics.sliced_wasserstein(x, y, projections=64)) ** 2 for y in truths]
    return {name: math.sqrt(sum(values) / len(values)) for name, values in squares.items()}


def measure(data: AbstractData | Conditional, seed: int, steps: int = STEPS) -> dict[str, float]:
    started = time.process_time()
    score, run = learn(data, seed, steps)
    seconds = time.process_time() - started
    share = (torch.arange(TIMES, dtype=torch.float64) + 0.5) / TIMES
    high, low = (float(PROCESS.log_snr(t)) for t in (PROCESS.t_min, PROCESS.t_max))
    even = PROCESS.t_min + (PROCESS.t_max - PROCESS.t_min) * share
    in_log_snr = fisher_errors(score, data, PROCESS.time_at_log_snr(high + (low - high) * share))
    found = distances(score, data)
    return {
        "cpu_seconds": seconds,
        "pairs_seen": float(run.samples),
        "fisher_over_t": float(fisher_errors(score, data, even).mean()),
        "fisher_over_log_snr": float(in_log_snr.mean()),
        "fisher_worst": float(in_log_snr.max()),
        **found,
        "ratio": found["learned"] / found["exact"],
    }


def table(rows: dict[str, dict[str, dict[str, float]]], steps: int = STEPS) -> str:
    """Means over the seeds, with the worst of them in brackets."""
    lines = [
        "# Learned scores against exact ones",
        "",
        "Made by `python benchmarks/learned_scores.py`, whose head says what the columns are. Means over seeds (and "
        f"the worst of them). One recipe: {steps} steps of {PAIRS} pairs on VP; CPU seconds on one thread. Distances "
        f"are of {SAMPLES} samples. Aims: Fisher error over t at most {FISHER_LIMIT:.0%} "
        f"({CONDITIONAL_LIMIT:.0%} with a condition), ratio at most {DISTANCE_LIMIT}.",
        "",
        "| target | seeds | CPU s | Fisher error over t | over log-SNR | learned | exact score | floor | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in rows.items():
        columns = {key: [row[key] for row in by_seed.values()] for key in next(iter(by_seed.values()))}
        mean = {key: sum(values) / len(values) for key, values in columns.items()}
        worst = {key: max(values) for key, values in columns.items()}
        fisher = [f"{mean[key]:.2%} ({worst[key]:.2%})" for key in ("fisher_over_t", "fisher_over_log_snr")]
        lengths = [f"{mean[key]:.4f}" for key in ("learned", "exact", "floor")]
        ratio = f"{mean['ratio']:.2f} ({worst['ratio']:.2f})"
        cells = [name, str(len(by_seed)), f"{mean['cpu_seconds']:.0f}", *fisher, *lengths, ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--fresh", action="store_true", help="do not go on from the rows of an earlier run")
    parser.add_argument("--only", default="", help="the targets whose names hold this, such as 16-d")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    laws = {name: data for name, data in targets().items() if arguments.only in name}
    if arguments.quick:
        few = list(laws.items())[1::3] or list(laws.items())
        print(table({name: {"0": measure(data, 0, STEPS // 10)} for name, data in few}, STEPS // 10))
        return
    file = RESULTS / "learned_scores.json"
    rows = json.loads(file.read_text()) if file.exists() and not arguments.fresh else {}
    for seed in arguments.seeds:
        for name, data in laws.items():
            by_seed = rows.setdefault(name, {})
            if str(seed) not in by_seed:
                by_seed[str(seed)] = measure(data, seed)
                file.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"{name}, seed {seed}: {by_seed[str(seed)]}", flush=True)
    (RESULTS / "learned_scores.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
