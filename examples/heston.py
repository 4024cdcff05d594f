"""Heston's model calibrated to prices of options by gradients through every path, with Greeks.

The market is made of Heston's own formula: calls of several strikes and maturities, whose prices are known to ten
digits. Paths in Euler steps, with the variance cut at zero where its root is taken (full truncation), price all of them
in one kernel; its reverse gives the derivatives in reversion, level, volatility of the variance, correlation and
starting variance. The same seeds in each iteration make the price a smooth function, and what is found differs from the
truth by the chance in the paths, which other seeds show, and by the error of the steps. Greeks of a call and of a
digital option at the end, beside differences of the formula. Takes about 25 s.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import sdesolve as sds
from sdesolve import plotting

Backend = Literal["auto", "eager"]
NAMES = ("reversion", "level", "volatility", "correlation", "variance now")
TRUTH = torch.tensor([2.0, 0.06, 0.4, -0.6, 0.04], dtype=torch.float64)
RATE, PRICE = 0.02, 1.0
MATURITIES = (0.25, 0.5, 1.0)
STRIKES = (0.8, 0.9, 1.0, 1.1, 1.2)
STEPS_A_YEAR = 128


def drift(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    v = x[:, 1].clamp(min=0.0)
    return torch.stack([RATE - 0.5 * v, p[0] * (p[1] - v)], 1)


def diffusion(x: Tensor, t: Tensor, p: Tensor) -> Tensor:
    """``(batch, 2, 2)``."""
    root = (x[:, 1].clamp(min=0.0) + 1e-12).sqrt()
    across = (1.0 - p[3].square()).sqrt()
    return torch.stack([torch.stack([p[3] * root, across * root], 1), torch.stack([p[2] * root, 0 * root], 1)], 1)


MODEL = sds.SDE(drift, diffusion, noise="general")


def formula(p: Tensor, strike: float, maturity: float, price: float = PRICE) -> float:
    k, level, xi, rho, v = p.tolist()
    return sds.Heston(k, level, xi, rho, RATE).call(strike, price, v, maturity)


def start(p: Tensor, paths: int, price: Tensor | float = PRICE) -> Tensor:
    """Log-price and variance."""
    log_price = torch.as_tensor(price, dtype=p.dtype).log()
    return torch.stack([log_price, p[4]]).expand(paths, 2)


def prices(p: Tensor, paths: int, seed: int, backend: Backend = "auto") -> Tensor:
    """Of all calls, ``(maturities, strikes)``, from paths and their mirror images."""
    found = []
    for noise in (sds.BrownianPath(seed), sds.BrownianPath(seed).antithetic()):
        steps = int(MATURITIES[-1] * (32 if backend == "eager" else STEPS_A_YEAR))
        sol = sds.solve(
            MODEL, start(p, paths // 2), 0.0, MATURITIES[-1], steps, solver=sds.EulerMaruyama(), noise=noise,
            params=p, save_at=MATURITIES, backend=backend,
        )  # fmt: skip
        paid = torch.relu(sol.xs[:, :, :1].exp() - torch.tensor(STRIKES, dtype=p.dtype))
        found.append(paid.mean(1))
    discount = torch.tensor([math.exp(-RATE * T) for T in MATURITIES], dtype=p.dtype)
    return 0.5 * (found[0] + found[1]) * discount[:, None]


def bounded(z: Tensor) -> Tensor:
    """Parameters, positive or between -1 and 1, from numbers of the whole line."""
    return torch.cat([z[:3].exp(), z[3:4].tanh(), z[4:].exp()])


def calibrated(market: Tensor, paths: int, seed: int, backend: Backend) -> tuple[Tensor, float, int]:
    """Parameters whose prices are those of the market, what is left of the difference, and evaluations."""
    z = torch.tensor([0.0, -3.0, -1.5, 0.0, -3.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [z], max_iter=8 if backend == "eager" else 60, history_size=20, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-12,
    )  # fmt: skip
    evaluations = 0

    def loss() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        value = 1e4 * (prices(bounded(z), paths, seed, backend) - market).square().mean()
        value.backward()
        return value

    optimiser.step(loss)
    rest = (prices(bounded(z.detach()), paths, seed, backend) - market).square().mean().sqrt()
    return bounded(z.detach()), float(rest), evaluations


def greeks(paths: int, backend: Backend) -> list[tuple[str, float, float, float]]:
    """Name, found, its standard error, and that of the formula by differences."""
    strike, maturity, step = 1.05, 0.5, 1.0 / 128
    price = torch.tensor(PRICE, dtype=torch.float64, requires_grad=True)
    p = TRUTH.clone().requires_grad_()
    discount = math.exp(-RATE * maturity)
    options: dict[str, Any] = {"solver": sds.EulerMaruyama(), "seed": 99, "wrt": (price, p), "params": p}
    options.update(backend=backend, groups=4 if backend == "eager" else 16)
    x0 = start(p, paths, price)
    call = sds.sensitivity(
        MODEL, x0, 0.0, maturity, 64, payoff=lambda x: discount * torch.relu(x[:, 0].exp() - strike), **options
    )
    before = maturity - step

    def digital(x: Tensor) -> Tensor:
        law = sds.euler_law(MODEL, x, before, maturity, params=p)
        return discount * law.above(math.log(strike))[:, 0]

    jump = sds.sensitivity(MODEL, x0, 0.0, before, 63, payoff=digital, **options)

    def of_formula(h_price: float = 0.0, h_variance: float = 0.0, h_strike: float = 0.0) -> float:
        q = TRUTH.clone()
        q[4] += h_variance
        return formula(q, strike + h_strike, maturity, PRICE + h_price)

    h = 1e-4

    def cash(**moved: float) -> float:  # a digital is minus the derivative of a call in its strike
        return (of_formula(h_strike=-h, **moved) - of_formula(h_strike=h, **moved)) / (2 * h)

    return [
        ("call", float(call.value), float(call.value_error), of_formula()),
        ("call, delta", float(call.gradient[0]), float(call.gradient_error[0]),
         (of_formula(h_price=h) - of_formula(h_price=-h)) / (2 * h)),
        ("call, in the variance", float(call.gradient[1][4]), float(call.gradient_error[1][4]),
         (of_formula(h_variance=h) - of_formula(h_variance=-h)) / (2 * h)),
        ("digital", float(jump.value), float(jump.value_error), cash()),
        ("digital, delta", float(jump.gradient[0]), float(jump.gradient_error[0]),
         (cash(h_price=1e-3) - cash(h_price=-1e-3)) / 2e-3),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="fewer paths: a few seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    paths, seeds, many = (128, 2, 128) if arguments.quick else (16384, 6, 65536)
    backend: Backend = "eager" if arguments.quick else "auto"  # compiling takes longer than so few paths

    market = torch.tensor([[formula(TRUTH, K, T) for K in STRIKES] for T in MATURITIES], dtype=torch.float64)
    print(f"{market.numel()} calls calibrated with {paths} paths, {seeds} times with other paths")
    runs = [calibrated(market, paths, seed, backend) for seed in range(seeds)]
    found = torch.stack([p for p, _, _ in runs])
    mean, spread = found.mean(0), found.std(0)
    print(f"{'':14s}{'market':>10s}{'first':>10s}{'mean':>10s}{'+-':>10s}")
    for i, name in enumerate(NAMES):
        print(f"{name:14s}{TRUTH[i]:10.4f}{found[0, i]:10.4f}{mean[i]:10.4f}{spread[i] / seeds**0.5:10.4f}")
    rest = max(r for _, r, _ in runs)
    print(f"root mean square of what is left of prices: at most {rest:.1e} of {float(market.mean()):.3f}, "
          f"after {sum(n for _, _, n in runs) / seeds:.0f} gradients")  # fmt: skip

    print(f"\n{'':24s}{'paths':>10s}{'+-':>10s}{'formula':>10s}")
    for name, value, error, exact in greeks(many, backend):
        print(f"{name:24s}{value:10.4f}{error:10.4f}{exact:10.4f}")

    figure, (left, right) = plotting.panels(2, titles=["Prices", "Parameters: found over true"], width=4.2, height=3.4)
    strikes = torch.linspace(STRIKES[0], STRIKES[-1], 41).tolist()
    fitted = prices(found[0], paths, 0, backend)
    for i, (T, colour) in enumerate(zip(MATURITIES, plotting.COLOURS, strict=False)):
        left.plot(strikes, [formula(TRUTH, K, T) for K in strikes], color=colour, linewidth=1.2, label=f"T = {T:g}")
        left.plot(STRIKES, fitted[i], "o", color=colour, markersize=4)
    left.set(xlabel="strike", ylabel="price of a call: formula, and fitted paths")
    left.legend(frameon=False, fontsize=9)
    for p in found:
        right.plot(range(5), p / TRUTH, "o", color=plotting.COLOURS[0], markersize=3, alpha=0.6)
    right.axhline(1.0, color=plotting.COLOURS[1], linewidth=1.0)
    right.set_xticks(range(5), ["reversion", "level", "volatility", "correl.", "var. now"])
    figure.savefig(arguments.out / "heston.png")


if __name__ == "__main__":
    main()
