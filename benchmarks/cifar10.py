"""The CIFAR-10 protocol of Song et al. 2021, for those who have its files: ``python -m benchmarks.cifar10 --folder F``.

The setting of the published FID of 2.20 (table 3, NCSN++ of double depth on VE; ``--family ddpm++`` is DDPM++ of double
depth on VP) with the library's parts: AdamW at 2e-4 with 5,000 steps of warm-up, 950,000 steps, batches of 128 with
mirrored images, dropout 0.1, averaged weights of decay 0.999 (VE) or 0.9999 (VP); 50,000 draws by 1,000 steps of
reverse diffusion, each with one of a Langevin corrector, and a last denoising step.

What differs: the network is this library's U-Net at their widths and depths, under EDM's preconditioning, without
NCSN++'s progressive inputs and filtered resampling. Pixels are on [-1, 1] for both, so that VE has twice their noise
levels, the same process in other units. The published 2.41 of DDPM++ is by Euler-Maruyama without a corrector.

Draws are compared with the 50,000 images learned from, as published. With ``--inception FILE``, a TorchScript of the
Inception network that FID is defined by, called as ``net(uint8 images, return_features=True)``, the distance is the
FID; without it, it is in the features of `benchmarks.images` and is not. Beside it are the distances of as many draws
as there are test images, and of test images. Everything goes on where a stopped call left it.

The files are those of the archive ``cifar-10-python``, read without running anything that they hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sdesolve as sds
from benchmarks.image_data import Images, cifar10
from benchmarks.images import ImageNet, Judge, Pooled, Recipe, Results, draws, learn, make_score
from sdesolve import plotting

VALUES = sds.Quantisation.inclusive(256, -1.0, 1.0)
PUBLISHED = Recipe(128, (1, 2, 2, 2), 8, 0.1, 128, 950_000, 2e-4, 0.999, 5000, "constant", (16,))
TINY = Recipe(4, (1, 1), 1, 0.0, 4, 2, 2e-4, 0.9, 1, "constant", ())


class Family(NamedTuple):
    """A process and how it is learned and drawn from."""

    process: Any
    ema: float
    snr: float
    """Of the corrector (Song et al. 2021, appendix G)."""


FAMILIES = {
    "ncsn++": Family(sds.VE(0.02, 100.0), 0.999, 0.16),
    "ddpm++": Family(sds.VP(sds.LinearBeta(0.1, 20.0)), 0.9999, 0.01),
}


class Script:
    """Features by a TorchScript file."""

    def __init__(self, file: Path, device: torch.device) -> None:
        self.name, self.device = f"{file.name}, the distance is the FID if this is its Inception", device
        self.net = torch.jit.load(str(file), map_location=device).eval()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        return self.net(VALUES.quantise(x.clamp(-1, 1)).byte().to(self.device), return_features=True).float().cpu()


def measure(images: Images, options: argparse.Namespace) -> dict[str, Any]:
    """Learns, draws and compares; what the folder has already is not done again."""
    device, family = torch.device(options.device), FAMILIES[options.family]
    recipe = TINY if options.tiny else dataclasses.replace(PUBLISHED, ema=family.ema, steps=options.steps)
    folder = options.out / (options.family + "-tiny" * options.tiny)
    folder.mkdir(parents=True, exist_ok=True)
    x = VALUES.value(images.learned.long()).to(device)
    data = torch.cat([x, x.flip(-1)])
    score = make_score(recipe, data, family.process)
    loss = sds.DenoisingScoreMatching("sigma2", "stratified")
    learn(score, data, recipe, folder / "training", None if options.float32 else torch.bfloat16, loss)
    solver = sds.PredictorCorrector(sds.ReverseDiffusion(), sds.LangevinCorrector(snr=family.snr), 1)
    grid = family.process.time_grid(options.solver_steps)
    drawn = draws(score, tuple(x.shape[1:]), options.draws, solver, grid, folder / "draws", options.block)
    features: Any = Pooled() if options.tiny else ImageNet(device)
    if options.inception is not None:
        features = Script(options.inception, device)
    setting = {
        "family": options.family, "parameters": sum(p.numel() for p in score.parameters()), "steps": recipe.steps,
        "solver_steps": options.solver_steps, "draws": options.draws, "features": features.name,
    }  # fmt: skip
    results = Results(folder / "results.json", setting)
    # The images learned from are what is compared with, the test images what other real ones score.
    judge = Judge(Images(images.name, images.held, images.learned), features, len(images.held), folder, device)
    few = min(len(images.held), options.draws)
    results.keep("distances", "all draws", lambda: judge.row(drawn))
    results.keep("distances", "as many draws as test images", lambda: judge.row(drawn[:few]))
    results.keep("distances", "real images", lambda: judge.floor(few))
    plotting.image_grid(drawn[:100], value_range=(-1, 1)).savefig(folder / "images.png")
    return results.found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--folder", type=Path, required=True, help="folder of data_batch_1 ... 5 and test_batch")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="ncsn++")
    parser.add_argument("--out", type=Path, default=Path("outputs/cifar10"))
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--steps", type=int, default=PUBLISHED.steps, help="of training")
    parser.add_argument("--solver-steps", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--block", type=int, default=1000, help="draws that are made at once")
    parser.add_argument("--inception", type=Path, help="TorchScript file of the features of FID")
    parser.add_argument("--float32", action="store_true", help="train in 32 bits, not in bfloat16 with float32 weights")
    parser.add_argument("--tiny", action="store_true", help="a network of nothing, to try the script")
    options = parser.parse_args(arguments)
    print(json.dumps(measure(cifar10(options.folder), options), indent=1))


if __name__ == "__main__":
    main()
