"""Typical loops around a sampler, each a function of at most 30 lines: run them, or take them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sdesolve as sds

DATA = sds.GaussianMixture(torch.tensor([[-2.0, -2.0], [2.0, 2.0]]), torch.tensor([0.05, 0.05]))


def inpainting(images: Tensor, seen: Tensor, score: Any, steps: int = 200) -> Tensor:
    """Predictor-corrector with a mask per image: what is seen is overwritten with its own noised values (score_sde)."""
    process = score.process
    solver = sds.PredictorCorrector(sds.ReverseDiffusion(), sds.LangevinCorrector(snr=0.16))

    def keep(step: sds.SamplingStep) -> Tensor:
        known = process.marginal(images, step.t_next)
        z = torch.randn(images.shape, generator=torch.Generator().manual_seed(step.index))
        return torch.where(seen, known.mean + known.std * z, step.x_next)

    x = sds.sample(process, score, images.shape, solver=solver, steps=steps, seed=0, callback=keep)
    return torch.where(seen, images, x)


def image_to_image(images: Tensor, score: Any, strength: float = 0.6, steps: int = 40) -> Tensor:
    """Noise up to a time, and sample from there (SDEdit)."""
    process = score.process
    t = process.t_min + strength * (process.t_max - process.t_min)
    m = process.marginal(images, t)
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return sds.sample(process, score, x0=m.mean + m.std * z, from_time=t, solver=sds.DPMSolverPP(2), steps=steps)


def inversion(images: Tensor, score: Any, steps: int = 100) -> tuple[Tensor, Tensor]:
    """The noise that the flow leads back to an image, and that image again: a round trip."""
    flow, grid = score.process.probability_flow(score), score.process.time_grid(steps)
    latent = sds.solve(flow, images, grid=grid.flip(0), solver=sds.RK4()).x1
    return latent, sds.solve(flow, latent, grid=grid, solver=sds.RK4()).x1


def settled(score: Any, shape: tuple[int, ...], tolerance: float = 0.05) -> tuple[Tensor, int]:
    """Samples, from a run that stops when the denoised estimate no longer changes, and how many steps it took."""
    before: list[Tensor] = []

    def watch(step: sds.SamplingStep) -> None:
        if before and (step.denoised - before[-1]).abs().mean() < tolerance and step.t < 0.5:
            step.stop()
        before.append(step.denoised)

    process, solver = score.process, sds.DPMSolverPP(2)
    sol = sds.sample(process, score, shape, solver=solver, steps=60, seed=0, callback=watch, full=True)
    return sol.x1, sol.stats.steps


def fine_tune(score: sds.NetworkScore, reward: Callable[[Tensor], Tensor], rounds: int = 30) -> list[float]:
    """DDPO (Black et al. 2024): policy gradients through the steps of a sampler; the mean reward of each round."""
    process, solver, rewards = score.process, sds.DDIM(1.0), list[float]()
    optimizer = torch.optim.Adam(score.parameters(), 3e-3)
    for round_ in range(rounds):
        options = {"solver": solver, "steps": 12, "seed": round_, "denoise": False}
        sol = sds.sample(process, score, (256, 2), save_at="grid", full=True, **options)
        r = reward(sol.x1)
        rewards.append(float(r.mean()))
        advantage = (r - r.mean()) / (r.std() + 1e-6)
        old = sds.transitions(process, score, sol.xs, sol.ts, solver=solver).log_prob(sol.xs[1:]).detach()
        for _ in range(4):
            new = sds.transitions(process, score, sol.xs, sol.ts, solver=solver).log_prob(sol.xs[1:])
            ratio = (new - old).exp()
            clipped = ratio.clamp(0.8, 1.2)
            loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return rewards


def texts(sentences: list[str], words: int = 4) -> tuple[Tensor, Tensor]:
    """Stand-in for a text encoder: a token ``(x, y)`` for each word, padded, and which tokens are there."""
    of = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, 1.0), "down": (0.0, -1.0)}
    tokens, mask = torch.zeros(len(sentences), words, 2), torch.zeros(len(sentences), words, dtype=torch.bool)
    for k, sentence in enumerate(sentences):
        known = [of[word] for word in sentence.split()]
        tokens[k, : len(known)], mask[k, : len(known)] = torch.tensor(known), True
    return tokens, mask


def text_to_image(prompts: list[str], scales: list[float], steps: int = 400) -> tuple[sds.NetworkScore, Tensor]:
    """A score of points under sentences of any length, and a draw for each prompt, guided by a scale of its own."""
    sentences = ["left", "right", "up left", "up right", "down left", "down right", "up", "down"]
    tokens, mask = texts(sentences)
    which = torch.arange(4096) % len(sentences)
    centres = 1.5 * (tokens * mask[..., None]).sum(1)
    points = centres[which] + 0.2 * torch.randn(4096, 2, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    net = sds.nn.DiT((2,), dims=1, patch=2, width=32, depth=2, heads=2, context=2)
    score = sds.NetworkScore(net, sds.VP(), "edm", sigma_data=1.3)
    data = {"x": points, "context": tokens[which], "context_mask": mask[which]}
    options = {"condition_dropout": 0.1, "lr": 5e-3, "warmup": 20, "decay": "cosine", "seed": 0}
    sds.train(score, data, loss=sds.DenoisingScoreMatching("simple", "stratified"), steps=steps, **options)
    context, words = texts(prompts)
    guided = sds.ClassifierFreeGuidance(
        score, scale=torch.tensor(scales), context=context, context_mask=words, one_call=True
    )
    drawn = sds.sample(score.process, guided, (len(prompts), 2), solver=sds.DPMSolverPP(2), steps=20, seed=1)
    return score, drawn


def learned(steps: int = 500) -> sds.NetworkScore:
    """A small score of two modes, to run the loops on."""
    torch.manual_seed(0)
    score = sds.NetworkScore(sds.nn.MLP((2,), width=64, depth=2), sds.VP(), "edm", sigma_data=2.0)
    sds.train(score, DATA.sample(4096, seed=0), loss=sds.DenoisingScoreMatching(), steps=steps, seed=0)
    return score.eval()


def main() -> None:
    """Runs all of them."""
    score = DATA.score(sds.VP())  # exact; a network would do
    images = DATA.sample(64, seed=1)
    seen = torch.stack([torch.arange(64) % 2 == 0, torch.arange(64) % 2 == 1], 1)
    drawn = inpainting(images, seen, score)
    print(f"inpainting: {float((drawn.sign() == images.sign()).float().mean()):.2f} of signs right")
    print(f"image to image: {float((image_to_image(images, score) - images).abs().mean()):.2f} moved on the mean")
    latent, again = inversion(images, score)
    print(
        f"inversion: back to within {float((again - images).abs().max()):.1e}, latents of std {float(latent.std()):.2f}"
    )
    print(f"early stop: after {settled(score, (64, 2))[1]} of 60 steps")
    drawn = text_to_image(["up left", "right", "down"], [1.0, 1.5, 2.0])[1]
    print(f"under 'up left', 'right', 'down': {[[round(float(v), 1) for v in point] for point in drawn]}")
    rewards = fine_tune(learned(), lambda x: -(x - 2.0).square().sum(1))
    print(f"policy gradient: mean reward {rewards[0]:.2f} before, {rewards[-1]:.2f} after")


if __name__ == "__main__":
    main()
