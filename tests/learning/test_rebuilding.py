"""Checkpoints that make their score again, in files and in folders of a hub."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import sdesolve as sds

PROCESSES = [
    sds.VP(), sds.VP(sds.LinearBeta(0.2, 15.0, t_min=2e-3)), sds.VP(sds.CosineBeta()), sds.SubVP(), sds.VE(0.02, 30.0),
    sds.EDM(0.003, 70.0), sds.OU(0.5, 1.5), sds.VP(sds.TableBeta(torch.linspace(0.99, 0.01, 50))),
]  # fmt: skip
NETWORKS = [
    lambda: sds.nn.MLP(2, width=8, depth=1, classes=3),
    lambda: sds.nn.MLP((2,), width=8, embedding=sds.nn.FourierFeatures.gaussian(4), dropout=0.1),
    lambda: sds.nn.UNet((1, 8, 8), channels=4, multipliers=(1, 2), blocks=1, attention=[(4, 4)], head=4),
    lambda: sds.nn.ConvNet((4, 4), channels=4, depth=1, width=8).double(),
]


def state(score, shape):
    dtype = next(score.parameters()).dtype
    return torch.randn(3, *shape, dtype=dtype, generator=torch.Generator().manual_seed(1)), torch.tensor(0.5).to(dtype)


def randomized(score):
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in score.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=made, dtype=torch.float64))
    return score.eval()


@pytest.mark.parametrize("k", range(len(NETWORKS)))
def test_a_file_makes_its_score(tmp_path, k):
    net, shape = NETWORKS[k](), [(2,), (2,), (1, 8, 8), (4, 4)][k]
    normalizer = [None, sds.nn.Normalizer.range(0, 255), None, sds.nn.Normalizer(torch.ones(4, 4), 2.0)][k]
    score = randomized(sds.NetworkScore(net, sds.VE(0.02, 30.0), "edm", 0.7, normalizer=normalizer))
    sds.save(score, tmp_path / "score.safetensors")
    again = sds.load_score(tmp_path / "score.safetensors")
    assert not again.training
    x, t = state(score, shape)
    assert torch.equal(again(x, t), score(x, t))
    assert again.state_dict().keys() == score.state_dict().keys()
    if normalizer is not None:
        assert (again.normalizer.low, again.normalizer.high) == (normalizer.low, normalizer.high)
        assert torch.equal(again.normalizer.scale, normalizer.scale)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_processes_are_made_again(tmp_path, process):
    score = sds.NetworkScore(sds.nn.MLP(1, width=4, depth=0), process, "data")
    sds.save(score, tmp_path / "score")
    again = sds.load_score(tmp_path / "score").process
    assert type(again) is type(process)
    for t in torch.linspace(process.t_min, process.t_max, 7, dtype=torch.float64):
        torch.testing.assert_close(again.log_alpha(t), process.log_alpha(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(again.sigma(t), process.sigma(t), rtol=1e-14, atol=0)


def test_training_runs_make_their_score(tmp_path):
    score = sds.NetworkScore(sds.nn.MLP(2, width=8, depth=0), sds.VP())
    data = torch.randn(64, 2)
    sds.train(
        score,
        data,
        loss=sds.DenoisingScoreMatching(),
        steps=4,
        batch_size=8,
        ema=0.9,
        checkpoint=tmp_path,
        progress=False,
    )
    again, expected = sds.load_score(tmp_path), sds.NetworkScore(sds.nn.MLP(2, width=8, depth=0), sds.VP())
    sds.load(expected, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"averages with decays 0\.9; ema=0.5 is not there"):
        sds.load_score(tmp_path, ema=0.5)


@sds.nn.rebuildable
class Own(nn.Module):
    def __init__(self, size, *, inner=None, bound=float("inf")):
        super().__init__()
        self.linear, self.inner, self.bound = nn.Linear(size, size), inner, bound

    def forward(self, x, t):
        h = self.linear(x).clamp(max=self.bound)
        return h if self.inner is None else h + self.inner(x, t)


class Plain(nn.Linear):
    def forward(self, x, t):
        return super().forward(x)


def test_ones_own_networks(tmp_path):
    score = randomized(sds.NetworkScore(Own(2, inner=sds.nn.MLP(2, width=4, depth=0)), sds.VP()))
    sds.save(score, tmp_path / "own")
    again, (x, t) = sds.load_score(tmp_path / "own", networks=[Own]), state(score, (2,))
    assert torch.equal(again(x, t), score(x, t))
    assert again.net.bound == float("inf")
    with pytest.raises(ValueError, match=r"own: it was made with 'Own', which is no class of sdesolve: give it"):
        sds.load_score(tmp_path / "own")
    plain = sds.NetworkScore(Plain(2, 2), sds.VP())
    sds.save(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"does not say how its score was made.* load\(score, path\)"):
        sds.load_score(tmp_path / "plain")
    sds.load(plain, tmp_path / "plain")
    with pytest.raises(ValueError, match="this score has Plain, which does not tell how it was made"):
        sds.save_pretrained(plain, tmp_path / "folder")
    two = sds.LinearDiffusion(lambda t: 1 - 0.5 * t, lambda t: t)
    with pytest.raises(ValueError, match="this score has LinearDiffusion, which"):
        sds.save_pretrained(sds.NetworkScore(sds.nn.MLP(2), two), tmp_path / "folder")
    sds.save(sds.NetworkScore(sds.nn.MLP(2, width=4), two), tmp_path / "two")
    with pytest.raises(ValueError, match="or its process is made of functions"):
        sds.load_score(tmp_path / "two")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(TypeError, match="must be a NetworkScore, got"):
        sds.save_pretrained(nn.Linear(2, 2), tmp_path / "folder")


@pytest.mark.parametrize(
    "change",
    [{"net": {"class": "Sequential", "arguments": {}}}, {"net": 3},
     {"net": {"class": "MLP", "arguments": {"shape": -1}}},
     {"process": {"class": "MLP", "arguments": {"shape": 2}}}, {"predicts": "future"}, {"dtype": "torch.int8"},
     {"net": {"class": "MLP", "arguments": {"shape": 2, "width": 9}}}],
)  # fmt: skip
def test_recipes_that_make_no_score(tmp_path, change):
    from sdesolve.training import checkpoints

    score = sds.NetworkScore(sds.nn.MLP(2, width=4, depth=0), sds.VP())
    sds.save(score, tmp_path / "score")
    tensors, header = checkpoints.read(tmp_path / "score")
    header["recipe"] |= change
    checkpoints.write(tmp_path / "score", tensors, header)
    with pytest.raises(ValueError, match="score"):
        sds.load_score(tmp_path / "score")


def test_folders_of_a_hub(tmp_path, monkeypatch):
    remote, calls = tmp_path / "remote", []

    def upload_folder(*, repo_id, folder_path, token=None, **more):
        calls.append((repo_id, token, more))
        target = remote / repo_id
        target.mkdir(parents=True)
        for file in Path(folder_path).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return "done"

    hub = types.SimpleNamespace(
        create_repo=lambda name, **more: calls.append((name, more)),
        upload_folder=upload_folder,
        snapshot_download=lambda name, allow_patterns, **more: str(remote / name),
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    score = randomized(sds.NetworkScore(sds.nn.MLP(2, width=4), sds.VP()))
    assert sds.push_to_hub(score, "someone/model", private=True, commit_message="first") == "done"
    assert calls == [
        ("someone/model", {"exist_ok": True, "private": True, "token": None}),
        ("someone/model", None, {"commit_message": "first"}),
    ]
    config = json.loads((remote / "someone/model/config.json").read_text())
    assert config["library_name"] == "sdesolve"
    assert config["recipe"]["net"]["class"] == "MLP"
    x, t = state(score, (2,))
    for where in ("someone/model", remote / "someone/model"):
        assert torch.equal(sds.load_score(where)(x, t), score(x, t))
    with pytest.raises(TypeError, match="takes no 'revision' for a file"):
        sds.load_score(remote / "someone/model", revision="main")
    with pytest.raises(FileNotFoundError):
        sds.load_score(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError):
        sds.load_score("someone/else")
