"""``python -m sdesolve``: runs of specification files, and a doctor."""

from __future__ import annotations

import json
import re
import types

import pytest
import torch

import sdesolve as sds
from sdesolve import diagnostics
from sdesolve.__main__ import built, main

SOLVE = {
    "sde": {"OrnsteinUhlenbeck": {"rate": 1.5, "level": 0.2, "volatility": 0.4}},
    "x0": [[1.0]],
    "t0": 0,
    "t1": 1,
    "steps": 8,
    "solver": {"EulerMaruyama": {}},
    "seed": 3,
}


def test_a_run_of_a_file_is_that_of_python(tmp_path, capsys):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"solve": SOLVE, "paths": 25, "block": 10, "out": str(tmp_path / "run")}))
    assert main(["run", str(file)]) == 0
    assert "BlockArray('x1', shape=(25, 1)" in capsys.readouterr().out
    sde = sds.OrnsteinUhlenbeck(rate=1.5, level=0.2, volatility=0.4)
    here = sds.solve(sde, torch.ones(25, 1), 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3)
    there = sds.ensemble(
        sde, torch.ones(1, 1), 0, 1, 8, solver=sds.EulerMaruyama(), seed=3, paths=25, block=10, out=tmp_path / "run"
    )
    assert there.missing() == []
    assert torch.equal(there.result()["x1"].tensor(), here.x1)


def test_samples_and_reductions(tmp_path, capsys):
    draws = {"process": {"VP": {}}, "data": {"Gaussian": [[0.5, 0.5], 0.25]}, "shape": [2], "steps": 5, "seed": 1}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"draws": draws, "paths": 64, "block": 20, "reduce": {"Moments": {}}}))
    code = main(["run", str(file)])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "MergedMoments(count=64" in printed.out


@pytest.mark.uncompiled
def test_a_learned_score_is_read_from_its_checkpoint(tmp_path, capsys):
    torch.manual_seed(0)
    score = sds.NetworkScore(sds.nn.MLP((2,), width=8, depth=1), sds.VP())
    sds.save(score, tmp_path / "score.safetensors")
    draws = {"process": {"VP": {}}, "score": str(tmp_path / "score.safetensors"), "shape": [2], "steps": 3, "seed": 1}
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"draws": draws, "paths": 6, "block": 4, "out": str(tmp_path / "run")}))
    assert main(["run", str(file)]) == 0, capsys.readouterr().err
    kept = sds.ensemble(sds.Draws(sds.VP(), score.eval(), (2,), steps=3, seed=1), paths=6, block=4)().result()["x"]
    blocks = [sds.training.checkpoints.read(p)[0]["x"] for p in sorted((tmp_path / "run").glob("block-*"))]
    assert torch.equal(torch.cat(blocks), kept.tensor())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "one of solve, draws, chains"),
        (
            {"solve": SOLVE | {"solver": {"EulerMaruyana": {}}}},
            "no public class of sdesolve; did you mean EulerMaruyama",
        ),
        ({"solve": SOLVE | {"solver": {"os.system": ["ls"]}}}, "solver must be a solver object"),
        ({"solve": SOLVE | {"sde": {"OrnsteinUhlenbeck": {"speed": 1}}}}, "OrnsteinUhlenbeck: .*speed"),
        ({"solve": SOLVE, "pathz": 3}, "has no pathz"),
        ({"solve": {k: v for k, v in SOLVE.items() if k != "seed"}, "paths": 2}, "needs seed="),
    ],
)
def test_what_a_file_cannot_say_is_named(said, message, tmp_path, capsys):
    file = tmp_path / "spec.json"
    file.write_text(json.dumps({"paths": 3} | said))
    assert main(["run", str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_only_public_classes_are_made():
    for name in ("solve", "Path", "torch", "__import__", "Any"):
        with (
            pytest.raises(ValueError, match="no public class") if name[:1].isupper() else pytest.raises(AssertionError)
        ):
            assert not isinstance(built({name: {}}), dict)


def test_the_doctor_finds_kernels_good_and_bad(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in printed
    assert "cpu: good, largest difference from plain torch" in printed
    fused = diagnostics.solve

    def wrong(*args, **options):
        found = fused(*args, **options)
        if options["backend"] == "fused":
            found.x1[3] += 1e-9
        return found

    monkeypatch.setattr(diagnostics, "solve", wrong)
    assert main(["doctor"]) == 1
    assert "cpu: BAD" in capsys.readouterr().out


def test_the_doctor_says_where_there_are_no_kernels(capsys, monkeypatch):
    monkeypatch.setattr(diagnostics, "backend_for", lambda op, device: types.SimpleNamespace(compiles=False))
    assert main(["doctor"]) == 0
    assert "cpu: good, no kernels, runs go step by step in torch; for kernels pip install" in capsys.readouterr().out
