"""README and the pages of `docs`: blocks of Python run as they are shown, and links lead somewhere."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from sdesolve.integrate.executors import CannotExecute
from sdesolve.integrate.fused import Fused

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKED = [README, *PAGES, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def runs(code: str, page: Path, scope: dict[str, object]) -> dict[str, object]:
    exec(compile(code, str(page), "exec"), scope)
    return scope


@pytest.fixture
def scope(monkeypatch):
    """Of a module that can be found by its name, as that of a script."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e-\d+)?", text)]


def test_the_readme_is_short_and_its_examples_are_read_at_a_glance():
    assert len(README.read_text().splitlines()) <= 130
    assert len(blocks(README)) == 3
    for code in blocks(README):
        assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 10


def test_the_readme_s_sde(capsys, scope):
    runs(blocks(README)[0], README, scope)
    mean, error = numbers(capsys.readouterr().out.splitlines()[-1])
    assert scope["sol"].stats.backend == "fused"
    assert abs(mean - np.exp(0.05)) < 4 * error


def test_the_readme_s_diffusion(capsys, scope):
    runs(blocks(README)[1], README, scope)
    printed = numbers(capsys.readouterr().out)
    assert isinstance(scope["x"], torch.Tensor)
    # Chance in the modes' shares moves a mass of sqrt(2) / (2 sqrt(4096)) = 0.011 (one sd) over the 4.1 between them:
    # at 4 sd a distance of 0.044 * 4.1 * 0.64 (the mean length of a projection) = 0.12, for true samples too.
    assert len(printed) == 3
    assert all(0 < number < 0.12 for number in printed)


def test_the_readme_s_fit(capsys, scope):
    runs(blocks(README)[2], README, scope)
    (rate,) = numbers(capsys.readouterr().out)
    assert scope["sol"].stats.backend == "fused"
    # The mean of 4096 paths has a standard error of 0.2 sqrt((1 - exp(-3.8)) / 3.8 / 4096) = 0.0016, of 0.15.
    assert abs(rate + np.log(0.15)) < 4 * 0.0016 / 0.15


FUSED = {"fusing", "extending"}  # pages that are about it


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p.stem not in FUSED], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, scope, tmp_path, monkeypatch):
    """One after the other, as a reader would; step by step, as other tests compile the like, in seconds each."""

    def refuse(*_):
        raise CannotExecute("pages are run step by step by their test")

    monkeypatch.setattr(Fused, "run", refuse)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for code in blocks(page):
        runs(code, page, scope)


@pytest.mark.uncompiled
def test_a_solver_of_one_s_own_runs(scope):
    page = ROOT / "docs" / "extending.md"
    (code,) = blocks(page)
    assert runs(code, page, scope)["mine"].stats.backend == "fused"


def test_the_fused_example_prices_a_call(capsys, scope):
    page = ROOT / "docs" / "fusing.md"
    first, *others = blocks(page)
    runs(first, page, scope)
    price, error = numbers(capsys.readouterr().out)
    assert scope["call"].stats.backend == "fused"
    # Heston's formula, by quadrature of his characteristic function; Euler-Maruyama at 250 steps adds 3e-4 at most
    assert abs(price - heston_call()) < 4 * error + 3e-4
    for code in others:
        runs(code, page, scope)


def heston_call(strike=1.0, v0=0.04, kappa=2.0, theta=0.04, xi=0.3, rho=-0.7, r=0.02):
    """Undiscounted price of a call of maturity 1 on a start of 1 (Heston 1993; form of Albrecher et al. 2007)."""

    def characteristic(u):
        b = kappa - rho * xi * 1j * u
        d = (b * b + xi * xi * (1j * u + u * u)) ** 0.5
        g = (b - d) / (b + d)
        decay = np.exp(-d)
        C = r * 1j * u + kappa * theta / xi**2 * (b - d - 2 * np.log((1 - g * decay) / (1 - g)))
        return np.exp(C + v0 * (b - d) / xi**2 * (1 - decay) / (1 - g * decay))

    u = np.linspace(1e-6, 200, 400_001)
    forward, log_strike = characteristic(-1j).real, np.log(strike)
    kernel = np.exp(-1j * u * log_strike) / (1j * u)
    p1 = 0.5 + np.trapezoid((kernel * characteristic(u - 1j) / forward).real, u) / np.pi
    p2 = 0.5 + np.trapezoid((kernel * characteristic(u)).real, u) / np.pi
    return forward * p1 - strike * p2


def anchors(page: Path) -> set[str]:
    """What GitHub and MyST make of its headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_every_page_of_the_site_is_in_its_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    parts = re.findall(r"^```{toctree}\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
    listed = {name for part in parts for name in re.findall(r"^\w+$", part, re.MULTILINE)}
    assert {page.stem for page in PAGES} - {"index"} == listed
