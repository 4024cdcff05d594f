"""Flows, likelihoods, samplers with a network in the loop and training steps, against the packages that people use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import sdesolve as sds
from benchmarks.ensembles import tensor_of
from benchmarks.models import MODELS
from benchmarks.registry import BASELINE, Build, Call, Limit, Problem, require
from benchmarks.timing import THREADED
from sdesolve.reverse import ReverseSDE

__all__ = ["generative"]

_SHAPE = (16, 3, 32, 32)
_TRAINING_TIMES = 1000  # of the chains of diffusers
Network = Callable[[Tensor, Tensor], Tensor]


def _network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return sds.nn.ConvNet(_SHAPE[1:], channels=16, depth=2, width=64).to(device)


# Flows -----------------------------------------------------------------------------------------------------------
_PATHS, _FIRST, _LAST = 4096, 1.0, 1e-3


def _mixture(device: torch.device) -> ReverseSDE:
    made = MODELS["mixture"].sde(device)
    assert isinstance(made, ReverseSDE)
    return made


def _flow(steps: int | None, tolerance: float, device: torch.device) -> Problem:
    """The flow of the 2-d mixture of `models`, in steps of Heun's method or by Dormand and Prince's to a tolerance."""
    x0 = MODELS["mixture"].start(_PATHS, device)
    reverse = _mixture(device)
    flow = sds.ProbabilityFlow(reverse.forward, reverse.score)
    last = _LAST if steps is not None else 10 * _LAST  # nearer to 0, torchdiffeq's steps underflow in float32
    span = torch.tensor([_FIRST, last], device=device)

    def ours(backend: str) -> Build:
        if steps is not None:
            return lambda: lambda: sds.solve(flow, x0, _FIRST, last, steps, solver=sds.Heun(), backend=backend).x1
        solver = sds.DormandPrince(rtol=tolerance, atol=tolerance)
        return lambda: lambda: sds.solve(flow, x0, _FIRST, last, solver=solver).x1

    def torchdiffeq() -> Call:
        require("torchdiffeq")
        from torchdiffeq import odeint

        options: dict[str, Any] = {"method": "dopri5", "rtol": tolerance, "atol": tolerance}
        if steps is not None:
            options = {"method": "heun2", "options": {"step_size": (_FIRST - last) / steps}}

        @torch.no_grad()
        def run() -> Tensor:
            last: Tensor = odeint(lambda t, x: flow.drift(x, t), x0, span, **options)[-1]
            return last

        return run

    def diffrax() -> Call:
        require("jax", "diffrax")
        from benchmarks.jax_peers import diffrax_flow

        return diffrax_flow(x0, _FIRST, last, steps, tolerance, device)

    @functools.cache
    def truth() -> Tensor:
        wide = x0[:256].double()
        exact = sds.solve(flow, wide, _FIRST, last, 500, solver=sds.RK4(), backend="eager")
        return tensor_of(exact.x1)

    allowed = 0.02 if steps is not None else 100 * tolerance

    def check(name: str, call: Call) -> str | None:
        del name
        error = float((tensor_of(call())[:256] - truth()).abs().mean())
        return None if error <= allowed else f"mean error {error:.2g}, {allowed:.2g} allowed"

    contenders: dict[str, Build] = {BASELINE: ours("auto")}
    if steps is not None:
        contenders |= {BASELINE: ours("fused"), "sdesolve eager": ours("eager")}
    contenders |= {"torchdiffeq": torchdiffeq, "diffrax": diffrax}
    label = f"Heun, {_PATHS} x {steps}" if steps is not None else f"Dormand-Prince to {tolerance:g}, {_PATHS}"
    return Problem(
        f"flow of a mixture by {label}", "generative", "path", _PATHS, contenders, check, {}, None,
        ("torchdiffeq", "diffrax"), {**THREADED, "rounds": 5, "seconds": 4.0}, truth.cache_clear,
    )  # fmt: skip


# Likelihood ------------------------------------------------------------------------------------------------------
def _likelihood(device: torch.device) -> Problem:
    """Of a 6-dimensional Gaussian by the flow with its exact divergence, to a tolerance of 1e-5."""
    width, batch, tolerance = 6, 128, 1e-5
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(width, width, generator=generator) / width**0.5
    cov = (root @ root.T + 0.2 * torch.eye(width)).to(device)
    data = sds.Gaussian(torch.zeros(width, device=device), cov)
    process = sds.VP(sds.LinearBeta(0.1, 40.0))
    score = data.score(process)
    x = data.sample(batch, seed=3)

    def sdesolve() -> Call:
        solver = sds.DormandPrince(rtol=tolerance, atol=tolerance)
        return lambda: sds.log_likelihood(process, score, x, solver=solver, ending="density")

    def torchdiffeq() -> Call:
        require("torchdiffeq")
        from torchdiffeq import odeint

        flow = process.probability_flow(score)
        eye = torch.eye(width, device=device)
        span = torch.tensor([process.t_min, process.t_max], device=device)

        def field(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            # As in its own example of continuous normalising flows: the trace by one backward pass for each dimension.
            with torch.enable_grad():
                y = state[0].detach().requires_grad_()
                dx = flow.drift(y, t)
                trace = sum(torch.autograd.grad(dx, y, e.expand_as(dx), retain_graph=True)[0] @ e for e in eye)
            return dx.detach(), trace

        @torch.no_grad()
        def run() -> Tensor:
            start = (x, torch.zeros(batch, device=device))
            y, change = odeint(field, start, span, method="dopri5", rtol=tolerance, atol=tolerance)
            found: Tensor = process.prior.log_prob(y[-1]) + change[-1]
            return found

        return run

    def check(name: str, call: Call) -> str | None:
        del name
        times = torch.tensor(process.t_min, dtype=torch.float64, device=device)
        alpha, sigma = process.alpha(times), process.sigma(times)
        wide = (alpha**2 * cov.double() + sigma**2 * torch.eye(width, device=device)).cpu()
        exact = torch.distributions.MultivariateNormal(torch.zeros(width).double(), wide).log_prob(x.double().cpu())
        error = float((tensor_of(call()) - exact).abs().max()) / width
        return None if error <= 1e-3 else f"off by {error:.2g} nats a dimension"

    return Problem(
        f"likelihood by the flow, {batch} x {width}", "generative", "sample", batch,
        {BASELINE: sdesolve, "torchdiffeq": torchdiffeq}, check, {}, None, ("torchdiffeq",),
        {"rounds": 5, "seconds": 4.0},
    )  # fmt: skip


# Samplers --------------------------------------------------------------------------------------------------------
class _Exact(nn.Module):
    """The noise that data of mean 1 and standard deviation 1/2 have in them, given `alpha` and `sigma` of time."""

    def __init__(self, at: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.to(x).reshape(-1, *(1,) * (x.ndim - 1)) for v in self.at(t))
        return sigma * (x - alpha) / (alpha.square() * 0.25 + sigma.square())


def _diffusers(kind: str, steps: int) -> Any:
    require("diffusers")
    import diffusers

    chain = {"num_train_timesteps": _TRAINING_TIMES, "beta_start": 1e-4, "beta_end": 0.02}
    makers: dict[str, Callable[[], Any]] = {
        "DDIM": lambda: diffusers.DDIMScheduler(**chain, clip_sample=False, timestep_spacing="trailing"),
        "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(
            **chain, algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero"
        ),
        "ancestral": lambda: diffusers.DDPMScheduler(**chain, clip_sample=False, timestep_spacing="trailing"),
    }
    return makers[kind]()


_SAMPLERS: dict[str, Callable[[], Any]] = {
    "DDIM": sds.DDIM, "DPM-Solver++ 2M": lambda: sds.DPMSolverPP(2), "ancestral": sds.Ancestral,
}  # fmt: skip


def _sampler(kind: str, steps: int, device: torch.device) -> Problem:
    """A sampler with a small convolutional network in the loop, one evaluation a step, the last step to time 0."""
    process = sds.VP()
    grid = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)  # the "trailing" times of diffusers

    def ours(net: nn.Module, shape: tuple[int, ...], cuda_graph: bool = False) -> Call:
        score = sds.NetworkScore(net, process)
        options: dict[str, Any] = {"solver": _SAMPLERS[kind](), "grid": grid, "seed": 0, "device": device}
        return lambda: sds.sample(process, score, shape, cuda_graph=cuda_graph, **options)

    def theirs(net_of: Callable[[Any], Network], shape: tuple[int, ...]) -> Call:
        scheduler = _diffusers(kind, steps)
        net = net_of(scheduler)

        @torch.no_grad()
        def run() -> Tensor:
            scheduler.set_timesteps(steps, device=device)
            x = torch.randn(shape, device=device)
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t), t, x, return_dict=False)[0]
            return x

        return run

    def of_theirs(scheduler: Any) -> Network:
        del scheduler
        net = _network(device)
        return lambda x, t: net(x, t / _TRAINING_TIMES)

    def network() -> Call:
        net, x, t = _network(device), torch.randn(_SHAPE, device=device), torch.tensor(0.5, device=device)

        @torch.no_grad()
        def run() -> Tensor:
            for _ in range(steps):
                y: Tensor = net(x, t)
            return y

        return run

    def unchecked() -> float:
        """The deviation in which a network ends that finds no noise, as a fresh one: its last layer is 0."""
        alpha, sigma = process.alpha(grid), process.sigma(grid)
        variance = 1 / alpha[0] ** 2
        if kind == "ancestral":  # a step's noise, which all later ones take for data
            fresh = sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2
            variance += (fresh * (sigma[1:] / sigma[:-1] / alpha[1:]) ** 2).sum()
        return float(variance) ** 0.5

    def check(name: str, call: Call) -> str | None:
        """The very call on its fresh network; then the same code on a network that is exact for a Gaussian, whose law
        it has to end in, but for its own bias. Of contenders that are not known here, the former alone.
        """
        x, expected = call(), unchecked()
        if x.shape != _SHAPE:
            return f"shape {tuple(x.shape)}, expected {_SHAPE}"
        if not abs(float(x.std()) / expected - 1) <= 0.1:  # chains of a thousand times end 3% further out
            return f"a network of zeros leads to a deviation of {float(x.std()):.4g}, {expected:.4g} expected"
        if name not in contenders:
            return None
        few = (4096, 4)
        if name == "diffusers":

            def net_of(scheduler: Any) -> Network:
                kept = scheduler.alphas_cumprod.to(device).double()
                return _Exact(lambda t: (kept[t].sqrt(), (1 - kept[t]).sqrt()))

            x = theirs(net_of, few)()
        else:
            x = ours(_Exact(lambda t: (process.alpha(t), process.sigma(t))), few)()
        mean, spread = float(x.mean()), float(x.std())
        good = abs(mean - 1) <= 0.05 and abs(spread / 0.5 - 1) <= 0.15
        return None if good else f"mean {mean:.3f} and deviation {spread:.3f}, 1 and 0.5 expected"

    contenders: dict[str, Build] = {BASELINE: lambda: ours(_network(device), _SHAPE)}
    if device.type == "cuda":
        contenders["sdesolve, CUDA graph"] = lambda: ours(_network(device), _SHAPE, cuda_graph=True)
    contenders |= {"diffusers": lambda: theirs(of_theirs, _SHAPE), "limit: network": network}
    quick = () if kind == "ancestral" else ("diffusers", "limit: network")
    return Problem(
        f"{kind} with a network, {steps} steps", "generative", "image-step", steps * _SHAPE[0], contenders, check,
        {"limit: network": Limit(1.0, steps * _SHAPE[0], "images")}, None, quick,
        {**THREADED, "rounds": 5, "seconds": 4.0},
    )  # fmt: skip


# Training --------------------------------------------------------------------------------------------------------
def _training(device: torch.device) -> Problem:
    """Loss, gradient and Adam's step of denoising score matching, uniform times, noise prediction."""
    x0 = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    process = sds.VP()

    def sdesolve() -> Call:
        score, objective = sds.NetworkScore(_network(device), process), sds.DenoisingScoreMatching("simple")
        adam, seeds = torch.optim.Adam(score.parameters()), iter(range(1 << 62))

        def step() -> Tensor:
            adam.zero_grad(set_to_none=True)
            loss = objective(score, x0, seed=next(seeds))
            loss.backward()
            adam.step()
            return loss.detach()

        return step

    def plain(wrap: Callable[..., Any]) -> Call:
        net = _network(device)
        adam = torch.optim.Adam(net.parameters())

        def objective() -> Tensor:
            t = process.t_min + (process.t_max - process.t_min) * torch.rand(len(x0), device=device)
            z = torch.randn_like(x0)
            log_alpha = (-0.25 * t**2 * 19.9 - 0.5 * t * 0.1).view(-1, 1, 1, 1)
            x_t = log_alpha.exp() * x0 + (1 - (2 * log_alpha).exp()).sqrt() * z
            return (net(x_t, t) - z).square().flatten(1).mean(1).mean()

        loss_of = wrap(objective)

        def step() -> Tensor:
            adam.zero_grad(set_to_none=True)
            loss: Tensor = loss_of()
            loss.backward()
            adam.step()
            return loss.detach()

        return step

    def compiled() -> Call:
        torch.compiler.reset()
        return plain(lambda f: torch.compile(f, dynamic=False))

    def check(name: str, call: Call) -> str | None:
        """A fresh network's last layer is zero: the first loss is the mean square of the noise."""
        del name
        excess = (float(call()) - 1) * (x0.numel() / 2) ** 0.5
        if not abs(excess) <= 5:
            return f"the first loss is {excess:.1f} standard errors off 1"
        later = [float(call()) for _ in range(30)]
        return None if math.fsum(later[-5:]) < 4.9 else f"after 30 steps the loss still is {later[-1]:.3f}"

    contenders: dict[str, Build] = {BASELINE: sdesolve, "torch": lambda: plain(lambda f: f), "torch.compile": compiled}
    return Problem(
        f"training step, {_SHAPE[0]} images", "generative", "image", _SHAPE[0], contenders, check, {}, None, ("torch",),
        {**THREADED, "rounds": 7, "seconds": 4.0},
    )  # fmt: skip


def generative(device: torch.device) -> Iterator[Problem]:
    """All of them."""
    yield _flow(100, 0.0, device)
    yield _flow(None, 1e-5, device)
    yield _likelihood(device)
    for kind, steps in (("DDIM", 20), ("DPM-Solver++ 2M", 20), ("ancestral", 50)):
        yield _sampler(kind, steps, device)
    yield _training(device)
