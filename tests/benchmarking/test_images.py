"""The benchmark of real images, on tiny files of the layouts that it reads."""

from __future__ import annotations

import gzip
import json
import math
import pickle
import struct

import numpy as np
import pytest
import torch

import sdesolve as sds
from benchmarks import cifar10 as cifar_bench
from benchmarks import images as bench
from benchmarks.image_data import cifar10, fashion_mnist, needs, read_cifar_batch, read_idx

PIXELS = torch.randint(0, 256, (60, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PIXELS = PIXELS.expand(
    60, 28, 28
).contiguous()  # stripes, which are far from the draws of a network that learned nothing


def idx(pixels: torch.Tensor) -> bytes:
    return struct.pack(f">HBB{pixels.ndim}I", 0, 8, pixels.ndim, *pixels.shape) + pixels.numpy().tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with both files, one of them compressed."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS[:40])))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(PIXELS[40:]))
    return tmp_path


def test_idx_files_are_read_and_damaged_ones_named(fashion):
    found = fashion_mnist(fashion)
    assert torch.equal(found.learned, PIXELS[:40])
    assert torch.equal(found.held, PIXELS[40:])
    file = fashion / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    for raw, said in [
        (whole[:-1], "should hold"),
        (whole[:9], "within its sizes"),
        (b"\0\0\x0d" + whole[3:], "begin with 00 00 08"),
        (gzip.compress(whole)[:-9], "damaged gzip"),
        (idx(PIXELS[:, :14]), r"should be \(samples, 28, 28\)"),
    ]:
        file.write_bytes(raw)
        with pytest.raises(ValueError, match=said):
            fashion_mnist(fashion)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="t10k-images"):
        fashion_mnist(fashion)
    with pytest.raises(
        ModuleNotFoundError, match=r"no_such_package is not installed: pip install 'sdesolve\[images\]'"
    ):
        needs("no_such_package")
    (fashion / "labels").write_bytes(idx(torch.arange(3, dtype=torch.uint8)))
    assert read_idx(fashion / "labels").tolist() == [0, 1, 2]


class Call:
    """What a pickle of an attacker holds."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def write_cifar(folder, protocol):
    """Six files of the layout of CIFAR-10, with four images each."""
    data = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    whole = {b"batch_label": b"one", b"labels": [1, 2, 3, 4], b"data": data, b"filenames": [b"a"] * 4}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(whole, protocol))
    return data, whole


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches_are_read_and_nothing_else_is_run(tmp_path, protocol):
    data, whole = write_cifar(tmp_path, protocol)
    found = cifar10(tmp_path)
    assert found.learned.shape == (20, 3, 32, 32)
    assert torch.equal(found.held.flatten(1), torch.from_numpy(data))
    assert found.held[0, 1, 0, 2] == data[0, 1024 + 2]  # green, first line, third place

    file, trace = tmp_path / "test_batch", tmp_path / "ran"
    for harmful in (Call(open, str(trace), "w"), Call(eval, f"open({str(trace)!r}, 'w')"), Call(np.load, str(trace))):
        file.write_bytes(pickle.dumps(whole | {b"labels": harmful}, protocol))
        with pytest.raises(ValueError, match="only arrays, lists and texts are read"):
            read_cifar_batch(file)
    assert not trace.exists()
    for other, said in [
        (pickle.dumps([1], protocol), "dictionary"),
        (pickle.dumps({b"data": data[:, :9]}, protocol), "3072"),
        (pickle.dumps({b"data": data.astype(object)}, protocol), "3072"),
        (pickle.dumps(whole, protocol)[:-40], "no pickle"),
    ]:
        file.write_bytes(other)
        with pytest.raises(ValueError, match=said):
            read_cifar_batch(file)


class Means(torch.nn.Module):
    """What stands for Inception: takes bytes."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return x.float().mean((2, 3))


@pytest.mark.parametrize("family", cifar_bench.FAMILIES)
def test_the_cifar_protocol_runs_on_tiny_files(tmp_path, family, capsys, monkeypatch):
    write_cifar(tmp_path, 2)
    monkeypatch.setattr(torch.jit, "load", lambda file, map_location: Means())
    arguments = [
        "--folder", str(tmp_path), "--family", family, "--out", str(tmp_path), "--device", "cpu", "--tiny", "--float32",
        "--draws", "5", "--solver-steps", "3", "--block", "3", "--inception", str(tmp_path / "net.pt"),
    ]  # fmt: skip
    cifar_bench.main(arguments)
    found = json.loads("{" + capsys.readouterr().out.partition("\n{")[2])["distances"]
    assert [found[name]["draws"] for name in ("all draws", "as many draws as test images")] == [5, 4]
    assert found["real images"]["images"] == 4
    assert all(0 <= row["frechet"] < 255**2 for row in found.values())
    assert (tmp_path / f"{family}-tiny" / "images.png").exists()


def test_a_run_goes_on_where_it_was_stopped(fashion, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SAMPLERS", {name: bench.SAMPLERS[name] for name in (*bench.BEST, "EDMHeun()")})
    smaller = {"BEST_EVALUATIONS": 3, "LIKELIHOOD_STEPS": 8, "SNAPSHOTS": 1, "FEWER": (2,), "ROUNDS": 2}
    for name, value in smaller.items():
        monkeypatch.setattr(bench, name, value)
    out = tmp_path / "out"
    arguments = [
        "--data", "fashion", "--folder", str(fashion), "--size", "tiny", "--out", str(out), "--device", "cpu",
        "--draws", "8", "--table-draws", "6", "--evaluations", "3", "--likelihoods", "2", "--block", "4",
        "--features", "pooled", "--float32",
    ]  # fmt: skip
    made = bench.draws
    calls = []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return made(*given)

    monkeypatch.setattr(bench, "draws", stopping)
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    bench.main(arguments)
    folder = out / "fashion-tiny"
    found = json.loads((folder / "results.json").read_text())
    assert set(found["floor"]) == {"6", "8"}
    assert list(found["samplers"]) == [f"{name}, 3" for name in (*bench.BEST, "EDMHeun()")]
    assert all(row["frechet"] > 0 and 0 <= row["recall"] <= 1 for row in found["samplers"].values())
    assert found["floor"]["8"]["frechet"] < found["best"][f"{bench.BEST[0]}, 3"]["frechet"]  # an untrained network
    # Fresh weights return zeros: the flow is that of the Gaussian N(0, sigma_data^2), whose entropy is known.
    sigma = float(bench.training_data(fashion_mnist(fashion)).std())
    entropy = 0.5 * math.log2(2 * math.pi * math.e * sigma**2) + 7
    assert found["bits"]["2"]["mean"] == pytest.approx(entropy, abs=0.3)
    assert (folder / "images.png").read_bytes()[:4] == b"\x89PNG"
    assert "| `EDMHeun" in (folder / "results.md").read_text()
    done = len(calls)
    bench.main(arguments)
    assert len(calls) == done
    with pytest.raises(ValueError, match="two steps at least, 3 evaluations, got 2"):
        bench.main([*arguments, "--out", str(tmp_path / "none"), "--evaluations", "2"])
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="another setting"):
        bench.Results(folder / "results.json", found["setting"] | {"steps": 9})


@pytest.mark.parametrize("name", bench.SAMPLERS)
def test_no_sampler_evaluates_more_than_the_table_says(name):
    solver = bench.SAMPLERS[name]
    x0 = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    law = sds.Gaussian(torch.zeros(2), 0.25).score(bench.PROCESS)
    for most in (5, 10):
        count = []

        def score(x, t, count=count):
            count.append(t)
            return law(x, t)

        grid = bench.grid_of(solver, most)
        sds.sample(bench.PROCESS, score, x0=80 * x0, solver=solver, grid=grid, seed=0, backend="eager")
        assert most - solver.evaluations < len(count) <= most


def test_floors_are_those_of_real_images():
    """Halves of one sample: the distance over the floor is about 1, and that of shifted images far more."""
    held = PIXELS.repeat(10, 1, 1)[torch.randperm(600, generator=torch.Generator().manual_seed(0))]
    judge = bench.Judge.__new__(bench.Judge)
    judge.features, judge.device = bench.Pooled(), "cpu"
    judge.learned, judge.held = (judge.of(bench.PIXELS.value(v.long())) for v in (held[:300], held[300:]))
    floor = judge.floor(300)
    same = judge.row(bench.PIXELS.value(held[:300].long()))
    assert abs(same["frechet"] - floor["frechet"]) < 6 * floor["frechet_std"]
    other = judge.row(0.5 * bench.PIXELS.value(held[:300].long()))
    assert other["frechet"] > 3 * floor["frechet"]
