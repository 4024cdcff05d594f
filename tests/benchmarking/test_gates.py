"""The gate before the clock: what is wrong is not timed, and what is right is."""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import weakref
from pathlib import Path

import pytest
import torch

import sdesolve as sds
from benchmarks import ensembles, generative, ops, registry, timing
from benchmarks.figures import FIGURES
from benchmarks.gpu_ops import states
from benchmarks.models import MODELS
from benchmarks.registry import Missing, Problem, compete, require, row
from benchmarks.suite import GOALS, problems

CPU = torch.device("cpu")
PATHS, STEPS = 16384, 16
HASTE = {"rounds": 2, "most": 2, "min_seconds": 0.0}


def chain(*, drift=1.0, noise=1.0, shared=False, steps=STEPS, paths=PATHS):
    """Euler-Maruyama on ``dX = -X dt + dW / 2`` from 1, as `benchmarks.models` has it, with something wrong."""

    def call():
        generator = torch.Generator().manual_seed(1)
        x = torch.ones(paths, 2)
        for _ in range(steps):
            z = torch.randn(1 if shared else paths, 2, generator=generator)
            x = x - drift * x / STEPS + noise * 0.5 * STEPS**-0.5 * z
        return x

    return call


WRONG = {
    "drift": chain(drift=0.9), "noise": chain(noise=1.1), "no noise": chain(noise=0.0),
    "same noise": chain(shared=True), "a step too few": chain(steps=STEPS - 1),
    "half the paths": chain(paths=PATHS // 2),
    "not finite": lambda: torch.full((PATHS, 2), math.nan),
}  # fmt: skip


@pytest.fixture(scope="module")
def problem():
    made = ensembles.ensemble("ou", PATHS, STEPS, CPU, width=2)
    right = {"sdesolve": chain(), "right": chain()}
    return dataclasses.replace(made, contenders={n: lambda c=c: c for n, c in (right | WRONG).items()}, limits={})


def test_wrong_contenders_are_not_timed(problem):
    found = compete(problem, **HASTE)
    assert {name for name, outcome in found.items() if outcome.timing is None} == WRONG.keys()
    assert all(found[name].refused for name in WRONG)
    assert {len(found[name].timing.seconds) for name in ("sdesolve", "right")} == {2}
    assert row(problem, "right", found["right"].timing)["rounds"] == 2


def test_a_wrong_baseline_leaves_nothing_to_compare_with(problem):
    spoiled = {"sdesolve": lambda: WRONG["drift"], "right": problem.contenders["right"]}
    found = compete(dataclasses.replace(problem, contenders=spoiled), **HASTE)
    assert not any(outcome.timing for outcome in found.values())
    assert "no sdesolve" in found["right"].refused


def test_what_is_missing_or_fails_does_not_stop_the_others(problem):
    def absent():
        require("torch", "a_package_that_is_not_there")

    def broken():
        raise RuntimeError("out of luck")

    made = {"sdesolve": problem.contenders["sdesolve"], "absent": absent, "broken": broken}
    found = compete(dataclasses.replace(problem, contenders=made), **HASTE)
    assert found["sdesolve"].timing is not None
    assert found["absent"].missing == "not installed: a_package_that_is_not_there"
    assert found["broken"].refused == "RuntimeError: out of luck"
    with pytest.raises(Missing):
        absent()


@pytest.mark.parametrize("name", ["tired", "sdesolve"])
def test_who_fails_after_its_check_does_not_stop_the_others(problem, name):
    calls, released = iter(range(10)), []

    def tired():
        if next(calls) > 1:
            raise RuntimeError("enough")
        return chain()()

    made = {"sdesolve": lambda: chain(), "right": lambda: chain(), name: lambda: tired}
    release = {"release": lambda: released.append(True)}
    found = compete(dataclasses.replace(problem, contenders=made, **release), **HASTE)
    assert found[name].refused == "RuntimeError: enough"
    assert (found["right"].timing is None) == (name == "sdesolve")
    assert released == [True]


def test_a_name_that_nobody_has_is_refused(problem):
    with pytest.raises(ValueError, match="no contender 'torch lop'; it has 'sdesolve', 'right'"):
        compete(problem, {"torch lop"}, **HASTE)
    nobody = dataclasses.replace(problem, contenders={"right": problem.contenders["right"]})
    with pytest.raises(ValueError, match="no contender 'sdesolve'"):
        compete(nobody, **HASTE)


def test_a_limit_is_a_rate_of_which_ours_reaches_a_share(problem):
    limited = dataclasses.replace(problem, limits={"limit": registry.Limit(1.5, 12.0, "B")})
    timing_of = timing.Timing(seconds=[2.0, 4.0, 3.0], over_baseline=[0.2, 0.4, 0.3])
    found = row(limited, "limit", timing_of)
    assert found["share"] == pytest.approx([1.5 * 0.25, 1.5 * 0.3, 1.5 * 0.35], rel=1e-3)
    assert (found["limit"], found["limit_unit"]) == (pytest.approx(12.0 / 4.5, rel=1e-3), "B/s")
    assert "limit" not in row(limited, "right", timing_of)


def test_the_real_contenders_pass_their_gate():
    made = ensembles.ensemble("linear", 512, 8, CPU)
    for name in ("sdesolve", "sdesolve eager", "torch loop"):
        assert made.check(name, made.contenders[name]()) is None
    made.release()


@pytest.mark.parametrize(("name", "paths", "steps"), [("linear", 8192, 64), ("linear", 16, 64), ("stress", 6720, 200)])
def test_noise_that_is_small_beside_the_mean_has_to_be_there(name, paths, steps):
    """Averages of x and x^2 do not see it: it is 1% of the linear equation's mean, and less than a sweep's spread."""
    made, model = ensembles.ensemble(name, paths, steps, CPU), MODELS[name]

    def noisy(scale):
        torch.manual_seed(1)
        if name == "stress":
            params = model.params(paths, CPU) * torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, scale])
            return ensembles.plain_loop(model, model.start(paths, CPU), params, steps, lambda f: f)()
        sde = sds.SDE(model.sde(CPU).drift, lambda x, t: scale * 0.01 * x, noise="diagonal")
        other = dataclasses.replace(model, sde=lambda device: sde, steps=steps)
        return ensembles.plain_loop(other, model.start(paths, CPU), None, steps, lambda f: f)()

    assert made.check("right", lambda: noisy(1.0)) is None
    for scale in (0.0,) if paths == 16 else (0.0, 0.7, 1.4):
        assert made.check("wrong", lambda scale=scale: noisy(scale)) is not None, scale
    made.release()


def test_another_draw_of_the_same_laws_is_not_told_from_them():
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-3, 3, 5000)[:, None]
    one, other, third = (scale * torch.randn(5000, 2, generator=generator) + 1 / scale for _ in range(3))
    assert ensembles.unlike(third, one, other) is None
    for wrong in (
        one,
        other,
        1 / scale.expand(-1, 2),
        third + scale,
        1.5 * (third - 1 / scale) + 1 / scale,
        one * math.nan,
    ):
        assert ensembles.unlike(wrong, one, other) is not None


@pytest.mark.parametrize("name", ["linear", "mixture"])
def test_torchsde_runs_as_its_documentation_says_is_fastest(name, monkeypatch):
    """Its Brownian motion told the step and with a cache without bound; an equation that goes forwards as it stands."""
    torchsde = pytest.importorskip("torchsde")
    made, interval, solve = [], torchsde.BrownianInterval, torchsde.sdeint
    monkeypatch.setattr(torchsde, "BrownianInterval", lambda *a, **k: made.append(k) or interval(*a, **k))
    monkeypatch.setattr(torchsde, "sdeint", lambda sde, *a, **k: made.append((sde, k)) or solve(sde, *a, **k))
    problem = ensembles.ensemble(name, 64, 8, CPU)
    problem.contenders["torchsde"]()()
    told, (sde, options) = made
    assert told["dt"] == options["dt"] == pytest.approx((1.0 if name == "linear" else 0.999) / 8)
    assert told["cache_size"] is None
    x, t, model = torch.rand(64, 2), torch.tensor(0.25), MODELS[name]
    right = model.sde(CPU).drift(x, t) if name == "linear" else -model.sde(CPU).drift(x, 1 - t)
    assert torch.equal(sde.f(t, x), right)


@pytest.mark.parametrize(("name", "steps"), ensembles.REFERENCED)
def test_stored_moments_are_those_of_the_models(name, steps):
    """The plain loop, on other noise than the table's; and states that are a little off."""
    paths = 6720 if name == "stress" else 1500  # a sweep's moments are those of the whole sweep
    torch.manual_seed(1)
    model, width = MODELS[name], MODELS[name].start(1, CPU).shape[1]
    params = None if model.params is None else model.params(paths, CPU)
    x = ensembles.plain_loop(model, model.start(paths, CPU), params, steps, lambda f: f)()
    reference = ensembles._reference(name, steps, width)
    assert ensembles.off(x.double(), reference, steps, 1e-7) is None
    assert ensembles.off(1.2 * x.double(), reference, steps, 1e-7) is not None


@pytest.mark.parametrize(
    ("kind", "steps"), [("DPM-Solver++ 2M", 20), pytest.param("ancestral", 50, marks=pytest.mark.thorough)]
)
def test_what_is_timed_of_a_sampler_is_what_is_checked(kind, steps):
    """A call that draws nothing, too little, or the start alone, under a name that is known and one that is not."""
    made = generative._sampler(kind, steps, CPU)
    right = made.contenders["sdesolve"]()
    drawn = right()
    wrong = {
        "nothing": torch.zeros_like(drawn), "the start": torch.randn_like(drawn), "half": drawn[:8],
        "a little": 0.8 * drawn, "nan": math.nan * drawn,
    }  # fmt: skip
    for name in ("sdesolve", "somebody else's"):
        assert made.check(name, right) is None
        for label, result in wrong.items():
            assert made.check(name, lambda result=result: result) is not None, label


def test_the_law_of_a_step_is_told_from_others():
    s = states((64, 512), torch.float32, CPU)
    step = ops.STEPS["euler_maruyama_step/diagonal"]

    def draw(seed, noise=1.0, drift=1.0):
        z = torch.randn(64, 512, generator=torch.Generator().manual_seed(seed))
        return s.x - 0.01 * drift * s.f + 0.1 * noise * s.g * z

    first, second = (step.ours(s, seed=seed, stream=3, first_path=0, step=5) for seed in (4, 5))
    inputs = (s.x, s.f, s.g)
    assert ops.same_law(draw(1), first, second, inputs) is None
    wrong = {
        "noise": draw(1, noise=1.1), "drift": draw(1, drift=-1.0), "no noise": draw(1, noise=0.0), "ours again": first,
        "shifted": draw(1) + 0.01, "shape": draw(1)[:5], "nan": draw(1) * math.nan,
    }  # fmt: skip
    for name, result in wrong.items():
        assert ops.same_law(result, first, second, inputs) is not None, name


def test_noise_of_uneven_size_is_not_taken_for_correlated():
    s = states((64, 512), torch.float32, CPU)
    g = s.g**3
    first, second, *others = (
        s.x + g * torch.randn(64, 512, generator=torch.Generator().manual_seed(seed)) for seed in range(22)
    )
    for other in others:
        assert ops.same_law(other, first, second, (s.x, s.f, g)) is None
    assert "input g" in ops.same_law(others[0] + 0.3 * g, first, second, (s.x, s.f, g))


def test_ratios_are_taken_within_a_round(monkeypatch):
    """A machine that gets ten times slower from round to round changes times and no ratio."""
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    calls = {"fast": 0, "slow": 0}

    def work(name, seconds):
        def call():
            calls[name] += 1
            clock[0] += seconds * 10.0 ** (calls["slow"] // 4)

        return call

    made = {"fast": work("fast", 1.0), "slow": work("slow", 3.0)}
    found = timing.interleave(made, baseline="fast", rounds=8, most=8, share=0.0, min_seconds=0.0)
    assert found["slow"].ratio == pytest.approx(3.0)
    assert max(found["slow"].seconds) >= 10 * min(found["slow"].seconds)
    assert found["fast"].over_baseline == [1.0] * 8


def test_rounds_end_when_ratios_are_precise_or_time_is_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    noise = iter(torch.rand(10_000, generator=torch.Generator().manual_seed(0)).tolist())

    def call(spread):
        def advance():
            clock[0] += 1.0 + spread * next(noise)

        return advance

    def rounds(spread, **options):
        made = {"a": call(0.0), "b": call(spread)}
        return len(timing.interleave(made, baseline="a", rounds=5, most=40, min_seconds=0.0, **options)["b"].seconds)

    assert rounds(0.0, seconds=1e9) == 5
    assert rounds(8.0, seconds=1e9) == 40
    assert 5 < rounds(8.0, seconds=60.0) < 40
    with pytest.raises(ValueError, match="baseline"):
        timing.interleave({"a": call(0.0)}, baseline="b")
    with pytest.raises(ValueError, match="at least 2"):
        timing.interleave({"a": call(0.0)}, baseline="a", rounds=1)


def test_calls_before_the_clock_and_cycles_of_others_are_not_timed(monkeypatch):
    """The first call after a pause costs ten times; another's garbage is collected in nobody's turn."""
    clock, cold, alive = [0.0], [True], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: cold.__setitem__(0, True))

    class Node:
        def __init__(self):
            self.me = self
            alive.append(weakref.ref(self))

    def littering():
        clock[0] += 1.0
        for _ in range(3):
            Node()

    def quick():
        clock[0] += 0.1 if cold[0] else 0.01
        cold[0] = False
        clock[0] += 100.0 * sum(node() is not None for node in alive)

    made = {"quick": quick, "littering": littering}
    for lead, expected in ((0.0, 0.1), (0.01, 0.01)):
        found = timing.interleave(made, baseline="quick", rounds=4, most=4, share=0.0, min_seconds=0.0, lead=lead)
        assert found["quick"].seconds == pytest.approx([expected] * 4)
        assert found["littering"].seconds == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("before", [False, True])
def test_objects_are_thawed_unless_some_were_frozen_before(before, monkeypatch):
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that the tests hold, which takes seconds
    if not before:
        gc.unfreeze()
    failing = {"failing": lambda: 1 / 0}
    try:
        with pytest.raises(ZeroDivisionError):
            timing.interleave(failing, baseline="failing", rounds=2, most=2)
        assert (gc.get_freeze_count() > 0) == before
    finally:
        gc.freeze()


def test_every_goal_belongs_to_something_in_the_quick_suite():
    for goal in GOALS:
        assert (goal.least is None) != (goal.most is None), goal
        if goal.problem in FIGURES:
            assert FIGURES[goal.problem].quick, goal
            continue
        found = problems()[goal.problem]
        assert isinstance(found, Problem)
        assert goal.contender in found.contenders, goal
        assert goal.contender in ("sdesolve", *found.quick), goal


def test_the_example_for_contributors_runs(capsys):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    hasty = code.replace("compete(problem, names)", "compete(problem, names, rounds=2, most=2)")
    assert hasty != code
    exec(compile(hasty, "CONTRIBUTING.md", "exec"), {})
    shown = capsys.readouterr().out
    for line in ("  linear, 16 x 256 ", "      mine ", "      torch loop ", "  distance, ", "      one draw "):
        assert f"\n{line}" in shown, line
    assert "NOT TIMED, as its result is wrong: distance, 65536 x 32 by squares: the mean distance" in shown


def test_threads_are_put_back(problem):
    before = torch.get_num_threads()
    seen = []
    made = {"sdesolve": lambda: lambda: seen.append(torch.get_num_threads())}
    alone = Problem("one", "none", "call", 1, made, lambda name, call: None, threads=3)
    compete(alone, **HASTE)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before
