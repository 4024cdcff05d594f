"""A run by blocks has the bits of the whole, whoever did which block, in which order and how often."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sdesolve as sds

from .conftest import SDE, X0, make


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 23), st.integers(1, 30), st.randoms(use_true_random=False))
def test_blocks_in_any_order_and_twice(whole, paths, block, rng):
    run = make(x0=X0[:paths], block=block)
    order = list(range(run.blocks)) * 2
    rng.shuffle(order)
    for k in order:
        run.do(k)
    assert run.missing() == []
    assert torch.equal(run.result()["x1"].tensor(), whole.x1[:paths])


@pytest.mark.parametrize("folder", [False, True])
def test_arrays_are_those_of_solve(whole, folder, tmp_path):
    run = make(out=tmp_path / "run" if folder else None, save_at=[0.3, 1.0])
    with pytest.raises(ValueError, match=r"3 of 3 blocks are missing \(0, 1, 2\): run\(\) makes them"):
        run.result()
    run.do(1)
    partial = run.result(partial=True)
    assert torch.equal(partial["x1"][10:20], whole.x1[10:20])
    with pytest.raises(ValueError, match="block 2 is not there yet"):
        partial["x1"][19:21]
    found = run().result()
    assert set(found) == {"x1", "xs"}
    assert found["xs"].shape == (23, 2, 2)
    assert torch.equal(found["xs"].tensor().transpose(0, 1), whole.xs)
    assert torch.equal(found.ts, whole.ts)
    chosen = torch.tensor([22, 0, 9, 10])
    assert torch.equal(found["x1"][chosen], whole.x1[chosen])
    assert torch.equal(found["x1"][-1], whole.x1[-1])
    assert [first for first, _ in found["x1"].blocks()] == [0, 10, 20]
    with pytest.raises(IndexError):
        found["x1"][23]
    with pytest.raises(KeyError, match="there are x1, xs"):
        found["nothing"]


def test_starts_and_parameters_by_functions_rows_or_one_for_all():
    sde = sds.SDE(lambda x, t, p: -p["rate"] * x, lambda x, t, p: p["size"] * torch.ones_like(x), noise="diagonal")
    rates, size = torch.linspace(0.1, 2.0, 23)[:, None], torch.tensor(0.3)
    common = {"solver": sds.EulerMaruyama(), "seed": 3}
    whole = sds.solve(sde, X0[:1].expand(23, 2).clone(), 0.0, 1.0, 8, params={"rate": rates, "size": size}, **common)
    for params in (
        {"rate": rates, "size": size},
        lambda first, count: {"rate": rates[first : first + count], "size": size},
    ):
        for x0 in (X0[:1], lambda first, count: X0[:1].expand(count, 2).clone()):
            run = sds.ensemble(sde, x0, 0.0, 1.0, 8, params=params, paths=23, block=10, **common)
            assert torch.equal(run().result()["x1"].tensor(), whole.x1)
    # 3 rows are as many as the last block has paths
    with pytest.raises(ValueError, match=r"params has a tensor of 3 rows .*take another block size"):
        sds.ensemble(sde, X0, 0.0, 1.0, 8, params=torch.ones(3), block=10, **common)
    with pytest.raises(ValueError, match="x0 must have a row for each of 30 paths"):
        sds.ensemble(sde, X0, 0.0, 1.0, 8, paths=30, block=10, **common)
    run = sds.ensemble(sde, lambda first, count: X0[:2], 0.0, 1.0, 8, params=params, paths=23, block=10, **common)
    with pytest.raises(ValueError, match=r"x0\(0, 10\) must be a tensor of 10 rows, got \(2, 2\)"):
        run()


def test_times_of_each_path():
    ends = torch.linspace(0.5, 1.5, 23, dtype=torch.float64)
    whole = sds.solve(SDE, X0, 0.0, ends, 8, solver=sds.EulerMaruyama(), seed=3)
    run = sds.ensemble(SDE, X0, 0.0, ends, 8, solver=sds.EulerMaruyama(), seed=3, block=10)
    assert torch.equal(run().result()["x1"].tensor(), whole.x1)


def test_what_follows_paths_is_kept():
    options = {"carry": {"mean": sds.TimeAverage(lambda x, t: x)}, "until": sds.Crossing(lambda x, t: x[:, 0] - 0.5)}
    x0 = X0[:12]
    whole = sds.solve(SDE, x0, 0.0, 1.0, 8, solver=sds.EulerMaruyama(), seed=3, **options)
    found = make(x0=x0, **options)().result()
    assert torch.equal(found["carry.mean"].tensor(), whole.carry["mean"])
    for name in ("stopped", "stop_time", "boundary"):
        assert torch.equal(found[name].tensor(), getattr(whole, name))


@pytest.mark.parametrize("more", [{}, {"save_at": [0.3, 0.5, 1.0]}, {"carry": sds.TimeAverage(lambda x, t: x)}])
def test_segments_change_nothing_and_go_on_after_a_kill(more, tmp_path, monkeypatch):
    whole = make(**more)().result()
    run = make(segments=4, out=tmp_path / "run", **more)
    from sdesolve.ensembles import tasks

    calls, solve = [], tasks.solve

    @functools.wraps(solve)
    def killed(**given):
        calls.append(given["grid"][0].item())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(**given)

    monkeypatch.setattr(tasks, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run.missing() == [0, 1, 2]
    again = make(segments=4, out=tmp_path / "run", **more)
    again.do(0)
    assert calls == [0.0, 0.25, 0.5, 0.5, 0.75]  # from where it was
    found = again().result()
    assert all(torch.equal(found[name].tensor(), whole[name].tensor()) for name in whole)
    assert found.ts.tolist() == whole.ts.tolist()
    assert not list((tmp_path / "run").glob("part-*"))


@pytest.mark.parametrize(
    "sde",
    [
        sds.JumpSDE(lambda x, t: -x, lambda x, t: 0.1 * x, rate=4.0, jump=lambda x, t, z: 0.3 * z),
        sds.DelaySDE(lambda x, t, pasts: -pasts[0], lambda x, t, pasts: 0.1 * pasts[1], lags=(0.625, 0.125)),
    ],
)
def test_segments_go_on_with_what_paths_wait_for_and_where_they_have_been(sde, tmp_path, monkeypatch):
    given = {"solver": sds.EulerMaruyama(), "seed": 3, "block": 10}
    whole = sds.ensemble(sde, X0, 0.0, 1.0, 8, **given)().result()
    from sdesolve.ensembles import tasks

    calls, solve = [], tasks.solve

    @functools.wraps(solve)
    def killed(**options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(**options)

    monkeypatch.setattr(tasks, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        sds.ensemble(sde, X0, 0.0, 1.0, 8, segments=4, out=tmp_path / "run", **given)()
    found = sds.ensemble(sde, X0, 0.0, 1.0, 8, segments=4, out=tmp_path / "run", **given)().result()
    assert whole.keys() == found.keys() >= {"x1"}
    for name in whole:
        assert torch.equal(found[name].tensor(), whole[name].tensor())


def test_segments_keep_what_a_multistep_solver_remembers():
    p = sds.VP()
    flow = p.probability_flow(sds.Gaussian(torch.zeros(2), 0.5).score(p))
    times = torch.linspace(1.0, 0.01, 13, dtype=torch.float64)
    given = {"grid": times, "solver": sds.LinearMultistep(), "seed": 0, "block": 10}
    found = [sds.ensemble(flow, X0, segments=n, **given)().result()["x1"].tensor() for n in (1, 5)]
    assert torch.equal(*found)


def test_a_path_again_to_the_bit(whole):
    run = make(save_at=[0.3, 1.0])
    again = run.replay(17)
    assert again.stats.execution == "fused"
    assert again.xs.shape == (9, 1, 2)
    assert torch.equal(again.x1[0], whole.x1[17])
    assert torch.equal(run.replay(17, save_at=[0.3]).xs[:, 0], whole.xs[:1, 17])
    with pytest.raises(ValueError, match="path must be below 23"):
        run.replay(23)
    with pytest.raises(TypeError, match="replay takes no seed"):
        run.replay(1, seed=4)


@pytest.mark.uncompiled
def test_a_path_of_a_network_is_that_of_its_block():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    sde = sds.SDE(lambda x, t: net(x), lambda x, t: 0.1 * torch.ones_like(x), noise="diagonal")
    run = sds.ensemble(sde, X0, 0.0, 1.0, 4, solver=sds.EulerMaruyama(), seed=3, block=10)()
    for path in (3, 17, 22):
        assert torch.equal(run.replay(path).x1[0], run.result()["x1"][path])


def test_samples_likelihoods_and_chains_are_those_of_one_call():
    p = sds.VP()
    score = sds.Gaussian(torch.zeros(2), 0.5).score(p)
    draws = sds.ensemble(sds.Draws(p, score, (2,), steps=5, seed=1), paths=23, block=10)()
    assert torch.equal(draws.result()["x"].tensor(), sds.sample(p, score, (23, 2), steps=5, seed=1))
    assert torch.equal(draws.replay(21)["x"], draws.result()["x"][21])
    images = sds.ensemble(sds.Draws(p, score, x0=X0, steps=5, seed=1), block=10)()
    assert torch.equal(images.result()["x"].tensor(), sds.sample(p, score, x0=X0, steps=5, seed=1))
    found = sds.ensemble(sds.Likelihoods(p, score, X0, steps=5), block=10)().result()
    assert torch.equal(found["log_prob"].tensor(), sds.log_likelihood(p, score, X0, steps=5))
    kernel, energy = sds.mcmc.MALA(0.1), lambda x: 0.5 * x.square().sum(-1)
    chains = sds.ensemble(sds.Chains(kernel, X0, 6, energy=energy, seed=1, save_every=2), block=10)().result()
    whole = sds.run_chain(kernel, X0, 6, energy=energy, seed=1, save_every=2)
    assert torch.equal(chains["xs"].tensor().transpose(0, 1), whole.xs)
    assert torch.equal(chains["acceptance"].tensor(), whole.acceptance)


def test_divergence_names_the_path_of_the_run():
    sde = sds.SDE(lambda x, t: x.square() * 100.0, lambda x, t: torch.zeros_like(x), noise="diagonal")
    x0 = torch.zeros(23, 1)
    x0[14] = 10.0
    run = sds.ensemble(sde, x0, 0.0, 10.0, 20, solver=sds.EulerMaruyama(), seed=0, block=10)
    with pytest.raises(sds.DivergenceError, match="state of path 14 ") as caught:
        run()
    assert caught.value.path == 14
    assert run.missing() == [1]  # the others are complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": None}, "needs seed=, or noise=BrownianPath"),
        ({"noise": sds.BrownianPath(1)}, "give one of them"),
        ({"stepz": 3}, "takes no stepz in an ensemble"),
        ({"start": 3}, "takes no start in an ensemble"),
        ({"solver": None}, "solver must be a solver object"),
        (
            {"solver": sds.SKSROCK(stages=3), "segments": 2, "at": [(0.5, torch.sin)]},
            "segments= and at= do not go together",
        ),
        ({"reduce": "median"}, "reduce must be 'moments', 'sums' or a reduction"),
        ({"reduce": 3}, "reduce takes reductions"),
        ({"block": 0}, "block"),
        ({"paths": -1}, "paths"),
        ({"segments": 2, "reduce": "sums"}, "segments= goes with reduce='moments'"),
        ({"reduce": "moments", "carry": sds.TimeAverage(lambda x, t: x)}, "observable=lambda x, t, carry"),
    ],
)
def test_bad_arguments_are_refused_before_work(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(**change)


def test_ready_tasks_take_no_arguments_of_solve():
    p = sds.VP()
    draws = sds.Draws(p, sds.Gaussian(torch.zeros(2), 0.5).score(p), (2,), steps=5, seed=1)
    with pytest.raises(TypeError, match="Draws has its arguments already: leave out solver"):
        sds.ensemble(draws, paths=3, solver=sds.Heun())
    with pytest.raises(TypeError, match="give paths="):
        sds.ensemble(draws)
    with pytest.raises(TypeError, match="Draws takes no progress"):
        sds.Draws(p, draws.score, (2,), seed=1, progress=True)
    with pytest.raises(TypeError, match="shape is that of one sample"):
        sds.Draws(p, draws.score, 2, seed=1)
    with pytest.raises(TypeError, match="an ensemble is of an equation"):
        sds.ensemble(draws.score, paths=3)


def test_estimate_keeps_what_it_measured():
    run = make()
    said = run.estimate()
    assert said.blocks == len(run.missing()) == 1
    assert said.bytes == 3 * 10 * 2 * 4
    assert "1 blocks" in str(said)
