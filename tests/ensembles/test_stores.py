"""What is complete stays, whatever is killed; what is not there, damaged or of another run is named."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import sdesolve as sds
from sdesolve.ensembles.identity import digest

from .conftest import SDE, X0, diffusion, make


@pytest.fixture(params=["run", "run.zarr"])
def out(request, tmp_path):
    return tmp_path / request.param


def stored(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def dies(action):
    """Runs ``action`` in a fork, which kills itself by SIGKILL on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            action()
            os.write(2, b"not killed\n")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_stores_are_equal_byte_by_byte(out, tmp_path):
    make(out=out, save_at=[0.3, 1.0])()
    other = tmp_path / f"other{out.suffix}"
    run = make(out=other, save_at=[0.3, 1.0])
    for k in (2, 0, 1, 0):
        run.do(k)
    assert stored(out) == stored(other)
    again = make(out=out, save_at=[0.3, 1.0])
    assert again.missing() == []
    assert torch.equal(again.result()["xs"].tensor(), make(save_at=[0.3, 1.0])().result()["xs"].tensor())


def test_a_kill_at_any_moment_leaves_no_half_block(out, monkeypatch):
    """A process dies before each of the renames by which a block comes to be there."""
    renamed, count = os.replace, 0

    def counted(a, b):
        nonlocal count
        count += 1
        renamed(a, b)

    first = make(out=out.with_name(f"whole{out.suffix}"), save_at="grid")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", counted)
        first.do(1)
    assert count >= (3 if out.suffix else 1)  # two chunks and a marker at least
    right = make(save_at="grid")().result()
    for last in range(count):
        folder = out.with_name(f"{last}{out.suffix}")
        run = make(out=folder, save_at="grid")
        done = 0

        def killed(a, b, last=last):
            nonlocal done
            if done == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            renamed(a, b)

        def work(run=run, killed=killed):
            os.replace = killed
            run.do(1)

        dies(work)
        again = make(out=folder, save_at="grid")
        assert again.missing() == [0, 1, 2]
        found = again().result()
        assert all(torch.equal(found[name].tensor(), right[name].tensor()) for name in right)


def test_damage_is_named(out):
    run = make(out=out)()
    file = next((out / "x1" / "c" / "1").rglob("0")) if out.suffix else out / "block-00000001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"block 1 of x1 in .* is damaged|block-00000001.safetensors is damaged"):
        run.result()["x1"].tensor()
    run.do(1)
    assert torch.equal(make(out=out).result()["x1"].tensor(), make()().result()["x1"].tensor())


def other_diffusion(x, t):
    return 0.3 * torch.ones_like(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, r"noise: BrownianPath\(3\).* there, BrownianPath\(4\).* here"),
        ({"block": 11}, "block: 10 there, 11 here"),
        ({"solver": sds.Milstein()}, "solver: EulerMaruyama"),
        ({"x0": X0 + 1e-6}, "x0: Tensor of shape"),
        ({"reduce": sds.Moments()}, "reduce: "),
    ],
)
def test_another_run_is_refused_by_name(change, message, tmp_path):
    make(out=tmp_path / "run")
    with pytest.raises(ValueError, match=f"holds another run: .*{message}"):
        make(out=tmp_path / "run", **change)


def test_blocks_of_another_version_are_refused(tmp_path):
    one, other = make(out=tmp_path / "a")(), make(out=tmp_path / "b", seed=9)()
    del other
    (tmp_path / "b" / "block-00000002.safetensors").replace(tmp_path / "a" / "block-00000002.safetensors")
    with pytest.raises(ValueError, match=r"is block 2 of another run.*run\.do\(2\)"):
        one.result()["x1"].tensor()


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match="folder with other files"):
        make(out=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        make(out=tmp_path / "thesis.tex")
    with pytest.raises(TypeError, match="out must be the path"):
        make(out=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="not the specification of a run"):
        make(out=tmp_path / "run")


def test_a_full_disk_loses_nothing(out, monkeypatch):
    run = make(out=out)
    run.do(0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"could not write .*(block-00000001|block 1).*No space left"):
            run()
    assert not list(out.rglob("*.partial"))
    assert run.missing() == [1, 2]
    assert torch.equal(run().result()["x1"].tensor(), make()().result()["x1"].tensor())


def test_the_specification_can_be_read(tmp_path):
    make(out=tmp_path / "run")
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert said["paths"] == 23
    assert said["arguments"]["solver"].startswith("EulerMaruyama()")
    assert set(said["versions"]) == {"sdesolve", "torch", "python"}


def test_xarray_has_the_arrays(out):
    run = make(out=out, save_at=[0.3, 1.0])()
    data = run.to_xarray()
    assert data.xs.dims == ("path", "time", "xs_2")
    assert data.time.values.tolist() == [0.3, 1.0]
    assert torch.equal(torch.from_numpy(data.xs.values), run.result()["xs"].tensor())
    assert data.attrs["task"] == "Solves"
    assert run.to_xarray().xs.variable._in_memory != bool(out.suffix)  # of zarr nothing is read until it is used


def test_shares_of_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="2 processes share a run by its folder: give out="):
        make()()
    run = make(out=tmp_path / "run", block=5)
    assert run().missing() == [0, 2, 4]
    monkeypatch.delenv("RANK")
    for k, v in {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_COUNT": "3"}.items():
        monkeypatch.setenv(k, v)
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    assert run().missing() == [0, 4]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "99")
    with pytest.raises(ValueError, match="name no process"):
        run()


SCRIPT = """
import os, signal, sys, torch, sdesolve as sds
from concurrent.futures import ProcessPoolExecutor
from joblib import Parallel, delayed

pull = torch.tensor(0.7)
size = 0.2
out = sys.argv[1]
print(eval(sys.argv[2]))

def run(name, drift):
    sde = sds.SDE(drift, lambda x, t: size * torch.ones_like(x), noise="diagonal")
    x0 = torch.linspace(-1.0, 1.0, 46).reshape(23, 2)
    return sds.ensemble(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3, block=5, out=name and f"{out}/{name}")

if __name__ == "__main__":
    here = run(None, lambda x, t: -pull * x)().result()["x1"].tensor()
    with ProcessPoolExecutor(2) as pool:
        for name in (None, "shared"):
            assert torch.equal(run(name, lambda x, t: -pull * x)(map=pool.map).result()["x1"].tensor(), here)
        work = run(None, lambda x, t: -pull * x)
        work(map=lambda f, ks: [pool.submit(f, k) for k in ks])  # futures
        assert torch.equal(work.result()["x1"].tensor(), here)
        def deadly(x, t):
            if os.environ.get("DEADLY") and float(x[0, 0]) > 0.3:
                os.kill(os.getpid(), signal.SIGKILL)
            return -pull * x
        os.environ["DEADLY"] = "yes"
        broken = run("deadly", deadly)
        with ProcessPoolExecutor(1) as fragile:
            try:
                broken(map=fragile.map)
            except RuntimeError as error:
                print(error)
        del os.environ["DEADLY"]
        print("left", broken.missing())
    joblib = lambda f, ks: Parallel(2, "multiprocessing")(delayed(f)(k) for k in ks)
    in_joblib = run(None, lambda x, t: -pull * x)(map=joblib)
    assert torch.equal(in_joblib.result()["x1"].tensor(), here)
"""


# For `eval` here and in another process: what they see under these names is the same.
VALUES = (
    "__import__('sdesolve.ensembles.identity', fromlist=['digest']).digest([lambda x, t: size * pull, sds.VP(), "
    "{'x', 'y', 'z'}, {'a': torch.ones(2)}, sds.Heun(), torch.nn.ReLU(), torch.sin])"
)


def test_engines_give_the_same_and_deaths_are_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), VALUES],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    size, pull = 0.2, torch.tensor(0.7)
    assert ran.stdout.startswith(eval(VALUES, {"size": size, "pull": pull, "torch": torch, "sds": sds}))
    assert "a worker died or could not be reached (BrokenProcessPool" in ran.stdout
    assert "call run() again for the rest" in ran.stdout
    assert "left [" in ran.stdout


def test_threads_may_share_a_run(whole):
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(make()(map=pool.map).result()["x1"].tensor(), whole.x1)


def test_what_cannot_be_sent_is_refused_before_work(tmp_path):
    with open(tmp_path / "notes", "w") as file:
        sde = sds.SDE(lambda x, t: (file.name, x)[1], diffusion, noise="diagonal")
        run = sds.ensemble(
            sde, X0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3, block=10, identity="notes", backend="eager"
        )
        with pytest.raises(TypeError, match="cannot be"):
            run(map=map)
        assert run.missing() == [0, 1, 2]


def test_failures_in_workers_come_when_the_rest_is_complete():
    sde = sds.SDE(lambda x, t: x.square() * 100.0, lambda x, t: torch.zeros_like(x), noise="diagonal")
    x0 = torch.zeros(23, 1)
    x0[14] = 10.0
    run = sds.ensemble(sde, x0, 0.0, 10.0, 20, solver=sds.EulerMaruyama(), seed=0, block=10)
    with pytest.raises(sds.DivergenceError, match="path 14"):
        run(map=map)
    assert run.missing() == [1]


class Pull(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, x, t):
        return -self.rate * x


GLOBAL = 1.0


def reads_global(x, t):
    return GLOBAL * x


def of_default(rate):
    return lambda x, t, rate=rate: rate * x


def stratonovich(rate):
    return sds.SDE(lambda x, t: rate * x, lambda x, t: 0.1 * x, noise="diagonal", calculus="stratonovich")


class Wave(sds.LinearBeta):
    """The same at both ends of the interval and in its middle."""

    def integral(self, t):
        return super().integral(t) + 0.01 * torch.sin(4 * torch.pi * t)


WAVE = Wave()


def test_functions_are_known_by_all_they_do(monkeypatch):
    def closure(rate):
        return lambda x, t: rate * x

    for a, b in [
        (closure(1.0), closure(2.0)),
        (closure(torch.ones(2)), closure(torch.ones(2, dtype=torch.float64))),
        (of_default(1.0), of_default(2.0)),
        (Pull(1.0), Pull(2.0)),
        (Pull(1.0).forward, Pull(2.0).forward),
        (lambda x, t: x + 1, lambda x, t: x + 2),
        (lambda x, t: x.sin(), lambda x, t: x.cos()),
        (sds.VP(), sds.VP(sds.LinearBeta(0.1, 19.0))),
        (sds.GaussianMixture(torch.ones(2, 1), 1.0), sds.GaussianMixture(torch.zeros(2, 1), 1.0)),
        (sds.to_ito(stratonovich(1.0)), sds.to_ito(stratonovich(2.0))),
        (sds.VP(WAVE), sds.VP(sds.LinearBeta())),
        (0.0, -0.0),
        ([1, 2], (1, 2)),
        ({"a": 1}, {"a": 2}),
    ]:
        assert digest(a) != digest(b)
    assert digest(closure(1.0)) == digest(closure(1.0))
    assert digest(Pull(1.0)) == digest(Pull(1.0))
    before = digest(reads_global)
    monkeypatch.setitem(globals(), "GLOBAL", 2.0)
    assert digest(reads_global) != before
    law = sds.GaussianMixture(torch.ones(2, 1), 1.0)
    before = digest(law)
    law.score(sds.VP())(torch.ones(3, 1), torch.tensor(0.5))
    assert digest(law) == before  # use leaves no trace
    for process in (sds.VP(), sds.VE(), sds.SubVP(), sds.OU(), sds.EDM(), sds.Rectified(), sds.VP(sds.CosineBeta())):
        before = digest(process)
        process.marginal(torch.ones(3, 1), torch.tensor(0.5))
        assert digest(process) == before
    one, other = torch.ones(2), torch.ones(2)
    assert digest([one, one]) == digest([one, other])
    looped: list[object] = [1]
    looped.append(looped)
    assert digest(looped) == digest(looped)
    with pytest.raises(TypeError, match="give identity="):
        digest(k for k in range(3))


def test_identity_stands_for_functions(tmp_path):
    def run(rate, x0=X0, **options):
        sde = sds.SDE(lambda x, t: rate * x, diffusion, noise="diagonal")
        return sds.ensemble(sde, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3, out=tmp_path / "run", **options)

    run(1.0, identity="first")
    run(1.0, identity="first")
    with pytest.raises(ValueError, match="identity: first there, second here"):
        run(1.0, identity="second")
    with pytest.raises(ValueError, match="x0: Tensor"):  # what is no function counts as ever
        run(1.0, X0 + 1.0, identity="first")
    assert SDE is not None


def test_all_blocks_take_one_executor(out):
    run = make(out=out)
    run.do(2)
    assert run._store.decide("eager") == "fused"  # who comes later takes what is decided
    slow = out.with_name(f"slow{out.suffix}")
    other = make(out=slow)
    other._store.decide("eager")
    found = make(out=slow)()  # in another process, say
    assert {found._store.read(k)[1]["execution"] for k in range(3)} == {"eager"}
    assert torch.equal(found.replay(21).x1[0], found.result()["x1"][21])
    late = make(out=out.with_name(f"late{out.suffix}"))
    late._store.decide = lambda execution: "eager"  # another process was faster
    late.do(0)
    assert late._store.read(0)[1]["execution"] == "eager"
    chosen = make(out=out.with_name(f"chosen{out.suffix}"), backend="kernel")()
    assert {chosen._store.read(k)[1]["execution"] for k in range(3)} == {"kernel"}


@pytest.mark.parametrize("shared", [False, True])
def test_a_worker_with_other_code_gives_no_block(shared, tmp_path):
    module = tmp_path / "own_model.py"
    module.write_text("def drift(x, t):\n    return -x\n")
    spec = importlib.util.spec_from_file_location("own_model", module)
    own_model = importlib.util.module_from_spec(spec)
    sys.modules["own_model"] = own_model
    spec.loader.exec_module(own_model)
    try:
        sde = sds.SDE(own_model.drift, diffusion, noise="diagonal")
        given = {"solver": sds.EulerMaruyama(), "seed": 3, "block": 10, "backend": "kernel"}
        run = sds.ensemble(sde, X0, 0.0, 1.0, 8, out=tmp_path / "run" if shared else None, **given)

        def elsewhere(work, numbers):
            sent = pickle.dumps(work)
            module.write_text("def drift(x, t):\n    return -2 * x\n")
            spec.loader.exec_module(own_model)
            return [pickle.loads(sent)(k) for k in numbers]

        with pytest.raises(ValueError, match="another version of this run, and its block 0 was not taken"):
            run(map=elsewhere)
        assert run.missing() == [0, 1, 2]
    finally:
        del sys.modules["own_model"]


def test_rows_that_are_not_there(whole):
    array = make()().result()["x1"]
    assert torch.equal(array[torch.tensor([-1, 3])], whole.x1[[-1, 3]])
    for index in (torch.tensor([23]), torch.tensor([-24]), torch.ones(5, dtype=torch.bool)):
        with pytest.raises(IndexError):
            array[index]


def test_a_file_system_without_links(out, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    run = make(out=out)
    if out.suffix:  # zarr makes its arrays by links
        with pytest.raises(OSError, match=r"could not write block 0 to .*run.zarr.*hard links"):
            run()
        return
    run()
    assert make(out=out).missing() == []
    with pytest.raises(ValueError, match="holds another run"):
        make(out=out, seed=8)


def test_summaries_and_threads_in_stores(out):
    run = make(out=out, reduce={"q": sds.QuantileSketch(), "m": sds.Moments()}, block=3)
    with ThreadPoolExecutor(3) as pool:
        run(map=pool.map)
    there = make(out=out, reduce={"q": sds.QuantileSketch(), "m": sds.Moments()}, block=3).result()
    here = make(reduce={"q": sds.QuantileSketch(), "m": sds.Moments()}, block=3)().result()
    assert torch.equal(there["m"].variance, here["m"].variance)
    assert torch.equal(there["q"](0.9), here["q"](0.9))
    empty = out.with_name(f"empty{out.suffix}")
    assert make(x0=X0[:0], paths=0, out=empty)().result()["x1"].tensor().shape == (0, 2)
