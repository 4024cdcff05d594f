"""What drives a sampler from outside: callbacks, saved states, seeds of rows, thresholds, and the laws of its steps."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

import sdesolve as sds

PROCESS = sds.VP()
DATA = sds.GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 1.0]]), torch.tensor([0.2, 0.4]))
SCORE = DATA.score(PROCESS)
NET = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
LEARNED = sds.NetworkScore(lambda x, t: NET(x) * t[:, None], PROCESS, "velocity")
SOLVERS = [
    *(sds.EulerMaruyama(), sds.DDIM(), sds.DDIM(0.5), sds.DPMSolverPP(2), sds.SDEDPMSolverPP(3), sds.UniPC(2)),
    *(sds.SASolver(2, 2), sds.EDMHeun(churn=5.0), sds.DPM2(), sds.SDEDPMSolverPP2S(), sds.Heun(), sds.DEIS(3)),
    sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.1), n=2),
    sds.PredictorCorrector(sds.DPMSolverPP(2), sds.LangevinCorrector(snr=0.1, norms="dimension")),
]
GUIDED = sds.ClassifierFreeGuidance(SCORE, lambda x, t: -x, scale=2.0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_callback_sees_the_run_and_leaves_it_as_it_is(solver):
    # One fused run beside a watched one; the others are compared to the bit.
    backend = "auto" if isinstance(solver, sds.EulerMaruyama) else "eager"
    options = {"solver": solver, "steps": 6, "seed": 3, "backend": backend}
    plain = sds.sample(PROCESS, SCORE, (5, 2), full=True, save_at="grid", **options)
    assert torch.equal(plain.x1, sds.sample(PROCESS, SCORE, (5, 2), **options))
    seen = []
    watched = sds.sample(PROCESS, SCORE, (5, 2), full=True, save_at="grid", callback=seen.append, **options)
    if backend == "eager":
        assert torch.equal(watched.xs, plain.xs)
    torch.testing.assert_close(watched.x1, plain.x1, rtol=2e-5, atol=2e-5)
    assert watched.stats.nfe == plain.stats.nfe
    assert watched.stats.execution != "fused"
    assert [step.index for step in seen] == list(range(6))
    assert all(step.steps == 6 for step in seen)
    assert [seen[0].t, *(step.t_next for step in seen)] == watched.ts.tolist() == PROCESS.time_grid(6).tolist()
    assert all(torch.equal(step.x_next, x) for step, x in zip(seen, watched.xs[1:], strict=True))
    assert all(torch.equal(a.x_next, b.x) for a, b in itertools.pairwise(seen))
    assert torch.equal(seen[0].x, watched.xs[0])
    with pytest.raises(RuntimeError, match="while the callback runs"):
        _ = seen[0].denoised


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("score", [SCORE, LEARNED, GUIDED], ids=["exact", "network", "guided"])
def test_the_denoised_estimate_is_tweedies_and_free_where_the_step_begins_with_it(solver, score):
    options = {"solver": solver, "steps": 4, "seed": 0, "full": True, "backend": "eager"}
    estimates = []
    sol = sds.sample(PROCESS, score, (3, 2), callback=lambda step: estimates.append((step, step.denoised)), **options)
    for step, denoised in estimates:
        expected = sds.tweedie(PROCESS, score, step.x, torch.tensor(step.t, dtype=torch.float32))
        torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)
    extra = sol.stats.nfe - sds.sample(PROCESS, score, (3, 2), **options).stats.nfe
    assert extra == (4 if getattr(solver, "churn", 0) else 0)  # with churn no step begins at its state


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_state_from_the_callback_is_the_one_to_go_on_with(solver):
    def moved(step):
        return step.x_next + 1.0 if step.index == 2 else None

    options = {"solver": solver, "seed": 1, "full": True, "save_at": "grid", "backend": "eager", "denoise": False}
    grid = PROCESS.time_grid(5)
    sol = sds.sample(PROCESS, SCORE, (4, 2), grid=grid, callback=moved, **options)
    bare = sds.sample(PROCESS, SCORE, (4, 2), grid=grid, **options)
    assert torch.equal(sol.xs[:3], bare.xs[:3])
    assert torch.equal(sol.xs[3], bare.xs[3] + 1.0)
    if getattr(solver, "memory", 0) or isinstance(solver, sds.PredictorCorrector) or not solver.divisible:
        assert not torch.equal(sol.x1, bare.x1)
        return
    noise = sds.BrownianPath(1, first_step=0)
    q = solver.sampling_stochasticity
    backward = PROCESS.reverse(SCORE, q) if q else PROCESS.probability_flow(SCORE)
    draws = sds.solve(backward, bare.xs[0], grid=grid[:4], solver=solver, noise=noise, backend="eager").state
    again = sds.solve(backward, start=type(draws)(sol.xs[3], draws.memory, draws.times, draws.noise, solver),
                      grid=grid[3:], solver=solver, backend="eager")  # fmt: skip
    assert torch.equal(again.x1, sol.x1)


@pytest.mark.parametrize("solver", SOLVERS[::3], ids=repr)
@pytest.mark.parametrize("save_at", [None, "grid", [0.9, 0.55, 0.2, 0.1]], ids=str)
def test_stopping_early_ends_the_run_there(solver, save_at):
    if isinstance(solver, sds.PredictorCorrector) and isinstance(save_at, list):
        return
    options = {"solver": solver, "seed": 1, "grid": torch.linspace(0.95, 0.05, 10, dtype=torch.float64)}

    def stops(step):
        if step.t_next < 0.5:
            step.stop()

    sol = sds.sample(PROCESS, SCORE, (4, 2), callback=stops, save_at=save_at, full=True, backend="eager", **options)
    whole = sds.sample(PROCESS, SCORE, (4, 2), save_at="grid", full=True, backend="eager", **options)
    assert sol.stats.steps == 5
    assert torch.equal(sol.x1, sds.tweedie(PROCESS, SCORE, whole.xs[5], whole.ts[5].float()))
    kept = 2 if isinstance(save_at, list) else 6 if save_at == "grid" else 1
    assert len(sol.xs) == len(sol.ts) == kept
    if save_at is None:
        assert torch.equal(sol.xs[0], whole.xs[5])
        assert float(sol.ts[0]) == float(whole.ts[5])
    if solver.divisible:
        assert torch.equal(sol.state.x, whole.xs[5])
        assert sol.state.times.tolist() == whole.ts[:6].tolist()
        rest = sds.sample(PROCESS, SCORE, start=sol.state, solver=solver, grid=options["grid"][5:], backend="eager")
        assert torch.equal(rest, whole.x1)


def test_stopping_before_any_saved_time_keeps_none():
    sol = sds.sample(PROCESS, SCORE, (4, 2), steps=10, seed=0, save_at=[0.2], callback=lambda step: step.stop())
    assert sol.xs.shape == (0, 4, 2)
    assert len(sol.ts) == 0
    assert sol.stats.steps == 1


def test_a_callback_follows_a_run_that_goes_on_and_one_from_pure_noise():
    first = sds.sample(PROCESS, SCORE, (4, 2), grid=PROCESS.time_grid(6)[:4], solver=sds.Ancestral(), seed=0, full=True)
    seen = []
    sds.sample(PROCESS, SCORE, start=first.state, steps=3, solver=sds.Ancestral(), callback=seen.append)
    assert [(step.index, step.steps) for step in seen] == [(3, 6), (4, 6), (5, 6)]
    process, grid = sds.Rectified(t_max=1.0), torch.tensor([1.0, 0.7, 0.4, 0.1])
    flow = sds.NetworkScore(lambda x, t: NET(x), process, "flow")
    options = {"solver": sds.DDIM(), "grid": grid, "seed": 0, "threshold": sds.Clip(-0.1, 0.1)}
    estimates = []
    sds.sample(process, flow, (3, 2), callback=lambda step: estimates.append(step.denoised), **options)
    assert all(d.abs().max() <= 0.1 + 1e-6 for d in estimates)
    x = process.sample_prior((3, 2), seed=0)  # at t = 1 the velocity is z - E[x_0], and x is z
    torch.testing.assert_close(estimates[0], (x - NET(x)).clamp(-0.1, 0.1))


def test_saved_states_are_those_of_solve_and_full_says_how_they_were_made():
    times = [0.8, 0.33, 0.1]
    sol = sds.sample(PROCESS, SCORE, (4, 2), steps=8, seed=2, save_at=times, backend="eager")
    backward = PROCESS.reverse(SCORE)
    same = sds.solve(backward, PROCESS.sample_prior((4, 2), seed=2), grid=PROCESS.time_grid(8), save_at=times,
                     solver=sds.EulerMaruyama(), seed=2, backend="eager")  # fmt: skip
    assert torch.equal(sol.xs, same.xs)
    assert sol.ts.tolist() == times
    assert sol.stats.nfe == same.stats.nfe + 1  # to denoise
    assert (sol.stats.solver, sol.stats.steps, sol.stats.seed) == ("EulerMaruyama", 8, 2)
    assert torch.equal(sol.x1, sds.tweedie(PROCESS, SCORE, same.x1, PROCESS.time_grid(8)[-1].float()))
    adaptive = sds.sample(PROCESS, SCORE, (4, 2), solver=sds.DormandPrince(), seed=2, save_at=times)
    assert adaptive.xs.shape == (3, 4, 2)
    assert isinstance(sds.sample(PROCESS, SCORE, (4, 2), steps=8, seed=2, backend="eager"), torch.Tensor)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_row_with_its_own_seed_is_the_row_of_a_run_of_its_own(solver):
    if isinstance(solver, sds.PredictorCorrector) and not solver.corrector.affine:
        solver = sds.PredictorCorrector(solver.predictor, sds.LangevinCorrector(snr=0.1))
    options = {"solver": solver, "steps": 3, "backend": "eager"}
    together = sds.sample(PROCESS, SCORE, (3, 2), seed=[7, 7, 11], **options)
    alone = [sds.sample(PROCESS, SCORE, (1, 2), seed=s, **options) for s in (7, 7, 11)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    whole = sds.sample(PROCESS, SCORE, (6, 2), seed=5, **options)
    chosen = sds.sample(PROCESS, SCORE, (2, 2), seed=5, paths=[4, 1], callback=lambda step: None, **options)
    torch.testing.assert_close(chosen, whole[[4, 1]], rtol=1e-5, atol=1e-6)
    assert torch.equal(together, sds.sample(PROCESS, SCORE, (3, 2), seed=torch.tensor([7, 7, 11]), **options))


def test_thresholds_hold_the_estimate_where_data_is():
    x = 3.0 * torch.randn(50, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sds.Clip(-1, 2)(x), x.clamp(-1, 2))
    for q in (0.5, 0.9, 1.0):
        s = torch.quantile(x.abs().flatten(1), q, 1).clamp(min=1.5)[:, None, None]
        torch.testing.assert_close(sds.DynamicThreshold(q, 1.5)(x), x.clamp(-s, s) * 1.5 / s)
        assert sds.DynamicThreshold(q, 1.5)(x).abs().max() <= 1.5 + 1e-6
    small = 0.1 * x.clamp(-1, 1)
    assert torch.equal(sds.DynamicThreshold(1.0)(small), small)
    assert sds.DynamicThreshold()(x[:0]).shape == (0, 4, 5)
    torch.testing.assert_close(sds.DynamicThreshold()(x)[3:5], sds.DynamicThreshold()(x[3:5]), rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("threshold", [sds.Clip(-1.0, 1.0), sds.DynamicThreshold(0.9)], ids=repr)
def test_samples_are_within_their_threshold(solver, threshold):
    options = {"solver": solver, "steps": 5, "seed": 0, "threshold": threshold, "backend": "eager"}
    assert sds.sample(PROCESS, SCORE, (40, 2), **options).abs().max() <= 1.0
    assert sds.sample(PROCESS, SCORE, (40, 2), **(options | {"threshold": None})).abs().max() > 1.5
    seen = []
    sds.sample(PROCESS, SCORE, (40, 2), callback=lambda step: seen.append(step.denoised.abs().max()), **options)
    assert max(seen) <= 1.0 + 1e-4
    tabulated = isinstance(solver, sds.AbstractTabulated) and not isinstance(solver, sds.AbstractOneStep)
    if tabulated and isinstance(threshold, sds.Clip):
        grid = sds.grids.with_zero(PROCESS.time_grid(5))
        assert sds.sample(PROCESS, SCORE, (40, 2), **(options | {"steps": None, "grid": grid})).abs().max() <= 1.0


def test_a_threshold_that_changes_nothing_is_no_threshold():
    score = sds.ThresholdedScore(PROCESS, SCORE, lambda d: d)
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(score(x, t), SCORE(x, t), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(score(x, t[2]), SCORE(x, t[2]), rtol=1e-8, atol=1e-8)
    assert score(x.float(), t).dtype == torch.float32


STOCHASTIC = [sds.EulerMaruyama(), sds.Ancestral(), sds.Ancestral("forward"), sds.ReverseDiffusion(), sds.DDIM(0.5),
              sds.SDEDPMSolverPP(1), sds.SDEDPMSolverPP(3), sds.SASolver(2, 2)]  # fmt: skip


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_laws_of_steps_are_those_that_the_sampler_drew_from(solver):
    options = {"solver": solver, "steps": 5, "seed": 4, "dtype": torch.float64, "backend": "eager"}
    sol = sds.sample(PROCESS, SCORE, (6, 2), save_at="grid", denoise=False, **options)
    laws = sds.transitions(PROCESS, SCORE, sol.xs, sol.ts, solver=solver)
    assert laws.mean.shape == (5, 6, 2)
    assert laws.std.shape == (5,)
    z = (sol.xs[1:] - laws.mean) / laws.std[:, None, None]
    unit = torch.arange(6, dtype=torch.float64)
    drawn = sds.BrownianPath(4).increments(unit, (6, 2), dtype=torch.float64)
    torch.testing.assert_close(z, drawn, rtol=1e-7, atol=1e-7)
    normal = torch.distributions.Normal(laws.mean, laws.std[:, None, None])
    torch.testing.assert_close(laws.log_prob(sol.xs[1:]), normal.log_prob(sol.xs[1:]).sum(2))
    torch.testing.assert_close(laws.sample(z), sol.xs[1:])
    assert laws[:2].mean.shape == (2, 6, 2)


@pytest.mark.parametrize("solver", [sds.Ancestral(), sds.EulerMaruyama(), sds.DDIM(0.7)], ids=repr)
def test_rows_may_be_at_steps_of_their_own(solver):
    grid = PROCESS.time_grid(5)
    sol = sds.sample(PROCESS, SCORE, (6, 2), grid=grid, save_at="grid", solver=solver, seed=4, dtype=torch.float64)
    whole = sds.transitions(PROCESS, SCORE, sol.xs, sol.ts, solver=solver)
    k, rows = torch.tensor([3, 0, 4, 2, 2, 1]), torch.arange(6)
    xs, ts = torch.stack([sol.xs[k, rows], sol.xs[k + 1, rows]]), torch.stack([grid[k], grid[k + 1]])
    apart = sds.transitions(PROCESS, SCORE, xs, ts, solver=solver)
    torch.testing.assert_close(apart.mean[0], whole.mean[k, rows])
    torch.testing.assert_close(apart.std[0], whole.std[k])
    torch.testing.assert_close(apart.log_prob(xs[1:])[0], whole.log_prob(sol.xs[1:])[k, rows])


@pytest.mark.parametrize("solver", [sds.Ancestral(), sds.SDEDPMSolverPP(2)], ids=repr)
def test_the_gradient_of_a_log_probability_is_that_of_differences(solver):
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def score_of(w):
        return lambda x, t: -x * torch.sigmoid(w)

    sol = sds.sample(PROCESS, score_of(w.detach()), (3, 2), steps=4, seed=0, save_at="grid", solver=solver,
                     dtype=torch.float64)  # fmt: skip

    def log_prob(w):
        return sds.transitions(PROCESS, score_of(w), sol.xs, sol.ts, solver=solver).log_prob(sol.xs[1:]).sum()

    (gradient,) = torch.autograd.grad(log_prob(w), w)
    with torch.no_grad():
        difference = (log_prob(w + 1e-5) - log_prob(w - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-6)
    old, new = (sds.transitions(PROCESS, score_of(v), sol.xs, sol.ts, solver=solver) for v in (w.detach(), w + 0.2))
    p, q = (torch.distributions.Normal(law.mean, law.std[:, None, None]) for law in (old, new))
    torch.testing.assert_close(old.kl(new), torch.distributions.kl_divergence(p, q).sum(2))
    assert (new.kl(new) == 0).all()


def test_steps_without_a_gaussian_law_are_refused_before_the_score_is_asked():
    def asked(x, t):
        raise AssertionError

    xs, ts = torch.zeros(3, 4, 2), PROCESS.time_grid(2)
    for solver in (sds.SDEDPMSolverPP2S(), sds.EDMHeun(churn=3.0), sds.ShARK(),
                   sds.PredictorCorrector(sds.Ancestral(), sds.LangevinCorrector(snr=0.1))):  # fmt: skip
        with pytest.raises(ValueError, match="not Gaussian"):
            sds.transitions(PROCESS, asked, xs, ts, solver=solver)
    with pytest.raises(ValueError, match="follows the probability flow"):
        sds.transitions(PROCESS, asked, xs, ts, solver=sds.DDIM())
    with pytest.raises(ValueError, match="ts must hold a time for each of the 3 states"):
        sds.transitions(PROCESS, asked, xs, ts[:2], solver=sds.Ancestral())
    with pytest.raises(TypeError, match="at least two states"):
        sds.transitions(PROCESS, asked, xs[:1], ts, solver=sds.Ancestral())
    laws = sds.transitions(PROCESS, SCORE, xs, [0.5, 0.2, 0.0], solver=sds.Ancestral())
    with pytest.raises(ValueError, match=re.escape("step 1 adds no noise, so that its state has no density")):
        laws.log_prob(xs[1:])
    with pytest.raises(ValueError, match=re.escape("these are xs[1:]")):
        laws.log_prob(xs)
    assert laws[:1].log_prob(xs[1:2]).shape == (1, 4)
    assert math.isfinite(float(laws[:1].log_prob(xs[1:2]).sum()))


def asked(x, t):
    raise AssertionError("the score was asked")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"callback": 3}, TypeError, "callback must be a function of a SamplingStep, got int"),
        ({"callback": lambda: None}, TypeError, "callback is called with one argument"),
        ({"callback": lambda a, b: None}, TypeError, "callback is called with one argument"),
        ({"callback": print, "steps": None, "solver": sds.DormandPrince()}, ValueError, "steps of each sample's own"),
        ({"callback": print, "backend": "fused"}, ValueError, "a callback is called after every step"),
        ({"callback": print, "cuda_graph": True}, ValueError, "returns samples alone"),
        ({"full": True, "cuda_graph": True}, ValueError, "returns samples alone"),
        ({"full": "yes"}, TypeError, "full must be True or False"),
        ({"save_at": [2.0]}, ValueError, "outside the grid"),
        ({"save_at": [0.1, 0.5]}, ValueError, "follow the direction"),
        ({"save_at": "grid", "steps": None, "solver": sds.DormandPrince()}, ValueError, r"save_at=\[times\]"),
        ({"seed": [1, 2, 3]}, ValueError, "seeds or path numbers for 3 rows, and the batch has 4"),
        ({"seed": [1, 2, 3, 0.5]}, TypeError, "integer"),
        ({"seed": "ab"}, TypeError, "seed must be"),
        ({"paths": [1, 2]}, ValueError, "for 2 rows, and the batch has 4"),
        ({"paths": [0, 1, 2, 3], "noise": sds.BrownianPath(0), "seed": None}, ValueError, "paths is short for"),
        ({"threshold": 1.0}, TypeError, "threshold must be a function of the denoised estimate"),
        ({"threshold": sds.Clip}, TypeError, "threshold must be a function"),
    ],
)
def test_bad_hooks_are_named_before_the_score_is_asked(options, error, message):
    with pytest.raises(error, match=message):
        sds.sample(PROCESS, asked, (4, 2), **{"steps": 3, "seed": 0, **options})


@pytest.mark.parametrize(
    ("back", "error", "message"),
    [
        (lambda s: s.x_next[:2], ValueError, r"shape \(2, 2\) after step 0, and states have \(4, 2\)"),
        (lambda s: s.x_next[0], ValueError, r"shape \(2,\) after step 0"),
        (lambda s: s.x_next.double(), TypeError, "returned torch.float64"),
        (lambda s: {"x": s.x_next}, TypeError, "returned dict after step 0"),
        (lambda s: True, TypeError, "returned bool after step 0"),
        (lambda s: s.x_next.log() * torch.tensor(float("nan")), ValueError, "not finite after step 0: row 0"),
    ],
)
def test_what_a_callback_returns_is_checked(back, error, message):
    with pytest.raises(error, match=message):
        sds.sample(PROCESS, SCORE, (4, 2), steps=3, seed=0, callback=back)


def test_bad_thresholds():
    for make, error in (
        (lambda: sds.Clip(1, -1), ValueError),
        (lambda: sds.Clip("a"), TypeError),
        (lambda: sds.DynamicThreshold(0.0), ValueError),
        (lambda: sds.DynamicThreshold(1.5), ValueError),
        (lambda: sds.DynamicThreshold(0.9, -1.0), ValueError),
    ):
        with pytest.raises(error):
            make()
    with pytest.raises(ValueError, match="keep the shape"):
        sds.sample(PROCESS, SCORE, (4, 2), steps=3, seed=0, threshold=lambda d: d[:1], backend="eager")


def test_a_state_that_diverges_after_a_callback_is_reported_at_its_step():
    def kicked(step):
        return step.x_next * 1e30 if step.index == 1 else None

    with pytest.raises(sds.DivergenceError) as caught:
        sds.sample(PROCESS, lambda x, t: -x.square(), (4, 2), steps=5, seed=0, callback=kicked)
    assert caught.value.step == 2


def test_a_callback_may_take_gradients_and_its_state_is_detached():
    def towards(step):
        with torch.enable_grad():
            x = step.x_next.clone().requires_grad_()
            (g,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
            return x - 0.05 * g

    assert not sds.sample(PROCESS, SCORE, (4, 2), steps=3, seed=0, callback=towards).requires_grad
