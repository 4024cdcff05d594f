"""What would make a GPU wait, or disagree with itself: copies in loops of steps, gradients in another thread."""

from __future__ import annotations

import collections
import sys
import threading

import pytest
import torch
from sdesolve_kernels import (
    dispatch,
    dsm_loss,
    euler_maruyama_step,
    langevin_step,
    normal,
    ops,
    perturb,
    uniform,
    use_backend,
    words,
)
from torch.utils._python_dispatch import TorchDispatchMode

import sdesolve as sds
from sdesolve.integrate import checks, structure
from sdesolve.integrate.cuda_graph import StraightSampler


class Crossings(TorchDispatchMode):
    """Counts copies between the CPU and tensors without values, which stand for a device's, and reads of these."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [a for a in args if isinstance(a, torch.Tensor)]
        name = func.overloadpacket.__name__
        if name == "_to_copy":
            self.count += given[0].device != out.device
        elif name == "copy_":
            self.count += given[0].device != given[-1].device
        elif name in ("_local_scalar_dense", "nonzero"):
            self.count += given[0].is_meta
        return out


def crossings(call) -> int:
    with Crossings() as counted:
        call()
    return counted.count


@pytest.fixture
def device_without_values(monkeypatch):
    check = checks.check_state
    for name, module in list(sys.modules.items()):
        if name.startswith("sdesolve") and getattr(module, "check_state", None) is check:
            monkeypatch.setattr(module, "check_state", lambda x, name="x0": None)
    monkeypatch.setattr(structure, "agree", lambda *_: True)  # looks at values once, before the first step


NET = sds.nn.ConvNet((3, 8, 8), channels=4, depth=1, width=8).to("meta")
PROCESS = sds.VP()
SCORE = sds.NetworkScore(NET, PROCESS)
DRIFT = sds.SDE(lambda x, t: -x, lambda x, t: 0.1 * x, noise="diagonal")
CORRECTED = sds.PredictorCorrector(sds.EulerMaruyama(), sds.LangevinCorrector(snr=0.16))


def solving(solver, backend, steps):
    x0 = torch.ones(4, 192, device="meta")
    sds.solve(DRIFT, x0, 0.0, 1.0, steps, solver=solver, seed=0, backend=backend, check_finite=False)


def reversing(solver, backend, steps):
    multistep = isinstance(solver, sds.DPMSolverPP)
    backward = PROCESS.probability_flow(SCORE) if multistep else PROCESS.reverse(SCORE)
    x0 = torch.ones(4, 3, 8, 8, device="meta")
    times = PROCESS.time_grid(steps)
    with torch.no_grad():
        sds.solve(backward, x0, grid=times, solver=solver, seed=0, backend=backend, check_finite=False)


@pytest.mark.parametrize("backend", ["kernel", "eager"])
@pytest.mark.parametrize(
    ("run", "solver"),
    [
        (solving, sds.EulerMaruyama()),
        (solving, sds.Milstein()),
        (reversing, sds.EulerMaruyama()),
        (reversing, sds.DPMSolverPP(2)),
        (reversing, CORRECTED),
    ],
    ids=["euler", "milstein", "reverse euler", "multistep", "corrector"],
)
def test_steps_copy_nothing(run, solver, backend, device_without_values):
    if backend == "kernel" and run is solving and not isinstance(solver, sds.EulerMaruyama):
        backend = "auto"
    few, many = (crossings(lambda n=n: run(solver, backend, n)) for n in (8, 24))
    assert 4 * (many - few) <= 16  # a chunk of noise or of times for several steps takes one


def test_what_is_captured_copies_nothing():
    grid = PROCESS.time_grid(5)
    sampler = StraightSampler(
        PROCESS, SCORE, PROCESS.reverse(SCORE), sds.EulerMaruyama(), grid, (4, 3, 8, 8),
        denoise=True, dtype=torch.float32, device=torch.device("meta"),
    )  # fmt: skip
    assert crossings(lambda: sampler(1)) == 0


def test_a_training_loss_copies_nothing():
    loss = sds.DenoisingScoreMatching("simple")
    assert crossings(lambda: loss(SCORE, torch.zeros(4, 3, 8, 8, device="meta"), seed=3)) == 0


def test_gradients_are_made_by_the_backend_of_the_value_in_any_thread(monkeypatch):
    asked = []
    chosen = dispatch._implementation

    def recorded(requested, op, device_type):
        asked.append((requested, op))
        return chosen(requested, op, device_type)

    monkeypatch.setattr(dispatch, "_implementation", recorded)
    x, s = (torch.randn(4, 8, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in (0, 1))
    size = torch.tensor(0.1, requires_grad=True)
    with use_backend("reference"):
        values = [
            euler_maruyama_step(x, s, s, 0.1, seed=0).sum(),
            langevin_step(x, s, size=size, seed=0).sum(),
            perturb(x, 0.5, torch.full((4,), 0.3, requires_grad=True), seed=0).sum(),
            dsm_loss(x, None, 0.0, 1.0, 1.0, seed=0),
            dsm_loss(x, None, 0.0, 1.0, 1.0, seed=0, reduction="none").sum() * 2.0,
        ]
    assert {requested for requested, _ in asked} == {"reference"}
    del asked[:]
    thread = threading.Thread(target=lambda: [value.backward() for value in values])
    thread.start()
    thread.join()
    counted = collections.Counter(requested for requested, _ in asked)
    assert set(counted) == {"reference"}
    assert counted["reference"] >= 5


@pytest.mark.parametrize("make", [normal, uniform, words])
def test_noise_takes_its_place_from_a_device(make, monkeypatch):
    """Read there, and not here: a captured graph draws anew at each replay."""
    seen = []
    monkeypatch.setattr(ops, "implementation", lambda op, device: lambda kind, out, **where: seen.append(where))
    place = torch.zeros((), dtype=torch.int64, device="meta")
    assert crossings(lambda: make(4, 8, seed=place, stream=1, first_path=place, offset=place, device="meta")) == 0
    assert seen == [{"seed": place, "stream": 1, "first_path": place, "offset": place}]
    with pytest.raises(TypeError, match=r"seed must be an integer or a 0-d int64 tensor, got torch.float32"):
        make(4, 8, seed=place.float(), stream=1, device="meta")
