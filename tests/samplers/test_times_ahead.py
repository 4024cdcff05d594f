"""Numbers of all times of a run are made at once: the same bits as at each time for itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sdesolve as sds
from sdesolve._internal.copies import numbers_of
from sdesolve.integrate import lowering
from sdesolve.scores import network


class _Pooled(nn.Module):
    """A network that no kernel is generated for; it notes the times that it is called at."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return torch.nn.functional.avg_pool2d(x, 1) * (0.1 + 0.5 * t[:, None, None, None])


_SHAPE = (2, 1, 2, 2)
_RUNS: dict[str, tuple[sds.AbstractDiffusion, str, dict[str, object]]] = {
    "DDIM": (sds.VP(), "noise", {"solver": sds.DDIM()}),
    "cosine": (sds.VP(sds.CosineBeta()), "velocity", {"solver": sds.DPMSolverPP(2)}),
    "multistep": (sds.SubVP(), "score", {"solver": sds.SDEDPMSolverPP(2)}),
    "two times a step": (sds.EDM(), "edm", {"solver": sds.EDMHeun()}),
    "corrected": (sds.VE(), "noise", {"solver": sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(0.1))}),
    "flow": (sds.Rectified(), "flow", {"solver": sds.DDIM()}),
    "table": (sds.VP(sds.TableBeta(torch.linspace(0.99, 0.1, 20))), "data", {"solver": sds.Ancestral()}),
    "thresholded": (sds.VP(), "data", {"solver": sds.DDIM(), "threshold": sds.Clip(-1.0, 1.0)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", _RUNS)
def test_bits_are_those_of_each_time_for_itself(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    process, predicts, options = _RUNS[name]
    seen: list[tuple[Tensor, list[float]]] = []
    for found in (network.numbers_of, lambda process: None):
        monkeypatch.setattr(network, "numbers_of", found)
        net = _Pooled()
        score = sds.NetworkScore(net, process, predicts)  # type: ignore[arg-type]
        x = sds.sample(process, score, _SHAPE, steps=11, seed=1, dtype=dtype, backend="eager", **options)
        seen.append((x, net.times))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1]


def test_a_process_is_asked_once_and_again_in_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original: Callable[..., tuple[Tensor, Tensor]] = sds.VP.log_alpha_and_sigma

    def counted(self: sds.VP, t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(t.numel())
        return original(self, t)

    monkeypatch.setattr(sds.VP, "log_alpha_and_sigma", counted)

    def drawn(process: sds.VP) -> Tensor:
        grid = process.time_grid(12)
        return sds.sample(
            process, sds.NetworkScore(net, process), _SHAPE, solver=sds.DDIM(), grid=grid, seed=0, denoise=False
        )

    process, net = sds.VP(), _Pooled()
    first = drawn(process)
    calls.clear()
    assert torch.equal(drawn(process), first)
    assert calls.count(12) == 1
    assert len(calls) <= 3

    schedule = process.schedule
    assert isinstance(schedule, sds.LinearBeta)
    schedule.beta_max = 12.0
    assert torch.equal(drawn(process), drawn(sds.VP(sds.LinearBeta(0.1, 12.0))))
    assert not torch.equal(drawn(process), first)


def test_only_processes_of_this_library_and_numbers_are_asked_at_many_times() -> None:
    patched = sds.VP()
    patched.sigma = lambda t: t  # type: ignore[method-assign]
    of_functions = sds.LinearDiffusion(lambda t: torch.exp(-0.5 * t**2), lambda t: torch.sqrt(-torch.expm1(-(t**2))))
    assert all(numbers_of(process) is None for process in (patched, of_functions))
    for make in (sds.VP, lambda: sds.VP(sds.CosineBeta()), sds.VE, sds.EDM, sds.Rectified):
        assert numbers_of(make()) == numbers_of(make()) is not None
    assert numbers_of(sds.VP(sds.LinearBeta(0.1, 12.0))) != numbers_of(sds.VP())
    assert numbers_of(sds.DDIM(0.5)) != numbers_of(sds.DDIM()) is not None


def test_tables_are_kept_by_the_values_of_all_that_they_are_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_tables", {})
    made: list[Tensor] = []
    original, original_sigma = sds.DDIM.table, sds.VP.sigma

    def counted(self: sds.DDIM, sde: object, times: Tensor) -> object:
        made.append(times)
        return original(self, sde, times)  # type: ignore[arg-type]

    def drawn(process: sds.AbstractDiffusion, solver: sds.DDIM, grid: Tensor) -> Tensor:
        score = sds.NetworkScore(net, process)
        return sds.sample(process, score, _SHAPE, solver=solver, grid=grid, seed=0)

    monkeypatch.setattr(sds.DDIM, "table", counted)
    process, solver, net = sds.VP(), sds.DDIM(), _Pooled()
    grid = process.time_grid(6)
    with torch.inference_mode():
        first = drawn(process, solver, grid)
    for _ in range(3):
        assert torch.equal(drawn(process, sds.DDIM(), grid.clone()), first)
    assert len(made) == 2  # in inference mode, and outside
    grid[1:3] -= 0.01
    moved = drawn(process, solver, grid)
    assert torch.equal(drawn(sds.VP(), solver, grid + 0.0), moved)
    assert torch.equal(drawn(process, solver, process.time_grid(6)), first)
    assert len(made) == 3
    solver.eta = 0.5
    noisy = drawn(process, solver, grid)
    assert len(made) == 4
    monkeypatch.setattr(sds.VP, "sigma", lambda self, t: 0.9 * original_sigma(self, t))
    assert not torch.equal(drawn(process, solver, grid), noisy)
    assert len(made) == 5
